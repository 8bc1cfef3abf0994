"""How much of a float embedding model's behaviour a quantized one keeps.

Both models embed the same queries and the same corpus. Everything compares the two with each other, not with labels:
float is the truth that quantization must not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """``queries``: float [number of queries, width]; ``corpus``: float [number of paragraphs, width].
    Rows are unit vectors.
    """

    queries: Tensor
    corpus: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What a quantized model keeps of the float model.

    ``mean_cosine``, ``min_cosine``: between the two embeddings of one text, over all paragraphs and queries.
    ``top1``: share of queries for which both models rank the same paragraph first, among all paragraphs but the one
    that the query was cut from (every model finds that one, so it would only flatter).
    ``top1_with_source``: the same among all paragraphs.
    ``spearman``: rank correlation of the two models' query-paragraph similarities, over all pairs.
    """

    mean_cosine: float
    min_cosine: float
    top1: float
    top1_with_source: float
    spearman: float


def top1(embeddings: Embeddings, excluded: Sequence[int] | None = None) -> Tensor:
    """Index of the most similar paragraph per query, int64 [queries]; ``excluded`` names one to leave out for each."""
    similarity = embeddings.queries @ embeddings.corpus.T
    if excluded is not None:
        similarity[torch.arange(len(excluded)), torch.tensor(excluded)] = -torch.inf
    return similarity.argmax(dim=1)


def agreement(reference: Embeddings, quantized: Embeddings, sources: Sequence[int]) -> Agreement:
    """Compare ``quantized`` with ``reference``; ``sources`` is the paragraph that each query was cut from."""
    from scipy.stats import spearmanr

    cosine = torch.cat(
        [
            F.cosine_similarity(reference.corpus, quantized.corpus),
            F.cosine_similarity(reference.queries, quantized.queries),
        ]
    )
    pairs = [(e.queries @ e.corpus.T).flatten().numpy() for e in (reference, quantized)]

    def same(excluded: Sequence[int] | None) -> float:
        return (top1(reference, excluded) == top1(quantized, excluded)).double().mean().item()

    return Agreement(
        mean_cosine=cosine.double().mean().item(),
        min_cosine=cosine.min().item(),
        top1=same(sources),
        top1_with_source=same(None),
        spearman=float(spearmanr(*pairs).statistic),
    )
