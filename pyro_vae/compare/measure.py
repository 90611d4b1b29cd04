"""Measure the cells of :func:`pyro_vae.compare_elbos`, and label the results."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.compare.cells import Cell, evaluate, step_of
from pyro_vae.compare.cost import median_seconds, peak_bytes
from pyro_vae.compare.gradient_moments import Moments, alignment, distance, jackknife, root, squares, tail_shapes
from pyro_vae.compare.pair import Subject
from pyro_vae.core.device import make_generator, seeded
from pyro_vae.core.traces import Loss
from pyro_vae.elbo import Estimator, HandDerivedELBO
from pyro_vae.errors import ModelError

TIMED_REPEATS = 11
"""The number of timings per estimator, of which the median is reported."""

MOMENTS = ("signal", "variance", "ratio")
"""Moments of the gradient with a jackknife error; the roots of the first and the last are reported."""


def reason_not_applicable(subject: Subject, loss: Loss) -> str:
    """Say why an estimator does not apply to this pair; return an empty string if it does."""
    try:
        with subject.evaluating(), seeded(0, subject.device):
            step_of(subject, loss)
    except ModelError as error:
        return f"none: {error}" if isinstance(loss, HandDerivedELBO) else str(error)
    return ""


@dataclass(frozen=True)
class Measurements:
    """The measurements, per cell in the order of the cells."""

    seeds: list[int]
    values: np.ndarray
    difference: list[float]
    gradient_difference: list[float]
    moments: list[Moments]
    references: list[Moments | None]
    of_elbo: Moments | None
    groups: list[list[int]]
    seconds: list[float]
    seconds_se: list[float]
    peak: list[int]


_Evaluated = tuple[Tensor, list[Tensor]]


def _flat(gradient: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient])


@dataclass(frozen=True)
class Measurer:
    """Evaluate, draw by draw, and time all cells."""

    subject: Subject
    chosen: list[Cell]
    draws: int
    seed: int
    has_hand_derived: bool
    count: Callable[[Iterator[Any], int], Iterator[Any]]

    def run(self) -> Measurements:
        generator = make_generator(self.seed)
        seeds = torch.randint(2**32, (self.draws,), generator=generator).tolist()
        others = torch.randint(2**32, (2 * self.draws,), generator=generator).tolist()
        moments = [self._moments(self.draws) for _ in self.chosen]
        values, apart = zip(*(self._draw(s, moments) for s in self.count(iter(seeds), self.draws)), strict=True)
        worst = np.asarray(apart).max(0)  # (cell, value | gradient)
        steps = [partial(step_of, self.subject, cell.loss) for cell in self.chosen]
        with seeded(self.seed, self.subject.device):
            seconds, seconds_se = median_seconds(steps, self.subject.device, TIMED_REPEATS)
            peak = [peak_bytes(step) for step in steps]
        of_elbo = next((sums for cell, sums in zip(self.chosen, moments, strict=True) if cell.target == "ELBO"), None)
        return Measurements(
            seeds, np.moveaxis(np.asarray(values), 0, 1), worst[:, 0].tolist(), worst[:, 1].tolist(), moments,
            self._references(others), of_elbo, list(self.subject.groups().values()), seconds, seconds_se, peak,
        )  # fmt: skip

    def _moments(self, draws: int) -> Moments:
        leaves = list(self.subject.parameters.values())
        return Moments([leaf.numel() for leaf in leaves], draws, like=leaves[0])

    def _draw(self, seed: int, moments: list[Moments]) -> tuple[list[np.ndarray], list[tuple[float, float]]]:
        """Evaluate one draw of every cell; return values per datum, and differences from the hand-derived ELBO."""
        references: dict[str, _Evaluated] = {}
        values, apart = [], []
        for cell, sums in zip(self.chosen, moments, strict=True):
            value, gradient = evaluate(self.subject, cell.loss, seed)
            sums.add(gradient)
            values.append(value.double().cpu().numpy())
            hand = cell.hand_derived() if self.has_hand_derived else None
            apart.append((np.nan, np.nan) if hand is None else self._apart(hand, seed, (value, gradient), references))
        return values, apart

    def _apart(
        self, hand: HandDerivedELBO, seed: int, found: _Evaluated, known: dict[str, _Evaluated]
    ) -> tuple[float, float]:
        key = f"{hand.num_particles} {hand.vectorize_particles}"
        if key not in known:
            known[key] = evaluate(self.subject, hand, seed)
        value, flat = (found[0] - known[key][0]).abs().max(), _flat(known[key][1])
        return value.item(), ((_flat(found[1]) - flat).norm() / flat.norm()).item()

    def _references(self, seeds: list[int]) -> list[Moments | None]:
        """Sum gradients of another unbiased estimator of each cell's bound, with independent noise."""
        known: dict[str, Moments | None] = {}
        for cell in self.chosen:
            reference = cell.reference()
            if reference not in (None, cell.loss) and repr(reference) not in known:
                known[repr(reference)] = self._average(reference, seeds)
        return [known.get(repr(cell.reference())) for cell in self.chosen]

    def _average(self, reference: Estimator, seeds: list[int]) -> Moments | None:
        if reason_not_applicable(self.subject, reference):
            return None
        moments = self._moments(len(seeds))
        for seed in self.count(iter(seeds), len(seeds)):
            moments.add(evaluate(self.subject, reference, seed)[1])
        return moments


NATS = {"units": "nats per datum"}


@dataclass(frozen=True)
class Tabulator:
    """Turn measurements per cell into a labelled dataset."""

    chosen: list[Cell]
    offered: list[str]
    groups: list[str]

    def dataset(self, found: Measurements, truth: float, truth_se: float) -> xr.Dataset:
        value = found.values.mean(-1)  # (cell, draw)
        spread = value.std(-1, ddof=1)
        error = spread / np.sqrt(value.shape[-1])
        cell, dims = self._spread, ("estimator", "particles")
        variables = {
            "elbo": (dims, cell(value.mean(-1)), NATS),
            "elbo_se": (dims, cell(error), NATS),
            "elbo_sd": (dims, cell(spread), NATS),
            "bias": (dims, cell(value.mean(-1) - truth), NATS),
            "bias_se": (dims, cell(np.hypot(error, truth_se)), NATS),
            "difference": (dims, cell(found.difference), NATS),
            "gradient_difference": (dims, cell(found.gradient_difference), {"units": "1"}),
            "seconds": (dims, cell(found.seconds), {"units": "s"}),
            "seconds_se": (dims, cell(found.seconds_se), {"units": "s"}),
            "peak_memory": (dims, cell(found.peak), {"units": "bytes"}),
            "value": ((*dims, "draw"), cell(value), NATS),
            "datum_elbo": ((*dims, "datum"), cell(found.values.mean(1)), {"units": "nats"}),
            **{name: ((*dims, "parameter_group"), cell(v), u) for name, (v, u) in _gradients(found).items()},
        }
        losses = {c.name: c for c in self.chosen}
        known_bias = [getattr(losses[n].loss, "known_bias", "") for n in self.estimators]
        coordinates = {
            "estimator": self.estimators,
            "particles": self.particles,
            "parameter_group": self.groups,
            "bound": ("estimator", [", ".join(dict.fromkeys(filter(None, row))) for row in self._targets()]),
            "target": (dims, self._targets()),
            "known_bias": ("estimator", known_bias),
        }
        return _with_efficiency(xr.Dataset(variables, coordinates))

    @property
    def estimators(self) -> list[str]:
        return [name for name in self.offered if any(cell.name == name for cell in self.chosen)]

    @property
    def particles(self) -> list[int]:
        return sorted({cell.particles for cell in self.chosen})

    def _targets(self) -> list[list[str]]:
        """Tabulate the bound that each cell estimates; empty where there is no cell."""
        known = {(cell.name, cell.particles): cell.target for cell in self.chosen}
        return [[known.get((name, k), "") for k in self.particles] for name in self.estimators]

    def _spread(self, per_cell: Any) -> np.ndarray:
        """Arrange numbers per cell as (estimator, particles, …), NaN where there is no cell."""
        array = np.asarray(per_cell, dtype=float)
        table = np.full((len(self.estimators), len(self.particles), *array.shape[1:]), np.nan)
        for cell, numbers in zip(self.chosen, array, strict=True):
            table[self.estimators.index(cell.name), self.particles.index(cell.particles)] = numbers
        return table


def _gradients(found: Measurements) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
    """Compute signal, noise and bias of the gradient, per cell and group, with their errors."""
    per_datum, one = {"units": "nats per datum per unit of the parameters"}, {"units": "1"}
    columns: dict[str, list[Tensor]] = {}
    for sums, reference in zip(found.moments, found.references, strict=True):
        square = {name: jackknife(sums.blocks, partial(_moment, sums, found.groups, name)) for name in MOMENTS}
        of_cell = {
            "norm": root(*square["signal"]),
            "variance": square["variance"],
            "snr": root(*square["ratio"]),
            "bias": _relative_bias(sums, reference, found.groups),
        }
        for name, (value, error) in of_cell.items():
            columns.setdefault(f"gradient_{name}", []).append(value)
            columns.setdefault(f"gradient_{name}_se", []).append(error)
        columns.setdefault("gradient_khat", []).append(tail_shapes(sums, found.groups))
        nothing = torch.full_like(value, torch.nan)
        cosine = (nothing, nothing) if found.of_elbo is None else alignment(sums, found.of_elbo, found.groups)
        columns.setdefault("elbo_alignment", []).append(cosine[0])
        columns.setdefault("elbo_alignment_se", []).append(cosine[1])
    stacked = {name: torch.stack(column).cpu().numpy() for name, column in columns.items()}
    with_unit = ("gradient_norm", "gradient_variance")
    return {name: (array, per_datum if name.startswith(with_unit) else one) for name, array in stacked.items()}


def _moment(sums: Moments, groups: list[list[int]], name: str, without: int | None) -> Tensor:
    found: Tensor = getattr(squares(sums, groups, without), name)
    return found


def _relative_bias(sums: Moments, reference: Moments | None, groups: list[list[int]]) -> tuple[Tensor, Tensor]:
    if reference is None:
        nothing = torch.full((len(groups),), torch.nan, dtype=torch.float64, device=sums.sums.device)
        return nothing, nothing
    return distance(sums, reference, groups)


def _with_efficiency(table: xr.Dataset) -> xr.Dataset:
    """Add efficiency and speedup, by which estimators are ranked."""
    with np.errstate(divide="ignore", invalid="ignore"):
        efficiency = table.gradient_snr**2 / table.seconds
        relative = np.hypot(2 * table.gradient_snr_se / table.gradient_snr, table.seconds_se / table.seconds)
        fewest = efficiency.notnull().argmax("particles")
        speedup = efficiency / efficiency.isel(particles=fewest)
        error = speedup * np.hypot(relative, relative.isel(particles=fewest))
        error = error.where(table.particles != table.particles.isel(particles=fewest), 0 * speedup)  # exactly 1 there
    per_second = {"units": "1/s"}
    return table.assign(
        variance_seconds=(table.gradient_variance * table.seconds).assign_attrs(
            units="(nats per datum per unit of the parameters)² s"
        ),
        efficiency=efficiency.assign_attrs(per_second),
        efficiency_se=(efficiency * relative).assign_attrs(per_second),
        speedup=speedup.assign_attrs(units="1"),
        speedup_se=error.assign_attrs(units="1"),
    )
