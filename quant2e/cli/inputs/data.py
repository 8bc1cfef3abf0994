"""Data as calls of a model: ``.npz`` and ``.safetensors`` files, folders of images, ``.npy`` and ``.npz`` files.

calib.npz           an array for each input, samples along the first axis; cut into batches
folder of .npy      a file is one sample, or a batch, of the one input that the model takes
folder of .npz      a file is one call
folder of images    a file is one sample; see `quant2e.cli.inputs.images`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant2e.cli.inputs.images import SUFFIXES as IMAGES
from quant2e.cli.inputs.images import Preprocessing, checked_images, image_reader
from quant2e.cli.inputs.taken import Size, Taken, TakenTensor
from quant2e.documents.arrays import read_archive, read_array
from quant2e.documents.nearest import nearest
from quant2e.documents.safetensors_file import read_safetensors
from quant2e.errors import CalibrationError, FileFormatError
from quant2e.graph.captured.calls import Call

LARGEST_BATCH = 32
"""Samples of a batch, at most, where the model takes any number and the user says none."""

_OF_SYSTEMS = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})
"""Files and folders that systems leave behind, and do not hide."""

_BATCHES = 8
"""Batches that the data is cut into, at least, where that is free: one of eight is held out, to measure on."""


@dataclass(frozen=True, slots=True)
class Batches:
    """Calls of a model, which can be read as often as one likes. ``notes``: how they were made, a sentence each."""

    source: str
    calls: Callable[[], Iterator[Call]]
    count: int
    notes: tuple[str, ...] = field(default=())

    def first(self, count: int | None) -> Batches:
        """The first ``count`` of them; all where that is None."""
        if count is None or count >= self.count:
            return self
        return Batches(
            self.source, lambda: islice(self.calls(), count), count, (*self.notes, f"{count} of {self.count} used")
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"source": self.source, "batches": self.count, "notes": list(self.notes)}

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Call]:
        return self.calls()


def read_data(path: Path, taken: Taken, batch_size: int | None, images: Preprocessing) -> Batches:
    """The data at ``path`` as calls of the model that takes ``taken``.

    ``batch_size``: samples of a call; that of the model where it is fixed, and where it varies as many as make several
    batches, `LARGEST_BATCH` at most. Raises `FileFormatError` for files that are not what their names say, and
    `CalibrationError` for data that the model does not take.
    """
    if not taken.tensors:
        raise CalibrationError("the model takes no tensor, so there is nothing that data could be given to")
    if path.is_dir():
        return _folder(path, taken, batch_size, images)
    if images.given:
        raise CalibrationError(
            f"{path} holds arrays, which are taken as they are: --image-size, --mean … are of images"
        )
    arrays, notes = _matched(_arrays(path), taken, str(path))
    counts = {len(array) if array.dim() else 0 for array in arrays}
    if counts == {0} and all(array.dim() for array in arrays):
        raise CalibrationError(f"{path} holds no sample: the first axis of every array counts them, and is 0")
    if len(counts) != 1 or 0 in counts:
        sizes = ", ".join(f"{one.name} {list(array.shape)}" for one, array in zip(taken.tensors, arrays, strict=True))
        raise CalibrationError(
            f"{path}: the first axis of every array counts the samples, and they do not agree: {sizes}. Where inputs "
            "have no such axis, give a folder of .npz files, one for each call"
        )
    for one, array in zip(taken.tensors, arrays, strict=True):
        _check(one, array, f"{one.name} in {path}", from_axis=1)
    (samples,) = counts
    size = _batch_size(taken, samples, batch_size, str(path))
    whole = samples // size

    def calls() -> Iterator[Call]:
        for start in range(0, whole * size, size):
            yield taken.call([array[start : start + size] for array in arrays])

    return Batches(str(path), calls, whole, (_cut(samples, size), *notes))


def _cut(samples: int, size: int) -> str:
    rest = f"; the last {samples % size} are left out" if samples % size else ""
    return f"{samples} samples, {samples // size} batches of {size}{rest}"


def _arrays(path: Path) -> dict[str, Tensor]:
    """Arrays of a file by name."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    members = read_archive(path, ".npz file of plain arrays (numpy.savez)")
    return {
        name.removesuffix(".npy"): torch.from_numpy(read_array(raw, f"{name} in {path}"))
        for name, raw in members.items()
    }


def _matched(arrays: Mapping[str, Tensor], taken: Taken, what: str) -> tuple[list[Tensor], list[str]]:
    """One array for each input, with its dtype; and what is to be said of that.

    By name, or in their order where no name is that of an input: one that is would be given to another input then.
    """
    names = [one.name for one in taken.tensors]
    notes = []
    if all(name in arrays for name in names):
        found = [arrays[name] for name in names]
        if left := [name for name in arrays if name not in names]:
            notes.append(f"left out, as the model does not take them: {', '.join(left)}")
    elif len(arrays) == len(names) and not any(name in arrays for name in names):
        found = list(arrays.values())
        pairs = ", ".join(f"{theirs} → {ours}" for theirs, ours in zip(arrays, names, strict=True) if theirs != ours)
        notes.append(f"arrays in the order of the inputs: {pairs}")
    else:
        missing = [name for name in names if name not in arrays]
        close = nearest(missing[0], arrays) if arrays else ""
        raise CalibrationError(
            f"{what} holds {', '.join(arrays) or 'no array'}, and the model takes {taken}: no array for "
            f"{', '.join(missing)}{close}"
        )
    return [_cast(array, one, what, notes) for array, one in zip(found, taken.tensors, strict=True)], notes


def _cast(array: Tensor, one: TakenTensor, what: str, notes: list[str]) -> Tensor:
    """The array with the dtype of an input, where both are floats, or both are integers and hold the same numbers."""
    if array.dtype is one.dtype:
        return array
    have, want = (str(dtype).removeprefix("torch.") for dtype in (array.dtype, one.dtype))
    cast = array.to(one.dtype)
    floats = array.is_floating_point() and cast.is_floating_point()
    kept = not array.is_floating_point() and not cast.is_floating_point() and bool((cast == array).all())
    if not floats and not kept:
        raise CalibrationError(
            f"{what}: {one.name} is {have}, and the model takes {want}. Give what the model is called with, scaled and "
            "normalised as it is in use"
        )
    notes.append(f"{one.name}: {have} → {want}")
    return cast


def _check(one: TakenTensor, array: Tensor, what: str, *, from_axis: int = 0) -> None:
    if not one.fits(array.shape, from_axis=from_axis):
        count = "samples × " if from_axis else ""
        raise CalibrationError(f"{what} is {list(array.shape)}, and the model takes {count}{one}")


def _batch_size(taken: Taken, samples: int, asked: int | None, what: str) -> int:
    """Samples of a call. Raises `CalibrationError` for a number that the model does not take."""
    axes: list[Size] = [one.sizes[0] if one.sizes else 0 for one in taken.tensors]
    fixed = {size for size in axes if isinstance(size, int)}
    most = min((size[1] for size in axes if not isinstance(size, int) and size[1] is not None), default=samples)
    least = max((size[0] for size in axes if not isinstance(size, int)), default=1)
    if fixed:
        size = min(fixed)
        if len(fixed) > 1 or (asked is not None and asked != size):
            raise CalibrationError(f"the model takes {taken}: its batch is fixed, and --batch-size is not {asked}")
    else:
        size = asked or max(least, 1, min(most, LARGEST_BATCH, samples // _BATCHES))
        if not max(least, 1) <= size <= most and asked is not None:
            raise CalibrationError(f"--batch-size {asked}: the model takes {least} to {most} samples of this data")
    if size < 1 or samples < size:
        raise CalibrationError(f"{what} holds {samples} sample(s), and the model takes {size} at a time")
    return size


def _folder(path: Path, taken: Taken, batch_size: int | None, images: Preprocessing) -> Batches:
    """The files of a folder that are data: all of one kind."""
    kinds = {".npy": "npy", ".npz": "npz", **dict.fromkeys(IMAGES, "images")}
    files, left = _data_files(path, kinds)
    found = {kinds[file.suffix.lower()] for file in files}
    if len(found) != 1:
        what = f"files of several kinds ({', '.join(sorted(found))})" if found else "no image, .npy or .npz file"
        raise CalibrationError(f"{path} holds {what}: data is one kind of files, {', '.join(IMAGES)}, .npy or .npz")
    (kind,) = found
    if images.given and kind != "images":
        raise CalibrationError(
            f"{path} holds arrays, which are taken as they are: --image-size, --mean … are of images"
        )
    if kind == "npz":
        _, notes = _matched(_arrays(files[0]), taken, str(files[0]))
        said = (f"{len(files)} files, one call each", *left, *notes)
        return Batches(str(path), lambda: _calls(files, taken), len(files), said)
    if len(taken.tensors) != 1:
        raise CalibrationError(f"{path} holds {kind} for one input, and the model takes {taken}: give .npz files")
    if kind == "images":
        read, notes = image_reader(taken.tensors[0], images)
        notes += checked_images(files)
    else:
        read, notes = (lambda file: _npy(file, taken)), []
        if read(files[0]).dim() == len(taken.tensors[0].sizes):
            said = (f"{len(files)} files, one batch each", *left)
            return Batches(str(path), lambda: (taken.call([read(file)]) for file in files), len(files), said)
    size = _batch_size(taken, len(files), batch_size, str(path))
    whole = len(files) // size

    def calls() -> Iterator[Call]:
        stream = iter(files)
        for _ in range(whole):
            yield taken.call([_stacked([read(file) for file in islice(stream, size)], path)])

    return Batches(str(path), calls, whole, (_cut(len(files), size), *left, *notes))


def _data_files(path: Path, kinds: Collection[str]) -> tuple[list[Path], list[str]]:
    """The files of a folder, and of those in it, that are data by their suffix, in order; and what is left out, said.

    Hidden ones are what systems leave beside images, under names that end as theirs do.
    """
    files: list[Path] = []
    left: Counter[str] = Counter()
    for file in sorted(path.rglob("*")):
        if file.is_dir():
            left["folders that are links"] += file.is_symlink()
            continue
        parts = file.relative_to(path).parts
        if any(part.startswith(".") or part in _OF_SYSTEMS for part in parts):
            left["hidden"] += 1
        elif file.suffix.lower() not in kinds:
            left[file.suffix or "no suffix"] += 1
        elif not file.is_file():
            left["no files, or links to nothing"] += 1
        else:
            files.append(file)
    said = ", ".join(f"{count} ({kind})" for kind, count in left.most_common(5) if count)
    return files, [f"left out: {said}"] if said else []


def _calls(files: Sequence[Path], taken: Taken) -> Iterator[Call]:
    names: list[str] | None = None
    for file in files:
        found = _arrays(file)
        if names is not None and sorted(found) != names:
            raise CalibrationError(f"{file} holds {', '.join(found)}, and {files[0]} holds {', '.join(names)}")
        names = sorted(found)
        arrays, _ = _matched(found, taken, str(file))
        for one, array in zip(taken.tensors, arrays, strict=True):
            _check(one, array, f"{one.name} in {file}")
        yield taken.call(arrays)


def _npy(file: Path, taken: Taken) -> Tensor:
    """One sample, or a batch where it has the batch's axis."""
    (one,) = taken.tensors
    array = _cast(torch.from_numpy(read_array(file.read_bytes(), str(file))), one, str(file), [])
    sample = array.dim() == len(one.sizes) - 1
    _check(one, array[None] if sample else array, str(file), from_axis=1 if sample else 0)
    return array


def _stacked(samples: list[Tensor], path: Path) -> Tensor:
    if len({tuple(sample.shape) for sample in samples}) != 1:
        raise FileFormatError(f"{path}: files of one batch hold arrays of different sizes; give --batch-size 1")
    return torch.stack(samples)
