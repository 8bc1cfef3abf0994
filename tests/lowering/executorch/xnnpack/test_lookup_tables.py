"""Tables of values that XNNPACK joins elementwise ops to: no program reads one that was freed.

Without what is held here, programs of `INTEGERS` compute wrong values, or end their process where they are loaded or
freed (ExecuTorch 1.4.1).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowering import to_executorch
from lowering.executorch.xnnpack.partitioner import BESIDE_TABLE
from quant2e import quantize
from quant2e.errors import LoweringError
from quant2e.graph.qdq_ops import qd
from quantizers import XNNPACKQuantizer


def q(x, scale):
    return qd.quantize_per_tensor.default(x, scale, 3, -128, 127, torch.int8)


def dq(x, scale):
    return qd.dequantize_per_tensor.default(x, scale, 3, -128, 127, torch.int8)


def again(x, scale):
    """Other integers for the same numbers: two conversions, of which XNNPACK makes a table."""
    return dq(q(dq(x, scale), 0.04), 0.04)


class Fn(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def sliced(x):
    return x[:, 16:] + x[:, :4]


def many(y, count):
    for i in range(count):
        y = q(dq(y, (0.05, 0.0637)[i % 2]), (0.0637, 0.05)[i % 2])
    return y


def signs(x, count):
    for i in range(count):
        x = x.neg() if i % 2 else x.abs()
    return x


ADD, QUANTIZE = "aten.add.Tensor", "quantized_decomposed.quantize_per_tensor.default"

INTEGERS = {
    "wrong values": (lambda x, y: q(dq(x, 0.1) + again(y, 0.05), 0.15), 4, ADD),
    "no process behind loading": (lambda x, y: q(dq(x, 0.1) * again(y, 0.05), 0.15), 256, "aten.mul.Tensor"),
    "behind a view": (lambda x, y: q(dq(x, 0.1).view(-1) - again(y, 0.05).view(-1), 0.15), 4, "aten.sub.Tensor"),
    "behind more ops": (lambda x, y: q(dq(x, 0.1) + dq(q(again(y, 0.05).abs(), 0.03), 0.03), 0.15), 4, ADD),
    "more than a table takes": (lambda x, y: (many(y, 6), dq(x, 0.1)), 4, QUANTIZE),
    "as many as a table takes": (lambda x, y: (many(y, 5), dq(x, 0.1)), 4, QUANTIZE),
    "behind floats": (lambda x, y: (many(q(signs(x / 10, 10), 0.05), 6), y + 0), 4, QUANTIZE),
    "behind a shorter table": (lambda x, y: (q(signs(again(x, 0.1), 7), 0.05), y + 0), 4, "aten.abs.default"),
    "two in a chain": (
        lambda x, y: (many(q(signs(dq(x, 0.1), 12), 0.05), 6), y + 0),
        4,
        f"aten.abs.default {QUANTIZE}",
    ),
}
"""Programs of two tensors of integers: function, width, and the ops that are left out."""


@pytest.mark.parametrize("name", INTEGERS)
def test_what_would_be_joined_with_a_table_is_left_to_a_kernel(name):
    function, width, left_out = INTEGERS[name]
    torch.manual_seed(0)
    x, y = torch.randint(-128, 128, (2, 4, width), dtype=torch.int8)
    program = to_executorch(Fn(function), (x, y), verify=False)
    assert [left.op for left in program.report.leftovers if left.reason == BESIDE_TABLE] == left_out.split()
    for got, expected in zip(flat(program(x, y)), flat(function(x, y)), strict=True):
        assert (got.double() - expected.double()).abs().max() <= 1


def test_so_is_a_sum_of_floats_that_is_rounded():
    x, y = torch.randn(4, 4), torch.randint(-128, 128, (4, 4), dtype=torch.int8)
    report = to_executorch(Fn(lambda x, y: q((x + again(y, 0.05)).abs(), 0.15)), (x, y)).report
    assert [left.op for left in report.leftovers if left.reason == BESIDE_TABLE] == [ADD]


def flat(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


SAFE = {
    "almost as many as a table takes": lambda x, y: (q(signs(dq(y, 0.1), 7), 0.05), dq(x, 0.1)),
    "many floats": lambda x, y: (signs(dq(y, 0.1), 15), dq(x, 0.1)),
    "one conversion": lambda x, y: q(dq(x, 0.1) + dq(y, 0.05), 0.15),
    "no integers behind it": lambda x, y: dq(x, 0.1) + again(y, 0.05),
    "both have a table": lambda x, y: q(again(x, 0.1) + again(y, 0.05), 0.15),
    "nothing elementwise": lambda x, y: q(dq(x, 0.1) @ again(y, 0.05).transpose(0, 1), 0.15),
}


@pytest.mark.parametrize("name", SAFE)
def test_nothing_else_is_left_out(name):
    x, y = torch.randint(-128, 128, (2, 4, 4), dtype=torch.int8)
    report = to_executorch(Fn(SAFE[name]), (x, y)).report
    assert [left.op for left in report.leftovers if left.reason == BESIDE_TABLE] == []


def test_the_own_partitioner_of_xnnpack_gets_none_of_them():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    x, y = torch.zeros(2, 4, 4, dtype=torch.int8)
    with pytest.raises(LoweringError, match=r"add.*free the table while in use.*Leave partitioners out"):
        to_executorch(Fn(INTEGERS["wrong values"][0]), (x, y), partitioners=[XnnpackPartitioner()])


def lowered_and_freed():
    """What a process of its own does, where the end of the process would be seen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 20), Fn(sliced)).eval()
    data = [(torch.randn(2, 16),) for _ in range(4)]
    quantizer = XNNPACKQuantizer().set_global("w8a8")
    batch = ({0: torch.export.Dim("batch", min=1, max=4)},)
    program = to_executorch(quantize(model, data[0], quantizer, data, dynamic_shapes=batch))
    assert program(torch.randn(3, 16)).shape == (3, 4)
    del program
    print("freed")


@pytest.mark.slow
def test_a_program_whose_delegate_reads_integers_beside_a_table_is_freed():
    root = Path(__file__).parents[4]
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['lowered_and_freed']()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, __file__],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()[-1:]) == (0, ["freed"]), done.stderr[-600:]
