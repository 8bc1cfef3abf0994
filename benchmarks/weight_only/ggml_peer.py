"""ggml, as the libraries of `libggml-python` have it: Q4_0 and Q8_0, whose rows are int8 in groups of 32.

The decoder is written as a graph of ggml's ops, through its C interface. Weights of 4 bits lie in the layout that its
CPU backend repacks them to.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.weight_only.decoders import VOCABULARY, Call, Decoder, Program

F32, Q4_0, Q8_0, I32 = 0, 2, 8, 26
"""Types of tensors, by ggml's numbers."""

_NEOX = 2
_NODES = 4096
_REPACKED = "_Z35ggml_backend_cpu_repack_buffer_typev"


class _Library:
    """Functions of the shared libraries: each returns a pointer unless `_RETURNS` says else."""

    _RETURNS: dict[str, Any] = {  # noqa: RUF012
        "ggml_quantize_chunk": c_size_t,
        "ggml_nbytes": c_size_t,
        "ggml_gallocr_alloc_graph": c_bool,
        "ggml_backend_graph_compute": c_int,
    }

    def __init__(self) -> None:
        found = importlib.util.find_spec("libggml")
        if found is None or not found.submodule_search_locations:
            raise ModuleNotFoundError("libggml: pip install libggml-python")
        folder = Path(found.submodule_search_locations[0]) / "lib64"
        self._base, self._cpu = (
            ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu")
        )

    def __call__(self, name: str, *args: Any) -> Any:
        library = self._cpu if name == _REPACKED or name.startswith("ggml_backend_cpu") else self._base
        function = getattr(library, name)
        function.restype = self._RETURNS.get(name, c_void_p)
        return function(*args)


class _Parameters(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Model:
    """Weights in ggml's buffers, and the graph of a step. ``kind``: of the weights of linear layers."""

    def __init__(self, model: Decoder, ids: Tensor, kind: int) -> None:
        self.c, self.kind = _Library(), kind
        self.config: Any = model.model.config
        self.backend = c_void_p(self.c("ggml_backend_cpu_init"))
        self.plain, self.packed, self.context = self._context(), self._context(), self._context()
        self.values: list[tuple[Any, Tensor, bool]] = []
        self.linear = {
            n: self._weight(m.weight) for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)
        }
        self.norm = {n: self._tensor(p) for n, p in model.model.named_parameters() if "norm" in n}
        self.table = self._tensor(model.model.get_input_embeddings().weight)
        self.ids = self._tensor(ids[0].to(torch.int32))
        self.places = self._tensor(torch.arange(ids.shape[1], dtype=torch.int32))
        self.tokens = ids.shape[1]
        buffers = {id(self.plain): "ggml_backend_cpu_buffer_type", id(self.packed): _REPACKED}
        for context in (self.plain, self.packed):
            kind_of = c_void_p(self.c(buffers[id(context)]))
            self.c("ggml_backend_alloc_ctx_tensors_from_buft", context, kind_of)
        for tensor, value, quantized in self.values:
            self._fill(tensor, value, quantized)
        self.values = []
        self.logits = c_void_p(self._graph())

    def _context(self) -> c_void_p:
        return c_void_p(self.c("ggml_init", _Parameters(_NODES * 600, None, True)))

    def _tensor(self, value: Tensor) -> c_void_p:
        kind = I32 if value.dtype is torch.int32 else F32
        sizes = [c_int64(size) for size in reversed(value.shape)]
        tensor = c_void_p(self.c(f"ggml_new_tensor_{len(sizes)}d", self.plain, kind, *sizes))
        self.values.append((tensor, value.detach().contiguous(), False))
        return tensor

    def _weight(self, value: Tensor) -> c_void_p:
        outputs, inputs = value.shape
        context = self.packed if self.kind == Q4_0 else self.plain
        tensor = c_void_p(self.c("ggml_new_tensor_2d", context, self.kind, c_int64(inputs), c_int64(outputs)))
        self.values.append((tensor, value.detach().contiguous(), True))
        return tensor

    def _fill(self, tensor: c_void_p, value: Tensor, quantized: bool) -> None:
        size = self.c("ggml_nbytes", tensor)
        data = ctypes.create_string_buffer(size) if quantized else c_void_p(value.data_ptr())
        if quantized:
            outputs, inputs = (c_int64(n) for n in value.shape)
            source = c_void_p(value.data_ptr())
            self.c("ggml_quantize_chunk", self.kind, source, data, c_int64(0), outputs, inputs, None)
        self.c("ggml_backend_tensor_set", tensor, data, c_size_t(0), c_size_t(size))

    def _op(self, name: str, *args: Any) -> c_void_p:
        return c_void_p(self.c(f"ggml_{name}", self.context, *args))

    def _normed(self, x: c_void_p, name: str) -> c_void_p:
        return self._op("mul", self._op("rms_norm", x, c_float(self.config.rms_norm_eps)), self.norm[f"{name}.weight"])

    def _turned(self, x: c_void_p) -> c_void_p:
        """Heads with rotary positions: ``[head size, tokens, heads]``."""
        heads = self._heads(x)
        numbers = (c_float(10000), c_float(1), c_float(0), c_float(1), c_float(32), c_float(1))
        turned = self._op("rope_ext", heads, self.places, None, 64, _NEOX, 0, *numbers)
        return self._op("permute", turned, 0, 2, 1, 3)

    def _heads(self, x: c_void_p) -> c_void_p:
        sizes = (c_int64(64), c_int64(self.config.num_attention_heads), c_int64(self.tokens))
        return self._op("reshape_3d", x, *sizes)

    def _attention(self, x: c_void_p, name: str) -> c_void_p:
        query, key, value = (self._op("mul_mat", self.linear[f"{name}.{each}_proj"], x) for each in "qkv")
        scores = self._op("mul_mat", self._turned(key), self._turned(query))
        weights = self._op("soft_max_ext", self._op("diag_mask_inf", scores, 0), None, c_float(64**-0.5), c_float(0))
        values = self._op("cont", self._op("permute", self._heads(value), 1, 2, 0, 3))
        found = self._op("permute", self._op("mul_mat", values, weights), 0, 2, 1, 3)
        flat = self._op("cont_2d", found, c_int64(self.config.hidden_size), c_int64(self.tokens))
        return self._op("mul_mat", self.linear[f"{name}.o_proj"], flat)

    def _graph(self) -> Any:
        x = self._op("get_rows", self.table, self.ids)
        for number in range(self.config.num_hidden_layers):
            name = f"model.layers.{number}"
            x = self._op("add", x, self._attention(self._normed(x, f"{name}.input_layernorm"), f"{name}.self_attn"))
            inner = self._normed(x, f"{name}.post_attention_layernorm")
            gate, up = (self._op("mul_mat", self.linear[f"{name}.mlp.{each}_proj"], inner) for each in ("gate", "up"))
            both = self._op("mul", self._op("silu", gate), up)
            x = self._op("add", x, self._op("mul_mat", self.linear[f"{name}.mlp.down_proj"], both))
        logits = self._op("mul_mat", self.linear["lm_head"], self._normed(x, "model.norm"))
        self.c("ggml_set_output", logits)
        self.graph = self._op("new_graph_custom", c_size_t(_NODES), c_bool(False))
        self.c("ggml_build_forward_expand", self.graph, logits)
        allocator = c_void_p(self.c("ggml_gallocr_new", c_void_p(self.c("ggml_backend_cpu_buffer_type"))))
        if not self.c("ggml_gallocr_alloc_graph", allocator, self.graph):
            raise MemoryError("ggml: no memory for the graph")
        return logits.value

    def on(self, threads: int) -> Call:
        """A step on so many threads, from now on."""
        self.c("ggml_backend_cpu_set_n_threads", self.backend, threads)
        return self.step

    def step(self) -> Tensor:
        """Logits of the tokens."""
        if self.c("ggml_backend_graph_compute", self.backend, self.graph):
            raise RuntimeError("ggml: the graph failed")
        logits = torch.empty(1, self.tokens, VOCABULARY)
        self.c(
            "ggml_backend_tensor_get", self.logits, c_void_p(logits.data_ptr()), c_size_t(0), c_size_t(logits.nbytes)
        )
        return logits


def programs(model: Decoder, ids: Tensor) -> Iterator[Program]:
    """Q4_0 and Q8_0."""
    for weights, kind in (("4 bits, groups of 32, symmetric (Q4_0)", Q4_0), ("8 bits, groups of 32 (Q8_0)", Q8_0)):
        yield Program(library="ggml", weights=weights, rows="int8", on=_Model(model, ids, kind).on)
