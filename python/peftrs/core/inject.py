"""Putting an adapter into a model: plan, wrap, allocate, fill, freeze."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from peftrs.bases.base import Base
from peftrs.bases.dense import Parameter
from peftrs.bases.kinds import LayerKind
from peftrs.bases.resolve import of_library
from peftrs.bases.sharded import overwrite
from peftrs.config import TargetedConfig
from peftrs.core import merge as merging
from peftrs.core.activation import Activation
from peftrs.core.dtype import adapter_dtype
from peftrs.core.layer import AdaptedLayer
from peftrs.core.prompt import Encoder
from peftrs.core.prompt_call import plant
from peftrs.core.replace import ReplacedModule
from peftrs.core.slots import FittedAdapter
from peftrs.core.target import Plan, Target
from peftrs.core.tree import Place, first_wrapper, original, wrappers
from peftrs.errors import AdapterError, ConfigError, listed

log = logging.getLogger("peftrs")


def check_name(state: Activation, adapter: str) -> None:
    """Raises `AdapterError` for a name that is taken, or that could not be a part of parameter names and
    folders.
    """
    if (
        not adapter
        or adapter != adapter.strip()
        or any(mark in adapter for mark in "./\\\0")
        or adapter == "__base__"
    ):
        raise AdapterError(
            f"adapter name {adapter!r} must be one path component without dots or surrounding spaces"
        )
    if hasattr(nn.ModuleDict(), adapter) or hasattr(nn.ParameterDict(), adapter):
        raise AdapterError(
            f"adapter name {adapter!r} is the name of a method of torch's containers; choose another"
        )
    if adapter in state.adapters():
        raise AdapterError(f"Adapter with name {adapter!r} already exists.")


def adapters(model: nn.Module) -> list[str]:
    """The names of all adapters of a model, in the order in which they came."""
    return activation(model).adapters()


def activation(model: nn.Module) -> Activation:
    """What the wrapped modules of a model share about which adapters are active; new if it has none."""
    found = first_wrapper(model)
    return Activation() if found is None else found.activation


def inject(
    model: nn.Module,
    config: TargetedConfig,
    adapter: str,
    plan: Plan,
    state: Activation,
    *,
    prompt: Encoder | None = None,
    fill: bool = True,
    autocast_adapter_dtype: bool = True,
) -> None:
    """Puts the adapter into the model as planned, with its prompt if it has one. `state` is what the model's
    adapters share.

    Its tensors get first values, or with `fill=False` none (device meta).

    The first adapter of a model becomes the active one, and all parameters that are not its own are frozen,
    but for biases that the config trains. What others train stays as it is.
    """
    check_name(state, adapter)
    first = not state.adapters()
    if not state.active:
        state.switch(active=(adapter,))
    fitted: dict[str, FittedAdapter] = {}
    _check_rebasing(plan, config, fill)
    _check_order(plan)
    for module in (model, *(original(place.module) for place in plan.found)):
        # Gradients pass through layers that are not adapted too.
        if (base := of_library(module)) is not None:
            base.prepare(module)
    with torch.no_grad():
        for target in plan.targets:
            fitted[target.spec.name] = _fit(
                _wrap(target, state), target, config, adapter, fitted, fill, autocast_adapter_dtype
            )
    copies: dict[str, nn.Module] = {}
    for place, tied in plan.saved:
        replaced = (
            place.module
            if isinstance(place.module, ReplacedModule)
            else ReplacedModule(place.module, state, place.name)
        )
        if replaced is not place.module:
            place.put(replaced)
        copies[place.name] = replaced.add(adapter, copies.get(tied) if tied else None)
    if prompt is not None:
        plant(model, adapter, prompt, state)
    _keep_calling(model, plan.found)
    if first:
        for parameter in base_parameters(model, plan.found):
            parameter.requires_grad_(False)
        for _, bias in biases(model, config):
            bias.requires_grad_(not config.inference_mode)
    state.require_grad((adapter,), requires_grad=adapter in state.active and not config.inference_mode)
    log.info("%s", plan.summary(adapter))


def _wrap(target: Target, state: Activation) -> AdaptedLayer:
    above, current = _site(target)
    if isinstance(current, AdaptedLayer) and _same(current.base, target.base):
        return current
    wrapped = AdaptedLayer(current, target.base, state, target.spec, target.parallel)
    if isinstance(original(target.place.parent), nn.MultiheadAttention):
        wrapped.read_by_owner = True
    if above:
        above[-1].base_layer = wrapped
    else:
        target.place.put(wrapped)
    return wrapped


def _site(target: Target) -> tuple[list[AdaptedLayer], nn.Module]:
    """The wrappers above that of a target, outermost first, and what is beneath them: the target's own, or
    what it goes around.

    Innermost is the wrapper of the module as a whole, which so sees its weights as the others change them.
    Those of its parameters follow in the order in which the module has these, as PEFT nests them for one
    adapter. So names in memory follow from what is wrapped, not from what came first.
    """
    # Another target may have wrapped the place since it was found.
    current = cast(nn.Module, target.place.parent._modules[target.place.attribute])
    above: list[AdaptedLayer] = []
    if not isinstance(current, AdaptedLayer):
        return above, current
    order = {name: at for at, name in enumerate(original(current)._parameters)}

    def rank(base: Base) -> int:
        return order.get(cast(Parameter, base).name, -1) if base.kind is LayerKind.PARAMETER else -1

    while isinstance(current, AdaptedLayer) and rank(current.base) > rank(target.base):
        above.append(current)
        current = current.base_layer
    return above, current


def _check_order(plan: Plan) -> None:
    """Raises `AdapterError` where a wrapper would have to go beneath one that adapters are merged into."""
    sites = [(target, *_site(target)) for target in plan.targets]
    beneath = [
        (target.spec.name, layer)
        for target, above, current in sites
        for layer in above
        if layer.merged and not (isinstance(current, AdaptedLayer) and _same(current.base, target.base))
    ]
    if beneath:
        names, layers = zip(*beneath, strict=True)
        merged = {name: None for layer in layers for name in layer.merged_adapters}
        raise AdapterError(
            f"{listed(list(dict.fromkeys(names)), 4)}: cannot be adapted while {listed(list(merged))} is"
            " merged into parameters that stand after it in its module; hint: unmerge_adapter(), and merge"
            " again afterwards"
        )


def _same(base: Any, other: Any) -> bool:
    return type(base) is type(other) and (not isinstance(base, Parameter) or base.name == other.name)


def _fit(
    layer: AdaptedLayer,
    target: Target,
    config: TargetedConfig,
    name: str,
    fitted: dict[str, FittedAdapter],
    fill: bool,
    autocast_adapter_dtype: bool,
) -> FittedAdapter:
    frozen, method = layer.frozen, target.method
    adapter = FittedAdapter(
        name, method, config, target.spec, target.values, frozen, layer.activation, fitted
    )
    layer.adapters[name] = adapter
    if adapter.siblings:
        adapter.changed()
        return adapter
    dtype, device = adapter_dtype(frozen.weight, autocast_adapter_dtype), frozen.device
    near = nearer(device, config)
    adapter.allocate(dtype, near if fill else torch.device("meta"))
    base = merging.presented(frozen, near)
    for slot, value in method.rebuilt(adapter, base).items():
        adapter[slot] = nn.Parameter(value.to(device, dtype).contiguous(), requires_grad=False)
    rebased = None
    if fill and device.type != "meta":
        rebased = method.rebase(adapter, base) if _rebases(target, config) else None
        method.init(adapter, base)
        for slot, parameter in list(adapter.parameters()) if near != device else ():
            adapter[slot] = nn.Parameter(parameter.detach().to(device), requires_grad=parameter.requires_grad)
    elif _rebases(target, config):
        rebased = method.rebase(adapter, base)
    adapter.spread()
    if rebased is not None:
        with frozen.at_hand(write=True):
            overwrite(frozen.weight, rebased.mT if frozen.base.transposed else rebased)
    return adapter


def _rebases(target: Target, config: TargetedConfig) -> bool:
    """Whether the layer's weights become others, for which they must be such as can be written."""
    return target.method.rebases(config) and not target.base.quantized


def _check_rebasing(plan: Plan, config: TargetedConfig, fill: bool) -> None:
    targets = [target for target in plan.targets if target.method.rebases(config)]
    held = [target.spec.name for target in targets if isinstance(target.place.module, AdaptedLayer)]
    if held:
        raise ConfigError(
            f"{listed(held)}: other adapters are for the weights that {config.peft_type} would change here"
        )
    if fill and (coarse := [target.spec.name for target in targets if target.base.quantized]):
        raise ConfigError(
            f"{listed(coarse)}: LoftQ starts from weights that are not quantized yet; hint:"
            " init_lora_weights=True, then replace_lora_weights_loftq(model, path of the unquantized"
            " checkpoint)"
        )


def nearer(device: torch.device, config: TargetedConfig) -> torch.device:
    """Where to compute the first values of adapters that belong on `device`: on an accelerator where the
    config asks for that.
    """
    runtime = config.runtime_config
    if runtime is None or not runtime.ephemeral_gpu_offload or device.type != "cpu":
        return device
    return torch.accelerator.current_accelerator() or device


def base_parameters(model: nn.Module, found: Iterable[Place]) -> list[nn.Parameter]:
    """The parameters of a model without its adapters', each once; `found` are all its modules but the
    root.
    """
    modules = [model, *(original(place.module) for place in found)]
    held = [
        parameter for module in modules for parameter in module._parameters.values() if parameter is not None
    ]
    return list({id(parameter): parameter for parameter in held}.values())


def own_parameters(model: nn.Module) -> set[int]:
    """The identities of all parameters that belong to adapters."""
    own: set[int] = set()
    for _, wrapper in wrappers(model):
        own |= {id(parameter) for name in wrapper.adapter_names() for parameter in wrapper.tensors(name)}
    return own


def biases(model: nn.Module, config: TargetedConfig) -> list[tuple[str, nn.Parameter]]:
    """The biases of the base that the config trains, by full name: all, or those of adapted layers."""
    if config.bias == "all":
        own = own_parameters(model)
        return [
            (name, one)
            for name, one in model.named_parameters()
            if name.rpartition(".")[2] == "bias" and id(one) not in own
        ]
    found = []
    if config.bias.endswith("_only"):
        for name, wrapper in wrappers(model):
            bias = getattr(wrapper.base_layer, "bias", None) if isinstance(wrapper, AdaptedLayer) else None
            if isinstance(bias, nn.Parameter):
                found.append((f"{name}.base_layer.bias", bias))
    return found


def _keep_calling(model: nn.Module, found: list[Place]) -> None:
    """Keeps torch on the path that calls adapted layers.

    Its fused encoder reads weights past their modules, unless a hook stands on one of them.
    """
    for parent in (model, *(original(place.module) for place in found)):
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
            for module in parent.modules():
                if isinstance(module, AdaptedLayer) and _nothing not in module._forward_pre_hooks.values():
                    module.register_forward_pre_hook(_nothing)
        elif isinstance(parent, nn.TransformerEncoder) and any(
            isinstance(module, AdaptedLayer) for module in parent.modules()
        ):
            # Nested tensors are made for the fused path alone.
            parent.use_nested_tensor = False


def _nothing(module: nn.Module, inputs: Any) -> None:
    """A hook that does nothing: that it is there is what counts."""
