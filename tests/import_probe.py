"""Imports one package in this process and prints, as JSON, what that changed and what it loaded.

``python import_probe.py PACKAGE``. torch (with its compilers) is imported first: what torch does to the process is
torch's affair. Then the state of the process is read, the package imported with every module in it, and the state
read again.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import pkgutil
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch._dynamo.config
import torch._inductor.config
from torch._inductor.fx_passes import freezing_patterns, post_grad
from torch._inductor.lowering import lowerings
from torch._inductor.pattern_matcher import PatternMatcherPass


def backend_flags() -> dict[str, object]:
    """Every plain switch under ``torch.backends``."""
    modules = {name: module for name, module in sys.modules.items() if name.startswith("torch.backends")}
    names = ("allow_tf32", "benchmark", "deterministic", "enabled", "engine", "flags_frozen", "verbose")
    values = {f"{path}.{name}": getattr(module, name, None) for path, module in modules.items() for name in names}
    return {name: value for name, value in values.items() if isinstance(value, bool | int | str)}


def inductor_passes() -> dict[str, object]:
    """How many patterns each of Inductor's pass tables holds, and how many ops have a lowering."""
    counts: dict[str, object] = {"lowerings": len(lowerings)}
    for module in (post_grad, freezing_patterns):
        for name, value in vars(module).items():
            entries = value if isinstance(value, list) else [value]
            tables = [entry for entry in entries if isinstance(entry, PatternMatcherPass)]
            if tables:
                counts[f"{module.__name__}.{name}"] = [sum(map(len, table.patterns.values())) for table in tables]
    return counts


LOGGERS = ("", *sorted(name for name in logging.root.manager.loggerDict if name.startswith("torch")))
"""The root logger and those torch has made so far; one that a further module of torch makes for itself is no change."""


def loggers() -> dict[str, list[int]]:
    """Level and number of handlers of each."""
    return {name: [logging.getLogger(name).level, len(logging.getLogger(name).handlers)] for name in LOGGERS}


def methods(owner: type) -> dict[str, str]:
    """The functions of a class, by identity: a patched one differs."""
    return {name: repr(value) for name, value in vars(owner).items() if callable(value)}


STATE: dict[str, Callable[[], Any]] = {
    "default dtype": lambda: str(torch.get_default_dtype()),
    "default device": lambda: str(torch.get_default_device()),
    "grad mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
    "anomaly mode": torch.is_anomaly_enabled,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "matmul precision": torch.get_float32_matmul_precision,
    "torch threads": lambda: [torch.get_num_threads(), torch.get_num_interop_threads()],
    "python threads": threading.active_count,
    "print options": lambda: repr(torch._tensor_str.PRINT_OPTS),
    "torch.backends": backend_flags,
    "torch RNG": lambda: torch.get_rng_state().numpy().tobytes().hex(),
    "numpy RNG": lambda: repr(np.random.get_state()),
    "numpy errors": np.geterr,
    "python RNG": lambda: repr(random.getstate()),
    "warnings filters": lambda: [repr(entry) for entry in warnings.filters],
    "warnings hook": lambda: repr(warnings.showwarning),
    "loggers": loggers,
    "environment": lambda: dict(os.environ),
    "path": lambda: list(sys.path),
    "recursion limit": sys.getrecursionlimit,
    "signal handlers": lambda: {number: repr(signal.getsignal(number)) for number in signal.valid_signals()},
    "excepthook": lambda: repr(sys.excepthook),
    "inductor config": lambda: repr(torch._inductor.config.get_config_copy()),
    "inductor passes": inductor_passes,
    "dynamo config": lambda: repr(torch._dynamo.config.get_config_copy()),
    "nn.Module": lambda: methods(torch.nn.Module),
    "fx.GraphModule": lambda: methods(torch.fx.GraphModule),
    "fx.Node": lambda: methods(torch.fx.Node),
}
"""What belongs to the process, and how it is read."""


def main(package: str) -> None:
    loaded, before = set(sys.modules), {name: read() for name, read in STATE.items()}
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    changed = sorted(name for name, read in STATE.items() if read() != before[name])
    modules = sorted({name.split(".")[0] for name in set(sys.modules) - loaded})
    print(json.dumps({"changed": changed, "loaded": modules}))


if __name__ == "__main__":
    main(sys.argv[1])
