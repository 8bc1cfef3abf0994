"""The parts of ``make demo`` that need no compiler: texts, metrics, timing, training, table, promises."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from benchmarks.demo import __main__ as demo
from benchmarks.demo import digits, minilm, topics
from benchmarks.demo.outcome import Bound, Int8, Outcome
from benchmarks.demo.progress import Phases
from benchmarks.demo.retrieval import Embeddings, agreement, top1
from benchmarks.demo.table import markdown, table
from benchmarks.timing import Latency, compare, machine

# ------------------------------------------------------------------------------------------------------------- texts

HELP = """\
The "assert" statement
**********************

Assert statements are a convenient way to insert checks.  They
may be off:

   assert_stmt ::= "assert" expression ["," expression]

Too few words.

   if __debug__:
       if not expression: raise AssertionError
"""


def test_a_paragraph_is_neither_a_heading_nor_grammar_nor_a_fragment():
    assert topics.paragraphs(HELP) == [
        "Assert statements are a convenient way to insert checks. They may be off:",
        "if __debug__: if not expression: raise AssertionError",
    ]


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        ("One. Two.", "One."),
        ("A list follows: x.y is here", "A list follows:"),
        ("see os.path now. Then", "see os.path now."),
        ("no mark at all", "no mark at all"),
        ("Really?  Yes", "Really?"),
    ],
)
def test_first_sentence(paragraph, expected):
    assert topics.first_sentence(paragraph) == expected


def test_a_split_shares_no_topic_and_no_paragraph():
    shared = "this paragraph is in every topic."
    made = topics.split({name: f"this is only in {name}. and more\n\n{shared}" for name in "abcde"}, every=4)
    assert made.calibration_topics == ("a", "e")
    assert made.evaluation_topics == ("b", "c", "d")
    assert made.calibration == ("this is only in a. and more", "this is only in e. and more")
    b, c, d = (f"this is only in {name}. and more" for name in "bcd")
    assert made.corpus == (b, shared, c, d)
    assert made.queries == ("this is only in b.", "this is only in c.", "this is only in d.")
    assert made.sources == (0, 2, 3)


def test_the_real_topics_are_split_into_disjoint_sets():
    made = topics.load()
    assert not set(made.calibration_topics) & set(made.evaluation_topics)
    assert not set(made.calibration) & set(made.corpus)
    assert len(set(made.corpus)) == len(made.corpus) > 800
    assert len(set(made.queries)) == len(made.queries) >= 50
    assert len(made.calibration) >= 200
    for query, source in zip(made.queries, made.sources, strict=True):
        assert made.corpus[source].startswith(query)


# ----------------------------------------------------------------------------------------------------------- metrics


def angle(*degrees):
    radians = torch.tensor(degrees, dtype=torch.float64) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_top1_leaves_out_the_source():
    made = Embeddings(queries=angle(0, 90), corpus=angle(5, 20, 80, 85))
    assert top1(made).tolist() == [0, 3]
    assert top1(made, (0, 3)).tolist() == [1, 2]


def test_a_model_agrees_with_itself():
    made = Embeddings(queries=angle(0, 90), corpus=angle(5, 20, 81, 86))
    found = agreement(made, made, (0, 3))
    assert found.mean_cosine == pytest.approx(1)
    assert (found.top1, found.top1_with_source) == (1, 1)
    assert found.spearman == pytest.approx(1)


def test_agreement_by_hand():
    # similarity to the query at 0°: float ranks 10°, 20°, 40°; the other model moved 20° to 50° and keeps the rest
    reference = Embeddings(queries=angle(0), corpus=angle(10, 20, 40))
    moved = Embeddings(queries=angle(0), corpus=angle(10, 50, 40))
    found = agreement(reference, moved, (0,))
    assert found.mean_cosine == pytest.approx((1 + math.cos(math.pi / 6) + 1 + 1) / 4)
    assert found.min_cosine == pytest.approx(math.cos(math.pi / 6))
    assert found.top1_with_source == 1  # both find 10°
    assert found.top1 == 0  # without it, 20° against 40°
    assert found.spearman == pytest.approx(0.5)  # ranks 1 2 3 against 1 3 2: 1 - 6·2 / (3·8)


# ------------------------------------------------------------------------------------------------------------ timing


def test_calls_are_interleaved_and_both_warmed_up():
    calls = []
    found = compare(
        lambda: calls.append("f"), lambda: calls.append("i"), runtime="r", what="w", seconds=0, min_rounds=4
    )
    assert "".join(calls) == "fififi" + "fi" + "if" + "fi" + "if"
    assert found.rounds == 4
    assert min(found.float_ms, found.int8_ms, found.speedup) > 0


def test_the_machine_is_described():
    found = machine()
    assert found.threads == torch.get_num_threads()
    assert torch.__version__ in str(found)
    assert str(found.threads) in str(found)


# ------------------------------------------------------------------------------------------------------------ digits


def test_digits_are_split_into_disjoint_sets():
    made = digits.load()
    assert made.train_images.shape == (1200, 1, 8, 8)
    assert made.test_images.shape == (597, 1, 8, 8)
    assert (made.train_images.min(), made.train_images.max()) == (0, 1)
    train = {image.numpy().tobytes() for image in made.train_images}
    assert not any(image.numpy().tobytes() in train for image in made.test_images)
    assert made.test_labels.bincount().min() > 50


def test_the_network_learns_in_a_few_epochs_and_leaves_the_random_state_alone():
    made, before = digits.load(), torch.get_rng_state()
    model = digits.train(made, epochs=5)
    assert digits.top1(model, made.test_images, made.test_labels) > 0.97
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training


def test_the_network_has_what_it_is_there_to_exercise():
    modules = list(digits.DigitsNet().modules())
    assert any(isinstance(m, torch.nn.Conv2d) and m.groups == m.in_channels > 1 for m in modules)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in modules)
    assert any(isinstance(m, digits.InvertedResidual) and m.shortcut for m in modules)


def test_top1_by_hand():
    logits = torch.eye(3)
    assert digits.top1(lambda x: logits[x], torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 1, 2]), size=3) == 0.75


# --------------------------------------------------------------------------------------------------------- embedding


class Words:
    """Tokenizer with one token per word."""

    def __call__(self, texts, *, padding, truncation, max_length, return_tensors):
        lengths = [min(len(text.split()), max_length) for text in texts]
        mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
        return {"input_ids": mask * 7, "attention_mask": mask}


@pytest.mark.parametrize(("count", "expected"), [(1, "a"), (2, "ac"), (3, "abc"), (4, "abcd"), (9, "abcd")])
def test_spread(count, expected):
    assert minilm.spread("abcd", count) == list(expected)


def test_embeddings_come_back_in_the_order_of_the_texts():
    texts = ["a b c d e", "a", "a b c", "a b"]
    batches = minilm.tokenize(Words(), texts, size=3)
    assert [batch.places for batch in batches] == [(1, 3, 2), (0,)]
    steps = []
    found = minilm.embed(
        lambda _, mask: mask.sum(dim=1, keepdim=True).float().expand(-1, minilm.WIDTH),
        batches,
        lambda done, total: steps.append((done, total)),
    )
    assert found[:, 0].tolist() == [5, 1, 3, 2]
    assert steps == [(1, 2), (2, 2)]


# ---------------------------------------------------------------------------------------------------------- promises

LATENCY = Latency(runtime="Inductor", what="1 image", float_ms=2.0, int8_ms=1.0, speedup=2.0, rounds=9)
COLUMN = Int8(
    runtime="Inductor",
    scheme="static",
    scores={"static": 0.97, "dynamic": 0.5},
    qdq={"top1": 0.99},
    lowered={"top1": 0.98},
    max_steps=0.5,
    sqnr_db=50.0,
    step_rule="steps of the output's scale",
    int8_mac_share=0.9,
    pt2_bytes=250_000,
    program_bytes=None,
    float_program_bytes=None,
    latencies=(LATENCY,),
)
KEPT = Bound(what="size over float", value=0.25, limit=0.27, at_least=False)
BROKEN = Bound(what="mean cosine", value=0.98, limit=0.99, at_least=True)
OUTCOME = Outcome(
    name="digits",
    title="Images",
    data="evaluated on one image",
    measures={"top1": 1.0},
    float_bytes=1_000_000,
    int8=(COLUMN,),
    bounds=(KEPT,),
)


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "holds"),
    [
        (0.99, 0.99, True, True),
        (0.98, 0.99, True, False),
        (0.27, 0.27, False, True),
        (0.28, 0.27, False, False),
        (math.nan, 0.99, True, False),
        (math.nan, 0.27, False, False),
    ],
)
def test_a_bound_holds_at_its_limit_and_never_for_nan(value, limit, at_least, holds):
    assert Bound(what="x", value=value, limit=limit, at_least=at_least).holds is holds


def test_a_broken_bound_says_what_it_is_and_what_it_must_be():
    assert str(BROKEN) == "mean cosine is 0.98; it must be at least 0.99"


@pytest.mark.parametrize(("bounds", "code"), [((KEPT,), 0), ((KEPT, BROKEN), 1)])
def test_the_exit_code_says_whether_all_promises_hold(bounds, code, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "MODELS", {"digits": lambda *_: replace(OUTCOME, bounds=bounds)})
    assert demo.main(["--out", str(tmp_path)]) == code
    printed = capsys.readouterr().out
    assert ("NOT KEPT: mean cosine is 0.98; it must be at least 0.99" in printed) is bool(code)
    assert (tmp_path / "demo.json").exists()
    assert (tmp_path / "demo.md").exists()


def test_the_table_shows_every_number():
    out = io.StringIO()
    Console(file=out, width=160).print(table([OUTCOME]))
    for expected in (
        "100.00%",
        "99.00%",
        "98.00%",
        "static 0.9700, dynamic 0.5000",
        "90.0%",
        "0.5 steps, 50.0 dB",
        "0.25 MB (0.250 ×)",
        "2.00 → 1.00 ms (2.00 ×)",
    ):
        assert expected in out.getvalue()
        assert expected in markdown([OUTCOME])


def test_a_log_gets_one_line_per_phase():
    out = io.StringIO()
    with Phases(Console(file=out, width=100)) as phases:
        with phases.phase("first") as advance:
            advance(1, 2)
        with phases.phase("second"):
            pass
    lines = out.getvalue().splitlines()
    assert [line.split(" s  ")[1] for line in lines] == ["first", "second"]
    assert list(phases.seconds) == ["first", "second"]


def test_a_terminal_gets_bars():
    out = io.StringIO()
    with Phases(Console(file=out, width=100, force_terminal=True)) as phases, phases.phase("first") as advance:
        advance(1, 2)
    assert "first" in out.getvalue()
    assert "2/2" in out.getvalue()
