"""Real English text that every Python carries: the topics of ``help()``, in the standard library's ``pydoc_data``.

One topic is one document. Topics are split into two disjoint sets, one to calibrate on and one to evaluate on; some
paragraphs occur in several topics, and those are evaluated on and never calibrated on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

CALIBRATION_EVERY = 4
"""Of the topics in alphabetical order, each fourth is for calibration."""

_MIN_WORDS = 5
_UNDERLINE = re.compile(r"\s*([=*\-~\"'^])\1+\s*")
_SENTENCE = re.compile(r".*?[.:!?](?=\s|$)")


def paragraphs(text: str) -> list[str]:
    """Split a topic at blank lines into paragraphs of one line each.

    Headings, grammar productions and fragments of fewer than five words are not paragraphs.
    """
    found = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        heading = len(lines) > 1 and _UNDERLINE.fullmatch(lines[1])
        words = block.split()
        if not heading and "::=" not in block and len(words) >= _MIN_WORDS:
            found.append(" ".join(words))
    return found


def first_sentence(paragraph: str) -> str:
    """Cut a paragraph after its first full stop, colon, question or exclamation mark; whole when it has none."""
    match = _SENTENCE.match(paragraph)
    return match.group() if match else paragraph


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """What to calibrate on, and the retrieval task to evaluate on.

    ``calibration``: paragraphs of the calibration topics; none of them is in ``corpus``.
    ``corpus``: all paragraphs of the evaluation topics, each text once.
    ``queries``: the first sentence of each evaluation topic, each text once.
    ``sources``: per query, the place in ``corpus`` of the paragraph that it was cut from.
    """

    calibration_topics: tuple[str, ...]
    evaluation_topics: tuple[str, ...]
    calibration: tuple[str, ...]
    corpus: tuple[str, ...]
    queries: tuple[str, ...]
    sources: tuple[int, ...]


def split(topics: Mapping[str, str], every: int = CALIBRATION_EVERY) -> Texts:
    """Split ``topics`` (name to text): each ``every``-th by name is for calibration, the others for evaluation."""
    names = sorted(topics)
    calibration_topics = tuple(names[::every])
    evaluation_topics = tuple(name for name in names if name not in calibration_topics)
    place: dict[str, int] = {}
    queries: dict[str, int] = {}
    for name in evaluation_topics:
        found = paragraphs(topics[name])
        for paragraph in found:
            place.setdefault(paragraph, len(place))
        if found:
            queries.setdefault(first_sentence(found[0]), place[found[0]])
    seen = dict.fromkeys(p for name in calibration_topics for p in paragraphs(topics[name]) if p not in place)
    return Texts(
        calibration_topics=calibration_topics,
        evaluation_topics=evaluation_topics,
        calibration=tuple(seen),
        corpus=tuple(place),
        queries=tuple(queries),
        sources=tuple(queries.values()),
    )


def load() -> Texts:
    """Split the topics of the running Python's standard library."""
    from pydoc_data.topics import topics

    return split(topics)
