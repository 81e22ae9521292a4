"""Adding an adapter to a model of any kind, or leaving the model as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from peftrs import registry
from peftrs.config import PeftConfig, PromptLearningConfig, TargetedConfig
from peftrs.core.inject import activation, adapters, check_name, inject
from peftrs.core.layer import AdaptedLayer
from peftrs.core.method import Method
from peftrs.core.prompt import PromptMethod, prompts_of
from peftrs.core.prompt_call import uproot, word_embeddings
from peftrs.core.tree import Wrapped, places, wrappers
from peftrs.errors import AdapterError, ConfigError, listed
from peftrs.io.checkpoint import PREFIX
from peftrs.io.entries import plain
from peftrs.model.prepare import make_plan
from peftrs.model.prompting import sizes
from peftrs.model.replicate import layer_lists, replicate


def attach(
    model: nn.Module,
    config: PeftConfig,
    adapter: str,
    *,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    names: Iterable[str] | None = None,
    heads: tuple[str, ...] = (),
    strict: bool | None = None,
) -> None:
    """Puts an adapter into a model, whose other adapters keep what they train; `low_cpu_mem_usage` leaves it without values.

    The config is filled in with what the model decides (default targets). `names` are the keys of a state dict that says which
    layers are targets, instead of the config. Raises `AdapterError`, `ConfigError` or `TargetError`, with nothing changed.
    """
    configs = peft_configs(model)
    method = check(model, config, adapter, configs)
    targeted = cast(TargetedConfig, config)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()] if adapters(model) else []
    with whole_or_not(model):
        _grow(model, targeted)
        exact = None if names is None else _modules_in(names, model, method, targeted)
        plan, settled = make_plan(model, targeted, method, heads=heads, names=exact, strict=strict)
        if isinstance(method, PromptMethod):
            settled |= sizes(model, cast(PromptLearningConfig, config))
        kept = {name: getattr(targeted, name) for name in settled}
        for name, value in settled.items():
            setattr(targeted, name, value)
        fill = not low_cpu_mem_usage
        try:
            prompt = method.build(config, word_embeddings(model), fill=fill) if isinstance(method, PromptMethod) else None
            inject(model, targeted, adapter, plan, prompt=prompt, fill=fill, autocast_adapter_dtype=autocast_adapter_dtype)
        except BaseException:
            for name, value in kept.items():
                setattr(targeted, name, value)
            raise
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)
    configs[adapter] = config


def peft_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """The configs of a model's adapters, kept on the model itself so that a bare model has them too."""
    held = model.__dict__.get("peft_config")
    if not isinstance(held, dict):
        held = {}
        model.peft_config = held  # type: ignore[assignment]
    return cast("dict[str, PeftConfig]", held)


def check(model: nn.Module, config: PeftConfig, adapter: str, configs: dict[str, PeftConfig]) -> Method:
    """The method that a config asks for. Raises `AdapterError` or `ConfigError` if the model cannot get this adapter."""
    if not isinstance(config, PeftConfig):
        raise ConfigError(f"an adapter's config is a PeftConfig such as LoraConfig, not a {type(config).__name__}")
    if config.peft_type is None or not isinstance(config, TargetedConfig):
        raise ConfigError(f"{type(config).__name__} does not say what kind of adapter it is for: use one such as LoraConfig")
    check_name(model, adapter)
    method = registry.method(config.peft_type)
    biased = [name for name, other in {**configs, adapter: config}.items() if getattr(other, "bias", "none") != "none"]
    if len(biased) > 1:
        raise AdapterError(
            f"only one adapter of a model can train its biases, and {listed(biased)} want to: set bias to 'none' for all but one"
        )
    return method


def _grow(model: nn.Module, config: TargetedConfig) -> None:
    ranges = getattr(config, "layer_replication", None)
    if not ranges:
        return
    if adapters(model):
        raise AdapterError("`layer_replication` changes the model's layers and works for its first adapter only")
    replicate(model, ranges)


def _modules_in(keys: Iterable[str], model: nn.Module, method: Method, config: TargetedConfig) -> set[str]:
    """The layers that a state dict holds tensors of this method for."""
    if getattr(config, "target_parameters", None):
        raise ConfigError("`target_parameters` cannot be found in a state dict: leave out `state_dict` and load the tensors after")
    known = {place.name for place in places(model)}
    found = set()
    for key in keys:
        module = plain(key).removeprefix(PREFIX).rpartition(f".{method.prefix}")[0]
        if module in known:
            found.add(module)
    return found


@contextmanager
def whole_or_not(model: nn.Module) -> Iterator[None]:
    """Leaves the model as it was if what happens inside fails: no new adapters or wrappers, the same active ones and gradients."""
    known, held = set(adapters(model)), {id(wrapper) for _, wrapper in wrappers(model)}
    active = activation(model).active
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    lists = layer_lists(model)
    configs = dict(peft_configs(model))
    try:
        yield
    except BaseException:
        _keep(model, configs)
        for layers in lists:
            layers.restore()
        _strip(model, known, held)
        activation(model).active = active
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
        raise


def _keep(model: nn.Module, configs: dict[str, PeftConfig]) -> None:
    held = peft_configs(model)
    held.clear()
    held.update(configs)
    if not held:
        del model.__dict__["peft_config"]


def _strip(model: nn.Module, known: set[str], held: set[int]) -> None:
    """Takes off all adapters but the known ones, and all wrappers but those that were there."""
    prompts = prompts_of(model)
    for name in set(adapters(model)) - known:
        for _, wrapper in wrappers(model):
            wrapper.delete_adapter(name)
    if prompts is not None and id(prompts) not in held:
        uproot(model)
    for place in list(places(model))[::-1]:
        module = place.module
        while isinstance(module, Wrapped) and id(module) not in held:
            module = module.base_layer if isinstance(module, AdaptedLayer) else module.original_module
        if module is not place.module:
            place.put(module)
