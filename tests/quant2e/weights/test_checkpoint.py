"""Folders, files and indices of ``.safetensors``: which tensor lies where, and what does not fit together."""

import json

import pytest
import torch

from quant2e.documents.safetensors_file import read_tensor
from quant2e.errors import FileFormatError, Quant2eError
from quant2e.weights.checkpoint import tensor_places
from tests.quant2e.weights.checkpoints import write_safetensors, write_shards

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
INDEX = "model.safetensors.index.json"


def check(places):
    assert places.keys() == TENSORS.keys()
    for name, place in places.items():
        assert place.shape == tuple(TENSORS[name].shape)
        assert torch.equal(read_tensor(place), TENSORS[name])


def test_a_folder_an_index_and_files_are_read(tmp_path):
    folder = write_shards(tmp_path, TENSORS)
    check(tensor_places(folder))
    check(tensor_places(str(folder / INDEX)))
    files = sorted(folder.glob("*.safetensors"))
    check(tensor_places(files))
    (folder / INDEX).unlink()
    check(tensor_places(folder))
    check(tensor_places(write_safetensors(tmp_path / "all.safetensors", TENSORS)))


def rewritten(folder, **listed):
    data = json.loads((folder / INDEX).read_text())
    data["weight_map"].update(listed)
    (folder / INDEX).write_text(json.dumps(data))


def test_what_does_not_fit_together_is_refused(tmp_path):
    folder = write_shards(tmp_path, TENSORS)
    first, second = sorted(folder.glob("*.safetensors"))
    with pytest.raises(FileFormatError, match="'a' lies in .* and in "):
        tensor_places([first, first])
    with pytest.raises(Quant2eError, match="no file of weights is given"):
        tensor_places([])
    with pytest.raises(Quant2eError, match=r"does not exist; did you mean 'model-00001-of-00002.safetensors'"):
        tensor_places(folder / "model-0001-of-0002.safetensors")
    rewritten(folder, a=second.name)
    with pytest.raises(FileFormatError, match=f"says that 'a' lies in {second.name}, which does not hold it"):
        tensor_places(folder)
    rewritten(folder, a="../x.safetensors")
    with pytest.raises(FileFormatError, match="no .safetensors file beside it"):
        tensor_places(folder)
    rewritten(folder, a="x.safetensors")
    with pytest.raises(FileFormatError, match=r"names x.safetensors, which is not beside it"):
        tensor_places(folder)
    (folder / INDEX).write_text("{}")
    with pytest.raises(FileFormatError, match="it has no 'weight_map'"):
        tensor_places(folder)
    write_shards(folder, TENSORS)
    write_safetensors(first, {"a": TENSORS["a"], "c": TENSORS["c"], "d": TENSORS["a"]})
    with pytest.raises(FileFormatError, match="does not list 'd', which its files hold"):
        tensor_places(folder)
    (folder / f"other.{INDEX}").write_text("{}")
    with pytest.raises(Quant2eError, match="holds 2 indices"):
        tensor_places(folder)


def test_a_folder_without_such_files_says_what_it_holds(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(Quant2eError, match=r"holds no .safetensors file; it holds 'pytorch_model.bin'"):
        tensor_places(tmp_path)
