"""Which quantizer classes torchao and ExecuTorch ship, and which of them import; prints JSON.

A script, because importing these libraries changes global state. The classes are found in the installed sources, so
that a release with another quantizer shows.
"""

import importlib
import importlib.util
import json
import logging
import re
import warnings
from pathlib import Path

PACKAGES = ("torchao.quantization.pt2e.quantizer", "executorch.backends")
NO_QUANTIZER = re.compile(
    r"Quantizer(Info|Report|Reporter|ReporterUser|Base|Mode)$|^_|PatternQuantizer|SharedQspecQuantizer"
)
"""Classes with such names report, or are parts and bases of others."""


def classes():
    """``module.Class`` of every quantizer class in the sources of the packages."""
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations if spec is not None else ():
            for file in sorted(Path(folder).rglob("*.py")):
                inner = file.relative_to(folder).with_suffix("").parts
                if {"test", "tests"} & set(inner):
                    continue
                names = re.findall(r"^class (\w*Quantizer\w*)\b", file.read_text(encoding="utf-8"), re.MULTILINE)
                module = ".".join((package, *inner))
                found += [f"{module}.{name}" for name in names if not NO_QUANTIZER.search(name)]
    return found


def imports():
    """``module.Class`` → why it does not import; empty where it does."""
    found = {}
    for name in classes():
        try:
            getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2])
            found[name] = ""
        except Exception as error:  # noqa: BLE001  # whatever an import raises is its result
            found[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(json.dumps(imports()))
