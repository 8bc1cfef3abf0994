"""What belongs to the process, and how it is read: a table, for tests that nothing of it changes.

``STATE`` is read before and after; see ``import_probe.py`` (imports) and ``public_calls.py`` (every public call).
"""

from __future__ import annotations

import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
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


def settings(config: Any) -> dict[str, str]:
    """Every setting of a compiler, as text; the order of a set is none."""
    found = config.get_config_copy()
    return {name: repr(sorted(value, key=repr) if isinstance(value, set) else value) for name, value in found.items()}


def descriptors() -> dict[str, int]:
    """What the open file descriptors of this process are of, and how many of each; sockets and pipes by kind."""
    found: Counter[str] = Counter()
    for each in Path("/proc/self/fd").iterdir() if Path("/proc/self/fd").is_dir() else ():
        try:
            found[str(each.readlink()).partition("[")[0]] += 1
        except OSError:  # the one that this listing reads
            continue
    return dict(found)


def children() -> list[str]:
    """The processes that this one has started and that still run."""
    pids = [pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()]
    return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200] for pid in pids]


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
    "python threads": lambda: sorted(thread.name for thread in threading.enumerate()),
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
    "unraisablehook": lambda: repr(sys.unraisablehook),
    "streams": lambda: [repr(sys.stdout), repr(sys.stderr), repr(sys.stdin)],
    "working directory": os.getcwd,
    "locale": lambda: locale.setlocale(locale.LC_ALL),
    "descriptors": descriptors,
    "children": children,
    "inductor config": lambda: settings(torch._inductor.config),
    "inductor passes": inductor_passes,
    "dynamo config": lambda: settings(torch._dynamo.config),
    "nn.Module": lambda: methods(torch.nn.Module),
    "fx.GraphModule": lambda: methods(torch.fx.GraphModule),
    "fx.Node": lambda: methods(torch.fx.Node),
}
"""What belongs to the process, and how it is read."""


def snapshot() -> dict[str, Any]:
    """The state of the process now."""
    return {name: read() for name, read in STATE.items()}


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
    """What changed, and from what to what, shortened."""
    found = {}
    for name, value in before.items():
        if after[name] == value:
            continue
        if isinstance(value, dict):
            keys = sorted(key for key in {**value, **after[name]} if value.get(key) != after[name].get(key))
            found[name] = [f"{key}: {value.get(key)!r:.80} → {after[name].get(key)!r:.80}" for key in keys]
        elif isinstance(value, list):
            found[name] = [*(f"- {x!r:.100}" for x in value if x not in after[name])]
            found[name] += [*(f"+ {x!r:.100}" for x in after[name] if x not in value)]
        else:
            found[name] = [f"{value!r:.60} → {after[name]!r:.60}"]
    return found
