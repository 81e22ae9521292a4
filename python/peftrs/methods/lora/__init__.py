"""LoRA: a change of low rank beside a frozen weight, `W + s·B·A` with `A (r, in)`, `B (out, r)`, `s = alpha /
r`.

Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised scaling `alpha / √r`:
https://arxiv.org/abs/2312.03732. A convolution's `A` has the layer's own kernel, stride and padding over all
input channels, and `B` is a 1×1 convolution in the layer's groups. A stack of `E` experts keeps its factors
in one pair: row `e·r + k` of `A`, column `k·E + e` of `B`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftrs.bases.kinds import CONVOLUTIONS, Affine, LayerKind, LayerSpec, Term
from peftrs.config import RUNTIME, LayeredConfig, PeftType
from peftrs.core.method import Adapter, Additive, Method, Of, Slot, Slots, method_for
from peftrs.errors import ConfigError, PeftrsWarning
from peftrs.methods.lora import inits
from peftrs.registry import register


@dataclass
class LoraRuntimeConfig:
    """Settings of one process that no file keeps."""

    ephemeral_gpu_offload: bool = False
    """Whether first values of adapters on the CPU (DoRA's norms, PiSSA's factors) are computed on the
    accelerator, where one is.
    """


@dataclass
class LoraConfig(LayeredConfig):
    """The settings of a LoRA adapter: PEFT's names, defaults and file format."""

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    UNBUILT: ClassVar[tuple[str, ...]] = (
        "eva_config", "corda_config", "lora_ga_config", "megatron_config", "velora_config",
        "alora_invocation_tokens",
        "monteclora_config", "use_bdlora", "arrow_config", "kasa_config",
    )  # fmt: skip

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict[str, Any] = field(default_factory=dict)
    eva_config: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    lora_ga_config: dict[str, Any] | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig, metadata=RUNTIME)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        self.peft_type = PeftType.LORA
        if isinstance(settings := cast(Any, self.loftq_config), inits.LoftQConfig):
            self.loftq_config = vars(settings)
        super().__post_init__()
        faults = [
            f"`{name}` is not built yet in peftrs: leave it unset"
            for name in self.UNBUILT
            if getattr(self, name)
        ]
        if self.loftq_config and self.init_lora_weights != "loftq":
            warnings.warn(
                "`loftq_config` is ignored when `init_lora_weights` is not 'loftq'",
                PeftrsWarning,
                stacklevel=3,
            )
            self.loftq_config = {}
        start = None
        try:
            start = inits.find(self.init_lora_weights, self.loftq_config)
        except ConfigError as error:
            faults.append(str(error))
        if self.lora_bias and self.use_dora:
            faults.append("`lora_bias` does not go with `use_dora`, whose magnitude acts on the weight alone")
        if self.use_qalora and (self.use_dora or start is not None):
            faults.append(
                "`use_qalora` goes neither with `use_dora` nor with"
                f" init_lora_weights={self.init_lora_weights!r}"
            )
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            faults.append(
                f"`lora_bias` does not go with init_lora_weights={self.init_lora_weights!r}: use True or"
                " False"
            )
        if faults:
            raise ConfigError("; ".join(faults))


@register
class Lora(Additive):
    """The plain method; `use_dora` configs get `Dora`, which builds on it."""

    name = "LORA"
    config = LoraConfig
    prefix = "lora_"
    attributes: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "lora_bias",
    )
    layers = frozenset(LayerKind)
    parallel = True

    def variant(self, config: LoraConfig) -> Method:
        if config.use_qalora:
            return method_for("QALORA")
        return method_for("DORA") if config.use_dora else self

    def settle(self, config: LoraConfig, spec: LayerSpec) -> dict[str, Any]:
        values = {"r": spec.matched.get("rank_pattern", config.r)}
        values["lora_alpha"] = spec.matched.get("alpha_pattern", config.lora_alpha)
        values["start"] = start = inits.find(config.init_lora_weights, config.loftq_config)
        faults = []
        if values["r"] < 1:
            faults.append(f"rank {values['r']} is not a positive integer")
        elif (
            start is not None and (fault := start.unfit(spec, values, self.scale(config, values))) is not None
        ):
            faults.append(f"init_lora_weights={config.init_lora_weights!r}: {fault}")
        if config.lora_bias and spec.kind in (LayerKind.EMBEDDING, LayerKind.ATTENTION, LayerKind.PARAMETER):
            faults.append(f"`lora_bias` needs a layer with outputs of its own, not an {spec.kind} weight")
        if config.lora_dropout and spec.kind is LayerKind.PARAMETER:
            faults.append("`lora_dropout` needs the layer's input, which a bare parameter does not see")
        if spec.kind in CONVOLUTIONS and values["r"] % spec.groups:
            faults.append(f"rank {values['r']} must be a multiple of the layer's {spec.groups} groups")
        if faults:
            raise ConfigError("; ".join(faults))
        return values

    def scale(self, config: LoraConfig, values: dict[str, Any]) -> float:
        return float(values["lora_alpha"] / (math.sqrt(values["r"]) if config.use_rslora else values["r"]))

    def slots(self, config: LoraConfig, spec: LayerSpec, values: dict[str, Any]) -> Slots:
        rank, kernel = values["r"], spec.shape[2:]
        if spec.kind is LayerKind.EMBEDDING:
            return {
                "lora_embedding_A": (rank, spec.in_features),
                "lora_embedding_B": (spec.out_features, rank),
            }
        if spec.stacked:
            rank, kernel = rank * spec.shape[0], ()
        down = (rank, spec.in_features, *kernel)
        up = (spec.out_features, rank // spec.groups, *[1] * len(kernel))
        if spec.tied is not None and spec.kind is LayerKind.LINEAR:
            # An output layer whose weight is an embedding's table.
            return {
                "lora_A.weight": Slot(down, of=Of(spec.tied, "lora_embedding_B", transposed=True)),
                "lora_B.weight": Slot(up, of=Of(spec.tied, "lora_embedding_A", transposed=True)),
            }
        slots: dict[str, Slot | tuple[int, ...]] = {"lora_A.weight": down, "lora_B.weight": up}
        if config.lora_bias:
            slots["lora_B.bias"] = (spec.out_features,)
        if values["start"] is not None and values["start"].changes_base:
            slots["origin_A.weight"] = Slot(down, trained=False, saved=False)
            slots["origin_B.weight"] = Slot(up, trained=False, saved=False)
        return slots

    def init(self, adapter: Adapter, base: Affine) -> None:
        down, up = _names(adapter)
        if adapter.values["start"]:
            if "origin_A.weight" in adapter:
                first = {down: adapter["origin_A.weight"], up: adapter["origin_B.weight"]}
            else:
                first = adapter.values["start"](adapter, base)
            for slot, value in first.items():
                adapter[slot].copy_(value)
        elif adapter.config.init_lora_weights is False:
            embedding = adapter.spec.kind is LayerKind.EMBEDDING
            for slot in (down, up):
                (
                    nn.init.normal_(adapter[slot])
                    if embedding
                    else nn.init.kaiming_uniform_(adapter[slot], a=math.sqrt(5))
                )
        elif adapter.spec.kind is LayerKind.EMBEDDING:
            nn.init.zeros_(adapter[down])
            nn.init.normal_(adapter[up])
        else:
            nn.init.zeros_(adapter[up])
            if adapter.config.init_lora_weights is True:
                nn.init.kaiming_uniform_(adapter[down], a=math.sqrt(5))
            else:
                nn.init.normal_(adapter[down], std=1 / adapter.values["r"])
        if "lora_B.bias" in adapter:
            bound = 0.0 if adapter.config.init_lora_weights else 1 / math.sqrt(adapter.values["r"])
            nn.init.uniform_(adapter["lora_B.bias"], -bound, bound)

    def rebuilt(self, adapter: Adapter, base: Affine) -> dict[str, Tensor]:
        start = adapter.values["start"]
        if start is None or not start.changes_base:
            return {}
        if base.weight.device.type == "meta":
            raise ConfigError(
                f"{adapter.spec.name}: init_lora_weights={adapter.config.init_lora_weights!r} needs the"
                " base's weights"
            )
        factors = start(adapter, base)
        return {"origin_A.weight": factors["lora_A.weight"], "origin_B.weight": factors["lora_B.weight"]}

    def rebases(self, config: LoraConfig) -> bool:
        start = inits.find(config.init_lora_weights, config.loftq_config)
        return start is not None and start.rebases

    def rebase(self, adapter: Adapter, base: Affine) -> Tensor:
        return cast(Tensor, adapter.values["start"].rebase(adapter, base))

    def term(self, adapter: Adapter) -> Term | None:
        return product(adapter)

    def arranged(self, adapter: Adapter, up: Tensor, down: Tensor) -> dict[str, Tensor]:
        """The values of the slots that have these factors, as `product` gives them; views where they can
        be.
        """
        if adapter.spec.stacked:
            up = up.permute(1, 2, 0)
        kinds = self.kinds(adapter.config, adapter.spec, adapter.values)
        named = zip(_names(adapter), (down, up), strict=True)
        return {slot: value.reshape(kinds[slot].shape) for slot, value in named}

    def unmergeable(self, adapter: Adapter) -> str | None:
        if adapter.spec.groups > 1:
            return (
                f"a LoRA on {adapter.spec.groups} groups of channels reaches across groups, which the layer's"
                " weight cannot"
            )
        if "lora_B.bias" in adapter and not adapter.spec.bias and bool(adapter["lora_B.bias"].any()):
            return "it has a bias (`lora_bias`) and the layer has none to merge it into"
        return None


def product(adapter: Adapter) -> Term:
    """What the factors of a LoRA are, with those that its start took out of the weight, which are never
    dropped out.
    """
    lower, upper = _names(adapter)
    down, up, exempt = adapter[lower], adapter[upper], 0
    if "origin_A.weight" in adapter:
        exempt = adapter.values["r"]
        down = torch.cat([down, adapter["origin_A.weight"]])
        up = torch.cat([up, -adapter["origin_B.weight"]], 1)
    if adapter.spec.stacked:
        experts, rank = adapter.spec.shape[0], adapter.values["r"]
        up, down = up.view(-1, rank, experts).permute(2, 0, 1), down.view(experts, rank, -1)
    elif up.ndim > 2:
        up, down = up.flatten(1), down.flatten(1)
    config = adapter.config
    shift = adapter["lora_B.bias"] if config.lora_bias else None
    return Term(up, down, adapter.scaling, shift, float(config.lora_dropout), exempt)


def _names(adapter: Adapter) -> tuple[str, str]:
    if adapter.spec.kind is LayerKind.EMBEDDING:
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"
