"""Results whose weights came from files hold them two to a byte: they are lowered as those of weights in memory."""

import pytest
import torch
from torch import nn

import lowering
import quant2e
from lowering.export import graph_of, plain_graph_of
from quant2e.stored_tensor import stored_in
from quantizers import X86InductorQuantizer, XNNPACKQuantizer
from tests.quant2e.weights.checkpoints import write_safetensors

X = (torch.linspace(-1, 1, 3 * 64).reshape(3, 64),)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()


def results(folder, quantizer):
    """Of weights in a file, and of the same in memory."""
    plain = layers()
    file = write_safetensors(folder / "model.safetensors", plain.state_dict())
    with quant2e.parameters_on_meta():
        empty = layers()
    models = (quant2e.attach_weights(empty, file), plain)
    return [quant2e.quantize(model, X, quantizer, min_sqnr_db=None) for model in models]


def test_what_compilers_look_at_holds_values(tmp_path):
    short, plain = results(tmp_path, X86InductorQuantizer().set_global("w4-g32"))
    graph = plain_graph_of(short)
    assert stored_in(short.module)
    assert not stored_in(graph)
    assert torch.equal(graph.get_buffer("0.weight_quantized"), plain.module.get_buffer("0.weight_quantized"))
    assert graph_of(short) is short.module
    assert plain_graph_of(plain) is plain.module
    assert torch.equal(torch.export.export(short.module, X).module()(*X), plain(*X))
    assert torch.equal(quant2e.to_integer(short.module)(*X), quant2e.to_integer(plain.module)(*X))
    assert torch.equal(lowering.to_native(short)(*X), lowering.to_native(plain)(*X))


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor(tmp_path):
    short, plain = results(tmp_path, X86InductorQuantizer().set_global("w4-g32"))
    assert torch.equal(lowering.to_inductor(short)(*X), lowering.to_inductor(plain)(*X))


@pytest.mark.slow
def test_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    short, plain = results(tmp_path, X86InductorQuantizer().set_global("w4-g32"))
    programs = [lowering.to_onnx(model, X, path=tmp_path / f"{id(model)}.onnx") for model in (short, plain)]
    assert torch.equal(programs[0](*X), programs[1](*X))
    assert (tmp_path / f"{id(short)}.onnx").read_bytes() == (tmp_path / f"{id(plain)}.onnx").read_bytes()


@pytest.mark.slow
def test_executorch(tmp_path):
    pytest.importorskip("executorch")
    short, plain = results(tmp_path, XNNPACKQuantizer().set_global("w4a8-dynamic-g32"))
    assert stored_in(short.module)
    assert torch.equal(lowering.to_executorch(short, X)(*X), lowering.to_executorch(plain, X)(*X))
