"""Figures of training, reconstructions, prior samples and the latent space."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded
from pyro_vae.core.format import format_rounded
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings
from pyro_vae.data.rows import data_for, rows_of
from pyro_vae.data.tables import given_names
from pyro_vae.data.values import as_tensor
from pyro_vae.diagnose.datatree import from_the_prior
from pyro_vae.errors import printable
from pyro_vae.plots._style import BLUE, CLASSES, MARKERS, ORANGE, Limits, describe_limits, draw_image, literal_text

NAMED = 40
"""The largest number of columns with names along an axis; more are numbered."""


@literal_text
def history(data: xr.Dataset) -> Figure:
    """Draw the training and validation ELBO after each epoch, with two standard errors.

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
            axes.plot(data.epoch, mean, style, color=colour, label=f"{name}: {_last(data, name)} at the end")
            axes.fill_between(data.epoch, mean - error, mean + error, color=colour, alpha=0.25, lw=0)
    values = np.concatenate([data[n].values for n in ("train_elbo", "validation_elbo") if n in data])
    low, high = np.quantile(values, 0.1), values.max()
    if len(data.epoch) > 10:  # the rise in the first epochs would flatten the rest
        axes.set_ylim(low - 0.1 * (high - low), high + 0.15 * (high - low))
    axes.set(xlabel="epoch", ylabel="ELBO per datum (nats)", title="Training (bands: ± 2 standard errors, over data)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def _last(data: xr.Dataset, name: str) -> str:
    return format_rounded(data[f"{name}_elbo"].values[-1], data[f"{name}_elbo_se"].values[-1])


@torch.no_grad()
@takes_settings
@literal_text
def reconstructions(
    vae: VAE,
    x: Any,
    *,
    image_shape: tuple[int, ...] | None = None,
    limits: Limits = (0.0, 1.0),
    count: int = 10,
) -> Figure:
    """Draw data and their reconstructions, the mean of p(x|z) at the mean of q(z|x).

    Args:
        vae: a VAE.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask; the first
            ``count`` are shown, with 0 for missing pixels.
        image_shape: ``(height, width)`` if a row is an image, ``(3, height, width)`` for colours; otherwise rows are
            drawn as lines.
        limits: the values drawn white and black.
        count: the number of data.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> _ = reconstructions(vae, torch.ones(3, 4), image_shape=(2, 2))
    """
    rows = rows_of(data_for(vae, x)).take(slice(count)).like(vae)
    with evaluating(vae):
        mean = vae.likelihood(vae.posterior(rows).mean, rows).mean
    title = "Held-out data and their reconstructions (mean of p(x|z) at the mean of q(z|x))"
    # A missing value is a gap in a line, and 0 in an image.
    seen = rows.x if rows.mask is None or image_shape else rows.x.masked_fill(~rows.mask, torch.nan)
    return _gallery(vae, {"data": seen, "reconstruction": mean}, image_shape, limits, title)


@torch.no_grad()
@takes_settings
@literal_text
def prior_samples(
    vae: VAE,
    *,
    context: Any = None,
    image_shape: tuple[int, ...] | None = None,
    limits: Limits = (0.0, 1.0),
    count: int = 20,
    seed: int = 0,
) -> Figure:
    """Draw the mean of p(x|z) for z from the prior.

    Args:
        vae: a VAE.
        context: the contexts of a conditional VAE, shape ``(datum, c)``; each draw uses a random row.
        image_shape: ``(height, width)`` if a row is an image, ``(3, height, width)`` for colours; otherwise rows are
            drawn as lines.
        limits: the values drawn white and black.
        count: the number of draws, rounded down to an even number.
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
    title = "Samples from the prior (mean of p(x|z))"
    return _gallery(vae, {"z ~ p(z), first half": first, "second half": second}, image_shape, limits, title)


def _gallery(
    vae: VAE, rows: dict[str, Tensor], image_shape: tuple[int, ...] | None, limits: Limits, title: str
) -> Figure:
    if image_shape is not None:
        return _images({name: row.flatten(1).cpu().numpy() for name, row in rows.items()}, image_shape, limits, title)
    standard = vae.standardize
    shown = {name: row if standard is None else standard(row) for name, row in rows.items()}
    units = "of the data" if standard is None else "sds of each column, from its mean"
    columns = None if vae.trained_on is None else given_names(vae.trained_on.columns)
    return _lines({name: row.flatten(1).cpu().numpy() for name, row in shown.items()}, title, units, columns)


def _images(rows: dict[str, np.ndarray], image_shape: tuple[int, ...], limits: Limits, title: str) -> Figure:
    count = len(next(iter(rows.values())))
    width = max(6.0, 0.95 * count)
    height = (width - 1.5) / count * image_shape[-2] / image_shape[-1]  # beside the names of the rows
    figure = Figure(figsize=(width, (height + 0.15) * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    for axes_row, (name, row) in zip(grid, rows.items(), strict=True):
        for axes, image in zip(axes_row, row, strict=True):
            draw_image(axes, image, image_shape, limits)
            axes.set(xticks=[], yticks=[])
        axes_row[0].set_ylabel(name.strip(), rotation=0, ha="right", va="center")
    figure.suptitle(f"{title}\n{describe_limits(image_shape, limits)}", fontsize=10)
    return figure


def _lines(rows: dict[str, np.ndarray], title: str, units: str, columns: Sequence[str] | None) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, row), style in zip(rows.items(), ("o-", "x--"), strict=False):
        for i, values in enumerate(row[:6]):
            axes.plot(values, style, color=CLASSES[i], ms=4, lw=1, label=name.strip() if i == 0 else None)
    axes.set(xlabel="feature (index)", ylabel=f"value (units: {units})", title=title)
    if columns is not None and len(columns) <= NAMED:
        axes.set(xlabel="", xticks=range(len(columns)))
        axes.set_xticklabels(
            [*map(printable, columns)], rotation=30 if len(columns) > 3 else 0,
            ha="right" if len(columns) > 3 else "center",
        )  # fmt: skip
    axes.title.set_fontsize(10)
    axes.legend()
    return figure


@torch.no_grad()
@literal_text
def latent_space(vae: VAE, x: Any, *, labels: Tensor | None = None) -> Figure:
    """Draw the posterior means of data, or their first two principal components if there are more latents.

    Args:
        vae: a VAE.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        labels: a class per datum, for colour and marker; more than ten different labels are drawn on a colour scale.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 3), torch.zeros(4), 0.5).as_vae()
        >>> _ = latent_space(vae, torch.randn(9, 4), labels=torch.arange(9) % 2)
    """
    rows = rows_of(data_for(vae, x)).like(vae)
    with evaluating(vae):
        points, names = _plane(vae.posterior(rows).mean.cpu().numpy())
    figure = Figure(figsize=(6.6, 5.6), layout="constrained")
    axes = figure.subplots()
    given = None if labels is None else labels.cpu().numpy()
    if given is not None and len(np.unique(given)) > len(CLASSES):
        dots = axes.scatter(points[:, 0], points[:, 1], c=given, cmap="cividis", s=16, alpha=0.75, lw=0)
        figure.colorbar(dots, label="label")
    else:
        _classes(axes, points, given)
    axes.set(xlabel=names[0], ylabel=names[1], title="Held-out data in latent space: means of q(z|x)")
    axes.set_aspect("equal", "datalim")
    _clip_outliers(axes, points)
    return figure


def _classes(axes: Axes, points: np.ndarray, labels: np.ndarray | None) -> None:
    """Draw points by class, with the name of the class at its median and in a legend; without labels, all alike."""
    classes = np.zeros(len(points), int) if labels is None else labels
    for i, label in enumerate(np.unique(classes)):
        chosen = points[classes == label]
        style: dict[str, Any] = {"color": CLASSES[i], "marker": MARKERS[i], "s": 16, "alpha": 0.75, "lw": 0}
        axes.scatter(*chosen.T, label=str(label), **style)
        if labels is not None:
            box = {"facecolor": "white", "edgecolor": CLASSES[i], "boxstyle": "round,pad=0.2", "alpha": 0.85}
            middle = np.median(chosen, 0)
            axes.text(middle[0], middle[1], str(label), weight="bold", bbox=box, ha="center", va="center")
    if labels is not None:
        axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.5)


def _clip_outliers(axes: Axes, points: np.ndarray) -> None:
    """Limit the axes so that a few outliers do not compress the other points; the title counts the outliers."""
    low, high = np.quantile(points, [0.02, 0.98], 0)
    low, high = low - (high - low) / 2, high + (high - low) / 2
    outside = int(((points < low) | (points > high)).any(1).sum())
    if outside and (high > low).all():
        axes.set_aspect("equal", "box")
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
        axes.set_title(f"{axes.get_title()}\n({outside} of {len(points)} are outside the figure)")


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
