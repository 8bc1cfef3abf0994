"""Archives: what is written byte by byte, what other readers make of it, and sizes beyond 4 GiB."""

import io
import mmap
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.storage.writer.archive import write_records


def written(*records):
    buffer = io.BytesIO()
    write_records(buffer, records)
    return buffer.getvalue()


def test_the_bytes():
    header, data, entry, end = "504b0304", b"xyz".hex(), "504b0102", "504b0506"
    # version 2.0, no flags, stored, midnight of 1980-01-01, checksum, sizes, length of the name
    shared = "1400 0000 0000 0000 2100 67ba8eeb 03000000 03000000 0900".replace(" ", "")
    name = b"archive/a".hex()
    padding = (b"FB\x15\x00" + b"Z" * 21).hex()
    parts = (
        *(header, shared, "1900", name, padding, data),
        *(entry, "1400", shared, "0000", "0000", "0000", "0000", "00000000", "00000000", name),
        *(end, "0000", "0000", "0100", "0100", "37000000", "43000000", "0000"),
    )
    assert written(("a", b"xyz")).hex() == "".join(parts)


NAMES = st.text("abc/._0", min_size=1, max_size=9).filter(lambda name: not name.startswith("/"))


@given(st.dictionaries(NAMES, st.binary(max_size=200), max_size=6))
@settings(max_examples=100, deadline=None)
def test_other_readers(records):
    data = written(*records.items())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()} == records
        for entry in archive.infolist():
            assert (entry.external_attr, entry.internal_attr, entry.flag_bits, entry.extra, entry.comment) == (
                0,
                0,
                0,
                b"",
                b"",
            )
            assert entry.compress_type == zipfile.ZIP_STORED


def test_data_is_aligned_and_read_by_torch():
    records = {".data/version": b"6\n", **{f"data/weights/weight_{i}": bytes(range(i)) for i in range(70)}}
    data = written(*records.items())
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    assert sorted(reader.get_all_records()) == sorted(records)
    for name, content in records.items():
        assert reader.get_record_offset(name) % 64 == 0
        assert reader.get_record(name) == content


@pytest.mark.slow
def test_sizes_beyond_4_gib(tmp_path):
    size = (1 << 32) + 5
    path = tmp_path / "large.zip"
    with mmap.mmap(-1, size) as zeros, path.open("wb") as file:

        class Holes:
            def write(self, data):
                if len(data) == size:
                    file.seek(size, 1)
                else:
                    file.write(data)

        write_records(Holes(), [(".data/version", b"6\n"), ("large", memoryview(zeros)), ("small", b"xyz")])
    with zipfile.ZipFile(path) as archive:
        assert [entry.file_size for entry in archive.infolist()] == [2, size, 3]
        assert archive.read("archive/small") == b"xyz"
        assert archive.testzip() is None
    reader = torch._C.PyTorchFileReader(str(path))
    assert reader.get_record_size("large") == size
    assert reader.get_record("small") == b"xyz"
    assert reader.get_record_offset("small") % 64 == 0


@pytest.mark.slow
def test_more_records_than_16_bits_count():
    count = (1 << 16) + 3
    data = written(*((f"{number}", b"") for number in range(count)))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.namelist()) == count
