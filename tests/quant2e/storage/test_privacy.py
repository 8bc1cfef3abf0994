"""What a file tells: nothing of folders, source text and data of the user; and the same bytes every time."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from quant2e import load, quantize
from quant2e.storage.writer.origins import source_file, without_folders
from tests.quant2e.annotators import products

ROOT = Path(__file__).parents[3]

SOURCE = '''
"""A model of a user, in a folder whose name nobody else should learn."""

from torch import nn


class Secret(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.mask = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x).masked_fill(self.mask(x) > 0, -1e9)  # a comment of the user
'''

PASSWORD = torch.tensor([[1.25, -3.5, 8.125, 0.75]] * 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("user's own folder")
    (path / "model.py").write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def model(folder):
    spec = importlib.util.spec_from_file_location("secret_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["secret_model"] = module
    spec.loader.exec_module(module)
    return quantize(module.Secret().eval(), PASSWORD, products(), [PASSWORD], allow_unquantized=True)


def test_no_folders_no_source_text_no_data(model, folder, tmp_path):
    assert str(folder) in str(model.report.as_dict())
    model.save(tmp_path / "file of the user.pt2")
    data = (tmp_path / "file of the user.pt2").read_bytes()
    for secret in (str(folder), folder.name, str(ROOT), str(Path(torch.__file__).parent), str(Path.home()) + "/"):
        assert secret.encode() not in data
    assert b"comment of the user" not in data
    assert b"masked_fill(" not in data
    assert b"file of the user" not in data
    assert PASSWORD.numpy().tobytes()[:16] not in data
    assert b"model.py" in data
    again = load(tmp_path / "file of the user.pt2")
    assert again.report.verdicts[0].op.source == "model.py:13"


def test_the_data_only_when_asked_for(model, tmp_path):
    model.save(tmp_path / "m.pt2", with_example_inputs=True)
    again = load(tmp_path / "m.pt2")
    assert not again.stand_ins
    assert torch.equal(again.example_inputs[0], PASSWORD)
    again.save(tmp_path / "n.pt2")
    third = load(tmp_path / "n.pt2")
    assert third.stand_ins
    assert not torch.equal(third.example_inputs[0], PASSWORD)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/home/ann/work/model.py:12", "model.py:12"),
        ('File "/home/ann/a b/model.py", line 12, in forward', 'File "model.py", line 12, in forward'),
        (r'File "C:\\Users\\ann\\model.py", line 12', 'File "model.py", line 12'),
        ("at /a/b.py:1 and /c/d/e.py:2", "at b.py:1 and e.py:2"),
        ("rows/columns of a/b.py", "rows/columns of a/b.py"),
        ("int8 / float", "int8 / float"),
        ("model.py:3", "model.py:3"),
    ],
)
def test_texts_without_folders(text, told):
    assert without_folders(text) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/h/it's/m.py:12 `x = y.z()`", "m.py:12"),
        (
            "'add' at /h/it's/m.py:12 `x = f'{y}'`: fold it; 'mul' at /h/it's/m.py:3 `z`",
            "'add' at m.py:12: fold it; 'mul' at m.py:3",
        ),
        ("see /h/it's/m.py, line 3", "see m.py, line 3"),
        (r"at D:\x y\m.py:12 `x`, D:\x y\m.py:1", "at m.py:12, m.py:1"),
    ],
)
def test_texts_without_known_files(text, told):
    assert without_folders(text, ["/h/it's/m.py", r"D:\x y\m.py"]) == told


def test_files_of_sources():
    assert source_file("/h/it's/m.py:12 `x = {1: 2}`") == "/h/it's/m.py"
    assert source_file(r"D:\x\m.py:12 `x`") == r"D:\x\m.py"
    assert source_file("m.py:3") == "m.py"
    assert source_file("") == ""


CODE = """
    import sys, torch
    torch.set_num_threads(int(sys.argv[2]))
    import quant2e
    from torch import nn
    from tests.quant2e.annotators import products
    torch.manual_seed(0)
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
            self.register_buffer("calls", torch.zeros(()))
        def forward(self, x, extra):
            self.calls.add_(1)
            return {"z": self.b(self.a(x).relu()), "a": extra["k"] + x.shape[0]}
    x = torch.linspace(-1, 1, 12).view(3, 4)
    shapes = ({0: torch.export.Dim("n", min=2, max=9)}, {"k": None, "j": None})
    args = (x, {"k": torch.ones(1), "j": torch.ones(2)})
    quant2e.quantize(Net().eval(), args, products(), [args], dynamic_shapes=shapes).save(sys.argv[1])
"""


@pytest.mark.slow
def test_the_same_bytes_over_hash_seeds_threads_and_names(tmp_path):
    hashes = set()
    for seed, threads in ((0, 1), (1, 2), (77, 3)):
        path = tmp_path / f"{seed} {threads}" / f"model{seed}.pt2"
        path.parent.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(CODE), path, str(threads)],
            capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(hashes) == 1
