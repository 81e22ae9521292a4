"""Dense layers of torch and of transformers: Linear, Conv1D, Embedding, convolutions, attention, bare
parameters.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from peftrs.bases import attention
from peftrs.bases.base import Base, as_dtype, called
from peftrs.bases.kinds import Affine, LayerKind
from peftrs.bases.sharded import summed


class Linear(Base):
    """`nn.Linear`."""

    kind = LayerKind.LINEAR

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        # Asked at every step of every layer: torch finds registered parameters only after it looked
        # elsewhere.
        held: dict[str, Any] = module._parameters
        if "weight" in held and "bias" in held:
            return held["weight"], held["bias"]
        return cast(nn.Parameter, module.weight), cast("nn.Parameter | None", module.bias)

    def obstacle(self, module: nn.Module) -> str | None:
        return called(module, nn.Linear.forward)

    def op(
        self, module: nn.Module, x: Any, affine: Affine, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        return functional.linear(x, *as_dtype(affine, x.dtype))


class TransposedLinear(Linear):
    """transformers' `Conv1D`, a Linear whose weight is stored `(in, out)`."""

    transposed = True
    first = "x"

    def obstacle(self, module: nn.Module) -> str | None:
        own = next(kind for kind in type(module).__mro__ if is_conv1d(kind))
        return called(module, cast(Any, own).forward)


class Embedding(Base):
    """`nn.Embedding`, presented as the map from one-hot rows: `(width, rows)`."""

    kind = LayerKind.EMBEDDING
    transposed = True

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        return cast(nn.Parameter, module.weight), None

    def op(
        self, module: nn.Module, x: Any, affine: Affine, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        layer = cast(nn.Embedding, module)
        # A table of other rows than the layer's own has no row of padding.
        padding = layer.padding_idx if affine.weight.shape[-1] == layer.num_embeddings else None
        rows = summed(
            functional.embedding(x, affine.weight.mT, padding, scale_grad_by_freq=layer.scale_grad_by_freq)
        )
        # Gemma's embeddings multiply what they look up by a constant of their own.
        scale = getattr(layer, "embed_scale", None)
        return rows if scale is None else rows * torch.as_tensor(scale, device=rows.device).to(rows.dtype)


class Convolution(Base):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`."""

    def __init__(self, kind: LayerKind) -> None:
        self.kind = kind

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        return cast(nn.Parameter, module.weight), cast("nn.Parameter | None", module.bias)

    def groups(self, module: nn.Module) -> int:
        return cast(nn.Conv2d, module).groups

    def op(
        self, module: nn.Module, x: Any, affine: Affine, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        layer = cast(nn.Conv2d, module)
        weight, bias = as_dtype(affine, x.dtype)
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        # The groups follow from the weight: an adapter's own weight may see all input channels at once.
        groups = x.shape[1 - weight.ndim] // weight.shape[1]
        convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[weight.ndim]
        return convolve(x, weight, bias, layer.stride, padding, layer.dilation, groups)


class Parameter(Base):
    """A bare parameter of a module: 2-D `(out, in)`, or 3-D, a stack of experts."""

    kind = LayerKind.PARAMETER
    opaque = True

    def __init__(self, name: str, *, transposed: bool = False) -> None:
        self.name = name
        self.transposed = transposed

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        owner, _ = self.owner(module)
        return cast(nn.Parameter, getattr(owner, self.name)), None

    def owner(self, module: nn.Module) -> tuple[nn.Module, str]:
        """The module that holds the parameter, below layers adapted for its other parameters, and the path to
        there.
        """
        path = ""
        while self.name not in module._parameters and isinstance(
            inner := module._modules.get("base_layer"), nn.Module
        ):
            module, path = inner, f"{path}base_layer."
        return module, path

    def substitutes(self, module: nn.Module, affine: Affine) -> dict[str, Tensor]:
        """What the owner's forward must see instead of its own tensors, by their names from `module`."""
        owner, path = self.owner(module)
        weight = affine.weight.mT if self.transposed else affine.weight
        return {path + self.name: weight.to(cast(Tensor, getattr(owner, self.name)).dtype)}

    def op(
        self, module: nn.Module, x: Any, affine: Affine, rest: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        return torch.func.functional_call(module, self.substitutes(module, affine), (*x, *rest), options)


class Attention(Parameter):
    """`nn.MultiheadAttention`: the joint input projection. The output projection is a layer of its own."""

    kind = LayerKind.ATTENTION

    def __init__(self) -> None:
        super().__init__("in_proj_weight")

    def parameters(self, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
        return cast(nn.Parameter, module.in_proj_weight), None


LINEAR, TRANSPOSED, EMBEDDING, ATTENTION = Linear(), TransposedLinear(), Embedding(), Attention()
CONVOLUTION = {
    nn.Conv1d: Convolution(LayerKind.CONV1D),
    nn.Conv2d: Convolution(LayerKind.CONV2D),
    nn.Conv3d: Convolution(LayerKind.CONV3D),
}


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether the module is transformers' `Conv1D`, told without importing transformers."""
    return any(map(is_conv1d, type(module).__mro__))


def is_conv1d(kind: type) -> bool:
    """Whether this is the class `Conv1D` of transformers itself."""
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def resolve(module: nn.Module) -> Base | None:
    """The base that presents a module, or None if no method can change it."""
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION if module._qkv_same_embed_dim else None
    for kind, base in CONVOLUTION.items():
        if isinstance(module, kind):
            return base
    return TRANSPOSED if is_transposed_linear(module) else attention.resolve(module)
