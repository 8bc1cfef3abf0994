"""Deploying with nothing but the file: a package of Inductor with torch alone, without this library or a compiler."""

import sys
from pathlib import Path

import torch


def main(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    """The output of the program in the file at ``path``, that `lowering.package_inductor` wrote."""
    package = torch._inductor.aoti_load_package(str(path))
    output: torch.Tensor = package(*inputs)
    return output


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), torch.randn(1, 3, 32, 32)))
