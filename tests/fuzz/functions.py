"""Functions that programs of the fuzzer call beside ops: branches, loops, state, and blocks that models are made of.

Where torch.export traces, a branch is an op with bodies; where it does not, it is Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._higher_order_ops import scan, while_loop
from torch.nn import functional as F


def branch(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    """One of two linear layers, as the data says."""

    def taken(x: Tensor) -> Tensor:
        return F.linear(x, first, bias).relu()

    def other(x: Tensor) -> Tensor:
        return F.linear(x, second) - 1.0

    if torch.compiler.is_exporting():
        return torch.cond(x.sum() > 0, taken, other, (x,))
    return taken(x) if x.is_meta or bool(x.sum() > 0) else other(x)


def loop(x: Tensor, weight: Tensor) -> Tensor:
    """Three times the same layer."""

    def again(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, F.linear(x, weight).tanh()

    if torch.compiler.is_exporting():
        return while_loop(lambda i, x: i < 3, again, (torch.tensor(0), x))[1]
    for _ in range(3):
        x = F.linear(x, weight).tanh()
    return x


def recurrence(x: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
    """A recurrent layer over the first axis."""

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(F.linear(x, outer) + F.linear(h, inner))
        return h, h.clone()

    h = x.new_zeros(x.shape[1:-1] + inner.shape[:1])
    if torch.compiler.is_exporting():
        return scan(step, h, x)[1]
    states = []
    for row in x:
        h, kept = step(h, row)
        states.append(kept)
    return torch.stack(states)


def remember(x: Tensor, state: Tensor) -> Tensor:
    """A running mean of all calls, added."""
    state.mul_(0.5).add_(x.detach())
    return x + state


def count(x: Tensor, state: Tensor) -> Tensor:
    """How many calls there were, as a factor."""
    state.add_(1)
    return x / (1 + state)


def batch_norm(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """In eval mode."""
    return F.batch_norm(x, mean, variance, scale, bias, eps=1e-2)


def attention(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of a tensor to itself; ``mask`` is True where it looks."""
    q, k, v = (F.linear(x, w) for w in (wq, wk, wv))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (branch, loop, recurrence, remember, count, batch_norm, attention)
}
"""By name."""
