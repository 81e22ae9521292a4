"""Linear layers that store their weight quantized: what is common to every library of such layers.

The library's own forward runs beneath an adapter, but in training where it is nothing but the product with
the weight: that is then taken together with the adapter's, as over any layer. The weight itself, `(out, in)`,
is computed where it is needed, one layer at a time. Merging never writes into such a layer: it makes a new
one, so that taking the old one back is exact.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftrs.bases import workspace
from peftrs.bases.base import Base, as_dtype, called
from peftrs.bases.dense import LINEAR
from peftrs.bases.kinds import Affine, LayerKind
from peftrs.bases.store import Change, Replaced, Rounding, Undo
from peftrs.errors import MergeError
from peftrs.torch_private import hooks_of

BLOCK = 256
"""Rows that are looked at together when what rounding did is measured."""


class Quantized(Base):
    """A linear layer of one library and format."""

    kind = LayerKind.LINEAR
    quantized = True
    writes = True
    """Whether `requantized` can store a weight in the layer's own format."""
    own: str | None = None
    """The library's class whose forward is `functional.linear` with the weight of `dense`; None where it
    computes otherwise.
    """

    rounds = False
    """Whether that forward rounds its input to the dtype that it computes in, and gives the output in the
    input's.
    """

    @abstractmethod
    def format(self, module: nn.Module) -> str:
        """What the format is called, for people."""

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        return cast(nn.Parameter, module.weight), cast("nn.Parameter | None", module.bias)

    def shape(self, module: nn.Module) -> tuple[int, ...]:
        return cast(int, module.out_features), cast(int, module.in_features)

    def dense(self, module: nn.Module) -> Affine:
        with torch.no_grad():
            return Affine(self.weight(module), self.parameters(module)[1])

    def weight(self, module: nn.Module) -> Tensor:
        """The weight in the dtype that the library computes in. By default what the layer, without its bias,
        makes of the identity.

        That is exact where the weight alone is quantized: of every sum that the layer takes, one term is not
        zero.
        """
        unbiased = twin(module, {"bias": None})
        stored, _ = self.parameters(module)
        return cast(
            Tensor, unbiased(torch.eye(self.shape(module)[1], dtype=self.dtype(module), device=stored.device))
        ).mT

    def dtype(self, module: nn.Module) -> torch.dtype:
        """The dtype that the library computes in: that of the first floating-point tensor that the layer
        holds.
        """
        held = (one for one in (*module.parameters(), *module.buffers()) if one.is_floating_point())
        return next((one.dtype for one in held), torch.float16)

    def differentiable(self, module: nn.Module) -> bool:
        """Whether the library's forward gives its input a gradient. Where it does not, `through` does."""
        return True

    def prepare(self, module: nn.Module) -> None:
        through(self, module)

    def obstacle(self, module: nn.Module) -> str | None:
        if torch.compiler.is_compiling():
            return "compiled code calls the library's own product"
        own: Any = next((kind for kind in type(module).__mro__ if kind.__name__ == self.own), None)
        if own is None or not self.plain_product(module):
            return f"the weight beneath is {self.format(module)}, whose library has a product of its own"
        if (
            not module.training
        ):  # not by whether gradients are on: reentrant checkpointing must compute the same without and with
            return "in eval mode the library's own product runs"
        return called(module, own.forward)

    def plain_product(self, module: nn.Module) -> bool:
        """Whether, in training, the forward of `own` is that product in this layer's settings."""
        return True

    def computes_in(self, module: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the forward of `own` takes the product for an input of `dtype`."""
        return dtype

    def multiplied(self, module: nn.Module, dtype: torch.dtype, *, reused: bool = False) -> Tensor:
        """The weight as that forward takes its product with it, in the dtype that it computes in.

        `reused` allows one that holds only until the next is asked for.
        """
        if (
            reused
            and self.parameters(module)[0].device.type == "cpu"
            and (rows := self.rows(module, dtype)) is not None
        ):
            return workspace.filled(rows, self.shape(module), dtype)
        return self.dense(module).weight.to(dtype)

    def rows(self, module: nn.Module, dtype: torch.dtype) -> workspace.Rows | None:
        """What dequantizes some rows of `multiplied`, or None where the format allows only all."""
        return None

    def op(
        self, module: nn.Module, x: Any, affine: Affine, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        return LINEAR.op(module, x, affine, rest, options)

    def requantized(self, module: nn.Module, affine: Affine) -> nn.Module:
        """A layer of the same settings with another weight and bias, quantized again.

        Raises `MergeError` if it is read only.
        """
        raise MergeError(f"{self.format(module)} weights are not written again here; hint: {IN_A_DTYPE}")

    def check(
        self, module: nn.Module, change: Change, *, keep: bool, dtype: torch.dtype | None = None
    ) -> None:
        change.check_numbers()
        if dtype is None and not self.writes:
            raise MergeError(
                f"{change.layer}: {self.format(module)} is written by its library's calibration alone; hint:"
                f" {IN_A_DTYPE}"
            )
        if dtype is not None and not bool(self._folded(module, change)[1].weight.to(dtype).isfinite().all()):
            raise MergeError(
                f"{change.layer}: merging gives weights beyond {dtype}; hint: merge into a wider dtype"
            )

    def store(self, module: nn.Module, change: Change, keep: Collection[int]) -> tuple[nn.Module, Undo]:
        merged, loss = self.requantize(module, change)
        if not keep:
            self.dropped(module)
        return merged, Replaced(module, loss)

    @torch.no_grad()
    def requantize(self, module: nn.Module, change: Change) -> tuple[nn.Module, Rounding]:
        """A layer in the same format with a change in it, and what rounding did to the change. Raises
        `MergeError`.

        A stored weight lies on its format's grid, so that an update of less than half a step rounds away in
        full; formats that choose another grid add an error that may be far larger than the update.
        """
        first, affine = self._folded(module, change)
        merged = self.requantized(module, affine)
        sums = torch.zeros(3, dtype=torch.float64)
        # By blocks of rows: the layer is there several times over already.
        blocks = (torch.split(one, BLOCK) for one in (first, affine.weight, self.dense(merged).weight))
        for was, asked, stored in zip(*blocks, strict=True):
            asked, stored = asked - was, stored.float() - was
            pairs = ((asked, asked), (asked, stored), (asked - stored, asked - stored))
            sums += torch.stack([(one * other).sum(dtype=torch.float64) for one, other in pairs]).cpu()
        whole, along, missed = sums.tolist()
        return merged, Rounding(change.layer, self.format(module), whole, along, missed)

    @torch.no_grad()
    def widened(self, module: nn.Module, change: Change, dtype: torch.dtype) -> nn.Linear:
        """A dense layer with a change in it, which takes this one's place for good. Raises `MergeError`."""
        plain = self.plain(self._folded(module, change)[1], dtype)
        self.dropped(module)
        return plain.train(module.training)

    def _folded(self, module: nn.Module, change: Change) -> tuple[Tensor, Affine]:
        """The weight in float32, and the changed map. Raises `MergeError` where that is not finite."""
        weight, bias = self.dense(module)
        first = weight.float()
        affine = change.fold(Affine(first, None if bias is None else bias.float()))
        if not all(bool(value.isfinite().all()) for value in affine if value is not None):
            raise MergeError(f"{change.layer}: merging gives weights that are infinite or NaN")
        return first, affine

    def restore(self, module: nn.Module, undo: Undo) -> tuple[nn.Module, bool]:
        self.dropped(module)
        was = cast(Replaced, undo).module
        return was.to(self.parameters(module)[0].device), True

    def original(self, module: nn.Module, undo: Undo | None) -> list[Tensor]:
        was = module if undo is None else cast(Replaced, undo).module
        return [one for one in self.dense(was) if one is not None]

    def dropped(self, module: nn.Module) -> None:
        """Frees what only the garbage collector would of a layer that another one stands in for, for good."""
        return

    def plain(self, affine: Affine, dtype: torch.dtype) -> nn.Linear:
        """An `nn.Linear` with this weight and bias, rounded once to the dtype."""
        weight, bias = as_dtype(affine, dtype)
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer


IN_A_DTYPE = "merge_and_unload(dtype=torch.bfloat16) writes the merged weights in 16 bits"


class Readable(Quantized):
    """A format that only its library's calibration writes: it is read here, and merged in a floating-point
    dtype.
    """

    writes = False


def twin(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """The same module, in its settings and hooks, with other tensors for these parameters or buffers; it
    shares all else.
    """
    other = module.__new__(type(module))
    other.__dict__.update(module.__dict__)
    for held in ("_parameters", "_buffers", "_modules"):
        other.__dict__[held] = dict(module.__dict__[held])
    for name, tensor in parameters.items():
        if name in other._buffers:
            other._buffers[name] = tensor
            continue
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        other._parameters[name] = tensor
    other.training = module.training
    return other


def through(base: Quantized, module: nn.Module) -> None:
    """Gives the layer's input a gradient, `dy·W`, where the library's own forward gives it none.

    Once a layer.
    """
    there = any(isinstance(hook, _Through) for hooks in hooks_of(module) for hook in hooks.values())
    if not there and not base.differentiable(module):
        module.register_forward_hook(_Through(base))


class _Through:
    def __init__(self, base: Quantized) -> None:
        self.base = base

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        x, (_, bias) = inputs[0], self.base.parameters(module)
        if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
            return None
        return cast(Tensor, _Straight.apply(x, bias, output.detach(), self.base, module))


class _Straight(torch.autograd.Function):
    """The output as it is, with the gradient that the layer's weight gives."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        _, _, output, *ctx.layer = given
        return cast(Tensor, output).view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (base, module), dy = ctx.layer, gradients[0]
        dx = dy @ base.dense(module).weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None, None, None
