"""Make a web page to explore a trained VAE: its latent space, its data and the output of its decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded, validate_seed
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import Data
from pyro_vae.diagnose.importance import khat
from pyro_vae.errors import DataError, ModelError
from pyro_vae.plots.page_decoder import count_bytes, page_decoder
from pyro_vae.use.encode import encode
from pyro_vae.use.features import summarize
from pyro_vae.use.inputs import Names
from pyro_vae.use.reconstruct import reconstruct
from pyro_vae.use.sample import likelihood_at
from pyro_vae.use.score import score

MOST_BYTES = 5_000_000
"""Maximum size of a page."""

LIBRARY_BYTES = 2_150_000
"""Part of the page that Bokeh, the script and the layout occupy."""

WEIGHTS_BYTES = 1_400_000
"""Maximum size of the weights of a decoder that the page runs; larger decoders are evaluated on a grid instead."""

WORDS_BYTES = 700
"""Approximate size of the names, texts and scores of a row."""

LEAST_ROWS = 20
"""Minimum number of rows that a page must have room for."""

SIDE = 15
"""Number of points along each axis of the grid that is decoded in advance."""


@dataclass(frozen=True)
class Direction:
    """An axis of the latent space, along which the coordinate of z is ``direction · z − offset``.

    Args:
        name: a short name, such as ``z0``.
        title: the axis label.
        direction: shape ``(latent,)``.
        offset: the offset, a scalar.
    """

    name: str
    title: str
    direction: np.ndarray
    offset: float = 0.0

    def of(self, z: np.ndarray) -> np.ndarray:
        """Return the coordinate of latents of shape ``(datum, latent)``."""
        return z @ self.direction - self.offset


@dataclass(frozen=True)
class Grid:
    """Points of the latent space, decoded in advance.

    Args:
        axes: the indices in :attr:`Explored.directions` of the directions that span the grid.
        places: the coordinates along these directions, shape ``(point, axis)``.
        decoded: the mean of each feature, shape ``(point, feature)``.
    """

    axes: list[int]
    places: np.ndarray
    decoded: np.ndarray


@dataclass(frozen=True)
class Explored:
    """The contents of the page.

    Args:
        data: the rows, with labels, context and mask if available.
        names: names of rows, features and categories.
        latents: the means of q(z|x), shape ``(datum, latent)``.
        rebuilt: from :func:`pyro_vae.reconstruct`.
        scores: over ``datum``: ``khat``, ``ess``, ``log_px`` and ``gap``, each with its ``_se``.
        directions: the principal components, if any, then the latents.
        decoder: from :func:`~pyro_vae.plots.page_decoder.page_decoder`, or None.
        grid: points decoded in advance, if the page cannot run the decoder; else None.
        notes: remarks about the rows and the decoder.
    """

    data: Data
    names: Names
    latents: np.ndarray
    rebuilt: xr.Dataset
    scores: xr.Dataset
    directions: list[Direction]
    decoder: dict[str, Any] | None
    grid: Grid | None
    notes: list[str]

    @property
    def columns(self) -> list[str]:
        """The names of the features."""
        known = self.names.columns
        return [f"f{i}" for i in range(self.data.x[0].numel())] if known is None else [*map(str, known)]


@torch.no_grad()
@takes_settings
def explore(
    vae: VAE,
    x: Any,
    *,
    title: str = "Explore",
    rows: int = 2000,
    num_particles: int = 1000,
    draws: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> str:
    """Make one HTML page to explore a VAE's latent space; it needs no network and no server.

    The page shows the means of q(z|x) along principal components or any two axes, coloured by label, k̂, the gap
    between log p(x) and the ELBO, or any column. Clicking a row shows it beside its reconstruction. Clicking an empty
    place decodes it: in the browser if the decoder is an ``mlp``, else by the nearest point of a grid decoded in
    advance. Selected rows can be downloaded as CSV.

    Args:
        vae: a VAE.
        x: held-out data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with names, labels, context
            and mask.
        title: title of the page.
        rows: maximum number of rows, at least 2; if the data have more rows, or more than fit into 5 MB, the page shows
            a random sample.
        num_particles: draws of q(z|x) per row for k̂, the effective sample size and log p(x), at least 25.
        draws: draws of q(z|x) per row for the reconstruction and the ELBO, at least 2.
        seed: seed of all draws.
        progress: whether to show progress bars.

    Returns:
        The text of an HTML file of at most 5 MB.

    Raises:
        DataError: if there is only one row, or fewer than 20 rows fit into the page.
        ModelError: if the VAE does not fit the data.
        SettingsError: if a setting is out of its range, or Bokeh is missing (``pip install pyro-vae[explore]``).

    References:
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 2), torch.zeros(4), 0.5).as_vae()
        >>> page = explore(vae, torch.randn(9, 4), num_particles=25)
        >>> "<script" in page, len(page) < 5_000_000
        (True, True)
    """
    from pyro_vae.plots.explorer_page import draw_page, validate_bokeh

    whole("rows", rows, 2)
    validate_seed(seed)
    validate_bokeh()
    data = _as_data(vae, x)
    decoder, notes = _exported_decoder(vae, data)
    side = SIDE if decoder is None else 0
    shown = _sample(data, min(rows, _row_capacity(vae, data, decoder, side)), seed)
    latents = encode(vae, shown, seed=seed, progress=progress).z.values.astype(float)
    directions = _directions(latents)
    explored = Explored(
        shown, Names.of(vae, shown), latents, reconstruct(vae, shown, draws=draws, seed=seed, progress=progress),
        _scores(vae, shown, num_particles, draws, seed, progress), directions, decoder,
        None if decoder else _grid(vae, shown, latents, directions, side, seed),
        [*_sampling_note(shown, data, seed), *notes],
    )  # fmt: skip
    page = draw_page(explored, title)
    if (size := len(page.encode())) > MOST_BYTES:
        raise DataError(
            f"{data.source}: the page has {size / 1e6:.1f} MB with {len(shown.x)} rows, above 5 MB; pass smaller rows="
        )
    return page


def _as_data(vae: VAE, x: Any) -> Data:
    """Return the data with flat rows, on the CPU."""
    known = data_for(vae, x)
    rows = rows_for(vae, known)
    data = known if isinstance(known, Data) else Data(rows.x, context=rows.context, mask=rows.mask)
    if len(data.x) < 2:
        raise DataError(f"{data.source}: there is only one row, but the explorer needs at least 2; pass more rows")
    return data


def _exported_decoder(vae: VAE, data: Data) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the decoder for the page, or None and the reason why the page cannot run it."""
    try:
        written = page_decoder(vae.decoder, data.x[0].numel())
    except ModelError as error:
        return None, [str(error)]
    if (size := count_bytes(written)) > WEIGHTS_BYTES:
        return None, [f"the decoder weights take {size / 1e6:.1f} MB, too much for the page"]
    return written, []


def _row_capacity(vae: VAE, data: Data, decoder: dict[str, Any] | None, side: int) -> int:
    """Return the number of rows that fit into the page."""
    features = data.x[0].numel()
    feature_bytes = 2 if data.image_shape else data.x.element_size() + 3 * 4
    row_bytes = WORDS_BYTES + 4 / 3 * features * feature_bytes
    stored = count_bytes(decoder) + side**2 * features * (1 if data.image_shape else 4)
    capacity = int((MOST_BYTES - LIBRARY_BYTES - 4 / 3 * stored) / row_bytes)
    if capacity < LEAST_ROWS:
        raise DataError(
            f"{data.source}: a row has {features} numbers, so fewer than {LEAST_ROWS} rows fit into a page of 5 MB; "
            "use pyro_vae.plots.reconstructions and latent_space instead"
        )
    return capacity


def _sample(data: Data, number: int, seed: int) -> Data:
    """Draw a random sample of the rows, in their original order."""
    total = len(data.x)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:number]
    return data.rows(chosen.sort().values)


def _sampling_note(shown: Data, data: Data, seed: int) -> list[str]:
    if len(shown.x) == len(data.x):
        return []
    return [f"the page shows a random sample of {len(shown.x)} of {len(data.x)} rows (seed {seed})"]


def _directions(latents: np.ndarray) -> list[Direction]:
    """Return the first two principal components, if there are at least two latents, and each latent."""
    size = latents.shape[1]
    each = [Direction(f"z{i}", f"z{i}, mean of q(z|x)", unit) for i, unit in enumerate(np.eye(size))]
    if size < 2 or len(latents) < 3:
        return each
    from sklearn.decomposition import PCA

    pca = PCA(2).fit(latents)
    shares = [f"{share:.0%}" for share in np.nan_to_num(pca.explained_variance_ratio_)]
    components = [
        Direction(f"component {i + 1}", f"component {i + 1} of z ({shares[i]} of the variance)", line, line @ pca.mean_)
        for i, line in enumerate(pca.components_)
    ]
    return [*components, *each]


def _scores(vae: VAE, data: Data, num_particles: int, draws: int, seed: int, progress: bool) -> xr.Dataset:
    weights = khat(vae, data, num_particles=num_particles, seed=seed)
    scored = score(vae, data, num_particles=num_particles, draws=draws, seed=seed, progress=progress)
    scores = weights[["khat", "khat_se", "ess", "ess_se"]].assign(
        log_px=scored.log_px, log_px_se=scored.log_px_mcse, gap=scored.log_px - scored.elbo,
        gap_se=np.hypot(scored.log_px_mcse, scored.elbo_mcse),
    )  # fmt: skip
    return scores.assign_attrs(num_particles=num_particles)


def _grid(vae: VAE, data: Data, latents: np.ndarray, directions: Sequence[Direction], side: int, seed: int) -> Grid:
    """Decode a grid that covers the rows, on the plane of the first two directions or along the only one."""
    axes = [*range(min(2, len(directions)))]
    lines = [directions[i] for i in axes]
    ends = [(line.of(latents).min(), line.of(latents).max()) for line in lines]
    ticks = [np.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), side) for low, high in ends]
    places = np.stack(np.meshgrid(*ticks), -1).reshape(-1, len(axes))
    middle = latents.mean(0)
    steps = places - np.array([line.of(middle[None])[0] for line in lines])
    z = middle + steps @ np.stack([line.direction for line in lines])
    first = rows_for(vae, data.rows(torch.arange(1))).like(vae)
    return Grid(axes, places, decode_means(vae, vae.like(torch.as_tensor(z)), first, seed=seed))


@torch.no_grad()
def decode_means(vae: VAE, z: Tensor, row: Rows, *, draws: int = 100, seed: int = 0) -> np.ndarray:
    """Decode latents in the context of a row: the mean of each feature, or the most probable category.

    Args:
        vae: a VAE.
        z: shape ``(point, latent)``.
        row: the row, whose context the decoder gets.
        draws: draws of x at each point, if its mean has no closed form.
        seed: seed of these draws.

    Returns:
        The means, shape ``(point, feature)``.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 2), torch.zeros(4), 0.5).as_vae()
        >>> decode_means(vae, torch.ones(1, 2), Rows(torch.zeros(1, 4))).round(3).tolist()
        [[2.0, 2.0, 2.0, 2.0]]
    """
    given = tuple(context.expand(len(z), -1) for context in row.given)
    parts = []
    with evaluating(vae), seeded(seed, z.device):
        for start in range(0, len(z), 16):
            some = slice(start, start + 16)
            likelihood = likelihood_at(vae, z[some].expand(draws, -1, -1), tuple(each[some] for each in given))
            parts.append(summarize(likelihood, z.new_full((draws, len(z[some])), 1 / draws))["x"])
    found: np.ndarray = torch.cat(parts).cpu().numpy()
    return found
