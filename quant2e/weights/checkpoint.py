"""Checkpoints in ``.safetensors`` files: one file, several, or a folder with an index; which tensor lies where.

Only headers are read. An index is what Hugging Face writes beside shards: ``{"weight_map": {name: file}}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quant2e.documents.json_text import read_json
from quant2e.documents.nearest import nearest
from quant2e.documents.safetensors_file import TensorPlace, read_header
from quant2e.errors import FileFormatError, Quant2eError

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"
_NAMED = 3


def tensor_places(weights: str | Path | Sequence[str | Path]) -> dict[str, TensorPlace]:
    """Where each tensor of a checkpoint lies, by name.

    ``weights``: a ``.safetensors`` file, several of them, an index, or a folder with an index or with such files.
    Raises `FileFormatError` when a file is damaged, two files have a tensor of one name, or an index does not fit its
    files; `Quant2eError` when there are none.
    """
    if not isinstance(weights, str | Path):
        paths = [Path(path) for path in weights]
        if not paths:
            raise Quant2eError("no file of weights is given: give a folder, or .safetensors files")
        return _of_files(paths)
    path = Path(weights)
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise Quant2eError(f"{path} does not exist{nearest(path.name, beside)}")
    return _of_index(path) if path.name.endswith(INDEX) else _of_files([path])


def _of_folder(folder: Path) -> dict[str, TensorPlace]:
    names = sorted(entry.name for entry in folder.iterdir())
    indices = [name for name in names if name.endswith(INDEX)]
    if len(indices) > 1:
        raise Quant2eError(f"{folder} holds {len(indices)} indices, {_listed(indices)}: give the one that is meant")
    if indices:
        return _of_index(folder / indices[0])
    files = [folder / name for name in names if name.endswith(SUFFIX)]
    if not files:
        others = f"; it holds {_listed(names)}" if names else ""
        raise Quant2eError(
            f"{folder} holds no {SUFFIX} file{others}. Weights in other formats are saved as such with "
            "model.save_pretrained(folder), or safetensors.torch.save_file(model.state_dict(), file)"
        )
    return _of_files(files)


def _of_files(paths: Iterable[Path]) -> dict[str, TensorPlace]:
    found: dict[str, TensorPlace] = {}
    for path in paths:
        for name, place in read_header(path).items():
            if name in found:
                raise FileFormatError(
                    f"'{name}' lies in {found[name].path} and in {path}: give files of one checkpoint"
                )
            found[name] = place
    return found


def _of_index(index: Path) -> dict[str, TensorPlace]:
    listed = _weight_map(index)
    found = _of_files(index.parent / file for file in sorted(set(listed.values())))
    for name, file in listed.items():
        if name not in found or found[name].path.name != file:
            raise FileFormatError(f"{index} says that '{name}' lies in {file}, which does not hold it")
    if unlisted := [name for name in found if name not in listed]:
        raise FileFormatError(f"{index} does not list {_listed(unlisted)}, which its files hold")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    data: Any = read_json(index.read_bytes(), str(index))
    listed = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise FileFormatError(f"{index} is no index of weights: it has no 'weight_map' of names and files")
    for name, file in listed.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(SUFFIX):
            raise FileFormatError(f"{index} says that '{name}' lies in {str(file)[:80]!r}: no {SUFFIX} file beside it")
        if not (index.parent / file).is_file():
            raise FileFormatError(f"{index} names {file}, which is not beside it")
    return listed


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + more
