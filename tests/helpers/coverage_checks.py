"""Measure how often an estimate ± 1.96 of its own standard errors holds the truth.

A :class:`Study` is one setting; its ``measure`` takes a seed and returns :class:`Draws` by the name of the quantity.
``studies()`` gathers the list ``STUDIES`` of each module in ``MODULES``; ``coverage_page`` writes ``docs/coverage.md``.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

NOMINAL, WIDTH = 0.95, 1.96
LEAST = 200
"""Repetitions on which a published figure rests at least."""

MODULES = ("coverage_compare", "coverage_evidence", "coverage_models", "coverage_guide", "coverage_diagnose")


def numbers(value: Any) -> np.ndarray:
    """An array in double precision of a tensor, an array or a number; repetitions lie along its first dimension."""
    return np.atleast_1d(np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value, dtype=float))


@dataclass(frozen=True, eq=False)
class Draws:
    """Repetitions of one quantity.

    Args:
        hit: whether the interval holds the truth, shape ``(repetition, …)``; repetitions are independent, what lies
            along further dimensions need not be.
        z: the error made in units of the error reported, same shape, or nothing.
        khat: the k̂ beside each estimate, where there is one.
    """

    hit: np.ndarray
    z: np.ndarray | None = None
    khat: np.ndarray | None = None


def drawn(estimate: Any, error: Any, truth: Any, *, khat: Any = None) -> Draws:
    """Repetitions of an estimate with its standard error; an error of 0 is right where the estimate is exact."""
    estimate, error, truth = np.broadcast_arrays(numbers(estimate), numbers(error), numbers(truth))
    off = np.abs(estimate - truth)
    exact = off <= 1e-12 * np.maximum(1.0, np.abs(truth))
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(exact, 0.0, off / error)
    z = np.where(np.isnan(z), np.inf, z)  # an error that is no number holds nothing
    return Draws(z <= WIDTH, z, None if khat is None else numbers(khat))


def with_errors(found: Any, truth: Mapping[str, Any], *, khat: Any = None) -> dict[str, Draws]:
    """Repetitions of each quantity of a table, by the name of its error: ``truth`` holds the value of each."""
    return {f"{name}_se": drawn(found[name], found[f"{name}_se"], value, khat=khat) for name, value in truth.items()}


def of_seed(function: Callable[..., dict[str, Draws]]) -> Callable[..., Callable[[int], dict[str, Draws]]]:
    """Make ``function(…, seed=…)`` a constructor of measurements: ``function(…)`` then takes the seed."""
    return lambda *given, **settings: lambda seed: function(*given, seed=seed, **settings)


def uniform(p: Any) -> Draws:
    """Repetitions of a p-value that is to be below 0.05 in 5 % of them."""
    return Draws(numbers(p) >= 1 - NOMINAL)


@dataclass(frozen=True)
class Row:
    """What is expected of a quantity.

    Args:
        low: the measured coverage is at least this,
        high: and at most this.
        spread: limits of the root mean square of z, where the tails allow one.
        cause: why the coverage is not nominal, if so; printed in the same row.
    """

    low: float = 0.90
    high: float = 0.985
    spread: tuple[float, float] | None = (0.8, 1.25)
    cause: str = ""


def measured(figure: float, cause: str, *, slack: float = 0.05) -> Row:
    """A coverage that is not nominal, held to the figure that was measured, whose binomial error is below 0.0125."""
    return Row(max(0.0, figure - slack), min(1.0, figure + slack), None, cause)


@dataclass(frozen=True)
class Study:
    """One setting in which standard errors are measured.

    Args:
        function: the public name whose errors they are.
        setting: in words, with the number of data and draws; it tells the studies of a function apart.
        measure: from a seed to the repetitions of each quantity.
        rows: what is expected of each quantity.
        seeds: calls of ``measure`` for the page.
        quick: calls in the ordinary tests, 0 where one takes too long.
    """

    function: str
    setting: str
    measure: Callable[[int], Mapping[str, Draws]]
    rows: Mapping[str, Row]
    seeds: int = 1
    quick: int = 0

    def labels(self) -> list[tuple[str, str, str]]:
        return [(self.function, quantity, self.setting) for quantity in self.rows]


@dataclass(frozen=True)
class Figures:
    """What was measured of a quantity: ``error`` is the standard error of ``coverage``."""

    coverage: float
    error: float
    repetitions: int
    spread: float = field(default=np.nan)
    khat: float = field(default=np.nan)


def run(study: Study, seeds: int | None = None) -> dict[str, Figures]:
    """Measure a study with the seeds 1, 2, …"""
    found = []
    for seed in range(1, (study.seeds if seeds is None else seeds) + 1):
        torch.manual_seed(seed)
        found.append(study.measure(seed))
    return {quantity: figures([one[quantity] for one in found]) for quantity in study.rows}


def figures(parts: list[Draws]) -> Figures:
    """The coverage, with an error over repetitions; two more, a hit and a miss, keep it above 0 (Agresti & Coull)."""
    shares = np.concatenate([part.hit.reshape(len(part.hit), -1).mean(1) for part in parts])
    number = len(shares)
    error = np.concatenate([shares, [0.0, 1.0]]).std(ddof=1) / np.sqrt(number + 2)
    z = [part.z.ravel() for part in parts if part.z is not None]
    khat = [part.khat.ravel() for part in parts if part.khat is not None]
    spread = float(np.sqrt((np.concatenate(z) ** 2).mean())) if z else np.nan
    return Figures(float(shares.mean()), float(error), number, spread, float(np.median(khat)) if khat else np.nan)


def misses(row: Row, found: Figures, *, errors: float = 0.0) -> str:
    """What is wrong with a figure, or nothing; limits are widened by so many of its standard errors."""
    slack = errors * found.error
    if not row.low - slack <= found.coverage <= row.high + slack:
        return (
            f"± {WIDTH} standard errors hold the truth in {found.coverage:.3f} ± {found.error:.3f} of "
            f"{found.repetitions} repetitions, which is not within {row.low:.3f} and {row.high:.3f}"
        )
    wide = errors / np.sqrt(2 * found.repetitions)  # of a root mean square of normals
    if row.spread is not None and not row.spread[0] - wide <= found.spread <= row.spread[1] + wide:
        return f"the error made is {found.spread:.3f} times the error reported, which is not within {row.spread}"
    return ""


def studies() -> list[Study]:
    """All studies, of the modules that there are."""
    there = [name for name in MODULES if importlib.util.find_spec(f"helpers.{name}")]
    return [study for name in there for study in importlib.import_module(f"helpers.{name}").STUDIES]
