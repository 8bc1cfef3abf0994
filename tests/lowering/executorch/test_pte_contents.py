"""Contents of ``.pte`` files beside what ExecuTorch says of them, and of files that are changed."""

import random

import pytest
import torch
from torch import nn

import lowering
from lowering.executorch.pte_contents import pte_contents
from quant2e.errors import FileFormatError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program():
    pytest.importorskip("executorch")
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(x).relu(), torch.cumsum(x, 0)

    return lowering.to_executorch(
        Net().eval(), (torch.randn(2, 8),), dynamic_shapes=({0: torch.export.Dim("n", max=16)},), verify=False
    )


def test_methods_delegates_and_kernels(program):
    found = pte_contents(program.buffer, "a.pte")
    (method,) = found.methods
    assert method.name == "forward"
    assert method.inputs == ("float32[16, 8] at most",)
    assert method.outputs == ("float32[16, 4] at most", "float32[16, 8] at most")
    assert method.delegates == {"XnnpackBackend": 1}
    assert method.kernels == {"aten::cumsum.out": 1}
    assert method.memory > 0
    assert found.segments > 4 * 8
    assert "method forward: float32[16, 8] at most -> " in str(found)


def test_any_change_is_a_reading_or_an_error_of_ours(program):
    chosen = random.Random(0)
    for _ in range(400):
        raw = bytearray(program.buffer)
        for _ in range(chosen.choice((1, 4))):
            raw[chosen.randrange(min(len(raw), 4000))] = chosen.randrange(256)
        try:
            assert isinstance(str(pte_contents(bytes(raw), "a.pte")), str)
        except FileFormatError as error:
            assert str(error).startswith("a.pte is")  # noqa: PT017
    with pytest.raises(FileFormatError, match=r"a\.pte is damaged, or was cut off"):
        pte_contents(program.buffer[: len(program.buffer) // 3], "a.pte")
