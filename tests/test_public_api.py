"""What users can import, as text: names, signatures, methods.
A change of the interface is a change of a golden file.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib import metadata
from pathlib import Path
from types import ModuleType, UnionType
from typing import ForwardRef, Literal, get_args, get_origin, is_typeddict

import pytest

PACKAGES = ("quant2e", "quantizers", "lowering")
PUBLIC = (
    *PACKAGES,
    "quant2e.integer",
    "quant2e.accuracy.algorithms",
    "quant2e.pt2e",
    "quant2e.pytorch_quantization",
    "quant2e.signature_types",
    "quant2e.training",
    "quant2e.weights",
    "lowering.language_models",
    "quantizers.conformance",
)
"""Modules whose ``__all__`` is the interface."""

ROOT = Path(__file__).parents[1]


class Bare(str):
    """An annotation that is printed as it was written."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def bare(annotation: object) -> object:
    written = getattr(annotation, "__forward_arg__", annotation)
    return Bare(written) if isinstance(written, str) else annotation


def signature(target: object) -> str:
    """The signature as written; addresses, which differ from run to run, are left out."""
    found = inspect.signature(target)
    parameters = [p.replace(annotation=bare(p.annotation)) for p in found.parameters.values()]
    found = found.replace(parameters=parameters, return_annotation=bare(found.return_annotation))
    text = re.sub(r" at 0x[0-9a-f]+", "", str(found))
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)


def is_method(member: object) -> bool:
    return isinstance(member, property | staticmethod | classmethod) or inspect.isfunction(member)


def own_members(owner: type, public: frozenset[type]) -> Iterator[tuple[str, object]]:
    """Public methods and properties that a class adds to its public bases; what comes from torch is torch's.

    Fields are not among them: they are in the signature of the class.
    """
    ours = [base for base in owner.__mro__ if base.__module__.split(".")[0] in PACKAGES]
    listed = {name for base in ours if base in public and base is not owner for name in vars(base)} | {"extra_repr"}
    found = {name: member for base in reversed(ours) for name, member in vars(base).items() if is_method(member)}
    for name in sorted(found):
        overridden = name in vars(owner) and name not in {"forward", "extra_repr"}
        if (not name.startswith("_") or name == "__call__") and (name not in listed or overridden):
            yield name, found[name]


def member_line(name: str, member: object) -> str:
    match member:
        case staticmethod() | classmethod():
            return f"    {name}{signature(member.__func__)}  [{type(member).__name__}]"
        case property():
            return f"    {name} -> {inspect.signature(member.fget).return_annotation}"
    return f"    {name}{signature(member)}"


def describe(name: str, target: object, public: frozenset[type]) -> Iterator[str]:
    """One line for a name, and for a class one more per method and property of its own."""
    if inspect.isclass(target):
        if is_typeddict(target):
            fields = ", ".join(f"{key}: {bare(kept)}" for key, kept in inspect.get_annotations(target).items())
            yield f"class {name}(TypedDict): ({fields})"
            return
        bases = ", ".join(base.__name__ for base in target.__bases__ if base is not object)
        head = f"class {name}({bases})" if bases else f"class {name}"
        if target.__name__ != name:
            yield f"{name} = {target.__name__}"
            return
        if issubclass(target, Enum):  # its signature is Python's, and differs between releases
            yield f"{head}: {', '.join(target.__members__)}"
            return
        yield head if issubclass(target, BaseException) else f"{head}: {signature(target)}"
        yield from (member_line(*member) for member in own_members(target, public))
    elif inspect.isfunction(inspect.unwrap(target)):
        yield f"{name}{signature(target)}"
    elif isinstance(target, ModuleType):
        yield f"module {name}"
    elif isinstance(target, UnionType) or get_origin(target):
        yield f"{name} = {target}"
    else:
        yield f"{name}: {type(target).__name__}"


def undocumented(name: str, target: object) -> Iterator[str]:
    """Names of functions, classes, methods and properties without a sentence of their own."""
    if inspect.isclass(target):
        generated = f"{target.__name__}("  # what @dataclass writes when the author wrote nothing
        if not target.__doc__ or target.__doc__.startswith(generated):
            yield name
        for member_name, _ in own_members(target, frozenset()):
            if not inspect.getdoc(getattr(target, member_name)):
                yield f"{name}.{member_name}"
    elif (inspect.isroutine(inspect.unwrap(target)) or isinstance(target, ModuleType)) and not inspect.getdoc(target):
        yield name


def imported_names(package: ModuleType) -> set[str]:
    """Names without underscore that the package's ``__init__`` binds by import or assignment."""
    names: set[str] = set()
    for node in ast.parse(inspect.getsource(package)).body:
        match node:
            case ast.ImportFrom(module=source) if source not in {"__future__", "typing"}:
                names |= {alias.asname or alias.name for alias in node.names}
            case ast.Import():
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
    return {name for name in names if not name.startswith("_")}


@pytest.fixture(params=PUBLIC)
def package(request):
    return importlib.import_module(request.param)


def test_names_and_signatures(package, golden):
    everything = (getattr(each, name) for each in map(importlib.import_module, PUBLIC) for name in each.__all__)
    public = frozenset(filter(inspect.isclass, everything))
    lines = [line for name in sorted(package.__all__) for line in describe(name, getattr(package, name), public)]
    golden(f"public_api/{package.__name__}", "\n".join(lines))


def test_the_list_is_complete_and_free_of_repetition(package):
    assert len(set(package.__all__)) == len(package.__all__)
    assert imported_names(package) - set(package.__all__) == set()


def test_everything_public_says_what_it_does(package):
    assert package.__doc__
    assert [gap for name in package.__all__ for gap in undocumented(name, getattr(package, name))] == []


def classes_in(annotation: object, known: Mapping[str, object]) -> Iterator[type]:
    """The classes that an annotation is made of; names in quotes or in text are looked up in ``known``."""
    if isinstance(annotation, str):
        for node in ast.walk(ast.parse(annotation, mode="eval")):
            if isinstance(node, ast.Name):
                yield from classes_in(known.get(node.id), known)
    elif isinstance(annotation, ForwardRef):
        yield from classes_in(annotation.__forward_arg__, known)
    elif inspect.isclass(annotation) and not get_origin(annotation):
        yield annotation
    for argument in () if get_origin(annotation) is Literal else get_args(annotation):
        for part in argument if isinstance(argument, list) else [argument]:
            yield from classes_in(part, known)


def aliases_in(annotation: object, known: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Names in a written annotation that stand for a longer type, and that type."""
    if isinstance(annotation, str):
        names = {node.id for node in ast.walk(ast.parse(annotation, mode="eval")) if isinstance(node, ast.Name)}
        meant = {name: known.get(name) for name in names}
        yield from ((name, kind) for name, kind in meant.items() if isinstance(kind, UnionType) or get_origin(kind))


def annotations_of(target: object) -> Iterator[tuple[Mapping[str, object], object]]:
    """Every annotation in the signatures of a function or a class, with the names of the module that it was written
    in.
    """
    if inspect.isclass(target):
        ours = [base for base in target.__mro__ if base.__module__.split(".")[0] in PACKAGES]
        for base in ours:
            names = vars(sys.modules[base.__module__])
            yield from ((names, kept) for name, kept in inspect.get_annotations(base).items() if name[0] != "_")
            for name, member in vars(base).items():
                if is_method(member) and (not name.startswith("_") or name in {"__call__", "__init__"}):
                    yield from annotations_of(getattr(member, "fget", None) or getattr(member, "__func__", member))
    elif inspect.isfunction(target):
        yield from ((target.__globals__, kept) for kept in inspect.get_annotations(target).values())
    elif get_origin(target):
        yield {}, target


@pytest.mark.parametrize(
    ("module", "listed"),
    [
        ("pt2e", set()),
        ("signature_types", set()),
        ("accuracy.algorithms", set()),
        ("integer", {"to_integer"}),
        ("training", set()),
        ("pytorch_quantization", set()),
    ],
)
def test_what_is_listed_elsewhere_comes_from_quant2e_too(module, listed):
    quant2e = importlib.import_module("quant2e")
    elsewhere = importlib.import_module(f"quant2e.{module}")
    assert set(elsewhere.__all__) & set(quant2e.__all__) == listed
    assert all(getattr(quant2e, name) is getattr(elsewhere, name) for name in elsewhere.__all__)
    with pytest.raises(AttributeError, match="no attribute 'default_observr'"):
        _ = quant2e.default_observr


def test_a_listing_shows_what_a_new_program_needs():
    quant2e = importlib.import_module("quant2e")
    assert set(dir(quant2e)) == {*quant2e.__all__, "__version__"}
    assert len(dir(quant2e)) <= 60


def test_the_version_is_that_of_the_distribution(monkeypatch):
    quant2e = importlib.import_module("quant2e")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    monkeypatch.setattr(metadata, "version", {"quant2e": project["version"]}.__getitem__)
    assert quant2e.__version__ == project["version"]

    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert quant2e.__version__ == "0+unknown"


def test_what_public_signatures_mention_is_public():
    """Whoever is told a class by a signature can import it: to annotate a function of their own, or to test for it."""
    public = {name: getattr(module, name) for module in map(importlib.import_module, PUBLIC) for name in module.__all__}
    exported = {each for each in public.values() if inspect.isclass(each)}
    hidden = {
        f"{mentioned.__module__}.{mentioned.__qualname__}, mentioned by {name}"
        for name, target in public.items()
        for known, annotation in annotations_of(target)
        for mentioned in classes_in(annotation, known)
        if mentioned.__module__.split(".")[0] in PACKAGES and mentioned not in exported
    }
    hidden |= {
        f"the alias {alias} = {kind}, mentioned by {name}"
        for name, target in public.items()
        for known, annotation in annotations_of(target)
        for alias, kind in aliases_in(annotation, known)
        if public.get(alias) != kind
    }
    assert sorted(hidden) == []


def test_pages_and_the_tour_import_what_is_public():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.py")]
    found = {
        module
        for page in pages
        for module in re.findall(r"^ *(?:from|import) ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        if module.split(".")[0] in PACKAGES
    }
    assert found >= set(PACKAGES)
    assert found <= set(PUBLIC)


def test_errors_are_one_family():
    package = importlib.import_module("quant2e")
    errors = {name: getattr(package, name) for name in package.__all__ if name.endswith("Error")}
    assert {"Quant2eError", "PlanError", "AnnotationError", "CalibrationError", "PassError", "LoweringError"} <= set(
        errors
    )
    assert all(issubclass(error, package.Quant2eError) for error in errors.values())
