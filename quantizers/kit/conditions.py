"""Match conditions that the rules of several backends share. Most answer True, or the reason why not."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from quant2e.annotation.pattern import Match
from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.dataflow import literal, operand
from quant2e.graph.fake_values import node_tensor


def value(node: Node) -> Tensor:
    """The (fake) tensor of a node."""
    tensor = node.meta.get("val")
    assert isinstance(tensor, Tensor), f"'{node.name}' produces {tensor!r}"
    return tensor


def reads_integers(user: Node, node: Node) -> bool:
    """Whether an op, as it is annotated, reads a node as integers whose scale is known before it runs."""
    spec = getattr(user.meta.get(ANNOTATION), "input_qspec_map", {}).get(node)
    return spec is not None and not getattr(spec, "is_dynamic", False)


def unscaled(node: Node) -> bool | str:
    """An add or sub whose ``alpha`` is 1."""
    alpha = operand(node, "alpha")
    return True if alpha in (None, 1) else f"alpha is {alpha}, not 1"


def in_eval_mode(node: Node) -> bool | str:
    """A dropout that does nothing."""
    return True if operand(node, "train") is False else "it drops values, in training mode"


def same_dtype(node: Node) -> bool | str:
    """A conversion that changes layout or device, not the dtype."""
    before, after = node_tensor(operand(node, 0)), node_tensor(node)
    same = before is not None and after is not None and before.dtype == after.dtype
    return True if same else "it changes the dtype"


def zero_padding(node: Node) -> bool | str:
    """A padding with zeros, which every affine range holds exactly."""
    if operand(node, "mode") not in (None, "constant"):
        return "it does not pad with a constant"
    return True if operand(node, "value") in (None, 0, 0.0) else "it pads with something else than zero"


def moving_padding(node: Node) -> bool | str:
    """A padding with zeros, or with values that the tensor has."""
    return True if operand(node, "mode") in ("reflect", "replicate", "circular") else zero_padding(node)


def not_transposed(node: Node) -> bool | str:
    """``aten.convolution`` without ``transposed``."""
    return True if operand(node, "transposed") is False else "it is a transposed convolution"


def spatial(node: Node) -> int:
    """Spatial dimensions of a convolution: 2 for ``conv2d``."""
    named = next((n for n in (1, 2, 3) if f"{n}d" in str(node.target)), None)
    return named or len(literal(node, "padding") or ())


def batched(node: Node) -> bool | str:
    """A convolution over a batch of inputs; torch takes a single one as well."""
    before = node_tensor(operand(node, 0))
    if before is None or before.dim() == spatial(node) + 2:
        return True
    return "its input has no batch dimension"


def same_shape(match: Match, left: Node, right: Node) -> bool | str:
    """Two operands that are added without broadcasting."""
    if value(left).shape == value(right).shape:
        return True
    return f"'{left.name}' and '{right.name}' have different shapes at '{match.root.name}'"
