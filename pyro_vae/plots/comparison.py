"""Figures that compare estimators."""

import itertools
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from pyro_vae.compare.seeds import drawn, validate_not_stacked
from pyro_vae.errors import SettingsError
from pyro_vae.plots._style import BLUE, ESTIMATORS, GREEN, GREY, MARKERS, ORANGE, literal_text


@literal_text
def elbos_by_datum(comparison: xr.Dataset) -> Figure:
    """Draw each estimator's ELBO of each datum against the hand-derived (or the first) one, and the differences.

    Estimators of other bounds are left out, and only the smallest number of particles is drawn.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`.

    Returns:
        The figure.

    Raises:
        SettingsError: if no ELBO is finite.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> _ = elbos_by_datum(pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(5), draws=3))
    """
    comparison = comparison.isel(particles=0)
    comparison = comparison.sel(estimator=(comparison.bound == "ELBO") & comparison.elbo.notnull())
    everyone = [str(name) for name in comparison.estimator.values]
    if not everyone:
        raise SettingsError("the comparison has no finite ELBO to draw")
    reference = "HandDerivedELBO" if "HandDerivedELBO" in everyone else everyone[0]
    names = [name for name in everyone if name != reference]
    by_hand = comparison.datum_elbo.sel(estimator=reference).values
    figure = Figure(figsize=(4.2 * (1 + len(names)), 4.2), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(names))
    ends = [by_hand.min(), by_hand.max()]
    left.plot(ends, ends, color=GREY, lw=1, label="equal")
    styles = zip((ORANGE, BLUE, GREEN), "x.+", (26, 12, 20), strict=True)
    for name, axes, (colour, marker, size) in zip(names, others, itertools.cycle(styles), strict=False):
        values = comparison.datum_elbo.sel(estimator=name).values
        left.scatter(by_hand, values, color=colour, marker=marker, s=size, label=name, lw=1)
        _differences(axes, by_hand, values - by_hand, f"{name} − {reference}", colour)
        axes.set_xlabel(f"{reference} (nats)")
    left.set(xlabel=f"{reference} (nats)", ylabel="ELBO of the other estimators (nats)")
    left.set_title(f"ELBO of each datum, mean of {drawn(comparison)}", fontsize=10)
    left.legend()
    return figure


def _differences(axes: Axes, by_hand: np.ndarray, difference: np.ndarray, name: str, colour: str) -> None:
    axes.axhline(0, color=GREY, lw=1)
    axes.scatter(by_hand, difference, color=colour, s=8, lw=0)
    largest = float(np.abs(difference).max())
    axes.set_ylabel("difference (nats)")
    axes.set_title(f"{name}\nat most {largest:.2g} nats", fontsize=10)


@literal_text
def compare(comparison: xr.Dataset) -> Figure:
    """Draw each estimator's bound by its number of particles, and its gradient's signal-to-noise by the step time.

    With several numbers K of particles, a line joins the points of an estimator and is labelled by its slope in K.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`; with a dimension ``moment``, a row of panels for each.

    Returns:
        The figure.

    Raises:
        SettingsError: if the comparison has a dimension of seeds.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> table = pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(5), particles=(1, 4), draws=4)
        >>> _ = compare(table)
    """
    validate_not_stacked(comparison)
    each = range(comparison.sizes.get("moment", 0))
    moments = [comparison.isel(moment=i) for i in each] or [comparison]
    groups = [g for g in ("Θ", "φ") if g in comparison.parameter_group.values] or ["all"]
    figure = Figure(figsize=(4.4 * (1 + len(groups)) + 1.8, 3.5 * len(moments) + 0.6), layout="constrained")
    grid = figure.subplots(len(moments), 1 + len(groups), squeeze=False)
    for row, table in zip(grid, moments, strict=True):
        _bounds(row[0], table)
        for axes, group in zip(row[1:], groups, strict=True):
            _signal(axes, table.sel(parameter_group=group), group)
        if "moment" in table.coords:
            row[0].set_title(f"{table.moment.item()}: {row[0].get_title()}", fontsize=10)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    return figure


def _style(i: int) -> dict[str, Any]:
    return {"color": ESTIMATORS[i % len(ESTIMATORS)], "marker": MARKERS[i % len(MARKERS)], "ms": 6, "lw": 1.2}


def _bounds(axes: Axes, table: xr.Dataset) -> None:
    """Draw each bound by its number of particles, shifted slightly; with one number, by the name of the estimator."""
    names, one = table.estimator.values, table.sizes["particles"] == 1
    for i, name in enumerate(names):
        cell = table.sel(estimator=name)
        moved = table.particles * 2 ** (0.08 * (i - (len(names) - 1) / 2))
        axes.errorbar([i] if one else moved, cell.elbo, 2 * cell.elbo_se, label=str(name), capsize=2, **_style(i))
    truth = (table.elbo - table.bias).values
    if np.isfinite(truth).any():
        axes.axhline(np.nanmean(truth), color=GREY, ls="--", lw=1.5, label="log p(x)")
    if one:
        axes.set_xticks([])
        axes.margins(x=0.15)
        axes.set_xlabel(f"estimators, K = {table.particles.item()}")
    else:
        axes.set_xscale("log", base=2)
        axes.set_xticks(table.particles.values, [str(k) for k in table.particles.values])
        axes.minorticks_off()
        axes.set_xlabel("particles K")
    axes.set_ylabel("bound (nats per datum)")
    axes.set_title(f"value ± 2 s.e., over {drawn(table)}", fontsize=10)
    axes.grid(alpha=0.3)


def _signal(axes: Axes, table: xr.Dataset, group: str) -> None:
    """Draw the signal-to-noise ratio of the gradient against the time of a step, a point for each K."""
    ends: list[tuple[float, str, int]] = []
    for i, name in enumerate(table.estimator.values):
        cell = table.sel(estimator=name)
        shown = np.isfinite(cell.gradient_snr.values) & (cell.gradient_snr.values > 0)
        if shown.any():
            cell = cell.isel(particles=shown)
            axes.errorbar(1000 * cell.seconds, cell.gradient_snr, 2 * cell.gradient_snr_se, capsize=2, **_style(i))
            if shown.sum() > 1:
                slope = f"{_slope(cell.particles.values, cell.gradient_snr.values):+.2f}"
                ends.append((float(cell.gradient_snr.values[-1]), slope, i))
    axes.set(xscale="log", yscale="log", xlabel="time of one step (ms)")
    axes.set_ylabel(f"signal-to-noise of the gradient by {group}")
    told = (
        "K grows along the lines (numbers: slope)" if table.sizes["particles"] > 1 else f"± 2 s.e., over {drawn(table)}"
    )
    axes.set_title(f"{group}, {told}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.15)
    for axis in axes.xaxis, axes.yaxis:  # plain numbers, few enough not to overlap
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    _label(axes, ends)


def _label(axes: Axes, ends: list[tuple[float, str, int]]) -> None:
    """Write each line's slope at its end, without overlap."""
    lowest, placed = -np.inf, []
    low, high = np.log(axes.get_ylim())
    for y, text, i in sorted(ends):
        lowest = max((np.log(y) - low) / (high - low), lowest + 0.055)
        placed.append((lowest, text, ESTIMATORS[i % len(ESTIMATORS)]))
    above = max(0.0, lowest - 0.98)
    for place, text, colour in placed:
        axes.text(1.01, place - above, text, transform=axes.transAxes, color=colour, fontsize=8, va="center")


def _slope(particles: np.ndarray, ratio: np.ndarray) -> float:
    """Return the slope of the log-log line through the points."""
    return float(np.polyfit(np.log(particles), np.log(ratio), 1)[0])
