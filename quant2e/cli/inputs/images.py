"""Images as inputs: read with Pillow, brought to the size that the model takes, scaled and normalised as stated.

    image ─▶ upright, RGB or grey ─▶ resized (or its shorter side, and the centre cut out) ─▶ /255 ─▶ (x − mean)/std

What is done is said in a note, every time: a model that was trained on something else loses what calibration gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant2e.cli.inputs.taken import TakenTensor
from quant2e.errors import CalibrationError, FileFormatError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")

_CHANNELS = (1, 3)

_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
"""Of 8 bits and fewer. Pillow cuts the values of others off at 255."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """What is done with images. ``size``: height and width; that of the model's input where it is fixed. ``resize``:
    pixels of the shorter side, of which the centre is cut out then; without, the whole image is resized. ``mean``,
    ``std``: of values from 0 to 1, one for all channels or one for each.
    """

    size: tuple[int, int] | None = None
    resize: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def given(self) -> bool:
        """Whether the user states any of it."""
        return self != Preprocessing()


@dataclass(frozen=True, slots=True)
class _Layout:
    channels: int
    last: bool
    size: tuple[int, int]


def image_reader(one: TakenTensor, asked: Preprocessing) -> tuple[Callable[[Path], Tensor], list[str]]:
    """The function that reads an image as a sample of an input, and a note that says what it does.

    Raises `CalibrationError` where Pillow is missing, and where it is not clear how an image becomes such an input.
    """
    try:
        import PIL.Image
        import PIL.ImageOps
    except ImportError as error:
        raise CalibrationError(
            "images are read with Pillow, which is not installed: pip install quant2e[images]"
        ) from error
    layout = _layout(one, asked)
    height, width = layout.size
    if asked.resize is not None and asked.resize < max(layout.size):
        raise CalibrationError(f"--resize {asked.resize}: {height}x{width} cannot be cut out of less")
    mean, std = (
        _per_channel(values, layout.channels, name) for values, name in ((asked.mean, "mean"), (asked.std, "std"))
    )
    scaled = one.dtype.is_floating_point
    if not scaled and (asked.mean or asked.std or one.dtype is not torch.uint8):
        dtype = str(one.dtype).removeprefix("torch.")
        raise CalibrationError(f"the model takes images as {dtype}: uint8 without --mean and --std, or floats")

    def read(path: Path) -> Tensor:
        with _opened(path) as image:
            upright = PIL.ImageOps.exif_transpose(image)
            pixels = np.asarray(_resized(upright.convert("L" if layout.channels == 1 else "RGB"), layout, asked))
        values = torch.from_numpy(pixels.reshape(height, width, layout.channels).copy())
        if scaled:
            values = (((values.to(torch.float32) / 255.0) - mean) / std).to(one.dtype)
        return values if layout.last else values.permute(2, 0, 1).contiguous()

    return read, [_description(layout, asked, scaled=scaled)]


def checked_images(files: Sequence[Path]) -> list[str]:
    """What is to be said of images beside how they are read; looks at no pixels, so that it costs little.

    Raises `FileFormatError` for what is no image, and for images of more than 8 bits a value.
    """
    transparent = frames = 0
    for file in files:
        with _opened(file) as image:
            if image.mode not in _MODES:
                raise FileFormatError(
                    f"{file} is an image of mode {image.mode}, of more than 8 bits a value, and what its values mean "
                    "is not known: give .npy files, scaled as the model takes them"
                )
            transparent += image.has_transparency_data
            frames += getattr(image, "n_frames", 1) > 1
    said = [(transparent, "transparency is left out"), (frames, "the first of several frames or pages is taken")]
    return [f"of {count} image(s) {what}" for count, what in said if count]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An image, its pixels not read yet. Raises `FileFormatError` for what Pillow says of it, then or in the block."""
    import PIL.Image

    try:
        with warnings.catch_warnings(), PIL.Image.open(path) as image:
            warnings.simplefilter("ignore")  # of metadata, and of images that are large
            yield image
    except FileFormatError:
        raise
    except Exception as error:  # of each format's own reader: no list of theirs is complete
        said = "no image, or one of a format that Pillow does not read"
        if not isinstance(error, PIL.UnidentifiedImageError):
            said = str(error) or type(error).__name__
        raise FileFormatError(f"{path} cannot be read as an image: {said}") from error


def _description(layout: _Layout, asked: Preprocessing, *, scaled: bool) -> str:
    height, width = layout.size
    colours = "grey" if layout.channels == 1 else "RGB"
    if asked.resize is None:
        shape = f"whole image resized to {height}x{width}"
    else:
        shape = f"shorter side resized to {asked.resize}, centre {height}x{width} cut out"
    parts = [colours, f"{shape} (bilinear)"]
    if scaled:
        normal = f"mean {_list(asked.mean) or '0'}, std {_list(asked.std) or '1'}"
        parts += ["values 0 to 1", normal]
    else:
        parts.append("values 0 to 255")
    unstated = [name for name, value in (("--mean", asked.mean), ("--std", asked.std)) if not value and scaled]
    hint = f"; state yours with {' and '.join(unstated)} if the model was trained with others" if unstated else ""
    return f"images: {', '.join(parts)}{hint}"


def _list(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _layout(one: TakenTensor, asked: Preprocessing) -> _Layout:
    if len(one.sizes) != 4:
        raise CalibrationError(f"the model takes {one}: images are inputs of four axes, batch, channels, height, width")
    _, second, third, fourth = one.sizes
    first, last = second in _CHANNELS, fourth in _CHANNELS
    if first == last:
        raise CalibrationError(
            f"the model takes {one}: neither axis, or both, could be the 1 or 3 channels of an image"
        )
    channels, sizes = (second, (third, fourth)) if first else (fourth, (second, third))
    assert isinstance(channels, int)
    if asked.size is not None:
        if not one.fits((0, channels, *asked.size) if first else (0, *asked.size, channels), from_axis=1):
            raise CalibrationError(f"--image-size {asked.size[0]}x{asked.size[1]}: the model takes {one}")
        return _Layout(channels, last, asked.size)
    height, width = sizes
    if not isinstance(height, int) or not isinstance(width, int):
        raise CalibrationError(f"the model takes {one}, images of several sizes: say which with --image-size")
    return _Layout(channels, last, (height, width))


def _per_channel(values: Sequence[float], channels: int, name: str) -> Tensor:
    if not values:
        return torch.tensor(0.0 if name == "mean" else 1.0)
    if len(values) not in (1, channels):
        raise CalibrationError(f"--{name} has {len(values)} numbers, and images here have {channels} channel(s)")
    return torch.tensor(values, dtype=torch.float32)


def _resized(image: Any, layout: _Layout, asked: Preprocessing) -> Any:
    import PIL.Image

    height, width = layout.size
    bilinear = PIL.Image.Resampling.BILINEAR
    if asked.resize is None:
        return image.resize((width, height), bilinear)
    scale = asked.resize / min(image.size)
    larger = image.resize(tuple(max(asked.resize, round(side * scale)) for side in image.size), bilinear)
    left, top = (larger.width - width) // 2, (larger.height - height) // 2
    return larger.crop((left, top, left + width, top + height))
