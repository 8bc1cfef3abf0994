"""Imports of the peers' tests, rewritten: what quant2e and its quantizers have is imported from there.

Nothing else of a test changes. A name that quant2e has not (the peers' own test models, numeric helpers) stays theirs.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

import quant2e
import quantizers

OURS: tuple[str, ...] = (
    "torchao.quantization.pt2e",
    "torchao.testing.pt2e._xnnpack_quantizer",
    "torchao.testing.pt2e._xnnpack_quantizer_utils",
    "executorch.backends.xnnpack.quantizer",
)
"""Packages whose names are ours, where we have them."""

MODULES: Mapping[str, str] = {
    "torchao.quantization.pt2e.observer": "quant2e",
    "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer": "quantizers",
}
"""Modules of theirs that tests use as a whole."""

COPIED: Mapping[str, str] = {
    "torchao.testing.pt2e.utils": "peers_torchao.torchao.testing.pt2e.utils",
    "executorch.backends.xnnpack.test": "peers_executorch.backends.xnnpack.test",
    "executorch.backends.test.harness": "peers_executorch.backends.test.harness",
}
"""Modules of the checkout that tests import: their copies, whose imports are rewritten as well."""


def rewritten(source: str) -> str:
    """The source of a test with the imports of ours; comments are lost."""
    rewriter = _Imports()
    tree = rewriter.visit(ast.parse(source))
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    rest = [node for node in tree.body if node not in future]
    needed: list[ast.stmt] = [ast.Import([ast.alias(name)]) for name in sorted(rewriter.needed)]
    tree.body = [*future, *needed, *rest]
    return ast.unparse(ast.fix_missing_locations(tree))


def home_of(name: str) -> str | None:
    """The package of ours that has a name."""
    return next((package.__name__ for package in (quant2e, quantizers) if hasattr(package, name)), None)


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _copy_of(module: str) -> str | None:
    """Where the copy of a module is."""
    for original, copy in COPIED.items():
        if _within(module, (original,)):
            return copy + module.removeprefix(original)
    return None


class _Imports(ast.NodeTransformer):
    """``needed``: packages that dotted names in the code stand in."""

    def __init__(self) -> None:
        self.needed: set[str] = set()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> list[ast.stmt]:
        module = node.module or ""
        if node.level or not module:
            return [node]
        if (copy := _copy_of(module)) is not None:
            return [ast.ImportFrom(copy, node.names, 0)]
        return list(self._from(module, node)) if _within(module, OURS) else [node]

    def _from(self, module: str, node: ast.ImportFrom) -> Iterator[ast.stmt]:
        for alias in node.names:
            whole = MODULES.get(f"{module}.{alias.name}")
            if whole is not None:
                yield ast.Import([ast.alias(whole, alias.asname or alias.name)])
            else:
                yield ast.ImportFrom(home_of(alias.name) or module, [alias], 0)

    def visit_Import(self, node: ast.Import) -> ast.stmt:
        names = []
        for alias in node.names:
            other = MODULES.get(alias.name) if alias.asname else None
            other = other or (_copy_of(alias.name) if alias.asname else None)
            names.append(ast.alias(other or alias.name, alias.asname))
        return ast.Import(names)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        dotted = _dotted(node)
        if dotted is not None:
            module, _, name = dotted.rpartition(".")
            other = _copy_of(dotted)
            if other is None and _within(module, OURS) and (home := home_of(name)) is not None:
                other = f"{home}.{name}"
            if other is not None:
                self.needed.add(other.partition(".")[0])
                return ast.parse(other, mode="eval").body
        return self.generic_visit(node)  # type: ignore[return-value]  # an attribute stays one


def _dotted(node: ast.expr) -> str | None:
    """``a.b.c`` of an expression that is no more than that."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None
