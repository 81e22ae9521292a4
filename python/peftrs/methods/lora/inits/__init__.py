"""Ways to start an adapter from the base weights, one file each; `start` finds the one that a config names.

A start takes the adapter and the base's affine map and returns first values by slot. Where `changes_base` is
set, its paper puts `W − s·B₀·A₀` beneath the adapter: here the base is not written, the first factors are
kept beside the trained ones instead. LoftQ alone writes it, being for a base that is quantized.
"""

from __future__ import annotations

import re
from typing import Any

from peftrs.errors import ConfigError
from peftrs.methods.lora.inits.loftq import Loftq, LoftQConfig
from peftrs.methods.lora.inits.olora import Olora
from peftrs.methods.lora.inits.orthogonal import Orthogonal
from peftrs.methods.lora.inits.pissa import Pissa
from peftrs.methods.lora.inits.start import Start

__all__ = ["LoftQConfig", "Start", "find"]

PISSA = re.compile(r"pissa(?:_niter_(?P<iterations>[0-9]{1,4}))?")
UNBUILT = ("eva", "corda", "lora_ga", "mica")


def find(name: bool | str, loftq: dict[str, Any] | None = None) -> Start | None:
    """The start of this name, or None for the plain ones (True, False, "gaussian"), with the settings of
    LoftQ for that.

    Raises `ConfigError` for an unknown name or settings that do not go.
    """
    if isinstance(name, bool) or name.lower() == "gaussian":
        return None
    if name == "orthogonal":
        return Orthogonal()
    if name.lower() == "olora":
        return Olora()
    if match := PISSA.fullmatch(name):
        iterations = match["iterations"]
        return Pissa(None if iterations is None else int(iterations))
    if name == "loftq":
        return Loftq.of(loftq or {})
    if name in UNBUILT:
        raise ConfigError(f"init_lora_weights={name!r} is not built yet in peftrs")
    raise ConfigError(
        f"init_lora_weights={name!r} is unknown: use True, False, 'gaussian', 'orthogonal', 'olora', 'loftq',"
        " 'pissa' or 'pissa_niter_16'"
    )
