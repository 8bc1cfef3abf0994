"""Manifests: any change of any record is noticed, and said by name."""

import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant2e.errors import FileFormatError
from quant2e.storage.manifest import MANIFEST, check_manifest, manifest_text, sha256

RECORDS = {"archive_format": b"pt2", "models/model.json": b"{}", "data/weights/weight_0": bytes(range(256))}


def with_manifest(records):
    return {**records, MANIFEST: manifest_text({name: sha256(data) for name, data in records.items()})}


def test_the_text():
    assert manifest_text({"b": sha256(b""), "a": sha256(b"abc")}).decode() == (
        '{"format":1,"sha256":{'
        '"a":"ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",'
        '"b":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}}'
    )


def test_records_that_fit():
    assert check_manifest(with_manifest(RECORDS))
    assert check_manifest({name: memoryview(data) for name, data in with_manifest(RECORDS).items()})
    assert check_manifest(dict(reversed(with_manifest(RECORDS).items())))
    assert check_manifest(with_manifest({}))


def test_no_manifest():
    assert not check_manifest(RECORDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models/model.json": b"{ }"}, "changed: 'models/model.json'$"),
        ({"models/other.json": b"{}"}, "not in the manifest: 'models/other.json'$"),
        ({"archive_format": None}, "missing: 'archive_format'$"),
        ({"archive_format": b"", "models/model.json": None}, "changed: 'archive_format'; missing: 'models/model.json'"),
        ({f"extra/{i}": b"" for i in range(5)}, "manifest: 'extra/0', 'extra/1', 'extra/2' and 2 more"),
    ],
)
def test_records_that_do_not_fit(change, message):
    records = {name: data for name, data in {**with_manifest(RECORDS), **change}.items() if data is not None}
    with pytest.raises(FileFormatError, match=message):
        check_manifest(records)


WHOLE = json.loads(with_manifest(RECORDS)[MANIFEST])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b"[]",
        b"3",
        b"\xff",
        b'{"format":1}',
        b'{"format":1,"sha256":3}',
        json.dumps(WHOLE).encode(),
        json.dumps({**WHOLE, "format": 2}, separators=(",", ":")).encode(),
        json.dumps({**WHOLE, "more": 1}, separators=(",", ":")).encode(),
        json.dumps(WHOLE, separators=(",", ":")).encode() + b"\n",
        json.dumps(WHOLE, separators=(",", ":")).upper().encode(),
    ],
    ids=lambda text: repr(text[:40]),
)
def test_manifests_in_another_form(text):
    with pytest.raises(FileFormatError, match="damaged or edited"):
        check_manifest({**RECORDS, MANIFEST: text})


NAMES = st.text(string.ascii_letters + string.digits + "/._", min_size=1, max_size=20)


@given(st.dictionaries(NAMES, st.binary(max_size=20), min_size=1, max_size=5), st.data())
@settings(max_examples=100, deadline=None)
def test_every_flipped_bit(records, data):
    records = with_manifest(records)
    name = data.draw(st.sampled_from([name for name in sorted(records) if records[name]]))
    flipped = bytearray(records[name])
    flipped[data.draw(st.integers(0, len(flipped) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert check_manifest(records)
    with pytest.raises(FileFormatError):
        check_manifest({**records, name: bytes(flipped)})
