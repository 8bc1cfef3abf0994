"""The order of the rooms: which sub-package may import which, and that no files import each other in a circle.

A room is a folder, or a file that lies directly in one of the three packages. It may import itself and the rooms in
front of it in `ROOMS`; an ``__init__`` gathers what its folder offers, so only a package's own counts as a room. How
the three packages stand to each other is held by ``test_layering.py``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS: Mapping[str, tuple[str, ...]] = {
    "quant2e": (
        "errors",
        "versions",
        "stages",
        "files",
        "checksum",
        "cpu",
        "isolation",
        "stored_tensor",
        "documents",
        "graph",
        "graph/captured",
        "annotation",
        "ranges",
        "weights",
        "observers/native",
        "observers",
        "passes",
        "training",
        "pytorch_quantization",
        "page",
        "report",
        "prepare",
        "calibration",
        "integer/arithmetic",
        "integer/ops",
        "integer",
        "convert",
        "quantized_io",
        "storage/reader",
        "storage/writer",
        "storage",
        "quantized_model",
        "accuracy",
        "accuracy/algorithms/layers",
        "accuracy/algorithms/channels",
        "accuracy/algorithms/rounding",
        "accuracy/algorithms",
        "accuracy/recipe",
        "accuracy/tuning/space",
        "accuracy/tuning",
        "pipeline",
        "pt2e",
        "signature_types",
        "interface",
        "__init__",
        "cli/inputs",
        "cli",
        "__main__",
    ),
    "quantizers": (
        "capabilities",
        "rewrites",
        "kit",
        "settings",
        "composable",
        "embedding",
        "int16",
        "x86",
        "openvino",
        "xnnpack",
        "torchao",
        "__init__",
        "conformance",
    ),
    "lowering": (
        "signature",
        "bounds",
        "io_parameters",
        "export",
        "state",
        "verify",
        "own_noise",
        "parts",
        "choices",
        "first_difference",
        "check",
        "control_flow",
        "program",
        "rewrites",
        "inductor/kernels",
        "inductor/rewrites",
        "native/kernels",
        "native/units",
        "native",
        "inductor",
        "native/program",
        "executorch/xnnpack/legalize",
        "executorch/xnnpack",
        "executorch",
        "onnx",
        "openvino",
        "files",
        "language_models",
        "__init__",
        "bench",
    ),
}
"""The rooms of each package, in the order in which data meets them: each imports only those in front of it."""

MOST_FILES = 16
"""Python files in one folder: a folder that holds more is two."""

FLOORS = 15
"""The longest way down through the rooms of the core."""


def room_of(path: str) -> tuple[str, str]:
    """Package and room of a file of one of the packages."""
    package, *folders, name = path.removesuffix(".py").split("/")
    return package, "/".join(folders) or name


def sources() -> dict[str, str]:
    found = (file for package in ROOMS for file in sorted((ROOT / package).rglob("*.py")))
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in found}


def imported(path: str, source: str, files: Mapping[str, str]) -> Iterator[str]:
    """Files of the project that a file imports, at whatever depth of it."""
    for node in ast.walk(ast.parse(source, path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            places = (f"{'/'.join(parts[:end])}{ending}" for end in (len(parts), len(parts) - 1) for ending in ENDINGS)
            if (place := next((place for place in places if place in files), None)) is not None:
                yield place


ENDINGS = (".py", "/__init__.py")


def graph(files: Mapping[str, str]) -> dict[str, set[str]]:
    return {path: set(imported(path, source, files)) - {path} for path, source in files.items()}


def misplaced(files: Mapping[str, str]) -> list[str]:
    """One line per import of a room that comes later, or that has no place."""
    lines = []
    for path, found in graph(files).items():
        package, room = room_of(path)
        if room not in ROOMS[package]:
            lines.append(f"{path}: '{room}' has no place in tests/test_rooms.py")
            continue
        gathers = path.endswith("/__init__.py") and path != f"{package}/__init__.py"
        for other in sorted(found):
            other_package, other_room = room_of(other)
            later = other_room in ROOMS[package] and ROOMS[package].index(other_room) > ROOMS[package].index(room)
            if other_package == package and later and not gathers:
                lines.append(f"{path} imports {other}: '{other_room}' comes after '{room}'")
    return lines


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Some nodes that lead back to each other; empty when there are none."""
    left = {node: set(targets) for node, targets in edges.items()}
    while free := [node for node, targets in left.items() if not targets & left.keys()]:
        for node in free:
            del left[node]
    return sorted(left)


def floors(files: Mapping[str, str], package: str) -> int:
    """Rooms on the longest way from a room down to one that imports nothing."""
    order = ROOMS[package]
    below: dict[str, set[str]] = {room: set() for room in order}
    for path, found in graph(files).items():
        own, room = room_of(path)
        if own == package and not path.endswith(("__init__.py", "/interface.py")):
            below[room] |= {other for of, other in map(room_of, found) if of == package and other != room}
    heights: dict[str, int] = {}
    for room in order:
        heights[room] = 1 + max((heights.get(other, 0) for other in below[room]), default=0)
    return max(heights.values())


def test_each_room_imports_only_those_in_front_of_it():
    assert misplaced(sources()) == []


def test_no_files_import_each_other_in_a_circle():
    assert circle(graph(sources())) == []


def test_every_room_of_the_order_exists():
    real = {room_of(path) for path in sources()}
    assert [
        f"{package}/{room}" for package, rooms in ROOMS.items() for room in rooms if (package, room) not in real
    ] == []


def test_a_folder_holds_about_fifteen_files():
    folders = [
        folder for package in ROOMS for folder in [ROOT / package, *(ROOT / package).rglob("*")] if folder.is_dir()
    ]
    crowded = {
        str(folder.relative_to(ROOT)): count
        for folder in folders
        if (count := len([*folder.glob("*.py")])) > MOST_FILES
    }
    assert crowded == {}


def test_the_core_has_few_floors():
    assert floors(sources(), "quant2e") <= FLOORS


WRONG = [
    ("quant2e/graph/capture.py", "from quant2e.observers.base import x", "'observers' comes after 'graph'"),
    ("quant2e/graph/capture.py", "def f():\n    import quant2e.observers.base", "'observers' comes after 'graph'"),
    ("quant2e/novelty/a.py", "", "'novelty' has no place"),
    ("lowering/verify.py", "from lowering.onnx import lower", "'onnx' comes after 'verify'"),
]


@pytest.mark.parametrize(("path", "source", "said"), WRONG)
def test_wrong(path, source, said):
    files = {"quant2e/observers/base.py": "", "lowering/onnx/lower.py": "", path: source}
    (line,) = misplaced(files)
    assert said in line


def test_circles_are_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]
