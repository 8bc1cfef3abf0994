"""Observer insertion: one observer per group of the plan.

    y = conv(x, w)        =>        y = conv(obs0(x), obs1(w)); obs2(y)

After each tensor come the observer of its own output group, which all its users then read, and behind it one observer
for each other group among its uses. Derived parameters are the exception: their call stands in front of the consumer,
behind the observers of its other operands. Both edits of the graph, this one and `quant2e.convert.insert_qdq`, follow
the same plan.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quant2e.annotation.granularity import PerAxis, PerTensor
from quant2e.annotation.plan import DerivedFrom, Edge, Group, Output, Plan, Point
from quant2e.annotation.specs import PER_CHANNEL_SCHEMES
from quant2e.errors import AnnotationError
from quant2e.graph.attributes import first_free
from quant2e.graph.edit import NO_GRAD, set_origin, stands_for
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.base import OBSERVER_PREFIX, observed
from quant2e.observers.derived import DerivedFakeQuantize, DerivedObserver, is_fake_quantizer
from quant2e.observers.fake_quant import FixedQParamsFakeQuantize
from quant2e.observers.measuring import FixedQParamsObserver


def _constructor_arguments(spec: Any) -> dict[str, Any]:
    """The fields of a plain spec, as PT2E hands them to an observer's constructor."""
    if not is_dataclass(spec):
        names = ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "is_dynamic")
        found = {name: getattr(spec, name, None) for name in names}
    else:
        found = {f.name: getattr(spec, f.name) for f in fields(spec) if f.name != "observer_or_fake_quant_ctr"}
    # "ch_axis" is an argument of the per-channel observers alone, whatever library they come from. A fake-quantizer of
    # channels takes it too; where its spec has none, as Core ML's, the observer that it was given has an axis of its
    # own.
    numbered = found.get("qscheme") in PER_CHANNEL_SCHEMES and found.get("ch_axis") is not None
    if "PerChannel" not in _class_name(spec.observer_or_fake_quant_ctr) and not numbered:
        found.pop("ch_axis", None)
    return found


def _class_name(constructor: Any) -> str:
    partial = getattr(constructor, "p", constructor)
    return str(getattr(getattr(partial, "func", partial), "__name__", type(partial).__name__))


def _make_plain(spec: Any, points: Sequence[Point]) -> nn.Module:
    constructor = spec.observer_or_fake_quant_ctr
    arguments = _constructor_arguments(spec)
    try:
        made = constructor.with_args(**arguments)() if hasattr(constructor, "with_args") else constructor(**arguments)
    except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise AnnotationError(
            f"the spec of ({points[0]}) cannot make its observer: {_class_name(constructor)} refused "
            f"{', '.join(f'{k}={v}' for k, v in arguments.items())}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise AnnotationError(f"the spec of ({points[0]}) made a {type(made).__name__}; an observer is an nn.Module")
    return made


def make_observers(plan: Plan, *, training: bool = False) -> list[nn.Module]:
    """One observer per group of the plan, in its order. Sources of derived groups are made first.

    ``training``: parameters known in advance are fake-quantized with, as in PT2E, and so are derived ones where their
    sources fake-quantize.
    """
    made: dict[int, nn.Module] = {}
    pending = list(reversed(range(len(plan.groups))))
    while pending:
        index = pending[-1]
        group = plan.groups[index]
        sources = [plan.group_of(p) for p in group.spec.sources] if isinstance(group.spec, DerivedFrom) else []
        missing = [source for source in sources if source is not None and source not in made]
        if missing:
            pending.extend(missing)
            continue
        pending.pop()
        if index not in made:
            made[index] = _make(group, [made[source] for source in sources if source is not None], training)
    return [made[i] for i in range(len(plan.groups))]


def _make(group: Group, sources: list[nn.Module], training: bool) -> nn.Module:
    spec = group.spec
    if isinstance(spec, DerivedFrom):
        rounds = training and all(map(is_fake_quantizer, sources))
        return (DerivedFakeQuantize if rounds else DerivedObserver)(spec, sources)
    if hasattr(spec, "observer_or_fake_quant_ctr"):
        return _make_plain(spec, group.points)
    fixed = FixedQParamsObserver.with_args(
        scale=spec.scale,
        zero_point=spec.zero_point,
        dtype=spec.dtype,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
        qscheme=spec.qscheme if spec.qscheme is not None else torch.per_tensor_affine,
    )
    made: nn.Module = FixedQParamsFakeQuantize(fixed) if training else fixed()
    return made


def find_scales_of_single_images(gm: GraphModule, plan: Plan, observers: Mapping[int, Any]) -> None:
    """Let observers of a scale for each image find one for the tensor where a batch is always one image.

    It is the same scale, in the spelling that other lowerings know.
    """
    values = {node.name: node_tensor(node) for node in gm.graph.nodes}
    for index, observer in observers.items():
        if getattr(observer, "granularity", None) == PerAxis(0):
            tensors = [values.get(point.tensor) for point in plan.groups[index].points]
            if all(tensor is not None and type(tensor.shape[0]) is int and tensor.shape[0] == 1 for tensor in tensors):
                observer.granularity = PerTensor()


class _Inserter:
    """Inserts observer calls; names the submodules in the order of their first call."""

    def __init__(self, gm: GraphModule, observers: Mapping[int, nn.Module]) -> None:
        self._gm = gm
        self._observers = observers
        self.names: dict[int, str] = {}
        self._first_op = next((n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr")), None)

    def insert(self, after: Node, group: int, origin: Node, *, before: Node | None = None) -> Node:
        """Observe ``after``, right behind it or right in front of ``before``."""
        graph = self._gm.graph
        name = self._register(group)
        if before is not None:
            place = graph.inserting_before(before)
        elif after.op == "placeholder" and self._first_op is not None:
            place = graph.inserting_before(self._first_op)
        else:
            place = graph.inserting_after(after)
        with place:
            call = graph.call_module(name, (after,))
        set_origin(call, origin, value=after.meta.get("val"))
        call.meta.pop(NO_GRAD, None)  # what it hands on may be read outside of the region, too
        stands_for(call, after)
        return call

    def _register(self, group: int) -> str:
        """The name of a group's observer, which becomes a submodule when it has none yet."""
        if group not in self.names:
            # The same instance may stand for several groups when a quantizer's callback merged them.
            observer = self._observers[group]
            numbers = itertools.count(len(self.names))
            self.names[group] = first_free(self._gm, (f"{OBSERVER_PREFIX}{number}" for number in numbers))
            self._gm.add_submodule(self.names[group], observer)
        return self.names[group]


def observe(gm: GraphModule, plan: Plan, observers: Mapping[int, nn.Module]) -> dict[int, str]:
    """Insert an observer call for every group at every tensor it is used on. Changes ``gm`` in place.

    ``observers``: group index → observer; a group that is missing stays float. Derived parameters are those of other
    operands of a consumer, so their call stands right in front of it, behind those. Returns the name under which each
    group's observer is registered.
    """
    nodes = list(gm.graph.nodes)
    named = {node.name: node for node in nodes}
    inserter = _Inserter(gm, observers)
    head = dict(named)
    on_edge: dict[tuple[str, int], Node] = {}
    own = {
        point.node: index
        for index, group in enumerate(plan.groups)
        if index in observers
        for point in group.points
        if isinstance(point, Output)
    }
    edges: dict[str, list[tuple[Node, int]]] = defaultdict(list)
    for index, group in enumerate(plan.groups):
        for point in group.points:
            if isinstance(point, Edge) and index in observers and own.get(point.src) != index:
                edges[point.dst].append((named[point.src], index))
    derived = {index for index in observers if isinstance(plan.groups[index].spec, DerivedFrom)}
    for node in nodes:
        order = {src: i for i, src in enumerate(_sources(node))} if node.name in edges else {}
        for src, index in sorted(edges[node.name], key=lambda pair: order.get(pair[0].name, 0)):
            key = (src.name, index)
            if key not in on_edge:
                origin = node if src.op in ("get_attr", "placeholder") else src
                before = node if index in derived else None
                on_edge[key] = inserter.insert(head[src.name], index, origin, before=before)
            node.replace_input_with(head[src.name], on_edge[key])
        if node.name in own:
            users = list(node.users)
            head[node.name] = inserter.insert(node, own[node.name], node)
            for user in users:
                user.replace_input_with(node, head[node.name])
    gm.recompile()
    return dict(inserter.names)


def _sources(node: Node) -> list[str]:
    """Names of the operands, as they were before observers stood between."""
    return [observed(operand).name for operand in node.all_input_nodes]
