"""Parts of torch that are not public, each with what it stands for: held for torch 2.6 to 2.15, by the tests
of those that use it.

What a newer torch has moved fails here, at import, and not in the middle of a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as everywhere

Function = TypeVar("Function", bound=Callable[..., object])

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: tuple[dict[int, Any], ...] = tuple(getattr(everywhere, f"_global{name}") for name in HOOKS)

is_tracing: Callable[[], bool] = torch._C._is_tracing
"""Whether `torch.jit.trace` records what runs."""

IncompatibleKeys = everywhere._IncompatibleKeys
"""What `load_state_dict` returns."""

_EMPTY = nn.Module().__dict__
_OWN = {name: type(value) for name, value in _EMPTY.items() if isinstance(value, dict | set)}


def bare(module: nn.Module) -> None:
    """Does what `nn.Module.__init__` does, in a third of its time.

    An adapted layer has five modules, a model hundreds of layers: 560 layers are injected in 130 ms instead
    of 182.
    """
    attributes = module.__dict__
    attributes.update(_EMPTY)
    for name, kind in _OWN.items():
        attributes[name] = kind()


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of hooks that a call of the module runs, its own and those of all modules; empty ones where
    there are none.
    """
    return (*(module.__dict__[name] for name in HOOKS), *_GLOBAL_HOOKS)


def constant_under_compilation(function: Function) -> Function:
    """Has a compiler take the function's answer as it is: what `torch.compiler.assume_constant_result` does,
    which imports one.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_under_compilation
def is_transformed() -> bool:
    """Whether `torch.func` or forward mode is at work, which need rules that functions and operators of one's
    own lack.

    A compiler asks while it traces, which it does inside the transform.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
