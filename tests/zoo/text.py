"""Text: encoders, decoders and both, from configurations of transformers with random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from tests.zoo.architecture import Architecture, Extent, integers, mask, of_batch, of_length

VOCABULARY = 96

ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}

DECODER = {
    **ENCODER,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def of(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A model of transformers with the settings that its configuration knows, and random weights."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return build


def encoder(name: str, model: str, config: str, settings: Mapping[str, Any] = ENCODER, **more: Any) -> Architecture:
    """Tokens and a mask in, hidden states out."""
    varying = more.pop("sizes", {"batch": Extent(2), "length": Extent(12)})
    own = {key: more.pop(key) for key in tuple(more) if key in ("floor_db", "inductor", "skips")}
    return Architecture(
        name=name,
        family="text encoder",
        build=of(model, config, **{**settings, **more}),
        inputs={"input_ids": integers(VOCABULARY, "batch", "length"), "attention_mask": mask("batch", "length")},
        sizes=varying,
        **own,
    )


def decoder(name: str, model: str, config: str, settings: Mapping[str, Any] = DECODER, **more: Any) -> Architecture:
    """Tokens in, logits out."""
    varying = more.pop("sizes", {"batch": Extent(2), "length": Extent(12)})
    own = {key: more.pop(key) for key in tuple(more) if key in ("floor_db", "inductor", "skips")}
    return Architecture(
        name=name,
        family="text decoder",
        build=of(model, config, **{**settings, **more}),
        inputs={"input_ids": integers(VOCABULARY, "batch", "length")},
        sizes=varying,
        **own,
    )


BATCH_VARIES = {**of_batch(), "length": Extent(12)}
LENGTH_VARIES = {"batch": Extent(2), **of_length()}

TEXT = (
    encoder("bert", "BertModel", "BertConfig", inductor=True),
    encoder("distilbert", "DistilBertModel", "DistilBertConfig", {}, vocab_size=VOCABULARY, dim=32, n_layers=1,
            n_heads=4, hidden_dim=64, max_position_embeddings=64, sizes=LENGTH_VARIES),
    encoder("albert", "AlbertModel", "AlbertConfig", embedding_size=16),
    encoder("electra", "ElectraModel", "ElectraConfig", embedding_size=16),
    encoder("mpnet", "MPNetModel", "MPNetConfig"),
    encoder("deberta-v2", "DebertaV2Model", "DebertaV2Config", relative_attention=True, pos_att_type=["p2c", "c2p"],
            max_relative_positions=8, floor_db=5.0),  # padding begins as zeros, and a norm makes its rounding large
    encoder("modernbert", "ModernBertModel", "ModernBertConfig", global_attn_every_n_layers=1, local_attention=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    encoder("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", embedding_size=32),
    encoder("convbert", "ConvBertModel", "ConvBertConfig", embedding_size=32, conv_kernel_size=3),
    encoder("xlm-roberta", "XLMRobertaModel", "XLMRobertaConfig", sizes=BATCH_VARIES),
    decoder("gpt2", "GPT2LMHeadModel", "GPT2Config", {}, vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1,
            n_head=4, use_cache=False, bos_token_id=1, eos_token_id=2),
    decoder("gpt-neox", "GPTNeoXForCausalLM", "GPTNeoXConfig"),
    decoder("opt", "OPTForCausalLM", "OPTConfig", ffn_dim=64, word_embed_proj_dim=32),
    decoder("bloom", "BloomForCausalLM", "BloomConfig", n_head=4, n_layer=1),
    decoder("llama", "LlamaForCausalLM", "LlamaConfig", sizes=LENGTH_VARIES, inductor=True),
    decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config"),
    decoder("gemma2", "Gemma2ForCausalLM", "Gemma2Config", num_hidden_layers=2, sliding_window=8),
    decoder("phi", "PhiForCausalLM", "PhiConfig"),
    decoder("mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, experts_implementation="batched_mm"),
    decoder("mamba", "MambaForCausalLM", "MambaConfig", state_size=4, use_mambapy=False),
    Architecture(
        name="t5",
        family="text encoder and decoder",
        build=of("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64,
                 num_layers=1, num_heads=4, use_cache=False, decoder_start_token_id=0),
        inputs={
            "input_ids": integers(VOCABULARY, 2, 12),
            "decoder_input_ids": integers(VOCABULARY, 2, 6),
        },
    ),
    Architecture(
        name="bart",
        family="text encoder and decoder",
        build=of("BartForConditionalGeneration", "BartConfig", vocab_size=VOCABULARY, d_model=32, encoder_layers=1,
                 decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
                 decoder_ffn_dim=64, max_position_embeddings=64, use_cache=False, pad_token_id=0, bos_token_id=1,
                 eos_token_id=2),
        inputs={"input_ids": integers(VOCABULARY, 2, 12), "decoder_input_ids": integers(VOCABULARY, 2, 6)},
    ),
)  # fmt: skip
"""Models of text."""
