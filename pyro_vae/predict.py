"""Prior and posterior predictive, as ArviZ's groups."""

from datetime import UTC, datetime
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import __version__, versions
from pyro_vae._numbers import whole
from pyro_vae.core import VAE, Distribution, evaluating, infer, masked
from pyro_vae.device import refuse_seed, seeded
from pyro_vae.rows import rows_for


@torch.no_grad()
def to_datatree(vae: VAE, x: Any, *, draws: int = 100, prior_draws: int = 100, seed: int = 0) -> xr.DataTree:
    """Draws from posterior and prior, and the data they predict, in ArviZ's schema.

    .. math:: z_i \\sim q(z | x_i), \\; \\tilde x_i \\sim p(x | z_i); \\quad z \\sim p(z), \\; \\tilde x \\sim p(x | z)

    The guide is sampled first and the likelihood afterwards, unobserved. Pyro's ``Predictive(model,
    guide=guide)(x)`` hands ``x`` to both, and its "posterior predictive" is the data.

    Args:
        vae: a VAE.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        draws: posterior draws per datum, at least 1.
        prior_draws: draws from the prior, at least 1.
        seed: of all draws.

    Returns:
        Groups ``posterior`` (z), ``posterior_predictive`` (x), ``log_likelihood`` (x), ``prior`` (z),
        ``prior_predictive`` (x) and ``observed_data`` (x), with dims ``chain, draw, datum, latent | feature``.
        The log-likelihood is that of a datum given its own latent: no cross-validation can be made of it.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data.
        SettingsError: if a number of draws is below 1.

    References:
        | Visualization in Bayesian workflow (Gabry et al., 2019), https://arxiv.org/abs/1709.01449

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> tree = to_datatree(vae, torch.ones(3, 5), draws=10)
        >>> dict(tree["posterior_predictive"].sizes)
        {'chain': 1, 'draw': 10, 'datum': 3, 'feature': 5}
    """
    refuse_seed(seed)
    whole("draws", draws, 1)
    whole("prior_draws", prior_draws, 1)
    rows = rows_for(vae, x).like(vae)
    given = () if rows.context is None else (rows.context,)
    with seeded(seed, rows.x.device), evaluating(vae):
        z = infer(vae.encoder, rows.x, rows.context, rows.mask).sample((draws,))
        likelihood = vae.decoder(z, *given)
        x_new = likelihood.sample()
        z_prior, of_the_prior = from_the_prior(vae, prior_draws, rows.context)
        x_prior = of_the_prior.sample()
    scored = likelihood if rows.mask is None else masked(likelihood, rows.mask)
    seen = rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan)
    groups = {
        "posterior": _variable("z", z, "datum", "latent"),
        "posterior_predictive": _variable("x", x_new, "datum", "feature"),
        "log_likelihood": _variable("x", scored.log_prob(rows.x), "datum"),
        "prior": _variable("z", z_prior, "latent"),
        "prior_predictive": _variable("x", x_prior, "feature"),
        "observed_data": xr.Dataset({"x": (("datum", "feature"), seen.flatten(1).cpu().numpy())}),
    }
    stamp = {"created_at": datetime.now(UTC).isoformat(), "inference_library": "pyro_vae", "seed": seed}
    attributes = {**stamp, "inference_library_version": __version__, **versions()}
    return xr.DataTree.from_dict({name: _with_coordinates(g).assign_attrs(attributes) for name, g in groups.items()})


def from_the_prior(vae: VAE, draws: int, context: Tensor | None) -> tuple[Tensor, Distribution]:
    """Latents of the model and the likelihood of each; each draw takes the context of a datum drawn at random.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> z, likelihood = from_the_prior(vae, 7, None)
        >>> z.shape, likelihood.mean.shape
        (torch.Size([7, 2]), torch.Size([7, 5]))
    """
    if context is None:
        z = vae.prior().sample((draws,))
        return z, vae.decoder(z)
    drawn = context[torch.randint(len(context), (draws,), device=context.device)]
    prior = vae.prior(drawn)
    z = prior.sample(() if prior.batch_shape else (draws,))
    return z, vae.decoder(z, drawn)


def _variable(name: str, draws: Tensor, *dims: str) -> xr.Dataset:
    """Draws as a variable of one chain; all feature dimensions in one."""
    array = draws.flatten(len(dims)).unsqueeze(0).cpu().numpy()
    return xr.Dataset({name: (("chain", "draw", *dims), array)})


def _with_coordinates(group: xr.Dataset) -> xr.Dataset:
    return group.assign_coords({dim: range(size) for dim, size in group.sizes.items()})
