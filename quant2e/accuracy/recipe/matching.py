"""Which rules of a recipe name an op: by node, module path, module type and ATen target."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from torch.fx import GraphModule, Node

from quant2e.accuracy.recipe.settings import OpSettings, RecipeRule, TensorRule, Wanted
from quant2e.documents.nearest import nearest
from quant2e.graph.control_flow import BODY, graphs_of, prefixed
from quant2e.graph.module_paths import enclosing_paths, module_stack, plain_path


def names(rule: RecipeRule, node: Node) -> bool:
    """Whether all that a rule says of names fits an op."""
    return all(_FITS[kind](value, node) for kind, value in rule.names.items())


def _by_name(pattern: str, node: Node) -> bool:
    return any(_glob(pattern).fullmatch(name) for name in (node.name, op_path(node)))


def _by_module(pattern: str, node: Node) -> bool:
    paths = [path for path in enclosing_paths(node) if path]
    return plain_path(pattern) in paths or any(_glob(pattern).fullmatch(path) for path in paths)


def _by_regex(pattern: str, node: Node) -> bool:
    return any(path and re.fullmatch(pattern, path) for path in enclosing_paths(node))


def _by_type(name: str, node: Node) -> bool:
    return any(name in (kind, kind.rpartition(".")[2]) for _, kind in module_stack(node))


def _by_op(name: str, node: Node) -> bool:
    return name in set(op_names(node))


_FITS = {"name": _by_name, "module": _by_module, "regex": _by_regex, "type": _by_type, "op": _by_op}


@lru_cache(maxsize=1024)
def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(fnmatch.translate(pattern))


def op_path(node: Node) -> str:
    """The name of a node, behind the path of the body of control flow that it lies in."""
    owner = node.graph.owning_module
    return prefixed("" if owner is None else owner.meta.get(BODY, ""), node.name)


def op_names(node: Node) -> Iterator[str]:
    """``add``, ``add.Tensor``, ``aten.add``, ``aten.add.Tensor``; also of what an op was before it was rewritten."""
    for target in (node.target, node.meta.get("original_target", node.target)):
        full = str(target)
        short = full.partition(".")[2]
        packet = short.rpartition(".")[0] or short
        yield from (full, short, packet, f"aten.{packet}")


def calls(gm: GraphModule) -> Iterator[Node]:
    """The ops of a graph."""
    return (node for node in gm.graph.nodes if node.op == "call_function")


def wanted_of(node: Node, default: OpSettings | None, rules: Sequence[RecipeRule], own: Node | None = None) -> Wanted:
    """What all rules want of an op, and of ``own``, which is fused behind it, where they name that by itself."""
    wanted = Wanted() if default is None else Wanted().then(default, -1)
    for index, rule in enumerate(rules):
        by_itself = own is not None and own is not node and ("name" in rule.names or "op" in rule.names)
        if names(rule, node) or (by_itself and own is not None and names(rule, own)):
            wanted = wanted.then(rule, index)
    return wanted


def unmatched(gm: GraphModule, rules: Sequence[RecipeRule], tensors: Sequence[TensorRule]) -> list[str]:
    """Rules that name nothing in a graph and its bodies, each with the nearest names."""
    nodes = [node for _, graph in graphs_of(gm) for node in calls(graph)]
    lines = []
    for index, rule in enumerate(rules):
        if not any(names(rule, node) for node in nodes):
            near = "".join(nearest(value, _known(kind, nodes)) for kind, value in rule.names.items())
            lines.append(f"rules[{index}], {rule}, names nothing in this model{near}")
    known = {f"{path}{name}" for name, path in _points(gm)}
    for index, tensor in enumerate(tensors):
        if not any(_glob(tensor.tensor).fullmatch(point) for point in known):
            lines.append(f"tensors[{index}]: there is no tensor '{tensor.tensor}'{nearest(tensor.tensor, known)}")
    return lines


def _points(gm: GraphModule) -> Iterator[tuple[str, str]]:
    for _, graph in graphs_of(gm):
        body = graph.meta.get(BODY, "")
        path = f"{body}." if body else ""
        for node in graph.graph.nodes:
            yield node.name, path
            yield from ((f"{source.name} -> {node.name}", path) for source in node.all_input_nodes)


def fits_point(pattern: str, point: str) -> bool:
    """Whether a tensor rule names a point, which is spelled as encodings spell it."""
    return _glob(pattern).fullmatch(point) is not None


def _known(kind: str, nodes: Iterable[Node]) -> Iterator[str]:
    for node in nodes:
        if kind == "name":
            yield op_path(node)
        elif kind in ("module", "regex"):
            yield from enclosing_paths(node)
        elif kind == "type":
            yield from (type_.rpartition(".")[2] for _, type_ in module_stack(node))
        else:
            yield str(node.target).partition(".")[2].rpartition(".")[0]
