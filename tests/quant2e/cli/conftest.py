"""Models and data for the command line: small files, made once."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.export import Dim

from quant2e.cli.verbs import group


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """``model.pt2``, float, of 1 to 16 images of 8 × 8; ``calib.npz``, 24 of them."""
    folder = tmp_path_factory.mktemp("command_line")
    torch.manual_seed(0)
    shapes = ({0: Dim("batch", min=1, max=16)},)
    program = torch.export.export(Net().eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, folder / "model.pt2")
    np.savez(folder / "calib.npz", x=np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32))
    return folder


@pytest.fixture(scope="session")
def quantized(folder):
    """``model_int8.pt2``, made by the command line."""
    target = folder / "model_int8.pt2"
    arguments = ["quantize", folder / "model.pt2", "--data", folder / "calib.npz", "--target", "xnnpack", "-o", target]
    result = CliRunner().invoke(group, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return target


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line in an empty folder, in this process; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments):
        result = CliRunner().invoke(group, list(map(str, arguments)))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run_command
