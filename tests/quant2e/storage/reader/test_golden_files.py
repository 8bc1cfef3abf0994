"""Files of every format that was ever released: they are read for ever, and give what they gave."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from quant2e.errors import FileFormatError
from quant2e.quantized_model import load
from tests.quant2e.storage.archives import records_in, rewritten

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = "7fc8a8b1b3800cf1a6fa68e3a50f98cfed20878a7bbd976e5a674f97a0bddc1e"
CONDITIONS = (
    "x.dim() == 3",
    "x.size()[1] == 4",
    "x.size()[2] == 6",
    "extra['bias'][0].dim() == 1",
    "extra['bias'][0].size()[0] == 16",
    "x.size()[0] <= 64",
)
OUTPUTS = 17.35334676504135


def batch(size):
    generator = torch.Generator().manual_seed(size)
    x, bias = torch.randn(size, 4, 6, generator=generator), torch.randn(16, generator=generator)
    return (x,), {"extra": {"bias": [bias]}}


def digest(tensors):
    """Of names, dtypes, sizes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", ["format_1", "format_2", "format_3"])
def test_files_of_every_format(name):
    model = load(GOLDEN / f"{name}.pt2")
    assert digest({**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}) == TENSORS
    assert model.module.inputs.conditions == CONDITIONS
    assert [group.dtype for group in model.encodings.groups][:2] == ["int8", "int8"]
    assert [len(group.scale) for group in model.encodings.groups if group.encoding == "per_channel"] == [8, 16, 8]
    assert model.report.quantized_ops == 4
    assert any("no hashes" in note for note in model.report.notes) == (name != "format_3")
    (bounds,) = model.dynamic_shapes[0].values()
    assert (bounds.min, bounds.max) == (None, 64)
    (x,), kwargs = batch(3)
    assert torch.equal(model.example_inputs[0], x)
    assert torch.equal(model.example_kwargs["extra"]["bias"][0], kwargs["extra"]["bias"][0])
    assert model.module.get_buffer("calls").item() == 0
    (x,), kwargs = batch(5)
    found = model(x, **kwargs)
    assert found["y"].double().sum().item() == pytest.approx(OUTPUTS, rel=1e-5)
    assert torch.equal(found["pair"][1], x)
    assert model.module.get_buffer("calls").item() == 1


RECORD = "extra/quant2e.json"


@pytest.mark.parametrize("packed", [{"integer": 0, "count": 1 << 27}, "third.weight_quantized"])
@pytest.mark.parametrize("name", ["format_1", "format_2"])
def test_a_few_bytes_do_not_become_a_long_list(tmp_path, name, packed):
    """A list that is packed, or named, many times over: less is made of it than the graph holds."""
    record = json.loads(records_in(GOLDEN / f"{name}.pt2")[RECORD])
    group = next(group for group in record["recipe"]["groups"] if group["encoding"] == "per_channel")
    record["recipe"]["groups"] = [{**group, "scale": packed, "zero_point": packed}] * 2000
    path = rewritten(GOLDEN / f"{name}.pt2", tmp_path / "bomb.pt2", **{RECORD: json.dumps(record).encode()})
    with pytest.raises(FileFormatError, match="longer than the tensors"):
        load(path)
