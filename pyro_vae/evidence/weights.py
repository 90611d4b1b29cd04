"""Log-means of plain and Pareto-smoothed weights, with standard errors, tail shapes and biases."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_vae.core.pair import Amortized
from pyro_vae.core.progress import Ticks
from pyro_vae.core.rows import Rows
from pyro_vae.elbo import log_weights
from pyro_vae.errors import SettingsError
from pyro_vae.evidence.psis import BAD, GOOD, LEAST, psis, tail_length

Estimates: TypeAlias = dict[str, Tensor]
"""Named estimates for each datum, shape ``(datum, …)``."""


@dataclass(frozen=True)
class Plan:
    """The settings of an estimate of the evidence.

    Args:
        num_particles: the number of weights per datum.
        temperatures: the number of steps along a path.
        leapfrog: the largest number of leapfrog steps of a Hamiltonian move.
        tick: a function that is called after each unit of work.
    """

    num_particles: int
    temperatures: int
    leapfrog: int
    tick: Ticks


def log_mean(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the mean weight of each datum, and its standard error.

    .. math:: \\log \\frac1K \\sum_k w_k, \\qquad \\mathrm{se} \\approx \\frac{\\mathrm{sd}(w)}{\\bar w \\sqrt K}

    Args:
        log_weights: shape ``(K, datum)``, K at least 2.

    Returns:
        Two tensors of shape ``(datum,)``, in nats.

    Example:
        >>> value, error = log_mean(torch.tensor([[1.0], [3.0]]).log())
        >>> round(value.exp().item(), 4), round(error.item(), 4)
        (2.0, 0.5)
    """
    value = log_weights.logsumexp(0) - math.log(len(log_weights))
    return value, (log_weights - value).exp().std(0) / math.sqrt(len(log_weights))


def estimate_log_mean(log_weights: Tensor) -> Estimates:
    """Estimate log p(x) by the log of the mean weight, with standard error, tail shape and bias.

    Args:
        log_weights: independent log-weights, shape ``(K, datum)``, K at least 2.

    Returns:
        ``log_evidence``, ``mcse``, ``khat`` (NaN below 25 weights), ``bias`` and ``bias_se``, shape ``(datum,)``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> found = estimate_log_mean(torch.randn(100, 3).double())
        >>> list(found), bool((found["bias"] < 0).all())
        (['log_evidence', 'mcse', 'khat', 'bias', 'bias_se'], True)
    """
    value, error = log_mean(log_weights)
    khat = tail_shape(log_weights)
    bias, bias_error = bias_of_log_mean(log_weights, khat)
    return {"log_evidence": value, "mcse": error, "khat": khat, "bias": bias, "bias_se": bias_error}


def tail_shape(log_weights: Tensor) -> Tensor:
    """Estimate k̂ of each datum; NaN if there are too few weights for a tail.

    Example:
        >>> tail_shape(torch.zeros(24, 1)), tail_shape(torch.zeros(25, 1))
        (tensor([nan], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    """
    if len(log_weights) < LEAST:
        return log_weights.new_full(log_weights.shape[1:], torch.nan, dtype=torch.float64)
    return torch.as_tensor(psis(log_weights)[1], device=log_weights.device)


def bias_of_log_mean(log_weights: Tensor, khat: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the bias of the log of the mean weight by the jackknife.

    Each weight is left out once. The jackknife difference has expectation
    ``(K - 1) (bias with K - 1 weights - bias with K)``. If the bias falls as :math:`K^{-a}`, this is a times the bias:

    .. math:: \\mathrm{bias} = \\frac{K - 1}{a} \\Big[\\frac1K \\sum_k \\log \\bar w_{-k} - \\log \\bar w\\Big],
        \\qquad a = \\min(1, 1 / \\hat k - 1)

    Weights with a tail shape k above ½ have infinite variance, and their mean converges at the rate of a stable
    distribution, with ``a = 1/k - 1``. k̂ is clipped at 0.7; above it, a cannot be estimated and the bias is
    underestimated.

    Args:
        log_weights: independent log-weights, shape ``(K, datum)``, K at least 2.
        khat: the tail shape k̂, shape ``(datum,)``; NaN counts as 0.

    Returns:
        The bias, which is negative, and its standard error (by the delta method; too small if k̂ is above ¼), in
        nats, shape ``(datum,)``.

    References:
        | The Jackknife and Bootstrap (Shao & Tu, 1995), https://doi.org/10.1007/978-1-4612-0795-5

    Example:
        >>> log_weights = torch.tensor([[1.0], [3.0]]).double().log()
        >>> bias, _ = bias_of_log_mean(log_weights, torch.zeros(1))
        >>> bool(abs(bias - (torch.tensor(3.0).double().log() / 2 - torch.tensor(2.0).double().log())) < 1e-12)
        True
    """
    number = len(log_weights)
    weights = torch.softmax(log_weights, 0)
    log_rest = torch.log1p(-weights)  # log of the sum without each weight, relative to the sum of all weights
    largest = log_weights.argmax(0, keepdim=True)
    others = log_weights.scatter(0, largest, -torch.inf).logsumexp(0, keepdim=True) - log_weights.logsumexp(0)
    log_rest = log_rest.scatter(0, largest, others)  # log1p could round it to minus infinity
    jackknife = (number - 1) * (log_rest.mean(0) - math.log1p(-1 / number))
    power = 1 / khat.nan_to_num(0.0).clamp(GOOD, BAD) - 1
    relative = number * weights
    square = (relative**2).mean(0)
    influence = relative**2 - 2 * square * relative
    return jackknife / power, influence.std(0) / (2 * number**1.5) / power


def smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smooth the log-weights of each datum without normalizing them, and estimate k̂.

    If the largest weights agree to within 0.1 %, there is no tail: they are returned unchanged, with k̂ = 0.

    Args:
        log_weights: shape ``(K, datum)``, K at least 25.

    Returns:
        Smoothed log-weights of the same shape, and k̂ of shape ``(datum,)``.

    Raises:
        SettingsError: if there are too few particles for a tail.

    References:
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> _ = torch.manual_seed(0)
        >>> log_weights = torch.randn(100, 2).double()
        >>> same = smoothed(log_weights)[0].sort(0).values[:50] - log_weights.sort(0).values[:50]
        >>> bool(same.abs().max() < 1e-12)
        True
    """
    if len(log_weights) < LEAST:
        raise SettingsError(f"num_particles is {len(log_weights)}; a Pareto tail needs at least {LEAST}")
    array, khat = psis(log_weights)
    normalized = torch.as_tensor(np.ascontiguousarray(array.T)).to(log_weights)
    below = len(log_weights) - tail_length(len(log_weights)) - 1
    # Smoothing keeps ranks and changes only the upper tail, so weights below it show the normalizing constant.
    constant = log_weights.sort(0).values[below] - normalized.sort(0).values[below]
    return normalized + constant, torch.as_tensor(khat).to(log_weights)


def guide_log_weights(vae: Amortized, rows: Rows, num_particles: int) -> Tensor:
    """Return the log-weights of draws from the guide in double precision, shape ``(K, datum)``.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> guide_log_weights(vae, Rows(torch.ones(3, 5)), 4).shape
        torch.Size([4, 3])
    """
    return log_weights(vae.model, vae.guide, *rows.arguments(), num_particles=num_particles).double()


def importance_weighted(vae: Amortized, rows: Rows, plan: Plan) -> Estimates:
    """Estimate log p(x) by the log of the mean importance weight.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> list(importance_weighted(vae, Rows(torch.ones(3, 5)), Plan(4, 1, 1, lambda: None)))
        ['log_evidence', 'mcse', 'khat', 'bias', 'bias_se']
    """
    estimates = estimate_log_mean(guide_log_weights(vae, rows, plan.num_particles))
    plan.tick()
    return estimates


def pareto_smoothed(vae: Amortized, rows: Rows, plan: Plan) -> Estimates:
    """Estimate log p(x) by the log of the mean of the smoothed weights.

    The bias from smoothing is estimated by the difference to the plain mean of the same weights; its standard error is
    taken to be as large as the difference.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> list(pareto_smoothed(vae, Rows(torch.ones(3, 5)), Plan(40, 1, 1, lambda: None)))
        ['log_evidence', 'mcse', 'khat', 'bias', 'bias_se']
    """
    weights = guide_log_weights(vae, rows, plan.num_particles)
    smooth, khat = smoothed(weights)
    value, error = log_mean(smooth)
    smoothing_bias = value - log_mean(weights)[0]
    bias, bias_error = bias_of_log_mean(weights, khat)
    plan.tick()
    return {
        "log_evidence": value,
        "mcse": error,
        "khat": khat,
        "bias": bias + smoothing_bias,
        "bias_se": torch.hypot(bias_error, smoothing_bias),
    }
