"""Non-amortized posteriors: the parameters of q(z|x) are free, and optimized separately for each datum."""

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
"""The final learning rate relative to the initial one, which is constant for the first half of the steps."""


@dataclass(frozen=True)
class Free:
    """One q per datum: a variational family, and free parameters.

    Args:
        family: a function from parameters of shape ``(datum, parameter)`` to distributions.
        parameters: the free parameters, which do not depend on x.
        name: the name of the family.

    Example:
        >>> full(torch.zeros(3, 2), torch.eye(2).expand(3, 2, 2)).q().batch_shape
        torch.Size([3])
    """

    family: Callable[[Tensor], Distribution]
    parameters: Tensor
    name: str

    def q(self) -> Distribution:
        """Return the distributions, batch shape ``(datum,)``."""
        return self.family(self.parameters)

    def take(self, index: Any) -> "Free":
        """Select some data."""
        return replace(self, parameters=self.parameters[index])


def amortized(vae: VAE, rows: Rows) -> Free:
    """Return the encoder's parameters for each datum, with the variational family.

    The family of a :class:`~pyro_vae.posteriors.Posterior` has a member for any output of its network. Any other
    encoder that returns normals, such as ``Refined``, has the family of all normals of the same kind.

    Raises:
        ModelError: if the family is unknown.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae(diagonal=True)
        >>> amortized(vae, Rows(torch.ones(3, 5))).parameters.shape
        torch.Size([3, 4])
    """
    encoder, q = vae.encoder, vae.posterior(rows)
    if q.event_dim != 1 or not q.has_rsample:
        raise ModelError("inference gaps need a reparameterized q with latents in one dimension")
    if isinstance(encoder, Posterior) and type(encoder).forward is Posterior.forward:
        numbers = encoder.encoded(as_encoded(encoder, rows.x, rows.mask), rows.context)
        return Free(encoder.distribution, numbers.detach(), type(encoder).__name__.lstrip("_"))
    base = getattr(q, "base_dist", None)
    if isinstance(base, torch.distributions.Normal):
        return diagonal(base.loc, base.scale)
    if isinstance(q, torch.distributions.MultivariateNormal):
        return full(q.loc, q.scale_tril.expand(*q.loc.shape, -1))
    raise ModelError(
        f"cannot optimize q: the variational family of encoder {type(encoder).__name__} is unknown; "
        "make it a pyro_vae.posteriors.Posterior, or let it return normals"
    )


def diagonal(loc: Tensor, scale: Tensor) -> Free:
    """Make diagonal normals.

    Args:
        loc: the means, shape ``(datum, latent)``.
        scale: the sds, shape ``(datum, latent)``.

    Example:
        >>> torch.equal(diagonal(torch.ones(3, 2), torch.ones(3, 2)).q().stddev, torch.ones(3, 2))
        True
    """
    return Free(DiagNormal(nn.Identity()).distribution, torch.cat([loc, scale.log()], -1), "DiagNormal")


def full(loc: Tensor, scale_tril: Tensor) -> Free:
    """Make normals with a full covariance.

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
    """Make full-covariance normals with the moments of q, estimated from draws if they have no closed form.

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
    deviation = z - z.mean(0)
    covariance = torch.einsum("kni,knj->nij", deviation, deviation) / (draws - 1)
    return full(z.mean(0), torch.linalg.cholesky(covariance))


def weights(vae: VAE, rows: Rows, free: Free, num_particles: int) -> Tensor:
    """Compute ``log p(x, z) - log q(z)`` at draws from q, in nats, shape ``(K, datum)``.

    With the same seed, normals of any kind use the same noise, so that their differences have small errors.

    Example:
        >>> import pyro_vae as pv
        >>> vae, rows = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae(), Rows(torch.ones(3, 5))
        >>> weights(vae, rows, amortized(vae, rows), 7).shape
        torch.Size([7, 3])
    """
    q = free.q()
    z = q.rsample((num_particles,))
    return (vae.log_joint(z, rows) - q.log_prob(z)).double()


@torch.enable_grad()
def climb(vae: VAE, rows: Rows, start: Free, *, steps: int, rate: float, particles: int) -> Free:
    """Maximize the ELBO of each datum over its free parameters, with new noise at each step.

    The optimizer is Adam with the path derivative, whose variance is 0 if q is the posterior. Its second moment has a
    short memory, since the gradients of a poor initial q are larger by orders of magnitude.

    Args:
        vae: a VAE, whose prior and decoder do not change.
        rows: the data.
        start: the initial q.
        steps: the number of steps.
        rate: the initial learning rate of Adam, in units of the parameters.
        particles: the number of draws per datum and step.

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
            # A datum whose gradient is not finite skips the step.
            free.grad = -torch.where(gradient.isfinite().all(-1, keepdim=True), gradient, 0.0)
            optimizer.step()
            schedule.step()
    return replace(start, parameters=free.detach())
