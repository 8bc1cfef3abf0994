"""Folding batch norm: where it is exact, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from quant2e.graph.captured.capture import capture
from quant2e.graph.edit import folded_ops
from quant2e.passes import run
from quant2e.passes.fold_batch_norm import Fold, fold, fold_batch_norm


def trained(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and parameters that matter, in evaluation mode."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.uniform_(module.bias)
    return model.eval()


class Net(nn.Module):
    """A model from a function of its layers and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def chain(mac: nn.Module, norm: nn.Module) -> nn.Module:
    return trained(Net(lambda m, x: m.norm(m.mac(x)), mac=mac, norm=norm))


def norms(gm: torch.fx.GraphModule) -> int:
    return sum("batch_norm" in str(node.target) for node in gm.graph.nodes)


IMAGE, VIDEO, SOUND = (2, 4, 7, 7), (2, 4, 5, 5, 5), (2, 4, 9)
FOLDABLE = {
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), SOUND),
    "conv2d": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), IMAGE),
    "conv2d no bias, same padding": (nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.BatchNorm2d(6), IMAGE),
    "conv2d depthwise, no affine": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False), IMAGE),
    "conv3d": (nn.Conv3d(4, 6, 3, bias=False), nn.BatchNorm3d(6), VIDEO),
    "transposed 1d, groups": (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), SOUND),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), IMAGE),
    "transposed 2d, groups, no bias": (nn.ConvTranspose2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), IMAGE),
    "transposed 3d": (nn.ConvTranspose3d(4, 6, 3), nn.BatchNorm3d(6), VIDEO),
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    "linear no bias, no affine": (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6, affine=False), (3, 4)),
}


@pytest.mark.parametrize(("mac", "norm", "shape"), FOLDABLE.values(), ids=FOLDABLE)
def test_folds_without_changing_the_result(mac, norm, shape):
    model, x = chain(copy.deepcopy(mac), copy.deepcopy(norm)), torch.randn(shape)
    before = {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    gm = capture(model, x)
    assert run(gm, (fold_batch_norm,))
    assert norms(gm) == 0
    torch.testing.assert_close(gm(x), model(x))
    assert list(gm.state_dict()) == ["mac.weight", "mac.bias"]
    assert before.keys() == model.state_dict().keys()
    assert all(
        before[n][0] == id(t) and torch.equal(before[n][1], t) for n, t in model.state_dict(keep_vars=True).items()
    )
    (mac_node,) = (n for n in gm.graph.nodes if folded_ops(n))
    assert folded_ops(mac_node) == ("batch_norm",)
    assert all("val" in n.meta for n in gm.graph.nodes if n.op == "get_attr")
    assert not run(gm, (fold_batch_norm,))


def test_the_numbers_are_those_of_torch_bit_for_bit():
    conv, norm, linear, last = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)
    gm = capture(chain(conv, norm), torch.randn(IMAGE))
    run(gm, (fold_batch_norm,))
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    assert torch.equal(gm.mac.weight, weight)
    assert torch.equal(gm.mac.bias, bias)
    gm = capture(chain(linear, last), torch.randn(2, 4))
    run(gm, (fold_batch_norm,))
    weight, bias = fuse_linear_bn_weights(
        linear.weight, None, last.running_mean, last.running_var, last.eps, last.weight, last.bias
    )
    assert torch.equal(gm.mac.weight, weight)
    assert torch.equal(gm.mac.bias, bias)


@settings(max_examples=15, deadline=None)
@given(
    dims=st.permutations([0, 1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
)
def test_a_linear_of_any_rank_folds_exactly_when_its_features_are_the_channels(dims, bias, affine, eps):
    channels = [2, 5, 6][dims[1]]
    mac, norm = nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(channels, eps=eps, affine=affine)
    model = trained(Net(lambda m, x: m.norm(m.mac(x).permute(dims)).contiguous(), mac=mac, norm=norm))
    x = torch.randn(2, 5, 4)
    gm = capture(model, x)
    assert bool(run(gm, (fold_batch_norm,))) is (dims[1] == 2)
    torch.testing.assert_close(gm(x), model(x))


def shared(body: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    return trained(Net(body, c=nn.Conv2d(4, 4, 1), a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4)))


@pytest.mark.parametrize(
    ("model", "left", "names"),
    [
        (
            shared(lambda m, x: m.b(m.c(m.a(m.c(x))))),
            0,
            ["c.bias_a", "c.bias_b", "c.weight_a", "c.weight_b"],
        ),
        (shared(lambda m, x: m.a(m.c(m.a(m.c(x))))), 0, ["c.bias", "c.weight"]),
        (
            shared(lambda m, x: m.a(m.c(x)) * m.c.weight.sum()),
            0,
            ["c.bias", "c.weight", "c.weight_a"],
        ),
        (shared(lambda m, x: m.a(m.c(x)) + m.c(x)), 0, ["c.bias", "c.bias_a", "c.weight", "c.weight_a"]),
        (shared(lambda m, x: m.b(m.a(m.c(x)))), 0, ["c.bias", "c.weight"]),
    ],
    ids=[
        "one conv, two norms",
        "both called twice",
        "weight read elsewhere",
        "conv also without norm",
        "norm of a norm",
    ],
)
def test_a_weight_with_other_uses_is_cloned(model, left, names):
    x = torch.randn(IMAGE)
    gm = capture(model, x)
    while run(gm, (fold_batch_norm,)):
        pass
    assert norms(gm) == left
    assert sorted(gm.state_dict()) == names
    torch.testing.assert_close(gm(x), model(x))


def test_tied_weights_under_two_names():
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    second.weight = first.weight
    model = trained(
        Net(lambda m, x: m.b(m.d(m.a(m.c(x)))), c=first, d=second, a=nn.BatchNorm2d(4), b=nn.BatchNorm2d(4))
    )
    x = torch.randn(IMAGE)
    gm = capture(model, x)
    run(gm, (fold_batch_norm,))
    assert norms(gm) == 0
    torch.testing.assert_close(gm(x), model(x))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), IMAGE),
        (chain(nn.Linear(4, 6), nn.BatchNorm1d(5)), (2, 5, 4)),
        (chain(nn.Linear(4, 6), nn.BatchNorm1d(6)), (2, 6, 4)),
        (chain(nn.Conv2d(4, 2, 1), nn.BatchNorm1d(6)), (4, 6, 6)),
        (shared(lambda m, x: sum(norm(y) for y in [m.c(x)] for norm in (m.a, m.b))), IMAGE),
        (shared(lambda m, x: sum(f(y) for y in [m.c(x)] for f in (m.a, torch.abs))), IMAGE),
        (shared(lambda m, x: m.a(m.c(x).relu())), IMAGE),
        (shared(lambda m, x: m.a(nn.functional.conv2d(x, x[:1, :, :1, :1].expand(4, 4, 1, 1)))), IMAGE),
        (chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).train(), IMAGE),
    ],
    ids=[
        "batch statistics",
        "features are not the channels",
        "features are not the channels, same count",
        "unbatched conv",
        "two norms on one result",
        "result read elsewhere",
        "relu between",
        "weight that is an input",
        "training",
    ],
)
def test_left_alone_where_it_would_not_be_exact(model, shape):
    gm = capture(model, torch.randn(shape))
    text = str(gm.graph)
    assert not run(gm, (fold_batch_norm,))
    assert str(gm.graph) == text


def test_an_output_is_not_rescaled():
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mac, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.mac(x)
            return y, self.norm(y)

    assert not run(capture(trained(Outputs()), torch.randn(IMAGE)), (fold_batch_norm,))


def test_statistics_that_the_graph_writes_are_not_folded():
    def body(m: Any, x: Tensor) -> Tensor:
        m.norm.running_mean.mul_(0.9)
        return m.norm(m.mac(x))

    model = trained(Net(body, mac=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(6)))
    assert not run(capture(model, torch.randn(IMAGE)), (fold_batch_norm,))


def test_a_parametrized_weight_folds_to_one_tensor():
    model = trained(
        Net(
            lambda m, x: m.norm(m.mac(x)),
            mac=nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
            norm=nn.BatchNorm2d(6),
        )
    )
    x = torch.randn(IMAGE)
    gm = capture(model, x)
    run(gm, (fold_batch_norm,))
    assert norms(gm) == 0
    assert len(gm.state_dict()) == 2
    torch.testing.assert_close(gm(x), model(x))


def test_decomposed_norms_fold_too():
    x, model = torch.randn(IMAGE), chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    gm = torch.export.export(model, (x,)).run_decompositions().module()
    assert next(str(n.target) for n in gm.graph.nodes if n.op == "call_function") == "aten.convolution.default"
    assert run(gm, (fold_batch_norm,))
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_function"] == ["aten.convolution.default"]
    torch.testing.assert_close(gm(x), model(x))


def test_says_what_moved_where():
    gm = capture(chain(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), torch.randn(IMAGE))
    assert fold(gm) == (
        Fold(
            mac="conv2d",
            norm="batch_norm",
            weight="mac.weight",
            bias="mac.bias",
            old_weight="mac_weight",
            old_bias=None,
        ),
    )


def test_a_dynamic_batch_and_gradients_stay():
    model, x = chain(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), torch.randn(IMAGE)
    gm = capture(model, x, dynamic_shapes=({0: torch.export.Dim("n")},))
    run(gm, (fold_batch_norm,))
    torch.testing.assert_close(gm(x[:1].repeat(5, 1, 1, 1)), model(x[:1].repeat(5, 1, 1, 1)))
    gm(x).sum().backward()
    assert gm.mac.weight.grad is not None
    assert model.mac.weight.grad is None
