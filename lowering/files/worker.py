"""Worker process of `lowering.files.child`: opens one program file and answers calls until its pipe is closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowering.files.frames import BrokenFrameError, dtype_name, read_frame, write_frame
from lowering.files.program_file import OpenProgram, opened, read_program
from lowering.signature import TensorInput
from quant2e.errors import Quant2eError


def serve() -> None:
    """Open the file of the first message, then answer call after call."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints is not taken for an answer
    calls = sys.stdin.buffer
    try:
        message, _ = read_frame(calls)
        program = _opened(message)
        inputs = [_described(one) for one in program.inputs]
        about = {"inputs": inputs, "example": program.example is not None, "unchanged": program.unchanged}
        write_frame(answers, about, program.example or ())
    except BrokenFrameError:
        return
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told there
        write_frame(answers, _told(error))
        return
    while True:
        try:
            _, tensors = read_frame(calls)
        except BrokenFrameError:
            return
        try:
            write_frame(answers, {}, program.call(tensors))
        except Exception as error:  # noqa: BLE001 - as above
            write_frame(answers, _told(error))


def _opened(message: Mapping[str, Any]) -> OpenProgram:
    torch.set_num_threads(int(message["threads"]))
    return opened(read_program(Path(message["path"])), message["method"])


def _described(one: TensorInput) -> dict[str, Any]:
    return {"name": one.name, "dtype": dtype_name(one.dtype), "sizes": [list(pair) for pair in one.sizes]}


def _told(error: Exception) -> dict[str, Any]:
    said = str(error) if isinstance(error, Quant2eError) else f"{type(error).__name__}: {error}"
    return {"error": said, "kind": type(error).__name__}


if __name__ == "__main__":
    serve()
