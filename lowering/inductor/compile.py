"""Compilation by Inductor of a flat graph: flags, symbolic sizes, the compiler's errors.

Inductor is called on the graph directly, not through ``torch.compile``: the graph is already captured, so there is
nothing for Dynamo to trace or to guard, nothing recompiles behind the caller's back with other flags, and
``torch._dynamo.reset()`` elsewhere in the process does not reach the program.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from lowering.inductor.kernels.compiled_step import CompiledStep
from lowering.inductor.package_file import archive
from lowering.inductor.report import Kernel, int8_kernels
from lowering.signature import ProgramInput
from quant2e.errors import LoweringError
from quant2e.isolation import quietly, tracing

Flat = Callable[..., Sequence[Any]]
"""A compiled graph: flat tensors in, flat tensors out."""


class FakeInputs:
    """Fake inputs in a shape environment of their own, so that compiling leaves the captured graph's alone.

    ``values``: one per input that the compiled graph takes. Sizes that are symbols in the captured graph are symbols
    here, with the same bounds and the same equalities between inputs.

    ``whole``: what Inductor takes for granted on a size is listed in ``assumed`` and does not narrow its bounds, from 1
    on: for programs that are compiled once.
    """

    def __init__(
        self, inputs: Sequence[ProgramInput], symbols: Mapping[Any, tuple[float, float]], *, whole: bool = False
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self._whole = whole
        self._env = _shape_env(whole)
        self._mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._symbols = {old: self._symbol(old, low, high) for old, (low, high) in symbols.items()}
        self.values = [self._renew(spec) for spec in inputs if spec.taken]

    def assumed(self, names: Mapping[Any, str]) -> tuple[str, ...]:
        """What the compiled code takes for granted on sizes, as inequalities. ``names``: of the captured symbols."""
        named = {new: new.func(names[old]) for old, new in self._symbols.items()}
        return tuple(dict.fromkeys(str(guard.expr.xreplace(named)) for guard in self._env.guards))

    def accept(self, sizes: Sequence[int]) -> bool:
        """Whether the program compiled for these inputs may run with its symbols at ``sizes``.

        Compiling leaves guards behind: conditions on sizes that the generated code takes for granted.
        """
        values = dict(zip(self._symbols.values(), sizes, strict=True))
        if any(self._env.var_to_range[symbol].lower > size for symbol, size in values.items()):
            return False
        return all(bool(guard.expr.xreplace(values)) for guard in self._env.guards)

    def _renew(self, spec: ProgramInput) -> Any:
        if isinstance(spec.value, torch.SymInt):
            return self._size(spec.value)
        sizes = [self._size(size) for size in spec.value.shape]
        with self._mode:
            empty = torch.empty(sizes, dtype=spec.value.dtype, device=spec.device)
            return empty.contiguous(memory_format=spec.memory_format)

    def _size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr.xreplace(self._symbols)
        made: int | torch.SymInt = self._env.create_symintnode(
            expr, hint=int(expr.xreplace(self._env.backed_var_to_val))
        )
        return made

    def _symbol(self, old: Any, low: float, high: float) -> Any:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        # Code for any size is generated with an example in mind. One that equals 0 or 1 would be taken literally.
        example = int(min(max(low, 8), high))
        source = ConstantSource(f"__{old}")
        symbol = self._env.create_symbol(
            example, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=self._whole or example < 2
        )
        if self._whole or high != float("inf"):
            least = max(int(low), 1) if self._whole else min(2, example)
            most = int(high) if high != float("inf") else sys.maxsize - 1
            self._env.constrain_symbol_range(symbol, compiler_min=least, compiler_max=most)
        return symbol


def _shape_env(whole: bool) -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    class WholeRanges(ShapeEnv):
        """Keeps the bounds of a size when an inequality is taken for granted."""

        def _refine_ranges(self, expr: Any) -> None:
            pass

    return (WholeRanges if whole else ShapeEnv)(duck_shape=False)


@contextmanager
def _flags(inspect: Callable[[Graph], None]) -> Iterator[None]:
    """What the patterns of integers need, for the duration of one compilation.

    ``freezing``: weights become constants of the program, which is what weight packing matches on. The graph cache
    is off because a hit would skip ``inspect``, and with it the report; compiled C++ is still cached by content.
    """
    import torch._functorch.config
    import torch._inductor.config

    before = torch._inductor.config.post_grad_custom_post_pass
    passes = [*before] if isinstance(before, list | tuple) else [before] if before is not None else []

    def after_all(graph: Graph) -> None:
        for custom in passes:
            custom(graph)
        inspect(graph)

    inductor = {
        "freezing": True,
        "freezing_discard_parameters": False,
        "fx_graph_cache": False,
        "post_grad_custom_post_pass": after_all,
    }
    with ExitStack() as stack:
        stack.enter_context(tracing())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._inductor.config.patch(inductor))
        stack.enter_context(torch._functorch.config.patch({"enable_autograd_cache": False}))
        stack.enter_context(quietly())
        stack.enter_context(_writable_cache())
        yield


@contextmanager
def _writable_cache() -> Iterator[None]:
    """Inductor's cache directory where it can be written, a temporary one otherwise."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, temporary_cache_dir

    try:
        folder = cache_dir()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        with tempfile.TemporaryDirectory(prefix="quant2e_") as folder, temporary_cache_dir(folder):
            yield
        return
    yield


def compile_flat(gm: GraphModule, inputs: Sequence[Any], inspect: Callable[[Graph], None]) -> Flat:
    """Compile ``gm``, which takes and returns flat tensors, for fake ``inputs``; ``inspect`` sees the final graph.

    ``gm`` is consumed. Raises `LoweringError` when there is no working C++ compiler or Inductor fails.
    """
    from torch._inductor.compile_fx import compile_fx

    with _explained(), _flags(inspect):
        compiled: Any = compile_fx(gm, list(inputs))
    return cast("Flat", compiled)


def compile_step(step: CompiledStep) -> list[Kernel]:
    """Compile what a program calls many times. Returns the integer kernels in it, once for each call.

    Raises `LoweringError` as `compile_flat` does.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph = Graph()
    graph.output(graph.graph_copy(step.body.graph, {}))
    for node in graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key != "val"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in step.inputs]
    found: list[Kernel] = []
    step.run = compile_flat(GraphModule(step.body, graph), inputs, lambda made: found.extend(int8_kernels(made)))
    return [replace(kernel, tag=names.get(kernel.tag, "")) for names in step.names for kernel in found]


def package_flat(
    gm: GraphModule,
    inputs: Sequence[Any],
    inspect: Callable[[Graph], None],
    specs: tuple[pytree.TreeSpec, pytree.TreeSpec],
) -> bytes:
    """Compile as `compile_flat` does, ahead of time; returns a zip of the generated files, as `archive` makes it.

    ``specs``: structure of the inputs and outputs that the loaded package takes and returns. Raises `LoweringError` as
    well when the program calls an op that torch alone does not have.
    """
    from torch._inductor.compile_fx import compile_fx_aot

    options = {
        "aot_inductor.package": True,
        "aot_inductor.metadata": {**torch._inductor.config.aot_inductor.metadata},  # torch writes into it
        "aot_inductor.serialized_in_spec": pytree.treespec_dumps(specs[0]),
        "aot_inductor.serialized_out_spec": pytree.treespec_dumps(specs[1]),
        "aot_inductor.enable_line_tables": False,  # they hold the paths of this machine, and are most of a small file
    }
    with _explained(), _flags(inspect), _checked_inputs(), _state_kept(), _packed_weights():
        files: Any = compile_fx_aot(gm, list(inputs), config_patches=options)
    _check_files([Path(file) for file in files if isinstance(file, str)])
    return archive(files)


_TORCHS_OWN = frozenset({"aten", "mkl", "mkldnn", "onednn", "prims", "quantized"})
_ENVIRONMENT = 'getenv("AOTI_RUNTIME_CHECK_INPUTS")'


@contextmanager
def _checked_inputs() -> Iterator[None]:
    """Packages made here check dtype, sizes and strides of their inputs at each call.

    AOTInductor generates these checks and leaves them out unless the process has AOTI_RUNTIME_CHECK_INPUTS set; without
    them a tensor in another layout gives wrong numbers.
    """
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    generator: Any = CppWrapperCpu
    original = generator.generate_input_output_runtime_checks

    def always(wrapper: Any) -> None:
        original(wrapper)
        lines = wrapper.prefix._lines
        lines[:] = [line.replace(_ENVIRONMENT, '"1"') if isinstance(line, str) else line for line in lines]

    generator.generate_input_output_runtime_checks = always
    try:
        yield
    finally:
        generator.generate_input_output_runtime_checks = original


@contextmanager
def _state_kept() -> Iterator[None]:
    """Buffers that a graph writes to are no constants: ahead of time, freezing folds what is computed from them."""
    from torch._inductor.constant_folding import ConstantFolder

    folder: Any = ConstantFolder
    original = folder.run_node

    def run_node(self: Any, node: Node) -> Any:
        return self.unknown_value if _is_written(node) else original(self, node)

    folder.run_node = run_node
    try:
        yield
    finally:
        folder.run_node = original


@contextmanager
def _packed_weights() -> Iterator[None]:
    """Weights that are packed already are not cloned by their strides, which they do not have."""
    import torch._inductor.compile_fx

    compiler: Any = torch._inductor.compile_fx
    original = compiler.clone_preserve_strides

    def cloned(x: Tensor) -> Any:
        return x if x.is_mkldnn else original(x)

    compiler.clone_preserve_strides = cloned
    try:
        yield
    finally:
        compiler.clone_preserve_strides = original


def _is_written(node: Node) -> bool:
    """Whether the functional graph that Inductor folds ends by copying a result into this attribute."""
    written = (user.args[0] for user in node.users if user.target is torch.ops.aten.copy_.default)
    return node.op == "get_attr" and any(target is node for target in written)


def _check_files(files: Sequence[Path]) -> None:
    """Look at what AOTInductor generated: inputs are checked, and every op that it calls by name is torch's own."""
    assert not any(_ENVIRONMENT in file.read_text() for file in files if file.suffix == ".cpp"), "inputs are checked"
    for file in files:
        nodes = json.loads(file.read_text()).get("nodes", []) if file.suffix == ".json" else []
        targets = {str(node["node"]["target"]).removeprefix("torch.ops.") for node in nodes}
        if foreign := sorted(target for target in targets if re.split(r"\.|::", target)[0] not in _TORCHS_OWN):
            raise LoweringError(
                f"the program calls {', '.join(foreign)}, which a process that imports only torch does not have: use "
                f"to_inductor, or leave the ops around them in float"
            )


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of the compiler as `LoweringError`, with what to do."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, InvalidCxxCompiler):
                raise LoweringError(
                    f"Inductor generates C++, and no C++ compiler was found ({cause}): install g++ or clang++, or name "
                    f"one in the environment variable CXX"
                ) from error
            if isinstance(cause, CppCompileError):
                raise LoweringError(
                    f"the C++ compiler rejected what Inductor generated: check that '{os.environ.get('CXX', 'g++')}' "
                    f"works and supports C++17. {cause}"
                ) from error
            cause = cause.__cause__ or getattr(cause, "inner_exception", None)
        raise LoweringError(
            f"Inductor could not compile the graph: {type(error).__name__}: {error}. The Q/DQ graph itself still runs; "
            f"set TORCH_LOGS=inductor to see where the compiler stopped"
        ) from error


@contextmanager
def explained_run(values: Sequence[Any]) -> Iterator[None]:
    """Errors of the compiled program as `LoweringError`. ``values``: flat inputs of the call."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in values]
        raise LoweringError(f"the program that Inductor made failed on inputs {shapes}: {error}") from error
