"""Training and evaluation mode of a captured graph, where the mode is written into literals.

Going one way and back leaves the graph text as it was: the flag of each op changes, every other literal (epsilon,
momentum, dropout probability) stays, and what one mode drops (the count of batches, the dropout of an attention)
is remembered in the node's metadata.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, GraphModule, Node

from quant2e.errors import CaptureError, Quant2eError, where
from quant2e.graph.captured.norm_forms import has_forms, set_form
from quant2e.graph.dataflow import operand, set_operand
from quant2e.graph.edit import set_origin
from quant2e.graph.effects import BATCH_NORMS, aten, flag_of, trains

_COUNT = "quant2e_batch_count"
"""Key in a batch norm's metadata: what to restore of the increment of ``num_batches_tracked`` that evaluation drops;
None when there was none."""
_COUNTING = frozenset({aten.batch_norm.default, aten.native_batch_norm.default, aten._native_batch_norm_legit.default})

_ATTENTION_DROPOUT = "quant2e_attention_dropout"
"""Key in an attention's metadata: its dropout probability in training."""


FROZEN = "quant2e_frozen"
"""Key in a batch norm's metadata: it keeps its statistics in training as well."""


def set_training(graph: Graph, mode: bool) -> bool:
    """Rewrite the literals of ``graph`` for training (True) or evaluation. Says whether anything changed.

    Batch norms that keep no statistics use those of the batch in both modes, as in eager. Linear in the graph.
    """
    changed = False
    counts: dict[str, Node] = {}
    nodes = list(graph.nodes)
    named = {node.name: node for node in nodes}
    for node in nodes:
        if (path := _counted(node)) is not None:
            counts[path] = node
            continue
        if _set_attention_dropout(node, mode):
            changed = True
        name = flag_of(node)
        wanted = mode and not node.meta.get(FROZEN)
        if name is None or bool(operand(node, name)) == wanted:
            continue
        set_operand(node, name, wanted)
        changed = True
        if has_forms(node):
            set_form(node, wanted, named)
        if (path := _count_path(node)) is not None:
            if wanted:
                if (increment := _restore_count(node, path, counts.get(path))) is not None:
                    counts[path] = increment
            else:
                _drop_count(node, counts.pop(path, None))
    return changed


def freeze_batch_norm(model: GraphModule, frozen: bool = True) -> GraphModule:
    """Let the batch norms of a captured model normalise by their running statistics and keep them, in training too.

    In place, until ``freeze_batch_norm(model, False)``; ``train()`` and ``eval()`` leave it so. Scale and shift are
    still trained. For the last part of quantization-aware training (Krishnamoorthi, arXiv:1806.08342, section 3.2.2).
    Raises `Quant2eError` for a module that is no captured graph.
    """
    if not isinstance(model, GraphModule):
        raise Quant2eError(
            f"freeze_batch_norm takes a captured or prepared model, not a {type(model).__name__}; "
            "eager modules have eval()"
        )
    for module in model.modules():
        if isinstance(module, GraphModule):
            norms = [node for node in module.graph.nodes if node.target in BATCH_NORMS and flag_of(node) is not None]
            for node in norms:
                node.meta[FROZEN] = frozen
            if norms and set_training(module.graph, is_training_graph(module) if frozen else module.training):
                module.recompile()
    return model


def training_nodes(gm: GraphModule) -> Iterator[Node]:
    """Nodes that behave as in training: dropout, batch norm on batch statistics. Control-flow bodies included."""
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                if trains(node):
                    yield node


def is_training_graph(gm: GraphModule) -> bool:
    """Was the graph captured, or switched, in training mode? False when no op depends on the mode."""
    return next(training_nodes(gm), None) is not None


def check_eval(gm: GraphModule) -> None:
    """Raise `CaptureError` naming the nodes when the graph is in training mode."""
    nodes = list(training_nodes(gm))
    if not nodes:
        return
    listed = "\n".join(f"  {where(node)}" for node in nodes[:5])
    more = f"\n  and {len(nodes) - 5} more" if len(nodes) > 5 else ""
    raise CaptureError(
        "the model is in training mode, and post-training quantization measures the model as it will be deployed: call "
        f"model.eval() before capture, or captured.eval() now. In training mode:\n{listed}{more}"
    )


def _set_attention_dropout(node: Node, mode: bool) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    probability = operand(node, "dropout_p")
    if mode and probability == 0 and _ATTENTION_DROPOUT in node.meta:
        set_operand(node, "dropout_p", node.meta.pop(_ATTENTION_DROPOUT))
        return True
    if not mode and probability != 0:
        node.meta[_ATTENTION_DROPOUT] = probability
        set_operand(node, "dropout_p", 0.0)
        return True
    return False


def _counted(node: Node) -> str | None:
    """Path of the counter when ``node`` is ``num_batches_tracked.add_(1)``.

    A norm that is called twice increments the result of its first increment, which is the same tensor.
    """
    if node.target is not aten.add_.Tensor or tuple(node.args[1:]) != (1,) or node.kwargs:
        return None
    if any(user.target is not aten.add_.Tensor for user in node.users):
        return None
    counter = node.args[0]
    while isinstance(counter, Node) and counter.target is aten.add_.Tensor:
        counter = counter.args[0]
    if isinstance(counter, Node) and counter.op == "get_attr":
        path = str(counter.target)
        return path if path.rpartition(".")[2] == "num_batches_tracked" else None
    return None


def _count_path(node: Node) -> str | None:
    """Path where the counter of a batch norm lies, next to its running mean."""
    mean = operand(node, "running_mean") if node.target in _COUNTING else None
    if not isinstance(mean, Node) or mean.op != "get_attr":
        return None
    prefix, dot, last = str(mean.target).rpartition(".")
    return f"{prefix}{dot}num_batches_tracked" if last == "running_mean" else None


def _drop_count(norm: Node, increment: Node | None) -> None:
    """Remove the increment and remember it; also remember that there was none."""
    if increment is None:
        norm.meta[_COUNT] = None
        return
    norm.meta[_COUNT] = {"name": increment.name, "stack_trace": increment.meta.get("stack_trace")}
    increment.replace_all_uses_with(increment.all_input_nodes[0])
    norm.graph.erase_node(increment)


def _restore_count(norm: Node, path: str, previous: Node | None) -> Node | None:
    """Write the increment before ``norm``, on the result of the ``previous`` one of the same counter if there is
    any.
    """
    graph = norm.graph
    saved = norm.meta.pop(_COUNT, {"name": None, "stack_trace": norm.meta.get("stack_trace")})
    counter = previous or next(iter(graph.find_nodes(op="get_attr", target=path)), None)
    if saved is None or counter is None:  # never counted, or dead code elimination dropped the unread count
        return previous
    with graph.inserting_before(norm):
        increment = graph.create_node("call_function", aten.add_.Tensor, (counter, 1), name="add_")
    if saved["name"] is not None:
        increment.name = saved["name"]
    set_origin(increment, norm, value=counter.meta.get("val"))
    if saved["stack_trace"] is not None:
        increment.meta["stack_trace"] = saved["stack_trace"]
    return increment
