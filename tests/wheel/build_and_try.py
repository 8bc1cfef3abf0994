"""The wheel, as a user gets it: built, installed with torch alone into a clean environment, and used there.

``python tests/wheel/build_and_try.py TORCH``, where TORCH is a requirement such as ``torch==2.13.*``; `make wheel` does
it. ``build/wheel/builder`` and ``build/wheel/clean`` are the environments, and ``build/wheel/dist`` holds what was
built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "wheel"


def main(torch: str) -> None:
    """Do it all. A step that fails ends the process, with what the step wrote."""
    built = WORK / "dist"
    shutil.rmtree(WORK, ignore_errors=True)
    builder = environment(WORK / "builder")
    run(builder, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "build>=1.3")
    say("python -m build: the sources as an archive, and the wheel out of it")
    run(builder, "-m", "build", "--outdir", str(built), str(ROOT), quiet=True)
    (wheel,) = built.glob("*.whl")
    clean = environment(WORK / "clean")
    say(f"installing {torch} and {wheel.name}, and nothing else, into {WORK / 'clean'}")
    run(clean, "-m", "pip", "install", "-qq", "--disable-pip-version-check", torch, str(wheel))
    say("the smoke test, in an empty folder")
    empty = WORK / "empty"
    empty.mkdir()
    run(clean, "-I", str(Path(__file__).with_name("smoke.py")), folder=empty)


def environment(folder: Path) -> Path:
    """A new environment; returns its Python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def run(python: Path, *arguments: str, folder: Path = ROOT, quiet: bool = False) -> None:
    """Run Python with arguments, in a folder, without the paths of this process. Leaves with its exit code."""
    variables = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run([python, *arguments], cwd=folder, env=variables, check=False, capture_output=quiet, text=True)
    if done.returncode:
        say(f"failed: {' '.join(arguments)}\n{done.stdout or ''}{done.stderr or ''}")
        raise SystemExit(done.returncode)


def say(line: str) -> None:
    print(f"==> {line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
