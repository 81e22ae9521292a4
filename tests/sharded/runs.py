"""The same few training steps, alone and in every way of sharing them out: each gives its losses and saves
its adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftrs

STEPS = 4
ROWS = 4
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"target_modules": ["q_proj", "o_proj", "down_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "lora_bias": False},
    "narrow": {"target_modules": "all-linear"},
    "pissa": {"target_modules": ["v_proj", "up_proj", "down_proj"], "init_lora_weights": "pissa"},
    "qalora": {"target_modules": "all-linear", "use_qalora": True, "qalora_group_size": 8},
    "ia3": {
        "target_modules": ["k_proj", "v_proj", "o_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}


def base(folder: Path) -> Path:
    """The folder of the model that all runs start from."""
    path = folder / "base"
    if not path.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(path)
    return path


def adapted(folder: Path, method: str = "lora", **loading: Any) -> Any:
    path = base(folder)
    torch.manual_seed(3)
    dtype = torch.bfloat16 if method == "narrow" else torch.float32
    model = LlamaForCausalLM.from_pretrained(path, torch_dtype=dtype, **loading)
    kind, settings = (
        (peftrs.IA3Config, {}) if method == "ia3" else (peftrs.LoraConfig, {"r": 4, "lora_alpha": 8})
    )
    return peftrs.get_peft_model(model, kind(task_type="CAUSAL_LM", **settings, **METHODS[method])).train()


def batches() -> Tensor:
    return torch.randint(3, 64, (STEPS, ROWS, 8), generator=torch.Generator().manual_seed(1))


def train(
    model: nn.Module, rows: slice, group: Any = None, average: Callable[[], None] | None = None
) -> list[float]:
    """The losses of each step, averaged over the processes of `group`, which see different rows."""
    optimizer = torch.optim.AdamW(
        (one for one in model.parameters() if one.requires_grad), lr=1e-2, foreach=False
    )
    losses = []
    for batch in batches():
        loss = model(input_ids=batch[rows], labels=batch[rows]).loss
        loss.backward()
        if average is not None:
            average()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if group is not None:
            dist.all_reduce(mean, group=group)
            mean /= dist.get_world_size(group)
        losses.append(float(mean))
    return losses


def share(rank: int | None = None, world: int | None = None) -> slice:
    """The rows of every batch that this process sees."""
    each = ROWS // (world or dist.get_world_size())
    rank = dist.get_rank() if rank is None else rank
    return slice(rank * each, (rank + 1) * each)


def main() -> bool:
    return dist.get_rank() == 0


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=batches()[0]).logits.detach().clone()


def alone(folder: Path, method: str) -> list[float]:
    model = adapted(folder, method)
    losses = train(model, slice(None))
    model.save_pretrained(folder / f"alone-{method}")
    torch.save(answers(model), folder / f"alone-{method}" / "answers.pt")
    return losses


def ddp(folder: Path) -> dict[str, Any]:
    model = adapted(folder)
    losses = train(nn.parallel.DistributedDataParallel(model), share(), dist.group.WORLD)
    model.save_pretrained(folder / "ddp", is_main_process=main())
    return {"losses": losses}


def _mesh() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


def _sharded(model: Any, mesh: Any, **options: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def _fsdp(folder: Path, method: str = "lora") -> dict[str, Any]:
    model = _sharded(adapted(folder, method), _mesh())
    losses = train(model, share(), dist.group.WORLD)
    name = f"fsdp-{dist.get_world_size()}-{method}"
    model.save_pretrained(folder / name, is_main_process=main())
    return {"losses": losses, **merging(model)}


def merging(model: Any) -> dict[str, Any]:
    """What merging does to the outputs, and whether unmerging brings every bit back."""
    before = {name: _local(one).clone() for name, one in model.named_parameters() if "base_layer" in name}
    found = {"answers": answers(model)}
    model.merge_adapter()
    found["merged"] = answers(model)
    model.unmerge_adapter()
    after = {name: _local(one) for name, one in model.named_parameters() if "base_layer" in name}
    found["same"] = all(torch.equal(before[name], after[name]) for name in before)
    return found


def _local(tensor: Any) -> Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def fsdp_lora(folder: Path) -> dict[str, Any]:
    return _fsdp(folder)


def fsdp_dora(folder: Path) -> dict[str, Any]:
    return _fsdp(folder, "dora")


def fsdp_pissa(folder: Path) -> dict[str, Any]:
    return _fsdp(folder, "pissa")


def fsdp_ia3(folder: Path) -> dict[str, Any]:
    return _fsdp(folder, "ia3")


def fsdp_embedding(folder: Path) -> dict[str, Any]:
    return _fsdp(folder, "embedding")


def fsdp_narrow(folder: Path) -> dict[str, Any]:
    """Layers in bfloat16 with adapters in float32."""
    return _fsdp(folder, "narrow")


def fsdp_replicated(folder: Path) -> dict[str, Any]:
    """The frozen layers in parts, the adapters whole in each process."""
    from torch.distributed.fsdp import fully_shard

    model = adapted(folder)
    for module in list(model.modules()):
        if isinstance(module, peftrs.core.layer.AdaptedLayer):
            fully_shard(module.base_layer, mesh=_mesh())
    trained = [one for one in model.parameters() if one.requires_grad]

    def average() -> None:
        for one in trained:
            dist.all_reduce(one.grad)
            one.grad /= dist.get_world_size()

    losses = train(model, share(), dist.group.WORLD, average)
    model.save_pretrained(folder / "fsdp-replicated", is_main_process=main())
    return {"losses": losses, **merging(model)}


def _tp(folder: Path, method: str = "lora") -> dict[str, Any]:
    from transformers.distributed import DistributedConfig

    model = adapted(folder, method, distributed_config=DistributedConfig(tp_size=dist.get_world_size()))
    losses = train(model, slice(None))
    name = f"tp-{method}"
    model.save_pretrained(folder / name, is_main_process=main())
    return {"losses": losses, **merging(model)}


def tp_lora(folder: Path) -> dict[str, Any]:
    return _tp(folder)


def tp_dora(folder: Path) -> dict[str, Any]:
    return _tp(folder, "dora")


def tp_embedding(folder: Path) -> dict[str, Any]:
    return _tp(folder, "embedding")


def tp_pissa(folder: Path) -> dict[str, Any]:
    return _tp(folder, "pissa")


def tp_ia3(folder: Path) -> dict[str, Any]:
    return _tp(folder, "ia3")


def tp_qalora(folder: Path) -> dict[str, Any]:
    return _tp(folder, "qalora")


def tp_others(folder: Path) -> dict[str, Any]:
    """Methods whose formulas do not follow slices."""
    from transformers.distributed import DistributedConfig

    found = {}
    for name, config in {
        "oft": peftrs.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
    }.items():
        options = DistributedConfig(tp_size=dist.get_world_size())
        try:
            peftrs.get_peft_model(
                LlamaForCausalLM.from_pretrained(base(folder), distributed_config=options), config
            )
        except peftrs.ConfigError as error:
            found[name] = str(error)
    return found


def tp_loading(folder: Path) -> dict[str, Any]:
    """An adapter that one process trained, on a model that tensor parallelism spreads."""
    from transformers.distributed import DistributedConfig

    model = LlamaForCausalLM.from_pretrained(
        base(folder), distributed_config=DistributedConfig(tp_size=dist.get_world_size())
    )
    loaded = peftrs.PeftModel.from_pretrained(model, folder / "alone-lora")
    found = {"answers": answers(loaded)}
    loaded.load_adapter(folder / "alone-dora", "second")
    loaded.set_adapter("second")
    found["second"] = answers(loaded)
    return found


def fsdp_loading(folder: Path) -> dict[str, Any]:
    """New values into an adapter that is in parts already."""
    model = _sharded(adapted(folder), _mesh())
    model.load_adapter(folder / "alone-lora", "default")
    return {"answers": answers(model)}


def refusals(folder: Path) -> dict[str, Any]:
    """What is refused, and what is left of the files that were there before."""
    from torch.distributed.fsdp import fully_shard

    model, own = _sharded(adapted(folder), _mesh()), folder / f"kept-{dist.get_rank()}"
    model.save_pretrained(own)
    before = (own / "adapter_model.safetensors").read_bytes()
    found = {}
    parts = {name: _local(one) for name, one in model.named_parameters()}
    empty = {name: torch.empty(0) for name in parts}
    for name, given in (("parts", parts), ("empty", empty)):
        try:
            model.save_pretrained(own, state_dict=given)
        except peftrs.AdapterError as error:
            found[name] = str(error)
    found["kept"] = before == (own / "adapter_model.safetensors").read_bytes()
    late = LlamaForCausalLM.from_pretrained(base(folder))
    fully_shard(late, mesh=_mesh())
    try:
        peftrs.get_peft_model(late, peftrs.LoraConfig())
    except peftrs.AdapterError as error:
        found["late"] = str(error)
    return found


def both(folder: Path) -> dict[str, Any]:
    """Two by two: layers spread by tensor parallelism, and what is spread sharded once more."""
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = LlamaForCausalLM.from_pretrained(base(folder))
    model._device_mesh = mesh["tp"]
    apply_tensor_parallelism(model, mesh["tp"], model._expand_parallel_plan(model.tp_plan))
    torch.manual_seed(3)
    config = peftrs.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **METHODS["lora"])
    model = _sharded(peftrs.get_peft_model(model, config).train(), mesh["dp"])
    losses = train(model, share(mesh["dp"].get_local_rank(), 2), mesh["dp"].get_group())
    model.save_pretrained(folder / "both", is_main_process=main())
    return {"losses": losses}
