"""Preparation: captured graph + quantizer → observed graph.

The model that comes in is left untouched: the work is done on a copy of its graph that shares its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from quant2e.annotation.interop import read_plan
from quant2e.annotation.plan import DerivedFrom, Plan
from quant2e.annotation.quantizer import Quantizer, annotated, transformed
from quant2e.annotation.specs import ANNOTATION
from quant2e.errors import AnnotationError, Quant2eError, where
from quant2e.graph.captured.capture import as_graph_module
from quant2e.graph.captured.modes import check_eval
from quant2e.graph.captured.module import CapturedModule, copy_graph
from quant2e.graph.captured.no_grad import set_all_detached
from quant2e.graph.constants import Constants, evaluate
from quant2e.graph.control_flow import graphs_of
from quant2e.graph.mutation import own_tensors, own_written_tensors
from quant2e.graph.qdq_ops import DEQUANTIZE
from quant2e.observers.base import is_observer_call
from quant2e.observers.derived import DerivedFakeQuantize
from quant2e.observers.fake_quant import FakeQuantizeBase
from quant2e.passes import run
from quant2e.passes.dead_code import remove_dead_code
from quant2e.passes.empty_operands import drop_empty_operands
from quant2e.passes.fold_batch_norm import fold_batch_norm
from quant2e.passes.train_batch_norm import FUSED, begin, norms_behind_products
from quant2e.prepare.bodies import prepare_bodies
from quant2e.prepare.insert_observers import find_scales_of_single_images, make_observers, observe
from quant2e.prepare.masks import watch_sentinels
from quant2e.prepare.observer_callback import call_back
from quant2e.prepare.qat import Trained, ready_to_learn, train_through_norms, training_report
from quant2e.report.float_ops import list_float_ops
from quant2e.report.judge import judge
from quant2e.report.record import RECORD_KEY, GraphRecord
from quant2e.report.report import Report, tensor_bytes
from quant2e.report.weight_reads import weight_reads


def prepare_pt2e(model: GraphModule | ExportedProgram, quantizer: Quantizer) -> GraphModule:
    """Insert the observers that ``quantizer`` asks for.

    ``model``: what `capture` or ``torch.export`` made, in eval mode; it is not changed. ``quantizer``: a `Quantizer`,
    of any library. Batch norms are folded first; weights are observed here, activations by running
    the result on calibration data.

    Raises `CaptureError` for a graph in training mode, `AnnotationError` and `PlanError` for annotations that are
    wrong alone or together.
    """
    return _prepare(model, quantizer, training=False)


def prepare_qat_pt2e(model: GraphModule | ExportedProgram, quantizer: Quantizer) -> GraphModule:
    """Insert the fake-quantizers that ``quantizer`` asks for, for quantization-aware training.

    ``model``: what `capture` or ``torch.export`` made of a model in training (or eval) mode; it is not changed, nor are
    its tensors: the result has parameters of its own, so build the optimizer from ``prepared.parameters()``.
    ``quantizer``: as for `prepare_pt2e`, with configurations for training (``is_qat=True``), or some for training and
    some for calibration.

    Batch norms behind a quantized weight train as they will be deployed (see `passes.train_batch_norm`) and are folded
    by `convert_pt2e`. Raises as `prepare_pt2e` does.
    """
    return _prepare(model, quantizer, training=True)


def _prepare(model: GraphModule | ExportedProgram, quantizer: Quantizer, *, training: bool) -> GraphModule:
    own = as_graph_module(model, compiled=False)
    if any(is_observer_call(node) for _, gm in graphs_of(own) for node in gm.graph.nodes):
        raise Quant2eError("this model is already prepared; calibrate it, or prepare the captured model it came from")
    if training:
        _check_trainable(own)
        own_tensors(own)
    else:
        check_eval(own)
    return _prepared(own, quantizer, training=training)


def _prepared(own: CapturedModule, quantizer: Quantizer, *, training: bool) -> GraphModule:
    """``own``, which is changed, or what the quantizer makes of it, with observers in it and in its bodies."""
    gm: GraphModule = own
    if RECORD_KEY in gm.meta:  # converted before: the annotations of that time are about other nodes
        for node in gm.graph.nodes:
            node.meta.pop(ANNOTATION, None)
    set_all_detached(gm, False)  # quantizers look across the borders of regions without gradients
    run(gm, (remove_dead_code,), compiled=False)  # a reader whose result nothing reads would keep ops from being fused
    ops, float_bytes, float_reads, inputs = list_float_ops(gm), tensor_bytes(gm), weight_reads(gm), own.inputs

    def prepare_body(body: GraphModule) -> GraphModule:
        return _prepared(as_graph_module(body, compiled=False), quantizer, training=training)

    inside = prepare_bodies(gm, prepare_body)
    run(gm, (drop_empty_operands, norms_behind_products if training else fold_batch_norm), compiled=False)
    gm = _annotate(gm, quantizer)
    plan = read_plan(gm)  # before a copy: annotations refer to nodes, the plan to names
    if not isinstance(gm, CapturedModule):  # a transform may rebuild the module as a plain one
        gm = copy_graph(gm, compiled=False)
        gm.inputs = inputs
    if not training:
        own_written_tensors(gm)
    constants = frozenset(Constants(gm.graph))
    plan, observers = call_back(gm, quantizer, plan, make_observers(plan, training=training))
    report = Report(
        verdicts=(*judge(ops, gm, plan, constants, _explainer(quantizer)), *inside.verdicts),
        notes=(*_plan_notes(plan), *inside.notes, *_quantizer_notes(quantizer)),
        float_bytes=float_bytes,
        float_weight_reads=float_reads,
    )
    trained = train_through_norms(gm, plan, observers) if training else Trained(plan, observers)
    plan, observers = trained.plan, trained.observers
    device = next((t.device for t in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))
    for observer in observers.values():
        observer.to(device)
    watch_sentinels(gm, plan, observers)
    find_scales_of_single_images(gm, plan, observers)
    _observe_constants(gm, plan, observers, constants | trained.computed(gm))
    names = observe(gm, plan, observers)
    if training:
        begin(gm, trained.fused)
        ready_to_learn(observers)
        report = training_report(report, trained, gm)
        gm.meta[FUSED] = trained.fused
        set_all_detached(gm, gm.training)
    gm.meta[RECORD_KEY] = GraphRecord(plan, tuple(names.get(i, "") for i in range(len(plan.groups))), report)
    return gm


def _check_trainable(gm: GraphModule) -> None:
    """A quantized graph has integer weights: what is trained is the prepared one."""
    quantized = next((node for node in gm.graph.nodes if node.target in DEQUANTIZE), None)
    if quantized is not None and RECORD_KEY in gm.meta:
        raise Quant2eError(
            f"this model is converted already ({where(quantized)}), and integers are not trained: "
            "train the model that prepare_qat_pt2e returned and convert it again"
        )


def _annotate(gm: GraphModule, quantizer: Quantizer) -> GraphModule:
    if isinstance(quantizer, type):
        raise AnnotationError(
            f"{quantizer.__name__} is a class; a quantizer has annotate(model): pass an object, {quantizer.__name__}()"
        )
    for method in ("annotate", "validate"):
        if not callable(getattr(quantizer, method, None)):
            raise AnnotationError(
                f"{type(quantizer).__name__} has no method '{method}': a quantizer has annotate(model) and "
                "validate(model); derive it from quant2e.Quantizer"
            )
    gm = annotated(quantizer, transformed(quantizer, gm))
    quantizer.validate(gm)
    return gm


def _explainer(quantizer: Quantizer) -> Callable[[Node], str]:
    """Why a quantizer left a node float: its own words when it has some."""
    own = getattr(quantizer, "reason", None) or getattr(quantizer, "explain", None)

    def explain(node: Node) -> str:
        words = str(own(node)).partition("\n")[0] if callable(own) else ""
        return words or f"{type(quantizer).__name__} did not annotate {node.target}"

    return explain


def _quantizer_notes(quantizer: Quantizer) -> tuple[str, ...]:
    return tuple(str(note) for note in getattr(quantizer, "notes", ()) or ())


def _plan_notes(plan: Plan) -> list[str]:
    return [f"annotation of ({item.point}) ignored: it is {item.reason}" for item in plan.ignored]


def _observe_constants(
    gm: GraphModule, plan: Plan, observers: Mapping[int, nn.Module], constants: frozenset[Node]
) -> None:
    """Show every constant tensor to its observer, so that weights need no calibration data."""
    fixed = {node.name: node for node in constants}
    for index, observer in observers.items():
        group = plan.groups[index]
        tensors = dict.fromkeys(point.tensor for point in group.points)
        if isinstance(observer, DerivedFakeQuantize | FakeQuantizeBase):
            observer.of_constant = all(name in fixed for name in tensors)
        if isinstance(group.spec, DerivedFrom) or getattr(group.spec, "is_dynamic", False):
            continue
        with torch.no_grad():
            for name in tensors:
                if name in fixed:
                    observer(evaluate(gm, fixed[name]))
        freeze = getattr(observer, "freeze", None)
        if callable(freeze) and all(name in fixed for name in tensors):
            freeze()
