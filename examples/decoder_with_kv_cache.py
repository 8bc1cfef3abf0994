"""A decoder with a KV cache that generates: captured, quantized to 4 bits for ExecuTorch, and run there.

    python examples/decoder_with_kv_cache.py

The model is a tiny Llama with random weights; ``AutoModelForCausalLM.from_pretrained`` gives a real one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowering
from lowering.language_models import capture_decoder
from quantizers import XNNPACKQuantizer

NEW_TOKENS = 8


def main() -> None:
    """Print the tokens of the float model, of the Q/DQ graph and of the program, and the size of its file."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    prompt = torch.tensor([[5, 17, 3, 42, 8]])
    decoder = capture_decoder(model, max_length=24)
    print("float  ", decoder.generate(prompt, NEW_TOKENS).tolist())
    quantized = decoder.quantize(XNNPACKQuantizer().set_global("w4a8-dynamic-g32"), min_sqnr_db=None)
    print("Q/DQ   ", quantized.generate(prompt, NEW_TOKENS).tolist())
    program = quantized.lowered(lowering.to_executorch)
    print("program", program.generate(prompt, NEW_TOKENS).tolist())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "decoder.pte"
        program.decode.save(path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
