"""Fingerprints: digests of what trials are of, so that a storage is not continued with something else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from quant2e.accuracy.tuning.space.space import Alternative, constants_of, float_text
from quant2e.calibration.statistics import SAMPLES


def fingerprints(captured: GraphModule, alternatives: Sequence[Alternative]) -> Mapping[str, str]:
    """Digests by part: the model with its weights, what the quantizers ask for, and the data, held-out batches of it.

    None of them depends on what was computed, which differs in the last bits between machines.
    """
    first = alternatives[0]
    plans = [text for alternative in alternatives for text in (alternative.name, str(alternative.plan))]
    leaves = pytree.tree_leaves([tuple(call) for call in first.held_out.calls])
    samples = str(first.prepared.meta.get(SAMPLES))
    return {
        "model": _digest(float_text(captured), constants_of(captured)),
        "quantizer": _digest(plans, ()),
        "data": _digest(
            [samples, *(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))],
            [leaf for leaf in leaves if isinstance(leaf, Tensor)],
        ),
    }


def _digest(lines: Iterable[str], tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for line in lines:
        found.update(line.encode() + b"\n")
    for tensor in tensors:
        found.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()
