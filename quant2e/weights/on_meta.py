"""Models without weights: a block in which parameters take no memory, and buffers do as ever.

``torch.device("meta")`` leaves out buffers as well, also those that a constructor computes and no file holds, such as
the frequencies of rotary embeddings.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that this thread makes inside have their parameters on the meta device: shapes and dtypes, no values.

    Each is made and dropped, so the largest one needs memory for a moment; what initialises it then does nothing.
    Buffers are real. A parameter of several modules stays one. `attach_weights` gives the parameters their values.
    """
    thread, made = threading.get_ident(), WeakIdKeyDictionary()

    def drop(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != thread or parameter.is_meta:
            return None
        if parameter not in made:
            made[parameter] = _empty(parameter)
        found: nn.Parameter = made[parameter]
        return found

    hook: Any = drop
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    values: Tensor = parameter.detach().to("meta")
    empty = nn.Parameter(values, parameter.requires_grad)
    vars(empty).update(vars(parameter))
    return empty
