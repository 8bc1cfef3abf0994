"""Sessions of onnxruntime: slower, exact kernels where 16-bit sums can overflow, and nowhere else."""

import pytest
import torch
from torch import nn

import lowering.onnx.session
from lowering import to_onnx
from lowering.onnx.session import exact_options, run, session, tensor_inputs
from quant2e.cpu import TARGETS, InstructionSet, detect
from quant2e.errors import FileFormatError, LoweringError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SLOWER = "session.x64quantprecision"
EXACT_BLOCKS = "session.qdq_matmulnbits_accuracy_level"


@pytest.mark.parametrize(
    ("cpu", "slower"),
    [
        (TARGETS["avx2"], True),
        (TARGETS["avx512"], True),
        (TARGETS["avx2_vnni"], False),
        (TARGETS["avx512_vnni"], False),
        (TARGETS["amx"], False),
        (InstructionSet("aarch64", saturates=False), False),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_slower_kernels_are_asked_for_where_sums_can_overflow(cpu, slower):
    assert exact_options(cpu).get(SLOWER) == ("1" if slower else None)
    assert exact_options(cpu)[EXACT_BLOCKS] == "1"


def test_every_instruction_set_is_decided():
    assert set(TARGETS) == {"avx2", "avx512", "avx2_vnni", "avx512_vnni", "amx"}


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "model.onnx"
    to_onnx(nn.Linear(3, 4).eval(), (torch.randn(2, 3),), path=path, verify=False)
    return path.read_bytes()


@pytest.mark.parametrize("name", [*TARGETS])
def test_a_session_has_the_options_of_its_processor(content, monkeypatch, name):
    monkeypatch.setattr(lowering.onnx.session, "detect", lambda environment: TARGETS[name])
    options = session(content).get_session_options()
    found = options.get_session_config_entry(SLOWER) if TARGETS[name].saturates else "none"
    assert found == ("1" if TARGETS[name].saturates else "none")
    if not TARGETS[name].saturates:
        with pytest.raises(RuntimeError):
            options.get_session_config_entry(SLOWER)


def test_limits_of_onednn_are_not_those_of_onnxruntime(content, monkeypatch):
    asked = []
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(lowering.onnx.session, "exact_options", lambda cpu: asked.append(cpu) or exact_options(cpu))
    session(content)
    assert asked == [detect({})]


def test_what_a_session_takes_and_what_it_refuses(content, tmp_path):
    loaded = session(content)
    (one,) = tensor_inputs(loaded)
    assert (one.dtype, one.sizes) == (torch.float32, ((2, 2), (3, 3)))
    (y,) = run(loaded, [torch.zeros(2, 3)])
    assert y.shape == (2, 4)
    for wrong in (
        [torch.zeros(3, 3)],
        [],
        [torch.zeros(2, 3), torch.zeros(2, 3)],
        ["text"],
        [torch.zeros(2, 3).long()],
    ):
        with pytest.raises(LoweringError, match="onnxruntime refused the inputs"):
            run(loaded, wrong)
    for damaged in (b"", b"\0" * 50, content[: len(content) // 2], b"\xff" * 1000):
        with pytest.raises(FileFormatError, match="onnxruntime cannot load this model"):
            session(damaged)
    with pytest.raises(FileFormatError, match=r"none\.onnx"):
        session(tmp_path / "none.onnx")


def test_a_file_that_was_edited_or_exchanged_is_not_run(tmp_path):
    x = (torch.randn(2, 3),)
    path = tmp_path / "model.onnx"
    program = to_onnx(nn.Linear(3, 4).eval(), x, path=path, verify=False)
    model = onnx.load(path)
    onnx.save(model, path)  # read and written again, it is the same file
    program(*x)
    program = to_onnx(nn.Linear(3, 4).eval(), x, path=path, verify=False)
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    onnx.save(model, path)
    with pytest.raises(FileFormatError, match=r"model\.onnx was damaged, or edited, since it was written"):
        program(*x)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(FileFormatError, match=r"model\.onnx is not the file that was written here"):
        program(*x)
