"""Our weight-only kernels against the formula in double: any shape, extremes, threads, other instruction sets, and
nothing read beyond the end of a tensor."""

import ctypes
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowering.inductor.kernels.weight_only import PackedWeight, load_kernel, pack
from quant2e.observers.native.build import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler, so there is no kernel of ours")

NONE = torch.empty(0)


def parts(bits, outputs, groups, size, *, points=True, narrow=True, seed=0):
    """An int8 weight, scales, zero points."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    weight = torch.randint(low, high + 1, (outputs, groups * size), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, groups, generator=generator) + 0.01
    point = torch.randint(low, high + 1, scale.shape, generator=generator).float()
    return weight, scale.bfloat16().float() if narrow else scale, point * points


def dequantized(weight, scale, point):
    """In double, as the formula says."""
    grouped = weight.double().unflatten(1, (scale.shape[1], -1))
    return ((grouped - point[..., None].double()) * scale[..., None].double()).flatten(1)


def magnitudes(weight, scale, point):
    """What is added up for a weight: its integer and its zero point."""
    return dequantized(weight.double().abs(), scale, -point.abs())


def agree(found, x, weight, bias, spread=0, added=None):
    """Within float32's rounding of what was added up. ``spread``: what a row has beside ``x`` while it is added;
    ``added``: magnitudes of the weights while they are, where their zero points are taken away at the end.
    """
    wanted = x.double() @ weight.T + (bias.double() if bias.numel() else 0)
    added = weight.abs() if added is None else added
    summed = (x.double().abs() + spread) @ added.T + (bias.abs() if bias.numel() else 0)
    assert found.dtype is torch.float32
    assert found.shape == wanted.shape
    assert bool(((found - wanted).abs() <= 2e-6 * summed + 1e-30).all())


def called(x, packed: PackedWeight, bias, outputs):
    return load_kernel()(x, packed.weight, packed.scale, packed.zero_point, bias, outputs)


def called_on_int8(x, scale, point, packed: PackedWeight, bias, outputs):
    operands = (packed.weight, packed.scale, packed.zero_point, bias, packed.totals, outputs)
    return load_kernel("int8_rows_linear")(x, scale, point, *operands)


def int8_rows(rows, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-128, 128, (*rows, inputs), dtype=torch.int8, generator=generator)
    scale = torch.rand(*rows, 1, generator=generator) + 0.001
    return x, scale, torch.randint(-128, 128, (*rows, 1), generator=generator).float()


SHAPES = st.fixed_dictionaries(
    {
        "bits": st.sampled_from((4, 8)),
        "outputs": st.integers(1, 150),
        "groups": st.integers(1, 5),
        "size": st.one_of(st.integers(1, 70), st.sampled_from((32, 64, 128, 500))),
        "points": st.booleans(),
        "narrow": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)
ROWS = st.one_of(st.integers(0, 33), st.sampled_from((64, 200)))


@given(shape=SHAPES, rows=ROWS, biased=st.booleans())
@settings(deadline=None, max_examples=200)
def test_float_rows_give_the_formula(shape, rows, biased):
    weight, scale, point = parts(**shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, weight.shape[1], generator=generator)
    bias = torch.randn(shape["outputs"], generator=generator) if biased else NONE
    found = called(x, pack(weight, scale, point, bits=shape["bits"]), bias, shape["outputs"])
    agree(found, x, dequantized(weight, scale, point), bias, added=magnitudes(weight, scale, point))


@given(shape=SHAPES, rows=ROWS, biased=st.booleans())
@settings(deadline=None, max_examples=200)
def test_int8_rows_give_the_formula(shape, rows, biased):
    weight, scale, point = parts(**{**shape, "bits": 4})
    x, x_scale, x_point = int8_rows((rows,), weight.shape[1])
    bias = torch.randn(shape["outputs"], generator=torch.Generator().manual_seed(1)) if biased else NONE
    found = called_on_int8(x, x_scale, x_point, pack(weight, scale, point, bits=4), bias, shape["outputs"])
    spread = 2 * x_point.abs() * x_scale  # zero points are taken away at the end
    parts_of_it = dequantized(weight, scale, point), bias, spread, magnitudes(weight, scale, point)
    agree(found, (x.double() - x_point) * x_scale, *parts_of_it)


@pytest.mark.parametrize("rows", [(64,), (2, 3, 64), (0, 64), (2, 0, 64), (1, 1, 1, 64)], ids=str)
def test_rows_of_any_rank(rows):
    weight, scale, point = parts(4, 5, 2, 32)
    x = torch.randn(rows)
    agree(called(x, pack(weight, scale, point, bits=4), NONE, 5), x, dequantized(weight, scale, point), NONE)


@pytest.mark.parametrize("value", [-8, 7])
@pytest.mark.parametrize("row", [-128, 127])
def test_extreme_int8_rows_are_added_exactly(value, row):
    """All products at their largest: whole numbers in int32, which float32 then holds exactly."""
    weight = torch.full((3, 4096), value, dtype=torch.int8)
    packed = pack(weight, torch.ones(3, 1), torch.zeros(3, 1), bits=4)
    x = torch.full((5, 4096), row, dtype=torch.int8)
    found = called_on_int8(x, torch.ones(5, 1), torch.zeros(5, 1), packed, NONE, 3)
    assert torch.equal(found, torch.full((5, 3), 4096.0 * value * row))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 4, 9, 100])
def test_infinite_and_missing_numbers_stay_in_their_row(bits, rows):
    weight, scale, point = parts(bits, 20, 2, 20, points=False)
    x = torch.randn(rows, 40)
    clean = called(x, packed := pack(weight, scale, point, bits=bits), NONE, 20)
    x[0, 3], x[rows - 1, 7] = math.inf, math.nan
    found = called(x, packed, NONE, 20)
    assert not found[0].isfinite().any()
    assert not found[rows - 1].isfinite().any()
    assert torch.equal(found[1 : rows - 1], clean[1 : rows - 1])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 8, 17])
def test_neither_threads_nor_other_outputs_change_a_sum(bits, rows):
    weight, scale, point = parts(bits, 1000, 8, 32)
    x, kept = torch.randn(rows, 256), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(called(x, pack(weight, scale, point, bits=bits), NONE, 1000))
            found.append(called(x, pack(weight[:77], scale[:77], point[:77], bits=bits), NONE, 77))
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(found[0], other) for other in found[::2])
    assert all(torch.equal(found[0][:, :77], other) for other in found[1::2])


def before_a_wall(value):
    """A copy that ends where memory that nobody may read begins; and the mapping, to be kept."""
    page = mmap.PAGESIZE
    room = -(-value.nbytes // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + room), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=room - value.nbytes)
    return copy.view(value.shape).copy_(value), memory


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 13])
@pytest.mark.parametrize(("outputs", "groups", "size"), [(64, 2, 32), (5, 1, 7), (70, 3, 12)])
def test_nothing_is_read_beyond_an_end(bits, rows, outputs, groups, size):
    weight, scale, point = parts(bits, outputs, groups, size)
    packed = pack(weight, scale, point, bits=bits)
    x, bias = torch.randn(rows, groups * size), torch.randn(outputs)
    given = [x, packed.weight, packed.scale, packed.zero_point, bias]
    walled = [before_a_wall(value) for value in given]
    found = load_kernel()(*(copy for copy, _ in walled), outputs)
    assert torch.equal(found, load_kernel()(*given, outputs))
    if bits == 4:
        given = [*int8_rows((rows,), groups * size), *given[1:], packed.totals]
        walled = [before_a_wall(value) for value in given]
        found = load_kernel("int8_rows_linear")(*(copy for copy, _ in walled), outputs)
        assert torch.equal(found, load_kernel("int8_rows_linear")(*given, outputs))


@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="flags of x86 compilers")
@pytest.mark.parametrize(
    "flags", ["-mno-avx512f", "-mno-avx512vnni -mno-avxvnni", "-mno-avx512f -mno-avxvnni", "-mno-avx"]
)
@pytest.mark.slow
def test_other_instruction_sets_compute_the_same(tmp_path, flags):
    """The tests of this file, with kernels that the compiler makes for a smaller machine."""
    wrapper = tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler()} "$@" {flags}\n')
    wrapper.chmod(0o755)
    env = {**os.environ, "CXX": str(wrapper), "QUANT2E_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not instruction_sets", __file__]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert list((tmp_path / "cache").glob("weight_only-*.so"))
