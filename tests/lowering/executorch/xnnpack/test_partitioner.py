"""What XNNPACK fuses, pools and turns: one delegate, the numbers of the graph, and nothing in between."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from lowering import to_executorch
from lowering.executorch.xnnpack.partitioner import GROWING_FLOAT16, OTHER_MAXIMUM, xnnpack_partitioner
from quant2e import capture, quantize, to_integer
from quant2e.errors import LoweringError
from quant2e.graph.qdq_ops import qd
from quantizers import XNNPACKQuantizer
from quantizers.xnnpack import get_symmetric_quantization_config
from tests.quantizers.models import Of

QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"


def lowered(model, x, *, is_dynamic=False):
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic)
    data = None if is_dynamic else [(torch.randn(x.shape),) for _ in range(4)]
    quantized = quantize(model.eval(), (x,), XNNPACKQuantizer().set_global(config), data)
    program = to_executorch(quantized, verify_inputs=[(torch.randn(x.shape),) for _ in range(2)])
    assert program.report.leftovers == ()
    (delegate,) = program.report.partitions
    return quantized, program, delegate.ops


class Clamped(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return (
            F.relu(a - b),
            F.relu(a * b),
            F.relu6(a - b.sigmoid()),
            F.hardtanh(a * b, -0.2, 0.5),
            (a + b).clamp(0.1, 0.9),
            F.relu(1 - a),
        )


def test_clamps_behind_sums_differences_and_products_are_theirs():
    x = torch.randn(2, 3, 4, 4)
    quantized, program, ops = lowered(Clamped(), x)
    assert program.report.verification.max_steps == 0
    # the input, two convolutions, a sigmoid, a number that is folded, and six results: none in front of its clamp
    assert sum(ops[f"aten.{op}.Tensor"] for op in ("add", "sub", "mul")) == 6
    assert ops[QUANTIZE] == 1 + 2 + 1 + 6
    integer = to_integer(quantized.module, strict=False)
    for got, expected in zip(integer(x), quantized(x), strict=True):
        assert (got - expected).abs().max() <= expected.abs().max() / 100


class Pools(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        x = F.max_pool1d(F.relu(self.a(x)), 3, 2, 1)
        return self.head(F.adaptive_avg_pool1d(self.b(F.avg_pool1d(x, 2)), 1).flatten(1))


def test_pools_of_sequences_are_those_of_images():
    _, program, ops = lowered(Pools(), torch.randn(2, 3, 22))
    assert program.report.verification.max_steps <= 1
    assert (ops["aten.max_pool2d.default"], ops["aten.avg_pool2d.default"], ops["aten.mean.dim"]) == (1, 1, 1)


def test_a_transposed_convolution_is_quantized_at_run_time():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1)
    _, program, ops = lowered(layer, torch.randn(2, 4, 6, 6), is_dynamic=True)
    assert program.report.verification.max_abs_diff < 1e-4
    assert any("choose_qparams" in op for op in ops)


class Fn(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


class Averaged(nn.Module):
    def __init__(self, average, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.average, self.head = layer(3, 8, 3, padding=1), average, nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.average(F.relu(self.layer(x))).flatten(1))


def averaged(shape, varying, average=None, layer=nn.Conv2d):
    x, data = torch.randn(shape), [(torch.randn(shape),) for _ in range(4)]
    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    model = Averaged(average or nn.AdaptiveAvgPool2d(1), layer).eval()
    return quantize(model, (x,), quantizer, data, dynamic_shapes=(varying,))


AVERAGES = {
    "batch": ((4, 3, 8, 8), {0: Dim("batch", min=4, max=16)}, nn.AdaptiveAvgPool2d(1), nn.Conv2d),
    "largest at capture": ((16, 3, 8, 8), {0: Dim("batch", min=4, max=16)}, lambda x: x.mean([2, 3]), nn.Conv2d),
    "one pixel": ((2, 3, 1, 1), {0: Dim("batch", max=32)}, lambda x: x.mean([-1, -2], keepdim=True), nn.Conv2d),
    "sequences": ((4, 3, 16), {0: Dim("batch", min=4, max=16)}, nn.AdaptiveAvgPool1d(1), nn.Conv1d),
}


@pytest.mark.parametrize(("shapes", "together"), [(None, 3), (({0: Dim("batch", max=8)},), 1)])
def test_only_a_mean_of_fixed_size_is_matched_with_its_integers(shapes, together):
    def function(x):
        x = qd.dequantize_per_tensor.default(x, 0.1, 0, -128, 127, torch.int8).mean([2, 3], keepdim=True)
        return qd.quantize_per_tensor.default(x, 0.1, 0, -128, 127, torch.int8)

    x = torch.zeros(4, 3, 2, 2, dtype=torch.int8)
    exported = torch.export.export(Fn(function), (x,), dynamic_shapes=shapes)
    mean = next(node for node in exported.graph.nodes if node.target is torch.ops.aten.mean.dim)
    config = xnnpack_partitioner().target_partitioner_configs["mean.dim"]
    assert len(config.get_node_and_deps(mean, exported)) == together


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_of_a_varying_batch_is_right_whatever_ran_before(name):
    shape, *rest = AVERAGES[name]
    quantized = averaged(shape, *rest)
    program = to_executorch(quantized)
    (delegate,) = program.report.partitions
    assert program.report.leftovers == ()
    assert delegate.ops["aten.mean.dim"] == 1
    for batch in (4, 5, 16, 9, 15, 4, 16):
        x = torch.randn(batch, *shape[1:])
        torch.testing.assert_close(program(x), quantized(x), rtol=0, atol=0.01)


def test_images_of_every_size_have_means_too():
    varying = {0: Dim("batch", max=16), 2: Dim("height", min=4, max=12), 3: Dim("width", min=4, max=12)}
    quantized = averaged((2, 3, 8, 8), varying)
    program = to_executorch(quantized)
    for size in ((1, 3, 4, 4), (16, 3, 12, 5), (16, 3, 12, 12), (3, 3, 4, 12), (1, 3, 4, 4)):
        x = torch.randn(size)
        torch.testing.assert_close(program(x), quantized(x), rtol=0, atol=0.01)


def test_the_own_partitioner_of_xnnpack_gets_no_mean_that_outgrows_its_memory():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    own = [XnnpackPartitioner()]
    varying = averaged((4, 3, 8, 8), {0: Dim("batch", max=32)})
    with pytest.raises(LoweringError, match=r"'mean'.*averages quantized values.*Leave partitioners out"):
        to_executorch(varying, partitioners=own)
    assert to_executorch(averaged((4, 3, 8, 8), None), partitioners=own).report.verification.max_steps <= 1


def test_a_mean_of_float16_whose_size_varies_is_left_to_a_kernel():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    model = Fn(lambda x: x.mean([2, 3]) * 2)
    x, varying = torch.randn(2, 16, 4, 4).half(), ({0: Dim("batch", max=512)},)
    program = to_executorch(model, (x,), dynamic_shapes=varying, verify=False)
    assert [left.op for left in program.report.leftovers if left.reason == GROWING_FLOAT16] == ["aten.mean.dim"]
    for batch in (1, 2, 512, 3, 512):
        x = torch.randn(batch, 16, 4, 4).half()
        torch.testing.assert_close(program(x), model(x), rtol=1e-2, atol=1e-3)
    assert "aten.mean.dim" in to_executorch(model, (x,)).report.partitions[0].ops
    with pytest.raises(LoweringError, match=r"averages float16.*Leave partitioners out: then a kernel runs the mean"):
        to_executorch(model, (x,), dynamic_shapes=varying, partitioners=[XnnpackPartitioner()])


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("dim", [1, 2, 3, -1])
def test_maxima_that_xnnpack_has_are_its_and_others_are_left_to_kernels(dim, keeps):
    x = torch.randn(2, 3, 4, 5)
    program = to_executorch(capture(Of(lambda _, x: (x * 2).max(dim, keeps)[0] + 1), (x,)), (x,))
    assert program.report.verification.max_steps == 0
    told = [(one.op, one.reason) for one in program.report.leftovers]
    assert told == ([] if dim in (2, 3) and keeps else [("aten.max.dim", OTHER_MAXIMUM)])


def test_results_without_a_name_in_files_are_refused_with_what_to_do():
    x = torch.randn(3, 4)
    with pytest.raises(LoweringError, match="return_types.max'>, which has no name in files: return a tuple"):
        to_executorch(capture(Of(lambda _, x: x.max(-1)), (x,)), (x,))
