"""What users can import, as text: names, signatures, methods. A change of the interface is a change of a golden file."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from types import ModuleType, UnionType
from typing import get_origin

import pytest

PACKAGES = ("quant2e", "quantizers", "lowering")


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
        bases = ", ".join(base.__name__ for base in target.__bases__ if base is not object)
        head = f"class {name}({bases})" if bases else f"class {name}"
        if target.__name__ != name:
            yield f"{name} = {target.__name__}"
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
            case ast.ImportFrom(module=source) if source != "__future__":
                names |= {alias.asname or alias.name for alias in node.names}
            case ast.Import():
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            case ast.Assign(targets=targets):
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
    return {name for name in names if not name.startswith("_")}


@pytest.fixture(params=PACKAGES)
def package(request):
    return importlib.import_module(request.param)


def test_names_and_signatures(package, golden):
    everything = (getattr(each, name) for each in map(importlib.import_module, PACKAGES) for name in each.__all__)
    public = frozenset(filter(inspect.isclass, everything))
    lines = [line for name in sorted(package.__all__) for line in describe(name, getattr(package, name), public)]
    golden(f"public_api/{package.__name__}", "\n".join(lines))


def test_the_list_is_complete_and_free_of_repetition(package):
    assert len(set(package.__all__)) == len(package.__all__)
    assert imported_names(package) - set(package.__all__) == set()


def test_everything_public_says_what_it_does(package):
    assert package.__doc__
    assert [gap for name in package.__all__ for gap in undocumented(name, getattr(package, name))] == []


def test_errors_are_one_family():
    package = importlib.import_module("quant2e")
    errors = {name: getattr(package, name) for name in package.__all__ if name.endswith("Error")}
    assert {"Quant2eError", "PlanError", "AnnotationError", "CalibrationError", "PassError", "LoweringError"} <= set(
        errors
    )
    assert all(issubclass(error, package.Quant2eError) for error in errors.values())
