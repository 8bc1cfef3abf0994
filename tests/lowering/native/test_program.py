"""Native programs: what they return, on any batch and number of threads, saved and loaded, and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import lowering
import quant2e
from lowering.native.kernels.op import load_region_op
from quant2e.errors import LoweringError
from quantizers import (
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.lowering.graphs import Cnn

pytestmark = pytest.mark.skipif(load_region_op() is None, reason="no C++ compiler")


class Small(nn.Module):
    """A residual network with squeeze and excitation, pools and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.depthwise = nn.Conv2d(3, 20, 3, stride=2, padding=1), nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.down, self.up, self.project = nn.Conv2d(20, 8, 1), nn.Conv2d(8, 20, 1), nn.Conv2d(20, 20, 1)
        self.head = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.hardswish(self.stem(x)), 3, 2, 1)
        y = self.depthwise(x).relu()
        scale = nn.functional.hardsigmoid(self.up(self.down(y.mean([2, 3], keepdim=True)).relu()))
        x = x + self.project(y * scale)
        made: Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return made


def quantized(batch: int = 2, *, dynamic: bool = False):
    x = torch.randn(batch, 3, 24, 20, generator=torch.Generator().manual_seed(1))
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    return quant2e.quantize(Small().eval(), (x,), quantizer, [(x,)], dynamic_batch=dynamic, progress=False), x


def test_the_whole_network_is_one_region_and_computes_what_its_graph_says():
    model, x = quantized()
    program = lowering.to_native(model)
    assert len(program.report.regions) == 1
    assert program.report.leftovers == ()
    assert program.verification is not None
    assert program.verification.max_steps < 1
    assert program(x).shape == (2, 7)


@pytest.mark.parametrize("recipe", ["w8", "w4-g32"])
def test_where_only_weights_are_quantized_they_are_read_as_they_are_stored(recipe):
    x, quantizer = torch.randn(2, 64), X86InductorQuantizer().set_global(recipe)
    model = quant2e.quantize(nn.Linear(64, 32).eval(), (x,), quantizer, dynamic_batch=True, progress=False)
    program = lowering.to_native(model)
    assert [choice.engine for choice in program.report.engines.values()] == ["weight_only"]
    assert torch.allclose(program(x), model(x), rtol=1e-5, atol=1e-5)


def test_any_batch_and_any_number_of_threads_give_the_same_bits(torch_threads):
    model, _ = quantized(dynamic=True)
    program = lowering.to_native(model)
    x = torch.randn(7, 3, 24, 20)
    found = []
    for count in (1, 2, 3):
        torch_threads(count)
        found += [program(x), torch.cat([program(part) for part in x.split([1, 3, 2, 1])])]
    assert all(torch.equal(one, found[0]) for one in found)


def test_images_in_any_layout_give_the_same_bits_and_leave_it_as_torch_would():
    graph = quant2e.capture(Cnn().eval(), (torch.randn(2, 3, 12, 12),))
    program = lowering.to_native(graph, (torch.randn(2, 3, 12, 12),))
    x = torch.randn(2, 3, 12, 12)
    wide = torch.randn(2, 3, 12, 24)
    wide[..., ::2] = x
    layouts = [x, x.contiguous(memory_format=torch.channels_last), wide[..., ::2]]
    assert all(torch.equal(program(one), program(x)) for one in layouts)


def test_outputs_are_laid_out_as_the_graph_lays_them_out():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1)).eval(), torch.randn(2, 3, 6, 6)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    made = lowering.to_native(quant2e.quantize(net, (x,), quantizer, [(x,)], progress=False))(x)
    assert made.is_contiguous()
    assert made.view(2, -1).shape == (2, 180)


def test_what_is_saved_makes_the_same_program(tmp_path):
    model, x = quantized()
    program = lowering.to_native(model)
    program.save(tmp_path / "net.pt2")
    again = lowering.to_native(quant2e.load(tmp_path / "net.pt2"), (x,))
    assert torch.equal(again(x), program(x))


def test_wrong_inputs_say_so():
    model, _ = quantized()
    with pytest.raises(LoweringError, match="3"):
        lowering.to_native(model)(torch.randn(2, 4, 24, 20))


WITHOUT = """
import torch
import lowering
from tests.lowering.native.test_program import quantized
model, x = quantized()
program = lowering.to_native(model)
print(program.report.headline)
print(program.report.notes)
print(float((program(x) - model(x)).abs().max()) < 1e-3)
"""


def test_without_a_compiler_every_op_runs_by_itself_and_the_report_says_so():
    environment = {**os.environ, "QUANT2E_NATIVE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, env=environment, check=False)
    headline, notes, close = done.stdout.strip().splitlines()[-3:]
    assert "0 of " in headline
    assert "no C++ compiler" in notes
    assert close == "True", done.stderr


def test_a_weight_is_not_dequantized_at_each_call_where_scales_are_found_at_run_time():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval(), torch.randn(3, 16)
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_dynamic=True))
    model = quant2e.quantize(net, (x,), quantizer, progress=False)
    program = lowering.to_native(model)
    left = [str(node.target) for node in program.graph.graph.nodes if "dequantize_per_channel" in str(node.target)]
    assert left == []
    assert torch.allclose(program(x), model(x), atol=1e-5)


def test_inductor_calls_the_same_region():
    model, x = quantized()
    program = lowering.to_inductor(model, engines="native")
    assert {op.kernel for op in program.report.int8} == {"quant2e.int8_region"}
    assert torch.equal(program(x), lowering.to_native(model)(x))


@pytest.mark.parametrize("engine", ["onednn", "float"])
def test_other_engines_are_still_to_be_had(engine):
    model, x = quantized()
    program = lowering.to_inductor(model, engines=engine, verify=False)
    assert "quant2e.int8_region" not in {op.kernel for op in program.report.ops}
    assert program(x).shape == (2, 7)
