"""Decoder: a language model of Hugging Face as two graphs, one for prompts and one for tokens, that generate.

    prefill(input_ids [1, n], position [1]) ─▶ logits [1, words]        n from 2 up: a prompt in one call
    decode(input_ids [1, 1], position [1])  ─▶ logits [1, words]        one more token

Both write keys and values into a static cache, buffers of `max_length` places, at the position that they are given;
what lies behind it is not read, so that nothing has to be cleared between prompts.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from quant2e.errors import CaptureError, Quant2eError
from quant2e.graph.captured.capture import capture
from quant2e.graph.captured.module import CapturedModule
from quant2e.graph.effects import writes
from quant2e.graph.mutation import written_attributes
from quant2e.passes.fold_weights import weights_in_memory_once
from quant2e.pipeline import quantize
from quant2e.quantized_model import QuantizedModel

aten = torch.ops.aten


class CachedDecoder(nn.Module):
    """A causal language model of Hugging Face with a static cache in buffers, which ``torch.export`` can follow.

    ``model``: in eval mode. ``max_length``: places in the cache, for prompt and new tokens together. The buffers are
    ``key_cache_0``, ``value_cache_0``, ``length_0`` and so on, one of each for every layer.
    Raises `CaptureError` for other models, and where transformers is not installed.
    """

    def __init__(self, model: nn.Module, max_length: int) -> None:
        super().__init__()
        config = _config_of(model, max_length)
        try:
            from transformers import StaticCache
            from transformers.cache_utils import StaticLayer
        except ImportError as error:
            raise CaptureError(
                f"the cache of a Hugging Face decoder comes from transformers, which is not installed ({error}): "
                "pip install quant2e[decoders]"
            ) from error
        self.model = model
        cache = StaticCache(config=config, max_cache_len=max_length)
        if not all(type(layer) is StaticLayer for layer in cache.layers):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
            raise CaptureError(
                f"{type(model).__name__} has a cache with layers of the kinds {kinds}: only layers that see all tokens "
                "are captured. Set config.layer_types to 'full_attention' if max_length is within the window anyway"
            )
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        first = next(model.parameters())
        cache.early_initialization(1, heads, width, first.dtype, first.device)
        self._layers: list[Any] = list(cache.layers)
        for index, layer in enumerate(self._layers):
            self.register_buffer(f"key_cache_{index}", layer.keys)
            self.register_buffer(f"value_cache_{index}", layer.values)
            self.register_buffer(f"length_{index}", layer.cumulative_length)
        taken = inspect.signature(model.forward).parameters
        self._options = {"use_cache": True, "cache" if "cache" in taken else "past_key_values": cache}
        if "logits_to_keep" in taken:
            self._options["logits_to_keep"] = 1
        self._takes_positions = "position_ids" in taken

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """Logits ``[1, words]`` of what follows ``input_ids``, int64 ``[1, n]``, whose first lies at ``position``."""
        for layer in self._layers:
            layer.cumulative_length.copy_(position[0])
        places = {}
        if self._takes_positions:  # some models find them by what is in the cache, which no graph can hold
            places["position_ids"] = (position + torch.arange(input_ids.shape[1], device=position.device)).unsqueeze(0)
        logits: Tensor = self.model(input_ids=input_ids, **places, **self._options).logits
        return logits[:, -1]


def _config_of(model: nn.Module, max_length: int) -> Any:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(model, "generate"):
        raise CaptureError(
            f"{type(model).__name__} is no causal language model of Hugging Face: give one that has a config and "
            "generate(), or capture a module of your own, with its cache in buffers"
        )
    if model.training:
        raise CaptureError(f"{type(model).__name__} is in training mode: call eval() first")
    if max_length < 2:
        raise CaptureError(f"max_length={max_length}: a cache has places for 2 tokens or more")
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if most is not None and max_length > most:
        raise CaptureError(f"max_length={max_length}: {type(model).__name__} has {most} positions")
    return text


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Decoder:
    """A language model that generates, in float, quantized or lowered.

    ``decode``: takes one token. ``prefill``: takes a prompt of two tokens or more; None: prompts go through ``decode``,
    token by token, for the reason in ``note``. Both take ``input_ids`` ``[1, n]`` and ``position`` ``[1]``, int64, and
    return logits ``[1, words]``. ``max_length``: places in the cache.
    """

    decode: Any
    prefill: Any
    max_length: int
    note: str = ""

    def __repr__(self) -> str:
        how = "in one call" if self.prefill is not None else f"token by token{self.note and f': {self.note}'}"
        return f"Decoder: {self.max_length} places in the cache, prompts {how}\n  decode: {self.decode!r}"

    @property
    def cache_names(self) -> tuple[str, ...]:
        """Buffers of keys and values, as ``set_buffer`` of a quantizer takes them; empty for lowered ones."""
        module = _graph_of(self.decode)
        written = () if module is None else written_attributes(module)
        return tuple(name for name in written if name.startswith(("key_cache_", "value_cache_")))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, max_new_tokens: int, *, stop: int | None = None) -> Tensor:
        """``input_ids``, int64 ``[1, n]``, with up to ``max_new_tokens`` likeliest tokens behind it, ``[1, m]``.

        ``stop``: the token behind which nothing follows. Raises `Quant2eError` for other prompts, and where the cache
        has no place for all of them.
        """
        if (
            input_ids.dtype is not torch.int64
            or input_ids.dim() != 2
            or input_ids.shape[0] != 1
            or not len(input_ids[0])
        ):
            raise Quant2eError(
                f"a prompt is int64 of the shape [1, n], not {input_ids.dtype} {list(input_ids.shape)}: prompts are "
                "generated from one by one"
            )
        count = input_ids.shape[1]
        if max_new_tokens < 0 or count + max_new_tokens > self.max_length:
            raise Quant2eError(
                f"{count} tokens and {max_new_tokens} more: the cache has {self.max_length} places; capture the model "
                "with a larger max_length"
            )
        if not max_new_tokens:
            return input_ids
        tokens, logits = input_ids, self._read_prompt(input_ids)
        for place in range(count, count + max_new_tokens):
            token = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, token], 1)
            if place + 1 == count + max_new_tokens or (stop is not None and int(token) == stop):
                break
            logits = self.decode(token, torch.tensor([place]))
        return tokens

    def _read_prompt(self, input_ids: Tensor) -> Tensor:
        """Logits behind a prompt, whose keys and values are then in the cache of ``decode``."""
        if self.prefill is not None and input_ids.shape[1] > 1:
            logits: Tensor = self.prefill(input_ids, torch.tensor([0]))
            _continue(self.decode, self.prefill)
            return logits
        *_, logits = (self.decode(*step) for step in _steps([input_ids]))
        return logits

    def quantize(self, quantizer: Any, prompts: Iterable[Tensor] = (), **options: Any) -> Decoder:
        """The decoder, quantized. Its parts are `QuantizedModel`; weights of equal integers are in memory once.

        ``prompts``: token ids, int64 ``[1, n]`` each, to calibrate on; weight-only and dynamic quantization need none.
        ``options``: as `quant2e.quantize` takes them. Where caches become integers (``set_buffer``) prompts go through
        ``decode``, since the two graphs would round keys differently. Raises what `quant2e.quantize` does.
        """
        with weights_in_memory_once():
            return self._quantized(quantizer, prompts, **options)

    def _quantized(self, quantizer: Any, prompts: Iterable[Tensor], **options: Any) -> Decoder:
        prompts = [prompt[:, : self.max_length] for prompt in prompts]
        token, start = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0])
        decode = quantize(self.decode, (token, start), quantizer, list(_steps(prompts)) or None, **options)
        if any(not value.is_floating_point() for name, value in _caches(decode.module)):
            return Decoder(decode, None, self.max_length, "its caches are integers, on scales of their own")
        if self.prefill is None:
            return Decoder(decode, None, self.max_length, self.note)
        longer = [(prompt, start) for prompt in prompts if prompt.shape[1] > 1]
        example = (torch.zeros(1, min(4, self.max_length), dtype=torch.int64), start)
        prefill = quantize(self.prefill, example, quantizer, longer or None, **options)
        _share_equal(prefill.module, decode.module)
        return Decoder(decode, prefill, self.max_length)

    def lowered(self, lower: Callable[[Any], Any], *, prefill: bool = True) -> Decoder:
        """The decoder on a target: ``decoder.lowered(lowering.to_inductor)``, or ``lowering.to_executorch``.

        Where programs of the target cannot take over each other's state, as methods of ExecuTorch in Python, prompts go
        through ``decode``; ``prefill=False`` does without a program for them in any case. Raises what ``lower`` does.
        """
        decode = lower(self.decode)
        if not prefill:
            return Decoder(decode, None, self.max_length, "without a program for prompts, as was asked for")
        if self.prefill is None or not hasattr(decode, "continue_from"):
            note = self.note or f"one {type(decode).__name__} cannot take over the cache of another one"
            return Decoder(decode, None, self.max_length, note)
        return Decoder(decode, lower(self.prefill), self.max_length)


def capture_decoder(model: nn.Module, max_length: int) -> Decoder:
    """A causal language model of Hugging Face (Llama, Qwen, GPT-2, …) as a `Decoder` of two captured graphs.

    The graphs share the parameters of ``model`` and one cache of ``max_length`` places; batches have one prompt.
    Raises `CaptureError` for other models, for one in training mode, and when it cannot be exported.
    """
    with warnings.catch_warnings():
        # of copies of the cache that are in no graph, and would be constants
        warnings.filterwarnings("ignore", "A model attribute .*lifted_tensor")
        return _captured(CachedDecoder(model, max_length).eval(), max_length)


def _captured(cached: CachedDecoder, max_length: int) -> Decoder:
    token, start = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0])
    decode = _drop_unread_lengths(capture(cached, (token, start)))
    if max_length < 4:
        return Decoder(decode, None, max_length, f"a cache of {max_length} places")
    prompt = torch.zeros(1, 4, dtype=torch.int64)
    sizes = ({1: Dim("tokens", min=2, max=max_length)}, None)
    return Decoder(decode, _drop_unread_lengths(capture(cached, (prompt, start), dynamic_shapes=sizes)), max_length)


def _drop_unread_lengths(module: CapturedModule) -> CapturedModule:
    """Without numbers that are read from the cache and only become sizes of what nobody reads, which no target can
    compute; torch's assertions that they are no less than 0 go with them.
    """
    nodes = module.graph.nodes
    for number in [node for node in nodes if node.target is aten.item.default]:
        below = dict.fromkeys([number])
        for node in nodes:
            if any(source in below for source in node.all_input_nodes):
                below[node] = None
        if not any(node.op == "output" or writes(node) for node in below):
            for node in reversed(below):
                module.graph.erase_node(node)
    module.recompile()
    return module


def _steps(prompts: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The calls of ``decode`` that read the prompts."""
    for prompt in prompts:
        for place in range(prompt.shape[1]):
            yield prompt[:, place : place + 1], torch.tensor([place])


def _graph_of(part: Any) -> GraphModule | None:
    module = part.module if isinstance(part, QuantizedModel) else part
    return module if isinstance(module, GraphModule) else None


def _caches(module: GraphModule) -> list[tuple[str, Tensor]]:
    written = written_attributes(module).items()
    return [(name, value) for name, value in written if name.startswith(("key_cache_", "value_cache_"))]


def _continue(decode: Any, prefill: Any) -> None:
    """Give ``decode`` the cache as ``prefill`` left it."""
    target, source = _graph_of(decode), _graph_of(prefill)
    if target is None or source is None:
        decode.continue_from(prefill)
        return
    values = written_attributes(source)
    for name, tensor in written_attributes(target).items():
        if tensor is not values[name]:
            tensor.copy_(values[name])


def _share_equal(module: GraphModule, other: GraphModule) -> None:
    """Let ``module`` hold the tensors of ``other`` where the two are equal and neither graph writes them."""
    kept = {**written_attributes(module), **written_attributes(other)}
    for mine, theirs, table in (
        (module.named_parameters(remove_duplicate=False), dict(other.named_parameters()), "_parameters"),
        (module.named_buffers(remove_duplicate=False), dict(other.named_buffers()), "_buffers"),
    ):
        for path, value in list(mine):
            twin = theirs.get(path)
            if twin is None or twin is value or path in kept or twin.dtype != value.dtype:
                continue
            if twin.shape == value.shape and torch.equal(twin, value):
                prefix, _, name = path.rpartition(".")
                getattr(module.get_submodule(prefix), table)[name] = twin
