"""Language models: decoders over one static cache generate what the model does, and say why where they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowering
from lowering.language_models import Decoder, capture_decoder
from quant2e import CaptureError, Quant2eError, capture
from quant2e.graph.mutation import written_attributes
from quantizers import X86InductorQuantizer, XNNPACKQuantizer

IDS = torch.tensor([[5, 17, 3, 42, 8]])


class Counter:
    """Says that the largest token so far, and one more, comes next; counts its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, input_ids, position):
        self.calls.append((input_ids.tolist(), position.tolist()))
        return torch.nn.functional.one_hot(input_ids.max(1).values + 1, 99).float()

    def continue_from(self, other):
        self.calls.append("continued")


def test_a_prompt_is_read_in_one_call_and_tokens_one_by_one():
    decode, prefill = Counter(), Counter()
    tokens = Decoder(decode, prefill, 9).generate(IDS, 3)
    assert tokens.tolist() == [[5, 17, 3, 42, 8, 43, 44, 45]]
    assert prefill.calls == [(IDS.tolist(), [0])]
    assert decode.calls == ["continued", ([[43]], [5]), ([[44]], [6])]


def test_without_prefill_a_prompt_is_read_token_by_token():
    decode = Counter()
    assert Decoder(decode, None, 9, "a reason").generate(IDS, 1).tolist() == [[5, 17, 3, 42, 8, 9]]
    assert decode.calls == [([[token]], [place]) for place, token in enumerate(IDS[0].tolist())]
    assert "token by token: a reason" in repr(Decoder(decode, None, 9, "a reason"))


def test_nothing_follows_the_stop():
    assert Decoder(Counter(), Counter(), 9).generate(IDS, 4, stop=44).tolist()[0][5:] == [43, 44]
    assert Decoder(Counter(), Counter(), 9).generate(IDS, 0) is IDS


@pytest.mark.parametrize(
    ("ids", "count", "message"),
    [
        (IDS, 5, "5 tokens and 5 more: the cache has 9 places"),
        (IDS.int(), 1, "a prompt is int64 of the shape"),
        (IDS.expand(2, 5), 1, "one by one"),
        (IDS[:, :0], 1, "one by one"),
    ],
)
def test_prompts_that_cannot_be(ids, count, message):
    with pytest.raises(Quant2eError, match=message):
        Decoder(Counter(), Counter(), 9).generate(ids, count)


def test_other_models_are_refused():
    with pytest.raises(CaptureError, match="Linear is no causal language model"):
        capture_decoder(nn.Linear(2, 2), 8)


class Store:
    """A plain object that holds a tensor."""

    def __init__(self, tensor):
        self.tensor = tensor


class Cached(nn.Module):
    """Writes to a tensor that it holds in a plain object, and perhaps as a buffer as well."""

    def __init__(self, registered):
        super().__init__()
        self.store = Store(torch.zeros(4, 2))
        if registered:
            self.register_buffer("cache", self.store.tensor)

    def forward(self, x, place):
        self.store.tensor.index_copy_(0, place, x)
        return self.store.tensor.sum(0)


@pytest.mark.parametrize("registered", [True, False])
def test_constants_that_are_written_are_buffers(registered):
    graph = capture(Cached(registered), (torch.ones(1, 2), torch.tensor([0])))
    (name,) = written_attributes(graph)
    assert name in dict(graph.named_buffers())
    assert (name == "cache") == registered
    assert graph(torch.ones(1, 2), torch.tensor([1])).tolist() == [1.0, 1.0]
    assert graph(torch.ones(1, 2), torch.tensor([2])).tolist() == [2.0, 2.0]
    exported = torch.export.export(graph, (torch.ones(1, 2), torch.tensor([0])), strict=False)
    assert exported.run_decompositions({}) is not None  # "Constant lifted_tensor_0 is mutated", with a constant


# ------------------------------------------------------------------------------------------- decoders of Hugging Face


def models():
    transformers = pytest.importorskip("transformers")
    few = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    heads = {**few, "num_attention_heads": 4}
    alone = {**heads, "initializer_range": 0.3}
    sizes = {**alone, "intermediate_size": 128, "num_key_value_heads": 2}
    small = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
    return {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        "qwen": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)),
        "qwen 3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=16)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **ends)),
        "mistral": lambda: transformers.MistralForCausalLM(
            transformers.MistralConfig(**sizes, head_dim=16, sliding_window=None)
        ),
        "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**sizes)),
        "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes, head_dim=16)),
        "gpt-neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**alone, intermediate_size=128)),
        "stablelm": lambda: transformers.StableLmForCausalLM(transformers.StableLmConfig(**sizes)),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(**heads, init_std=0.3, ffn_dim=128, word_embed_proj_dim=64)
        ),
    }


FAMILIES = ["llama", "qwen", "qwen 3", "gpt2", "mistral", "phi", "gemma", "gpt-neox", "stablelm", "opt"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_captured_and_quantized_decoders_generate(name, recwarn):
    torch.manual_seed(0)
    model = models()[name]().eval()
    decoder = capture_decoder(model, max_length=24)
    assert not [str(warning.message) for warning in recwarn if "lifted_tensor" in str(warning.message)]
    theirs = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(decoder.generate(IDS, 8), theirs)
    assert decoder.cache_names == ("key_cache_0", "value_cache_0", "key_cache_1", "value_cache_1")
    quantized = decoder.quantize(X86InductorQuantizer().set_global("w8"), min_sqnr_db=None)
    tokens = quantized.generate(IDS, 8)
    assert torch.equal(
        quantized.generate(IDS, 8), tokens
    )  # what a call leaves in the cache does not matter to the next
    assert torch.equal(Decoder(quantized.decode, None, 24).generate(IDS, 8), tokens)
    shared = dict(quantized.prefill.module.named_buffers())
    assert all(
        shared[path] is value for path, value in quantized.decode.module.named_buffers() if path.endswith("_quantized")
    )
    with pytest.raises(CaptureError, match="is in training mode"):
        capture_decoder(model.train(), 8)
    with pytest.raises(CaptureError, match="has 64 positions"):
        capture_decoder(model.eval(), 65)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8", "w4-g32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_inductor_generates_the_tokens_of_the_graph(name, scheme):
    torch.manual_seed(0)
    decoder = capture_decoder(models()[name]().eval(), max_length=16)
    quantized = decoder.quantize(X86InductorQuantizer().set_global(scheme), min_sqnr_db=None)
    assert torch.equal(quantized.lowered(lowering.to_inductor).generate(IDS, 6), quantized.generate(IDS, 6))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w4a8-dynamic-g32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_executorch_generates_the_tokens_of_the_graph(name, scheme):
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    decoder = capture_decoder(models()[name]().eval(), max_length=16)
    quantized = decoder.quantize(XNNPACKQuantizer().set_global(scheme), min_sqnr_db=None)
    assert torch.equal(quantized.lowered(lowering.to_executorch).generate(IDS, 6), quantized.generate(IDS, 6))
