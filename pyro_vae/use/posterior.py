"""Draw from p(z|x) by adaptive importance sampling, even if q(z|x) covers it badly, as when much of x is missing."""

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
"""The largest number of rounds of adaptation, and the number of completions of each datum in a round."""

PILOT, PER_LATENT = 200, 20
"""The number of draws of a round for each datum, and the number of further draws for each latent."""

ENOUGH, LATE, LESS = 0.25, 10, 0.1
"""The share of effective draws that ends the adaptation; from round LATE on, the share LESS is enough."""

SHARES = {"prior": 0.05, "guide": 0.15, "completed": 0.3, "fitted": 0.5}
"""The share of the draws from each component of the proposal."""

DF, RIDGE = 5.0, 1e-6
"""The degrees of freedom of the fitted Student-t, and the smallest ridge of its covariance, relative to its scale."""


@dataclass(frozen=True, eq=False)
class Weighted:
    """Draws of z with importance weights for p(z|x).

    Args:
        z: the draws, shape ``(draw, datum, latent)``.
        likelihood: p(x|z) at the draws, with missing values masked.
        weights: smoothed weights that sum to 1 over the draws of a datum, shape ``(draw, datum)``.
        khat: the Pareto shape k̂ of the tail of the weights, shape ``(datum,)``.
    """

    z: Tensor
    likelihood: Distribution
    weights: Tensor
    khat: Tensor

    @property
    def ess(self) -> Tensor:
        """The effective sample size, shape ``(datum,)``."""
        return 1 / self.weights.square().sum(0)


@dataclass(frozen=True, eq=False)
class _Component:
    """A component of the proposal: one or several distributions q(z) for each datum.

    Args:
        q: the distributions, batch shape ``(copies · datum,)``.
        copies: the number of distributions for each datum.
        share: the share of the draws from all copies together.
    """

    q: Distribution
    copies: int
    share: float

    def draw(self, number: int) -> Tensor:
        """Draw at least ``number`` times for each datum, equally from each copy, shape ``(draw, datum, latent)``."""
        z = self.q.sample((-(-number // self.copies),))
        return z.unflatten(1, (self.copies, -1)).flatten(0, 1)

    def log_prob(self, z: Tensor) -> Tensor:
        """Compute the log-density of the mixture of all copies, shape ``(draw, datum)``."""
        each = self.q.log_prob(z.repeat(1, self.copies, 1)).double()
        return each.unflatten(1, (self.copies, -1)).logsumexp(1) - math.log(self.copies)


def weighted_posterior(vae: VAE, rows: Rows, draws: int) -> Iterator[tuple[Tensor, Weighted]]:
    """Draw from p(z|x) by importance sampling, with a proposal that is adapted to each datum.

    .. math:: w_k \\propto \\frac{p(x_o, z_k)}{\\sum_j s_j q_j(z_k)}

    The guide was trained on complete x. If much of x is missing, it is too narrow and misplaced, and its importance
    weights have infinite variance. The proposal is therefore a mixture of the guide, the prior, the guide at x
    completed by draws of the missing values, and a Student-t with the mean and the covariance of the weighted draws so
    far. The last two components are adapted in rounds. In each round the weights are tempered (raised to a power β
    below 1) as little as a quarter of effective draws needs; the adaptation ends when a quarter are effective without
    tempering (after ten rounds, a tenth). The draws of the final proposal come from its components in fixed shares and
    are weighted by the density of the whole mixture. The weights are Pareto-smoothed, unless the largest of K weights
    is at most 1 + log K times their mean; k̂ is then at most 0.

    Args:
        vae: a VAE.
        rows: on the VAE's device and in its precision.
        draws: the number of draws for each datum; slightly more are made, so that each component has its share.

    Yields:
        The indices of some of the rows, and their draws; each row is yielded once.

    Raises:
        ModelError: if all weights of a datum are 0, or one is not a number.

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
            ready, adapted = rows.take(is_ready), (z[:, is_ready], weights[:, is_ready])
            yield numbers[is_ready], _final(vae, ready, _adapt(vae, ready, *adapted), draws)
        if is_ready.all():
            return
        rows, numbers = rows.take(~is_ready), numbers[~is_ready]
        proposal = _adapt(vae, rows, z[:, ~is_ready], weights[:, ~is_ready])


def _unadapted(vae: VAE, rows: Rows) -> list[_Component]:
    """Return the guide, and the prior of each datum at its context."""
    prior = vae.prior(*rows.given)
    prior = prior if prior.batch_shape else prior.expand([len(rows)])
    return [_Component(vae.posterior(rows), 1, SHARES["guide"]), _Component(prior, 1, SHARES["prior"])]


def _adapt(vae: VAE, rows: Rows, z: Tensor, weights: Tensor) -> list[_Component]:
    """Return the proposal that is adapted to weighted draws of z."""
    completed = _complete(vae, rows, resampled(z, weights, COMPLETED))
    return [*_unadapted(vae, rows), completed, *_fit_student(vae, rows, z, weights)]


def _final(vae: VAE, rows: Rows, proposal: list[_Component], draws: int) -> Weighted:
    z, likelihood, log_weights = _weigh(vae, rows, proposal, draws)
    smooth, khat = smoothed(log_weights)
    is_light = _has_light_tail(log_weights)
    log_weights, khat = torch.where(is_light, log_weights, smooth), torch.where(is_light, khat.clamp(max=0), khat)
    return Weighted(z, likelihood, log_weights.softmax(0), khat)


def _has_light_tail(log_weights: Tensor) -> Tensor:
    """Return whether the largest weight of a datum is at most the largest of as many exponential draws.

    Where a component of the mixture begins to dominate, the weights have a kink. The k̂ of a Pareto tail fitted there
    is arbitrary, although all weights have the same order of magnitude.
    """
    most, number = log_weights.amax(0), len(log_weights)
    return most - log_weights.logsumexp(0) + math.log(number) < math.log(1 + math.log(number))


def _tempered(log_weights: Tensor) -> Tensor:
    """Return weights to the power of β, the largest β up to 1 that leaves enough draws effective.

    The tempered target lies between the proposal and the posterior.
    """
    low, high = log_weights.new_zeros(log_weights.shape[1:]), log_weights.new_ones(log_weights.shape[1:])
    power = high
    for _ in range(20):
        is_enough = _effective(power * log_weights) >= ENOUGH * len(log_weights)
        low, high = torch.where(is_enough, power, low), torch.where(is_enough, high, power)
        power = torch.where(low == 1, low, (low + high) / 2)
    return (low * log_weights).softmax(0)


def _effective(log_weights: Tensor) -> Tensor:
    """Return the effective sample size of each datum."""
    return 1 / log_weights.softmax(0).square().sum(0)


def _weigh(vae: VAE, rows: Rows, proposal: list[_Component], draws: int) -> tuple[Tensor, Distribution, Tensor]:
    """Draw from a mixture in the shares of its components, and return the draws, p(x|z) and the log-weights."""
    total = sum(part.share for part in proposal)
    drawn = [part.draw(math.ceil(draws * part.share / total)) for part in proposal]
    z = torch.cat(drawn)
    log_shares = [math.log(len(of_part) / len(z)) for of_part in drawn]
    log_mixture = torch.stack([part.log_prob(z) + share for part, share in zip(proposal, log_shares, strict=True)])
    likelihood = vae.likelihood(z, rows)
    log_joint = likelihood.log_prob(rows.x).double() + vae.prior(*rows.given).log_prob(z).double()
    log_weights = log_joint - log_mixture.logsumexp(0)
    if not log_weights.logsumexp(0).isfinite().all():
        raise ModelError(
            "the importance weights of a datum are all 0, or one is infinite or NaN; check the densities of the "
            "decoder, prior and encoder for it"
        )
    return z, likelihood, log_weights


def resampled(z: Tensor, weights: Tensor, number: int) -> Tensor:
    """Resample latents by their weights, with replacement, shape ``(number, datum, latent)``.

    Args:
        z: shape ``(draw, datum, latent)``.
        weights: shape ``(draw, datum)``.
        number: the number of draws for each datum.

    Example:
        >>> resampled(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[0.0], [1.0]]), 3).flatten()
        tensor([2., 2., 2.])
    """
    chosen = torch.multinomial(weights.T, number, replacement=True).T
    return z[chosen, torch.arange(z.shape[1], device=chosen.device)]


def _complete(vae: VAE, rows: Rows, z: Tensor) -> _Component:
    """Return the guide at rows whose missing values are drawn given latents ``(copy, datum, latent)``."""
    drawn = vae.likelihood(z, rows).sample()
    x = drawn if rows.mask is None else torch.where(rows.mask, rows.x, drawn)
    context = None if rows.context is None else rows.context.repeat(COMPLETED, 1)
    return _Component(vae.posterior(Rows(x.flatten(0, 1), context)), COMPLETED, SHARES["completed"])


def _fit_student(vae: VAE, rows: Rows, z: Tensor, weights: Tensor) -> list[_Component]:
    """Return a Student-t with the mean and covariance of weighted latents, or nothing if z is constrained."""
    if not isinstance(support_of(vae.prior(*rows.given)), type(constraints.real)):
        return []
    drawn, z = z, z.double()
    mean = torch.einsum("kd,kdl->dl", weights, z)
    deviation = z - mean
    covariance = torch.einsum("kd,kdl,kdm->dlm", weights, deviation, deviation)
    size = z.shape[-1]
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(-1) + torch.finfo(drawn.dtype).tiny
    # Shrink the covariance to a multiple of the identity, the more the fewer draws are effective.
    kept = (1 - (size + 1) * weights.square().sum(0)).clamp(0.0, 1 - RIDGE).view(-1, 1, 1)
    identity = torch.eye(size, dtype=z.dtype, device=z.device)
    covariance = kept * covariance + (1 - kept) * variance.view(-1, 1, 1) * identity
    factor = torch.linalg.cholesky(covariance)
    df = torch.full_like(variance, DF)
    q = dist.MultivariateStudentT(df.to(drawn), mean.to(drawn), factor.to(drawn))
    return [_Component(q, 1, SHARES["fitted"])]
