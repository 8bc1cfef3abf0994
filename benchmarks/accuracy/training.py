"""Training, once: weights are kept in the folder ``accuracy`` of ``$QUANT2E_CACHE``, or of ``~/.cache/quant2e``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy import text
from benchmarks.demo.digits import Digits, shifted
from quant2e.files import atomic_file

Loss = Callable[[nn.Module], Tensor]
"""The loss on the next random batch."""


def cache() -> Path:
    """The folder for trained weights."""
    return Path(os.environ.get("QUANT2E_CACHE", Path.home() / ".cache" / "quant2e")) / "accuracy"


def trained(
    name: str, make: Callable[[], nn.Module], loss: Loss, *, steps: int, rate: float, seed: int = 0
) -> nn.Module:
    """A model in eval mode, trained by AdamW on one cycle of the learning rate up to ``rate``, or read from the cache.

    What is read was made with the same name, layers, steps, rate, seed and version of torch: empty the cache where
    anything else of the training is changed. The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        key = hashlib.sha256(f"{model}{steps}{rate}{seed}{torch.__version__}".encode()).hexdigest()[:12]
        path = cache() / f"{name}-{key}.pt"
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as part:
        torch.save(model.state_dict(), part)
    return model.eval()


def digits_loss(digits: Digits, batch: int = 64) -> Loss:
    """Cross-entropy, smoothed, on images that are moved by up to a pixel."""

    def loss(model: nn.Module) -> Tensor:
        chosen = torch.randint(0, len(digits.train_labels), (batch,))
        logits = model(shifted(digits.train_images[chosen]))
        return F.cross_entropy(logits, digits.train_labels[chosen], label_smoothing=0.05)

    return loss


def characters_loss(characters: Tensor, batch: int = 48) -> Loss:
    """Cross-entropy of the next character, on random windows."""

    def loss(model: nn.Module) -> Tensor:
        starts = torch.randint(0, len(characters) - text.LENGTH - 1, (batch, 1))
        places = starts + torch.arange(text.LENGTH)
        return F.cross_entropy(model(characters[places]).flatten(0, 1), characters[places + 1].flatten())

    return loss
