"""Which ops only move values: found by running every overload of ATen, and compared with the table."""

import ast
import itertools
import warnings
from pathlib import Path

import pytest
import torch
from torch._ops import OpOverloadPacket

from quant2e.annotation.pattern import short_name
from quant2e.graph.data_movement import MOVEMENTS, TABLE, Effect, When, movements
from quantizers.conformance.movement_calls import CALLS
from quantizers.kit import families

aten = torch.ops.aten
ROOT = Path(__file__).parents[3]

TENSORS = [
    torch.linspace(-7.3, 8.9, n).reshape(shape)[...]
    for n, shape in ((6, (6,)), (6, (2, 3)), (9, (3, 3)), (16, (1, 4, 2, 2)), (16, (2, 2, 2, 2)))
]
"""Distinct values of both signs, up to beyond 6; no sum, product or power of any is another."""

CANDIDATES = {
    "int": (0, 1, 2),
    "SymInt": (0, 1, 2),
    "bool": (False, True),
    "float": (0.5,),
    "Scalar": (0.5, 2),
    "List[int]": ([0], [1, 0], [0, 1], [2, 2], [2, 3], [1, 1, 2, 2], [3, 3, 3, 3]),
    "List[SymInt]": ([0], [1, 0], [0, 1], [2, 2], [2, 3], [1, 1, 2, 2], [3, 3, 3, 3], [-1]),
    "Tensor": (
        torch.tensor([0]),
        torch.tensor([[0, 1]]),
        torch.tensor([[[[0, 1]]]]),
        torch.randn(2, 3),
        torch.tensor(1.7),
    ),
    "List[Tensor]": ([torch.tensor([0, 1])], [torch.randn(2, 3)]),
    "List[Optional[Tensor]]": ([torch.tensor([0, 1])],),
}

BY_VALUE = {
    # picks values, or sets them to zero, by comparing them: a matter of rules of its own
    "amax", "amin", "aminmax", "hardshrink", "max", "max_pool2d", "median", "min", "msort", "nanmedian", "relu",
    # happens to change none of these values
    "nan_to_num",
}  # fmt: skip

OTHERS = {
    # of the backward pass, of TorchScript, between devices or layouts, of several data tensors, of tables
    "as_tensor", "choose_qparams_optimized", "combinations", "cpu", "cummaxmin_backward", "data", "dequantize",
    "embedding", "embedding_backward", "embedding_dense_backward", "gather_backward", "resize_as", "select_backward",
    "slice_inverse", "to_dense", "to_dense_backward", "to_mkldnn_backward", "unflatten_dense_tensors",
    "value_selecting_reduction_backward",
}  # fmt: skip


def overloads():
    """Every overload that takes a tensor first and returns tensors, and mutates nothing."""
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if (
            namespace != "aten"
            or name.startswith("_")
            or schema.is_mutable
            or not schema.arguments
            or not schema.returns
        ):
            continue
        overload = getattr(getattr(torch.ops.aten, name, None), schema.overload_name or "default", None)
        tags = getattr(overload, "tags", ())
        if str(schema.arguments[0].type) != "Tensor" or overload is None or torch.Tag.nondeterministic_seeded in tags:
            continue
        yield overload


def calls(overload):
    """Arguments to try, after the first tensor."""
    required = [a for a in overload._schema.arguments[1:] if not a.has_default_value()]
    choices = [CANDIDATES.get(str(a.type), ()) for a in required]
    names = [(a.name, a.kwarg_only) for a in required]
    for values in itertools.islice(itertools.product(*choices), 80):
        pairs = list(zip(names, values, strict=True))
        yield [v for (_, kw), v in pairs if not kw], {n: v for (n, kw), v in pairs if kw}


def moves_values(overload):
    """Whether every call that works returns nothing but the operand's values and zeros; None when none works."""
    worked = None
    for x, (args, kwargs) in itertools.product(TENSORS, calls(overload)):
        try:
            result = overload(x.clone(), *args, **kwargs)
        except Exception:  # noqa: BLE001  # most combinations of arguments make no sense
            continue
        results = [
            r for r in (result if isinstance(result, list | tuple) else (result,)) if isinstance(r, torch.Tensor)
        ]
        floats = [r for r in results if r.is_floating_point() and r.layout == torch.strided]
        if len(floats) != len(results) or not results or any(r.dtype != x.dtype for r in floats):
            continue  # quantizers look at the dtype as well
        known = torch.cat([x.flatten(), torch.zeros(1)])
        if not all(bool(torch.isin(r, known).all()) for r in floats):
            return False
        worked = worked or any(bool((r != 0).any()) for r in floats)
    return worked or None  # nothing but zeros, or nothing at all, says nothing


@pytest.mark.slow
def test_the_table_is_what_moves_values():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdicts = {overload: moves_values(overload) for overload in overloads()}
    unconditional = movements()
    wrong = {str(o) for o, verdict in verdicts.items() if verdict is False and o in unconditional}
    missed = {short_name(o) for o, verdict in verdicts.items() if verdict and o not in MOVEMENTS}
    assert (wrong, missed - OTHERS) == (set(), BY_VALUE)
    assert sum(bool(v) for o, v in verdicts.items() if o in MOVEMENTS) > 80


LARGER = [torch.linspace(-7.3, 8.9, n).reshape(shape) for n, shape in ((8, (1, 2, 4)), (9, (1, 1, 3, 3)))]
"""What can be padded by reflection, or has one spatial dimension."""


def results(overload):
    """Operands of the calls that work, further arguments, and the tensors of each result."""
    for x, (args, kwargs) in itertools.product([*TENSORS, *LARGER], calls(overload)):
        try:
            found = overload(x.clone(), *args, **kwargs)
        except Exception:  # noqa: BLE001  # most combinations of arguments make no sense
            continue
        tensors = list(found) if isinstance(found, list | tuple) else [found]
        if all(t.dtype == x.dtype and t.layout == torch.strided for t in tensors):
            yield x, args, kwargs, tensors


def same_values(x, r):
    return torch.equal(x.flatten().sort().values, r.flatten().sort().values)


HOLDS = {
    Effect.SAME: torch.equal,
    Effect.RESHAPE: lambda x, r: torch.equal(x.flatten(), r.flatten()),
    Effect.PERMUTE: lambda x, r: sorted(x.shape) == sorted(r.shape) and same_values(x, r),
    Effect.SHUFFLE: same_values,
    Effect.REORDER: same_values,
    Effect.SLICE: lambda x, r: x.dim() == r.dim() and bool(torch.isin(r, x).all()),
    Effect.SELECT: lambda x, r: x.dim() == r.dim() + 1 and bool(torch.isin(r, x).all()),
    Effect.PICK: lambda x, r: bool(torch.isin(r, x).all()),
    Effect.REPEAT: lambda x, r: bool(torch.isin(r, torch.cat([x.flatten(), torch.zeros(1)])).all()),
    Effect.ZEROS: lambda x, r: bool(torch.isin(r, torch.cat([x.flatten(), torch.zeros(1)])).all()),
    Effect.SPLIT: lambda x, r: bool(torch.isin(r, x).all()),
}
"""What is true of operand and result. ``im2col`` repeats values among zeros."""


def pairs(overload):
    """``(operand, result)`` of up to 40 calls that work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(itertools.islice(((x, r) for x, _, _, tensors in results(overload) for r in tensors), 40))


UNCALLED = {
    # no candidates: three spatial dimensions, four lists, a scale for each dimension, a number in a tensor
    "aten.reflection_pad3d.default", "aten.replication_pad3d.default", "aten.upsample_nearest3d.default",
    "aten.upsample_nearest3d.vec", "aten.im2col.default", "aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec",
    "aten.narrow.Tensor", "aten.upsample_nearest1d.default",
}  # fmt: skip
STRIDED = {"aten.as_strided.default", "aten.as_strided_copy.default", "aten._reshape_alias.default"}
"""They read memory, not places: with strides of another layout they do something else."""


@pytest.mark.parametrize("effect", HOLDS)
def test_effects(effect):
    found = {str(overload): pairs(overload) for overload in movements(effect)}
    wrong = {name for name, calls in found.items() if not all(HOLDS[effect](x, r) for x, r in calls)}
    assert wrong <= STRIDED
    assert {name for name, calls in found.items() if not calls} <= UNCALLED


def test_integers_move_as_the_floats_they_stand_for():
    """The column ``integers``: what torch does to integers of 8 and 16 bits is what it does to floats."""
    refused = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for overload in sorted(movements(), key=str):
            if MOVEMENTS[overload].effect is Effect.JOIN:
                continue
            for x, args, kwargs, tensors in itertools.islice(results(overload), 20):
                for dtype in (torch.int8, torch.uint8, torch.int16):
                    turn = 0 if dtype is not torch.uint8 else 128
                    codes = ((x * 7).round() + turn).to(dtype)
                    try:
                        moved = overload(codes, *args, **kwargs)
                    except RuntimeError:
                        refused.add(str(overload))
                        continue
                    moved = list(moved) if isinstance(moved, list | tuple) else [moved]
                    if MOVEMENTS[overload].integers and MOVEMENTS[overload].effect is not Effect.ZEROS:
                        for r, m in zip(tensors, moved, strict=True):
                            assert torch.equal(((r * 7).round() + turn).to(dtype), m), (overload, dtype)
    without = {str(o) for o, row in MOVEMENTS.items() if not row.integers}
    assert refused <= without
    assert without - refused <= UNCALLED | STRIDED


def test_what_random_graphs_call_is_in_the_table():
    assert set(CALLS) <= set(MOVEMENTS)


def test_one_line_each():
    overloads = [overload for row in TABLE for overload in row.overloads()]
    assert len(overloads) == len(set(overloads)) == len(MOVEMENTS)
    assert all(list(row.overloads()) for row in TABLE)
    assert not any(overload._schema.is_mutable for overload in MOVEMENTS)


def test_conditions():
    names = {when: {short_name(o) for o in movements(when=when)} for when in When if when is not When.ALWAYS}
    assert names == {
        When.EVALUATION: {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"},
        When.SAME_DTYPE: {"to", "_to_copy", "type_as", "view", "view_copy"},
        When.PADDING: {"pad", "constant_pad_nd"},
    }
    assert aten.view.default in movements(Effect.RESHAPE)
    assert aten.view.dtype not in movements()
    assert aten.im2col.default not in movements(Effect.REPEAT, integers=True)


def test_quantizers_take_the_whole_table():
    assert set(MOVEMENTS) - movements(Effect.JOIN) <= families.MOVES
    assert not families.MOVES & movements(Effect.JOIN)


# ---------------------------------------------------------------- the only one

ELSEWHERE = {
    "quant2e/accuracy/algorithms/channels/labels.py": "ops that repeat an axis of size 1, of those that repeat",
    "quant2e/accuracy/algorithms/smooth_sums.py": "ops that keep each value in its place, of those behind a linear",
    "quant2e/graph/data_movement.py": "the table",
    "quant2e/graph/effects.py": "what shares memory although its schema is silent: aliases, not movement",
    "quantizers/conformance/capabilities.py": "examples of ops in common use",
    "quantizers/conformance/movement_calls.py": "arguments to call each with: how, not what moves",
    "quantizers/conformance/op_calls.py": "joins to call, by how they take their axis",
    "quantizers/kit/value_source.py": "ops that pick by an index that is data",
    "quantizers/x86/rules.py": "the few reshapes that carry integers to an int8 kernel",
    "lowering/executorch/xnnpack/legalize/split_and_join.py": "splits by how they write their sizes",
    "lowering/rewrites/layouts.py": "reshapes that need strides, and what each is without them",
}
"""Files that name three or more ops of the table in one collection, and why they may."""

NAMES = {short_name(overload) for overload in MOVEMENTS}


def named(item):
    """The op that an expression names: ``aten.view.default``, ``torch.ops.aten.view``, ``"view"``, ``"aten.view"``."""
    if isinstance(item, ast.Starred):
        return None
    if isinstance(item, ast.Constant) and isinstance(item.value, str):
        parts = item.value.removeprefix("aten.").split(".")
    elif isinstance(item, ast.Attribute):
        parts = ast.unparse(item).split(".")
        at = next((i for i, part in enumerate(parts) if part.strip("_").lower() == "aten"), None)
        parts = [] if at is None else parts[at + 1 :]
    else:
        return None
    return parts[0].removesuffix("_") if parts and parts[0].removesuffix("_") in NAMES else None


def collections(tree):
    """The items of every literal set, list, tuple and mapping, and the arguments of every call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Set | ast.List | ast.Tuple):
            yield node.lineno, node.elts
        elif isinstance(node, ast.Dict):
            yield node.lineno, [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Call):
            yield node.lineno, node.args


def tables_in(source):
    """Lines of collections that name three or more ops of the table, and the ops."""
    found = [(line, {n for item in items if (n := named(item))}) for line, items in collections(ast.parse(source))]
    return [(line, sorted(ops)) for line, ops in found if len(ops) >= 3]


def test_no_other_table_of_moving_ops():
    others = {}
    for package in ("quant2e", "quantizers", "lowering"):
        for path in sorted((ROOT / package).rglob("*.py")):
            found = tables_in(path.read_text())
            if found:
                others[str(path.relative_to(ROOT))] = found
    unexpected = {path: found for path, found in others.items() if path not in ELSEWHERE}
    assert not unexpected, (
        f"{unexpected}: what only moves values is a condition over quant2e.graph.data_movement; "
        "a new op is a line there"
    )
    assert set(ELSEWHERE) - {"quant2e/graph/data_movement.py"} <= set(others), "an exception that nothing needs"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("S = {aten.view.default, aten.permute.default, aten.t.default, aten.squeeze.dim, aten.clone.default}", 1),
        ("S = frozenset(['view', 'permute', 't', 'squeeze', 'clone', 'relu'])", 1),
        ("S = op(_ATEN.view, _ATEN.permute_, torch.ops.aten.t, _ATEN.squeeze.dims, _ATEN.select.int)", 1),
        ("S = {aten.view: 1, aten.permute.default: 2, aten.t.default: 3, aten.slice.Tensor: 4, aten.roll: 5}", 1),
        ("S = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.view.default, aten.view.dtype}", 0),
        ("S = {aten.view.default, aten.reshape.default, aten.unflatten.int}", 1),
        ("S = {aten.relu.default, aten.add.Tensor, aten.mul.Tensor, aten.conv2d.default, aten.linear.default}", 0),
    ],
)  # fmt: skip
def test_other_tables_are_found(source, found):
    assert len(tables_in(source)) == found


def test_packets_have_lines_of_their_own():
    packets = [row.op for row in TABLE if isinstance(row.op, OpOverloadPacket)]
    assert len(packets) == len(set(packets))
