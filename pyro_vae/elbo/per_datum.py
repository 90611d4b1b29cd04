"""The ELBO of each datum."""

from typing import Any

import torch
from torch import Tensor

from pyro_vae.core.component import evaluating
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.data.rows import data_for, rows_of
from pyro_vae.elbo.log_weights import weigh


@torch.no_grad()
def per_datum_elbo(
    vae: Amortized, x: Any, *, num_particles: int = 1, chunk: int = 4096, size: int | None = None
) -> Tensor:
    """Estimate the ELBO of each datum by the mean of its log-weights.

    .. math:: \\mathcal L_i \\approx \\frac1K \\sum_k \\log p(x_i, z_{ki}) - \\log q(z_{ki} | x_i)

    Args:
        vae: the VAE; it is not changed.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        num_particles: the number of particles K, at least 1.
        chunk: the number of data to evaluate at a time, at least 1.
        size: the number n of data that share the sites outside the plate over data; by default that of ``x``. Each
            datum gets 1/n of ``log p(g) - log q(g)`` of these sites, so that the sum over n data is their ELBO.

    Returns:
        The ELBO of each datum in nats, shape ``(datum,)``.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x = torch.ones(3, 5).double()
        >>> bool((per_datum_elbo(linear.as_vae(), x) - linear.log_marginal(x)).abs().max() < 1e-12)
        True
    """
    data = rows_of(data_for(vae, x)).like(vae)
    with evaluating(vae, num_particles * min(chunk, len(data))):
        return torch.cat([_elbo(vae, rows, num_particles, size or len(data)) for rows in data.split(chunk)])


def _elbo(vae: Amortized, rows: Rows, num_particles: int, size: int) -> Tensor:
    w = weigh(vae.model, vae.guide, *rows.arguments(), num_particles=num_particles, given_globals=True)
    return w.log.mean(0) + w.shared.mean() / size if w.global_sites else w.log.mean(0)
