"""Quantizers of another library: what is dumped comes out again, bit for bit. Prints how many cases.

A script, because importing these libraries changes global state: ``python guest_encodings.py torchao|executorch``.
"""

import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.quant2e.convert.test_given_encodings import check
from tests.quant2e.guest_runner import MODELS, executorch_guests, torchao_guests

CHOSEN = (
    "conv bn relu",
    "residual add",
    "cat",
    "max pool",
    "attention",
    "tied weights",
    "embedding",
    "several outputs",
)


def main(library):
    done = 0
    for make in {"torchao": torchao_guests, "executorch": executorch_guests}[library]().values():
        for name in CHOSEN:
            model, shape = MODELS[name]
            torch.manual_seed(0)
            batches = [(shape if isinstance(shape, torch.Tensor) else torch.randn(shape),) for _ in range(3)]
            with tempfile.TemporaryDirectory() as folder:
                check(model.eval(), batches[0], make, batches, Path(folder))
            done += 1
    print(done)


if __name__ == "__main__":
    main(sys.argv[1])
