"""Extras: importing the packages needs none of them, and using one that is missing says which to install."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
import torch

import lowering
import quant2e
from lowering import language_models
from lowering.executorch.runtime import require_executorch
from lowering.openvino.session import import_openvino
from quant2e.accuracy.tuning.budgets import _scipy_optimize
from quant2e.accuracy.tuning.optuna_import import optuna_module
from quant2e.cli.inputs.images import image_reader
from quant2e.documents.yaml_text import yaml_text
from quant2e.page.plots import svg_of
from quant2e.page.render import write_page
from quant2e.page.section import DotChart
from quantizers import X86InductorQuantizer, as_torchao
from quantizers.conformance.generate import random_programs

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]

SCRIPTS = {"all", "bench", "demo", "dev", "site"}
"""For benchmarks, tests and pages: nothing that is installed uses what they bring alone."""

SHOWN_WHERE_THERE = {"progress"}
"""Without it the same is told to loggers: see tests/quant2e/test_stages.py."""


class Decoder(torch.nn.Module):
    """What a decoder of Hugging Face looks like from outside, before its cache is made."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.config = type("Config", (), {"get_text_config": lambda self: self, "max_position_embeddings": 8})()

    def generate(self):
        return None


@pytest.fixture(scope="module")
def model():
    return quant2e.capture(torch.nn.Linear(2, 2).eval(), (torch.zeros(1, 2),))


CASES = {
    "conformance": [("hypothesis", lambda model, folder: list(random_programs(None, 1, 0)))],
    "decoders": [("transformers", lambda model, folder: language_models.capture_decoder(Decoder().eval(), 4))],
    "executorch": [
        ("executorch", lambda model, folder: lowering.to_executorch(model, (torch.zeros(1, 2),))),
        ("executorch", lambda model, folder: require_executorch(runtime_only=True)),
    ],
    "html": [
        ("jinja2", lambda model, folder: write_page(folder / "a.html", "title", ())),
        (
            "matplotlib",
            lambda model, folder: svg_of(DotChart(title="t", unit="dB", names=("a",), series={"x": (1.0,)})),
        ),
    ],
    "images": [("PIL", lambda model, folder: image_reader(None, None))],
    "onnx": [
        ("onnx", lambda model, folder: lowering.to_onnx(model, (torch.zeros(1, 2),), path=folder / "a.onnx")),
        ("onnxscript", lambda model, folder: lowering.to_onnx(model, (torch.zeros(1, 2),), path=folder / "a.onnx")),
        ("onnxruntime", lambda model, folder: lowering.to_onnx(model, (torch.zeros(1, 2),), path=folder / "a.onnx")),
    ],
    "openvino": [("openvino", lambda model, folder: import_openvino())],
    "torchao": [("torchao", lambda model, folder: as_torchao(X86InductorQuantizer()))],
    "tune": [
        ("optuna", lambda model, folder: optuna_module()),
        ("scipy", lambda model, folder: _scipy_optimize()),
    ],
    "yaml": [("yaml", lambda model, folder: yaml_text({}))],
}
"""Extra → modules that it brings, and what needs them."""


def test_every_extra_is_tried():
    assert set(CASES) == set(EXTRAS) - SCRIPTS - SHOWN_WHERE_THERE


@pytest.mark.parametrize(
    ("extra", "module", "use"), [(extra, module, use) for extra, uses in CASES.items() for module, use in uses]
)
def test_a_missing_one_is_named(extra, module, use, model, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises((quant2e.Quant2eError, ImportError), match=rf"pip install '?quant2e\[{extra}\]"):
        use(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
