"""Trains a LoRA of a Stable Diffusion UNet, then loads it into a pipeline, sets its strength and fuses it.

python examples/with_diffusers.py                               # a tiny random pipeline and random images
python examples/with_diffusers.py --model NAME --images FOLDER --prompt "a photo of sks dog" --steps 400
"""
# ruff: noqa: E402

import argparse
from pathlib import Path

import peftrs.compat

peftrs.compat.install()  # before diffusers is imported: from here on `peft` is peftrs

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, load_image
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import tiny

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="the pipeline's folder or repository; by default a tiny random one")
parser.add_argument("--images", type=Path, help="a folder of images to learn from; by default noise")
parser.add_argument("--prompt", default="a cat on a mat")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--output", type=Path, default=Path("output/diffusers"))
options = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"


def pipeline() -> StableDiffusionPipeline:
    """The base pipeline."""
    made = (
        StableDiffusionPipeline.from_pretrained(options.model) if options.model else tiny.stable_diffusion()
    )
    return made.to(device)


pipe = pipeline()
size = pipe.unet.config.sample_size * pipe.vae_scale_factor
if options.images:
    images = pipe.image_processor.preprocess(
        [load_image(str(path)) for path in options.images.iterdir()], size, size
    )
else:
    images = torch.randn(4, 3, size, size)
with torch.no_grad():
    prompt, _ = pipe.encode_prompt(options.prompt, device, 1, do_classifier_free_guidance=False)
    latents = pipe.vae.encode(images.to(device)).latent_dist.sample() * pipe.vae.config.scaling_factor

pipe.unet.requires_grad_(False)
pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
optimizer = torch.optim.AdamW([one for one in pipe.unet.parameters() if one.requires_grad], lr=1e-3)
noiser = DDPMScheduler.from_config(pipe.scheduler.config)
for step in range(options.steps):
    noise = torch.randn_like(latents)
    times = torch.randint(0, noiser.config.num_train_timesteps, (len(latents),), device=device)
    guess = pipe.unet(
        noiser.add_noise(latents, noise, times), times, prompt.expand(len(latents), -1, -1)
    ).sample
    loss = (guess - noise).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step}: loss {loss.item():.3f}")
layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
StableDiffusionPipeline.save_lora_weights(str(options.output), unet_lora_layers=layers)


def draw(pipe: StableDiffusionPipeline) -> torch.Tensor:
    """The same image from the same noise."""
    settings = {"num_inference_steps": 4, "height": size, "width": size, "output_type": "pt"}
    return pipe(options.prompt, generator=torch.Generator().manual_seed(0), **settings).images


loaded = pipeline()
loaded.load_lora_weights(
    str(options.output), weight_name="pytorch_lora_weights.safetensors", adapter_name="learnt"
)
print(f"loaded again: pixels at most {(draw(loaded) - draw(pipe)).abs().max().item():.0e} apart")
loaded.set_adapters("learnt", 0.7)
before = draw(loaded)
loaded.fuse_lora(adapter_names=["learnt"])
loaded.unload_lora_weights()
print(f"fused at strength 0.7: pixels at most {(draw(loaded) - before).abs().max().item():.0e} apart")
