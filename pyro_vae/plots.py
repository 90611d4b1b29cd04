"""Figures of training, predictions and comparisons; each function returns a matplotlib ``Figure``.

The figures are made without ``pyplot``, so nothing global is touched and no window is opened.
"""

import itertools
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.core import VAE, evaluating, infer
from pyro_vae.device import seeded
from pyro_vae.predict import from_the_prior
from pyro_vae.rows import as_tensor, rows_of

# Okabe & Ito's colours, safe for the colour-blind, and Tol's ten muted ones for classes.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
CLASSES = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933"]
CLASSES += ["#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777"]
MARKERS = "os^vD*PX<>"

Limits = tuple[float, float]


def history(data: xr.Dataset) -> Figure:
    """The ELBO per datum after each epoch, in training and validation, with two standard errors.

    Args:
        data: the history of a fit.

    Returns:
        The figure.

    Example:
        >>> _ = history(xr.Dataset({"train_elbo": ("epoch", [1.0, 2.0]), "train_elbo_se": ("epoch", [0.1, 0.1])},
        ...                        {"epoch": [1, 2]}))
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, colour, style in ("train", BLUE, "-"), ("validation", ORANGE, "--"):
        if f"{name}_elbo" in data:
            mean, error = data[f"{name}_elbo"], 2 * data[f"{name}_elbo_se"]
            axes.plot(data.epoch, mean, style, color=colour, label=f"{name}: {mean.values[-1]:.2f} at the end")
            axes.fill_between(data.epoch, mean - error, mean + error, color=colour, alpha=0.25, lw=0)
    values = np.concatenate([data[n].values for n in ("train_elbo", "validation_elbo") if n in data])
    low, high = np.quantile(values, 0.1), values.max()
    if len(data.epoch) > 10:  # the first epochs' climb would flatten the rest
        axes.set_ylim(low - 0.1 * (high - low), high + 0.15 * (high - low))
    axes.set(xlabel="epoch", ylabel="ELBO per datum (nats)", title="Training (bands: ± 2 standard errors)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


@torch.no_grad()
def reconstructions(
    vae: VAE,
    x: Any,
    *,
    image_shape: tuple[int, int] | None = None,
    limits: Limits = (0.0, 1.0),
    count: int = 10,
) -> Figure:
    """Data, and the mean of p(x|z) at the mean of q(z|x).

    Args:
        vae: a VAE.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask; the first
            ``count`` are shown, with 0 for what is missing.
        image_shape: ``(height, width)`` if a row is an image; otherwise rows are drawn as lines.
        limits: the values drawn white and black.
        count: how many.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> _ = reconstructions(vae, torch.ones(3, 4), image_shape=(2, 2))
    """
    rows = rows_of(x).take(slice(count)).like(vae)
    given = () if rows.context is None else (rows.context,)
    with evaluating(vae):
        mean = vae.decoder(infer(vae.encoder, rows.x, rows.context, rows.mask).mean, *given).mean
    title = "Held-out data and their reconstructions (mean of p(x|z) at the mean of q(z|x))"
    return _gallery({"data": rows.x, "reconstruction": mean}, image_shape, limits, title)


@torch.no_grad()
def prior_samples(
    vae: VAE,
    *,
    context: Any = None,
    image_shape: tuple[int, int] | None = None,
    limits: Limits = (0.0, 1.0),
    count: int = 20,
    seed: int = 0,
) -> Figure:
    """The mean of p(x|z) for z drawn from the prior.

    Args:
        vae: a VAE.
        context: the contexts of a conditional VAE, shape ``(datum, c)``, of which each draw takes one at random.
        image_shape: ``(height, width)`` if a row is an image; otherwise rows are drawn as lines.
        limits: the values drawn white and black.
        count: how many, rounded down to an even number.
        seed: of the draws.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv
        >>> _ = prior_samples(pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae())
    """
    given = None if context is None else vae.like(as_tensor(context, source="context"))
    with seeded(seed, vae.like(torch.zeros(())).device), evaluating(vae):
        first, second = from_the_prior(vae, count // 2 * 2, given)[1].mean.chunk(2)
    title = "What the prior generates (mean of p(x|z))"
    return _gallery({"z ~ p(z)": first, "z ~ p(z) ": second}, image_shape, limits, title)


def _gallery(rows: dict[str, Tensor], image_shape: tuple[int, int] | None, limits: Limits, title: str) -> Figure:
    arrays = {name: row.flatten(1).cpu().numpy() for name, row in rows.items()}
    return _lines(arrays, title) if image_shape is None else _images(arrays, image_shape, limits, title)


def _images(rows: dict[str, np.ndarray], image_shape: tuple[int, int], limits: Limits, title: str) -> Figure:
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(max(6.0, 0.95 * count), 1.15 * len(rows) + 0.7), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes_row, (name, row) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(axes_row, row, strict=True):
            axes.imshow(image.reshape(image_shape), cmap="gray_r", vmin=limits[0], vmax=limits[1])
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(name.strip(), rotation=0, ha="right", va="center")
    figure.suptitle(f"{title}\ngrey level from {limits[0]:.3g} (white) to {limits[1]:.3g} (black)", fontsize=10)
    return figure


def _lines(rows: dict[str, np.ndarray], title: str) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, row), style in zip(rows.items(), ("o-", "x--"), strict=False):
        for i, values in enumerate(row[:6]):
            axes.plot(values, style, color=CLASSES[i], ms=4, lw=1, label=name.strip() if i == 0 else None)
    axes.set(xlabel="feature (index)", ylabel="value (units of the data)", title=title)
    axes.title.set_fontsize(10)
    axes.legend()
    return figure


@torch.no_grad()
def latent_space(vae: VAE, x: Any, *, labels: Tensor | None = None) -> Figure:
    """The posterior means of data, in their first two principal components where there are more latents.

    Args:
        vae: a VAE.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        labels: a class per datum, for colour and marker.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 3), torch.zeros(4), 0.5).as_vae()
        >>> _ = latent_space(vae, torch.randn(9, 4), labels=torch.arange(9) % 2)
    """
    rows = rows_of(x).like(vae)
    with evaluating(vae):
        points, names = _plane(infer(vae.encoder, rows.x, rows.context, rows.mask).mean.cpu().numpy())
    figure = Figure(figsize=(6.6, 5.6), layout="constrained")
    axes = figure.subplots()
    classes = np.zeros(len(rows), int) if labels is None else labels.cpu().numpy()
    for i, label in enumerate(np.unique(classes)):
        chosen = points[classes == label]
        style: dict[str, Any] = {"color": CLASSES[i % 10], "marker": MARKERS[i % 10], "s": 16, "alpha": 0.75, "lw": 0}
        axes.scatter(*chosen.T, label=str(label), **style)
        if labels is not None:
            box = {"facecolor": "white", "edgecolor": CLASSES[i % 10], "boxstyle": "round,pad=0.2", "alpha": 0.85}
            middle = np.median(chosen, 0)
            axes.text(middle[0], middle[1], str(label), weight="bold", bbox=box, ha="center", va="center")
    if labels is not None:
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.5)
    axes.set(xlabel=names[0], ylabel=names[1], title="Held-out data in latent space: means of q(z|x)")
    axes.set_aspect("equal", "datalim")
    return figure


def _plane(means: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    unit = "(prior standard deviations)"
    if means.shape[1] == 1:
        return np.c_[means, np.zeros(len(means))], (f"z₁ {unit}", "")
    if means.shape[1] == 2 or len(means) < 2:
        return means[:, :2], (f"z₁ {unit}", f"z₂ {unit}")
    from sklearn.decomposition import PCA

    pca = PCA(2).fit(means)
    share = [f"{100 * r:.0f} % of variance" for r in pca.explained_variance_ratio_]
    return pca.transform(means), (f"component 1 of z {unit}, {share[0]}", f"component 2 of z {unit}, {share[1]}")


def elbos_by_datum(comparison: xr.Dataset) -> Figure:
    """Each estimator's ELBO of each datum against the hand-derived (or the first) one, and how they differ.

    Estimators of other bounds are not in it, and of several numbers of particles the fewest are drawn.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> _ = elbos_by_datum(pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(5), draws=3))
    """
    comparison = comparison.isel(particles=0)
    comparison = comparison.sel(estimator=(comparison.bound == "ELBO") & comparison.elbo.notnull())
    everyone = [str(name) for name in comparison.estimator.values]
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
    draws = comparison.attrs["draws"]
    left.set(xlabel=f"{reference} (nats)", ylabel="the other's ELBO (nats)")
    left.set_title(f"ELBO of each datum, mean of {draws} draws", fontsize=10)
    left.legend()
    return figure


def _differences(axes: Axes, by_hand: np.ndarray, difference: np.ndarray, name: str, colour: str) -> None:
    axes.axhline(0, color=GREY, lw=1)
    axes.scatter(by_hand, difference, color=colour, s=8, lw=0)
    largest = float(np.abs(difference).max())
    axes.set_ylabel("difference (nats)")
    axes.set_title(f"{name}\nat most {largest:.1e} nats", fontsize=10)


ESTIMATORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#777777"]


def compare(comparison: xr.Dataset) -> Figure:
    """Estimators at a look: the bound against the truth, the gradient's signal against its cost, slopes in K.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`; with a dimension ``moment``, a row for each.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> table = pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(5), particles=(1, 4), draws=4)
        >>> _ = compare(table)
    """
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
    """Each bound by its number of particles; estimators of one bound are moved a little apart."""
    names = table.estimator.values
    for i, name in enumerate(names):
        cell = table.sel(estimator=name)
        moved = table.particles * 2 ** (0.08 * (i - (len(names) - 1) / 2))
        axes.errorbar(moved, cell.elbo, 2 * cell.elbo_se, label=str(name), capsize=2, **_style(i))
    truth = (table.elbo - table.bias).values
    if np.isfinite(truth).any():
        axes.axhline(np.nanmean(truth), color=GREY, ls="--", lw=1.5, label="log p(x)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(table.particles.values, [str(k) for k in table.particles.values])
    axes.minorticks_off()
    axes.set(xlabel="particles K", ylabel="bound (nats per datum)")
    axes.set_title("value ± 2 s.e.", fontsize=10)
    axes.grid(alpha=0.3)


def _signal(axes: Axes, table: xr.Dataset, group: str) -> None:
    """Signal-to-noise of the gradient against the time of a step, a point for each K."""
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
    axes.set_title(f"{group}, K grows along the lines (numbers: slope)", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.margins(x=0.15)
    _label(axes, ends)


def _label(axes: Axes, ends: list[tuple[float, str, int]]) -> None:
    """Each line's slope at its end, as far apart as the letters are high."""
    lowest, placed = -np.inf, []
    low, high = np.log(axes.get_ylim())
    for y, text, i in sorted(ends):
        lowest = max((np.log(y) - low) / (high - low), lowest + 0.055)
        placed.append((lowest, text, ESTIMATORS[i % len(ESTIMATORS)]))
    above = max(0.0, lowest - 0.98)
    for place, text, colour in placed:
        axes.text(1.01, place - above, text, transform=axes.transAxes, color=colour, fontsize=8, va="center")


def _slope(particles: np.ndarray, ratio: np.ndarray) -> float:
    """Of the log-log line through the points."""
    return float(np.polyfit(np.log(particles), np.log(ratio), 1)[0])
