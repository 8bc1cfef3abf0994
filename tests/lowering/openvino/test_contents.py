"""Contents of ``.xml`` files: what is in a small one, and what is none. OpenVINO itself is not needed."""

import json

import pytest

from lowering.openvino.contents import openvino_contents
from quant2e.errors import FileFormatError

MODEL = """<?xml version="1.0"?>
<net name="main" version="11">
 <layers>
  <layer id="0" name="x" type="Parameter" version="opset1"><data shape="1..16,3,?" element_type="f32"/></layer>
  <layer id="1" name="w" type="Const"><data element_type="i4" shape="3, 5" offset="0" size="8"/></layer>
  <layer id="2" name="s" type="Const" version="opset1"><data element_type="f32" shape="" offset="8" size="4"/></layer>
  <layer id="3" name="relu" type="ReLU" version="opset1"/>
  <layer id="4" name="y/sink_port_0" type="Result" version="opset1">
   <input><port id="0" precision="FP32"><dim>-1</dim><dim>3</dim></port></input>
  </layer>
 </layers>
 <rt_info><quant2e><forward_input0_scale value="0.5"/><sha256 value="quant2e_sha256:0"/></quant2e></rt_info>
</net>
"""


def test_what_a_file_holds(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text(MODEL)
    found = openvino_contents(path)
    assert (found.version, found.weights) == (11, None)
    assert found.inputs == ("x: float32[1..16, 3, ?]",)
    assert found.outputs == ("y: float32[?, 3]",)
    assert found.ops == {"ReLU": 1}
    assert found.constants == {"int4": 8, "float32": 4}
    assert found.metadata == {"forward_input0_scale": "0.5"}
    path.with_suffix(".bin").write_bytes(b"0" * 12)
    text = str(openvino_contents(path))
    assert "12 bytes in the .bin beside it" in text
    assert "takes x: float32[1..16, 3, ?]" in text
    assert json.loads(json.dumps(found.as_dict()))["ops"] == {"ReLU": 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<net", "is no OpenVINO model, or is damaged"),
        ("<html/>", "XML whose root is <html>"),
        ('<net version="x"/>', "or is damaged"),
        ('<net version="11"><layers><layer name="x"/></layers></net>', "or is damaged"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><net version="11"/>', "declares entities"),
    ],
)
def test_what_is_none(tmp_path, content, reason):
    (tmp_path / "a.xml").write_text(content)
    with pytest.raises(FileFormatError, match=reason):
        openvino_contents(tmp_path / "a.xml")
