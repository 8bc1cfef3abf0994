"""Before training, batch norms are still in the graph; rules are written for graphs in which they are folded.

    relu(batch_norm(conv(x, w, b)))    is annotated as    relu(conv(x, w, b))

While a quantizer looks, a norm that will be folded is taken out of the flow of data: what reads it reads its convolution. What
was annotated on the convolution's result is then moved to the norm's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import GraphModule, Node

from quant2e.annotation.specs import (
    ANNOTATION,
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    SharedQuantizationSpec,
)
from quant2e.graph.effects import argument
from quant2e.passes.fold_batch_norm import set_operand
from quant2e.passes.train_batch_norm import trainable_norms


@dataclass(frozen=True, slots=True)
class _Hidden:
    """A norm out of the flow. ``shift``: the norm's, when it stands in for a bias that the convolution does not have."""

    mac: Node
    norm: Node
    arguments: tuple[Any, ...]
    readers: tuple[Node, ...]
    shift: Node | None


@contextmanager
def as_if_folded(gm: GraphModule) -> Iterator[None]:
    """Hide the norms of ``gm`` inside the block; afterwards put them back, and annotations where they belong."""
    pairs = list(trainable_norms(gm))
    if not pairs:
        yield
        return
    annotated = {node for node in gm.graph.nodes if ANNOTATION in node.meta}
    hidden = [_hide(mac, norm) for mac, norm in pairs if mac not in annotated and norm not in annotated]
    try:
        yield
    finally:
        for item in reversed(hidden):
            _put_back(item)
    _move(
        {item.mac: item for item in hidden}, [n for n in gm.graph.nodes if n not in annotated and ANNOTATION in n.meta]
    )


def _hide(mac: Node, norm: Node) -> _Hidden:
    shift = argument(norm, "bias") if argument(mac, "bias") is None else None
    shift = shift if shift is not None and shift < mac else None
    item = _Hidden(mac, norm, norm.args, tuple(norm.users), shift)
    norm.replace_all_uses_with(mac)
    norm.args = (None, *norm.args[1:])
    if shift is not None:
        set_operand(mac, "bias", shift)
    return item


def _put_back(item: _Hidden) -> None:
    for reader in item.readers:
        reader.replace_input_with(item.mac, item.norm)
    item.norm.args = item.arguments
    if item.shift is not None:
        set_operand(item.mac, "bias", None)


def _move(hidden: dict[Node, _Hidden], annotated: list[Node]) -> None:
    for node in annotated:
        note = node.meta[ANNOTATION]
        own = hidden.get(node)
        inputs = {_place(key, node, hidden): _spec(spec, hidden) for key, spec in note.input_qspec_map.items()}
        output = _spec(note.output_qspec, hidden)
        if own is None:
            note.input_qspec_map = {key: spec for (key, _), spec in inputs.items()}
            note.output_qspec = output
            continue
        note.input_qspec_map = {key: spec for (key, reader), spec in inputs.items() if reader is node}
        note.output_qspec = None
        own.norm.meta[ANNOTATION] = QuantizationAnnotation(
            input_qspec_map={key: spec for (key, reader), spec in inputs.items() if reader is own.norm},
            output_qspec=output,
            allow_implicit_sharing=note.allow_implicit_sharing,
            _annotated=True,
            rule=note.rule,
            _is_output_of_quantized_pattern=note._is_output_of_quantized_pattern,
        )
        note._is_output_of_quantized_pattern = False


def _place(producer: Node, consumer: Node, hidden: dict[Node, _Hidden]) -> tuple[Node, Node]:
    """The edge that ``(producer, consumer)`` is once the norms are back."""
    into = hidden.get(consumer)
    if into is not None and producer is into.shift:
        return producer, into.norm
    behind = hidden.get(producer)
    return (producer if behind is None else behind.norm), consumer


def _spec(spec: Any, hidden: dict[Node, _Hidden]) -> Any:
    """A spec whose references are to the graph with norms."""

    def moved(place: Any) -> Any:
        if isinstance(place, Node):
            return hidden[place].norm if place in hidden else place
        producer, consumer = place
        return _place(producer, consumer, hidden)

    if isinstance(spec, SharedQuantizationSpec):
        return SharedQuantizationSpec(moved(spec.edge_or_node))
    if isinstance(spec, DerivedQuantizationSpec):
        return replace(spec, derived_from=[moved(place) for place in spec.derived_from])
    return spec
