"""OpenVINOQuantizer: what OpenVINO computes with its int8 kernels on CPUs.

Its kernels are those of x86 (u8 activations, s8 weights per output channel), and one more: the product of queries and
keys in attention, on s8 with one scale each, inside of the kernel that computes the softmax and the values as well.
One op reads integers and computes in float, the product of an image and one factor per channel (squeeze and
excitation): were it to read floats, the convolution that makes the image would write floats, for all of its readers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.fx import Node

from quant2e.annotation.pattern import Match, op, roots, short_name
from quant2e.annotation.specs import group_size_of
from quant2e.graph.data_movement import Effect, When, movement
from quantizers.kit import families as f
from quantizers.kit.conditions import in_eval_mode, reads_integers, value
from quantizers.kit.rule import Follow, Rule
from quantizers.x86.quantizer import X86InductorQuantizer, get_default_x86_inductor_quantization_config
from quantizers.x86.rules import capabilities

aten = torch.ops.aten

_PRODUCTS = op(aten.matmul.default, aten.bmm.default)(f.x, f.y)
_KEEPING = roots(f.max_pool(f.x) | f.avg_pool(f.x) | f.adaptive_avg_pool(f.x) | f.cat(f.x))
"""Ops whose results have the scale of what they read."""
_SCALED = frozenset({"mul", "div", "add", "masked_fill"})
"""What the scores of attention pass before their softmax."""


class OpenVINOQuantizer(X86InductorQuantizer):
    """Annotates what `lowering.to_openvino` makes int8 kernels of: all of `X86InductorQuantizer`, and in static
    configurations the scores of attention, the product of queries and keys. Where an op reads an image as integers, a
    product of that image with one factor per channel reads the same integers, and answers in float.

    Queries and keys are symmetric int8 per tensor; probabilities and values stay float. Attention may be the fused op
    or spelled out, as a product that a softmax follows. Where that costs too much accuracy:
    ``set_operator_type(torch.nn.functional.scaled_dot_product_attention, None)``, or of ``torch.matmul``.

    ``isa`` and ``range_policy``: as of `X86InductorQuantizer`. On processors without VNNI, where OpenVINO's kernels add
    two products in 16 bits, scores stay float: no range is left for them that is exact.
    """

    float_ops: ClassVar[Mapping[str, str]] = {
        name: reason.replace("Inductor computes", "OpenVINO computes")
        for name, reason in X86InductorQuantizer.float_ops.items()
        if name != "scaled_dot_product_attention"
    }

    def table(self, config: Any) -> Sequence[Rule]:
        """The rules of x86, and those of scores and of factors per channel."""
        rules, activation = super().table(config), config.input_activation
        static = activation is not None and not activation.is_dynamic and group_size_of(config.weight) is None
        if not static:
            return rules
        scores = () if self._isa.saturates else _scores(config)
        return (*rules, *scores, _scaled_channels(config))

    @classmethod
    def quantization_capabilities(cls) -> Mapping[str, Sequence[str]]:
        """Rule → patterns, for a static and a dynamic configuration."""
        static, dynamic = (get_default_x86_inductor_quantization_config(is_dynamic=each) for each in (False, True))
        rules = (*_scores(static), _scaled_channels(static))
        own = {rule.name: tuple(str(rule.pattern).split(" | ")) for rule in rules}
        return {**capabilities(static, dynamic), **own}


def _scores(config: Any) -> tuple[Rule, ...]:
    signed = replace(
        config.input_activation,
        dtype=torch.int8,
        qscheme=torch.per_tensor_symmetric,
        quant_min=-128,
        quant_max=127,
    )
    both = {"x": signed, "y": signed}
    return (
        Rule(f.scores, both, when=_on_no_grid, name="scores of attention"),
        Rule(_PRODUCTS, both, when=_before_a_softmax, name="scores of attention, spelled out"),
    )


def _scaled_channels(config: Any) -> Rule:
    product = f.mul([f.x, f.y])
    return Rule(product, {"x": Follow(config.input_activation)}, when=_one_image, name="factor per channel")


def _one_image(match: Match) -> bool | str:
    """An image times a factor for each of its channels, where another op reads the image as integers: what makes it
    writes it once.
    """
    (image, product), (factor, _) = match.edges["x"], match.edges["y"]
    sizes, factors = value(image).shape, value(factor).shape
    if len(sizes) < 3 or len(factors) != len(sizes) or factors[1:] != (sizes[1], *[1] * (len(sizes) - 2)):
        return f"'{factor.name}' is not one factor for each channel of '{image.name}'"
    read = any(reads_integers(user, image) for user in image.users if user is not product)
    return read or f"nothing else reads '{image.name}' as integers"


def _on_no_grid(match: Match) -> bool | str:
    """Queries and keys that no pool or join makes, which would keep integers of another grid: rounded twice, they would
    lose more than they save.
    """
    for producer, _ in (match.edges["x"], match.edges["y"]):
        if producer.target in _KEEPING:
            return f"'{producer.name}' keeps integers on a grid of its own, which scores do not take"
    return True


def _before_a_softmax(match: Match) -> bool | str:
    """A product of queries and keys: scaled and masked only, until a softmax reads it."""
    if (objection := _on_no_grid(match)) is not True:
        return objection
    node = match.root
    while len(node.users) == 1:
        node = next(iter(node.users))
        name = short_name(node.target).removesuffix("_") if node.op == "call_function" else ""
        if name in ("softmax", "_softmax"):
            return True
        if name not in _SCALED and not _is_identity(node):
            break
    return "no softmax reads it"


def _is_identity(node: Node) -> bool:
    row = movement(node.target)
    if row is None or row.effect is not Effect.SAME:
        return False
    return row.when is When.ALWAYS or (row.when is When.EVALUATION and in_eval_mode(node) is True)
