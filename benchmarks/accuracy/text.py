"""The text of the standard library, in characters: topics of ``help()`` to train on, and others to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH = 64
"""Characters that a model sees at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Characters:
    """``alphabet``: all characters, by number. ``train``, ``choice``, ``test``: int64 [n], no topic in two of them."""

    alphabet: str
    train: Tensor
    choice: Tensor
    test: Tensor


def load() -> Characters:
    """Read the topics: of each ten in alphabetical order the first is for choices and the sixth to evaluate on.

    Characters outside of ASCII, of which there are few, are question marks.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    texts = {name: topics[name].encode("ascii", "replace").decode() for name in names}
    alphabet = "".join(sorted(set("".join(texts.values()))))
    number = {character: place for place, character in enumerate(alphabet)}

    def encoded(chosen: list[str]) -> Tensor:
        return torch.tensor([number[character] for name in chosen for character in texts[name]])

    return Characters(
        alphabet=alphabet,
        train=encoded([name for place, name in enumerate(names) if place % 10 not in {0, 5}]),
        choice=encoded(names[0::10]),
        test=encoded(names[5::10]),
    )


def windows(characters: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``count`` windows, evenly spread, and the characters that follow each of their positions; int64 [count, 64]."""
    starts = torch.linspace(0, len(characters) - LENGTH - 1, count).long()
    places = starts[:, None] + torch.arange(LENGTH)
    return characters[places], characters[places + 1]
