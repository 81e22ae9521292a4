"""Linear layers and embeddings that a tensor-parallel plan of transformers spreads over processes.

Such a layer takes and gives plain tensors, of which each process may hold a slice; inside an adapted layer
they are `DTensor`s, and so are the adapter's own, so that every formula means what it means in one process.
torch adds the communication.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases.base import Base
from peftrs.bases.kinds import LayerKind
from peftrs.bases.sharded import is_distributed
from peftrs.errors import ConfigError

STYLES = (
    "colwise",
    "rowwise",
    "colwise_gather_output",
    "colwise_rep",
    "rowwise_split_input",
    "rowwise_rep",
    "embedding_rowwise",
)
"""The styles of plans under which adapters work: the layer takes and gives whole or evenly sliced features,
and nothing else.
"""


@dataclass(frozen=True)
class Parallel:
    """How a layer's input and output lie over the processes of `mesh`; `outside` and `output` are how it
    takes and gives them.
    """

    mesh: Any
    features: tuple[int, int]
    """How many values go in and come out of the whole layer, for each row."""
    outside: Any
    inside: Any
    output: Any
    plain: bool
    """Whether the layer gives plain tensors."""
    by_inputs: bool
    """Whether each process has the weights of some of the inputs, else of some of the outputs."""

    def enter(self, x: Tensor) -> Tensor:
        """The layer's input, laid out as its operation takes it."""
        if not is_distributed(x):
            x = self._joined(x, self.outside, self.features[0])
        return cast(Tensor, cast(Any, x).redistribute(placements=[self.inside]))

    def joined(self, y: Tensor) -> Tensor:
        """What the layer beneath gave, as one tensor of all processes."""
        return y if is_distributed(y) else self._joined(y, self.output, self.features[1])

    def leave(self, y: Tensor) -> Tensor:
        """The output as the layer gives it without adapters."""
        y = cast(Any, y).redistribute(placements=[self.output])
        return cast(Tensor, cast(Any, y).to_local()) if self.plain else y

    def _joined(self, local: Tensor, placement: Any, features: int) -> Tensor:
        from torch.distributed.tensor import DTensor

        if not placement.is_shard():
            return DTensor.from_local(local, self.mesh, [placement], run_check=False)
        shape = torch.Size((*local.shape[:-1], features))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, [placement], run_check=False, shape=shape, stride=stride)

    def spread(self, tensor: Tensor, dimension: int | None) -> Tensor:
        """The first process's values, spread over all of them along a dimension or (None) whole in each."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        placement = Replicate() if dimension is None else Shard(dimension)
        return distribute_tensor(tensor.detach(), self.mesh, [placement])


def resolve(model: nn.Module, name: str, module: nn.Module, base: Base) -> Parallel | None:
    """How a layer lies over processes, or None if each has it whole.

    Raises `ConfigError` for layouts that adapters do not know.
    """
    weight = base.parameters(module)[0]
    if not is_distributed(weight) or not any(placement.is_shard() for placement in weight.placements):
        return None
    style = _style(model, name)
    if style is None:
        return None
    if style not in STYLES or base.kind not in (LayerKind.LINEAR, LayerKind.EMBEDDING):
        raise ConfigError(
            f"{name}: the tensor-parallel plan gives it the style {style!r}, which adapters do not follow;"
            f" they follow {', '.join(STYLES)}"
        )
    from torch.distributed.tensor import Replicate, Shard
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    found = ALL_PARALLEL_STYLES[style]
    rows, columns = base.shape(module)[:2]
    by_inputs, whole = "rowwise" in style, Replicate()
    outside, output = getattr(found, "input_layouts", whole), getattr(found, "output_layouts", whole)
    inside = Shard(-1) if by_inputs and base.kind is LayerKind.LINEAR else whole
    return Parallel(
        weight.device_mesh, (columns, rows), outside, inside, output, found.use_local_output, by_inputs
    )


def _style(model: nn.Module, name: str) -> str | None:
    """The style that the plan of the nearest model above a layer gives it."""
    path, best = name.split("."), None
    for depth in range(len(path)):
        above = model.get_submodule(".".join(path[:depth]))
        plan = getattr(above, "_tp_plan", None)
        if plan and getattr(above, "_device_mesh", None) is not None:
            inner = ".".join("*" if part.isdigit() else part for part in path[depth:])
            best = plan.get(inner, best)
    return best
