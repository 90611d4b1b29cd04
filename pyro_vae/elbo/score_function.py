"""Estimators with score-function gradients, for any guide, including discrete ones."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyro_vae.core.traces import Program
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.bounds import ELBO
from pyro_vae.elbo.copies import replace_gradient
from pyro_vae.elbo.estimator import Estimator, log_mean_exp
from pyro_vae.elbo.importance_weighted import IWAE, importance_weighted
from pyro_vae.elbo.log_weights import weigh
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import SettingsError

__all__ = ["VIMCO", "ScoreFunction", "Thermodynamic"]


class _Score(Estimator):
    """Base class of score-function estimators: detached latents and at least two particles."""

    least_particles = 2
    reweights_latents = True

    @takes_settings
    def __init__(self, num_particles: int = 2) -> None:
        super().__init__(num_particles)

    def weigh(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Weights:
        return weigh(model, guide, *args, num_particles=self.num_particles, detached=True, **kwargs)


class ScoreFunction(_Score):
    """The ELBO with the score-function gradient and a leave-one-out baseline; the guide may be discrete.

    .. math:: \\nabla_\\phi \\mathcal L_i = \\frac1K \\sum_k \\Bigl(\\log w_{ki} - \\frac1{K - 1} \\sum_{l \\ne k}
        \\log w_{li}\\Bigr) \\nabla_\\phi \\log q(z_{ki} | x_i)

    The gradient is unbiased, since the baseline of a particle does not depend on that particle.

    Args:
        num_particles: the number of particles K, at least 2.

    References:
        | Simple Statistical Gradient-Following Algorithms (Williams, 1992), https://doi.org/10.1007/BF00992696
        | Variational Inference for Monte Carlo Objectives (Mnih & Rezende, 2016), https://arxiv.org/abs/1602.06725
        | Buy 4 REINFORCE Samples, Get a Baseline for Free! (Kool et al., 2019),
          https://openreview.net/forum?id=r1lgTGL5DE

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5).as_vae()
        >>> ScoreFunction(4).differentiable_loss(vae.model, vae.guide, torch.ones(3, 5).double()).backward()
        >>> bool(max(p.grad.abs().max() for p in vae.guide.parameters()) < 1e-10)
        True
    """

    def bound(self, w: Weights) -> Tensor:
        log = w.log.detach()
        others = (log.sum(0) - log) / (len(log) - 1)
        return replace_gradient(log.mean(0), ((log - others) * w.score + w.joint).mean(0))

    def target(self) -> str:
        return "ELBO"

    def reference(self) -> Estimator:
        return ELBO(self.num_particles)


class VIMCO(_Score):
    """The importance-weighted bound with the score-function gradient and a leave-one-out baseline.

    .. math:: \\nabla_\\phi \\mathcal L_i^K = \\sum_k (\\hat{\\mathcal L}_i - \\hat{\\mathcal L}_i^{-k})
        \\nabla_\\phi \\log q(z_{ki} | x_i) + \\tilde w_{ki} \\nabla_\\phi \\log w_{ki}

    In :math:`\\hat{\\mathcal L}^{-k}`, weight k is replaced by the geometric mean of the other weights.

    Args:
        num_particles: the number of particles K, at least 2.

    References:
        | Variational Inference for Monte Carlo Objectives (Mnih & Rezende, 2016), https://arxiv.org/abs/1602.06725

    Example:
        >>> VIMCO(1)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: VIMCO: num_particles is 1; it must be a whole number of at least 2
    """

    def bound(self, w: Weights) -> Tensor:
        log = w.log.detach()
        value = log_mean_exp(log)
        signal = value - log_mean_exp(_replace_each(log))
        return replace_gradient(value, (signal * w.score).sum(0) + (log.softmax(0) * w.log).sum(0))

    def target(self) -> str:
        return importance_weighted(self.num_particles)

    def reference(self) -> Estimator:
        return IWAE(self.num_particles)


def _replace_each(log: Tensor) -> Tensor:
    """Replace each log-weight k in turn by the mean of the others; shape ``(l, k, batch)``."""
    others = (log.sum(0) - log) / (len(log) - 1)
    diagonal = torch.eye(len(log), dtype=torch.bool, device=log.device).unsqueeze(-1)
    return torch.where(diagonal, others.unsqueeze(0), log.unsqueeze(1))


class Thermodynamic(_Score):
    """The thermodynamic variational objective, a Riemann sum along the path from q to the posterior.

    .. math:: \\mathcal L_i = \\sum_{t=0}^{T-1} (\\beta_{t+1} - \\beta_t) \\, E_{\\pi_{\\beta_t}}[\\log w_i], \\qquad
        \\pi_\\beta \\propto q(z | x_i)^{1 - \\beta} p(x_i, z)^\\beta

    The expectations are estimated by self-normalized importance sampling from q, so with K particles the estimate is
    biased. Its limit lies between the ELBO (T = 1) and log p(x). The gradient is a covariance and needs no
    reparameterization.

    Args:
        num_particles: the number of particles K, at least 2.
        partitions: the number of partitions T, at least 1.
        first: β₁, between 0 and 1; the later β are spaced by equal ratios up to β_T = 1.

    Raises:
        SettingsError: if a setting is out of range.

    References:
        | The Thermodynamic Variational Objective (Masrani, Le & Wood, 2019), https://arxiv.org/abs/1907.00031

    Example:
        >>> Thermodynamic(8, partitions=3, first=0.01).betas
        (0.0, 0.01, 0.1, 1.0)
    """

    @takes_settings
    def __init__(self, num_particles: int = 8, *, partitions: int = 5, first: float = 0.03) -> None:
        super().__init__(num_particles)
        if not isinstance(partitions, int) or partitions < 1 or not 0 < first < 1:
            raise SettingsError(
                f"Thermodynamic: partitions is {partitions} and first {first}; "
                "partitions must be a whole number of at least 1, first between 0 and 1"
            )
        steps = partitions - 1
        later = (round(first ** (1 - t / steps), 12) for t in range(steps + 1)) if steps else (1.0,)
        self.betas = (0.0, *later)
        self.first = first

    def bound(self, w: Weights) -> Tensor:
        log = w.log.detach()
        value, surrogate = torch.zeros_like(log[0]), torch.zeros_like(log[0])
        for beta, following in pairwise(self.betas):
            share = (beta * log).softmax(0)
            mean = (share * log).sum(0)
            path = w.score + beta * w.log
            value = value + (following - beta) * mean
            surrogate = surrogate + (following - beta) * (share * ((log - mean) * path + w.log)).sum(0)
        return replace_gradient(value, surrogate)

    def settings(self) -> dict[str, Any]:
        return {"partitions": len(self.betas) - 1, "first": self.first}

    def target(self) -> str:
        return "ELBO" if len(self.betas) == 2 else super().target()
