"""Contents of ``.onnx`` files: what is in a small one, and what is none."""

import pytest

from lowering.onnx.contents import onnx_contents
from quant2e.errors import FileFormatError

onnx = pytest.importorskip("onnx")


def test_what_a_file_holds(tmp_path):
    helper, kinds = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])],
        "graph",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("z", kinds.FLOAT, ["batch", 3])],
        [
            helper.make_tensor("w", kinds.FLOAT, [3], [1.0, 2.0, 3.0]),
            helper.make_tensor("q", kinds.INT4, [4], [1, 2, 3, 4]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], producer_name="test")
    helper.set_model_props(model, {"a": "b"})
    onnx.save(model, tmp_path / "a.onnx")
    found = onnx_contents(tmp_path / "a.onnx")
    assert (found.opset, found.producer, found.metadata) == (21, "test", {"a": "b"})
    assert found.inputs == ("x: float32[batch, 3]",)
    assert found.outputs == ("z: float32[batch, 3]",)
    assert found.ops == {"Mul": 1, "Relu": 1}
    assert found.constants == {"float32": 12, "int4": 2}
    assert "ops: 1 × Mul, 1 × Relu" in str(found)


def test_what_is_none(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"\xff\xff no model")
    with pytest.raises(FileFormatError, match=r"a\.onnx is no ONNX file, or is damaged"):
        onnx_contents(tmp_path / "a.onnx")
    with pytest.raises(FileNotFoundError):
        onnx_contents(tmp_path / "none.onnx")
