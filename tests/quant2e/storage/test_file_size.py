"""Sizes of whole files of a decoder at 8 and 4 bits, its table and head included, beside its float32 weights."""

import pytest
import torch

import quant2e
from quantizers import ComposableQuantizer, EmbeddingQuantizer, X86InductorQuantizer
from tests.load.decoder import Decoder

TOKENS = (torch.zeros(1, 4, dtype=torch.int64),)


@pytest.mark.slow
def test_a_file_of_4_bits_is_less_than_a_sixth_of_float32_and_smaller_than_one_of_8_bits(tmp_path):
    """The layers of 4 bits take 0.5 bytes a value, half a bit for a scale in bfloat16 and an eighth for a zero point;
    tables as much and a scale in float32. With float tables the file is larger: this table is a quarter of the model.
    """
    torch.manual_seed(0)
    model = Decoder(layers=2, width=512).eval()
    floats = sum(parameter.numel() * 4 for parameter in model.parameters())
    sizes = {}
    for scheme in ("w8", "w4-g32"):
        layers, tables = X86InductorQuantizer().set_global(scheme), EmbeddingQuantizer().set_global(scheme)
        for name, quantizer in ((scheme, ComposableQuantizer([tables, layers])), (f"{scheme}, float table", layers)):
            file = tmp_path / "model.pt2"
            quant2e.quantize(model, TOKENS, quantizer, min_sqnr_db=None).save(file)
            sizes[name] = file.stat().st_size / floats
    print({name: round(size, 4) for name, size in sizes.items()})
    assert sizes["w4-g32"] <= 0.16 < sizes["w4-g32, float table"]
    assert sizes["w4-g32"] <= 0.6 * sizes["w8"]
    assert sizes["w8"] <= 0.26
