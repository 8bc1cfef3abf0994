"""Which points share parameters: `resolve_plan` against golden plans, a brute-force reading of its definition, and
torchao.
"""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule

from quant2e.annotation.plan import DerivedFrom, Edge, Ignored, Output, Plan, SharedWith, resolve_plan, same_numbers
from quant2e.annotation.specs import FixedQParamsQuantizationSpec, QuantizationSpec
from quant2e.errors import PlanError


class Watch:
    """Stands for an observer class."""


class OtherWatch:
    """Another one."""


INT8 = QuantizationSpec(torch.int8, Watch, -128, 127, torch.per_tensor_affine)
INT8_AGAIN = QuantizationSpec(torch.int8, OtherWatch, -128, 127, torch.per_tensor_affine)
UINT8 = QuantizationSpec(torch.uint8, Watch, 0, 255, torch.per_tensor_affine)
DYNAMIC = QuantizationSpec(torch.int8, Watch, -128, 127, torch.per_tensor_affine, is_dynamic=True)
FIXED = FixedQParamsQuantizationSpec(torch.uint8, 1 / 256, 0, 0, 255, torch.per_tensor_affine)
FIXED_OTHER = FixedQParamsQuantizationSpec(torch.uint8, 1 / 128, 0, 0, 255, torch.per_tensor_affine)


def derived(*sources):
    return DerivedFrom(
        sources=sources, derive=list, dtype=torch.int32, quant_min=None, quant_max=None, qscheme=None, ch_axis=None
    )


def partition(plan):
    return {frozenset(group.points) for group in plan.groups}


# --------------------------------------------------------------------------------------------------------- the tables

X, Y, Z = Output("x"), Output("y"), Output("z")
XA, XB, YA, YC = Edge("x", "a"), Edge("x", "b"), Edge("y", "a"), Edge("y", "c")

TABLE = {
    "nothing annotated": ({}, (), []),
    "one point": ({X: INT8}, (), [{X}]),
    "None stays float": ({X: None, XA: INT8}, "a", [{XA}]),
    "what shares with None stays float": ({X: None, Y: SharedWith(X), Z: SharedWith(Y)}, (), []),
    "implicit: output and its use": ({X: INT8, XA: INT8}, "a", [{X, XA}]),
    "implicit: two uses, no output": ({XA: INT8, XB: INT8}, "ab", [{XA, XB}]),
    "one willing consumer is enough": ({XA: INT8, XB: INT8}, "a", [{XA, XB}]),
    "no willing consumer": ({X: INT8, XA: INT8}, (), [{X}, {XA}]),
    "an unwilling use beside a willing one": ({X: INT8, XA: INT8, XB: INT8}, "b", [{X, XA, XB}]),
    "other numbers": ({X: INT8, XA: UINT8}, "a", [{X}, {XA}]),
    "dynamic is another number": ({X: INT8, XA: DYNAMIC}, "a", [{X}, {XA}]),
    "the observer is not a number": ({X: INT8, XA: INT8_AGAIN}, "a", [{X, XA}]),
    "other tensors never share implicitly": ({XA: INT8, YA: INT8}, "a", [{XA}, {YA}]),
    "fixed with equal fixed": ({X: FIXED, XA: FIXED}, "a", [{X, XA}]),
    "fixed with another fixed": ({X: FIXED, XA: FIXED_OTHER}, "a", [{X}, {XA}]),
    "fixed with plain": ({X: FIXED, XA: UINT8}, "a", [{X}, {XA}]),
    "explicit needs no willing consumer": ({XA: INT8, YA: SharedWith(XA), Z: SharedWith(XA)}, (), [{XA, YA, Z}]),
    "forward reference": ({XA: SharedWith(YA), YA: SharedWith(Z), Z: INT8}, (), [{XA, YA, Z}]),
    "explicit and implicit meet": ({X: INT8, XA: INT8, Y: SharedWith(XA), YC: INT8}, "ac", [{X, XA, Y, YC}]),
    "explicit share of other numbers": ({X: UINT8, XA: SharedWith(Y), Y: INT8}, "a", [{X}, {XA, Y}]),
    "derived beside its equal": ({XA: INT8, YA: derived(XA), YC: derived(XA)}, "ac", [{XA}, {YA}, {YC}]),
    "shared with derived": ({XA: INT8, YA: derived(XA), Z: SharedWith(YA)}, "a", [{XA}, {YA, Z}]),
    "derived from derived": ({XA: INT8, YA: derived(XA), Z: derived(YA)}, "a", [{XA}, {YA}, {Z}]),
}


@pytest.mark.parametrize("name", TABLE)
def test_partition(name):
    specs, implicit, groups = TABLE[name]
    assert partition(resolve_plan(specs, set(implicit))) == {frozenset(g) for g in groups}


def test_first_plain_spec_in_graph_order_wins():
    assert resolve_plan({X: INT8, XA: INT8_AGAIN}, {"a"}).groups[0].spec is INT8
    assert resolve_plan({XA: INT8_AGAIN, X: INT8}, {"a"}).groups[0].spec is INT8_AGAIN
    assert resolve_plan({Y: SharedWith(XA), XA: INT8_AGAIN}, set()).groups[0].spec is INT8_AGAIN


def test_group_of_and_contains():
    plan = resolve_plan({X: INT8, XA: INT8, YA: UINT8, Z: None}, {"a"}, (Ignored(Edge("i", "a"), "a long tensor"),))
    assert [plan.group_of(p) for p in (X, XA, YA, Z)] == [0, 0, 1, None]
    assert X in plan
    assert Z not in plan
    assert Plan().groups == ()


def test_golden(golden):
    """Two concatenations in a row, a residual add, an embedding of index tensors, a derived bias and a fixed
    sigmoid.
    """
    conv_w = QuantizationSpec(torch.int8, Watch, -127, 127, torch.per_channel_symmetric, ch_axis=0)
    specs = {
        Edge("x", "conv"): INT8,
        Edge("w", "conv"): conv_w,
        Edge("b", "conv"): derived(Edge("x", "conv"), Edge("w", "conv")),
        Output("conv"): INT8,
        Edge("conv", "cat1"): INT8,
        Edge("y", "cat1"): SharedWith(Edge("conv", "cat1")),
        Output("cat1"): SharedWith(Edge("conv", "cat1")),
        Edge("z", "cat2"): INT8,
        Edge("cat1", "cat2"): SharedWith(Edge("z", "cat2")),
        Output("cat2"): SharedWith(Edge("z", "cat2")),
        Edge("cat2", "linear"): DYNAMIC,
        Output("sigmoid"): FIXED,
        Edge("sigmoid", "mul"): None,
    }
    ignored = (Ignored(Edge("ids", "embedding"), "a int64 tensor, not a float one"),)
    golden("plans/cat_cat", str(resolve_plan(specs, {"conv", "cat1", "cat2", "linear"}, ignored)))


# --------------------------------------------------------------------------------------------------------- the errors

ERRORS = {
    "self": ({X: SharedWith(X)}, "shared specs form a cycle: (x) => (x)"),
    "cycle of two": ({X: SharedWith(Y), Y: SharedWith(X)}, "cycle: (x) => (y) => (x)"),
    "cycle of three behind a tail": (
        {XB: SharedWith(X), X: SharedWith(Y), Y: SharedWith(Z), Z: SharedWith(X)},
        "cycle: (x) => (y) => (z) => (x)",
    ),
    "dangling": ({XA: SharedWith(X), X: SharedWith(Y)}, "dangling share: (x -> a) => (x) => (y), but (y) has no spec"),
    "derived from nothing": ({XA: derived(YA)}, "dangling derivation: (x -> a) => (y -> a), but (y -> a) has no spec"),
    "derived from float": (
        {XA: derived(Y), Y: None},
        "(x -> a) derives its parameters from (y), which is annotated to",
    ),
    "derived from itself": ({XA: derived(XA)}, "derived specs form a cycle: (x -> a) => (x -> a)"),
    "derived cycle": ({X: derived(Y), Y: derived(X)}, "derived specs form a cycle: (x) => (y) => (x)"),
    "derived cycle through a share": (
        {X: derived(Y), Y: SharedWith(Z), Z: derived(X)},
        "derived specs form a cycle: (x) => (z) => (x)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_prints_the_chain(name):
    specs, message = ERRORS[name]
    with pytest.raises(PlanError) as caught:
        resolve_plan(specs, set())
    assert message in str(caught.value)


def test_errors_do_not_depend_on_order():
    for specs, _ in ERRORS.values():
        with pytest.raises(PlanError):
            resolve_plan(dict(reversed(specs.items())), set())


# ------------------------------------------------------------------------------------------------------ long and wide


def test_long_chains_of_shares():
    n = 10_000
    forward = {Output(f"n{i}"): SharedWith(Output(f"n{i + 1}")) for i in range(n)} | {Output(f"n{n}"): INT8}
    for specs in (forward, dict(reversed(forward.items()))):
        plan = resolve_plan(specs, set())
        assert len(plan.groups) == 1
        assert len(plan.groups[0].points) == n + 1


def test_long_chains_of_derivations():
    n = 10_000
    forward = {Output(f"n{i}"): derived(Output(f"n{i + 1}")) for i in range(n)} | {Output(f"n{n}"): INT8}
    for specs in (forward, dict(reversed(forward.items()))):
        assert len(resolve_plan(specs, set()).groups) == n + 1


def test_long_cycles():
    n = 10_000
    for link in (SharedWith, derived):
        with pytest.raises(PlanError, match="form a cycle"):
            resolve_plan({Output(f"n{i}"): link(Output(f"n{(i + 1) % n}")) for i in range(n)}, set())


@pytest.mark.parametrize("spec", [INT8, None, derived(Y)], ids=["plain", "float", "derived"])
def test_one_tensor_with_many_uses_is_linear(spec):
    n = 20_000
    specs = {Y: INT8} | {Edge("x", f"c{i}"): spec for i in range(n)}
    groups = resolve_plan(specs, {f"c{i}" for i in range(n)}).groups
    assert len(groups) == {INT8: 2, None: 1}.get(spec if spec in (INT8, None) else "derived", n + 1)


# ------------------------------------------------------------------------------------------------------- random plans


@st.composite
def annotated(draw):
    """Specs of random points over a few tensors; shares point anywhere, without a cycle."""
    points = draw(
        st.lists(
            st.one_of(
                st.builds(Output, st.sampled_from("xyz")),
                st.builds(Edge, st.sampled_from("xyz"), st.sampled_from("abcd")),
            ),
            unique=True,
            min_size=1,
            max_size=12,
        )
    )
    specs = {}
    for i, point in enumerate(points):
        kinds = ["plain", "plain", "none"] + (["shared", "shared", "shared", "derived"] if i else [])
        kind = draw(st.sampled_from(kinds))
        if kind == "plain":
            specs[point] = draw(st.sampled_from([INT8, INT8_AGAIN, UINT8, FIXED, FIXED_OTHER, DYNAMIC]))
        elif kind == "none":
            specs[point] = None
        elif kind == "shared":
            specs[point] = SharedWith(points[draw(st.integers(0, i - 1))])
        else:
            source = points[draw(st.integers(0, i - 1))]
            specs[point] = None if anchor_spec(specs, source) is None else derived(source)
    return specs, draw(st.sets(st.sampled_from("abcd")))


def anchor_spec(specs, point):
    while isinstance(specs[point], SharedWith):
        point = specs[point].point
    return specs[point]


def brute_force(specs, implicit):
    """The definition read literally: link pairs, close transitively, drop what stays float."""
    linked = {p: {p} for p in specs}

    def link(a, b):
        merged = linked[a] | linked[b]
        for p in merged:
            linked[p] = merged

    for p, spec in specs.items():
        if isinstance(spec, SharedWith):
            link(p, spec.point)
    for edge in specs:
        if isinstance(edge, Edge) and edge.dst in implicit:
            for other in specs:
                if other.tensor == edge.tensor and same_numbers(anchor_spec(specs, edge), anchor_spec(specs, other)):
                    link(edge, other)
    return {frozenset(s) for p, s in linked.items() if anchor_spec(specs, p) is not None}


@given(annotated())
@settings(max_examples=300, deadline=None)
def test_resolve_is_its_definition(case):
    specs, implicit = case
    assert partition(resolve_plan(specs, implicit)) == brute_force(specs, implicit)


@given(annotated(), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_resolve_is_free_of_order(case, rng):
    specs, implicit = case
    shuffled = list(specs.items())
    rng.shuffle(shuffled)
    one, other = resolve_plan(specs, implicit), resolve_plan(dict(shuffled), implicit)
    assert partition(one) == partition(other)
    for group in one.groups:
        again = other.groups[other.group_of(group.points[0])]
        assert group.spec == again.spec or same_numbers(group.spec, again.spec)


@given(annotated())
@settings(max_examples=100, deadline=None)
def test_every_quantized_point_is_in_exactly_one_group(case):
    specs, implicit = case
    plan = resolve_plan(specs, implicit)
    members = [p for group in plan.groups for p in group.points]
    assert len(members) == len(set(members))
    for point in specs:
        index = plan.group_of(point)
        wanted = anchor_spec(specs, point)
        assert (index is None) == (wanted is None)
        if index is not None and not isinstance(wanted, DerivedFrom):
            assert same_numbers(plan.groups[index].spec, wanted)
        if index is not None and isinstance(wanted, DerivedFrom):
            assert plan.groups[index].spec is wanted
            assert all(plan.group_of(source) not in (None, index) for source in wanted.sources)


# ----------------------------------------------------------------------------------------------------------- the peer


@st.composite
def annotated_graphs(draw):
    """A random graph of calls, each annotated at random;
    returns names only: (operands of each node, specs, implicit).
    """
    operands = {"x0": [], "x1": []}
    for i in range(draw(st.integers(1, 5))):
        known = list(operands)
        operands[f"n{i}"] = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    points, willing = [], set()
    for node, sources in operands.items():
        if sources and draw(st.booleans()):
            willing.add(node)
        points += [Edge(src, node) for src in sources if draw(st.integers(0, 3))]
        if draw(st.integers(0, 2)):
            points.append(Output(node))
    assume(points)
    specs = {}
    order = draw(st.permutations(points))
    for i, point in enumerate(order):
        if i and draw(st.integers(0, 2)) == 0:
            specs[point] = SharedWith(order[draw(st.integers(0, i - 1))])
        else:
            specs[point] = draw(st.sampled_from([INT8, INT8, UINT8, FIXED]))
    return operands, {point: specs[point] for point in points}, willing


def as_torchao(operands, specs, willing):
    """The same annotations on a live graph, in torchao's classes."""
    from torchao.quantization.pt2e import quantizer as ao

    graph = Graph()
    nodes = {}
    for name, sources in operands.items():
        if sources:
            nodes[name] = graph.call_function(max, tuple(nodes[s] for s in sources), name=name)
        else:
            nodes[name] = graph.placeholder(name)
    graph.output(tuple(nodes.values()))
    place = {
        p: nodes[p.node] if isinstance(p, Output) else (nodes[p.src], nodes[p.dst])
        for p in [*specs, *(s.point for s in specs.values() if isinstance(s, SharedWith))]
    }

    def spec_of(point):
        spec = specs[point]
        if isinstance(spec, SharedWith):
            return ao.SharedQuantizationSpec(place[spec.point])
        if isinstance(spec, FixedQParamsQuantizationSpec):
            return ao.FixedQParamsQuantizationSpec(
                spec.dtype, spec.scale, spec.zero_point, spec.quant_min, spec.quant_max
            )
        return ao.QuantizationSpec(spec.dtype, Watch, spec.quant_min, spec.quant_max, spec.qscheme)

    for name, sources in operands.items():
        inputs = {nodes[s]: spec_of(Edge(s, name)) for s in sources if Edge(s, name) in specs}
        output = spec_of(Output(name)) if Output(name) in specs else None
        if inputs or output is not None:
            nodes[name].meta["quantization_annotation"] = ao.QuantizationAnnotation(inputs, output, name in willing)
    return GraphModule({}, graph), place


@given(annotated_graphs())
@settings(max_examples=400, deadline=None)
def test_groups_are_those_of_torchao_where_it_has_an_answer(case):
    from torchao.quantization.pt2e.prepare import _get_edge_or_node_to_group_id, _get_edge_or_node_to_qspec

    operands, specs, willing = case
    gm, place = as_torchao(operands, specs, willing)
    try:
        groups = _get_edge_or_node_to_group_id(_get_edge_or_node_to_qspec(gm))
    except RecursionError:
        assume(False)
    theirs = {}
    for point in specs:
        theirs.setdefault(groups[place[point]], set()).add(point)
    assert partition(resolve_plan(specs, willing)) == {frozenset(members) for members in theirs.values()}
