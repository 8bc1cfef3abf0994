"""The snapshot op: a copy of a buffer that a compiler keeps for the backward pass, and does not compute again there.

``torch.compile`` saves what is cheap to compute again as its inputs. A buffer that is written later in the same step,
as running statistics are, would then have changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("quant2e", "FRAGMENT")
_LIBRARY.define("snapshot(Tensor x) -> Tensor")


def _snapshot(x: Tensor) -> Tensor:
    return x.clone()


_LIBRARY.impl("snapshot", _snapshot, "CompositeExplicitAutograd")

snapshot = torch.ops.quant2e.snapshot.default
