"""Deploying with nothing but the file: a .pte in ExecuTorch's Python runtime, without this library."""

import sys
from pathlib import Path

import torch
from executorch.runtime import Runtime


def main(path: Path, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the method ``forward`` of the file at ``path``."""
    method = Runtime.get().load_program(path.read_bytes()).load_method("forward")
    return [torch.as_tensor(output).clone() for output in method.execute(list(inputs))]


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), torch.randn(1, 3, 32, 32)))
