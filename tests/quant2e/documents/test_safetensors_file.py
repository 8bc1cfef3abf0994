"""Our reader of ``.safetensors`` files beside the library's own, and on files that are changed."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quant2e.documents.safetensors_file import read_safetensors
from quant2e.errors import FileFormatError

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([True, False]),
    "c": torch.zeros(0, 4, dtype=torch.int64),
    "d": torch.tensor(2.5, dtype=torch.bfloat16),
    "e": torch.tensor([-3, 4], dtype=torch.int8),
}


def test_what_the_library_writes_is_read(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor)


def written(path, header, content):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "content", "said"),
    [
        ({"a": entry()}, b"1234567", "is damaged"),
        ({"a": entry()}, b"123456789", "overlap, or leave bytes between them"),
        ({"a": entry(), "b": entry()}, b"12345678", "overlap"),
        ({"a": entry(shape=(3,))}, b"12345678", r"F32\[3\] does not have 8 bytes"),
        ({"a": entry(dtype="F99")}, b"12345678", "has the dtype 'F99'"),
        ({"a": entry(shape=(-2,))}, b"12345678", "a shape or offsets that are none"),
        ({"a": {"dtype": "F32"}}, b"12345678", "is not described by"),
        ([1], b"", "is no object"),
        (b"{", b"", "is not JSON"),
    ],
)
def test_what_is_not_so_is_refused(tmp_path, header, content, said):
    with pytest.raises(FileFormatError, match=said):
        read_safetensors(written(tmp_path / "x.safetensors", header, content))


@given(at=st.integers(0, 200), value=st.integers(0, 255))
def test_any_change_is_a_reading_or_an_error_of_ours(tmp_path_factory, at, value):
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    raw = bytearray(written(path, {"a": entry(), "b": entry("I64", (1, 1), (8, 16))}, bytes(16)).read_bytes())
    raw[at % len(raw)] = value
    path.write_bytes(raw)
    try:
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_safetensors(path).values())
    except FileFormatError as error:
        assert "x.safetensors" in str(error)  # noqa: PT017
