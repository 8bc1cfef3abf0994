"""Mutation fuzzing of ``.pt2`` files: 5,000 mutants, the same in every run.

A mutant whose hashes were left as they were is refused, or is the same model. A mutant whose hashes fit again is
refused, or is loaded; either way nothing of it runs, no error but ours comes out, and memory stays within ten times
the size of the file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quant2e
from quant2e.errors import FileFormatError
from quant2e.quantized_model import QuantizedModel, load
from quant2e.storage.manifest import MANIFEST
from tests.quant2e.annotators import DYNAMIC, products
from tests.quant2e.storage.archives import records_in, with_hashes, zipped

MARK = "QUANT2E_MUTANT_WAS_HERE"
CODE = f"__import__('os').environ.__setitem__({MARK!r}, '1')"
SECONDS = 30
"""A load that takes longer hangs."""

SLACK = 48 << 20
"""Bytes that a load may take whatever the size of the file: pages that the allocator keeps, and what is loaded once."""

CHUNKS = 10
GOLDEN = Path(__file__).parents[1] / "golden"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls.add_(1)
        y = torch.relu(self.conv(x)).mean((2, 3)) + extra["shift"]
        return {"scores": self.head(y), "mean": y}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mode: str) -> tuple[torch.Tensor, str]:
        y = torch.cond(x.sum() > 0, self.first, lambda x: x - 1.0, (x,))
        return self.second(y), mode


@pytest.fixture(scope="module")
def with_branches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    example = (torch.randn(4, 8), "fast")
    model = quant2e.quantize(Branches().eval(), example, products(act=DYNAMIC, output=None))
    path = tmp_path_factory.mktemp("mutants") / "branches.pt2"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    example = (torch.randn(4, 3, 8, 8), {"shift": torch.randn(8)})
    sizes = ({0: torch.export.Dim("batch", max=64)}, {"shift": None})
    model = quant2e.quantize(Net().eval(), example, products(), [example], dynamic_shapes=sizes)
    path = tmp_path_factory.mktemp("mutants") / "model.pt2"
    model.save(path)
    return path


# ------------------------------------------------------------------------------------------------- mutations of bytes


def flipped(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def cut(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data))]


def removed(chance: random.Random, data: bytes) -> bytes:
    begin, end = sorted(chance.choices(range(len(data)), k=2))
    return data[:begin] + data[end:]


def repeated(chance: random.Random, data: bytes) -> bytes:
    begin = chance.randrange(len(data))
    return data[:begin] + data[begin : begin + chance.randrange(1, 64)] + data[begin:]


def overwritten(chance: random.Random, data: bytes) -> bytes:
    begin = chance.randrange(len(data))
    filler = chance.choice([b"\0", b"\xff", chance.randbytes(1)]) * chance.randrange(1, 32)
    return data[:begin] + filler[: len(data) - begin] + data[begin + len(filler) :]


def lengthened(chance: random.Random, data: bytes) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 64))


BYTES = (flipped, flipped, flipped, cut, removed, repeated, overwritten, lengthened)


def in_directory(chance: random.Random, data: bytes) -> bytes:
    """A bit of the zip's directory or end."""
    begin = data.index(b"PK\1\2")
    return data[:begin] + flipped(chance, data[begin:])


def in_bytes(chance: random.Random, data: bytes, records: dict[str, bytes]) -> bytes:
    return chance.choice((*BYTES, in_directory, in_directory))(chance, data)


def in_records(chance: random.Random, data: bytes, records: dict[str, bytes]) -> bytes:
    """A well-formed archive of other records, with the hashes of the old ones."""
    records, name = dict(records), chance.choice(sorted(records))
    other = chance.choice(sorted(records))
    match chance.randrange(4):
        case 0:
            del records[name]
        case 1:
            records[name], records[other] = records[other], records[name]
        case 2:
            records[f"{name}_"] = records.pop(name)
        case _:
            records[name] = chance.choice(BYTES)(chance, records[name] or b" ")
    return zipped(records)


# ------------------------------------------------------------------------------------ mutations whose hashes fit again


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with a key or an index of it, at any depth."""
    found, pending = [], [value]
    while pending:
        held = pending.pop()
        keys = held if isinstance(held, dict) else range(len(held)) if isinstance(held, list) else ()
        found += [(held, key) for key in keys]
        pending += [held[key] for key in keys]
    return found


def _deep(chance: random.Random) -> Any:
    value: Any = 1
    for _ in range(chance.choice([40, 400])):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value


SPECIAL: tuple[Callable[[random.Random], Any], ...] = (
    *(lambda chance, value=value: value for value in (None, True, 0, -1, 1, 7, 2**31, 2**63, 2**200, -(2**63))),
    *(lambda chance, value=value: value for value in (0.5, 1e308, float("nan"), float("inf"), "", "x", "a.b", [], {})),
    *(lambda chance, text=text: text for text in (CODE, f"x')+{CODE}#", "torch.ops.aten.save", "Pow(9, Pow(9, 9))")),
    *(lambda chance, text=text: text for text in ("../../x", "__class__", "torch.ops.aten.from_file.default", "é")),
    lambda chance: "x" * 10_000,
    lambda chance: [0] * 10_000,
    _deep,
)


def edited(chance: random.Random, text: bytes) -> bytes:
    """Another JSON document: one to three values are exchanged, removed, renamed, or take each other's place."""
    document = json.loads(text)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        places = _places(document)
        if not places:
            break
        held, key = chance.choice(places)
        other, at = chance.choice(places)
        match chance.randrange(6):
            case 0 | 1:
                held[key] = chance.choice(SPECIAL)(chance)
            case 2:
                held[key] = copy.deepcopy(other[at])
            case 3:
                del held[key]
            case 4 if isinstance(held, dict):
                held[chance.choice([CODE, f"{key}_", "path_name", "name"])] = held.pop(key)
            case _:
                number = isinstance(held[key], int | float)
                held[key] = held[key] + chance.choice([-1, 1]) if number else copy.deepcopy(other[at])
    return json.dumps(document).encode()


def in_content(chance: random.Random, data: bytes, records: dict[str, bytes]) -> bytes:
    """A well-formed archive whose JSON or tensors somebody edited, who wrote hashes that fit."""
    records = dict(records)
    names = sorted(records)
    documents = [name for name in names if name.endswith(".json")]
    for _ in range(chance.choice([1, 1, 2])):
        name = chance.choice(documents * 3 + names)
        structured = name in documents and chance.random() < 0.9
        records[name] = (
            edited(chance, records[name]) if structured else chance.choice(BYTES)(chance, records[name] or b" ")
        )
        documents = [known for known in documents if known != name]
    return zipped(with_hashes(records) if MANIFEST in records else records)


# ------------------------------------------------------------------------------------------------------------- oracles


def digest(model: QuantizedModel) -> str:
    """Of all that a model computes with: its graph, the calls it takes, its tensors."""
    found = hashlib.sha256(quant2e.graph_text(model.module).encode())
    found.update(repr((model.module.inputs, model.dynamic_shapes)).encode())
    for name, tensor in sorted(model.module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


@contextmanager
def bounded_memory(limit: int) -> Iterator[None]:
    """Fail when the process grows by more than ``limit`` bytes meanwhile."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        yield
        return
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    yield
    assert _resident("VmHWM") - before <= limit


WATCHED = ("open", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "ctypes.dlopen", "socket.connect")


class Audit:
    """What this process opens, starts or connects to while it is ``on``. Audit hooks cannot be taken back."""

    def __init__(self) -> None:
        self.on, self.events = False, list[tuple[str, str]]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event in WATCHED:
            self.events.append((event, str(arguments[0]) if arguments else ""))


@cache
def audit() -> Audit:
    return Audit()


@contextmanager
def only_reading(path: Path) -> Iterator[None]:
    """Fail when meanwhile anything but ``path`` and Python's own modules is opened, or anything is started."""
    heard = audit()
    heard.events.clear()
    heard.on = True
    try:
        yield
    finally:
        heard.on = False
    others = [event for event in heard.events if event != ("open", str(path))]
    assert all(event == "open" and name.endswith((".py", ".pyc")) for event, name in others), others


def _hangs(*_: Any) -> None:
    raise TimeoutError("the load hangs")


def loaded(path: Path) -> QuantizedModel | None:
    """The model, or None for a file that is refused; fails for whatever else happens."""
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(SECONDS)
    try:
        with bounded_memory(10 * path.stat().st_size + SLACK), only_reading(path):
            try:
                return load(path)
            except FileFormatError:
                return None
    finally:
        signal.alarm(0)
        assert MARK not in os.environ


def mutants(saved: Path, chunk: int, count: int, mutate: Callable[..., bytes]) -> Iterator[tuple[int, bytes]]:
    data, records = saved.read_bytes(), records_in(saved)
    for number in range(chunk * count, (chunk + 1) * count):
        mutant = mutate(random.Random(f"{mutate.__name__} {number}"), data, records)
        if mutant != data:
            yield number, mutant


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.parametrize(("mutate", "count"), [(in_bytes, 200), (in_records, 100)], ids=["bytes", "records"])
def test_what_changed_behind_its_hashes_is_refused_or_the_same(saved, tmp_path, mutate, count, chunk):
    original = digest(load(saved))
    path, refused = tmp_path / "mutant.pt2", 0
    for number, mutant in mutants(saved, chunk, count, mutate):
        path.write_bytes(mutant)
        model = loaded(path)
        refused += model is None
        assert model is None or digest(model) == original, f"{mutate.__name__} {number}"
    assert refused >= count * 0.9


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_what_was_edited_on_purpose_runs_nothing(saved, with_branches, tmp_path, chunk):
    path, refused, accepted = tmp_path / "mutant.pt2", 0, 0
    source = (saved, with_branches, GOLDEN / "format_1.pt2", GOLDEN / "format_2.pt2")[chunk % 4]
    load(source)
    for _, mutant in mutants(source, chunk, 200, in_content):
        path.write_bytes(mutant)
        model = loaded(path)
        refused, accepted = refused + (model is None), accepted + (model is not None)
    assert refused > 0
    assert accepted > 0
