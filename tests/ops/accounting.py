"""What a computation costs, counted below autograd and inside fused operations alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Ledger(TorchDispatchMode):
    """Counts operations that touch memory, the bytes that they read and write, and the storages that they
    make.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes = 0
        self.made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # What an operation writes into or takes only the shape of (`beta=0`) is not read.
        unread = {"out"} | ({"self"} if (kwargs or {}).get("beta") == 0 else set())
        names = [argument.name for argument in function._schema.arguments]
        taken = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        read = [
            one
            for one in tree_leaves([value for name, value in taken.items() if name not in unread])
            if isinstance(one, Tensor)
        ]
        written = [one for one in tree_leaves(result) if isinstance(one, Tensor)]
        held = {
            one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)
        }
        new = [one for one in written if one.untyped_storage()._cdata not in held]
        in_place = function._schema.is_mutable
        allocation = function.overloadpacket in (
            torch.ops.aten.empty,
            torch.ops.aten.new_empty,
            torch.ops.aten.empty_like,
        )
        if (new or in_place) and not allocation:
            self.operations += 1
            self.bytes += sum(one.numel() * one.element_size() for one in [*read, *written])
        self.made.update({one.untyped_storage()._cdata: weakref.ref(one.untyped_storage()) for one in new})
        return result

    def alive(self) -> int:
        """The bytes of the storages made here that something still holds."""
        return sum(storage.nbytes() for held in self.made.values() if (storage := held()) is not None)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor with memory of its own that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        held = {
            tensor.untyped_storage().data_ptr()
            for tensor in tree_leaves((args, kwargs))
            if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in held:
                self.elements = max(self.elements, tensor.numel())
        return made


def count(run: Callable[[], object]) -> Ledger:
    """The ledger of one run."""
    with Ledger() as ledger:
        run()
    return ledger
