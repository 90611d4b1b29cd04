"""Figures of calibration and of predictive checks."""

import math

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.core.format import format_estimate, format_p
from pyro_vae.plots._style import BLUE, GREY, ORANGE, literal_text

SHOWN = 12
"""The largest number of quantities to draw, those with the smallest p-values."""


@literal_text
def sbc(found: xr.Dataset) -> Figure:
    """Draw the ECDF of each quantity's ranks minus that of uniform ranks, with the band of an exact guide.

    An arch means that q is too high or too low, an S that it is too narrow (steep at both ends) or too wide. If there
    are many quantities, those with the smallest p-values are drawn.

    Args:
        found: from :func:`pyro_vae.diagnose.sbc`.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> _ = sbc(pv.diagnose.sbc(linear.as_vae(), simulations=50))
    """
    order = np.argsort(found.p_value.values, kind="stable")[:SHOWN]
    number = len(order)
    columns = min(number, 4)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 2.7 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, i in zip(grid.flat, order, strict=False):
        _difference(axes, found.isel(quantity=int(i)))
    for axes in grid.flat[number:]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("ECDF − uniform")
    for axes in grid.flat[max(0, number - columns) : number]:
        axes.set_xlabel("rank, as a share of the draws")
        axes.tick_params(labelbottom=True)
    which = f", the {number} worst of {found.sizes['quantity']} quantities" if number < found.sizes["quantity"] else ""
    figure.suptitle(
        f"Ranks of {found.attrs['simulations']} simulations{which}: joint {format_p(float(found.joint_p_value))}\n"
        f"grey: simultaneous {1 - found.attrs['band_miss']:.0%} band of an exact guide, for each quantity",
        fontsize=10,
    )
    return figure


def _difference(axes: Axes, one: xr.Dataset) -> None:
    share = one["quantile"].values
    axes.fill_between(share, one.band_low, one.band_high, color=GREY, alpha=0.3, lw=0)
    axes.axhline(0, color=GREY, lw=1)
    curve = one.ecdf_difference.values
    outside = (curve < one.band_low.values - 1e-12) | (curve > one.band_high.values + 1e-12)
    axes.step(share, curve, where="mid", color=BLUE, lw=1.4)
    axes.plot(share[outside], curve[outside], "x", color=ORANGE, ms=4)
    verdict = " (crosses: outside)" if outside.any() else ""
    axes.set_title(f"{one.quantity.item()}: {format_p(float(one.p_value))}{verdict}", fontsize=9)
    axes.grid(alpha=0.3)


@literal_text
def coverage(found: xr.Dataset) -> Figure:
    """Draw the coverage of q's central intervals, and its difference from their levels, with two standard errors.

    Args:
        found: from :func:`pyro_vae.diagnose.sbc`.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> _ = coverage(pv.diagnose.sbc(linear.as_vae(), simulations=50))
    """
    figure = Figure(figsize=(9.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    level = found.level.values
    mean, error = found.expected_coverage.values, found.expected_coverage_se.values
    left.plot([0, 1], [0, 1], color=GREY, lw=1, label="exact")
    label = "mean over latents, ± 2 s.e. over simulations"
    left.errorbar(level, mean, 2 * error, fmt="o", color=BLUE, ms=4, capsize=2, label=label)
    left.set(xlabel="level of the central interval of q", ylabel="share of simulations inside")
    left.legend(loc="upper left", fontsize=9)
    number = found.attrs["simulations"]
    chance = 2 * np.sqrt(level * (1 - level) / number)
    right.fill_between(level, -chance, chance, color=GREY, alpha=0.3, lw=0, label="exact, ± 2 s.e. over simulations")
    for i, curve in enumerate(found.coverage.values - level):
        last = i == found.sizes["quantity"] - 1
        name = found.quantity.values[-1] if last else "each latent" if i == 0 else None
        style = {"color": ORANGE, "ls": "--", "marker": "s"} if last else {"color": BLUE, "ls": "-", "marker": "."}
        right.plot(level, curve, ms=4, lw=1, label=name, **style)
    right.axhline(0, color=GREY, lw=1)
    right.set(xlabel="level of the central interval of q", ylabel="share inside − level")
    right.legend(fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Coverage over {number} simulations (below the line: q is too narrow or biased)", fontsize=10)
    return figure


@literal_text
def reliability(found: xr.Dataset) -> Figure:
    """Draw how often predicted classes are right, against their probability, with two standard errors.

    Below the diagonal it is too sure. The bars are the data of each bin.

    Args:
        found: from :func:`pyro_vae.diagnose.reliability`.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv
        >>> _ = reliability(pv.diagnose.reliability([[0.9, 0.1], [0.4, 0.6]], [0, 1]))
    """
    figure = Figure(figsize=(4.6, 4.8), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    upper.plot([0, 1], [0, 1], color=GREY, lw=1, label="calibrated")
    label = "mean of a bin, ± 2 s.e. over its data"
    upper.errorbar(
        found.confidence, found.accuracy, 2 * found.accuracy_se, fmt="o", color=BLUE, ms=4, capsize=2, label=label
    )
    upper.set(ylabel="share of predictions that are right", ylim=(-0.02, 1.02))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    lower.bar(found.bin, found["count"], width=0.9 / found.sizes["bin"], color=BLUE)
    lower.set(xlabel="probability of the predicted class", ylabel="data")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    ece = format_estimate(float(found.ece), float(found.ece_se), over="data")
    figure.suptitle(f"ECE {ece}; {float(found.ece_calibrated):.3f} if calibrated", fontsize=10)
    return figure


@literal_text
def predictive_check(found: xr.Dataset) -> Figure:
    """Draw each statistic of the data against those of replicated data sets.

    Args:
        found: from :func:`pyro_vae.diagnose.predictive_check` or :func:`pyro_vae.diagnose.prior_check`.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> _ = predictive_check(pv.diagnose.prior_check(linear.as_vae(), torch.zeros(9, 4), draws=50))
    """
    number = found.sizes["statistic"]
    columns = min(number, 4)
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(3.2 * columns + 0.4, 2.6 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < number)
        if i < number:
            _statistic(axes, found.isel(statistic=i))
    for axes in grid[:, 0]:
        axes.set_ylabel("replicated data sets")
    figure.suptitle(
        f"{found.attrs['latents'].capitalize()} predictive check: {found.attrs['data']} data (line), "
        f"{found.sizes['draw']} replicates (bars){_chosen(found)}",
        fontsize=10,
    )
    return figure


def _chosen(found: xr.Dataset) -> str:
    """Describe how the statistics of single columns were selected, which their p-values do not account for."""
    if "column_statistics" not in found.attrs:
        return ""
    shown = int((found.family == "column").sum())
    return (
        f"\nthe {shown} of {found.attrs['column_statistics']} statistics of columns that are farthest off: each "
        f"p-value is for one statistic; joint {format_p(float(found.column_p_value), found.sizes['draw'])}"
    )


def _statistic(axes: Axes, one: xr.Dataset) -> None:
    made, seen = one.replicated.values, one.observed.values
    axes.set_xlabel(str(one.statistic.item()))
    draws = len(made)
    axes.set_title(format_p(float(one.p_value), draws, float(one.p_value_se)), fontsize=9)
    axes.locator_params(axis="x", nbins=4)
    varies = np.ptp(seen) > 0  # a discrepancy, whose value for the data depends on the draw too
    span = np.concatenate([made, seen])
    if np.ptp(span) <= 1e-9 * np.abs(span).max():
        axes.text(0.5, 0.5, f"{seen[0]:.4g} in data\nand all replicates", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    if np.ptp(made) > 0:
        axes.hist(made, 25, color=BLUE, alpha=0.6, label="replicates")
    else:
        axes.plot([made[0]] * 2, [0, len(made)], color=BLUE, lw=4, alpha=0.6)
    if varies:
        axes.hist(seen, 25, histtype="step", color=ORANGE, lw=1.6, label="data, at the same latents")
        axes.legend(fontsize=7)
    else:
        axes.axvline(seen[0], color=ORANGE, lw=2)
