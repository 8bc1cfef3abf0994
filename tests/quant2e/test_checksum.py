"""Checksums inside files: every flipped bit of the file is found, and a file without one is said to have none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant2e.checksum import BLANK, WORD, check_content, check_file, sealed
from quant2e.errors import FileFormatError

CONTENT = sealed(b"\0\1 a key: quant2e_sha256, a value: " + BLANK.encode() + b" and what is behind it")


def test_the_digits_are_the_sha256_with_zeros_in_their_place():
    digits = "ebe239246b4844ba666d806e9356466ddb43ba2cec244dc56e40bd772b197b77"
    assert sealed(BLANK.encode()).decode() == f"{WORD}:{digits}:{WORD}"
    assert check_content(CONTENT, "x")


def test_every_flipped_bit_is_found():
    for bit in range(8 * len(CONTENT)):
        damaged = bytearray(CONTENT)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FileFormatError, match=r"^model was damaged, or edited|^model is damaged"):
            check_content(bytes(damaged), "model")


@given(st.integers(0, len(CONTENT)), st.binary(max_size=8), st.integers(0, 8))
def test_no_edit_passes(at, put, cut):
    edited = CONTENT[:at] + put + CONTENT[at + cut :]
    if edited != CONTENT:
        with pytest.raises(FileFormatError):
            check_content(edited, "model")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (CONTENT + CONTENT, "it carries two checksums"),
        (CONTENT[:-60], "what is left of its checksum cannot be read"),
        (CONTENT + b"!", "its bytes do not have the SHA-256 that it carries"),
    ],
)
def test_what_is_said(content, said):
    with pytest.raises(FileFormatError, match=said):
        check_content(content, "model")


def test_files(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(CONTENT)
    assert check_file(path)
    path.write_bytes(b"made by something else")
    assert not check_file(path)
    path.write_bytes(CONTENT.replace(b"behind", b"beyond"))
    with pytest.raises(FileFormatError, match=f"{path} was damaged, or edited, since it was written"):
        check_file(str(path))
    path.write_bytes(b"")
    with pytest.raises(FileFormatError, match="is empty"):
        check_file(path)
    with pytest.raises(FileNotFoundError):
        check_file(tmp_path / "none")
