"""Means of weights by their logarithms, plain and Pareto-smoothed."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from pyro_vae.core import VAE
from pyro_vae.diagnose.weights import LEAST, psis
from pyro_vae.elbo import log_weights
from pyro_vae.errors import SettingsError
from pyro_vae.progress import Ticks
from pyro_vae.rows import Rows

Found: TypeAlias = dict[str, Tensor]
"""What is had of each datum, by name, shape ``(datum, …)``."""


@dataclass(frozen=True)
class Plan:
    """How evidence is to be estimated.

    Args:
        num_particles: weights per datum.
        temperatures: distributions along a path, the last of them included.
        leapfrog: steps of a Hamiltonian move at most.
        tick: called after each piece of work.
    """

    num_particles: int
    temperatures: int
    leapfrog: int
    tick: Ticks


def log_mean(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the mean weight of each datum, and its standard error.

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


def smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed log-weights, not normalised, and k̂ of each datum.

    Where the largest are one number but for a thousandth there is no tail: they are left as they are, with k̂ = 0.

    Args:
        log_weights: shape ``(K, datum)``, K at least 25.

    Returns:
        Log-weights of the same shape, and k̂ of shape ``(datum,)``.

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
    normalised, khat = psis(log_weights)
    tail = torch.as_tensor(np.ascontiguousarray(normalised.T)).to(log_weights)
    below = len(log_weights) - len(log_weights) // 5 - 1
    # Smoothing keeps ranks and moves only the upper tail; what lies below it tells what normalising took away.
    taken = log_weights.sort(0).values[below] - tail.sort(0).values[below]
    return tail + taken, torch.as_tensor(khat).to(log_weights)


def guide_log_weights(vae: VAE, rows: Rows, num_particles: int) -> Tensor:
    """log w of draws from the guide, in double precision, shape ``(K, datum)``.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> guide_log_weights(vae, Rows(torch.ones(3, 5)), 4).shape
        torch.Size([4, 3])
    """
    return log_weights(vae.model, vae.guide, *rows.arguments(), num_particles=num_particles).double()


def importance_weighted(vae: VAE, rows: Rows, plan: Plan) -> Found:
    """log of the mean importance weight.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> list(importance_weighted(vae, Rows(torch.ones(3, 5)), Plan(4, 1, 1, lambda: None)))
        ['log_evidence', 'mcse']
    """
    value, error = log_mean(guide_log_weights(vae, rows, plan.num_particles))
    plan.tick()
    return {"log_evidence": value, "mcse": error}


def pareto_smoothed(vae: VAE, rows: Rows, plan: Plan) -> Found:
    """log of the mean of the smoothed weights, and the shape of their tail.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> list(pareto_smoothed(vae, Rows(torch.ones(3, 5)), Plan(40, 1, 1, lambda: None)))
        ['log_evidence', 'mcse', 'khat']
    """
    weights, khat = smoothed(guide_log_weights(vae, rows, plan.num_particles))
    value, error = log_mean(weights)
    plan.tick()
    return {"log_evidence": value, "mcse": error, "khat": khat}
