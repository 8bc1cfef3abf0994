"""Encodings that were dumped, and perhaps edited by hand, applied to a prepared graph: exactly they come out.

prepared + encodings        =>        prepared', whose observers are told what their tensors become
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from quant2e.annotation.plan import DerivedFrom, Edge, Group
from quant2e.annotation.specs import INTEGER_BOUNDS
from quant2e.documents.nearest import nearest
from quant2e.documents.tensor_numbers import tensor_of
from quant2e.errors import AnnotationError, CalibrationError, Quant2eError
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.control_flow import BODY, graphs_of, prefixed
from quant2e.graph.fake_values import node_tensor
from quant2e.observers.derived import DerivedObserver
from quant2e.observers.encodings import (
    CustomEncoding,
    DynamicEncoding,
    Encoding,
    Float16Encoding,
    PerChannelEncoding,
    PerGroupEncoding,
    PerTensorEncoding,
    RoundedConstant,
    encode,
)
from quant2e.observers.given import has_integers, in_place_of
from quant2e.observers.placeholder import PlaceholderObserver
from quant2e.ranges.qparams import SMALLEST_SCALE
from quant2e.report.encodings import GRANULARITIES, Encodings, GroupEncoding
from quant2e.report.record import RECORD_KEY, record_of
from quant2e.report.report import DYNAMIC, STATIC, Report

_NAMED = 5
"""Mistakes that an error lists."""

_FLOAT8 = (torch.float8_e5m2, torch.float8_e4m3fn)


def with_encodings(prepared: GraphModule, encodings: Encodings) -> GraphModule:
    """A copy of a prepared graph, over the same tensors, whose points become what ``encodings`` says: bit for bit.

    Points that it does not name are as calibration finds them; where it names all, nothing has to be calibrated. It
    names all or none of the points that share their parameters. What is ``on_grid`` without a scale, and what is
    ``custom``, is as its sources and its own observer say. The numbers of ``spec`` and ``quantizer`` are for readers.

    Raises `AnnotationError`, which lists what is wrong, for points that the graph does not have, with the nearest that
    it has; for numbers of another tensor (as many scales as channels or groups); for a zero point outside of the
    range, a range that does not fit the dtype, and for parameters that cannot be derived from float tensors.
    """
    if not isinstance(encodings, Encodings):
        raise Quant2eError(
            f"encodings is a {type(encodings).__name__}: give an Encodings, as QuantizedModel.encodings is and "
            "Encodings.from_file(path) reads it"
        )
    record_of(prepared)
    gm: GraphModule = copy_graph(prepared, compiled=False)
    every = list(_places(gm))
    asked = _by_point(encodings, [point for place in every for point in place.points])
    places = [place for place in every if place.observer]
    mistakes: list[str] = []
    given: dict[str, tuple[_Place, GroupEncoding]] = {}
    for place in places:
        try:
            if (entry := _entry_of(place, asked)) is not None:
                _exchange(place, entry)
                given[place.points[0]] = place, entry
        except (AnnotationError, CalibrationError) as error:
            mistakes.append(f"{place}: {error}")
    if not mistakes:
        _connect(gm)
        mistakes = [f"{place}: {said}" for place, _ in given.values() if (said := _underivable(place))]
    if mistakes:
        raise AnnotationError(_listed(mistakes, "encodings cannot be applied"))
    for _, graph in graphs_of(gm):
        if (record := graph.meta.get(RECORD_KEY)) is not None:
            own = [(place, entry) for place, entry in given.values() if place.graph is graph]
            whole = given.values() if graph is gm else own
            notes = _notes([place for place, _ in whole], len(places)) if graph is gm else []
            if graph is gm and encodings.algorithms:
                notes.append(
                    f"the encodings were found after {', '.join(encodings.algorithms)}: bit for bit they hold for a "
                    "graph that went through the same"
                )
            graph.meta[RECORD_KEY] = replace(record, report=_with_kinds(record.report, own).with_notes(notes))
        graph.recompile()
    return gm


@dataclass(frozen=True, slots=True)
class _Place:
    """A group of the plan of ``graph``, its points as records name them, and the name of its observer there.

    No name: nothing is observed.
    """

    graph: GraphModule
    group: Group
    points: tuple[str, ...]
    observer: str

    def __str__(self) -> str:
        return f"({self.points[0]})" + (f" and {len(self.points) - 1} that share with it" * (len(self.points) > 1))

    @property
    def module(self) -> nn.Module:
        """Its observer."""
        return self.graph.get_submodule(self.observer)

    @property
    def tensors(self) -> list[Tensor]:
        """What it observes, as fake tensors."""
        names = {point.tensor for point in self.group.points}
        values = (node_tensor(node) for node in self.graph.graph.nodes if node.name in names)
        return [value for value in values if value is not None]


def _places(gm: GraphModule) -> Iterator[_Place]:
    """The groups of the plan of the graph and of those of its bodies."""
    for _, graph in graphs_of(gm):
        record, path = graph.meta.get(RECORD_KEY), graph.meta.get(BODY, "")
        if record is None:
            continue
        for group, name in zip(record.plan.groups, record.observers, strict=True):
            yield _Place(graph, group, tuple(prefixed(path, str(point)) for point in group.points), name)


def _by_point(encodings: Encodings, known: list[str]) -> dict[str, GroupEncoding]:
    """The entry of each point. Raises `AnnotationError` for points that are not there, or have two entries."""
    asked: dict[str, GroupEncoding] = {}
    twice = []
    for entry in encodings.groups:
        for point in entry.points:
            if point in asked:
                twice.append(f"({point}) has two entries")
            asked[point] = entry
    points = set(known)
    missing = [point for point in asked if point not in points]
    if missing and len(missing) == len(asked):
        raise AnnotationError(
            f"encodings of another model: it has none of their {len(missing)} points, ({missing[0]}) say"
            f"{nearest(missing[0], known)}"
        )
    wrong = [f"there is no point ({point}){nearest(point, known)}" for point in missing]
    if wrong or twice:
        raise AnnotationError(_listed([*wrong, *twice], "encodings cannot be applied"))
    return asked


def _listed(lines: list[str], what: str) -> str:
    more = [f"and {len(lines) - _NAMED} more"] if len(lines) > _NAMED else []
    return f"{what}:" + "".join(f"\n  {line}" for line in (*lines[:_NAMED], *more))


def _entry_of(place: _Place, asked: Mapping[str, GroupEncoding]) -> GroupEncoding | None:
    """What the points of a group become; None where no entry names them."""
    found = [asked.get(point) for point in place.points]
    distinct = list({id(entry): entry for entry in found if entry is not None}.values())
    if not distinct:
        return None
    if missing := [point for point, entry in zip(place.points, found, strict=True) if entry is None]:
        raise AnnotationError(f"they share their parameters: name all of them or none, and not all but ({missing[0]})")
    first = distinct[0]
    if any(replace(other, points=first.points, spec=first.spec) != first for other in distinct[1:]):
        raise AnnotationError("they share their parameters, and have entries with different numbers")
    return first


def _exchange(place: _Place, entry: GroupEncoding) -> None:
    """Tell the observer of a place what its tensors become; not where it says so itself."""
    own = place.module
    if has_integers(own) and _same(encode(own), _encoding(entry, place, own)):
        return  # an algorithm chose its integers, and the numbers are those that it chose them for
    if entry.encoding in ("custom", "float", "on_grid"):
        said = _said_by(own)
        if entry.encoding == "custom" and not isinstance(said, CustomEncoding):
            raise AnnotationError("it is 'custom', and has no observer here that writes its own nodes")
        if entry.encoding == "custom" or (entry.encoding == "float" and said is None):
            return
        if entry.encoding == "on_grid" and not entry.scale:
            if not (isinstance(own, DerivedObserver) and own.dtype == torch.float32):
                raise AnnotationError("it is 'on_grid' without a scale, and derives none from other points here")
            return
    place.graph.add_submodule(place.observer, in_place_of(_encoding(entry, place, own), own))


def _same(a: Encoding | None, b: Encoding | None) -> bool:
    """Whether two encodings have the same numbers."""
    if type(a) is not type(b) or a is None or b is None:
        return False
    pairs = [(getattr(a, part.name), getattr(b, part.name)) for part in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def _said_by(observer: nn.Module) -> Encoding | str | None:
    """The encoding of an observer, None for float; words where calibration would have to find it."""
    try:
        return encode(observer)
    except CalibrationError:
        return "found by calibration"


def _encoding(entry: GroupEncoding, place: _Place, own: Any) -> Encoding | None:
    """The encoding that an entry describes, for the tensors of ``place``."""
    match entry.encoding:
        case "float":
            return None
        case "float16":
            return Float16Encoding()
        case "on_grid":
            _check_count(entry, place, 0 if len(entry.scale) > 1 else None)
            return RoundedConstant(scale=tensor_of(entry.scale).float())
        case "dynamic":
            return _dynamic(entry, own)
    numbers: dict[str, Any] = {"dtype": _dtype(entry), "quant_min": entry.quant_min, "quant_max": entry.quant_max}
    _check_numbers(entry, numbers["dtype"])
    if entry.encoding == "per_tensor":
        if len(entry.scale) != 1 or type(entry.zero_point[0]) is not int:
            raise AnnotationError(f"'per_tensor' has one scale and one integer zero point, not {len(entry.scale)}")
        return PerTensorEncoding(scale=entry.scale[0], zero_point=entry.zero_point[0], **numbers)
    scale = tensor_of(entry.scale).to(torch.float32, copy=True)
    if entry.encoding == "per_channel":
        if entry.axis is None:
            raise AnnotationError("'per_channel' needs the axis of the channels")
        _check_count(entry, place, entry.axis)
        zero = tensor_of(entry.zero_point)
        zero = zero.to(torch.float32 if zero.is_floating_point() else torch.int64, copy=True)
        return PerChannelEncoding(scale=scale, zero_point=zero, axis=entry.axis, **numbers)
    rows = _check_groups(entry, place)
    zero = tensor_of(entry.zero_point).to(torch.int32, copy=True).reshape(rows, -1)
    return PerGroupEncoding(scale=scale.reshape(rows, -1), zero_point=zero, group_size=entry.group_size, **numbers)


def _dtype(entry: GroupEncoding) -> torch.dtype:
    known = {str(dtype).removeprefix("torch."): dtype for dtype in (*INTEGER_BOUNDS, *_FLOAT8)}
    if entry.dtype not in known:
        raise AnnotationError(f"'{entry.dtype[:80]}' is no dtype of a quantized tensor{nearest(entry.dtype, known)}")
    return known[entry.dtype]


def _check_numbers(entry: GroupEncoding, dtype: torch.dtype) -> None:
    """A range that the dtype holds, with the zero points in it."""
    low, high = entry.quant_min, entry.quant_max
    scale = tensor_of(entry.scale)
    if len(odd := scale[~((scale >= SMALLEST_SCALE) & (scale <= torch.finfo(torch.float32).max))]):
        raise AnnotationError(f"the scale {float(odd[0])} is no normal float32 number, which kernels compute with")
    if dtype not in INTEGER_BOUNDS:
        return
    held = INTEGER_BOUNDS[dtype]
    if not held[0] <= low < high <= held[1]:
        raise AnnotationError(f"the range [{low}, {high}] does not fit {entry.dtype}, which holds {list(held)}")
    zero = tensor_of(entry.zero_point)
    if not zero.is_floating_point() and len(outside := zero[(zero < low) | (zero > high)]):
        raise AnnotationError(f"the zero point {int(outside[0])} is outside of the range [{low}, {high}]")


def _check_count(entry: GroupEncoding, place: _Place, axis: int | None) -> None:
    """As many scales as the tensors have channels along ``axis``; one where that is None."""
    for tensor in place.tensors:
        if axis is not None and not 0 <= axis < tensor.dim():
            raise AnnotationError(f"it has no axis {axis}: its shape is {list(tensor.shape)}")
        size = 1 if axis is None else tensor.shape[axis]
        if type(size) is int and size != len(entry.scale):
            raise AnnotationError(
                f"{len(entry.scale)} scales for {size} channels along axis {axis} of {list(tensor.shape)}"
            )


def _check_groups(entry: GroupEncoding, place: _Place) -> int:
    """The rows of the matrix that has as many groups as there are scales."""
    rows = 0
    for tensor in place.tensors:
        size = entry.group_size
        if tensor.dim() != 2 or size < 1 or tensor.shape[1] % size:
            raise AnnotationError(f"groups of {size} do not divide the rows of a tensor of shape {list(tensor.shape)}")
        rows = int(tensor.shape[0])
        if (groups := rows * int(tensor.shape[1]) // size) != len(entry.scale):
            raise AnnotationError(f"{len(entry.scale)} scales for {groups} groups of {size} in {list(tensor.shape)}")
    return rows


def _dynamic(entry: GroupEncoding, own: Any) -> DynamicEncoding:
    """What an entry leaves out, as those of older versions do, is as the observer has it where that is dynamic."""
    said = _said_by(own)
    base = said if isinstance(said, DynamicEncoding) else None
    symmetric = entry.symmetric if entry.symmetric is not None else base is not None and base.symmetric
    eps = entry.eps or (base.eps if base is not None else None)
    grain = GRANULARITIES[entry.granularity]
    if base is not None and entry.symmetric is None and not entry.granularity:
        grain = base.granularity
    made = encode(
        PlaceholderObserver(
            dtype=_dtype(entry),
            quant_min=entry.quant_min,
            quant_max=entry.quant_max,
            qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
            eps=eps,
            is_dynamic=True,
            granularity=grain,
        )
    )
    assert isinstance(made, DynamicEncoding)
    return made


def _connect(gm: GraphModule) -> None:
    """Let observers that derive their parameters do so from the observers that are there now."""
    for _, graph in graphs_of(gm):
        now = {id(getattr(module, "activation_post_process", module)): module for module in graph.children()}
        derived = [module for module in graph.modules() if isinstance(module, DerivedObserver)]
        for module in derived:
            module.sources = [now.get(id(source), source) for source in module.sources]


def _underivable(place: _Place) -> str:
    """Why a place that is on the grid of other points has no scale; empty where it has one."""
    own = place.module
    if not isinstance(own, DerivedObserver):
        return ""
    try:
        encode(own)
    except CalibrationError as error:
        said = [_said_by(source) for source in own.sources]
        if any(isinstance(each, str) for each in said):
            return ""  # left out: calibration finds it, and the bias follows
        if any(each is None or isinstance(each, DynamicEncoding) for each in said):
            return f"it derives its scale from points that have none: {error}; make it 'float' as well"
        return str(error)
    return ""


def _with_kinds(report: Report, given: Iterable[tuple[_Place, GroupEncoding]]) -> Report:
    """The verdicts of ops whose activations become static or dynamic by what was given."""
    kinds: dict[str, str] = {}
    for place, entry in given:
        asked = DYNAMIC if getattr(place.group.spec, "is_dynamic", False) else STATIC
        made = DYNAMIC if entry.encoding == "dynamic" else STATIC
        if made != asked and entry.encoding != "float":
            kinds |= {point.dst: made for point in place.group.points if isinstance(point, Edge)}
    verdicts = tuple(
        replace(v, kind=kinds[v.op.name]) if v.kind in (STATIC, DYNAMIC) and v.op.name in kinds else v
        for v in report.verdicts
    )
    return replace(report, verdicts=verdicts)


def _notes(given: list[_Place], total: int) -> list[str]:
    """How much was given, and which parameters no longer follow from those that they are derived from."""
    notes = [f"{len(given)} of {total} groups of points have the numbers of encodings that were given"]
    for place in given:
        derived = getattr(place.module, "activation_post_process", None)
        if not isinstance(place.group.spec, DerivedFrom) or not isinstance(derived, DerivedObserver):
            continue
        try:
            wanted = torch.as_tensor(derived.calculate_qparams()[0]).flatten()
        except (CalibrationError, RuntimeError):
            continue
        scale = getattr(place.module, "scale", None)
        if isinstance(scale, Tensor) and not torch.equal(scale.flatten().float(), wanted.float()):
            notes.append(
                f"{place} keeps the scale that was given, although its sources give another one: leave its entry out "
                "to derive it"
            )
    return notes
