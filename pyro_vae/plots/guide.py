"""Figures of the guide: its importance weights, and the information in the latents."""

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_vae.core.format import format_estimate
from pyro_vae.core.validation import takes_settings
from pyro_vae.data.rows import rows_of
from pyro_vae.errors import SettingsError
from pyro_vae.plots._style import BLUE, GREEN, GREY, ORANGE, Limits, describe_limits, draw_image, literal_text


@takes_settings
@literal_text
def khat(
    found: xr.Dataset,
    *,
    x: Any = None,
    image_shape: tuple[int, ...] | None = None,
    limits: Limits = (0.0, 1.0),
    worst: int = 8,
) -> Figure:
    """Draw k̂ and the effective sample size of each datum, and label the worst data, with their images.

    Args:
        found: from :func:`pyro_vae.diagnose.khat`.
        x: the data of the diagnostic, to draw the worst as images; :class:`~pyro_vae.data.Data` may have an
            ``image_shape``.
        image_shape: ``(height, width)`` if a row is an image, ``(3, height, width)`` for colours; it needs ``x``.
        limits: the values drawn white and black.
        worst: the number of data to label, at least 1.

    Returns:
        The figure.

    Raises:
        SettingsError: if ``image_shape`` is given without ``x``, or ``x`` does not fit the diagnostic.

    Example:
        >>> import pyro_vae as pv, torch
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> _ = khat(pv.diagnose.khat(vae, torch.ones(3, 4)), x=torch.ones(3, 4), image_shape=(2, 2))
    """
    images, image_shape = _images(found, x, image_shape)
    order = np.argsort(-found.khat.values, kind="stable")[: max(1, worst)]
    figure = Figure(figsize=(9.6, 4.4 if images is None else 6.0), layout="constrained")
    above, below = (figure, None) if images is None else figure.subfigures(2, 1, height_ratios=[3, 1.1])
    left, right = above.subplots(1, 2)
    _sorted(left, found, order)
    _sizes(right, found, order)
    if below is not None and images is not None and image_shape is not None:
        for axes, i in zip(below.subplots(1, len(order), squeeze=False)[0], order, strict=True):
            draw_image(axes, images[i], image_shape, limits)
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"datum {found.datum.values[i]}\nk̂ {found.khat.values[i]:.2f}", fontsize=8)
        below.suptitle(f"The worst data, {describe_limits(image_shape, limits)}", fontsize=9)
    return figure


def _images(
    found: xr.Dataset, x: Any, image_shape: tuple[int, ...] | None
) -> tuple[np.ndarray | None, tuple[int, ...] | None]:
    image_shape = image_shape or getattr(x, "image_shape", None)
    if image_shape is None:
        return None, None
    if x is None:
        raise SettingsError("image_shape is given without images; pass x=, the data of the diagnostic")
    images = rows_of(x).x.flatten(1).cpu().numpy()
    if len(images) != found.sizes["datum"] or images.shape[1] != math.prod(image_shape):
        raise SettingsError(
            f"x has shape {images.shape} for {found.sizes['datum']} data of image_shape {image_shape}; pass the data "
            "of the diagnostic"
        )
    return images, image_shape


def _finite(shape: np.ndarray) -> np.ndarray:
    """Replace infinite k̂ by a value slightly above the others."""
    top = max(1.0, shape[np.isfinite(shape)].max(initial=1.0)) * 1.15
    return np.where(np.isfinite(shape), shape, top)


def _sorted(axes: Axes, found: xr.Dataset, named: np.ndarray) -> None:
    """Draw k̂ of all data with two standard errors, the worst first."""
    shape = _finite(found.khat.values)
    order = np.argsort(-shape, kind="stable")
    place = np.arange(1, len(order) + 1)
    error = np.nan_to_num(2 * found.khat_se.values[order], posinf=0.0)
    axes.fill_between(place, shape[order] - error, shape[order] + error, color=BLUE, alpha=0.2, lw=0)
    axes.plot(place, shape[order], ".", color=BLUE, ms=4, label="k̂ ± 2 s.e., over draws")
    _thresholds(axes.axhline, found)
    worst = shape[named[0]]
    axes.plot(1, worst, "D", color=ORANGE, ms=6, label=f"datum {found.datum.values[named[0]]}, the worst")
    percent = 100 * np.stack([found.share.values, found.share_se.values], 1)
    shares = [format_estimate(share, error, "%", over="") for share, error in percent]
    limits = found.threshold.values
    axes.set_title(f"above {limits[0]:g}: {shares[0]} of data; above {limits[1]:g}: {shares[1]}", fontsize=9)
    axes.set(xlabel="data, the worst first", ylabel="Pareto shape k̂")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _sizes(axes: Axes, found: xr.Dataset, named: np.ndarray) -> None:
    """Draw the effective sample size against k̂, and label the worst data."""
    shape, particles = _finite(found.khat.values), found.attrs["num_particles"]
    ess = found.ess.values
    names = ", ".join(map(str, found.datum.values[named[:5]])) + ", …" * (len(named) > 5)
    axes.errorbar(shape, ess, 2 * found.ess_se.values, fmt=".", color=BLUE, ms=4, lw=0.5, alpha=0.7)
    axes.plot(shape[named], ess[named], "D", color=ORANGE, ms=4, label=f"the worst data: {names}")
    _thresholds(axes.axvline, found)
    axes.set(
        xlabel="Pareto shape k̂", ylabel=f"effective draws, of {particles}", yscale="log", ylim=(0.9, 1.3 * particles)
    )
    axes.set_title("effective sample size ± 2 s.e. over draws (too high beyond 0.7)", fontsize=9)
    axes.legend(fontsize=8, loc="upper right")
    axes.grid(alpha=0.3)


def _thresholds(draw: Any, found: xr.Dataset) -> None:
    draw(found.attrs["good_below"], color=GREEN, ls="--", lw=1.3, label=f"good below {found.attrs['good_below']:g}")
    draw(found.attrs["bad_above"], color=ORANGE, ls=":", lw=1.6, label=f"bad above {found.attrs['bad_above']:g}")


@literal_text
def collapse(found: xr.Dataset) -> Figure:
    """Draw the KL of each latent, the active latents, and the decomposition of the mean KL.

    For a :class:`pyro_vae.Pair`, draw the KL of each site.

    Args:
        found: from :func:`pyro_vae.diagnose.collapse`.

    Returns:
        The figure.

    Example:
        >>> import pyro_vae as pv, torch
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> _ = collapse(pv.diagnose.collapse(linear.as_vae(diagonal=True), torch.randn(9, 4)))
    """
    if "site" in found.dims:
        return _kl_of_sites(found)
    figure = Figure(figsize=(12.4, 4.0), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.3, 1.3, 1])
    by_size = np.argsort(-found.mean_variance.values, kind="stable")
    place, latents = np.arange(len(by_size)), found.isel(latent=by_size)
    active = latents.active.values.astype(bool)
    colours = np.where(active, BLUE, GREY)
    if latents.kl.notnull().any():
        left.bar(place, latents.kl, yerr=2 * latents.kl_se, color=colours, capsize=2)
        if latents.marginal_kl_of_latent.notnull().any():
            left.plot(place, latents.marginal_kl_of_latent, "_", color=ORANGE, ms=10, mew=2, label="of q(z) from p(z)")
            left.legend(fontsize=8)
    else:
        left.text(0.5, 0.5, "unknown for this posterior or prior", ha="center", transform=left.transAxes)
    left.set(ylabel="mean KL (nats)")
    left.set_title(f"KL of each latent ({found.attrs['kl_of_latent']})", fontsize=10)
    variance = latents.mean_variance.values
    middle.errorbar(place, variance, 2 * latents.mean_variance_se, fmt="none", ecolor=GREY, lw=1)
    middle.scatter(place[active], variance[active], color=BLUE, marker="o", s=26, label="active")
    middle.scatter(place[~active], variance[~active], color=GREY, marker="x", s=26, label="not active")
    threshold = found.attrs["active_above"]
    middle.axhline(threshold, color=ORANGE, ls="--", label=f"active above {threshold}")
    middle.set_yscale("symlog", linthresh=1e-3)
    middle.set_ylim(bottom=-1e-4)
    middle.set(ylabel="variance of the posterior mean (units of z²)")
    middle.set_title(f"{active.sum()} of {len(active)} latents are active", fontsize=10)
    middle.legend(fontsize=8)
    for axes in (left, middle):
        axes.set_xlabel("latent (number), sorted by the variance of its mean")
        axes.set_xticks(place, [str(i) for i in latents.latent.values], fontsize=8 if len(place) < 25 else 5)
        axes.grid(alpha=0.3, axis="y")
    _decomposition(right, found)
    return figure


def _kl_of_sites(found: xr.Dataset) -> Figure:
    figure = Figure(figsize=(1.8 + 1.4 * found.sizes["site"], 4.0), layout="constrained")
    axes = figure.subplots()
    used = found.kl.values > found.attrs["unused_below"]
    axes.bar(found.site, found.kl, yerr=2 * found.kl_se, color=np.where(used, BLUE, GREY), capsize=4, width=0.6)
    axes.set(xlabel="latent site", ylabel="mean KL (nats, ± 2 s.e. over draws)")
    axes.set_title(f"{used.sum()} of {len(used)} sites are used", fontsize=10)
    axes.grid(alpha=0.3, axis="y")
    return figure


def _decomposition(axes: Axes, found: xr.Dataset) -> None:
    names = ["mean_kl", "mutual_information", "marginal_kl"]
    labels = ["mean KL", "mutual\ninformation", "KL(q(z)‖p(z))"]
    axes.set_title("decomposition of the mean KL\n(± 2 s.e., over draws)", fontsize=10)
    values = np.array([float(found[name]) for name in names])
    errors = np.array([float(found[f"{name}_se"]) for name in names])
    axes.bar(range(3), np.nan_to_num(values), yerr=np.nan_to_num(2 * errors), color=[GREY, BLUE, ORANGE], capsize=3)
    for i, (value, error) in enumerate(zip(values, errors, strict=True)):
        shown = format_estimate(value, error, over="").replace(" ±", "\n±")
        text = shown if np.isfinite(value) else "the prior depends\non the context"
        axes.annotate(
            text, (i, np.nan_to_num(value)), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    most = found.attrs["most_information"]
    axes.axhline(most, color=GREEN, ls="--", label=f"log n = {most:.2f}, the upper limit of the information")
    axes.set_xticks(range(3), labels, fontsize=9)
    axes.set_ylabel("nats per datum")
    axes.set_ylim(0, 1.3 * max(most, np.nanmax(values)))
    axes.legend(fontsize=7, loc="upper right")
