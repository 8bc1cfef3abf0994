"""Capture: a model becomes a graph of ATen ops, by ``torch.export``.

The graph is what ``torch.export.export(...).module()`` gives, not decomposed, with four differences: regions that
only change the grad mode are inlined, ops of a program that was decomposed are composed again (`core_aten`), the
conditions on the inputs are checked by the module and not by the graph, and ``train()`` and ``eval()`` work.
"""

from __future__ import annotations

import inspect
import itertools
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn import Module

from quant2e.errors import CaptureError, where
from quant2e.graph.captured.calls import Call, example_call
from quant2e.graph.captured.core_aten import compose_core_ops
from quant2e.graph.captured.dynamic_batch import with_dynamic_batch
from quant2e.graph.captured.dynamic_shapes import of_graph, read_dynamic_shapes
from quant2e.graph.captured.inline_regions import inline_regions
from quant2e.graph.captured.inputs import Inputs, distinct, read_inputs
from quant2e.graph.captured.modes import is_training_graph
from quant2e.graph.captured.module import CapturedModule, copy_graph
from quant2e.graph.captured.no_grad import set_all_detached
from quant2e.graph.captured.written_constants import written_constants_as_buffers
from quant2e.isolation import tracing
from quant2e.stages import stage

DIALECTS = ("TRAINING", "ATEN")
_NOISE = ("Caused by:", "For ", "If you suspect", "The error above occurred")
"""Beginnings of lines in torch's messages that only say how to get more output."""
_HERE, _TORCH = str(Path(__file__).parents[2]), str(Path(torch.__file__).parent)


def capture(
    model: Module | ExportedProgram,
    example_inputs: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    dynamic_batch: bool | int = False,
) -> CapturedModule:
    """Capture ``model`` as a graph of ATen ops that shares the model's parameters and buffers.

    ``example_inputs``: the positional inputs, as a tuple or a list; one tensor stands for itself, and a dict holds
    keyword inputs. ``kwargs``: the keyword inputs. Any nesting of lists, tuples and dicts. ``dynamic_shapes``: as for
    ``torch.export.export``; sizes not named there are fixed to those of the example. ``dynamic_batch``: the first size
    of every input varies, together: to any (True), or to that many samples at most.
    An `ExportedProgram` or an already captured graph is copied, and the example inputs are checked against it.
    The model, its flags and buffers, and the random state are left as they were, also on failure. Several threads may
    capture one model; none may run it meanwhile, since torch.export puts fake tensors into it while it traces.
    Raises `CaptureError` when the inputs do not fit ``forward``, or the model cannot be exported.
    """
    args, keywords = example_call(example_inputs, kwargs)
    if dynamic_batch is not False:
        (args, keywords), dynamic_shapes = with_dynamic_batch(
            model, Call(args, keywords), dynamic_batch, dynamic_shapes
        )
    if isinstance(model, ExportedProgram) or is_captured(model):
        if dynamic_shapes is not None:
            raise CaptureError(
                "dynamic_shapes has no effect on a model that is already captured: give it when exporting"
            )
        captured = as_graph_module(model)
        if (args or keywords) and captured.inputs is not None:
            captured.inputs.check(args, keywords)
        return captured
    if not isinstance(model, Module):
        raise CaptureError(f"cannot capture a {type(model).__name__}: give an nn.Module, whose forward is captured")
    with tracing():  # while another thread captures the model, its tensors are torch's fakes
        _check_signature(model, args, keywords)
        _check_values(model)
    # With gradients, whatever the caller's mode: where there are none, export does not see who switches them off.
    with stage("capture"), tracing(), _untouched(model), torch.inference_mode(False), torch.enable_grad():
        try:
            args, keywords = distinct(args, keywords)
            program = torch.export.export(model, args, keywords, dynamic_shapes=dynamic_shapes)
            captured = as_graph_module(program)
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_export_failure(model, error)) from error
    _set_flags(captured, model.training)
    return captured


def _check_values(model: Module) -> None:
    """Raise `CaptureError` for parameters and buffers on the meta device: nothing says what they hold."""
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    if empty := [name for name, tensor in named if tensor.is_meta]:
        more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise CaptureError(
            f"'{empty[0]}'{more} of {type(model).__name__} are on the meta device, without values: "
            "quant2e.attach_weights(model, folder) lets it read them from .safetensors files"
        )


class CapturedCall(NamedTuple):
    """A captured graph, the example inputs that it was captured with, and the sizes of its inputs that vary."""

    graph: CapturedModule
    example: Call
    dynamic_shapes: Any


def capture_call(
    model: Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None,
    dynamic_shapes: Any,
    dynamic_batch: bool | int,
) -> CapturedCall:
    """What `capture` makes of these arguments, with what a `QuantizedModel` remembers of them. Raises as it does."""
    example = example_call(example_inputs, kwargs)
    if dynamic_batch is not False:
        example, dynamic_shapes = with_dynamic_batch(model, example, dynamic_batch, dynamic_shapes)
    graph = capture(model, *example, dynamic_shapes=dynamic_shapes)
    stated = dynamic_shapes is not None
    return CapturedCall(
        graph, example, of_graph(dynamic_shapes, model, *example) if stated else read_dynamic_shapes(graph)
    )


def as_graph_module(model: Module | ExportedProgram, *, compiled: bool = True) -> CapturedModule:
    """A captured graph from an `ExportedProgram` or a captured GraphModule: a copy that shares its tensors.

    ``compiled``: as in `copy_graph`.

    Raises `CaptureError` for anything else, and for a graph that is not one of ATen ops.
    """
    if isinstance(model, ExportedProgram):
        if model.dialect not in DIALECTS:
            raise CaptureError(
                f"this ExportedProgram is in the {model.dialect} dialect: quantize first, on what torch.export.export "
                "returns, and lower to a backend afterwards"
            )
        with tracing():
            return _own(model.module(), compiled)
    if not isinstance(model, GraphModule):
        raise CaptureError(
            f"a captured model is needed and this is a {type(model).__name__}: call capture(model, "
            "example_inputs) first"
        )
    for node in model.graph.nodes:
        if (reason := _not_aten(model, node)) is not None:
            raise CaptureError(
                f"this graph is not one of ATen ops: {where(node)} is {reason}. Use capture(), not symbolic_trace"
            )
    return _own(model, compiled)


def is_captured(model: Any) -> bool:
    """Is ``model`` a graph of ATen ops, as `capture` and ``torch.export`` make them?"""
    return isinstance(model, GraphModule) and all(_not_aten(model, node) is None for node in model.graph.nodes)


def _own(gm: GraphModule, compiled: bool = True) -> CapturedModule:
    captured = copy_graph(gm, compiled=False)
    if isinstance(gm, CapturedModule):
        inline_regions(captured)
    else:
        complete(captured, read_inputs(gm))
    captured.graph.lint()
    if compiled:
        captured.recompile()
    return captured


def complete(captured: CapturedModule, inputs: Inputs) -> None:
    """Make a graph as torch.export leaves it one that `capture` returns: regions, ops, calling convention and mode."""
    inline_regions(captured)
    compose_core_ops(captured)
    written_constants_as_buffers(captured)
    captured.inputs = inputs
    _set_flags(captured, is_training_graph(captured))  # torch sets the flag whatever the mode of the model was


def _set_flags(captured: CapturedModule, training: bool) -> None:
    for module in captured.modules():
        module.training = training
    set_all_detached(captured, training)


def _not_aten(gm: GraphModule, node: Node) -> str | None:
    """Why ``node`` cannot be in a graph of ATen ops; None when it can."""
    if node.op == "call_method":
        return "a tensor method"
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if type(module).__module__.startswith("torch.nn.modules") or isinstance(module, GraphModule):
            return f"a call of {type(module).__name__}"
    if node.op == "call_function" and not isinstance(node.target, (OpOverload, HigherOrderOperator)):
        home = getattr(node.target, "__module__", "") or ""
        if home.startswith(("torch.nn.functional", "torch.functional", "torch._C._nn")):
            return "a Python function of torch"
        if getattr(torch, getattr(node.target, "__name__", ""), None) is node.target and "sym_" not in str(node.target):
            return "a Python function of torch"
    return None


def _check_signature(model: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward without a Python signature: torch.export decides
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join(["..." for _ in args] + [f"{name}=..." for name in kwargs])
        raise CaptureError(
            f"{type(model).__name__}.forward{signature} cannot be called with the example inputs ({given}): {error}"
        ) from error


def _export_failure(model: Module, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.strip().startswith(_NOISE)]
    reason = "\n  ".join(lines[:6]) or "no reason given"
    own = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((_HERE, _TORCH, "<"))]
    place = f" at {own[-1].filename}:{own[-1].lineno} `{own[-1].line}`" if own else ""
    if "data-dependent" in str(error):
        advice = "forward chooses its path, or a size, by the values of a tensor: use torch.cond or torch.where there"
    elif "Constraints violated" in str(error) or "dynamic_shapes" in str(error):
        advice = "change dynamic_shapes as torch suggests, or mark the size torch.export.Dim.AUTO"
    elif "Cache" in str(error):
        advice = (
            "a decoder of Hugging Face returns a cache: lowering.language_models.capture_decoder(model, max_length) "
            "captures it with a static one; without any, set model.config.use_cache = False"
        )
    elif isinstance(error, (TypeError, AttributeError, IndexError, KeyError, AssertionError)):
        advice = "check that model(*example_inputs, **kwargs) runs"
    else:
        advice = "check that model(*example_inputs, **kwargs) runs; torch's own message is chained above"
    return (
        f"torch.export could not capture {type(model).__name__}{place}: {type(error).__name__}: "
        f"{reason}\nWhat to do: {advice}"
    )


@contextmanager
def _untouched(model: Module) -> Iterator[None]:
    """Put back what running ``forward`` for export may change: attributes of the modules.

    Tensors need no such care: export runs on fake ones.
    """
    saved = [(vars(module), dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        yield
    finally:
        for live, attributes, contents in saved:
            live.clear()
            live.update(attributes)
            for container, items in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(items)


def _contents(module: Module) -> list[tuple[Any, Any]]:
    """Containers among a module's attributes (its tables of parameters, an LSTM's list of weights) with a copy each."""
    return [(value, value.copy()) for value in vars(module).values() if isinstance(value, (list, dict, set))]
