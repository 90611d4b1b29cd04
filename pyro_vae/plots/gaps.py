"""Figures of the inference gaps, of q compared with NUTS, and of the iterates of SVI."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from pyro_vae.core.format import format_estimate
from pyro_vae.core.validation import takes_settings
from pyro_vae.diagnose.gaps import mean_gap, optimizer_converged
from pyro_vae.plots._style import BLUE, ESTIMATORS, GREEN, GREY, ORANGE, literal_text

WIDE = 20
"""The ratio of the largest gap to the median above which the axis is logarithmic beyond the threshold for bad."""


@literal_text
def gaps(found: xr.Dataset) -> Figure:
    """Draw the inference gaps: their means with errors and thresholds, and those of each datum.

    Args:
        found: from :func:`pyro_vae.inference_gaps`.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> _ = gaps(pv.inference_gaps(linear.as_vae(diagonal=True), torch.ones(5, 4), steps=5, num_particles=50))
    """
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.7))
    _means(left, found)
    _by_datum(right, found)
    return figure


def _means(axes: Axes, found: xr.Dataset) -> None:
    n, latents = found.sizes["datum"], found.attrs["latents"]
    bars = {
        "approximation\n(family of q)": ("approximation_gap", BLUE),
        "approximation\n(richer family)": ("richer_gap", GREEN),
        "amortization\n(encoder)": ("amortization_gap", ORANGE),
    }
    for i, (name, colour) in enumerate(bars.values()):
        gap = mean_gap(found, name)
        ends = [[gap.value - gap.low], [gap.high - gap.value]]
        axes.bar(i, gap.value, yerr=ends, color=colour, width=0.6, capsize=4)
        axes.annotate(str(gap), (i, max(gap.high, 0)), (0, 4), textcoords="offset points",
                      ha="center", fontsize=9)  # fmt: skip
    for threshold, style in ("fine", ":"), ("bad", "--"):
        level = found.attrs[f"threshold_{threshold}"] * latents
        axes.axhline(level, color=GREY, ls=style, lw=1.2, label=f"{threshold}: {level:.3g} nats")
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel("mean gap (nats per datum)")
    axes.margins(y=0.15)
    over = f"mean of these {n} data; bars: ± 2 s.e. over draws\nand the optimization error"
    if optimizer_converged(found):
        axes.set_title(over, fontsize=10)
    else:
        apart = mean_gap(found, "optimization_error")
        warning = f"NOT CONVERGED: the halves of {found.attrs['steps']} steps end {apart} nats apart"
        axes.set_title(f"{over}\n{warning}", fontsize=10, color="crimson")
    axes.legend(title="thresholds", fontsize=8, title_fontsize=8)


def _by_datum(axes: Axes, found: xr.Dataset, most: int = 80) -> None:
    """Draw stacked bars, sorted by the gap; of many data, evenly spaced ones are drawn."""
    order = np.argsort(-found.gap.values)
    order = order[np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).astype(int))]
    shown, place = found.isel(datum=order), np.arange(len(order))
    approximation, amortization = shown.approximation_gap.values, shown.amortization_gap.values
    axes.bar(place, approximation, width=0.9, color=BLUE, label="approximation")
    axes.bar(place, amortization, width=0.9, color=ORANGE, bottom=np.maximum(approximation, 0), label="amortization")
    axes.errorbar(
        place,
        shown.gap,
        2 * shown.gap_se,
        fmt="none",
        ecolor="black",
        lw=0.8,
        label="log p(x) − ELBO ± 2 s.e. over draws",
    )
    bad = found.attrs["threshold_bad"] * found.attrs["latents"]
    axes.axhline(bad, color=GREY, ls="--", lw=1.2)
    chosen = "all data" if len(order) == found.sizes["datum"] else f"{len(order)} of {found.sizes['datum']} data"
    axes.set(xlabel=f"{chosen}, by size of the gap", ylabel="gap (nats)")
    if found.gap.max() > WIDE * max(bad, float(found.gap.median())):  # one datum would hide all others
        axes.set_yscale("symlog", linthresh=bad)
        axes.set_ylabel(f"gap (nats; logarithmic above {bad:.3g})")
    axes.set_xticks([])
    axes.set_title(f"log p(x) − ELBO of each datum (log p(x): {found.attrs['log_evidence_from']})", fontsize=10)
    axes.legend(fontsize=9)


@takes_settings
@literal_text
def nuts(found: xr.Dataset, *, data: int = 3, latents: int = 4) -> Figure:
    """Draw the marginals of q and of NUTS with their distance, for the data and latents that are farthest off.

    Args:
        found: from :func:`pyro_vae.diagnose.nuts`.
        data: the largest number of data.
        latents: the largest number of latents.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> _ = nuts(pv.diagnose.nuts(linear.as_vae(), torch.ones(1, 4), chains=2, warmup=20, draws=50))
    """
    distance = found.wasserstein
    rows = np.argsort(-distance.max("latent").values, kind="stable")[:data]
    columns = np.sort(np.argsort(-distance.max("datum").values, kind="stable")[:latents])
    figure = Figure(figsize=(3.1 * len(columns) + 1.2, 2.5 * len(rows) + 0.7), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, line in zip(rows, grid, strict=True):
        line[0].set_ylabel("density")
        for j, axes in zip(columns, line, strict=True):
            _marginal(axes, found.isel(datum=i, latent=j), found.attrs)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9)
    return figure


def _marginal(axes: Axes, one: xr.Dataset, limits: dict[str, float]) -> None:
    z, q = one.z.values.ravel(), one.q.values.ravel()
    low, high = np.quantile(np.concatenate([z, q]), [0.001, 0.999])
    bins = np.linspace(low, high, 41).tolist()
    axes.hist(z, bins, density=True, color=GREY, alpha=0.45, label="p(z|x), by NUTS")
    axes.hist(q, bins, density=True, histtype="step", color=BLUE, lw=1.6, label="q(z|x)")
    distance, floor = float(one.wasserstein), float(one.wasserstein_floor)
    far = distance > max(limits["threshold_fine"], limits["threshold_floors"] * floor)
    title = f"distance {distance:.2f} sd (noise {floor:.2f})"
    if one.rhat > limits["threshold_rhat"]:
        title += f"; R̂ {float(one.rhat):.2f}"
    axes.set_title(title, fontsize=9, color=ORANGE if far else "black")
    axes.set_xlabel(f"latent {one.latent.item()} of datum {one.datum.item()} (units of z)", fontsize=9)
    axes.set_yticks([])


@literal_text
def converged(found: xr.Dataset) -> Figure:
    """Draw the ELBO after each epoch with the trend of the last ones, and R̂ of all recorded quantities.

    Args:
        found: from :func:`pyro_vae.diagnose.converged`.

    Returns:
        The figure.

    Example:
        >>> from pyro_vae.diagnose import converged as judged
        >>> _ = converged(judged(xr.Dataset({"train_elbo": ("epoch", np.ones(20))}, {"epoch": range(1, 21)})))
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    _iterates(left, found)
    _rhats(right, found)
    return figure


def _iterates(axes: Axes, found: xr.Dataset) -> None:
    ends = []
    for chain in range(found.sizes["chain"]):
        run, colour = found.isel(chain=chain), ESTIMATORS[chain % len(ESTIMATORS)]
        elbo = run.elbo.dropna("epoch")
        axes.plot(elbo.epoch, elbo, color=colour, lw=1.1)
        last = elbo.epoch.values[-found.attrs["tail"] :]
        mean = float(run["mean"].sel(quantity="elbo"))
        rise = format_estimate(float(run.rise), float(run.rise_se), "nats", over="epochs", signed=True)
        label = f"run {chain}: rise {rise}"
        axes.plot(last, mean + float(run.slope) * (last - last.mean()), color=colour, lw=2.5, alpha=0.6, label=label)
        ends.append(last)
    axes.axvspan(min(e[0] for e in ends), max(e[-1] for e in ends), color=GREY, alpha=0.12, lw=0)
    values = found.elbo.values[np.isfinite(found.elbo.values)]
    low, high = np.quantile(values, 0.1), values.max()
    if high > low:  # the rise in the first epochs would flatten the rest
        axes.set_ylim(low - 0.1 * (high - low), high + 0.15 * (high - low))
    axes.set(xlabel="epoch (grey: judged)", ylabel="ELBO (nats per datum)")
    axes.set_title(f"trend, threshold {found.attrs['threshold_nats']:g} nats", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")


def _rhats(axes: Axes, found: xr.Dataset) -> None:
    groups = [(str(q), found.rhat.sel(quantity=q).values.reshape(1)) for q in found.quantity.values]
    if "own_rhat" in found:
        for kind in dict.fromkeys(found.kind.values):
            groups.append((f"each {kind}", found.own_rhat.values[:, found.kind.values == kind].ravel()))
    for place, (_, values) in enumerate(reversed(groups)):
        height = place + np.linspace(-0.25, 0.25, len(values)) * (len(values) > 1)
        axes.plot(
            values, height, "o", color=BLUE, ms=7 if len(values) == 1 else 3, alpha=1 if len(values) == 1 else 0.4
        )
    axes.axvline(
        found.attrs["threshold_rhat"], color=GREY, ls="--", lw=1.2, label=f"threshold {found.attrs['threshold_rhat']}"
    )
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    high = max(float(np.nanmax(values)) for _, values in groups)
    ticks = [tick for tick in (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 30) if tick <= 1.1 or tick < high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks(range(len(groups)), [name.replace("_", "-") for name, _ in reversed(groups)])
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.set(xlabel="R̂ of the iterates judged")
    axes.set_title("are the iterates stationary?", fontsize=10)
    axes.legend(fontsize=8)
