"""What tells the model that an adapter was trained on from another one of the same shapes: a few of its
weights, hashed.

An adapter's file keeps it in its metadata: for up to `TENSORS` weight matrices, spread evenly over the model,
the shape and a hash of `VALUES` values as bfloat16 rounds them, so that the dtype in which a model is loaded
does not matter. Half of them must agree, which a few that were retrained, resized or rounded twice do not
change.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftrs.bases.offload import fetched, hook_of
from peftrs.core.layer import AdaptedLayer
from peftrs.core.tree import original, places
from peftrs.io.entries import plain

KEY = "base_fingerprint"
"""Where it stands in the metadata."""
TENSORS = 32
VALUES = 8
LONGEST = 1 << 16
"""How many characters of metadata are looked at."""


def fingerprint(base: nn.Module) -> str | None:
    """The text for a file's metadata, or None for a model whose weights are not at hand (sharded, quantized,
    without values).
    """
    found = {name: (module, tensor) for name, module, tensor in _weights(base)}
    names = sorted(found)
    chosen = [names[at * len(names) // TENSORS] for at in range(TENSORS)] if len(names) > TENSORS else names
    taken = {
        name: [list(found[name][1].shape), told]
        for name in chosen
        if (told := _hashed(*found[name])) is not None
    }
    return json.dumps(taken, separators=(",", ":"), sort_keys=True) if taken else None


def difference(notes: Mapping[str, str], base: nn.Module) -> str | None:
    """Why a file's metadata speaks against this model, or None.

    What cannot be read or compared says nothing.
    """
    recorded = _read(notes.get(KEY, ""))
    if not recorded:
        return None
    own = {name: (module, tensor) for name, module, tensor in _weights(base) if name in recorded}
    others = [
        name
        for name, (module, tensor) in own.items()
        if recorded[name] != [list(tensor.shape), _hashed(module, tensor)]
    ]
    if 2 * len(others) <= len(own):
        return None
    return (
        f"the adapter was trained on another model than this: {len(others)} of the {len(own)} weights that"
        f" can be compared differ, such as {others[0]!r}"
    )


def _weights(base: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The weights of the model itself that are plain matrices or stacks, with no adapter merged into them,
    and their modules.
    """
    for place in places(base):
        module = place.module
        merged = False
        while isinstance(module, AdaptedLayer):
            merged, module = merged or module.merged, module.base_layer
        if merged:
            continue
        module = original(module)
        for leaf, tensor in module._parameters.items():
            if (
                type(tensor) is not nn.Parameter
                or not tensor.is_floating_point()
                or (tensor.is_meta and hook_of(module) is None)
            ):
                continue
            if tensor.ndim > 1 and tensor.numel() >= VALUES:
                yield f"{plain(place.name)}.{leaf}", module, tensor


@torch.no_grad()
def _hashed(module: nn.Module, tensor: Tensor) -> str | None:
    """A hash of values spread over a module's tensor; None where they are all the same, which tells
    nothing.
    """
    tensor = fetched(module, tensor)
    steps = torch.arange(VALUES, device=tensor.device)
    at = torch.unravel_index((2 * steps + 1) * tensor.numel() // (2 * VALUES), tensor.shape)
    values = tensor[at].to("cpu", torch.float32).to(torch.bfloat16)
    if bool((values == values[0]).all()):
        return None
    # Little-endian wherever it is computed, and not by way of numpy, which torch works without.
    stored = struct.pack(f"<{VALUES}h", *values.view(torch.int16).tolist())
    return hashlib.blake2s(stored, digest_size=6).hexdigest()


def _read(text: str) -> dict[str, Any]:
    if not text or len(text) > LONGEST:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
