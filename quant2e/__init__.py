"""A quantization compiler for exported PyTorch graphs.

In: an ``nn.Module``, an ``ExportedProgram`` or a captured graph. Out: a Q/DQ graph that saves, loads and lowers.

`quantize` does it in one call; `capture`, `prepare_pt2e`, `calibrate` and `convert_pt2e` are its steps.

`quant2e.pt2e` holds what scripts written for PT2E need besides, `quant2e.pytorch_quantization` NVIDIA's descriptors,
`quant2e.training` what training needs, `quant2e.weights` weights that stay in their files, `quant2e.integer` the
integer form, `quant2e.accuracy.algorithms` what mends accuracy, and `quant2e.signature_types` what only annotations
name; all of their names can be imported from here as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quant2e.accuracy.algorithms import *
    from quant2e.integer import *
    from quant2e.interface import *
    from quant2e.interface import __all__ as __all__
    from quant2e.pt2e import *
    from quant2e.pytorch_quantization import *
    from quant2e.signature_types import *
    from quant2e.training import *
    from quant2e.weights import *

    __version__: str
else:

    def __getattr__(name: str) -> object:
        """A name of `quant2e.interface`, which is imported, and torch with it, when somebody asks for the first one."""
        from importlib import import_module

        if name == "__version__":
            return _version()
        if name.startswith("__") and name != "__all__":  # Python asks for them often: no work
            raise AttributeError(f"module 'quant2e' has no attribute {name!r}")
        interface = import_module("quant2e.interface")
        if name in globals():  # a sub-package, which is an attribute of this one once it is imported
            return globals()[name]
        return getattr(interface, name)


def __dir__() -> list[str]:
    from quant2e.interface import __all__ as names

    return [*names, "__version__"]


def _version() -> str:
    """Of the installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("quant2e")
    except PackageNotFoundError:  # run from a folder of sources
        return "0+unknown"
