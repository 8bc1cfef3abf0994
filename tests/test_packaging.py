"""What is installed: every package with its marker of types, and an editable install that type checkers can follow."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("quant2e", "quantizers", "lowering")

BUILD = """
import sys
from setuptools import build_meta
print(build_meta.build_wheel("."), build_meta.build_editable("."), sep="\\n", file=sys.stderr)
"""

USER = """
import lowering
import quantizers
from quant2e import __version__, default_observer, prepare_pt2e, pt2e
from torch.fx import GraphModule, Node

def what_names_are() -> None:
    reveal_type(default_observer.with_args(bits=4))
    reveal_type(pt2e.get_block_size((2, 4), pt2e.PerTensor()))
    reveal_type(quantizers.XNNPACKQuantizer().annotate)
    reveal_type(lowering.Bound().sqnr_db)
    reveal_type(__version__)

class Guest:
    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        return model
    def annotate(self, model: GraphModule) -> GraphModule:
        return model
    def validate(self, model: GraphModule) -> None: ...
    def prepare_obs_or_fq_callback(
        self, model: GraphModule, observers: dict[tuple[Node, Node] | Node, object]
    ) -> None: ...

def who_is_a_quantizer(graph: GraphModule) -> None:
    prepare_pt2e(graph, Guest())
    prepare_pt2e(graph, quantizers.ComposableQuantizer([Guest(), quantizers.XNNPACKQuantizer()]))
    prepare_pt2e(graph, object())

from quant2e import default_observr
"""

MYPY = """
[mypy]
strict = True
[mypy-torch.*,numpy.*]
follow_imports = skip
ignore_missing_imports = True
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the project, with a wheel and an editable wheel beside its sources."""
    project = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD], cwd=project, check=True, capture_output=True)
    wheels = {("editable" if "editable" in wheel.name else "wheel"): wheel for wheel in project.glob("*.whl")}
    return project, wheels


def test_a_wheel_holds_every_source_and_the_markers_of_types(built):
    project, wheels = built
    kept = set(zipfile.ZipFile(wheels["wheel"]).namelist())
    sources = {
        file.relative_to(project).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.cpp", "py.typed")
        for file in (project / package).rglob(pattern)
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= sources
    assert sources <= kept


def test_an_editable_install_is_a_path_and_no_import_hook(built):
    """Type checkers and editors read paths from ``.pth`` files; they run no finder of setuptools."""
    project, wheels = built
    editable = zipfile.ZipFile(wheels["editable"])
    installed = [name for name in editable.namelist() if ".dist-info/" not in name]
    assert installed == ["__editable__.quant2e-0.1.0.pth"]
    assert editable.read(installed[0]).decode().split() == [str(project)]


def test_a_type_checker_follows_an_editable_install(built, tmp_path):
    """mypy, in a folder that is not the project's, with an environment into which the project was installed."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    zipfile.ZipFile(built[1]["editable"]).extractall(site)
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--config-file=mypy.ini", f"--python-executable={python}", "user.py"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert "import-not-found" not in told
    assert [
        line.partition(": error: ")[2] for line in told.splitlines() if line.startswith("user.py") and "error" in line
    ] == [
        'Argument 2 to "prepare_pt2e" has incompatible type "object"; expected "Quantizer"  [arg-type]',
        'Module "quant2e" has no attribute "default_observr"; maybe "default_observer"?  [attr-defined]',
    ]
    shown = [line.partition("Revealed type is ")[2] for line in told.splitlines() if "Revealed" in line]
    assert shown == [
        '"quant2e.observers.base.ObserverFactory"',
        '"tuple[int, ...]"',
        '"def (model: Any) -> Any"',
        '"float"',
        '"str"',
    ]
