"""What an architecture of the zoo is: a model, what it takes, and which of its sizes vary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.export import Dim

Make = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""Makes a tensor of a shape from a stream of random numbers."""

Size = int | str
"""A number, or the name of a size of the architecture."""

CALIBRATION, HELD_OUT = 16, 4
"""Batches that ranges are observed on, and those that the table's SQNR is measured on."""


@dataclass(frozen=True, slots=True)
class Field:
    """One input: its shape, with sizes by name, and what it holds."""

    shape: tuple[Size, ...]
    make: Make


@dataclass(frozen=True, slots=True)
class Extent:
    """A size that has a name: in the example, in a second batch where it varies, and at most."""

    example: int
    other: int = 0
    most: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One row of the zoo.

    ``build`` makes the model, from `torch.manual_seed` (0); ``inputs``: by the names of its arguments. ``sizes``: what
    the names in shapes stand for; those with a bound vary, and the model is captured with that. ``setting``: what both
    quantizers are set to. ``floor_db``: the least SQNR of the quantized outputs, whatever the table says.
    ``inductor``: whether it is compiled as well, which takes longest. ``skips``: a target that it is not lowered to →
    why, for what would take minutes.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Mapping[str, Field]
    sizes: Mapping[str, Extent] = field(default_factory=dict)
    setting: str = "w8a8"
    floor_db: float = 15.0
    inductor: bool = False
    skips: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {size for one in self.inputs.values() for size in one.shape if isinstance(size, str)}
        if named != set(self.sizes):
            raise ValueError(f"{self.name}: shapes name {sorted(named)}, sizes {sorted(self.sizes)}")

    @property
    def varying(self) -> tuple[str, ...]:
        """Names of the sizes that vary."""
        return tuple(name for name, extent in self.sizes.items() if extent.most)

    def model(self) -> nn.Module:
        """The model in eval mode, with norms that have seen something, and tokens and tables that are not zero.

        Zeros make rows of zeros, of which a norm makes whatever rounding leaves there: no trained model is like that.
        """
        torch.manual_seed(0)
        model = self.build().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1 and not bool(parameter.any()):
                    parameter.normal_(0, 0.5)
        return model

    def batch(self, seed: int, *, other: bool = False) -> dict[str, Tensor]:
        """Inputs by name. ``other``: with the second value of every size that varies."""
        stream = torch.Generator().manual_seed(seed)
        return {
            name: one.make(tuple(self._size(size, other) for size in one.shape), stream)
            for name, one in self.inputs.items()
        }

    def _size(self, size: Size, other: bool) -> int:
        if isinstance(size, int):
            return size
        extent = self.sizes[size]
        return extent.other if other and extent.most else extent.example

    @property
    def dynamic_shapes(self) -> dict[str, dict[int, Dim]] | None:
        """As for ``torch.export.export``; None where nothing varies."""
        if not self.varying:
            return None
        dims = {name: Dim(name, min=1, max=self.sizes[name].most) for name in self.varying}
        return {
            name: {axis: dims[size] for axis, size in enumerate(one.shape) if size in dims}
            for name, one in self.inputs.items()
        }


def normal(*shape: Size) -> Field:
    """Numbers of a normal distribution."""
    return Field(shape, lambda sizes, stream: torch.randn(sizes, generator=stream))


def unit(*shape: Size) -> Field:
    """Numbers from 0 to 1."""
    return Field(shape, lambda sizes, stream: torch.rand(sizes, generator=stream))


def integers(most: int, *shape: Size) -> Field:
    """Integers from 0 to below ``most``: tokens, or rows of a table."""
    return Field(shape, lambda sizes, stream: torch.randint(most, sizes, generator=stream))


def mask(*shape: Size) -> Field:
    """Ones, with zeros at the end of every second row."""

    def make(sizes: tuple[int, ...], stream: torch.Generator) -> Tensor:
        made = torch.ones(sizes, dtype=torch.int64)
        made[1::2, sizes[-1] - sizes[-1] // 4 :] = 0
        return made

    return Field(shape, make)


def image(channels: int = 3, side: int = 32, *, batch: Size = 2) -> Field:
    """An image, or features like those of one."""
    return normal(batch, channels, side, side)


def of_batch(example: int = 2, other: int = 3, most: int = 4) -> dict[str, Extent]:
    """The batch varies."""
    return {"batch": Extent(example, other, most)}


def of_length(example: int = 12, other: int = 7, most: int = 16) -> dict[str, Extent]:
    """The length of the sequence varies."""
    return {"length": Extent(example, other, most)}


def stack(layers: Sequence[nn.Module]) -> nn.Sequential:
    """Layers, one after the other."""
    return nn.Sequential(*layers)
