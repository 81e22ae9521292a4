"""Choosing layers by their condition numbers: those whose singular values lie close together lose least when
they are changed.

Le 2025, https://arxiv.org/abs/2506.16289 (KappaTune).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from peftrs.core.manage import progress

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
SMALLEST = 1e-8


class KappaTuneSelector:
    """The condition numbers of a model's linear layers and stacks of experts, computed once and when they are
    first asked for.

    Weights with a side longer than `max_dim_size_to_analyze` are left out. A stack's number is the mean of
    its experts'.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or EXPERTS
        self.show_progress = show_progress
        self._modules: dict[str, float] | None = None
        self._parameters: dict[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The linear layers of the smallest numbers: so many, or that share, or those up to the threshold;
        else all in order.
        """
        if self._modules is None:
            linear = {
                name: one.weight for name, one in self.model.named_modules() if isinstance(one, nn.Linear)
            }
            self._modules = self._numbers(linear, _condition, "linear layers")
        return _smallest(self._modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same of stacks of experts, by the names of their parameters."""
        if self._parameters is None:
            ending = self.moe_param_suffixes
            stacks = {
                name: one
                for name, one in self.model.named_parameters()
                if one.ndim == 3 and name.endswith(ending)
            }
            self._parameters = self._numbers(stacks, _mean_condition, "stacks of experts")
        return _smallest(self._parameters, top_p, num_modules, threshold)

    def _numbers(
        self, weights: Mapping[str, Tensor], number: Callable[[Tensor], float], kind: str
    ) -> dict[str, float]:
        fitting = [
            (name, one)
            for name, one in weights.items()
            if max(one.shape[-2:]) <= self.max_dim_size_to_analyze
        ]
        rows = progress(fitting, f"Singular values of {kind}") if self.show_progress else fitting
        return {name: number(one) for name, one in rows}


@torch.no_grad()
def _condition(weight: Tensor) -> float:
    values = torch.linalg.svdvals(weight.detach().float())
    return float(values[0] / (values[-1] + SMALLEST))


def _mean_condition(stack: Tensor) -> float:
    return sum(_condition(expert) for expert in stack) / len(stack)


def _smallest(
    numbers: dict[str, float], share: float | None, count: int | None, threshold: float | None
) -> list[str]:
    ordered = sorted(numbers, key=lambda name: numbers[name])
    if count is not None:
        return ordered[:count]
    if share is not None:
        return ordered[: max(1, int(len(ordered) * share))]
    return ordered if threshold is None else [name for name in ordered if numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The values of a config's `target_modules` and `target_parameters` (None where there are no stacks of
    experts).

    They name the share `top_p` of the linear layers, and of the stacks, with the smallest condition numbers.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    parameters = selector.get_best_target_parameters(top_p=top_p)
    return {"target_modules": selector.get_best_targets(top_p=top_p), "target_parameters": parameters or None}
