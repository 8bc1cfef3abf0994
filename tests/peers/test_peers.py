"""The peers' suites: imports are rewritten and nothing else, results are read, and a failure needs a reason."""

import pytest

import quant2e
import quantizers
from tests.peers.__main__ import main, page
from tests.peers.differences import Difference, explained, read
from tests.peers.imports import rewritten
from tests.peers.suites import TORCHAO, Outcome, Suite, check_checkout, copy_suite, outcomes, run_files

REWRITTEN = [
    ("from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e", "from quant2e import prepare_pt2e"),
    (
        "from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Q",
        "from quantizers import XNNPACKQuantizer as Q",
    ),
    (
        "from torchao.quantization.pt2e import FROM_NODE_KEY, convert_pt2e, observer",
        (
            "from torchao.quantization.pt2e import FROM_NODE_KEY\n"
            "from quant2e import convert_pt2e\nimport quant2e as observer"
        ),
    ),
    (
        "import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as xiq",
        "import quantizers as xiq",
    ),
    ("import torchao", "import torchao"),
    (
        "def test(m):\n    torchao.quantization.pt2e.move_exported_model_to_eval(m)",
        "import quant2e\n\ndef test(m):\n    quant2e.move_exported_model_to_eval(m)",
    ),
    (
        "from torchao.testing.pt2e.utils import PT2EQuantizationTestCase",
        "from peers_torchao.torchao.testing.pt2e.utils import PT2EQuantizationTestCase",
    ),
    (
        "import executorch.backends.test.harness.stages as S\nx = executorch.backends.test.harness.Tester.f()",
        (
            "import peers_executorch\nimport peers_executorch.backends.test.harness.stages as S\n"
            "x = peers_executorch.backends.test.harness.Tester.f()"
        ),
    ),
    ("from torchao.quantization.granularity import PerGroup", "from torchao.quantization.granularity import PerGroup"),
    ("from .quantize import Quantize", "from .quantize import Quantize"),
    (
        "from __future__ import annotations\ntorchao.quantization.pt2e.prepare_pt2e(m)",
        "from __future__ import annotations\nimport quant2e\nquant2e.prepare_pt2e(m)",
    ),
    ("torchao.quantize_affine(x).convert_pt2e", "torchao.quantize_affine(x).convert_pt2e"),
]


@pytest.mark.parametrize(("theirs", "ours"), REWRITTEN)
def test_imports(theirs, ours):
    assert rewritten(theirs) == ours


def test_names_that_scripts_import_are_found():
    for name in ("prepare_pt2e", "QuantizationSpec", "Quantizer", "default_observer"):
        assert hasattr(quant2e, name)
    assert hasattr(quantizers, "get_default_x86_inductor_quantization_config")


SUITE = Suite(peer="torchao", folder="peers_torchao", copied=("lib/numbers.py",), tests=("test/test_*.py",))

TEST = """
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
import pytest
class TestIt:
    def test_ours(self):
        assert prepare_pt2e.__module__.startswith("quant2e")
    def test_two(self):
        assert 1 == 2, "one is not two"
    @pytest.mark.skip
    def test_later(self):
        pass
"""


def checkout(folder, test=TEST):
    for name, text in (("lib/numbers.py", "ONE = 1\n"), ("test/test_a.py", test)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.slow  # a process with its imports
def test_a_suite_is_copied_and_run(tmp_path):
    tests = copy_suite(SUITE, checkout(tmp_path / "checkout"), tmp_path)
    root = tmp_path / SUITE.folder
    assert [str(test.relative_to(root)) for test in tests] == ["test/test_a.py"]
    found = run_files(tests, root, "")
    assert [(o.test, o.kind) for o in found] == [
        ("test/test_a.py::TestIt::test_ours", "passed"),
        ("test/test_a.py::TestIt::test_two", "failed"),
        ("test/test_a.py::TestIt::test_later", "skipped"),
    ]
    assert "one is not two" in found[1].message


@pytest.mark.slow
def test_a_process_that_dies_fails_its_file_alone(tmp_path):
    folder = checkout(tmp_path / "checkout")
    (folder / "test/test_b.py").write_text("import os\nos._exit(7)\n")
    found = run_files(copy_suite(SUITE, folder, tmp_path), tmp_path / SUITE.folder, "ours")
    assert [(o.test, o.kind) for o in found] == [
        ("test/test_a.py::TestIt::test_ours", "passed"),
        ("test/test_b.py", "failed"),
    ]
    assert "pytest ended with 7" in found[1].message


def test_reports_are_read():
    case = '<testcase classname="test.test_a.TestIt" name="test_two">{}</testcase>'
    (passed,) = outcomes(f"<testsuites><testsuite>{case.format('')}</testsuite></testsuites>")
    assert passed == Outcome("test/test_a.py::TestIt::test_two", "passed")
    failure = '<failure message="AssertionError">x = 1\nE   assert 1 == 2</failure>'
    (failed,) = outcomes(f"<testsuite>{case.format(failure)}</testsuite>")
    assert failed == Outcome("test/test_a.py::TestIt::test_two", "failed", "AssertionError | assert 1 == 2")


A_AND_B = [
    Outcome("t/test_a.py::T::test_a", "failed", "scale differs"),
    Outcome("t/test_a.py::T::test_b", "failed", "crash"),
    Outcome("t/test_a.py::T::test_c", "passed"),
]


def test_a_failure_needs_a_reason_that_its_message_shows():
    scales = Difference(what="scales", why="another search", tests=("test_a.py::T::test_?",), says="scale d")
    found, left = explained(A_AND_B, [scales])
    assert found == {scales: [A_AND_B[0]]}
    assert left == [A_AND_B[1]]
    text = page(["torchao 1 of 2026-01-01"], [("torchao", o) for o in A_AND_B], found, left, "2026-01-02")
    assert "| torchao `test_a.py` | 1 | 2 | 0 |" in text
    assert "| scales | `test_a` | another search |" in text
    assert "- `t/test_a.py::T::test_b`: crash" in text


def test_the_list_of_differences_is_readable():
    differences = read()
    assert len({d.what for d in differences}) == len(differences)
    assert all(d.what and d.why and d.tests and d.says for d in differences)


def test_a_folder_that_is_no_checkout_is_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no checkout of torchao.*it has no torchao/testing/pt2e/utils.py"):
        check_checkout(TORCHAO, tmp_path)
    monkeypatch.setattr("sys.argv", ["peers"])
    with pytest.raises(SystemExit):
        main()
    assert "name a checkout" in capsys.readouterr().err
