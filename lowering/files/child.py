"""Programs in a process of their own: a file that crashes its runtime ends that process, and is an error here.

The process has the rights of this one: it keeps crashes away, and is no sandbox against a file that takes the runtime
over. What comes back from it is read as plain data (`lowering.files.frames`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from lowering.files.frames import BrokenFrameError, dtype_named, read_frame, write_frame
from lowering.signature import TensorInput
from quant2e.errors import FileFormatError, LoweringError, Quant2eError

_ERRORS: Mapping[str, type[Quant2eError]] = {"FileFormatError": FileFormatError, "LoweringError": LoweringError}
_LAST_WORDS = 300
"""How many characters of what a process wrote before it died an error quotes."""

_DYING_SECONDS = 5.0
"""How long a process that closed its pipe has to end by itself."""


class ChildProgram:
    """A program file, opened in a new process, which ends with this object.

    ``inputs``, ``example`` and ``unchanged`` are those of an `OpenProgram`, as that process says. Raises
    `FileFormatError` when it dies, and what `open_program` raises.
    """

    def __init__(self, path: Path, method: str | None) -> None:
        self._path = path
        self._turn = threading.Lock()
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        places = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lowering.files.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env={**os.environ, "PYTHONPATH": places},
        )
        self.close = weakref.finalize(self, _end, self._process, self._words)
        opened = {"path": str(path.resolve()), "method": method, "threads": torch.get_num_threads()}
        message, example = self._exchange(opened, ())
        self.unchanged = message.get("unchanged") is True
        self.example = tuple(example) if message.get("example") else None
        try:
            self.inputs = tuple(
                TensorInput(
                    name=str(one["name"]),
                    dtype=dtype_named(one["dtype"]),
                    sizes=tuple((int(low), int(high)) for low, high in one["sizes"]),
                )
                for one in message["inputs"]
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._died() from error

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Run once; flat outputs. Raises `FileFormatError` when the process dies."""
        return self._exchange({}, tensors)[1]

    def _exchange(self, message: dict[str, Any], values: Sequence[Any]) -> tuple[dict[str, Any], list[Any]]:
        if not self.close.alive:
            raise FileFormatError(f"{self._path} is damaged, or made for another runtime: its process has ended")
        try:
            with self._turn:
                write_frame(cast("BinaryIO", self._process.stdin), message, values)
                answer, outputs = read_frame(cast("BinaryIO", self._process.stdout))
        except TypeError as error:
            raise LoweringError(f"{self._path} cannot be given these inputs: {error}") from error
        except (BrokenFrameError, OSError) as error:
            raise self._died() from error
        if "error" in answer:
            kind = _ERRORS.get(str(answer.get("kind")), LoweringError)
            raise kind(str(answer["error"]))
        return answer, outputs

    def _died(self) -> FileFormatError:
        """The error for a process that is gone, or that does not answer as it should."""
        try:
            code = self._process.wait(_DYING_SECONDS)
            ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = "gave an answer that is none"
        self._words.seek(0)
        words = self._words.read()[-_LAST_WORDS:].decode(errors="replace").strip()
        self.close()
        return FileFormatError(
            f"{self._path} is damaged, or made for another runtime: the process it was opened in {ended}"
            + (f". Its last words: {words}" if words else "")
        )


def _end(process: subprocess.Popen[bytes], words: Any) -> None:
    process.kill()
    process.wait()
    for stream in filter(None, (process.stdin, process.stdout, words)):
        with contextlib.suppress(OSError):  # a frame that was not sent to the end
            stream.close()
