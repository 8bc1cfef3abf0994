"""A Hugging Face encoder with padding: any number of sentences of any length, scales found at run time."""

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

import quant2e
from quantizers import XNNPACKQuantizer

LONGEST = 32


class Embedder(nn.Module):
    """Sentence embeddings: the mean of the tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "attn_implementation": "eager"}
        config = BertConfig(vocab_size=100, max_position_embeddings=LONGEST, **sizes)
        self.bert = BertModel(config, add_pooling_layer=False)  # yours: from_pretrained

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and mask, int64 ``[sentences, tokens]``, in; embeddings ``[sentences, 32]`` out."""
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


def batch(sentences: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sentences, each with padding behind it, but for the longest."""
    lengths = torch.randint(2, tokens + 1, (sentences, 1))
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths).long()
    return torch.randint(1, 100, (sentences, tokens)) * mask, mask


def main(folder: Path) -> float:
    """Write ``encoder_int8.pt2`` to ``folder``; return the mean cosine to float on lengths that were not captured."""
    torch.manual_seed(0)
    model = Embedder().eval()
    sentences, tokens = torch.export.Dim("sentences", min=1, max=8), torch.export.Dim("tokens", min=2, max=LONGEST)
    quantizer = XNNPACKQuantizer().set_global("w8a8-dynamic")  # no ranges to calibrate: they are found at run time
    result = quant2e.quantize(
        model,
        batch(4, 12),
        quantizer,
        [batch(4, 12), batch(2, 20)],
        dynamic_shapes=({0: sentences, 1: tokens}, {0: sentences, 1: tokens}),
    )
    print(repr(result.report))
    result.save(folder / "encoder_int8.pt2")

    loaded = quant2e.load(folder / "encoder_int8.pt2")
    other = batch(7, LONGEST)
    with torch.no_grad():
        cosine = torch.cosine_similarity(loaded(*other), model(*other)).mean().item()
    print(f"mean cosine to float on 7 sentences of up to {LONGEST} tokens: {cosine:.4f}")
    return cosine


if __name__ == "__main__":
    main(Path(mkdtemp()))
