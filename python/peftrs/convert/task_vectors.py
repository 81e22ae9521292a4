"""One tensor out of several that were trained for different tasks: weighted sums after pruning, means of
those that agree in sign.

Task arithmetic: https://arxiv.org/abs/2212.04089; TIES: https://arxiv.org/abs/2306.01708; DARE:
https://arxiv.org/abs/2311.03099. The names and meanings are those of `peft.utils.merge_utils`; random pruning
draws the same numbers from torch's generator.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from peftrs.errors import AdapterError, PeftrsWarning

Sign = Literal["total", "frequency"]


def task_arithmetic(task_tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The weighted sum of the tensors."""
    stacked = torch.stack(list(task_tensors))
    return (stacked * reshape_weight_task_tensors(stacked, weights)).sum(0)


def magnitude_prune(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of what is left of the tensors when each keeps its largest entries."""
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def dare_linear(task_tensors: Sequence[Tensor], weights: Tensor, density: float) -> Tensor:
    """The weighted sum of what is left of the tensors when each keeps random entries, scaled up to the same
    expectation.
    """
    return task_arithmetic(
        [prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights
    )


def ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total"
) -> Tensor:
    """Each tensor keeps its largest entries; of these, the ones of the majority's sign are averaged, with
    weights.
    """
    return _elected(
        [prune(tensor, density, "magnitude") for tensor in task_tensors], weights, majority_sign_method
    )


def dare_ties(
    task_tensors: Sequence[Tensor], weights: Tensor, density: float, majority_sign_method: Sign = "total"
) -> Tensor:
    """Each tensor keeps random entries, scaled up; of these, the ones of the majority's sign are averaged,
    with weights.
    """
    return _elected(
        [prune(tensor, density, "random", rescale=True) for tensor in task_tensors],
        weights,
        majority_sign_method,
    )


def _elected(task_tensors: Sequence[Tensor], weights: Tensor, majority_sign_method: Sign) -> Tensor:
    stacked = torch.stack(list(task_tensors))
    mask = calculate_majority_sign_mask(stacked, majority_sign_method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)


def prune(
    tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> Tensor:
    """The tensor with the part `density` of its entries kept: the largest, or random ones.

    Raises `AdapterError` below 0.
    """
    if density < 0:
        raise AdapterError(f"Density should be >= 0, got {density}")
    if method not in ("magnitude", "random"):
        raise AdapterError(f"Unknown method {method}: prune by 'magnitude' or at 'random'")
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1: nothing is pruned",
            PeftrsWarning,
            stacklevel=2,
        )
        return tensor
    return (
        magnitude_based_pruning(tensor, density)
        if method == "magnitude"
        else random_pruning(tensor, density, rescale)
    )


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """The tensor's `int(density * size)` largest entries by amount, zeros elsewhere."""
    entries = tensor.reshape(-1)
    largest = entries.abs().topk(int(density * entries.numel()), sorted=False).indices
    return torch.zeros_like(entries).index_copy(0, largest, entries[largest]).view(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Each entry with probability `density`, divided by it if `rescale`, else zero."""
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def calculate_majority_sign_mask(tensor: Tensor, method: Sign = "total") -> Tensor:
    """Which entries of the stacked tensors `(tasks, ...)` have the sign of the majority.

    The majority is by amounts ("total") or by number ("frequency"); it is positive where they are even. Zeros
    belong to none.
    """
    if method not in ("total", "frequency"):
        raise AdapterError(f"majority_sign_method={method!r} is not 'total' or 'frequency'")
    sign = tensor.sign()
    positive = (tensor if method == "total" else sign).sum(0) >= 0
    return torch.where(positive, sign > 0, sign < 0)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """The mean over those of the stacked tensors `(tasks, ...)` that the mask has, zero where it has none."""
    return (task_tensors * majority_sign_mask).sum(0) / majority_sign_mask.sum(0).clamp(min=1)


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """The weights `(tasks,)` shaped to multiply the stacked tensors `(tasks, ...)`."""
    return weights.view(*weights.shape, *[1] * (task_tensors.ndim - weights.ndim))
