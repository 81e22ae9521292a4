"""What PEFT's users import from `peft.utils`, and from its modules, under our name."""

from __future__ import annotations

from peftrs.compat.finder import under

__getattr__ = under("peft.utils")
