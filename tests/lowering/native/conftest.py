"""Fixtures of the tests of native regions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch

from lowering.native.kernels.op import built_library, instruction_sets


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, and small steps are shared as well; behind the test all is as it was."""
    before = torch.get_num_threads()
    _share_all(True)
    yield torch.set_num_threads
    _share_all(False)
    torch.set_num_threads(before)


def _share_all(wish: bool) -> None:
    for name in instruction_sets():
        if (path := built_library(name)) is not None:
            ctypes.CDLL(str(path)).quant2e_share_all(int(wish))
