"""Decode walks through the latent space: between two rows, and along one latent."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.core.component import Distribution, evaluating
from pyro_vae.core.device import seeded, validate_seed
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import context_like, context_numbers
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.use.encode import encode
from pyro_vae.use.features import summarize
from pyro_vae.use.inputs import Names, read
from pyro_vae.use.labelled import label
from pyro_vae.use.sample import contexts, likelihood_at, prior_at

DRAWS = 10_000
"""The number of draws from a prior whose quantiles have no closed form."""

REACH = 2.0
"""The range of a traversed latent to each side, in standard deviations of a normal prior."""


@torch.no_grad()
@takes_settings
def interpolate(
    vae: VAE, a: Any, b: Any, *, steps: int = 11, context: Any = None, draws: int = 100, seed: int = 0
) -> xr.Dataset:
    """Decode the line between the posterior means of two rows.

    .. math:: z_t = (1 - t)\\, E_q[z | a] + t\\, E_q[z | b], \\qquad x_t = E[x | z_t], \\qquad 0 \\le t \\le 1

    Args:
        vae: a VAE.
        a: a row, in any form that :func:`pyro_vae.data.rows_for` takes, or a row of a DataFrame or of an array.
        b: the row at the other end.
        steps: the number of points on the line, including its ends, at least 2.
        context: the context of a conditional VAE, for both rows and the line, shape ``(c,)``.
        draws: the number of draws of x at each point, used if the mean of the likelihood has no closed form.
        seed: of these draws, and of those of :func:`pyro_vae.encode`.

    Returns:
        A dataset over ``step``, whose coordinate is t: ``x``, the mean of each feature (for codes, the most probable
        code) with ``x_sd``, the standard deviation of x given z, and ``x_mcse``, which is 0 if the mean has a closed
        form; and the latents ``z``.

    Raises:
        DataError: if ``a`` or ``b`` is not one row.
        SettingsError: if ``steps`` is below 2.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> interpolate(vae, {"a": [0.0], "b": [0.0]}, {"a": [3.0], "b": [3.0]}, steps=3).x.sel(feature="a").values
        array([0., 1., 2.], dtype=float32)
    """
    whole("steps", steps, 2)
    first, names = _end(vae, a, context, "a")
    second, _ = _end(vae, b, context, "b")
    if any(not torch.equal(p, q) for p, q in zip(first.given, second.given, strict=True)):
        raise DataError("a and b have different contexts; pass context=, one for both rows")
    start, end = (encode(vae, row, seed=seed).z.values for row in (first, second))
    at = np.linspace(0, 1, steps)
    z = vae.like(torch.as_tensor((1 - at)[:, None] * start + at[:, None] * end))
    return _decode(vae, z, first.given, names, "step", {"step": at}, draws, seed)


@torch.no_grad()
@takes_settings
def traverse(
    vae: VAE,
    latent: int,
    *,
    quantiles: Sequence[float] | None = None,
    steps: int = 11,
    context: Any = None,
    draws: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    """Decode the quantiles of one latent under its prior, with the other latents at their prior mean.

    .. math:: z_j = F_j^{-1}(u), \\qquad z_k = E_{p(z)}[z_k] \\; (k \\ne j), \\qquad x_u = E[x | z]

    Args:
        vae: a VAE.
        latent: j, counted from 0.
        quantiles: probabilities u between 0 and 1; by default ``steps`` of them, which for a normal prior are equal
            steps from 2 standard deviations below the mean to 2 above it (u from 0.023 to 0.977).
        steps: the number of points if ``quantiles`` are not given, at least 2.
        context: of a conditional VAE, shape ``(c,)``.
        draws: the number of draws of x at each point, used if the mean of the likelihood has no closed form.
        seed: of these draws, and of 10,000 draws from the prior if its quantiles or its mean have no closed form (a
            mixture, a flow); the mean of the prior is then the mean of these draws.

    Returns:
        A dataset over ``quantile``: ``x`` with ``x_sd`` and ``x_mcse``, as in :func:`pyro_vae.interpolate`, and the
        latents ``z``.

    Raises:
        SettingsError: if the latent does not exist, or a quantile is not between 0 and 1.

    References:
        | beta-VAE (Higgins et al., 2017), https://openreview.net/forum?id=Sy2fzU9gl

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> traverse(vae, 0, steps=3).x.sel(feature=0).values.round(4)
        array([-2.,  0.,  2.], dtype=float32)
    """
    validate_seed(seed)
    whole("steps", steps, 2)
    whole("latent", latent, 0)
    at = _quantiles(quantiles, steps)
    given = contexts(vae, context, 1)
    with evaluating(vae), seeded(seed, vae.like(torch.empty(0)).device):
        prior = prior_at(vae, given)
        if latent >= (size := prior.event_shape.numel()):
            raise SettingsError(f"latent is {latent}; the VAE has {size}, counted from 0")
        centre, values = _prior_quantiles(prior, latent, at)
    z = centre.repeat(len(at), 1)
    z[:, latent] = values
    return _decode(vae, z, given, Names.of(vae), "quantile", {"quantile": at}, draws, seed, traversed=latent)


def _end(vae: VAE, row: Any, context: Any, name: str) -> tuple[Rows, Names]:
    """Read a row at an end of the line, and the names of its features."""
    named = context_like(vae.trained_on, _two_dimensional(context))
    # Without its row label, because one context serves both rows.
    table = read(vae, _one_row(row), context=context_numbers(named), source=name)
    if len(table) != 1 or not isinstance(table.rows, Rows):
        raise DataError(f"{name} has {len(table)} rows; give one")
    return table.rows, Names(table.names.columns, table.names.categories)


def _one_row(row: Any) -> Any:
    """Convert a row of a DataFrame or an array to data of one row."""
    if hasattr(row, "to_frame") and hasattr(row, "index"):  # a pandas Series
        return row.to_frame().T.infer_objects()
    return _two_dimensional(row)


def _two_dimensional(row: Any) -> Any:
    if isinstance(row, list | tuple):
        row = np.asarray(row)
    return row[None] if getattr(row, "ndim", None) == 1 and getattr(row.dtype, "names", None) is None else row


def _quantiles(given: Sequence[float] | None, steps: int) -> np.ndarray:
    if given is None:
        return np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in np.linspace(-REACH, REACH, steps)])
    at = np.asarray(given, dtype=float)
    if at.ndim != 1 or not len(at) or not ((at > 0) & (at < 1)).all():
        raise SettingsError(f"quantiles is {given!r}; give numbers between 0 and 1")
    return at


def _prior_quantiles(prior: Distribution, latent: int, at: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the prior mean, shape ``(1, latent)``, and the quantiles of one latent."""
    shape = (1, prior.event_shape.numel())
    base = prior.base_dist if isinstance(prior, Independent) else prior
    try:
        centre = prior.mean.reshape(shape)
        probabilities = torch.as_tensor(at).to(centre)
        values = base.icdf(probabilities.reshape(-1, *[1] * len(prior.batch_shape), 1)).reshape(len(at), -1)[:, latent]
    except (AttributeError, NotImplementedError):
        z = prior.sample((DRAWS,)).reshape(DRAWS, -1)
        centre = z.mean(0, keepdim=True)
        values = torch.as_tensor(np.quantile(z[:, latent].double().cpu().numpy(), at)).to(centre)
    return centre, values


def _decode(
    vae: VAE,
    z: Tensor,
    given: tuple[Tensor, ...],
    names: Names,
    dim: str,
    coords: dict[str, np.ndarray],
    draws: int,
    seed: int,
    **about: Any,
) -> xr.Dataset:
    """Decode latents ``(point, latent)`` in one context, and return the mean of each feature."""
    whole("draws", draws, 2)
    each = tuple(context.expand(len(z), -1) for context in given)
    with evaluating(vae), seeded(seed, z.device):
        likelihood = likelihood_at(vae, z.expand(draws, *z.shape), each)
        found = summarize(likelihood, z.new_full((draws, len(z)), 1 / draws))
    variables = {name: ([dim, "feature"], value.to(z.dtype).cpu().numpy()) for name, value in found.items()}
    variables["z"] = [dim, "latent"], z.cpu().numpy()
    return label(variables, names, coords, **about, seed=seed)
