"""diffusers over peftrs: LoRAs of pipelines with a UNet and with a transformer, from training to swapping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.utils import USE_PEFT_BACKEND, convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from tests.ecosystem.tiny import distance, stable_diffusion

TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
FILE = "pytorch_lora_weights.safetensors"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(**TEXT, projection_dim=16, max_position_embeddings=16, eos_token_id=2, bos_token_id=1)
    )


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    t5 = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))
    vae = AutoencoderKL(
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    parts = {"transformer": transformer, "vae": vae, "text_encoder": clip(), "text_encoder_2": t5}
    return FluxPipeline(
        **parts, scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=None, tokenizer_2=None
    )


def image(pipe: Any, **options: Any) -> torch.Tensor:
    """What the pipeline makes of one prompt, its text encoder being asked for it, in two steps of
    denoising.
    """
    tokens = torch.arange(3, 11)[None]
    with torch.no_grad():
        text = pipe.text_encoder(tokens)
    prompt = {"prompt_embeds": text[0]}
    if isinstance(pipe, FluxPipeline):
        prompt["pooled_prompt_embeds"] = text.pooler_output
    else:
        options["guidance_scale"] = 1.0
    pipe.set_progress_bar_config(disable=True)
    settings = {
        "num_inference_steps": 2,
        "height": 8,
        "width": 8,
        "output_type": "pt",
        "generator": torch.manual_seed(0),
    }
    return pipe(**prompt, **settings, **options).images


def name_of(pipe: Any) -> str:
    return "transformer" if isinstance(pipe, FluxPipeline) else "unet"


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, name_of(pipe))


def saved(
    make: Callable[[], Any], folder: Path, seed: int, *, text: bool = True, **settings: Any
) -> torch.Tensor:
    """Makes a pipeline's LoRA, saves it as its trainers do, and returns the image that it made."""
    pipe = make()
    model = denoiser(pipe)
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **settings}
    model.add_adapter(LoraConfig(**config))
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }
    adapted = {name_of(pipe): model}
    if text:
        pipe.text_encoder.add_adapter(
            LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        adapted["text_encoder"] = pipe.text_encoder
    spelled = dict if isinstance(pipe, FluxPipeline) else convert_state_dict_to_diffusers
    layers = {f"{name}_lora_layers": spelled(get_peft_model_state_dict(one)) for name, one in adapted.items()}
    type(pipe).save_lora_weights(str(folder), **layers)
    return image(pipe)


def load(pipe: Any, folder: Path, weight_name: str = FILE, **options: Any) -> None:
    """Loads a LoRA; older versions look for a file only where they may ask the network."""
    pipe.load_lora_weights(str(folder), weight_name=weight_name, **options)


FAMILIES = {"unet": stable_diffusion, "transformer": flux}


def test_the_backend_is_found() -> None:
    assert USE_PEFT_BACKEND


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_trained_saved_loaded_mixed_fused_and_unloaded(self, family: str, tmp_path: Path) -> None:
        make = FAMILIES[family]
        one = saved(make, tmp_path / "one", 1, lora_alpha=4)
        # Without alphas in the file, the strength of one is what loaders assume.
        two = saved(make, tmp_path / "two", 2, r=8, text=False)
        pipe = make()
        plain = image(pipe)
        load(pipe, tmp_path / "one", adapter_name="one")
        assert distance(image(pipe), one) < 1e-4
        assert distance(one, plain) > 1e-3
        load(pipe, tmp_path / "two", adapter_name="two")
        assert denoiser(pipe).active_adapters() == ["two"]
        name = name_of(pipe)
        assert pipe.get_list_adapters() == {name: ["one", "two"], "text_encoder": ["one"]}
        pipe.set_adapters("two")
        assert pipe.get_active_adapters() == ["two"]
        assert distance(image(pipe), two) < 1e-4
        pipe.set_adapters(["one", "two"], [0.5, 0.25])
        assert set(pipe.get_active_adapters()) == {"one", "two"}
        mixed = image(pipe)
        layer = next(module for module in denoiser(pipe).modules() if isinstance(module, BaseTunerLayer))
        assert layer.scaling["two"] == pytest.approx(0.25 * layer.lora_alpha["two"] / layer.r["two"])
        before = {key: value.clone() for key, value in denoiser(pipe).state_dict().items()}
        pipe.fuse_lora(components=[name, "text_encoder"], adapter_names=["one", "two"])
        assert pipe.num_fused_loras
        assert set(layer.merged_adapters) == {"one", "two"}
        assert distance(image(pipe), mixed) < 1e-3
        pipe.unfuse_lora(components=[name, "text_encoder"])
        assert not layer.merged_adapters
        assert all(torch.equal(value, before[key]) for key, value in denoiser(pipe).state_dict().items())
        assert torch.equal(image(pipe), mixed)
        pipe.disable_lora()
        assert torch.equal(image(pipe), plain)
        pipe.enable_lora()
        assert torch.equal(image(pipe), mixed)
        pipe.set_lora_device(["one"], "cpu")
        pipe.delete_adapters("one")
        assert pipe.get_list_adapters() == {name: ["two"]}
        pipe.set_adapters("two")
        assert distance(image(pipe), two) < 1e-4
        pipe.unload_lora_weights()
        assert not any(isinstance(module, BaseTunerLayer) for module in denoiser(pipe).modules())
        assert torch.equal(image(pipe), plain)
        load(pipe, tmp_path / "one")
        assert distance(image(pipe), one) < 1e-4

    def test_a_fused_pipeline_keeps_the_change(self, family: str, tmp_path: Path) -> None:
        make = FAMILIES[family]
        expected = saved(make, tmp_path, 3, lora_alpha=4)
        pipe = make()
        load(pipe, tmp_path)
        pipe.fuse_lora(components=[name_of(pipe), "text_encoder"], safe_fusing=True)
        pipe.unload_lora_weights()
        assert distance(image(pipe), expected) < 1e-3

    def test_training_through_the_models_own_methods(self, family: str, tmp_path: Path) -> None:
        pipe = FAMILIES[family]()
        model = denoiser(pipe)
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS), "style")
        model.enable_gradient_checkpointing()
        if family == "unet":
            inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3, 5])}
            inputs["encoder_hidden_states"] = torch.randn(2, 8, model.config.cross_attention_dim)
            wanted = torch.randn(2, 4, 8, 8)
        else:
            inputs = {
                "hidden_states": torch.randn(2, 16, 4),
                "timestep": torch.tensor([0.3, 0.5]),
                "img_ids": torch.zeros(16, 3),
            }
            inputs |= {
                "encoder_hidden_states": torch.randn(2, 8, 16),
                "pooled_projections": torch.randn(2, 16),
            }
            inputs |= {"txt_ids": torch.zeros(8, 3)}
            wanted = torch.randn(2, 16, 4)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = (model.train()(**inputs, return_dict=False)[0] - wanted).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        model.save_lora_adapter(str(tmp_path), adapter_name="style")
        other = denoiser(FAMILIES[family]())
        other.load_lora_adapter(
            str(tmp_path), prefix=None, adapter_name="style", use_safetensors=True, weight_name=FILE
        )
        with torch.no_grad():
            learnt, loaded = (one.eval()(**inputs, return_dict=False)[0] for one in (model, other))
        assert torch.equal(learnt, loaded)

    def test_hotswap(self, family: str, tmp_path: Path) -> None:
        make = FAMILIES[family]
        one = saved(make, tmp_path / "one", 1, lora_alpha=4, text=False)
        two = saved(make, tmp_path / "two", 2, r=8, text=False)
        pipe = make()
        pipe.enable_lora_hotswap(target_rank=8)
        load(pipe, tmp_path / "one", adapter_name="default_0")
        assert distance(image(pipe), one) < 1e-4
        load(pipe, tmp_path / "two", adapter_name="default_0", hotswap=True)
        assert distance(image(pipe), two) < 1e-4
        load(pipe, tmp_path / "one", adapter_name="default_0", hotswap=True)
        assert distance(image(pipe), one) < 1e-4

    @pytest.mark.skipif(
        torch.__version__ < "2.7", reason="torch 2.6 compiles once more where ranks differ by layer"
    )
    def test_hotswap_of_a_compiled_model(self, family: str, tmp_path: Path) -> None:
        make = FAMILIES[family]
        expected = {
            # The files have no strengths: as they are read, they are the ranks.
            name: saved(make, tmp_path / name, rank, r=rank, lora_alpha=rank, text=False)
            for name, rank in (("one", 4), ("two", 8), ("three", 2))
        }
        pipe = make()
        pipe.enable_lora_hotswap(target_rank=8)
        load(pipe, tmp_path / "one", adapter_name="default_0")
        # The convolutions of a UNet take minutes to be compiled all the way.
        denoiser(pipe).compile(backend="inductor" if family == "transformer" else "eager")
        assert distance(image(pipe), expected["one"]) < 1e-4
        with torch._dynamo.config.patch(error_on_recompile=True):
            for name in ("two", "three", "one"):
                load(pipe, tmp_path / name, adapter_name="default_0", hotswap=True)
                assert distance(image(pipe), expected[name]) < 1e-4


def test_strengths_by_block_and_of_a_call(tmp_path: Path) -> None:
    full = saved(stable_diffusion, tmp_path, 1, lora_alpha=4, text=False)
    pipe = stable_diffusion()
    plain = image(pipe)
    load(pipe, tmp_path, adapter_name="style")
    halved = image(pipe, cross_attention_kwargs={"scale": 0.5})
    assert distance(image(pipe), full) < 1e-4
    pipe.set_adapters("style", 0.5)
    assert distance(image(pipe), halved) < 1e-4
    pipe.set_adapters("style", {"unet": {"down": 0.0, "mid": 0.0, "up": {"block_0": 0.0}}})
    assert distance(image(pipe), plain) < 1e-5
    pipe.set_adapters("style", {"unet": {"down": 1.0, "mid": 0.0, "up": {"block_0": 0.0}}})
    assert min(distance(image(pipe), plain), distance(image(pipe), full)) > 1e-5


def test_files_of_other_trainers(tmp_path: Path) -> None:
    """kohya's spelling, with an alpha for every layer."""
    saved(stable_diffusion, tmp_path, 1, text=False, lora_alpha=4, target_modules=["to_q", "to_v"])
    state = load_file(tmp_path / FILE)
    pipe = stable_diffusion()
    load(pipe, tmp_path)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    expected = image(pipe)
    kohya = {}
    for name, value in state.items():
        layer, _, end = name.removeprefix("unet.").rpartition(".lora")
        part = "down" if end.startswith((".down", "_A")) else "up"
        stem = "lora_unet_" + layer.replace(".processor", "").replace(".", "_")
        kohya[f"{stem}.lora_{part}.weight"] = value
        kohya[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(kohya, tmp_path / "kohya.safetensors")
    other = stable_diffusion()
    load(other, tmp_path, weight_name="kohya.safetensors")
    layer = next(module for module in other.unet.modules() if isinstance(module, BaseTunerLayer))
    assert set(layer.scaling.values()) == {0.5}
    assert distance(image(other), expected) < 1e-4
