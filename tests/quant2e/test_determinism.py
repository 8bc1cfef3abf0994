"""Determinism: equal data gives equal bytes, whatever the hash seed, the threads, the order and split of the data."""

import hashlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import quant2e
from quantizers import X86InductorQuantizer, XNNPACKQuantizer

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """Branches, a join, two uses of one layer, a linear: names and sets of every kind that an order could come from.

    No 1 x 1 convolution: oneDNN computes other last bits of it with another number of threads, before anything of ours.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.left, self.right = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        joined = torch.cat([self.left(x), self.right(self.right(x)) + x], 1)
        return self.head(joined.mean((2, 3)))


QUANTIZERS = {
    "xnnpack": lambda: XNNPACKQuantizer().set_global("w8a8"),
    "x86": lambda: X86InductorQuantizer().set_global("w8a8"),
}


def model():
    torch.manual_seed(0)
    return Net().eval()


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)]


def saved(path, quantizer, batches):
    """The bytes of the file of a model that these batches calibrated."""
    captured = quant2e.capture(model(), (data()[0],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    prepared = quant2e.prepare_pt2e(captured, QUANTIZERS[quantizer]())
    quant2e.calibrate(prepared, batches)
    quant2e.save(quant2e.convert_pt2e(prepared), path, (data()[0],))
    return path.read_bytes()


@pytest.fixture(scope="module", params=QUANTIZERS)
def reference(request, tmp_path_factory):
    return request.param, saved(tmp_path_factory.mktemp("reference") / "model.pt2", request.param, data())


def test_again(reference, tmp_path):
    assert saved(tmp_path / "model.pt2", reference[0], data()) == reference[1]


def test_the_name_of_the_file(reference, tmp_path):
    assert saved(tmp_path / "another name.pt2", reference[0], data()) == reference[1]


def test_the_order_of_the_batches(reference, tmp_path):
    assert saved(tmp_path / "model.pt2", reference[0], data()[::-1]) == reference[1]


def test_the_split_into_batches(reference, tmp_path):
    halves = [half for batch in data() for half in batch.split(2)]
    assert saved(tmp_path / "model.pt2", reference[0], halves) == reference[1]


def test_two_threads(reference, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(before, 2))
        assert saved(tmp_path / "model.pt2", reference[0], data()) == reference[1]
    finally:
        torch.set_num_threads(before)


def everything(folder):
    """Digests of what `quantize` writes and says, for each quantizer."""
    digests = {}
    for name, make in QUANTIZERS.items():
        result = quant2e.quantize(model(), (data()[0],), make(), data())
        result.save(folder / f"{name}.pt2")
        text = f"{result.report}\n{json.dumps(result.report.as_dict(), default=str)}\n{result.encodings}"
        digests[name] = [digest((folder / f"{name}.pt2").read_bytes()), digest(text.encode())]
        if name == "xnnpack":
            digests[name] += lowered(result, folder)
    return digests


def lowered(result, folder):
    """Digests of what is lowered, for the runtimes that are here; the files are named after the folder."""
    from lowering import to_executorch, to_onnx

    writers = {
        "executorch": lambda path: to_executorch(result).save(path),
        "onnxruntime": lambda path: to_onnx(result, path=path),
    }
    for needed, write in writers.items():
        if find_spec(needed) is not None:
            path = folder / f"{folder.name}.{needed}"
            write(path)
            yield digest(path.read_bytes())


def digest(content):
    return hashlib.sha256(content).hexdigest()


def in_a_process(folder, hash_seed, threads):
    code = (
        "import json, sys, pathlib; from tests.quant2e.test_determinism import everything; "
        "print(json.dumps(everything(pathlib.Path(sys.argv[1]))))"
    )
    environment = {
        **os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow  # two processes, each with its imports
def test_the_hash_seed_and_threads_of_a_process(tmp_path):
    """Files, reports, and what is lowered."""
    found = []
    for hash_seed, threads in (("1", "1"), ("4242", "2")):
        (tmp_path / hash_seed).mkdir()
        found.append(in_a_process(tmp_path / hash_seed, hash_seed, threads))
    assert found[0] == found[1]


@pytest.mark.slow
def test_lowered_files(tmp_path):
    """Two lowerings of one model write the same bytes."""
    pytest.importorskip("executorch")
    pytest.importorskip("onnxruntime")
    from lowering import to_executorch, to_onnx

    result = quant2e.quantize(model(), (data()[0],), QUANTIZERS["xnnpack"](), data())
    for name in ("a", "b"):
        to_executorch(result).save(tmp_path / f"{name}.pte")
        to_onnx(result, path=tmp_path / f"{name}.onnx")
    for ending in ("pte", "onnx"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()
