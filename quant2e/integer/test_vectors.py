"""Test vectors: what every op of an integer graph takes and gives, as files that need no torch to read.

``vectors.json`` lists the ops; each has an ``.npz`` with ``in_<role>``, ``const_<role>``, ``out`` and, where there is
one, ``accumulator``. What the numbers mean: ``docs/integer_semantics.md``; how to use them:
``docs/hardware_engineer.md``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from torch.fx import GraphModule

from quant2e.errors import Quant2eError
from quant2e.files import atomic_file
from quant2e.integer.arithmetic.builder import Record
from quant2e.integer.report import integer_report
from quant2e.integer.trace import tensors

INDEX = "vectors.json"
"""The list of all ops, in the order of the graph."""

FORMAT = 1


def dump_vectors(integer: GraphModule, inputs: Any, folder: str | Path) -> Path:
    """Run an integer graph on one batch and write the test vectors of every op to ``folder``; returns ``vectors.json``.

    ``inputs``: a tensor, a tuple of inputs, or a dict of keyword inputs. ``folder`` is made if it does not exist;
    vectors of an earlier dump are overwritten. Raises `Quant2eError` when ``integer`` is no integer graph or the folder
    is a file.
    """
    report = integer_report(integer)
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise Quant2eError(f"{target} is a file; give a folder for the test vectors")
    target.mkdir(parents=True, exist_ok=True)
    wanted = {name for r in report.records for name in (r.output, r.accumulator, *r.inputs.values()) if name}
    values = {name: value.numpy() for name, value in tensors(integer, wanted, inputs).items()}
    entries = [_write(target, i, record, values) for i, record in enumerate(report.records)]
    index = {"format": FORMAT, "requantization": report.requantization, "ops": entries}
    path = target / INDEX
    with atomic_file(path) as part:
        Path(part).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return path


def _write(folder: Path, number: int, record: Record, values: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    arrays = {f"in_{role}": values[name] for role, name in record.inputs.items()}
    arrays |= {f"const_{role}": value.detach().numpy() for role, value in record.constants.items()}
    arrays["out"] = values[record.output]
    if record.accumulator is not None and record.accumulator in values:
        arrays["accumulator"] = values[record.accumulator]
    file = f"{number:03d}_{re.sub(r'[^A-Za-z0-9_]', '_', record.name)}_{record.kind}.npz"
    with atomic_file(folder / file) as part, Path(part).open("wb") as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    shapes = {key: {"shape": list(a.shape), "dtype": str(a.dtype)} for key, a in arrays.items()}
    return {
        "name": record.name,
        "kind": record.kind,
        "file": file,
        "reads": record.inputs,
        "writes": record.output,
        "attributes": record.attributes,
        "arrays": shapes,
    }
