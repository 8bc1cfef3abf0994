"""The decoders that are measured: of `transformers`, with random weights, without a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

VOCABULARY = 4096
SIZES = {"small": (512, 4, 1408), "medium": (1024, 12, 2816), "large": (1536, 17, 4224)}
"""Width, layers, and inner width: 15, 158 and 498 million weights."""

Call = Callable[[], Tensor]
"""A step: float32 logits ``[1, tokens, 4096]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A step in one library. ``weights``: what they are stored as; ``rows``: what they are multiplied by.

    ``on``: makes the call that runs on so many threads.
    """

    library: str
    weights: str
    rows: str
    on: Callable[[int], Call]

    @property
    def name(self) -> str:
        """Unique within a run."""
        return f"{self.library}, {self.weights}, {self.rows} rows"


class Decoder(nn.Module):
    """Logits of a decoder for the tokens given."""

    def __init__(self, hidden: int, layers: int, inner: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config).eval()

    def forward(self, ids: Tensor) -> Tensor:
        """``ids``: int64 ``[1, tokens]``; returns float32 ``[1, tokens, 4096]``."""
        logits: Tensor = self.model(ids).logits
        return logits


def decoder(size: str) -> Decoder:
    """One of `SIZES`, always the same."""
    torch.manual_seed(0)
    return Decoder(*SIZES[size]).eval()


def weights_of(model: nn.Module) -> int:
    """How many weights a step reads: those of linear layers."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
