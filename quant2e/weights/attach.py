"""Attaching weights: a model's parameters become tensors of ``.safetensors`` files, which are read when needed.

Every name, shape and dtype is checked before the first parameter is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from quant2e.documents.nearest import nearest
from quant2e.documents.safetensors_file import TensorPlace, read_tensor
from quant2e.errors import Quant2eError
from quant2e.stored_tensor import StoredTensor
from quant2e.weights.checkpoint import tensor_places

_NAMED = 5
"""How many tensors a message names."""

_BLOCK = 1 << 24
"""Bytes of two tensors that are compared at a time."""

Model = TypeVar("Model", bound=nn.Module)


@dataclass(slots=True, eq=False)
class _Held:
    """A tensor of a model, and every name that the model has for it."""

    tensor: Tensor
    is_parameter: bool
    names: list[str] = field(default_factory=list)


def attach_weights(model: Model, weights: str | Path | Sequence[str | Path], *, ignore: Iterable[str] = ()) -> Model:
    """Let ``model`` read its weights from ``.safetensors`` files whenever they are needed, in place; returns it.

    ``weights``: a file, several, an index of shards (``model.safetensors.index.json``), or a folder with these.
    ``model``: with parameters on the meta device, as `parameters_on_meta` makes them, or on the CPU, which are dropped.
    ``ignore``: patterns (``"*.inv_freq"``) of names in the files that the model has no place for.

    Matrices stay in their files: each op that needs one reads it and drops it. Vectors (biases, norms) and buffers are
    read now. Whatever works on modules works on this one, and `quantize` of it, when no data or algorithm asks for
    more, holds the integer weights and the largest float layer. The files must stay where they are until then.

    Parameters and persistent buffers are found by their names, tied ones under any of theirs. A file's floats may be
    narrower than the parameter (bfloat16 for float32): nothing is lost. Raises `Quant2eError`, and leaves ``model`` as
    it was, for tensors that are missing or that the model has no place for, with the nearest name; for other shapes,
    dtypes and devices; for tied parameters with two values; and for buffers on the meta device that no file holds.
    Raises `FileFormatError` for damaged files.
    """
    if not isinstance(model, nn.Module):
        raise Quant2eError(f"attach_weights takes an nn.Module, not a {type(model).__name__}")
    places = _without_ignored(tensor_places(weights), ignore)
    held = _held(model)
    known = {name for item in held for name in item.names}
    _check_names(held, places, known)
    problems = [text for item in held for name in item.names if name in places for text in _wrong(item, name, places)]
    _refuse("tensors of the files do not fit the model", problems)
    _check_buffers(model, known)
    taken = [(item, _one_place(item, places)) for item in held]
    values = [_value(item, place) for item, place in taken]
    for (item, _), value in zip(taken, values, strict=True):
        for name in item.names:
            prefix, _, leaf = name.rpartition(".")
            owner = model.get_submodule(prefix)
            (owner._parameters if item.is_parameter else owner._buffers)[leaf] = value  # type: ignore[assignment]
    return model


def _without_ignored(places: Mapping[str, TensorPlace], ignore: Iterable[str]) -> dict[str, TensorPlace]:
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in places):
            raise Quant2eError(f"ignore={pattern!r} names no tensor of the files{nearest(pattern, places)}")
    return {
        name: place for name, place in places.items() if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def _held(model: nn.Module) -> list[_Held]:
    """Parameters and persistent buffers, each tensor once."""
    found: dict[tuple[int, bool], _Held] = {}
    volatile = set(_volatile(model))
    for is_parameter, tensors in (
        (True, model.named_parameters(remove_duplicate=False)),
        (False, model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in tensors:
            if name not in volatile:
                found.setdefault((id(tensor), is_parameter), _Held(tensor, is_parameter)).names.append(name)
    return list(found.values())


def _volatile(model: nn.Module) -> Iterator[str]:
    for prefix, owner in model.named_modules(remove_duplicate=False):
        yield from (f"{prefix}.{name}" if prefix else name for name in owner._non_persistent_buffers_set)


def _check_names(held: list[_Held], places: Mapping[str, TensorPlace], known: set[str]) -> None:
    missing = [item.names[0] for item in held if not any(name in places for name in item.names)]
    unexpected = [name for name in places if name not in known]
    free = [name for item in held if not any(name in places for name in item.names) for name in item.names]
    _refuse(
        "tensors of the model are not in the files",
        [f"'{name}'{nearest(name, unexpected or places)}" for name in missing],
        "Files of another version of the model, or of a part of it, name them otherwise; what shares a tensor with "
        "another module has to be tied before",
    )
    _refuse(
        "tensors of the files have no place in the model",
        [f"'{name}'{nearest(name, free or known)}" for name in unexpected],
        "Leave out those that the model does without by ignore=(pattern, …)",
    )


def _wrong(item: _Held, name: str, places: Mapping[str, TensorPlace]) -> Iterator[str]:
    """What keeps the tensor at a place from being that of the model."""
    tensor, place = item.tensor, places[name]
    if tuple(tensor.shape) != place.shape:
        yield f"'{name}' has the shape {list(place.shape)}, and {list(tensor.shape)} in the model"
    elif not _keeps(place.dtype, tensor.dtype):
        advice = f"build the model in {place.dtype}" if place.dtype.is_floating_point else "these are not its values"
        yield f"'{name}' is {place.dtype}, and {tensor.dtype} in the model: {advice}"
    if tensor.device.type not in ("meta", "cpu"):
        yield f"'{name}' lies on {tensor.device} in the model: weights are read to the CPU; move the model there first"


def _keeps(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a cast from one dtype to the other keeps every value."""
    if given == wanted:
        return True
    return given.is_floating_point and wanted.is_floating_point and torch.promote_types(given, wanted) == wanted


def _refuse(what: str, problems: Sequence[str], advice: str = "") -> None:
    if problems:
        more = len(problems) - _NAMED
        lines = [*problems[:_NAMED], *([f"and {more} more"] if more > 0 else [])]
        told = "".join(f"\n  {line}" for line in lines) + (f"\n{advice}." if advice else "")
        raise Quant2eError(f"{len(problems)} {what}:{told}")


def _check_buffers(model: nn.Module, known: set[str]) -> None:
    """Buffers that no file holds were computed by a constructor: on the meta device they have no values."""
    empty = [name for name, value in model.named_buffers(remove_duplicate=False) if value.is_meta and name not in known]
    _refuse(
        "buffers are on the meta device and in no file",
        [f"'{name}'" for name in empty],
        "Their values are what the constructor computes: build the model under quant2e.parameters_on_meta(), not "
        'torch.device("meta")',
    )


def _one_place(item: _Held, places: Mapping[str, TensorPlace]) -> TensorPlace:
    """Where a tensor lies; tied ones may lie in a file under several names, with the same values."""
    first, *others = (name for name in item.names if name in places)
    for other in others:
        if not _equal(places[first], places[other]):
            raise Quant2eError(
                f"'{first}' and '{other}' are one tensor in the model, and two in the files: build the model with "
                "these untied (config.tie_word_embeddings, in transformers)"
            )
    return places[first]


def _equal(one: TensorPlace, other: TensorPlace) -> bool:
    if one.dtype != other.dtype:
        return torch.equal(read_tensor(one).double(), read_tensor(other).double())
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        for begin in range(0, one.nbytes, _BLOCK):
            count = min(_BLOCK, one.nbytes - begin)
            if first.read(count) != second.read(count):
                return False
    return True


def _value(item: _Held, place: TensorPlace) -> Tensor:
    """What the model holds from now on."""
    tensor = item.tensor
    if not item.is_parameter:
        return read_tensor(place).to(tensor.dtype)
    stays = len(place.shape) > 1
    value = StoredTensor(place, tensor.dtype) if stays else read_tensor(place).to(tensor.dtype)
    return nn.Parameter(value, requires_grad=tensor.requires_grad)
