"""The dtypes of tensors, as safetensors names them and as torch does."""

from __future__ import annotations

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8,
    "I8": torch.int8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

FLOATS = frozenset(dtype for dtype in NAMES if dtype.is_floating_point)
"""What adapters compute with."""

SAVED = FLOATS | {torch.int64, torch.int32, torch.int16, torch.uint8}
"""What adapters' files hold; the others are models' alone."""
