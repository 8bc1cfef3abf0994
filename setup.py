"""What pyproject.toml cannot say: a wheel for Linux on x86-64 brings libraries of int8 regions, compiled here.

Where there is no C++ compiler, on another machine, or with ``QUANT2E_SHIP=0``, the wheel is for any machine, and the
libraries are compiled by the first program that needs them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("lowering") / "native" / "kernels"


def of_kernels() -> Any:
    """The module that compiles them, without its package, which imports torch."""
    spec = importlib.util.spec_from_file_location("shipped", Path(__file__).parent / KERNELS / "shipped.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler() -> str | None:
    """The C++ compiler to ship libraries with; None where none are shipped."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    return found if os.environ.get("QUANT2E_SHIP") != "0" and of_kernels().able() else None


class BuildPy(build_py):
    """Compiles the libraries and puts them beside their sources; not into the checkout."""

    def run(self) -> None:
        super().run()
        program = compiler()
        if program is None or self.editable_mode:
            return
        kernels = of_kernels()
        for path in kernels.ship(kernels.FLAGS, program, Path(self.build_lib) / KERNELS / "shipped"):
            self.announce(f"compiled {path.name}, {path.stat().st_size:,} bytes", level=logging.INFO)


class BdistWheel(bdist_wheel):
    """Says in its name for which machine the libraries are."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = compiler() is None

    def get_tag(self) -> tuple[str, str, str]:
        _, _, machine = super().get_tag()
        return "py3", "none", machine


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
