"""Given parameters: an observer of a prepared graph replaced by one with chosen scales and zero points.

    x → observer → op        =>        x → FixedQParamsObserver(scale, zero point) → op

Everything that asks the observer then finds exactly these numbers: conversion, simulation, comparison, and what is
derived from them. Of a constant the integers may be given as well, where they are not the nearest ones; the graph
computes with the float constant all the same.

A `GivenObserver` settles more: also that a tensor stays float, or gets its parameters at run time, and against whatever
calibration found, to the last bit of a scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from quant2e.errors import AnnotationError, CalibrationError, Quant2eError
from quant2e.graph.constants import evaluate
from quant2e.observers.base import OBSERVER_PREFIX, ObserverBase, ObserverFactory
from quant2e.observers.derived import DerivedObserver, is_fake_quantizer
from quant2e.observers.encodings import (
    CustomEncoding,
    DynamicEncoding,
    Encoding,
    PerChannelEncoding,
    PerGroupEncoding,
    PerTensorEncoding,
    RoundedConstant,
    encode,
)
from quant2e.observers.fake_quant import FakeQuantizeBase, FixedQParamsFakeQuantize
from quant2e.observers.placeholder import FixedQParamsObserver
from quant2e.ranges.qparams import FLOAT_QPARAMS, SYMMETRIC_SCHEMES

StaticEncoding = PerTensorEncoding | PerChannelEncoding | PerGroupEncoding
"""Encodings whose numbers are known before the model runs."""

_INTEGERS = "integers_of_"


def give_encoding(gm: GraphModule, name: str, encoding: StaticEncoding) -> None:
    """Let the tensors of the observer ``name`` be quantized with exactly ``encoding``, in place.

    ``gm``: a prepared graph that is the caller's own copy. ``name``: path of the observer, that of a body of control
    flow in front of its own. What the old observer measured stays, for the report; whether integers can stand for the
    tensor at all is its word still. What is derived from it follows. A fake-quantizer becomes one with these numbers,
    and keeps its switches. Raises `Quant2eError` for a name that is no observer, and `AnnotationError` where the
    numbers fit neither each other nor the tensors, or the observer writes its own nodes.
    """
    owner, leaf, old = _observer(gm, name)
    if callable(getattr(old, "convert", None)):
        raise AnnotationError(
            f"'{name}' is a {type(old).__name__}, which writes its own nodes: its numbers are its own"
        )
    fixed = _fixed(encoding, getattr(old, "qscheme", None))
    _check_shapes(owner, leaf, encoding)
    new = _trained(fixed, old) if is_fake_quantizer(old) else _measured(fixed(), old)
    if (tensor := next(iter((*old.parameters(), *old.buffers())), None)) is not None:
        new.to(tensor.device)
    new.training = old.training
    for module in list(gm.modules()):
        for child_name, child in list(module._modules.items()):
            if child is old and child_name.startswith(OBSERVER_PREFIX):
                module._modules[child_name] = new
        if isinstance(module, DerivedObserver):
            module.sources = [new if source is old else source for source in module.sources]


def give_integers(gm: GraphModule, call: Node, integers: Tensor) -> None:
    """Let the constant that ``call`` observes become exactly ``integers``, of its shape, in place.

    ``call``: of an observer that `give_encoding` put there. The graph itself computes with the float constant as
    before. Raises `Quant2eError` for another observer, and `AnnotationError` for integers of another shape or outside
    of its range.
    """
    observer = gm.get_submodule(str(call.target))
    if type(observer) is not FixedQParamsObserver:
        raise Quant2eError(f"'{call.target}' has no given encoding: integers mean nothing without one")
    value, low, high = evaluate(gm, call.all_input_nodes[0]), observer.quant_min, observer.quant_max
    assert low is not None
    assert high is not None
    if integers.shape != value.shape or integers.is_floating_point():
        raise AnnotationError(
            f"{integers.dtype} {list(integers.shape)} for '{call.all_input_nodes[0].name}': give integers of the shape "
            f"{list(value.shape)}"
        )
    if integers.numel() and not (int(integers.min()) >= low and int(integers.max()) <= high):
        raise AnnotationError(f"integers for '{call.all_input_nodes[0].name}' lie outside of [{low}, {high}]")
    name = _INTEGERS + call.name
    if hasattr(observer, name):
        delattr(observer, name)
    observer.register_buffer(name, integers.detach().to(observer.dtype, copy=True))


def integers_given(gm: GraphModule, call: Node) -> Tensor | None:
    """The integers that `give_integers` gave to the constant that ``call`` observes; None where there are none."""
    found = getattr(gm.get_submodule(str(call.target)), _INTEGERS + call.name, None)
    return found if isinstance(found, Tensor) else None


def has_integers(observer: nn.Module) -> bool:
    """Whether `give_integers` gave any to a constant that ``observer`` sees."""
    return any(name.startswith(_INTEGERS) for name, _ in observer.named_buffers(recurse=False))


def constant_of(gm: GraphModule, call: Node) -> Tensor:
    """The constant that ``call`` observes, as conversion quantizes it: on its grid where integers were given for it.

    The ops of conversion find exactly these: they store ``trunc(round(x / scale) + zero_point)``, which for
    ``x = (given - zero_point) * scale`` is the given integer up to 16 bits, as float32 is that exact; with zero points
    that are no integers, ``given - zero_point`` is first rounded to that side from which truncation reaches it.
    """
    value: Tensor = evaluate(gm, call.all_input_nodes[0])
    integers = integers_given(gm, call)
    if integers is None:
        return value
    encoding = encode(gm.get_submodule(str(call.target)))
    assert isinstance(encoding, PerTensorEncoding | PerChannelEncoding | PerGroupEncoding)
    scale, zero_point = parameters_along(encoding, integers)
    steps = integers.to(zero_point.dtype) - zero_point
    if steps.is_floating_point():
        below = torch.floor(steps)
        steps = torch.where(torch.trunc(below + zero_point) == integers, below, torch.ceil(steps))
    return steps.to(torch.float32) * scale


def parameters_along(encoding: StaticEncoding, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point for each value of ``x``, in shapes that broadcast against it: float32, and as they are."""
    scale = torch.as_tensor(encoding.scale, dtype=torch.float32, device=x.device)
    zero_point = torch.as_tensor(encoding.zero_point, device=x.device)
    zero_point = zero_point if zero_point.is_floating_point() else zero_point.to(torch.int64)
    if isinstance(encoding, PerTensorEncoding):
        return scale, zero_point
    if isinstance(encoding, PerGroupEncoding):
        rows = x.shape[:-1]
        scale, zero_point = (
            each.reshape(*rows, -1).repeat_interleave(encoding.group_size, -1) for each in (scale, zero_point)
        )
        return scale, zero_point
    shape = [1] * x.dim()
    shape[encoding.axis] = -1
    return scale.reshape(shape), zero_point.reshape(shape)


def _observer(gm: GraphModule, name: str) -> tuple[GraphModule, str, nn.Module]:
    """The graph that calls an observer, its name there, and itself."""
    path, _, leaf = name.rpartition(".")
    try:
        owner, old = gm.get_submodule(path), gm.get_submodule(name)
    except AttributeError:
        owner, old = gm, gm
    if old is owner or not leaf.startswith(OBSERVER_PREFIX) or not isinstance(owner, GraphModule):
        raise Quant2eError(f"'{name}' is no observer of this graph: take the names from what prepare_pt2e returned")
    return owner, leaf, old


def _fixed(encoding: Any, own: torch.qscheme | None) -> ObserverFactory:
    if not isinstance(encoding, PerTensorEncoding | PerChannelEncoding | PerGroupEncoding):
        kinds = "a PerTensorEncoding, PerChannelEncoding or PerGroupEncoding"
        raise AnnotationError(f"a {type(encoding).__name__} has no numbers to give: use {kinds}")
    return FixedQParamsObserver.with_args(
        scale=encoding.scale,
        zero_point=encoding.zero_point,
        dtype=encoding.dtype,
        qscheme=_scheme(encoding, own),
        quant_min=encoding.quant_min,
        quant_max=encoding.quant_max,
        ch_axis=encoding.axis if isinstance(encoding, PerChannelEncoding) else 0,
        group_size=encoding.group_size if isinstance(encoding, PerGroupEncoding) else None,
    )


def _scheme(encoding: StaticEncoding, own: torch.qscheme | None) -> torch.qscheme:
    """Symmetric only where the observer was, and all zero points are one."""
    zero_point = torch.as_tensor(encoding.zero_point)
    if zero_point.is_floating_point():
        return FLOAT_QPARAMS
    symmetric = own in SYMMETRIC_SCHEMES and bool((zero_point == zero_point.flatten()[:1]).all())
    if isinstance(encoding, PerTensorEncoding):
        return torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    return torch.per_channel_symmetric if symmetric else torch.per_channel_affine


def _check_shapes(owner: GraphModule, leaf: str, encoding: StaticEncoding) -> None:
    """As many scales as the observed tensors have channels or groups."""
    if isinstance(encoding, PerTensorEncoding):
        return
    for call in owner.graph.find_nodes(op="call_module", target=leaf):
        value = call.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        shape, count = tuple(value.shape), encoding.scale.numel()
        if isinstance(encoding, PerGroupEncoding):
            fits = len(shape) == 2 and count * encoding.group_size == shape[0] * shape[1]
            fits = fits and shape[1] % encoding.group_size == 0
            wanted = f"groups of {encoding.group_size} along the rows of a matrix"
        else:
            fits = encoding.axis < len(shape) and shape[encoding.axis] == count
            wanted = f"channels along axis {encoding.axis}"
        if not fits:
            raise AnnotationError(
                f"{count} scales for {wanted} do not fit '{call.all_input_nodes[0].name}', of shape {list(shape)}"
            )


def _measured(fixed: FixedQParamsObserver, old: nn.Module) -> nn.Module:
    """With what was measured before; see `inner_observer`."""
    before = getattr(old, "activation_post_process", None) if isinstance(old, FixedQParamsObserver) else old
    if isinstance(before, nn.Module) and not isinstance(before, DerivedObserver):
        fixed.activation_post_process = before
    return fixed


def _trained(fixed: ObserverFactory, old: Any) -> nn.Module:
    new = FixedQParamsFakeQuantize(fixed)
    new.fake_quant_enabled.copy_(old.fake_quant_enabled.flatten()[:1])
    new.disable_observer()
    new.of_constant = isinstance(old, FakeQuantizeBase) and old.of_constant
    return new


class GivenObserver(ObserverBase):
    """``encoding``: what its tensor becomes, exactly; None leaves it float.

    ``observer``: the one in whose place it stands. It goes on measuring, so that the report can say what the given
    numbers lose, and decides nothing. Tensors of the encoding are buffers: they move with the model.
    """

    scale: Tensor | None
    zero_point: Tensor | None
    observed = True
    """It needs no data."""

    def __init__(self, encoding: Encoding | None, observer: nn.Module) -> None:
        super().__init__(getattr(encoding, "dtype", torch.float32), isinstance(encoding, DynamicEncoding))
        self.activation_post_process = observer
        self._encoding = encoding
        of_tensor = isinstance(encoding, PerTensorEncoding)
        for name in ("scale", "zero_point"):
            value = getattr(encoding, name, None)
            self.register_buffer(name, torch.tensor([value]) if of_tensor else None if value is None else value.clone())
        self.quant_min, self.quant_max = getattr(encoding, "quant_min", None), getattr(encoding, "quant_max", None)
        self.qscheme, self.ch_axis = _scheme_of(encoding), getattr(encoding, "axis", None)
        self.eps = getattr(observer, "eps", None)

    def given_encoding(self) -> Encoding | None:
        """The encoding, with its tensors where the model is."""
        encoding = self._encoding
        if isinstance(encoding, RoundedConstant):
            assert self.scale is not None
            return replace(encoding, scale=self.scale)
        if isinstance(encoding, PerChannelEncoding | PerGroupEncoding):
            assert self.scale is not None
            assert self.zero_point is not None
            return replace(encoding, scale=self.scale, zero_point=self.zero_point)
        return encoding

    def forward(self, x: Tensor) -> Tensor:
        """``x``, which the observer in whose place it stands has seen."""
        self.activation_post_process(x)
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point as given: ``[1]`` or ``[channels]``, for what derives its parameters from these.

        Raises `CalibrationError` for an encoding that has none.
        """
        if self.scale is None or self.zero_point is None:
            raise CalibrationError("its encoding was given, and has no scale with a zero point")
        return self.scale, self.zero_point

    def extra_repr(self) -> str:
        return "float" if self._encoding is None else type(self._encoding).__name__


def _scheme_of(encoding: Encoding | None) -> torch.qscheme | None:
    if isinstance(encoding, PerTensorEncoding):
        return torch.per_tensor_affine
    if isinstance(encoding, PerChannelEncoding | PerGroupEncoding):
        return torch.per_channel_affine
    return None


def in_place_of(encoding: Encoding | None, observer: nn.Module) -> GivenObserver:
    """``observer`` with a given encoding; one that was given before is replaced. See `GivenObserver`."""
    assert not isinstance(encoding, CustomEncoding), "it belongs to its observer"
    return GivenObserver(
        encoding, observer.activation_post_process if isinstance(observer, GivenObserver) else observer
    )


def has_given(observer: Any) -> bool:
    """Whether what an observer's tensor becomes was given, so that nothing that it measures decides."""
    return isinstance(observer, GivenObserver)
