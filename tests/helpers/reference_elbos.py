"""Estimators and objectives on whole models, from their papers.

Each takes a :class:`Model` and returns, per datum, its value and two surrogates: what it differentiates by Θ and what
it differentiates by φ. Where these differ from the value, the paper's gradient is written out.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from helpers.reference_bounds import Row
from helpers.reference_models import Model, frozen

Bound = tuple[Tensor, Tensor, Tensor]
Estimator = Callable[[Model], Bound]


def loss_and_gradients(estimator: Estimator, model: Model) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Minus the bound, summed over data and times n/m, and its gradients by Θ and by φ."""
    value, by_theta, by_phi = (-model.scale * part.sum() for part in estimator(model))

    def gradient(of: Tensor, by: dict[str, Tensor]) -> dict[str, Tensor]:
        found = torch.autograd.grad(of, list(by.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(by, found, strict=True))

    return value.detach(), gradient(by_theta, model.theta), gradient(by_phi, model.phi)


def estimator(m: Model, *, row: Row) -> Bound:
    """An estimator of :mod:`helpers.reference_bounds`, its coefficients times the densities that they multiply."""
    z, at = m.z, tuple(value.detach() for value in m.z)
    found = row(m.log_w(at, m.phi).detach(), m.beta)
    if found.closed_kl:
        (kl,) = m.kl(m.theta, m.phi, z)
        bound = (found.theta * m.likelihood(m.theta, z)).sum(0) - m.beta * kl.sum(-1)
        return bound, bound, bound
    by_phi = found.score * m.posterior(m.phi, at) + found.path * m.log_w(z, frozen(m.phi))
    return found.value, (found.theta * m.joint(at)).sum(0), by_phi.sum(0)


def printed(m: Model) -> Bound:
    """The note's equation (26): squared errors without 1 / 2s², and the KL in closed form."""
    (kl,) = m.kl(m.theta, m.phi, m.z)
    bound = -m.squares(m.theta, m.z).mean(0) - kl.sum(-1)
    return bound, bound, bound


# --- Objectives around an estimator ---


def weighted(m: Model, *, inside: Estimator, beta: float) -> Bound:
    """Higgins et al. (2017): log p(z) - log q(z|x) counts β times."""
    return inside(replace(m, beta=beta * m.beta))


def free_bits(m: Model, *, inside: Estimator, nats: float) -> Bound:
    """Kingma et al. (2016), appendix C.8: the batch's mean KL of each latent costs max(λ, KL) in the place of KL."""
    means = torch.cat([kl.flatten(0, -2).mean(0) for kl in m.kl(m.theta, m.phi, m.z)])
    extra = sum(nats - mean for mean in means if mean < nats)
    return tuple(part - m.beta * extra for part in inside(m))


def total_correlation(m: Model, *, inside: Estimator, beta: float) -> Bound:
    """Chen et al. (2018): minibatch-weighted sampling of q(z) and of each q(z_j)."""
    (loc, scale), z = m.encoded(m.phi), m.z[0][0]
    density = torch.stack([_normal_density(one, loc, scale) for one in z])  # (of i, under l, latent)
    number = len(z) * (m.scale * len(z))
    joint, single = (density.prod(-1).sum(1) / number).log(), (density.sum(1) / number).log().sum(-1)
    return tuple(part - (beta - 1) * (joint - single) for part in inside(m))


def _normal_density(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return (-(((x - loc) / scale) ** 2) / 2).exp() / (scale * math.sqrt(2 * math.pi))


def info_vae(m: Model, *, inside: Estimator, alpha: float, weight: float, of_prior: Tensor) -> Bound:
    """Zhao et al. (2017), with the unbiased estimate of the squared MMD of Gretton et al. (2012)."""
    z, n = m.z[0][0], len(of_prior)
    kernel = lambda a, b: (-((a - b) ** 2).sum() / len(a)).exp()  # noqa: E731
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = sum(kernel(z[i], z[j]) + kernel(of_prior[i], of_prior[j]) for i, j in pairs) / len(pairs)
    across = sum(kernel(a, b) for a in z for b in of_prior) / n**2
    penalty = (alpha + weight - 1) * (within - 2 * across)
    return tuple(part - penalty for part in inside(replace(m, beta=(1 - alpha) * m.beta)))


# --- Schedules ---


def linear(step: int, *, steps: int, start: float, end: float) -> float:
    """Bowman et al. (2016): a line that ends after ``steps``."""
    return end if step >= steps else (start * (steps - step) + end * step) / steps


def cyclical(step: int, *, steps: int, cycles: int, ramp: float, start: float, end: float) -> float:
    """Fu et al. (2019)."""
    position = (step * cycles / steps) % 1
    return end if step >= steps or position >= ramp else start + (end - start) * position / ramp
