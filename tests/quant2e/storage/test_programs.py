"""Programs of all kinds in files: read by torch alone and by us, with the same outputs, values and state."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
import textwrap
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.fx import Interpreter
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from quant2e import load, quantize
from tests.quant2e.annotators import DYNAMIC, NOTHING, products

ROOT = Path(__file__).parents[3]


class Counter(nn.Module):
    """State of all kinds: a counter, a ring buffer that is written by index, a buffer outside of the state dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("ring", torch.zeros(3, 4))
        self.register_buffer("gain", torch.full((4,), 2.0), persistent=False)

    def forward(self, x):
        self.calls.add_(1)
        self.ring.index_copy_(0, torch.remainder(self.calls, 3).reshape(1), self.linear(x)[:1])
        return self.ring.sum(0) * self.gain, self.calls


class Branches(nn.Module):
    """Control flow: a branch on the data, and a loop."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = torch.cond(x.sum() > 0, lambda x: self.second(x).relu(), lambda x: x - 1, (self.first(x),))
        _, x = torch.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), (torch.tensor(0), x))
        return x


class Nested(nn.Module):
    """Inputs and outputs in containers, keywords, numbers and None among them."""

    def forward(self, x, state, *, scale, options=None):
        y = F.relu(x) * scale + state["bias"][0]
        return OrderedDict(y=y, rest=[state["bias"], (x, None)], n=x.shape[0], fixed=3)


class Tied(nn.Module):
    """One weight under two names, and views of one memory."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.table.weight
        whole = torch.arange(12.0)
        self.register_buffer("low", whole[:8].view(2, 4).t())
        self.register_buffer("high", whole[4:].view(2, 4))

    def forward(self, ids):
        x = self.table(ids) @ self.low @ self.high
        return self.head(x)


class Lists(nn.Module):
    """Ops that give several results, some of them unused or used twice; a random state that is none."""

    def forward(self, x):
        a, _, c = x.split([1, 1, 2], 1)
        best, where = x.topk(2)
        mean, variance = torch.var_mean(x, 1)
        odd = x.unbind(0)[::2]
        return (
            torch.cat([a, c], 1),
            best + where,
            variance,
            torch.stack(odd),
            x[..., [0, 2]],
            F.pad(x, (1, 1), value=-0.0),
        )


class Floats(nn.Module):
    """Numbers that JSON has no words for, and constants of several dtypes."""

    def __init__(self):
        super().__init__()
        self.fixed = torch.arange(4, dtype=torch.float16)
        self.register_buffer("mask", torch.tensor([True, False, True, False]))
        self.register_buffer("turn", torch.tensor([1j, 2 + 1j, 0, 3]))
        self.register_buffer("none", torch.zeros(0, 4))

    def forward(self, x):
        y = x.masked_fill(self.mask, float("-inf")).nan_to_num(nan=float("nan"), neginf=-1e-300)
        z = torch.view_as_real(y * self.turn).bfloat16().float()
        return (
            torch.cat([y + self.fixed, self.none]).clamp(max=float("inf")),
            z.to(torch.float64),
            z.argmax(-1, keepdim=True),
        )


class Sequence(nn.Module):
    """Sizes that are computed with: two that vary, one that depends on another, a number that varies."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, y):
        b, t, d = x.shape
        half = x[:, : t // 2].reshape(b, -1)
        mask = torch.ones(t, t).tril() if t > 3 else torch.ones(t, t)
        x = x * t**0.5 + (b / 2 - math.sqrt(d))
        return self.linear(x).view(b * t, d), half.sum(1), mask @ x, y[: t - 1], torch.ones(b) * t


@torch.library.custom_op("quant2e_test_programs::shifted", mutates_args=())
def shifted(x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
    """An op that only this process knows."""
    return x + by


@shifted.register_fake
def _(x, by=1.0):
    return torch.empty_like(x)


class Own(nn.Module):
    """An op of a library, beside others."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return shifted(self.linear(x), 2.0)


class Names(nn.Module):
    """Modules under names that are no identifiers, or equal once they are spelled plainly."""

    def __init__(self):
        super().__init__()
        names = ("a b", "a_b", "a:b", "conv-1", "\N{GREEK SMALL LETTER ALPHA}", "0", "it's", "-", "__x__")
        self.parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})

    def forward(self, x):
        for part in self.parts.values():
            x = part(x)
        return x


def layers(n=3):
    return nn.Sequential(*[module for _ in range(n) for module in (nn.Linear(4, 4), nn.ReLU())])


INTEGER, INTEGER_IO = products(), products()
X = torch.linspace(-1, 1, 12).view(3, 4)
B, T = Dim("b", min=2, max=16), 2 * Dim("half", min=2, max=16)
IMAGE = torch.ones(1, 2, 5, 5).to(memory_format=torch.channels_last)
STATE = ({"bias": [torch.ones(4)]},)
CASES = {
    "layers": (layers, (X,), {}, None, products()),
    "layers of any batch": (layers, (X,), {}, ({0: B},), products(act=DYNAMIC, output=None)),
    "convolutions": (lambda: nn.Conv2d(2, 3, 2), (IMAGE,), {}, None, products()),
    "state": (Counter, (X,), {}, None, products()),
    "branches": (Branches, (X,), {}, None, products()),
    "containers": (Nested, (X, *STATE), {"scale": 2.5, "options": None}, None, NOTHING),
    "tied weights": (Tied, (torch.tensor([[1, 7, 0]]),), {}, None, products()),
    "lists": (Lists, (X,), {}, None, NOTHING),
    "numbers": (Floats, (X,), {}, None, NOTHING),
    "sequences": (Sequence, (torch.randn(2, 6, 4), torch.randn(6)), {}, ({0: B, 1: T}, {0: T}), products()),
    "integers": (layers, (X,), {}, ({0: B},), INTEGER),
    "integers in and out": (layers, (X,), {}, ({0: B},), INTEGER_IO),
    "an op of the user": (Own, (X,), {}, None, products()),
    "names": (Names, (X,), {}, None, products()),
    "one op": (nn.Identity, (X,), {}, None, NOTHING),
}  # fmt: skip


def made(name):
    build, args, kwargs, shapes, quantizer = CASES[name]
    torch.manual_seed(0)
    data = None if quantizer is NOTHING else [args]
    options = {"int8_io": quantizer is INTEGER_IO, "use_reference_representation": quantizer is INTEGER}
    options |= {"kwargs": kwargs, "dynamic_shapes": shapes, "allow_unquantized": True}
    return quantize(build().eval(), args, quantizer, data, **options)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every model, by name, with its file, and the file that comes from loading that one and saving it again."""
    folder = tmp_path_factory.mktemp("programs")

    @cache
    def of(name):
        model = made(name)
        first, second = folder / f"{name}.pt2", folder / f"{name} again.pt2"
        model.save(first)
        load(first).save(second)
        return model, first, second

    return of


def calls(name):
    """Three calls, one after the other, the second on other sizes where those vary."""
    _, args, kwargs, shapes, _ = CASES[name]
    torch.manual_seed(1)
    other = args
    if shapes is not None:
        other = (torch.randn(5, 4),)
    if name == "integers in and out":
        args, other = (torch.randint(-128, 128, (3, 4)).to(torch.int8),), (torch.randint(-9, 9, (5, 4)).to(torch.int8),)
    if name == "sequences":
        other = (torch.randn(3, 8, 4), torch.randn(8))
    return [(args, kwargs), (other, kwargs), (args, kwargs)]


def leaves(value):
    return pytree.tree_leaves(value)


def assert_same(ours, theirs):
    assert pytree.tree_structure(ours) == pytree.tree_structure(theirs)
    for one, other in zip(leaves(ours), leaves(theirs), strict=True):
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert one.stride() == other.stride()
            assert torch.equal(
                one.nan_to_num(nan=123.0) if one.is_floating_point() else one,
                other.nan_to_num(nan=123.0) if one.is_floating_point() else other,
            )
        else:
            assert one == other


@pytest.mark.parametrize("name", CASES)
def test_loaded_by_us(files, name):
    model, *paths = files(name)
    for path in paths:
        original, again = copy.deepcopy(model.module), load(path).module
        for args, kwargs in calls(name):
            assert_same(again(*args, **kwargs), original(*args, **kwargs))


def test_loaded_by_torch_alone(files, tmp_path):
    names = [name for name in CASES if name != "an op of the user"]
    given = {str(path): calls(name) for name in names for path in files(name)[1:]}
    torch.save(given, tmp_path / "calls.pt")
    code = """
        import sys, torch
        import torch.ao.quantization.fx._decomposed
        results = {}
        for path, calls in torch.load(sys.argv[1], weights_only=False).items():
            module = torch.export.load(path).module()
            results[path] = [torch.utils._pytree.tree_map(
                lambda v: v.clone() if isinstance(v, torch.Tensor) else v, module(*args, **kwargs)
            ) for args, kwargs in calls]
        assert "quant2e" not in sys.modules
        torch.save(results, sys.argv[2])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path / "calls.pt", tmp_path / "results.pt"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    for name in names:
        model, *paths = files(name)
        for path in paths:
            original = copy.deepcopy(model.module)
            for result, (args, kwargs) in zip(results[str(path)], calls(name), strict=True):
                assert_same(result, original(*args, **kwargs))


class Propagated(Interpreter):
    """Runs a program on its own fake inputs and compares every value with the one that the file states."""

    def run_node(self, n):
        value = super().run_node(n)
        if n.op == "call_function" and n.meta.get("val") is not None:
            for got, stated in zip(leaves(value), leaves(n.meta["val"]), strict=True):
                if isinstance(stated, FakeTensor):
                    assert (got.dtype, got.dim()) == (stated.dtype, stated.dim()), n.format_node()
                    assert str(got.shape) == str(stated.shape), n.format_node()
                    assert str(got.stride()) == str(stated.stride()), n.format_node()
        return value


@pytest.mark.parametrize("name", CASES)
def test_the_values_in_a_file_are_those_of_the_ops(files, name):
    program = torch.export.load(files(name)[1])
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with mode:
        Propagated(program.graph_module).run(*inputs)


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, n):
        return self.linear(x) * n


def test_a_number_that_varies_still_does_after_loading(tmp_path):
    example, shapes = (torch.randn(6, 4), 3), ({0: Dim.AUTO}, Dim.DYNAMIC)
    model = quantize(Times().eval(), example, products(act=DYNAMIC, output=None), dynamic_shapes=shapes)
    model.save(tmp_path / "times.pt2")
    again = load(tmp_path / "times.pt2")
    assert again.dynamic_shapes[1] is not None
    assert torch.equal(again(example[0], 7), model(example[0], 7))
