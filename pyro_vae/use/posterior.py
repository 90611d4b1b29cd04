"""Weighted draws from p(z|x), also where the guide alone covers it badly, as where much of x is missing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_vae.core.compatibility import support_of
from pyro_vae.core.component import Distribution
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.errors import ModelError
from pyro_vae.evidence.weights import smoothed

ROUNDS, COMPLETED = 30, 8
"""Rounds of adaptation at most, and how many times each datum is completed in a round."""

PILOT, PER_LATENT = 200, 20
"""Draws of a round for each datum, and how many more for each latent."""

ENOUGH, LATE, LESS = 0.25, 10, 0.1
"""The share of the draws that is to remain effective; and from which round on less is enough to end with."""

SHARES = {"prior": 0.05, "guide": 0.15, "completed": 0.3, "fitted": 0.5}
"""The shares of the draws that come from each part of the proposal."""

DF, RIDGE = 5.0, 1e-6
"""The degrees of freedom of the Student-t that is fitted, and what its covariance has more, of its mean variance."""


@dataclass(frozen=True, eq=False)
class Weighted:
    """Draws of z with weights that make them draws of p(z|x).

    Args:
        z: shape ``(draw, datum, latent)``.
        likelihood: p(x|z) of them, without what is missing.
        weights: smoothed, with sum 1 over the draws of a datum, shape ``(draw, datum)``.
        khat: the shape of the tail of the weights, shape ``(datum,)``.
    """

    z: Tensor
    likelihood: Distribution
    weights: Tensor
    khat: Tensor

    @property
    def ess(self) -> Tensor:
        """How many draws of p(z|x) they are worth, shape ``(datum,)``."""
        return 1 / self.weights.square().sum(0)


@dataclass(frozen=True, eq=False)
class _Component:
    """Part of a proposal: q(z) of each datum, of which there may be several, side by side.

    Args:
        q: batch shape ``(copies · datum,)``.
        copies: how many.
        share: of the draws, for all copies together.
    """

    q: Distribution
    copies: int
    share: float

    def draw(self, number: int) -> Tensor:
        """About so many draws of each datum, shape ``(draw, datum, latent)``: as many from each copy, at least one."""
        z = self.q.sample((-(-number // self.copies),))
        return z.unflatten(1, (self.copies, -1)).flatten(0, 1)

    def log_prob(self, z: Tensor) -> Tensor:
        """The log-density of all copies together, shape ``(draw, datum)``."""
        each = self.q.log_prob(z.repeat(1, self.copies, 1)).double()
        return each.unflatten(1, (self.copies, -1)).logsumexp(1) - math.log(self.copies)


def weighted_posterior(vae: VAE, rows: Rows, draws: int) -> Iterator[tuple[Tensor, Weighted]]:
    """Draw from p(z|x) of rows by importance sampling, with a proposal that is adapted to each datum.

    .. math:: w_k \\propto \\frac{p(x_o, z_k)}{\\sum_j s_j q_j(z_k)}

    The guide was trained to see all of x. Where much is missing it is too narrow and in the wrong place, and its
    weights have no variance. So the proposal is a mixture of the guide, the prior, the guide at x completed by draws
    of what is missing, and a Student-t with the mean and the covariance of the weighted draws so far. Its last two
    parts are adapted in rounds, whose weights are tempered (raised to a power β below 1) as far as is needed for a
    quarter of the draws to remain effective, until so many do without that (after ten rounds, a tenth). The draws of
    the final proposal, which come from its parts in fixed shares, are weighted by the density of the whole mixture,
    and the weights are Pareto-smoothed, unless the largest is at most 1 + log K times the mean of K: k̂ is at most 0
    then.

    Args:
        vae: a VAE.
        rows: on its device and in its precision.
        draws: of each datum; slightly more are made, so that each part has its share.

    Returns:
        The numbers of some of the rows and their draws, until each row was there once.

    Raises:
        ModelError: if all weights of a datum are 0, or one is no number.

    References:
        | Adaptive Multiple Importance Sampling (Cornuet et al., 2012),
          https://doi.org/10.1111/j.1467-9469.2011.00756.x
        | Safe and Effective Importance Sampling (Owen & Zhou, 2000), https://doi.org/10.1080/01621459.2000.10473909
        | Annealed Importance Sampling (Neal, 2001), https://arxiv.org/abs/physics/9803008
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
        | Leveraging the Exact Likelihood of Deep Latent Variable Models (Mattei & Frellsen, 2018),
          https://arxiv.org/abs/1802.04826

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae(diagonal=True)
        >>> [(numbers, found)] = weighted_posterior(vae, Rows(torch.ones(3, 5)), 100)
        >>> bool((found.khat < 0.7).all()), bool((found.weights.sum(0) - 1).abs().max() < 1e-6)
        (True, True)
    """
    size = PILOT + PER_LATENT * vae.prior(*rows.given).event_shape.numel()
    numbers, proposal = torch.arange(len(rows), device=rows.x.device), _unadapted(vae, rows)
    for number in range(ROUNDS):
        z, _, log_weights = _weigh(vae, rows, proposal, size)
        weights = _tempered(log_weights)
        enough = (ENOUGH if number < LATE else LESS) * len(z) if number < ROUNDS - 1 else 0
        is_ready = _effective(log_weights) >= enough
        if is_ready.any():
            own = rows.take(is_ready)
            yield numbers[is_ready], _final(vae, own, _adapted(vae, own, z[:, is_ready], weights[:, is_ready]), draws)
        if is_ready.all():
            return
        rows, numbers = rows.take(~is_ready), numbers[~is_ready]
        proposal = _adapted(vae, rows, z[:, ~is_ready], weights[:, ~is_ready])


def _unadapted(vae: VAE, rows: Rows) -> list[_Component]:
    """The guide, and the prior of each datum at its own context."""
    prior = vae.prior(*rows.given)
    prior = prior if prior.batch_shape else prior.expand([len(rows)])
    return [_Component(vae.posterior(rows), 1, SHARES["guide"]), _Component(prior, 1, SHARES["prior"])]


def _adapted(vae: VAE, rows: Rows, z: Tensor, weights: Tensor) -> list[_Component]:
    """A proposal for rows of which weighted latents are known."""
    completed = _completed(vae, rows, resampled(z, weights, COMPLETED))
    return [*_unadapted(vae, rows), completed, *_fitted(vae, rows, z, weights)]


def _final(vae: VAE, rows: Rows, proposal: list[_Component], draws: int) -> Weighted:
    z, likelihood, log_weights = _weigh(vae, rows, proposal, draws)
    smooth, khat = smoothed(log_weights)
    is_light = _has_light_tail(log_weights)
    log_weights, khat = torch.where(is_light, log_weights, smooth), torch.where(is_light, khat.clamp(max=0), khat)
    return Weighted(z, likelihood, log_weights.softmax(0), khat)


def _has_light_tail(log_weights: Tensor) -> Tensor:
    """Whether the largest weight of a datum is no larger than that of as many exponential draws.

    Where a part of the mixture begins, weights rise from a plateau with a kink. A Pareto tail fitted there has any k̂,
    though all weights are of one size.
    """
    most, number = log_weights.amax(0), len(log_weights)
    return most - log_weights.logsumexp(0) + math.log(number) < math.log(1 + math.log(number))


def _tempered(log_weights: Tensor) -> Tensor:
    """Weights to the power of β, the largest up to 1 that leaves enough draws effective.

    They lead from the proposal a part of the way to the posterior.
    """
    low, high = log_weights.new_zeros(log_weights.shape[1:]), log_weights.new_ones(log_weights.shape[1:])
    power = high
    for _ in range(20):
        fine = _effective(power * log_weights) >= ENOUGH * len(log_weights)
        low, high = torch.where(fine, power, low), torch.where(fine, high, power)
        power = torch.where(low == 1, low, (low + high) / 2)
    return (low * log_weights).softmax(0)


def _effective(log_weights: Tensor) -> Tensor:
    """The effective sample size of each datum."""
    return 1 / log_weights.softmax(0).square().sum(0)


def _weigh(vae: VAE, rows: Rows, proposal: list[_Component], draws: int) -> tuple[Tensor, Distribution, Tensor]:
    """Draws of a mixture in the shares of its parts, p(x|z) of them, and their log-weights."""
    whole = sum(part.share for part in proposal)
    drawn = [part.draw(math.ceil(draws * part.share / whole)) for part in proposal]
    z = torch.cat(drawn)
    log_shares = [math.log(len(own) / len(z)) for own in drawn]
    log_mixture = torch.stack([part.log_prob(z) + share for part, share in zip(proposal, log_shares, strict=True)])
    likelihood = vae.likelihood(z, rows)
    log_joint = likelihood.log_prob(rows.x).double() + vae.prior(*rows.given).log_prob(z).double()
    log_weights = log_joint - log_mixture.logsumexp(0)
    if not log_weights.logsumexp(0).isfinite().all():
        raise ModelError(
            "a datum has importance weights that are no finite numbers, all 0 or infinite; look at the densities that "
            "decoder, prior and encoder give for it"
        )
    return z, likelihood, log_weights


def resampled(z: Tensor, weights: Tensor, number: int) -> Tensor:
    """Draw latents by their weights, with replacement, shape ``(number, datum, latent)``.

    Args:
        z: shape ``(draw, datum, latent)``.
        weights: shape ``(draw, datum)``.
        number: how many of each datum.

    Example:
        >>> resampled(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[0.0], [1.0]]), 3).flatten()
        tensor([2., 2., 2.])
    """
    chosen = torch.multinomial(weights.T, number, replacement=True).T
    return z[chosen, torch.arange(z.shape[1], device=chosen.device)]


def _completed(vae: VAE, rows: Rows, z: Tensor) -> _Component:
    """The guide at rows whose missing values are drawn given latents ``(copy, datum, latent)``."""
    drawn = vae.likelihood(z, rows).sample()
    x = drawn if rows.mask is None else torch.where(rows.mask, rows.x, drawn)
    context = None if rows.context is None else rows.context.repeat(COMPLETED, 1)
    return _Component(vae.posterior(Rows(x.flatten(0, 1), context)), COMPLETED, SHARES["completed"])


def _fitted(vae: VAE, rows: Rows, z: Tensor, weights: Tensor) -> list[_Component]:
    """A Student-t with the mean and covariance of weighted latents; none where latents are not any numbers."""
    if not isinstance(support_of(vae.prior(*rows.given)), type(constraints.real)):
        return []
    own, z = z, z.double()
    mean = torch.einsum("kd,kdl->dl", weights, z)
    apart = z - mean
    covariance = torch.einsum("kd,kdl,kdm->dlm", weights, apart, apart)
    size = z.shape[-1]
    wide = covariance.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(own.dtype).tiny
    # Few effective draws tell little of a covariance: the fewer, the more of it is of one variance for all latents.
    known = (1 - (size + 1) * weights.square().sum(0)).clamp(0.0, 1 - RIDGE).view(-1, 1, 1)
    identity = torch.eye(size, dtype=z.dtype, device=z.device)
    covariance = known * covariance + (1 - known) * wide.view(-1, 1, 1) * identity
    factor = torch.linalg.cholesky(covariance)
    df = torch.full_like(wide, DF)
    q = dist.MultivariateStudentT(df.to(own), mean.to(own), factor.to(own))
    return [_Component(q, 1, SHARES["fitted"])]
