"""Weights of known tail index: how far the log of their mean is off, and how often its intervals hold the truth.

``python tests/helpers/evidence_coverage.py`` writes the table of ``docs/evidence.md``.
"""

from pathlib import Path

import numpy as np
import torch

from pyro_vae.evidence.interval import ends
from pyro_vae.evidence.weights import estimate_log_mean, log_mean, smoothed

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
BEGIN, END = "<!-- begin: coverage -->", "<!-- end: coverage -->"
SHAPES = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
PARTICLES = (100, 500, 5000)
REPETITIONS = 1000
TITLES = ["k", "K", "mean k̂", "bias of iw", "measured bias", "bias of psis"]
TITLES += ["iw ± 2 mcse", "psis ± 2 mcse", "`interval` of iw"]


def pareto_log_weights(shape: float, particles: int, repetitions: int, seed: int) -> torch.Tensor:
    """Log-weights of a generalized Pareto distribution of mean 1, shape ``(particles, repetitions)``."""
    uniform = 1 - np.random.default_rng(seed).random((particles, repetitions))
    return torch.as_tensor((1 - shape) / shape * np.expm1(-shape * np.log(uniform))).log()


def entry(shape: float, particles: int, repetitions: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Each number of a row of the table with its standard error over repetitions; log of the mean weight is 0."""
    log_weights = pareto_log_weights(shape, particles, repetitions, seed)
    found = {name: value.numpy() for name, value in estimate_log_mean(log_weights).items()}
    smooth, smooth_error = (value.numpy() for value in log_mean(smoothed(log_weights)[0]))
    low, high = ends(*(found[name] for name in ("log_evidence", "mcse", "khat", "bias")))
    columns = {
        "mean k̂": found["khat"],
        "bias of iw": found["log_evidence"],
        "measured bias": found["bias"],
        "bias of psis": smooth,
        "iw ± 2 mcse": abs(found["log_evidence"]) <= 2 * found["mcse"],
        "psis ± 2 mcse": abs(smooth) <= 2 * smooth_error,
        "`interval` of iw": (low <= 0) & (high >= 0),
    }
    return {name: (value.mean(), value.std(ddof=1) / repetitions**0.5) for name, value in columns.items()}


def table() -> str:
    """The whole table, in Markdown."""
    lines = ["| " + " | ".join(TITLES) + " |", "|" + " --: |" * len(TITLES)]
    for shape in SHAPES:
        for particles in PARTICLES:
            row = entry(shape, particles, REPETITIONS)
            shown = [f"{value:.3f}" + f" ± {error:.3f}" * ("bias" in name) for name, (value, error) in row.items()]
            lines.append("| " + " | ".join([f"{shape}", f"{particles}", *shown]) + " |")
    return "\n".join(lines)


def write() -> None:
    """Put the table between the marks of the page."""
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    write()
