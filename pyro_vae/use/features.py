"""Moments and code probabilities of each feature under p(x|z), averaged over weighted draws of z."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.core.component import evaluating
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.likelihoods._distributions import Levels, LogisticLevels, Side
from pyro_vae.use.inputs import Found

CODES: tuple[Any, ...] = (Levels,)
"""Distributions of codes, whose mean is meaningless."""

SUMMED = (LogisticLevels,)
"""Distributions whose moments are sums over all levels, which are slower than draws."""


def parts_of(likelihood: Any) -> list[Any]:
    """List the distributions of the blocks of features, without masks.

    Example:
        >>> import pyro_vae as pv
        >>> [type(part).__name__ for part in parts_of(pv.likelihoods.Bernoulli(torch.nn.Identity())(torch.zeros(2)))]
        ['Bernoulli']
    """
    while isinstance(likelihood, Independent | dist.MaskedDistribution):
        likelihood = likelihood.base_dist
    if isinstance(likelihood, Side):
        return [inner for part in likelihood.parts for inner in parts_of(part)]
    return [likelihood]


def likelihood_of(vae: Amortized, rows: Rows) -> Any:
    """Return p(x|z) at one draw of z, to inspect its distributions; the state of the generator is preserved.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> likelihood_of(vae, Rows(torch.zeros(1, 5))).event_shape
        torch.Size([5])
    """
    with torch.random.fork_rng(devices=[rows.x.device] if rows.x.is_cuda else []), evaluating(vae, len(rows)):
        return vae.likelihood(vae.posterior(rows).sample(), rows)


def width_of(likelihood: Any) -> int:
    """Count the values that describe one datum given z: its features, times the levels of each.

    Example:
        >>> width_of(dist.Normal(torch.zeros(1, 5), 1.0).to_event(1))
        5
    """
    attributes = (value for part in parts_of(likelihood) for value in vars(part).values())
    return max([likelihood.event_shape.numel(), *(value.numel() for value in attributes if isinstance(value, Tensor))])


def moments(likelihood: Any, dims: int) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each feature given z, or a draw and 0 if they have no closed form.

    Args:
        likelihood: p(x|z) at draws of z.
        dims: the number of dimensions of the draws; the dimensions after them are flattened to one of features.

    Returns:
        Two tensors in double precision, of shape ``(*draws, feature)``. In both cases, averaging the first over draws
        of z estimates E[x], and its variance plus the average of the second estimates Var[x].

    Example:
        >>> mean, variance = moments(dist.Normal(torch.zeros(4, 3), 2.0).to_event(1), 1)
        >>> mean.shape, variance[0, 0].item()
        (torch.Size([4, 3]), 4.0)
    """
    found = [_moments(part) for part in parts_of(likelihood)]
    means, variances = zip(*((m.flatten(dims).double(), v.flatten(dims).double()) for m, v in found), strict=True)
    return torch.cat(means, -1), torch.cat(variances, -1)


def _moments(part: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(part, SUMMED):
        try:
            return part.mean, part.variance
        except (AttributeError, NotImplementedError):
            pass
    drawn = part.sample()
    return drawn, torch.zeros_like(drawn)


def codes_of(likelihood: Any, kinds: tuple[Any, ...], dims: int) -> list[tuple[slice, Tensor]]:
    """List the features that are codes: their slice, and the probability of each code, shape ``(*draws, n, codes)``.

    Example:
        >>> [(where, probabilities)] = codes_of(dist.Bernoulli(0.3 * torch.ones(2)), (dist.Bernoulli,), 0)
        >>> where, probabilities[0]
        (slice(0, 2, None), tensor([0.7000, 0.3000], dtype=torch.float64))
    """
    found, first = [], 0
    for part in parts_of(likelihood):
        size = (part.batch_shape + part.event_shape)[dims:].numel()
        if isinstance(part, kinds):
            probabilities = part.probs.double()
            if isinstance(part, dist.Bernoulli):
                probabilities = torch.stack([1 - probabilities, probabilities], -1)
            found.append((slice(first, first + size), probabilities.flatten(dims, -2)))
        first += size
    return found


def summarize(likelihood: Any, weights: Tensor, kinds: tuple[Any, ...] = CODES) -> Found:
    """Average each feature over weighted draws of z, with the Monte-Carlo error.

    .. math:: m = \\sum_k w_k m_k, \\quad s^2 = \\sum_k w_k [v_k + (m_k - m)^2], \\quad
        e^2 = \\frac{\\sum_k w_k^2 (m_k - m)^2}{1 - \\sum_k w_k^2}

    with :math:`m_k, v_k` the mean and the variance of x given z_k. For codes, m is the most probable code, s and e are
    NaN, and the probability of that code is returned with its error.

    Args:
        likelihood: p(x|z) at draws, batch shape ``(draw, datum)``.
        weights: weights that sum to 1 over the draws, shape ``(draw, datum)``.
        kinds: the distributions whose values are codes.

    Returns:
        ``x``, ``x_sd`` and ``x_mcse``, shape ``(datum, feature)``; with codes also ``x_probability`` and
        ``x_probability_mcse``, which are NaN for other features.

    Example:
        >>> found = summarize(dist.Normal(torch.tensor([[[1.0]], [[3.0]]]), 2.0).to_event(1), torch.full((2, 1), 0.5))
        >>> [round(found[name].item(), 4) for name in ("x", "x_sd", "x_mcse")]
        [2.0, 2.2361, 1.0]
    """
    weights = weights.double()
    mean, variance = moments(likelihood, 2)
    x, error, spread = _mean(mean, weights)
    within = (weights.unsqueeze(-1) * variance).sum(0)
    found = {"x": x, "x_sd": (within + spread).sqrt(), "x_mcse": error}
    codes = codes_of(likelihood, kinds, 2)
    if codes:
        found |= {name: torch.full_like(x, torch.nan) for name in ("x_probability", "x_probability_mcse")}
    for where, probabilities in codes:
        mean, error, _ = _mean(probabilities.flatten(2), weights)
        mean, error = (value.unflatten(1, probabilities.shape[2:]) for value in (mean, error))
        found["x_probability"][:, where], best = mean.max(-1)
        found["x_probability_mcse"][:, where] = error.gather(-1, best.unsqueeze(-1)).squeeze(-1)
        found["x"][:, where] = best.to(x.dtype)
        found["x_sd"][:, where] = found["x_mcse"][:, where] = torch.nan
    return found


def _mean(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weighted mean over draws, its Monte-Carlo error, and the variance."""
    weights = weights.unsqueeze(-1)
    mean = (weights * values).sum(0)
    square = (values - mean).square()
    free = 1 - weights.square().sum(0)
    error = ((weights.square() * square).sum(0) / free).sqrt()
    return mean, torch.where(free > 0, error, torch.inf), (weights * square).sum(0)
