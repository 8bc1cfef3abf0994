import logging
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lowering import to_executorch, verify
from lowering.executorch.xnnpack.limits import check_limits
from lowering.export import op_name
from quant2e.errors import LoweringError
from quant2e.graph.qdq_ops import qd
from quant2e.passes.runner import checking
from tests.lowering.graphs import Cnn, DynamicAttentionInput, Lookup, Weight, on_dynamic_grid, on_grid
from tests.pass_checks import trusting

pytest.importorskip("executorch")

F = torch.nn.functional
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def capture(module, *args, **kwargs):
    return torch.export.export(module.eval(), args, kwargs, strict=False).module()


class Fn(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


# ------------------------------------------------------------------------------------------------------- static int8


@pytest.mark.parametrize("axis", [0, None], ids=["per channel", "per tensor"])
def test_a_static_cnn_is_one_delegate_and_within_a_step(axis):
    reference = capture(Cnn(axis), IMAGE)
    held_out = [(torch.randn(2, 3, 16, 16),) for _ in range(4)]
    program = to_executorch(reference, (IMAGE,), verify_inputs=held_out)
    assert len(program.report.partitions) == 1
    assert program.report.leftovers == ()
    assert program.report.verification.batches == 5
    assert program.report.verification.max_steps <= 1
    assert verify(program, reference, held_out).max_steps <= 1


A, B, C = (0.02, 3), (0.03, -7), (0.05, 11)
MOVES = {
    "cat": lambda x, y: torch.cat([x, y], 1),
    "cat with a repeat": lambda x, y: torch.cat([x, y, x], 1),
    "max_pool2d without a stride": lambda x, y: F.max_pool2d(x, 2),
    "permute": lambda x, y: x.permute(0, 2, 3, 1),
    "view": lambda x, y: x.view(1, -1),
    "slice": lambda x, y: x[:, 1:3],
    "unsqueeze": lambda x, y: x.unsqueeze(1),
    "squeeze": lambda x, y: x.squeeze(0),
}
ARITHMETIC = {
    "add": lambda x, y: x + y,
    "add itself": lambda x, y: x + x,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "add relu": lambda x, y: F.relu(x + y),
    "relu": lambda x, y: F.relu(x),
    "relu6": lambda x, y: F.relu6(x),
    "clamp": lambda x, y: x.clamp(-0.3, 0.4),
    "mean": lambda x, y: x.mean((-1, -2)),
    "adaptive_avg_pool2d to 1": lambda x, y: F.adaptive_avg_pool2d(x, 1),
    "adaptive_avg_pool2d to 4": lambda x, y: F.adaptive_avg_pool2d(x, 4),
    "avg_pool2d": lambda x, y: F.avg_pool2d(x, 2),
    "requantize": lambda x, y: x,
    "sigmoid": lambda x, y: torch.sigmoid(x),
    "times a number": lambda x, y: x * 0.5,
}


def steps_by_name(program, reference, names, inputs):
    """Each named output against its own scale B, in steps."""
    got, expected = program(*inputs), reference(*inputs)
    return {name: round(float((g - e).abs().max()) / B[0], 4) for name, g, e in zip(names, got, expected, strict=True)}


@pytest.mark.parametrize("ops", [MOVES, ARITHMETIC], ids=["moves", "arithmetic"])
def test_between_tensors_of_different_scales(ops):
    x, y = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    fn = Fn(lambda x, y: tuple(on_grid(op(on_grid(x, A), on_grid(y, C)), B) for op in ops.values()))
    reference = capture(fn, x, y)
    program = to_executorch(reference, (x, y))
    assert len(program.report.partitions) == 1
    assert program.report.leftovers == ()
    steps = steps_by_name(program, reference, ops, (x, y))
    # moving integers is exact; arithmetic may round a tie the other way
    assert max(steps.values()) <= (0 if ops is MOVES else 1), steps


# ---------------------------------------------------------------------------------------------------------- dynamic


def test_dynamic_linears_that_share_an_input_quantize_it_once():
    x = torch.randn(4, 16)
    kinds = nn.ModuleList(
        [
            DynamicAttentionInput(0),
            DynamicAttentionInput(None),
            DynamicAttentionInput(0, qd.choose_qparams_symmetric.tensor),
        ]
    )
    fn = Fn(lambda *xs: tuple(kind(x) for kind, x in zip(kinds, xs, strict=True)))
    program = to_executorch(capture(fn, x, x + 1, x + 2), (x, x + 1, x + 2))
    (partition,) = program.report.partitions
    assert partition.ops["aten.linear.default"] == 9
    assert partition.ops["quantized_decomposed.choose_qparams_per_token_asymmetric.default"] == 3
    assert program.report.rewrites["spread_weight_scale"] == 3
    assert program.report.leftovers == ()


def test_a_dynamic_program_computes_a_scale_per_row():
    x = torch.randn(4, 16) * torch.tensor([[100.0], [1.0], [1.0], [1.0]])
    weight = Weight(torch.randn(12, 16))
    reference = capture(Fn(lambda x: F.linear(on_dynamic_grid(x), weight())), x)
    program = to_executorch(reference, (x,))
    exact = F.linear(x, weight())
    # rows of small numbers lose their digits to a large row under one scale, and keep them under a scale per row
    assert (program(x) - exact)[1:].abs().max() < 0.05 * (reference(x) - exact)[1:].abs().max()
    assert program.report.per_row.sqnr_db > 60
    assert program.report.per_row.sqnr_db > program.report.verification.sqnr_db


class Groups(nn.Module):
    """A 4-bit weight with a scale per group of columns, and a table of the same kind."""

    def __init__(self, rows, columns, size, zero_point=0):
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        self.register_buffer("stored", torch.randint(-8, 8, (rows, columns), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(rows, columns // size) * 0.01 + 0.01)
        self.register_buffer("zeros", torch.full((rows, columns // size), zero_point, dtype=torch.int8))

    def forward(self):
        args = (self.stored, self.scales, self.zeros, -8, 7, torch.int8, self.size, torch.float32)
        return qd.dequantize_per_channel_group.default(*args)


def test_4_bit_weights_in_groups_and_tables_in_groups():
    weight, table, shifted = Groups(24, 64, 32), Groups(30, 64, 16), Groups(30, 64, 16, 3)
    ids, x = torch.randint(0, 30, (2, 5)), torch.randn(2, 5, 64)

    def function(ids, x):
        return F.linear(on_dynamic_grid(x), weight()), F.embedding(ids, table()), F.embedding(ids, shifted())

    reference = capture(Fn(function), ids, x)
    program = to_executorch(reference, (ids, x))
    (partition,) = program.report.partitions
    assert partition.ops["aten.linear.default"] == 1
    assert program.report.rewrites["short_group_scales"] == 1
    # exact against the graph whose scales are bfloat16, as XNNPACK stores them
    assert program.report.per_row.sqnr_db > 80
    for got, expected in zip(program(ids, x)[1:], reference(ids, x)[1:], strict=True):
        assert torch.equal(got, expected)


# -------------------------------------------------------------------------------------------------------- embedding


def test_embedding_rows_are_bit_equal_and_the_tables_stay_int8():
    ids = torch.randint(0, 2000, (2, 7))
    tables = nn.ModuleList([Lookup(2000, 64, axis, zero) for axis in (0, 1, None) for zero in (0, 3)])
    reference = capture(Fn(lambda ids: tuple(table(ids) for table in tables)), ids)
    program = to_executorch(reference, (ids,))
    assert program.report.rewrites["gather_then_dequantize"] == 6
    assert all(torch.equal(got, expected) for got, expected in zip(program(ids), reference(ids), strict=True))
    assert 6 * 2000 * 64 < len(program.buffer) < 6 * 2000 * 64 * 1.1


def test_embedding_at_constant_positions_is_stored_as_its_rows():
    table = Weight(torch.randn(4000, 16))
    reference = capture(Fn(lambda x: x + F.embedding(torch.arange(5), table())), torch.randn(5, 16))
    program = to_executorch(reference, (torch.randn(5, 16),))
    assert len(program.buffer) < 10_000
    assert program.report.leftovers == ()


# --------------------------------------------------------------------------------------------------- float networks


class Block(nn.Module):
    """A transformer block in float, pre-trained nothing."""

    def __init__(self, causal=False):
        super().__init__()
        torch.manual_seed(0)
        self.causal = causal
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x, mask=None):
        batch, length, _ = x.shape
        parts = self.qkv(self.first(x)).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts.unbind(0), attn_mask=mask, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, 16))
        return x + self.down(F.gelu(self.up(self.second(x))))


ONES = torch.ones(1, 1, 6, 6, dtype=torch.bool)
HIDDEN_ROW = ONES.clone().index_fill(2, torch.tensor([2]), False)
MASKS = {
    "bool": ONES.tril(),
    "bool with a row that sees nothing": HIDDEN_ROW,
    "float": torch.zeros(1, 1, 6, 6).masked_fill(~ONES.tril(), -torch.inf),
    "float with a row that sees nothing": torch.zeros(1, 1, 6, 6).masked_fill(~HIDDEN_ROW, -torch.inf),
    "finite float": torch.randn(1, 2, 6, 6),
}


@pytest.mark.slow
def test_attention_with_masks():
    x, block = torch.randn(1, 6, 16), Block()
    fn = Fn(lambda x, *masks: tuple(block(x, mask) for mask in (None, *masks)))
    inputs = (x, *MASKS.values())
    reference = capture(fn, *inputs)
    program = to_executorch(reference, inputs)
    assert program.report.rewrites["plain_attention"] == 6
    for name, got, expected in zip(("none", *MASKS), program(*inputs), reference(*inputs), strict=True):
        torch.testing.assert_close(got, expected, msg=name)


def test_causal_attention_and_layer_norm_are_one_delegate():
    x = torch.randn(1, 6, 16)
    program = to_executorch(capture(Block(causal=True), x), (x,))
    assert len(program.report.partitions) == 1
    assert program.report.verification.sqnr_db > 100


def test_a_float_module_lowers_as_it_is():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval()
    program = to_executorch(model, (torch.randn(3, 8),))
    assert program.report.verification.sqnr_db > 100


# -------------------------------------------------------------------------------------------------- what is refused


COARSE, SYMMETRIC = Weight(torch.ones(2, 4)), Weight(torch.ones(2, 4))


def int32_bias(zero_point):
    bounds = -(2**31), 2**31 - 1
    return qd.dequantize_per_tensor.default(torch.ones(2, dtype=torch.int32), 0.001, zero_point, *bounds, torch.int32)


def in_groups(x, size, low, high):
    scales = torch.ones(2, 4 // size)
    stored = torch.ones(2, 4, dtype=torch.int8)
    return qd.dequantize_per_channel_group.default(
        stored, scales, torch.zeros_like(scales, dtype=torch.int8), low, high, torch.int8, size, x.dtype
    )


SHIFTED_CHANNELS, SHIFTED = Weight(torch.ones(2, 4), 0, 5), Weight(torch.ones(2, 4), None, 5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: on_grid(x, (0.1, 128), torch.uint8) + 1,
            r"quantize_per_tensor.*is uint8; XNNPACK takes int8",
        ),
        (
            lambda x: F.linear(on_grid(x, A), SHIFTED_CHANNELS()),
            r"'linear'.*zero point 5 in channel 0.*per_channel_symmetric",
        ),
        (
            lambda x: F.linear(on_grid(x, A), SHIFTED()),
            r"'linear'.*zero point 5; XNNPACK takes weights with zero point 0",
        ),
        (lambda x: on_grid(x, (0.0, 0)) + 1, r"scale 0 is not a positive, finite, normal"),
        (lambda x: on_grid(x, (1e-40, 0)) + 1, r"scale 1e-40 is not a positive, finite, normal"),
        (lambda x: on_grid(x, (float("inf"), 0)) + 1, r"scale inf is not"),
        (lambda x: on_grid(x, (0.1, 300)) + 1, r"zero point 300 is outside of \[-128, 127\]"),
        (
            lambda x: on_grid(F.relu(F.linear(on_grid(x, (1.0, 0)), COARSE())), (2e-5, 0)),
            (
                r"'linear'.*input 1 times scale of the weight 0\.0159 is 794 times the scale of the result 2e-05; "
                r"XNNPACK takes less than 256"
            ),
        ),
        (
            lambda x: F.linear(on_grid(x, A), SYMMETRIC(), int32_bias(3)),
            r"'linear'.*its bias has zero point 3; XNNPACK takes zero point 0 for int32",
        ),
        (
            lambda x: x @ in_groups(x, 2, -8, 7).t(),
            r"has groups of 2 of 4 columns; XNNPACK takes groups of a multiple of 32",
        ),
        (lambda x: x @ in_groups(x, 4, -128, 127).t(), r"has integers in \[-128, 127\] in groups.*4-bit weights only"),
    ],
)
def test_what_xnnpack_cannot_hold_is_refused_before_it_is_handed_over(function, message):
    with pytest.raises(LoweringError, match=message):
        to_executorch(capture(Fn(function), torch.randn(3, 4)), (torch.randn(3, 4),))


def test_an_axis_that_xnnpack_does_not_take_is_noted():
    weight = Weight(torch.randn(4, 4), axis=1)
    module = capture(Fn(lambda x: F.linear(on_grid(x, A), weight())), torch.randn(3, 4))
    (note,) = check_limits(module)
    assert "a scale per channel along axis 1 of its weight; XNNPACK takes axis 0" in note
    assert "quantize it with ch_axis=0" in note


def test_a_size_without_a_bound_is_refused_with_the_bound_to_give():
    with pytest.raises(LoweringError, match=r"dimension 0 of 'input' may be of any size.*Dim\(\"batch\", max=64\)"):
        to_executorch(nn.ReLU(), (torch.randn(3, 4),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def test_an_error_shows_the_users_line():
    with pytest.raises(LoweringError, match=r"test_lower\.py:\d+ `return self\.function"):
        to_executorch(capture(Fn(lambda x: on_grid(x, (0.0, 0))), torch.randn(3)), (torch.randn(3),))


def test_an_op_without_a_kernel_is_refused():
    def function(x):
        scale, zero_point = qd.choose_qparams_symmetric.tensor(x, -127, 127, 2.0**-23, torch.int8)
        return qd.quantize_per_tensor.tensor(x, scale, zero_point, -127, 127, torch.int8)

    with pytest.raises(LoweringError, match="choose_qparams_symmetric"):
        to_executorch(capture(Fn(function), torch.randn(3)), (torch.randn(3),))


def test_a_program_that_is_wrong_on_purpose_is_refused(monkeypatch):
    import lowering.executorch.lower

    reference = capture(Cnn(), IMAGE)
    monkeypatch.setattr(lowering.executorch.lower, "EXACT", (*lowering.executorch.lower.EXACT, _flip_bias))
    with checking(trusting):
        with pytest.raises(LoweringError, match=r"the ExecuTorch program does not compute .* FAILED: .* step\(s\)"):
            to_executorch(reference, (IMAGE,))
        unchecked = to_executorch(reference, (IMAGE,), verify=False)
    assert unchecked.report.verification is None
    assert not verify(unchecked, reference, [(IMAGE,)]).passed


def _flip_bias(module):
    for node in module.graph.nodes:
        if node.op == "get_attr" and "bias" in str(node.target):
            module.register_buffer("wrong", -3 - module.get_parameter(str(node.target)).detach())
            node.target = "wrong"
    return 1


def test_executorch_missing_says_what_to_install():
    code = """
import sys
sys.modules["executorch"] = None
import torch, lowering
from quant2e.errors import LoweringError
try:
    lowering.to_executorch(torch.nn.ReLU(), (torch.ones(2),))
except LoweringError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install quant2e[executorch]" in done.stdout


def test_example_inputs_are_needed():
    with pytest.raises(LoweringError, match="needs example_inputs"):
        to_executorch(nn.ReLU())


# --------------------------------------------------------------------------------------------- calling and dynamics


class Trees(nn.Module):
    def forward(self, pair, *, scale, options):
        a, b = pair
        return {"sum": (a + b) * scale, "rest": (options["c"] - a, b)}


def test_pytrees_and_keywords_in_any_order():
    pair, scale, options = (torch.randn(3), torch.randn(3)), torch.randn(3), {"c": torch.randn(3)}

    quantized = SimpleNamespace(
        module=Trees(), example_inputs=(pair,), example_kwargs={"scale": scale, "options": options}
    )
    program = to_executorch(quantized)
    got, expected = program(pair, options=options, scale=scale), Trees()(pair, scale=scale, options=options)
    assert set(got) == {"sum", "rest"}
    torch.testing.assert_close(got, expected)
    with pytest.raises(LoweringError, match=r"takes \(pair, scale, options\), missing options"):
        program(pair, scale=scale)
    with pytest.raises(LoweringError, match="not nested as at capture"):
        program(pair[0], scale=scale, options=options)


def test_dynamic_batch():
    batch = torch.export.Dim("batch", min=1, max=8)
    program = to_executorch(Cnn(), (IMAGE,), dynamic_shapes=({0: batch},), verify_inputs=[(torch.randn(5, 3, 16, 16),)])
    assert program.report.verification.max_steps <= 1
    assert len(program.report.partitions) == 1
    for size in (1, 3, 8):
        assert program(torch.randn(size, 3, 16, 16)).shape == (size, 5)
    with pytest.raises(LoweringError, match=r"a dynamic size is 9, outside of \[1, 8\]"):
        program(torch.randn(9, 3, 16, 16))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.randn(2, 4), r"dimension 1 of input 'input' is 4, and the program was compiled for 3"),
        (torch.randn(2, 3, 1), r"input 'input' has 3 dimension\(s\), and must have 2"),
        (torch.ones(2, 3, dtype=torch.int64), "input 'input' has dtype torch.int64, and must have torch.float32"),
        (1.5, "input 'input' is a float, and must be a tensor"),
    ],
)
def test_another_input_is_refused_before_it_runs(value, message):
    program = to_executorch(nn.ReLU(), (torch.randn(2, 3),), verify=False)
    with pytest.raises(LoweringError, match=message):
        program(value)


@pytest.mark.slow
def test_dynamic_batch_and_length_of_attention():
    batch, length = torch.export.Dim("batch", min=1, max=4), torch.export.Dim("length", min=2, max=12)
    x = torch.randn(2, 6, 16)
    # views with two sizes that are known at run time only do not join
    for sizes, delegates in (({0: batch}, 2), ({1: length}, 4)):
        program = to_executorch(Block(), (x,), dynamic_shapes=(sizes,))
        assert len(program.report.partitions) <= delegates
        for shape in ((4, 6, 16) if 0 in sizes else (2, 12, 16), (1, 6, 16) if 0 in sizes else (2, 3, 16)):
            y = torch.randn(shape)
            torch.testing.assert_close(program(y), Block()(y))


def test_inputs_that_are_not_contiguous():
    x = torch.randn(4, 3).t()
    program = to_executorch(nn.Softmax(-1), (x.contiguous(),))
    torch.testing.assert_close(program(x), x.softmax(-1))


# ------------------------------------------------------------------------------------------------ files and manners


def test_save_is_whole_or_not_at_all(tmp_path, monkeypatch):
    program = to_executorch(nn.ReLU(), (torch.randn(3),))
    path = tmp_path / "model.pte"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            program.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pte"]
    assert path.read_bytes() == b"old"
    program.save(path)
    assert path.read_bytes() == program.buffer
    assert [p.name for p in tmp_path.iterdir()] == ["model.pte"]


def test_the_callers_model_and_process_are_left_alone():
    reference = capture(Cnn(), IMAGE)
    code, tensors = reference.code, {k: v.clone() for k, v in reference.state_dict().items()}
    state = (torch.is_grad_enabled(), list(logging.getLogger().handlers), list(warnings.filters), dict(os.environ))
    rng = torch.get_rng_state()
    to_executorch(reference, (IMAGE,))
    assert reference.code == code
    assert all(torch.equal(v, tensors[k]) for k, v in reference.state_dict().items())
    assert state == (
        torch.is_grad_enabled(),
        list(logging.getLogger().handlers),
        list(warnings.filters),
        dict(os.environ),
    )
    assert torch.equal(rng, torch.get_rng_state())


def test_the_report_says_what_is_left_and_why():
    x = torch.randn(2, 3, 8, 8)
    program = to_executorch(Fn(lambda x: torch.cumsum(F.relu(x), 1).mean([2, 3])), (x,))
    left = {leftover.op: leftover.reason for leftover in program.report.leftovers}
    assert left["aten.cumsum.default"] == "no partitioner has a rule for this op"
    text = str(program.report)
    assert "left: 1 × aten.cumsum.default" in text
    assert "rewritten: 1 × keep_mean_dims" in text


def test_a_narrower_range_is_noted():
    def function(x):
        q = qd.quantize_per_tensor.default(x, 0.1, 0, 0, 127, torch.int8)
        return qd.dequantize_per_tensor.default(q, 0.1, 0, 0, 127, torch.int8)

    program = to_executorch(capture(Fn(function), torch.rand(3)), (torch.rand(3),))
    (note,) = program.report.notes
    assert "is limited to [0, 127] in the graph; XNNPACK limits it to [-128, 127]" in note
    assert note in str(program.report)


def test_partitioners_may_be_none_at_all():
    x = torch.randn(2, 4)
    weight = Weight(torch.randn(3, 4))
    program = to_executorch(capture(Fn(lambda x: F.linear(on_grid(x, A), weight())), x), (x,), partitioners=[])
    assert program.report.partitions == ()
    assert program.report.verification.sqnr_db > 100


def test_another_backend_sees_the_ops_whole():
    """What XNNPACK has no kernel for is taken apart for XNNPACK only."""
    from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
    from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult

    seen = []

    class Norms(BackendDetails):
        @staticmethod
        def preprocess(program, _):
            seen.extend(op_name(node) for node in program.graph.nodes if node.op == "call_function")
            return PreprocessResult(processed_bytes=b"blob")

    class TakesNorms(Partitioner):
        delegation_spec = DelegationSpec(Norms.__name__, [])

        def ops_to_not_decompose(self, _):
            return [torch.ops.aten.layer_norm.default], None

        def partition(self, exported_program):
            for node in exported_program.graph.nodes:
                if "layer_norm" in str(node.target):
                    node.meta["delegation_tag"] = "norm"
            return PartitionResult(exported_program, {"norm": self.delegation_spec})

    x = torch.randn(2, 4, 8)
    graph = capture(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(approximate="tanh")), x)
    program = to_executorch(graph, (x,), partitioners=[TakesNorms()], verify=False)
    assert [partition.backend for partition in program.report.partitions] == ["Norms"]
    assert seen == ["aten.layer_norm.default"]
    assert program.report.rewrites == {}


def test_a_partitioner_of_xnnpack_gets_the_legal_form_whoever_made_it():
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    x = torch.randn(2, 4, 8)
    graph = capture(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), x)
    program = to_executorch(graph, (x,), partitioners=[XnnpackPartitioner()])
    assert program.report.rewrites == to_executorch(graph, (x,)).report.rewrites
    assert program.report.rewrites["decompose_normalizations"] == 1


def test_a_backend_that_the_runtime_lacks_is_named():
    from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
    from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult

    class NotInThisRuntime(BackendDetails):
        @staticmethod
        def preprocess(*_):
            return PreprocessResult(processed_bytes=b"blob")

    class TakesAll(Partitioner):
        def partition(self, exported_program):
            for node in exported_program.graph.nodes:
                if node.op == "call_function":
                    node.meta["delegation_tag"] = "all"
            tags = {"all": DelegationSpec(NotInThisRuntime.__name__, [])}
            return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)

    x = torch.randn(2, 4)
    graph = capture(nn.ReLU(), x)
    with pytest.raises(LoweringError, match=r"needs NotInThisRuntime, which the ExecuTorch runtime .* verify=False"):
        to_executorch(graph, (x,), partitioners=[TakesAll()])
    program = to_executorch(graph, (x,), partitioners=[TakesAll()], verify=False)
    assert [partition.backend for partition in program.report.partitions] == ["NotInThisRuntime"]
    with pytest.raises(LoweringError, match="cannot load the method 'forward'"):
        program(x)
