"""Sums, products, clamps, joins and tables against the slow model: no difference, in any arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quant2e import integer_report, to_integer
from tests.quant2e.integer import reference
from tests.quant2e.integer.graphs import CASES, Draw, Tally, Writer, assert_integer, aten, run_integer


def shapes(draw):
    full = [draw.int(1, 3), draw.int(1, 3), draw.int(1, 5)]
    return full, draw.pick(full, full[1:], [1, *full[1:]], [1])


def centred(x, grid):
    return x.numpy().astype(np.int64) - grid.zero_point


@pytest.mark.parametrize("form", ["add", "sub", "add on s16", "conv + add"])
def test_sum(form):
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed, (torch.int16,) if "s16" in form else (torch.int8, torch.uint8))
        a, b, grid = draw.grid(), draw.grid(), draw.grid()
        left, right = shapes(draw)
        x, y = draw.integers(left, a), draw.integers(right, b)
        writer = Writer()
        dx, dy = writer.input(x, a), writer.input(y, b)
        spans = [max(g.high - g.zero_point, g.zero_point - g.low) for g in (a, b)]
        scales = [a.scale, b.scale]
        steps = centred(x, a)
        if form == "conv + add":  # an accumulator is one of the terms
            w_scale = draw.scale(2**-8, 2**-6)
            w = draw.weight([left[-1], left[-1]])
            dx = writer.op(aten.linear.default, dx, writer.weight(w, w_scale, None))
            steps = steps @ w.numpy().astype(np.int64).T
            spans[0] *= int(w.to(torch.int64).abs().sum(1).max())
            scales[0] = a.scale * w_scale
        sign = -1 if form == "sub" else 1
        node = writer.op(aten.sub.Tensor if form == "sub" else aten.add.Tensor, dx, dy)
        relu = draw.flag()
        found = run_integer(writer, [writer.q(writer.op(aten.relu.default, node) if relu else node, grid)], draw.mode)
        narrow = form in ("add", "sub")
        u, v = np.broadcast_arrays(steps, centred(y, b))
        expected = np.array(
            [
                reference.add([int(i), int(j)], scales, [1, sign], spans, grid, draw.mode, narrow=narrow)
                for i, j in zip(u.flatten(), v.flatten(), strict=True)
            ]
        ).reshape(u.shape)
        expected = np.maximum(expected, grid.quantize(0.0)) if relu else expected
        np.testing.assert_array_equal(found[0], expected, err_msg=f"seed {seed}")
        tally.add(writer, found, draw.mode)
    tally.check()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
def test_mul(dtype):
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed, (torch.int8, torch.uint8) if dtype is torch.int8 else (dtype,))
        a, b = draw.grid(), draw.grid()
        grid = draw.grid(None if dtype is torch.int8 else draw.scale(2**-3, 2**3))
        left, right = shapes(draw)
        x, y = draw.integers(left, a), draw.integers(right, b)
        writer = Writer()
        node = writer.op(aten.mul.Tensor, writer.input(x, a), writer.input(y, b))
        found = run_integer(writer, [writer.q(node, grid)], draw.mode)
        acc = centred(x, a) * centred(y, b)
        expected = reference.each(acc, lambda v: reference.requantize(v, (a.scale, b.scale), grid, draw.mode))
        np.testing.assert_array_equal(found[0], expected, err_msg=f"seed {seed}")
        tally.add(writer, found, draw.mode)
    tally.check()


def test_cat_brings_every_operand_to_the_scale_of_the_result():
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed)
        grid, dim = draw.grid(), draw.int(-1, 1)
        grids = [draw.pick(grid, draw.grid()) for _ in range(draw.int(2, 3))]
        for g in grids:
            g.dtype, g.low, g.high = grid.dtype, grid.low, grid.high
            g.zero_point = min(max(g.zero_point, g.low), g.high)
        shape = [2, 3]
        xs = []
        for g in grids:
            shape[dim] = draw.int(1, 4)
            xs.append(draw.integers(shape, g))
        writer = Writer()
        node = writer.op(aten.cat.default, [writer.input(x, g) for x, g in zip(xs, grids, strict=True)], dim)
        found = run_integer(writer, [writer.q(node, grid)], draw.mode)
        parts = [
            x.numpy().astype(np.int64)
            if g is grid
            else reference.each(centred(x, g), lambda v, g=g: reference.requantize(v, (g.scale,), grid, draw.mode))
            for x, g in zip(xs, grids, strict=True)
        ]
        np.testing.assert_array_equal(found[0], np.concatenate(parts, dim), err_msg=f"seed {seed}")
        tally.add(writer, found, draw.mode)
    tally.check()


def image(w, x):
    """[2, 3, 4] as [1, 2, 3, 4]."""
    return w.op(aten.unsqueeze.default, x, 0)


def volume(w, x):
    """[2, 3, 4] as [1, 2, 1, 3, 4]."""
    return w.op(aten.unsqueeze.default, image(w, x), 2)


MOVES = {
    "view": lambda w, x: w.op(aten.view.default, x, [4, 6]),
    "reshape": lambda w, x: w.op(aten.reshape.default, x, [-1]),
    "flatten": lambda w, x: w.op(aten.flatten.using_ints, x, 1),
    "permute": lambda w, x: w.op(aten.permute.default, x, [2, 0, 1]),
    "transpose": lambda w, x: w.op(aten.transpose.int, x, 0, 2),
    "slice": lambda w, x: w.op(aten.slice.Tensor, x, 1, 1, 3),
    "select": lambda w, x: w.op(aten.select.int, x, 2, 1),
    "squeeze": lambda w, x: w.op(aten.squeeze.dim, x, 0),
    "unsqueeze": lambda w, x: w.op(aten.unsqueeze.default, x, 1),
    "expand": lambda w, x: w.op(aten.expand.default, w.op(aten.unsqueeze.default, x, 0), [2, 2, 3, 4]),
    "flip": lambda w, x: w.op(aten.flip.default, x, [1]),
    "roll": lambda w, x: w.op(aten.roll.default, x, [1], [2]),
    "repeat": lambda w, x: w.op(aten.repeat.default, x, [1, 2, 1]),
    "dropout": lambda w, x: w.op(aten.dropout.default, x, 0.5, False),
    "contiguous": lambda w, x: w.op(aten.contiguous.default, x),
    "clone": lambda w, x: w.op(aten.clone.default, x),
    "pad": lambda w, x: w.op(aten.constant_pad_nd.default, x, [1, 0, 2, 1], 0.0),
    "chunk": lambda w, x: w.pick(w.op(aten.chunk.default, x, 2, 2), 1),
    "split": lambda w, x: w.pick(w.op(aten.split.Tensor, x, 2, 1), 1),
    "split_with_sizes": lambda w, x: w.pick(w.op(aten.split_with_sizes.default, x, [1, 3], 2), 1),
    "unbind": lambda w, x: w.pick(w.op(aten.unbind.int, x, 1), 2),
    # all that the table of moving ops says of integers, not only the ops that somebody met
    "swapaxes": lambda w, x: w.op(aten.swapaxes.default, x, 0, 1),
    "moveaxis": lambda w, x: w.op(aten.moveaxis.int, x, 0, 2),
    "adjoint": lambda w, x: w.op(aten.adjoint.default, x),
    "transpose_copy": lambda w, x: w.op(aten.transpose_copy.int, x, 0, 1),
    "ravel": lambda w, x: w.op(aten.ravel.default, x),
    "view_as": lambda w, x: w.op(aten.view_as.default, x, w.op(aten.view.default, x, [4, 6])),
    "fliplr": lambda w, x: w.op(aten.fliplr.default, x),
    "narrow_copy": lambda w, x: w.op(aten.narrow_copy.default, x, 2, 1, 2),
    "index": lambda w, x: w.op(aten.index.Tensor, x, [None, w.constant(torch.tensor([2, 0]))]),
    "gather": lambda w, x: w.op(aten.gather.default, x, 2, w.constant(torch.tensor([[[3, 0]]]))),
    "take": lambda w, x: w.op(aten.take.default, x, w.constant(torch.tensor([5, 23]))),
    "reflection_pad1d": lambda w, x: w.op(aten.reflection_pad1d.default, x, [1, 2]),
    "replication_pad1d": lambda w, x: w.op(aten.replication_pad1d.default, x, [1, 2]),
    "index_select": lambda w, x: w.op(aten.index_select.default, x, 1, w.constant(torch.tensor([2, 2, 0]))),
    "index twice": lambda w, x: w.op(
        aten.index.Tensor, x, [w.constant(torch.tensor([1, 0])), None, w.constant(torch.tensor([3, 3]))]
    ),
    "pad, reflect": lambda w, x: w.op(aten.pad.default, x, [2, 1], "reflect"),
    "pad, replicate": lambda w, x: w.op(aten.pad.default, x, [2, 1], "replicate"),
    "pad, circular": lambda w, x: w.op(aten.pad.default, x, [2, 1], "circular"),
    "pad, two axes": lambda w, x: w.op(aten.pad.default, image(w, x), [1, 2, 1, 0], "reflect"),
    "pad, three axes": lambda w, x: w.op(aten.pad.default, volume(w, x), [1, 2, 1, 0, 0, 1], "replicate"),
    "tril": lambda w, x: w.op(aten.tril.default, x),
    "triu": lambda w, x: w.op(aten.triu.default, x, 1),
    "diag_embed": lambda w, x: w.op(aten.diag_embed.default, x),
    "diagflat": lambda w, x: w.op(aten.diagflat.default, w.op(aten.select.int, x, 0, 1)),
    "im2col": lambda w, x: w.op(aten.im2col.default, image(w, x), [2, 2], [1, 2], [0, 1], [1, 1]),
    "im2col without a batch": lambda w, x: w.op(aten.im2col.default, x, [2, 3], [1, 1], [1, 1], [2, 1]),
    "upsample, by a factor": lambda w, x: w.op(aten.upsample_nearest1d.vec, x, None, [1.7]),
    "upsample, to a size": lambda w, x: w.op(aten.upsample_nearest1d.default, x, [7]),
    "upsample an image": lambda w, x: w.op(aten.upsample_nearest2d.vec, image(w, x), None, [2.0, 3.0]),
    "upsample an image to a size": lambda w, x: w.op(aten.upsample_nearest2d.default, image(w, x), [5, 7], 1.8, None),
    "upsample a volume": lambda w, x: w.op(aten.upsample_nearest3d.vec, volume(w, x), [2, 5, 7], None),
    "upsample, exact": lambda w, x: w.op(aten._upsample_nearest_exact2d.vec, image(w, x), None, [1.5, 2.5]),
    "feature_alpha_dropout": lambda w, x: w.op(aten.feature_alpha_dropout.default, x, 0.5, False),
    "type_as": lambda w, x: w.op(aten.type_as.default, x, x),
    "hsplit": lambda w, x: w.pick(w.op(aten.hsplit.int, x, 3), 1),
    "concatenate": lambda w, x: w.op(aten.concatenate.default, [x, x], 1),
}


AMONG_ZEROS = {"pad", "tril", "triu", "diag_embed", "diagflat", "im2col", "im2col without a batch"}


def test_moves_are_made_by_integers():
    """All of them in one graph for each case, so that the slow model requantizes their operand once."""
    for seed in range(CASES // 4):
        draw = Draw(seed)
        a = draw.grid()
        grid = draw.pick(a, draw.grid(dtype=a.dtype))
        x = draw.integers([2, 3, 4], a)
        writer = Writer()
        dq = writer.input(x, a)
        found = run_integer(writer, [writer.q(move(writer, dq), grid) for move in MOVES.values()], draw.mode)
        same = (
            x
            if grid is a
            else torch.from_numpy(
                reference.each(centred(x, a), lambda v: reference.requantize(v, (a.scale,), grid, draw.mode))
            )
        )
        moved = Writer()
        for (name, move), out in zip(MOVES.items(), found, strict=True):
            shift = grid.zero_point if name in AMONG_ZEROS else 0  # a zero is a zero point
            expected = move(moved, moved.plain((same.long() - shift).double())).meta["val"].long().numpy() + shift
            np.testing.assert_array_equal(out, expected, err_msg=f"{name}, seed {seed}")


FUNCTIONS = {
    "sigmoid": (aten.sigmoid.default, ()),
    "tanh": (aten.tanh.default, ()),
    "hardswish": (aten.hardswish.default, ()),
    "hardsigmoid": (aten.hardsigmoid.default, ()),
    "gelu": (aten.gelu.default, ()),
    "silu": (aten.silu.default, ()),
    "exp": (aten.exp.default, ()),
    "elu": (aten.elu.default, ()),
    "leaky_relu": (aten.leaky_relu.default, (0.1,)),
    "add a number": (aten.add.Tensor, (1.5,)),
    "mul by a number": (aten.mul.Tensor, (-0.7,)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_tables(name):
    target, more = FUNCTIONS[name]
    for seed in range(CASES):
        draw = Draw(seed, (torch.int8, torch.uint8, torch.int8, torch.uint8, torch.int16))
        a = draw.grid(draw.scale(2**-6, 2**-4) if draw.dtype is not torch.int16 else 2.0**-12)
        grid = draw.grid()
        x = draw.integers([3, 5], a)
        writer = Writer()
        found = run_integer(writer, [writer.q(writer.op(target, writer.input(x, a), *more), grid)], draw.mode)
        real = (x.to(torch.float32) - a.zero_point) * a.scale
        values = torch.stack([target(v.reshape(1), *more) for v in real.flatten()]).reshape(real.shape)
        np.testing.assert_array_equal(found[0], reference_quantize(values, grid), err_msg=f"seed {seed}")


def reference_quantize(values, grid):
    flat = [grid.quantize(v) for v in values.flatten().tolist()]
    return np.array(flat).reshape(values.shape)


def test_a_chain_of_functions_is_one_table():
    draw = Draw(0)
    a, grid = draw.grid(0.05), draw.grid(0.01)
    writer = Writer()
    x = writer.input(draw.integers([8], a), a)
    y = writer.op(aten.tanh.default, writer.op(aten.mul.Tensor, writer.op(aten.sigmoid.default, x), 3.0))
    gm = to_integer(writer.finish(writer.q(y, grid)), strict=True)
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_function"] == [
        "aten._to_copy.default",
        "aten.sub.Tensor",
        "aten.index.Tensor",
    ]
    assert integer_report(gm).of("sigmoid_default").reason == "table of 256 entries"


SUMMED = {
    "gelu": (aten.gelu.default, (), lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
    "gelu by tanh": (aten.gelu.default, {"approximate": "tanh"},
        lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "silu": (aten.silu.default, (), lambda x: x / (1 + math.exp(-x)) if x > -700 else -0.0),
    "tanh": (aten.tanh.default, (), math.tanh),
    "sigmoid": (aten.sigmoid.default, (), lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0),
    "hardswish": (aten.hardswish.default, (), lambda x: x * min(max(x + 3, 0), 6) / 6),
    "hardsigmoid": (aten.hardsigmoid.default, (), lambda x: min(max(x + 3, 0), 6) / 6),
    "leaky_relu": (aten.leaky_relu.default, (0.1,), lambda x: x if x > 0 else 0.1 * x),
    "elu": (aten.elu.default, (), lambda x: x if x > 0 else math.expm1(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMMED)
def test_functions_of_a_sum_are_thresholds_on_a_fine_grid(name):
    target, more, function = SUMMED[name]
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed)
        a, grid = draw.grid(), draw.grid()
        k, n = draw.int(1, 12), draw.int(1, 4)
        x, w = draw.integers([3, k], a), draw.weight([n, k])
        per_channel = draw.flag()
        scales = [float(s) for s in draw.scales(n)] if per_channel else [draw.scale(2**-9, 2**-6)] * n
        bias = torch.from_numpy(draw.rng.integers(-300, 300, n) * np.array(scales) * a.scale).to(torch.float32)
        writer = Writer()
        weight = writer.weight(w, torch.tensor(scales) if per_channel else scales[0], 0 if per_channel else None)
        y = writer.op(aten.linear.default, writer.input(x, a), weight, writer.constant(bias))
        y = writer.op(target, y, *more) if isinstance(more, tuple) else writer.op(target, y, **more)
        gm = to_integer(writer.finish(writer.q(y, grid)), requantization=draw.mode, strict=True)
        assert_integer(gm, draw.mode)
        found = [out.numpy().astype(np.int64) for out in gm(*writer.inputs)]
        (linear, steps) = integer_report(gm).records
        fine = linear.attributes["out_scale"]
        assert (steps.kind, fine) == ("thresholds", steps.attributes["in_scale"])
        assert np.log2(fine / (a.scale * max(scales))) % 1 == 0  # the accumulator's scale times a power of two
        acc = centred(x, a) @ w.numpy().astype(np.int64).T + np.rint(
            bias.numpy() / (np.array(scales) * a.scale)
        ).astype(np.int64)
        wide = reference.Grid(fine, 0, -(2**22), 2**22)
        for at in np.ndindex(*acc.shape):
            t = reference.requantize(acc[at], (a.scale, scales[at[1]]), wide, draw.mode)
            assert found[0][at] == grid.saturate(round(function(t * fine) / grid.scale)), f"seed {seed} at {at}"
        tally.add(writer, found, "any")
    tally.check()


def test_functions_without_end_stay_in_float_on_a_sum_and_are_listed():
    draw = Draw(0)
    a, grid = draw.grid(0.05), draw.grid(0.01)
    writer = Writer()
    x = writer.input(draw.integers([2, 3], a), a)
    y = writer.op(aten.sin.default, writer.op(aten.linear.default, x, writer.weight(draw.weight([4, 3]), 0.01, None)))
    gm = to_integer(writer.finish(writer.q(y, grid)))
    found = {v.name: (v.integer, v.reason) for v in integer_report(gm).verdicts}
    assert found == {
        "linear_default": (True, "linear, read in float"),
        "sin_default": (False, "its operand 'linear_default' is a sum of integers, and it turns there without end"),
    }
    gap = (gm(*writer.inputs)[0].int() - writer.results[0].int()).abs().max()
    assert gap <= 1


@pytest.mark.parametrize("summed", [False, True], ids=["of 8 bits", "of a sum"])
def test_a_function_written_with_several_ops_is_one(summed):
    """silu as ``x * sigmoid(x)``, hardswish as ``x * relu6(x + 3) / 6``."""
    for seed in range(8):
        draw = Draw(seed)
        a, grid = draw.grid(draw.scale(2**-6, 2**-4)), draw.grid()
        x = draw.integers([4, 6], a)
        found = []
        for spelled in ("one", "several"):
            writer = Writer()
            y = writer.input(x, a)
            if summed:
                w = Draw(seed).weight([5, 6])
                y = writer.op(aten.linear.default, y, writer.weight(w, 2.0**-7, None))
            if seed % 2 and spelled == "one":
                y = writer.op(aten.silu.default, y)
            elif seed % 2:
                y = writer.op(aten.mul.Tensor, y, writer.op(aten.sigmoid.default, y))
            elif spelled == "one":
                y = writer.op(aten.hardswish.default, y)
            else:
                inner = writer.op(aten.relu6.default, writer.op(aten.add.Tensor, y, 3))
                y = writer.op(aten.div.Tensor, writer.op(aten.mul.Tensor, y, inner), 6)
            found.append(run_integer(writer, [writer.q(y, grid)], draw.mode)[0])
        np.testing.assert_array_equal(*found)


def test_softmax_is_a_table_and_an_integer_division():
    tally = Tally()
    for seed in range(CASES):
        draw = Draw(seed)
        a = draw.grid(draw.scale(2**-6, 2**-3))
        grid = draw.grid(draw.pick(2.0**-8, draw.scale(2**-9, 2**-7)))
        x = draw.integers([3, draw.int(1, 12)], a)
        dim = draw.pick(-1, 1, 0)
        writer = Writer()
        found = run_integer(writer, [writer.q(writer.op(aten.softmax.int, writer.input(x, a), dim), grid)], draw.mode)
        expected = np.apply_along_axis(lambda row: softmax_row(row, a, grid), dim, x.numpy().astype(np.int64))
        np.testing.assert_array_equal(found[0], expected, err_msg=f"seed {seed}")
        tally.add(writer, found, draw.mode)
    tally.check()


def softmax_row(row, a, grid):
    exponent = int(np.frexp(1 / grid.scale)[1])
    shift = 24 - exponent
    multiplier = round(2.0**shift / grid.scale)
    terms = [round(float(np.exp(-np.float64(row.max() - v) * a.scale)) * 2**23) for v in row]
    total = sum(terms) << shift
    return np.array([grid.saturate((2 * t * multiplier + total) // (2 * total)) for t in terms])


CLAMPS = {
    "relu": (aten.relu.default, aten.relu_.default, ()),
    "relu6": (aten.relu6.default, aten.relu6_.default, ()),
    "hardtanh": (aten.hardtanh.default, aten.hardtanh_.default, (-0.4, 0.9)),
    "clamp": (aten.clamp.default, aten.clamp_.default, (-0.2, None)),
    "clamp_min": (aten.clamp_min.default, aten.clamp_min_.default, (0.1,)),
    "clamp_max": (aten.clamp_max.default, aten.clamp_max_.default, (0.3,)),
    "hardswish": (aten.hardswish.default, aten.hardswish_.default, ()),
    "silu": (aten.silu.default, aten.silu_.default, ()),
    "leaky_relu": (aten.leaky_relu.default, aten.leaky_relu_.default, (0.2,)),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_the_spelling_in_place_is_the_same_op(name):
    """Also for a reader of the written tensor itself, who comes later."""
    functional, in_place, more = CLAMPS[name]
    for seed in range(4):
        found = []
        for target in (functional, in_place):
            draw = Draw(seed)
            a, grid = draw.grid(), draw.grid()
            x, w = draw.integers([3, 4], a), draw.weight([5, 4])
            writer = Writer()
            y = writer.op(aten.linear.default, writer.input(x, a), writer.weight(w, 2.0**-7, None))
            written = writer.op(target, y, *more)
            read = y if target is in_place else written
            results = [writer.q(written, grid), writer.q(read, grid)]
            found.append(run_integer(writer, results, draw.mode))
        np.testing.assert_array_equal(found[0], found[1])


def test_a_write_that_others_see_is_left_alone():
    draw = Draw(0)
    a = draw.grid(0.05)
    writer = Writer()
    x = writer.input(draw.integers([2, 3], a), a)
    y = writer.op(aten.linear.default, x, writer.weight(draw.weight([4, 3]), 0.01, None))
    view = writer.op(aten.view.default, y, [4, 2])
    written = writer.op(aten.relu_.default, y)
    gm = to_integer(writer.finish(writer.q(view, a), writer.q(written, a)))
    assert integer_report(gm).of("linear_default").reason == "an op writes to its result in place"
    for ours, theirs in zip(gm(*writer.inputs), writer.results, strict=True):
        assert (ours.int() - theirs.int()).abs().max() <= 1
        assert int(ours.min()) >= a.zero_point
