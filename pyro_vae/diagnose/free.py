"""Posteriors without an encoder: the parameters of q(z|x) made free, and optimised for each datum by itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.core.component import Distribution, as_encoded
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.errors import ModelError
from pyro_vae.posteriors import DiagNormal, FullNormal, Posterior

FALL = 3e-4
"""The rate at the end, of that at the start, which it keeps for the first half of the steps."""


@dataclass(frozen=True)
class Free:
    """One q per datum: a family, and the parameters in it.

    Args:
        family: from parameters of shape ``(datum, parameter)`` to the distributions they stand for.
        parameters: free ones; nothing makes them of x.
        name: of the family.

    Example:
        >>> full(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2)).q().batch_shape
        torch.Size([3])
    """

    family: Callable[[Tensor], Distribution]
    parameters: Tensor
    name: str

    def q(self) -> Distribution:
        """The distributions, batch shape ``(datum,)``."""
        return self.family(self.parameters)

    def take(self, index: Any) -> "Free":
        """Those of some data."""
        return replace(self, parameters=self.parameters[index])


def amortised(vae: VAE, rows: Rows) -> Free:
    """The encoder's own answers, and the family they are members of.

    The family is that of all values the network of a :class:`~pyro_vae.posteriors.Posterior` could give; what
    is no such posterior but gives normals, as ``Refined`` does, has all normals of their kind for its family.

    Raises:
        ModelError: if there is no telling what the family is.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae(diagonal=True)
        >>> amortised(vae, Rows(torch.ones(3, 5))).parameters.shape
        torch.Size([3, 4])
    """
    encoder, q = vae.encoder, vae.posterior(rows)
    if q.event_dim != 1 or not q.has_rsample:
        raise ModelError("gaps need latents in one dimension whose q is reparameterised; this one has no such sample")
    if isinstance(encoder, Posterior) and type(encoder).forward is Posterior.forward:
        numbers = encoder.encoded(as_encoded(encoder, rows.x, rows.mask), rows.context)
        return Free(encoder.distribution, numbers.detach(), type(encoder).__name__.lstrip("_"))
    base = getattr(q, "base_dist", None)
    if isinstance(base, torch.distributions.Normal):
        return diagonal(base.loc, base.scale)
    if isinstance(q, torch.distributions.MultivariateNormal):
        return full(q.loc, q.scale_tril.expand(*q.loc.shape, -1))
    raise ModelError(
        f"the family of the encoder, a {type(encoder).__name__}, is not known, so its best q cannot be sought; "
        "make it a pyro_vae.posteriors.Posterior, or let it return normals"
    )


def diagonal(loc: Tensor, scale: Tensor) -> Free:
    """Diagonal normals.

    Args:
        loc: the means, shape ``(datum, latent)``.
        scale: the sds, shape ``(datum, latent)``.

    Example:
        >>> torch.equal(diagonal(torch.ones(3, 2), torch.ones(3, 2)).q().stddev, torch.ones(3, 2))
        True
    """
    return Free(DiagNormal(nn.Identity()).distribution, torch.cat([loc, scale.log()], -1), "DiagNormal")


def full(loc: Tensor, scale_tril: Tensor) -> Free:
    """Normals with a full covariance.

    Args:
        loc: the means, shape ``(datum, latent)``.
        scale_tril: Cholesky factors of the covariances, shape ``(datum, latent, latent)``.

    Example:
        >>> torch.equal(full(torch.ones(3, 2), 2 * torch.eye(2).expand(3, 2, 2)).q().stddev, torch.full((3, 2), 2.0))
        True
    """
    row, column = torch.tril_indices(loc.shape[-1], loc.shape[-1], -1, device=loc.device)
    on_diagonal = scale_tril.diagonal(dim1=-2, dim2=-1)
    parameters = torch.cat([loc, on_diagonal.log(), scale_tril[..., row, column]], -1)
    return Free(FullNormal(nn.Identity()).distribution, parameters, "FullNormal")


def as_full(q: Distribution, draws: int = 2000) -> Free:
    """The normals with a full covariance that have the moments of q; those of draws, where they have no closed form.

    Example:
        >>> import pyro.distributions as dist
        >>> as_full(dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)).name
        'FullNormal'
    """
    if isinstance(getattr(q, "base_dist", None), torch.distributions.Normal):
        return full(q.mean, torch.diag_embed(q.stddev))
    if hasattr(q, "covariance_matrix"):
        return full(q.mean, torch.linalg.cholesky(q.covariance_matrix))
    z = q.sample((draws,))
    apart = z - z.mean(0)
    covariance = torch.einsum("kni,knj->nij", apart, apart) / (draws - 1)
    return full(z.mean(0), torch.linalg.cholesky(covariance))


def weights(vae: VAE, rows: Rows, free: Free, num_particles: int) -> Tensor:
    """``log p(x, z) - log q(z)`` of draws of q, in nats, shape ``(K, datum)``.

    Normals of any kind take the same noise from the same seed, so that their differences have small errors.

    Example:
        >>> import pyro_vae as pv
        >>> vae, rows = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae(), Rows(torch.ones(3, 5))
        >>> weights(vae, rows, amortised(vae, rows), 7).shape
        torch.Size([7, 3])
    """
    q = free.q()
    z = q.rsample((num_particles,))
    return (vae.log_joint(z, rows) - q.log_prob(z)).double()


@torch.enable_grad()
def climb(vae: VAE, rows: Rows, start: Free, *, steps: int, rate: float, particles: int) -> Free:
    """The ELBO of every datum climbed at once, each by its own parameters; fresh noise at each step.

    Adam, by the gradient through the sample alone, which has no noise where q is the posterior. It forgets soon how
    large gradients were, since those of a q far off are larger by orders of magnitude.

    Args:
        vae: for its prior and decoder, which stay as they are.
        rows: the data.
        start: where to start from.
        steps: how many steps.
        rate: of Adam at the start, in units of the parameters.
        particles: draws per datum and step.

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> x, vae = linear.sample(3), linear.as_vae()
        >>> far = full(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2))
        >>> near = climb(vae, Rows(x), far, steps=200, rate=0.1, particles=8)
        >>> bool((linear.elbo(x, near.q()) - linear.log_marginal(x)).abs().max() < 1e-3)
        True
    """
    free = start.parameters.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=rate, betas=(0.9, 0.9))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: FALL ** max(0.0, 2 * step / steps - 1))
    with pyro.validation_enabled(False):  # a step may land where the decoder is not finite
        for _ in range(steps):
            z = start.family(free).rsample((particles,))
            elbo = (vae.log_joint(z, rows) - start.family(free.detach()).log_prob(z)).mean(0)
            (gradient,) = torch.autograd.grad(elbo.sum(), free)
            # A datum with such a step stays where it is.
            free.grad = -torch.where(gradient.isfinite().all(-1, keepdim=True), gradient, 0.0)
            optimizer.step()
            schedule.step()
    return replace(start, parameters=free.detach())
