"""What is trained: architectures, estimators and data, told alike to every contestant."""

import gzip
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
"""MNIST's IDX files, where a developer has them beside the checkout; else random bits of that shape."""

LEARNING_RATE = 1e-3


class LeftOut(Exception):
    """A contestant does not take part; the message says why."""


@dataclass(frozen=True)
class Case:
    """One race: the same architecture, batch and number of steps for all.

    Args:
        features: bits per datum.
        hidden: widths of the encoder's hidden layers, the decoder's in reverse; of a convolutional case, channels.
        latent: the number of latents.
        batch: data per step.
        estimator: ``"trace"``, ``"analytic"`` or ``"iwae50"``.
        steps: per repeat, which is one pass over the data.
        convolutional: whether the networks are convolutions of 28 × 28 images.
    """

    features: int
    hidden: tuple[int, ...]
    latent: int
    batch: int = 128
    estimator: str = "trace"
    steps: int = 64
    convolutional: bool = False

    @property
    def name(self) -> str:
        widths = [self.features, *self.hidden, self.latent]
        kind = "conv " if self.convolutional else ""
        return f"{kind}{'-'.join(map(str, widths))}, batch {self.batch}, {self.estimator}"

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Case":
        return cls(**{**settings, "hidden": tuple(settings["hidden"])})

    def settings(self) -> dict[str, Any]:
        return asdict(self)


SIZES = {
    "64-128-8": Case(64, (128,), 8, steps=128),
    "784-400-20": Case(784, (400,), 20, steps=64),
    "784-200-200-50": Case(784, (200, 200), 50, steps=64),
    "conv": Case(784, (16, 32), 20, steps=16, convolutional=True),
}
BATCHES = (20, 128, 512, 2048, 8192)


def bits(case: Case) -> np.ndarray:
    """Binary data, ``batch · steps`` rows: images at a threshold, repeated as needed, or coin flips."""
    rows, rng = case.batch * case.steps, np.random.default_rng(0)
    if case.features == 784 and (images := mnist("train")) is not None:
        return (images[np.arange(rows) % len(images)] > 127).astype(np.float32)
    if case.features == 64:
        from sklearn.datasets import load_digits

        digits = load_digits().data > 7
        return digits[np.arange(rows) % len(digits)].astype(np.float32)
    return (rng.random((rows, case.features)) < 0.2).astype(np.float32)


def mnist(part: str) -> np.ndarray | None:
    """MNIST's images, bytes of shape ``(datum, 784)``, of ``"train"`` or ``"t10k"``; None where they are not here."""
    found = sorted(MNIST.glob(f"{part}-images*")) if MNIST.is_dir() else []
    if not found:
        return None
    opened = gzip.open if found[0].suffix == ".gz" else open
    with opened(found[0], "rb") as file:
        _, count, height, width = struct.unpack(">IIII", file.read(16))
        return np.frombuffer(file.read(), np.uint8).reshape(count, height * width)
