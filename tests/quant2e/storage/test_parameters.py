"""The record inside a file names the buffers that hold the parameters of channels;
earlier ones hold them in themselves.
"""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from torch import nn

from quant2e import FileFormatError, capture, convert_pt2e, load, prepare_pt2e, save
from quant2e.annotation.quantizer import Quantizer
from quant2e.annotation.specs import ANNOTATION, QuantizationAnnotation, QuantizationSpec
from quant2e.documents.tensor_numbers import TensorNumbers
from quant2e.observers.measuring import PerChannelMinMaxObserver
from quant2e.observers.per_group import PerGroupMinMaxObserver
from quant2e.ranges.qparams import FLOAT_QPARAMS
from quant2e.report.encodings import Encodings, encodings_of, encodings_record
from quant2e.report.record import record_of
from quant2e.storage.columns import from_columns
from quant2e.storage.parameters import name_buffers, read_buffers
from tests.quant2e.storage.archives import records_in, rewritten

SPECS = {
    "channels": QuantizationSpec(torch.int8, PerChannelMinMaxObserver, -127, 127, torch.per_channel_symmetric, 0),
    "affine": QuantizationSpec(torch.uint8, PerChannelMinMaxObserver, 0, 255, torch.per_channel_affine, 0),
    "float zero points": QuantizationSpec(torch.uint8, PerChannelMinMaxObserver, 0, 255, FLOAT_QPARAMS, 0),
    "groups": QuantizationSpec(
        torch.int8, PerGroupMinMaxObserver.with_args(group_size=4), -8, 7, torch.per_channel_symmetric, 0
    ),
}
ROWS = 3000


class Weights(Quantizer):
    def __init__(self, spec):
        self.spec = spec

    def annotate(self, model):
        for node in model.graph.nodes:
            if node.target is torch.ops.aten.linear.default:
                node.meta[ANNOTATION] = QuantizationAnnotation(input_qspec_map={node.args[1]: self.spec})
        return model

    def validate(self, model):
        pass


@pytest.fixture(params=SPECS)
def converted(request):
    torch.manual_seed(0)
    model = nn.Linear(8, ROWS).eval()
    return convert_pt2e(prepare_pt2e(capture(model, torch.randn(2, 8)), Weights(SPECS[request.param])))


RECORD = "extra/quant2e.json"


def record_in(path):
    return records_in(path)[RECORD]


def exact(encodings):
    return json.dumps(encodings.as_dict())


def test_a_file_names_the_buffers_and_gives_their_numbers_back(converted, tmp_path):
    path = tmp_path / "m.pt2"
    save(converted, path, (torch.randn(2, 8),))
    text = record_in(path)
    assert len(text) < 2000
    (group,) = from_columns(json.loads(text)["recipe"]["groups"], "the groups", 9)
    assert isinstance(group["scale"], str)
    assert isinstance(group["zero_point"], str)
    again = load(path)
    assert len(again.encodings.groups[0].scale) >= ROWS
    assert exact(again.encodings) == exact(encodings_of(record_of(converted), ""))
    assert again.encodings.groups[0].scale.tensor is again.module.get_buffer(group["scale"])
    again.save(tmp_path / "again.pt2")
    assert exact(load(tmp_path / "again.pt2").encodings) == exact(again.encodings)


def test_pythons_numbers_are_found_in_buffers_as_well(converted):
    encodings = encodings_of(record_of(converted), "")
    of_tensors, of_python = (
        name_buffers(given, converted) for given in (encodings_record(encodings), encodings.as_dict())
    )
    assert of_python == of_tensors
    assert {type(group[part]) for group in of_python["groups"] for part in ("scale", "zero_point")} == {str}
    copied = {**encodings_record(encodings), "groups": [
        {name: TensorNumbers(value.tensor.clone()) if isinstance(value, TensorNumbers) else value
         for name, value in group.items()}
        for group in encodings_record(encodings)["groups"]
    ]}  # fmt: skip
    assert name_buffers(copied, converted)["groups"] == list(of_tensors["groups"])


def packed(values):
    """As format 1 held long lists."""
    if isinstance(values[0], int) and len(set(values)) == 1:
        return {"integer": values[0], "count": len(values)}
    raw = np.array(values, dtype="<f4")
    if isinstance(values[0], float) and [float(str(value)) for value in raw] == list(values):
        return {"float32": base64.b64encode(raw.tobytes()).decode()}
    return values


def test_files_of_the_first_format_are_read(converted, tmp_path):
    save(converted, tmp_path / "m.pt2", (torch.randn(2, 8),))
    record = record_of(converted)
    encodings = encodings_of(record, "").as_dict()
    groups = [{k: packed(v) if k in {"scale", "zero_point"} else v for k, v in g.items()} for g in encodings["groups"]]
    old = {"format": 1, "report": record.report.as_dict(), "recipe": {**encodings, "groups": groups}}
    again = load(rewritten(tmp_path / "m.pt2", tmp_path / "old.pt2", **{RECORD: json.dumps(old).encode()}))
    assert exact(again.encodings) == json.dumps(encodings)


def test_what_no_buffer_holds_stays_a_list(converted):
    encodings = encodings_of(record_of(converted), "").as_dict()
    (group,) = encodings["groups"]
    changed = {**encodings, "groups": [{**group, "scale": [*group["scale"][:-1], 0.125]}]}
    (named,) = name_buffers(changed, converted)["groups"]
    assert named["scale"] == changed["groups"][0]["scale"]
    assert isinstance(named["zero_point"], str)
    assert exact(Encodings.from_dict(read_buffers({**encodings, "groups": [named]}, converted))) == json.dumps(changed)


@pytest.mark.parametrize(
    "damaged",
    [
        "weight_nowhere",
        {"float32": "!"},
        {"float32": 5},
        {"integer": 0},
        {"integer": 0, "count": -1},
        {"integer": 0, "count": 1 << 60},
        7,
    ],
)
def test_damage_is_an_error(damaged):
    gm = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(FileFormatError, match="damaged|which the graph does not have|longer than"):
        read_buffers({"groups": [{"scale": damaged}]}, gm)


@pytest.mark.parametrize("damaged", [None, [], {}, {"groups": None}, {"groups": {"a": 1}}, {"groups": [7]}], ids=str)
def test_groups_that_are_none_are_an_error(damaged):
    gm = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.raises(FileFormatError, match="no list of groups"):
        read_buffers(damaged, gm)
