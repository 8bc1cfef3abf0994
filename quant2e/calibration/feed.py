"""Feed: the batches of a training script as calls of a captured graph.

    (image, label)                      → image                  for a graph of one input
    {"input_ids": …, "labels": …}       → {"input_ids": …}       for one without labels
    ({"input_ids": …}, labels)          → {"input_ids": …}
    5 samples at the end, 32 before     → left out               for one of 32 samples

What is left out is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.fx import GraphModule

from quant2e.calibration.batches import check_kind, describe
from quant2e.calibration.fitting import Choice, chosen_inputs, fewer_samples
from quant2e.errors import CalibrationError
from quant2e.graph.captured.calls import Call

Transform = Callable[[Any], Any]
"""From an item of a data set to what the model takes: a tensor, a tuple, a dict or a `quant2e.Call`."""


class Feed(Iterable[Call]):
    """``data`` as calls of ``graph``, each item through ``transform`` first; without a graph nothing is left out.

    ``name``: in front of "batch 3", in messages. ``notes``: what was left out of what was read so far. It can be read
    as often as the data can, and has a length where they have one.

    Raises `CalibrationError` while it is read, where ``transform`` fails, an item is no input of a model, or it is not
    clear which of its parts are.
    """

    def __init__(
        self, data: Iterable[Any], graph: GraphModule | None, name: str = "", transform: Transform | None = None
    ) -> None:
        if transform is not None and not callable(transform):
            raise CalibrationError(f"transform is a {type(transform).__name__}: a function of one item of the data")
        self.data, self._graph, self._transform = data, graph, transform
        self._batch = f"{name} batch".lstrip()
        self._choice: Choice | None = None
        self._notes: dict[str, None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, a sentence each."""
        return tuple(self._notes)

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # TypeError where the data have no length, as of any iterable

    def __iter__(self) -> Iterator[Call]:
        calls = self._calls()
        for index, call in enumerate(calls):
            missing = fewer_samples(self._graph, call) if index and self._graph else None
            following = next(calls, None) if missing else None
            if missing and following is None:
                few, wanted = missing
                self._note(
                    f"the last {self._batch} has {few} samples and the model was captured for {wanted}: it was left "
                    "out; dynamic_batch=True takes it"
                )
                return
            yield call  # where it does not fit, whoever runs it says what is wrong
            if following is not None:
                yield following

    def _calls(self) -> Iterator[Call]:
        for index, item in enumerate(self.data):
            where = f"{self._batch} {index}"
            batch = item if self._transform is None else self._transformed(item, where)
            check_kind(batch, where)
            if self._choice is None:
                self._choice = Choice(()) if self._graph is None else chosen_inputs(batch, self._graph, where)
            for part in self._choice.left_out(batch):
                self._note(f"{part} of each {self._batch} is no input of the model: it was left out")
            yield self._choice.call(batch)

    def _transformed(self, item: Any, where: str) -> Any:
        assert self._transform is not None
        try:
            return self._transform(item)
        except Exception as error:
            kind = type(error).__name__
            raise CalibrationError(f"transform failed on {where} ({describe(item)}): {kind}: {error}") from error

    def _note(self, text: str) -> None:
        self._notes.setdefault(text)
