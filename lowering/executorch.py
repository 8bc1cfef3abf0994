"""From the Q/DQ graph to a program file for the ExecuTorch runtime, with the XNNPACK delegate.

In: a `QuantizedModel`, a converted GraphModule or a float module. Out: an `ExecuTorchProgram`, run on the host and
compared with the graph it came from. Nothing of ExecuTorch is imported before `to_executorch` is called.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.infra.partitioner import Partition
from torch.utils import _pytree as pytree

from lowering.canonical import DECLARED, EXACT, canonicalise
from lowering.delegation import Delegation, Rejections, delegation_of
from lowering.signature import Signature, signature_of
from lowering.stages import stages
from lowering.verify import LEEWAY_DB, Bound, Inputs, as_inputs, compare, compare_within_noise, graph_of
from lowering.xnnpack_limits import check_limits
from quant2e.atomic import atomic_file
from quant2e.errors import LoweringError


class ExecuTorchProgram:
    """A program for the ExecuTorch runtime.

    ``buffer``: the bytes of the ``.pte`` file. ``report``: what was delegated, what was not and why, and how the
    program compares with its Q/DQ graph. Calling it runs it in the ExecuTorch runtime of this process: it takes and
    returns what the model takes and returns.
    """

    def __init__(self, buffer: bytes, report: Delegation, signature: Signature) -> None:
        self.buffer = buffer
        self.report = report
        self._signature = signature
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on positional and keyword inputs; keywords in any order. Raises `LoweringError` on other inputs."""
        flat = self._signature.flatten(args, kwargs)
        if self._loaded is None:
            self._loaded = _load(self.buffer)
        try:
            flat_outputs = self._loaded[1].execute(flat)
        except RuntimeError as error:
            shapes = [tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in flat]
            raise LoweringError(f"the ExecuTorch runtime refused inputs {shapes}: {error}") from error
        return pytree.tree_unflatten(list(flat_outputs), self._signature.out_spec)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the ``.pte`` file. It appears whole or not at all: written under a temporary name, then moved."""
        with atomic_file(Path(path)) as part:
            part.write_bytes(self.buffer)


def to_executorch(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic_shapes: Any = None,
    partitioners: Sequence[Any] | None = None,
    verify: bool = True,
    verify_inputs: Iterable[Any] = (),
) -> ExecuTorchProgram:
    """Lower a Q/DQ graph to an ExecuTorch program.

    ``model``: a QuantizedModel (its example inputs and dynamic shapes are used unless given), a converted or captured
    GraphModule, or an nn.Module in eval mode. ``example_inputs``: a tuple of positional inputs, or a dict of keyword
    inputs. ``dynamic_shapes``: as for ``torch.export``; every dynamic size needs an upper bound.
    ``partitioners``: ExecuTorch partitioners in order of preference; XNNPACK's when None.
    ``verify``: run the program in the runtime on the example inputs and on ``verify_inputs``, and compare it with the
    Q/DQ graph. Raises `LoweringError` when ExecuTorch is missing, when the graph holds what the target cannot run,
    when an op has no kernel in the runtime, and when the program disagrees with its graph.
    """
    reference = graph_of(model)
    inputs = _example_inputs(model, example_inputs)
    shapes = dynamic_shapes if dynamic_shapes is not None else getattr(model, "dynamic_shapes", None)
    with _undisturbed():
        _require_executorch()
        module = _export(reference, inputs, shapes).module(check_guards=False)
        applied = canonicalise(module, EXACT)
        notes = check_limits(module) if partitioners is None else ()
        declared = canonicalise(module, DECLARED) if partitioners is None else {}
        program = _lower(_export(module, inputs, shapes), partitioners, {**applied, **declared}, notes)
    if verify:
        batches = [inputs, *map(as_inputs, verify_inputs)]
        program.report = _verified(program, reference, module if declared else None, batches)
    return program


def _verified(
    program: ExecuTorchProgram, reference: Any, per_row: GraphModule | None, batches: list[Inputs]
) -> Delegation:
    """The report with the comparisons; raises `LoweringError` when one is beyond its bound."""
    if per_row is None:
        verification = compare_within_noise(program, reference, batches)
        verification.check("the ExecuTorch program")
        return replace(program.report, verification=verification)
    rows = compare_within_noise(program, per_row, batches)
    rows.check("the ExecuTorch program (reference: the graph with a scale per row of each dynamic activation)")
    # the step from a scale per tensor to one per row is the target's; the program may add no more than its noise
    declared = compare(per_row, reference, batches).sqnr_db
    bound = Bound(sqnr_db=min(rows.bound.sqnr_db, declared) - LEEWAY_DB)
    verification = compare(program, reference, batches, bound=bound)
    verification.check("the ExecuTorch program")
    return replace(program.report, verification=verification, per_row=rows)


def _example_inputs(model: Any, given: Any) -> Inputs:
    """Positional and keyword inputs to export with."""
    example = given if given is not None else getattr(model, "example_inputs", None)
    if example is None:
        raise LoweringError("to_executorch needs example_inputs: a tuple of positional inputs, or a dict of keywords")
    args, kwargs = as_inputs(example)
    if given is None and isinstance(extra := getattr(model, "example_kwargs", None), dict):
        kwargs = {**kwargs, **extra}
    return args, kwargs


def _require_executorch() -> None:
    """Import ExecuTorch with its quantized kernels; raise `LoweringError` when it is not installed."""
    try:
        import executorch.exir
        import executorch.kernels.quantized  # noqa: F401
    except ImportError as error:
        raise LoweringError(f"ExecuTorch is not installed ({error}): pip install quant2e[executorch]") from error


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Importing and running ExecuTorch leaves logging handlers, warning filters and the environment as they were."""
    root = logging.getLogger()
    handlers, level, environment = list(root.handlers), root.level, dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
            for name in set(os.environ) - set(environment):
                del os.environ[name]


def _export(module: Any, inputs: Inputs, shapes: Any) -> ExportedProgram:
    args, kwargs = inputs
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise LoweringError(
            f"torch.export cannot trace the graph with these example inputs and dynamic shapes: {error}"
        ) from error


def _lower(
    exported: ExportedProgram, partitioners: Sequence[Any] | None, applied: dict[str, int], notes: tuple[str, ...]
) -> ExecuTorchProgram:
    from executorch.exir import to_edge_transform_and_lower

    chosen = list(partitioners) if partitioners is not None else [_xnnpack_partitioner()]
    try:
        with Rejections().listening("executorch.backends") as rejections:
            _forget_provenance(exported.graph)
            edge = to_edge_transform_and_lower(exported, partitioner=chosen)
        report = delegation_of(edge.exported_program().graph_module, rejections.reasons, applied)
        program = edge.to_executorch()
    except Exception as error:
        raise LoweringError(f"ExecuTorch cannot lower this graph: {error}") from error
    _check_kernels(program.executorch_program)
    buffer = bytes(program.buffer)
    return ExecuTorchProgram(buffer, replace(report, size=len(buffer), notes=notes), signature_of(exported))


def _xnnpack_partitioner() -> Any:
    """XNNPACK's partitioner, which says what it takes, with our rule for what goes together.

    Its own rule tries to join each pair of partitions once, in the order of the graph, which leaves a model whose
    blocks share a chain or a mask in pieces, and takes time that grows with the square of their number.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    partitioner = XnnpackPartitioner()
    by_pairs = partitioner.generate_partitions

    def by_stages(exported: ExportedProgram) -> list[Partition]:
        _forget_provenance(exported.graph)
        groups = [_with_results(group) for group in partitioner.get_matched_nodes_from_configs(exported)]
        found = stages(exported.graph, groups)
        if found is None:
            joined: list[Partition] = by_pairs(exported)
            return joined
        return [Partition(id=index, nodes=nodes) for index, nodes in enumerate(found)]

    partitioner.generate_partitions = by_stages
    return partitioner


def _forget_provenance(graph: Graph) -> None:
    """Drop each node's list of the nodes it was made from, one per pass so far.

    Every pass that follows copies the list of every node, which is most of what lowering a large model costs.
    """
    for node in graph.nodes:
        node.meta.pop("from_node", None)


def _with_results(group: list[Node]) -> list[Node]:
    """A group with the nodes that pick the results of ops that return several."""
    picks = [user for node in group for user in node.users if user.target is operator.getitem]
    return list(dict.fromkeys([*group, *picks]))


def _check_kernels(program: Any) -> None:
    """Raise `LoweringError` for ops that the runtime of this process has no kernel for."""
    from executorch.runtime import Runtime

    available = Runtime.get().operator_registry.operator_names
    wanted = {
        f"{op.name}.{op.overload}" if op.overload else op.name
        for plan in program.execution_plan
        for op in plan.operators
    }
    missing = sorted(wanted - available)
    if missing:
        raise LoweringError(
            f"the ExecuTorch runtime has no kernel for {', '.join(missing)}: leave the ops around them in float, or "
            f"give the partitioner of a backend that takes them"
        )


def _load(buffer: bytes) -> tuple[Any, Any]:
    """The loaded program, which owns the bytes, and its method; the file's structure is verified."""
    with _undisturbed():
        _require_executorch()
        from executorch.runtime import Runtime, Verification

        program = Runtime.get().load_program(buffer, verification=Verification.InternalConsistency)
        try:
            return program, program.load_method("forward")
        except RuntimeError as error:
            raise LoweringError(f"the ExecuTorch runtime cannot load this program: {error}") from error
