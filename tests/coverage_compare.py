"""Coverage of what ``compare_elbos`` and ``over_seeds`` report."""

from unittest.mock import patch

import numpy as np
import torch
from coverage_checks import Draws, Row, Study, drawn, measured

from pyro_vae import _cost, _measured, _moments

DRAWS, NUMBERS = 100, 20


def moments_of(gradients: torch.Tensor) -> _moments.Moments:
    """Moments of gradients of shape ``(draw, repetition, number)``, each repetition a parameter of its own."""
    draws, repetitions, numbers = gradients.shape
    moments = _moments.Moments([numbers] * repetitions, draws, like=gradients)
    for one in gradients:
        moments.add([one.flatten()])
    return moments


NOISE = {
    "normal": lambda size: torch.randn(size).double(),
    # Student's t with 5 degrees of freedom: the fourth moment exists, that of the error of a variance hardly.
    "t": lambda size: torch.distributions.StudentT(5.0).sample(size).double() * (3 / 5) ** 0.5,
    "lognormal": lambda size: (torch.randn(size).double().exp() - np.exp(0.5)) / np.sqrt(np.exp(2) - np.exp(1)),
}


def simulated_gradient(noise: str, norm: float):
    """Gradients of known mean, ``norm`` long, and variance 1 in each of NUMBERS numbers."""

    def measure(seed: int) -> dict[str, Draws]:
        gradients = NOISE[noise]((DRAWS, 400, NUMBERS))
        gradients[..., 0] += norm
        moments, groups = moments_of(gradients), [[i] for i in range(400)]
        truth = {"norm": norm, "variance": NUMBERS, "snr": norm / NUMBERS**0.5}
        table = _measured._gradients(_Found(moments, groups))
        return {
            f"gradient_{name}_se": drawn(table[f"gradient_{name}"][0][0], table[f"gradient_{name}_se"][0][0], value)
            for name, value in truth.items()
        }

    return measure


class _Found:
    """What ``_gradients`` reads of the measurements of one cell."""

    def __init__(self, moments, groups, reference=None) -> None:
        self.moments, self.groups, self.references = [moments], groups, [reference]


def simulated_bias(bias: float):
    """A gradient of norm 1 beside that of a reference of twice the draws, ``bias`` apart."""

    def measure(seed: int) -> dict[str, Draws]:
        own, reference = torch.randn(DRAWS, 400, NUMBERS).double(), torch.randn(2 * DRAWS, 400, NUMBERS).double()
        own, reference = own / NUMBERS**0.5, reference / NUMBERS**0.5
        own[..., :2] += torch.tensor([1.0, bias])
        reference[..., 0] += 1
        found = _Found(moments_of(own), [[i] for i in range(400)], moments_of(reference))
        table = _measured._gradients(found)
        return {"gradient_bias_se": drawn(table["gradient_bias"][0][0], table["gradient_bias_se"][0][0], bias)}

    return measure


class Clock:
    """A clock that each step moves on by the next of given times."""

    def __init__(self, times) -> None:
        self.times, self.now, self.started = iter(times), 0.0, False

    def perf_counter(self) -> float:
        self.now += next(self.times) if self.started else 0.0
        self.started = not self.started
        return self.now


def simulated_seconds(shape: str):
    """Independent times of known median 1: lognormal, one in ten twenty times as long where disturbed."""

    def measure(seed: int) -> dict[str, Draws]:
        rng = np.random.default_rng(seed)
        times = np.exp(0.1 * rng.normal(size=(_measured.TIMED_REPEATS, 400)))
        longer = rng.random(times.shape) < (0.1 if shape == "disturbed" else 0.0)
        times = np.where(longer, 20 * times, times)
        truth = 1.0 if shape == "quiet" else DISTURBED
        with patch.object(_cost, "time", Clock(times.ravel())):
            found = _cost.median_seconds([lambda: None] * 400, torch.device("cpu"), _measured.TIMED_REPEATS)
        return {"seconds_se": drawn(*found, truth)}

    return measure


DISTURBED = float(np.exp(0.1 * 0.13971))  # the 0.5 / 0.9 quantile of the lognormal: Φ⁻¹(0.5556) = 0.1397

TEN = "an error of 10 blocks has 9 degrees of freedom"
WELL = {f"gradient_{name}_se": Row(0.88, 0.985, (0.8, 1.3)) for name in ("norm", "variance", "snr")}

STUDIES = [
    Study(
        "compare_elbos", f"normal gradients of {NUMBERS} numbers, SNR 1, {DRAWS} draws", simulated_gradient("normal", NUMBERS**0.5),
        WELL, seeds=5, quick=1,
    ),
]  # fmt: skip
