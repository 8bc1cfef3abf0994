"""Scopes on models as they are written: `transformers` with random weights, modules called twice, functional ops."""

import pytest
import torch
from torch import nn

from quant2e import capture
from quant2e.annotation.specs import ANNOTATION
from quant2e.graph.captured.module import copy_graph
from quant2e.graph.module_paths import enclosing_paths
from quantizers import XNNPACKQuantizer
from tests.quantizers.models import ROWS, annotated

transformers = pytest.importorskip("transformers")
IDS = torch.ones(1, 6, dtype=torch.int64)


def gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, use_cache=False)
    return capture(transformers.GPT2Model(config).eval(), (IDS,))


def whisper():
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=16, **sizes, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=10, max_target_positions=10, use_cache=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    kwargs = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": IDS[:, :4]}
    return capture(transformers.WhisperModel(config).eval(), (), kwargs)


@pytest.fixture(scope="module")
def graphs():
    return {"gpt2": gpt2(), "whisper": whisper()}


def quantized(graph, name) -> list[str]:
    """The modules of the products that a setting for ``name`` quantizes."""
    gm = copy_graph(graph)
    quantizer = XNNPACKQuantizer().set_module_name(name, "w8a8-dynamic")
    quantizer.transform_for_annotation(gm)
    quantizer.annotate(gm)
    assert quantizer.notes == []
    return [enclosing_paths(node)[0] for node in gm.graph.nodes if ANNOTATION in node.meta]


def both(pattern):
    return [pattern.format(layer) for layer in (0, 1)]


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("gpt2", "h.*.attn", ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.1.attn.c_attn", "h.1.attn.c_proj"]),
        ("gpt2", "*.c_fc", both("h.{}.mlp.c_fc")),
        ("gpt2", "h[1].mlp", ["h.1.mlp.c_fc", "h.1.mlp.c_proj"]),
        ("whisper", "L['self'].decoder.layers[1].encoder_attn.q_proj", ["decoder.layers.1.encoder_attn.q_proj"]),
        ("whisper", "decoder.layers.*.fc?", [f"decoder.layers.{n}.fc{m}" for n in (0, 1) for m in (1, 2)]),
        ("whisper", r"re:.*coder\.layers\.0\.self_attn\.[qk]_proj", [
            f"{part}.layers.0.self_attn.{q}_proj" for part in ("encoder", "decoder") for q in "qk"
        ]),
    ],
)  # fmt: skip
def test_names_of_transformers(graphs, model, name, expected):
    assert quantized(graphs[model], name) == expected


def test_a_type_that_is_not_torchs(graphs):
    gm = copy_graph(graphs["gpt2"])
    quantizer = XNNPACKQuantizer().set_module_type("Conv1D", "w8a8").set_module_type("GPT2MLP", None)
    quantizer.transform_for_annotation(gm)
    quantizer.annotate(gm)
    products = {enclosing_paths(n)[0] for n in gm.graph.nodes if ANNOTATION in n.meta and "linear" in str(n.target)}
    assert products == {f"h.{n}.{m}" for n in (0, 1) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}


def test_a_module_called_twice_and_names_with_digits():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l1, self.l10, self.l1_0 = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.l1(self.l10(self.l1(self.l1_0(x))))

    def names(name):
        gm = annotated(Net(), ROWS, XNNPACKQuantizer().set_module_name(name, "w8a8"))
        return [node.name for node in gm.graph.nodes if ANNOTATION in node.meta]

    assert names("l1") == ["linear_1", "linear_3"]
    assert names("l10") == ["linear_2"]
    assert names("l1_0") == ["linear"]
    assert names("l1?") == ["linear_2"]
    assert names("l1?*") == ["linear", "linear_2"]
