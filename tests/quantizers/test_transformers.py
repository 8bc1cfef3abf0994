"""A real encoder's graph with random weights: what is quantized, and that nothing integer is."""

import pytest
import torch
from torch import nn

from quant2e import capture, convert_pt2e, prepare_pt2e
from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.fake_values import node_tensor
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)
from tests.quantizers.models import captured, reasons

transformers = pytest.importorskip("transformers")

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
IDS, MASK = torch.randint(0, 100, (2, 8)), torch.ones(2, 8, dtype=torch.int64)
MASK[1, 5:] = 0


class Encoder(nn.Module):
    def __init__(self, attention):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(**SHAPE, max_position_embeddings=16, attn_implementation=attention)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids, attention_mask):
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def quantizers():
    xnnpack = get_symmetric_quantization_config
    x86 = get_default_x86_inductor_quantization_config
    return {
        "xnnpack static": XNNPACKQuantizer().set_global(xnnpack(is_per_channel=True)),
        "xnnpack dynamic": XNNPACKQuantizer().set_global(xnnpack(is_per_channel=True, is_dynamic=True)),
        "x86 static": X86InductorQuantizer().set_global(x86()),
        "x86 dynamic": X86InductorQuantizer().set_global(x86(is_dynamic=True)),
    }


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def encoder(request):
    return Encoder(request.param).eval()


@pytest.mark.parametrize("name", quantizers())
def test_every_linear_and_table_and_nothing_integer(encoder, name):
    quantizer = ComposableQuantizer([EmbeddingQuantizer(), quantizers()[name]])
    gm = captured(encoder, (IDS, MASK))
    quantizer.annotate(gm)
    annotated = {n: n.meta[ANNOTATION] for n in gm.graph.nodes if ANNOTATION in n.meta}
    for node, note in annotated.items():
        assert node_tensor(node).is_floating_point()
        assert all(node_tensor(src).is_floating_point() for src, spec in note.input_qspec_map.items() if spec)
    count = {op: sum(f"aten.{op}." in str(n.target) for n in annotated) for op in ("linear", "embedding")}
    assert count == {"linear": 12, "embedding": 3}
    why = reasons(gm, quantizer)
    assert all(why.values())
    assert not [n for n, reason in why.items() if n.startswith(("linear", "embedding"))]


def test_mask_arithmetic_is_float_and_says_so(encoder):
    quantizer = quantizers()["xnnpack static"]
    gm = captured(encoder, (IDS, MASK))
    quantizer.annotate(gm)
    sums = [r for r in reasons(gm, quantizer).values() if r.startswith("rule 'add'")]
    scores = [r for r in sums if "stands between" not in r]
    eager = any("softmax" in str(n.target) for n in gm.graph.nodes)
    assert len(scores) == (2 if eager else 0)
    assert all("mask" in reason for reason in scores)


@pytest.mark.parametrize(("name", "sqnr"), [("xnnpack static", 25), ("xnnpack dynamic", 35), ("x86 dynamic", 35)])
def test_the_quantized_encoder_computes_the_same(name, sqnr):
    encoder = Encoder("sdpa").eval()
    gm = capture(encoder, (IDS, MASK))
    prepared = prepare_pt2e(gm, ComposableQuantizer([EmbeddingQuantizer(), quantizers()[name]]))
    with torch.no_grad():
        prepared(IDS, MASK)
        expected, found = encoder(IDS, MASK), convert_pt2e(prepared)(IDS, MASK)
    assert 10 * torch.log10(expected.pow(2).sum() / (expected - found).pow(2).sum()) > sqnr
