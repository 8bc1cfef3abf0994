"""Which ops only move values: found by running every overload of ATen, and compared with the list that quantizers use."""

import itertools
import warnings

import pytest
import torch

from quant2e.annotation.pattern import roots, short_name
from quantizers.kit import families

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
    "as_tensor", "choose_qparams_optimized", "combinations", "cpu", "cummaxmin_backward", "data", "dequantize", "embedding",
    "embedding_backward", "embedding_dense_backward", "gather_backward", "resize_as", "select_backward", "slice_inverse",
    "to_dense", "to_dense_backward", "to_mkldnn_backward", "unflatten_dense_tensors", "value_selecting_reduction_backward",
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
    return worked


@pytest.mark.slow
def test_the_family_of_moves_is_what_moves_values():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdicts = {overload: moves_values(overload) for overload in overloads()}
    listed = roots(families.moves)
    unconditional = {
        t for p in (*families._MOVING_PACKETS, *families._SPLITTING_PACKETS) for t in roots(families.op(p))
    }
    wrong = {str(o) for o, verdict in verdicts.items() if verdict is False and o in unconditional}
    missed = {short_name(o) for o, verdict in verdicts.items() if verdict and o not in listed}
    assert (wrong, missed - OTHERS) == (set(), BY_VALUE)
    assert sum(bool(v) for o, v in verdicts.items() if o in listed) > 80
