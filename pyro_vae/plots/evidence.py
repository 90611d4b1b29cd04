"""Figures of the evidence: comparisons of models, and bidirectional bounds."""

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyro_vae.core.format import format_estimate
from pyro_vae.evidence.judge import CLOSE_ENOUGH
from pyro_vae.plots._style import BLUE, GREEN, GREY, ORANGE, literal_text


@literal_text
def models(comparison: pd.DataFrame) -> Figure:
    """Draw each model's difference from the best model, with two standard errors of the paired difference.

    Args:
        comparison: from :func:`pyro_vae.compare_models`.

    Returns:
        The figure; a circle differs from the best model, a square is tied with it.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> _ = models(pv.compare_models({"a": linear.as_vae(), "b": linear.as_vae(diagonal=True)}, linear.sample(9)))
    """
    count = len(comparison)
    figure = Figure(figsize=(8, 1.8 + 0.45 * count), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=GREY, lw=1, label="best model")
    place = np.arange(count)
    tied = comparison.diag_diff.str.contains("tied").to_numpy()
    for shown, marker, colour, label in (
        (~tied, "o", BLUE, "± 2 standard errors of the paired difference, over data"),
        (tied, "s", ORANGE, "the same, for models tied with the best"),
    ):
        rows = comparison[shown]
        if len(rows):
            axes.errorbar(
                rows.elpd_diff, place[shown], xerr=2 * rows.dse, fmt=marker, color=colour, capsize=4, ms=6, label=label
            )
    axes.errorbar(
        comparison.elpd_diff, place + 0.18, xerr=2 * comparison.diff_mcse, fmt="none", color=GREEN, lw=3,
        label="Monte-Carlo part of the error",
    )  # fmt: skip
    axes.set_yticks(place, [_label(name, row) for name, row in comparison.iterrows()])
    axes.set_ylim(count - 0.5, -0.5)
    best = comparison.iloc[0]
    axes.set_xlabel(f"log p(x) of {comparison.attrs['data']} held-out data, minus that of the best model (nats)")
    value = format_estimate(best.elpd, best.se, "nats", over="data")
    axes.set_title(f"{comparison.index[0]}: {value}, by {comparison.attrs['method']}", fontsize=10)
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    if comparison.attrs["caution"]:
        figure.suptitle(comparison.attrs["caution"], fontsize=9)
    return figure


def _label(name: object, row: pd.Series) -> str:
    return f"{name}\n({row.diag_elpd})" if row.diag_elpd else str(name)


@literal_text
def bdmc(found: xr.Dataset) -> Figure:
    """Draw the bounds on log p(x) of each simulated datum, minus their middle, and their mean gap.

    Args:
        found: from :func:`pyro_vae.log_evidence` with ``method="bdmc"``.

    Returns:
        The figure: on the left both bounds of each datum, sorted by log p(x); on the right the gaps.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae(diagonal=True)
        >>> x = torch.zeros(9, 5)
        >>> _ = bdmc(pv.log_evidence(vae, x, method="bdmc", num_particles=4, temperatures=3, leapfrog=3))
    """
    ordered = found.isel(datum=np.argsort(found.log_evidence.values))
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    _brackets(left, ordered)
    _gaps(right, (found.upper - found.lower).values)
    settings = f"{found.attrs['temperatures']} temperatures, {found.attrs['num_particles']} chains per datum"
    handles = [handle for axes in (left, right) for handle in axes.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"Bounds on log p(x) of simulated data: {settings}", fontsize=10)
    return figure


def _brackets(axes: Axes, ordered: xr.Dataset) -> None:
    middle, place = ordered.log_evidence.values, np.arange(ordered.sizes["datum"])
    axes.axhline(0, color=GREY, lw=1)
    axes.axhspan(-CLOSE_ENOUGH / 2, CLOSE_ENOUGH / 2, color=GREY, alpha=0.2, label=f"a gap of {CLOSE_ENOUGH:g} nats")
    for name, error, given, colour, marker, aside in (
        ("upper", "upper_mcse_given_z", " given its exact draw", ORANGE, "v", 0.15),
        ("lower", "lower_mcse", "", BLUE, "^", -0.15),
    ):
        axes.errorbar(
            place + aside, ordered[name].values - middle, yerr=2 * ordered[error].values, fmt=marker,
            color=colour, ms=4, lw=0.8, label=f"{name} bound ± 2 standard errors{given}, over chains",
        )  # fmt: skip
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -CLOSE_ENOUGH), max(high, CLOSE_ENOUGH))  # do not magnify rounding errors
    axes.set(xlabel="datum, sorted by log p(x)", ylabel="bound − middle of both bounds (nats)")
    axes.grid(alpha=0.3, axis="y")


def _gaps(axes: Axes, gap: np.ndarray) -> None:
    ends = min(gap.min(), -CLOSE_ENOUGH), max(gap.max(), 2 * CLOSE_ENOUGH)
    axes.hist(gap, bins=25, range=ends, color=BLUE, alpha=0.7)
    axes.axvline(gap.mean(), color=ORANGE, lw=2, label=f"mean {_mean(gap)}")
    axes.axvline(CLOSE_ENOUGH, color=GREY, ls="--", lw=1.5, label=f"a mean below {CLOSE_ENOUGH:g} is fine")
    axes.set(xlabel="upper − lower bound (nats)", ylabel="number of data")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _mean(gap: np.ndarray) -> str:
    error = float(gap.std(ddof=1)) / np.sqrt(len(gap)) if len(gap) > 1 else np.nan
    return format_estimate(gap.mean(), error, "nats", over="data")
