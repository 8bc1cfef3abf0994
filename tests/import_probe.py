"""Imports one package in this process and prints, as JSON, what that changed and what it loaded.

``python import_probe.py PACKAGE``. torch (with its compilers) is imported first: what torch does to the process is
torch's affair. Then the state of the process is read, the package imported with every module in it, and the state
read again.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys

from process_state import STATE


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
