"""Inductor on a flat graph: flags, symbolic sizes, the compiler's errors.

Inductor is called on the graph directly, not through ``torch.compile``: the graph is already captured, so there is
nothing for Dynamo to trace or to guard, nothing recompiles behind the caller's back with other flags, and
``torch._dynamo.reset()`` elsewhere in the process does not reach the program.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule

from lowering.inductor_signature import Input
from quant2e.errors import LoweringError

Flat = Callable[..., Sequence[Any]]
"""A compiled graph: flat tensors in, flat tensors out."""


class FakeInputs:
    """Fake inputs in a shape environment of their own, so that compiling leaves the captured graph's alone.

    ``values``: one per input that the compiled graph takes. Sizes that are symbols in the captured graph are symbols
    here, with the same bounds and the same equalities between inputs.
    """

    def __init__(self, inputs: Sequence[Input], symbols: Mapping[Any, tuple[float, float]]) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        self._env = ShapeEnv(duck_shape=False)
        self._mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._symbols = {old: self._symbol(old, low, high) for old, (low, high) in symbols.items()}
        self.values = [self._renew(spec) for spec in inputs if spec.taken]

    def accept(self, sizes: Sequence[int]) -> bool:
        """Whether the program compiled for these inputs may run with its symbols at ``sizes``.

        Compiling leaves guards behind: conditions on sizes that the generated code takes for granted.
        """
        values = dict(zip(self._symbols.values(), sizes, strict=True))
        if any(self._env.var_to_range[symbol].lower > size for symbol, size in values.items()):
            return False
        return all(bool(guard.expr.xreplace(values)) for guard in self._env.guards)

    def _renew(self, spec: Input) -> Any:
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
        symbol = self._env.create_symbol(example, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=example < 2)
        if high != float("inf"):
            self._env.constrain_symbol_range(symbol, compiler_min=min(2, example), compiler_max=int(high))
        return symbol


@contextmanager
def _flags(inspect: Callable[[Graph], None]) -> Iterator[None]:
    """What the int8 patterns need, for the duration of one compilation.

    ``freezing``: weights become constants of the program, which is what weight packing matches on. The graph cache
    is off because a hit would skip ``inspect``, and with it the report; compiled C++ is still cached by content.
    """
    import torch._functorch.config
    import torch._inductor.config

    directory = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
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
        stack.callback(_restore_variable, "TORCHINDUCTOR_CACHE_DIR", directory)  # Inductor writes its default there
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._inductor.config.patch(inductor))
        stack.enter_context(torch._functorch.config.patch({"enable_autograd_cache": False}))
        stack.enter_context(torch.random.fork_rng(devices=[]))  # tracing patterns draws random numbers
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_writable_cache())
        yield


def _restore_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


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
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        with _flags(inspect):
            compiled: Any = compile_fx(gm, list(inputs))
            return cast("Flat", compiled)
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
