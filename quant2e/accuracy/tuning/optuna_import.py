"""Optuna, which is optional: imported where it is needed, and without its log lines."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quant2e.errors import Quant2eError


def optuna_module() -> Any:
    """The module ``optuna``. Raises `Quant2eError`, which names the extra, where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise Quant2eError(
            "storage=, strategy='random' and strategy='bayesian' need Optuna, which is not installed: "
            "pip install 'quant2e[tune]'"
        ) from error
    return optuna


@contextmanager
def without_optuna_log() -> Iterator[None]:
    """Nothing below errors is logged by Optuna, nor warned of as experimental, inside the block."""
    logger = logging.getLogger("optuna")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
