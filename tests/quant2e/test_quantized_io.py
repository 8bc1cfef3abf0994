"""Models that take and return integers: the parameters are published, and no number changes."""

import json
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quant2e import (
    CaptureError,
    FileFormatError,
    Port,
    Quant2eError,
    QuantizedIO,
    calibrate,
    capture,
    convert_pt2e,
    load,
    prepare_pt2e,
    quantize,
    quantized_io_of,
    with_quantized_io,
)
from quant2e.convert.legality import problems
from quantizers import X86InductorQuantizer, XNNPACKQuantizer, get_default_x86_inductor_quantization_config
from quantizers import get_symmetric_quantization_config as config
from tests.quantizers.models import IMAGE, ROWS, Of, Residual


def static():
    return XNNPACKQuantizer().set_global(config(is_per_channel=True))


def both(model, example, quantizer=None, **kwargs):
    """The same quantization with a float and with an integer quantized_io."""
    torch.manual_seed(0)
    made = [
        quantize(model.eval(), example, quantizer or static(), [example], int8_io=flag, **kwargs)
        for flag in (False, True)
    ]
    return tuple(made)


def test_integers_in_and_out_are_those_the_float_model_would_use():
    floats, integers = both(Residual(), IMAGE)
    (x,), (y,) = integers.quantized_io.inputs, integers.quantized_io.outputs
    assert (x.name, x.index, x.dtype, y.name, y.index, y.dtype) == ("x", 0, torch.int8, "output", 0, torch.int8)
    q = x.quantize(IMAGE[0])
    assert torch.equal(integers.example_inputs[0], q)
    result = integers(q)
    assert result.dtype == torch.int8
    assert torch.equal(y.dequantize(result), floats(*IMAGE))
    assert integers.report.sqnr_db == floats.report.sqnr_db
    assert [n for n in integers.report.notes if "scale" in n] == [f"input {x}", f"output {y}"]
    assert problems(integers.module) == []
    assert not floats.quantized_io
    assert quantized_io_of(floats.module) == QuantizedIO()


def test_it_saves_and_loads_with_its_parameters(tmp_path):
    _, integers = both(Residual(), IMAGE)
    integers.save(tmp_path / "m.pt2")
    again = load(tmp_path / "m.pt2")
    assert again.quantized_io == integers.quantized_io
    assert torch.equal(again(*integers.example_inputs), integers(*integers.example_inputs))
    again.save(tmp_path / "n.pt2")
    assert load(tmp_path / "n.pt2").quantized_io == integers.quantized_io
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        name = next(n for n in archive.namelist() if n.endswith("quant2e.json"))
        record = json.loads(archive.read(name))["boundary"]
    (x,) = integers.quantized_io.inputs
    assert record["inputs"] == [
        {"name": "x", "index": 0, "scale": x.scale, "zero_point": x.zero_point, "quant_min": -128, "quant_max": 127,
         "dtype": "int8", "float_dtype": "float32"}
    ]  # fmt: skip


def test_the_integer_representation_takes_and_returns_integers_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    _, qdq = both(model, IMAGE)
    _, integer = both(model, IMAGE, use_reference_representation=True)
    assert integer.quantized_io == qdq.quantized_io
    assert not any("quantized_decomposed" in str(n.target) for n in integer.module.graph.nodes)
    assert torch.equal(integer(*qdq.example_inputs), qdq(*qdq.example_inputs))


def test_names_lead_through_nested_inputs_and_outputs():
    model = Of(
        lambda m, x, batch: {"a": m.l(batch["p"]), "b": [m.l(x), batch["n"] + 1]},
        l=nn.Linear(8, 4),
    )
    example = (torch.randn(4, 8), {"n": torch.arange(3), "p": torch.randn(2, 8)})
    floats, integers = both(model, example)
    assert [port.name for port in integers.quantized_io.inputs] == ["inputs_0", "inputs_1['p']"]
    assert [port.name for port in integers.quantized_io.outputs] == ["output['a']", "output['b'][0]"]
    wanted, got = floats(*example), integers.quantized_io.dequantize_outputs(integers(*integers.example_inputs))
    assert torch.equal(got["a"], wanted["a"])
    assert torch.equal(got["b"][0], wanted["b"][0])
    assert torch.equal(got["b"][1], wanted["b"][1])


def test_keyword_inputs():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(8, 4)

        def forward(self, a, *, b):
            return self.l(a) + self.l(b)

    a, b = torch.randn(2, 8), torch.randn(2, 8)
    gm = prepare_pt2e(capture(Keywords().eval(), (a,), {"b": b}), static())
    gm(a, b=b)
    qdq = convert_pt2e(gm)
    integers = with_quantized_io(qdq)
    args, kwargs = quantized_io_of(integers).quantize_inputs(integers.inputs, (a,), {"b": b})
    assert kwargs["b"].dtype == torch.int8
    assert torch.equal(quantized_io_of(integers).dequantize_outputs(integers(*args, **kwargs)), qdq(a, b=b))


def test_what_computes_in_float_keeps_float_inputs_and_outputs_and_says_so():
    model = Of(
        lambda m, x, y: (m.l(x), torch.softmax(m.l(x), -1), y.exp()),
        l=nn.Linear(8, 4),
    )
    _, integers = both(model, (torch.randn(4, 8), torch.randn(3)))
    assert [port.name for port in integers.quantized_io.inputs] == ["inputs_0"]
    assert integers.quantized_io.floats == {
        "input inputs_1": "no op that reads it is quantized",
        "output[1]": "'softmax' computes it in float",
        "output[2]": "'exp' computes it in float",
    }
    assert "output[1] stays float: 'softmax' computes it in float" in integers.report.notes


def test_every_reader_of_an_input_reads_its_integers():
    model = Of(lambda m, x: m.l(x) + F.gelu(x).sum(), l=nn.Linear(8, 4))
    _, integers = both(model, ROWS)
    placeholder = next(n for n in integers.module.graph.nodes if n.op == "placeholder")
    assert {str(user.target) for user in placeholder.users} == {"quantized_decomposed.dequantize_per_tensor.default"}
    assert problems(integers.module) == []
    assert integers(*integers.example_inputs).dtype == torch.int8


def test_a_call_with_floats_is_refused_in_words():
    _, integers = both(nn.Linear(8, 4), ROWS)
    with pytest.raises(CaptureError, match=r"where str\(input.dtype\) == 'torch.int8'"):
        integers(*ROWS)


def test_unsigned_inputs_and_outputs():
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    floats, integers = both(nn.Conv2d(3, 4, 3), IMAGE, quantizer)
    assert integers.quantized_io.inputs[0].dtype == torch.uint8
    assert integers.quantized_io.outputs == ()
    assert torch.equal(integers(*integers.example_inputs), floats(*IMAGE))


def test_step_by_step_leaves_the_converted_graph_as_it_was():
    gm = prepare_pt2e(capture(nn.Linear(8, 4).eval(), ROWS), static())
    converted = convert_pt2e(calibrate(gm, [ROWS]))
    code = converted.code
    integers = with_quantized_io(converted)
    assert converted.code == code
    assert converted(*ROWS).dtype == torch.float32
    assert integers(quantized_io_of(integers).inputs[0].quantize(ROWS[0])).dtype == torch.int8
    with pytest.raises(Quant2eError, match="takes and returns integers already"):
        with_quantized_io(integers)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Linear(8, 4), "its scale is found at run time"),
        (Of(lambda m, x: m.l(x.relu_()), l=nn.Linear(8, 4)), "it is written in place"),
    ],
)
def test_nothing_to_open_is_an_error_that_says_why(model, why):
    dynamic = XNNPACKQuantizer().set_global(config(is_per_channel=True, is_dynamic=True))
    converted = convert_pt2e(prepare_pt2e(capture(model.eval(), ROWS), dynamic))
    with pytest.raises(Quant2eError, match=f"no input and no output of this graph can carry integers .*{why}"):
        with_quantized_io(converted)


def test_varying_sizes():
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    floats, integers = both(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), ROWS, dynamic_shapes=shapes)
    x = torch.randn(7, 8)
    q = integers(integers.quantized_io.inputs[0].quantize(x))
    assert torch.equal(integers.quantized_io.outputs[0].dequantize(q), floats(x))


def test_half_precision_models_say_what_their_integers_stand_for():
    port = Port(name="x", index=0, scale=0.5, zero_point=1, quant_min=-128, quant_max=127, dtype=torch.int8,
                float_dtype=torch.float16)  # fmt: skip
    q = port.quantize(torch.tensor([0.0, 1.0, 100.0], dtype=torch.float16))
    assert q.tolist() == [1, 3, 127]
    assert torch.equal(port.dequantize(q), torch.tensor([0.0, 1.0, 63.0], dtype=torch.float16))
    assert QuantizedIO.from_dict(QuantizedIO((port,), ()).as_dict()).inputs == (port,)


def test_a_damaged_record_is_refused():
    with pytest.raises(FileFormatError, match="integer inputs and outputs is damaged"):
        QuantizedIO.from_dict(
            {"inputs": [{"name": "x", "dtype": "int9", "float_dtype": "float32"}], "outputs": [], "floats": {}}
        )
