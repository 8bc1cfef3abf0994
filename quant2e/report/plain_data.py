"""Plain data: descriptions as what JSON holds.

dataclass, mapping → dict; tuple, list → list; a float that is not finite → its name ("inf"), which ``float()`` reads
again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch


def plain_data(value: Any) -> Any:
    """``value`` as numbers, strings, None, lists and dicts with strings as keys.

    Raises TypeError for what has no such form, tensors among them.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, torch.dtype | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain_data(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain_data({field.name: getattr(value, field.name) for field in fields(value)})
    raise TypeError(f"a {type(value).__name__} has no form in plain data")
