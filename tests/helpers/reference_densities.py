"""Log-densities of priors and posteriors, written out in plain torch, and Newton's steps of a refined posterior."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


def normal(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return (-0.5 * ((z - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)


def standard_normal(z: Tensor) -> Tensor:
    return -0.5 * (z**2).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def laplace(z: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    return (-(z - loc).abs() / log_scale.exp() - log_scale - math.log(2)).sum(-1)


def student_t(z: Tensor, loc: Tensor, log_scale: Tensor, *, df: float) -> Tensor:
    constant = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi * df)
    square = ((z - loc) / log_scale.exp()) ** 2
    return (constant - (df + 1) / 2 * (1 + square / df).log() - log_scale).sum(-1)


def mixture(z: Tensor, logits: Tensor, locs: Tensor, log_scales: Tensor) -> Tensor:
    """Σ_k π_k N(z | m_k, diag s_k²); locations and scales of shape (…, k, latent)."""
    weights = logits.exp() / logits.exp().sum(-1)
    parts = [normal(z, locs[..., k, :], log_scales[..., k, :]).exp() for k in range(len(logits))]
    return sum(weight * part for weight, part in zip(weights, parts, strict=True)).log()


def gumbel_softmax(z: Tensor, logits: Tensor, categories: int, temperature: float) -> Tensor:
    """Maddison et al. (2017), equation (10), at the shares of log-ratios z, with the Jacobian of these shares."""
    total = 0
    for i in range(logits.shape[-2]):
        y = z[..., i * (categories - 1) : (i + 1) * (categories - 1)]
        exp = torch.cat([y.exp(), torch.ones_like(y[..., :1])], -1)
        shares, alpha = exp / exp.sum(-1, keepdim=True), logits[..., i, :].exp()
        each = alpha * shares ** (-temperature - 1)
        below = (alpha * shares**-temperature).sum(-1) ** categories
        density = math.factorial(categories - 1) * temperature ** (categories - 1) * each.prod(-1) / below
        total = total + density.log() + shares.log().sum(-1)
    return total


@dataclass(frozen=True)
class Row:
    """A prior of the library: its log-density here, of z and of these parameters, and the settings it is made with."""

    log_density: Callable[..., Tensor]
    parameters: tuple[str, ...]
    settings: dict[str, Any]


def row(log_density: Callable[..., Tensor], *parameters: str, **settings: Any) -> Row:
    return Row(log_density, parameters, settings)


PRIORS = {
    "StandardNormal": row(standard_normal),
    "Normal": row(normal, "loc", "log_scale"),
    "Laplace": row(laplace, "loc", "log_scale"),
    "StudentT": row(partial(student_t, df=12.0), "loc", "log_scale", df=12.0),
    "GaussianMixture": row(mixture, "logits", "loc", "log_scale", components=3),
}
"""A row per prior that is made of a number of latents; the others are made in the tests."""


def multivariate_normal(z: Tensor, loc: Tensor, covariance: Tensor) -> Tensor:
    apart = z - loc
    square = (apart.unsqueeze(-2) @ covariance.inverse() @ apart.unsqueeze(-1)).squeeze(-1).squeeze(-1)
    return -0.5 * (square + covariance.det().log() + z.shape[-1] * math.log(2 * math.pi))


def full_normal(z: Tensor, numbers: Tensor, size: int) -> Tensor:
    """N(z | μ, L Lᵀ), of the numbers μ, log L_jj, and the rows of L below its diagonal."""
    rows, place = [], 2 * size
    for i in range(size):
        row = [numbers[..., place + j] for j in range(i)]
        row.append(numbers[..., size + i].exp())
        rows.append(torch.stack([*row, *[0 * row[-1]] * (size - 1 - i)], -1))
        place += i
    factor = torch.stack(rows, -2)
    return multivariate_normal(z, numbers[..., :size], factor @ factor.transpose(-1, -2))


def low_rank_normal(z: Tensor, numbers: Tensor, size: int, rank: int) -> Tensor:
    """N(z | μ, W Wᵀ + diag σ²), of the numbers μ, log σ, and the rows of W."""
    w = torch.stack([numbers[..., 2 * size + i * rank : 2 * size + (i + 1) * rank] for i in range(size)], -2)
    diagonal = torch.diag_embed(numbers[..., size : 2 * size].exp() ** 2)
    return multivariate_normal(z, numbers[..., :size], w @ w.transpose(-1, -2) + diagonal)


def change_of_variables(z: Tensor, to_base) -> Tensor:
    """log N(f(z) | 0, I) + log |det ∂f/∂z|, the Jacobian by automatic differentiation, of one z."""
    jacobian = torch.autograd.functional.jacobian(to_base, z, create_graph=True)
    return standard_normal(to_base(z)) + jacobian.det().abs().log()


def refined(x: Tensor, weight: Tensor, bias: Tensor, noise: float, loc: Tensor, log_scale: Tensor, *, steps, rate):
    """Newton's steps on the exact ELBO of x ~ N(W z + b, s² I), z ~ N(0, I), each taken where it does not fall.

    With precision A = I + WᵀW / s², the ELBO is -μᵀAμ/2 + μᵀWᵀ(x - b)/s² - Σ A_jj σ_j²/2 + Σ log σ_j but for a
    constant, so ∂_μ = Wᵀ(x - b)/s² - Aμ and h = σ_j² A_jj.
    """
    precision = torch.eye(weight.shape[1]).to(x) + weight.T @ weight / noise**2
    pull, diagonal = (x - bias) @ weight / noise**2, precision.diagonal()

    def value(m, log_s):
        spread = (log_s - 0.5 * diagonal * (2 * log_s).exp()).sum(-1)
        return (m * pull).sum(-1) - 0.5 * ((m @ precision) * m).sum(-1) + spread

    rate = torch.full_like(loc[:, :1], rate)
    for _ in range(steps):
        h = (diagonal * (2 * log_scale).exp()).clamp(min=0.1)
        up = loc + rate * (2 * log_scale).exp() / h * (pull - loc @ precision)
        down = log_scale - rate * h.log() / 2
        better = (value(up, down) > value(loc, log_scale)).unsqueeze(-1)
        loc, log_scale = torch.where(better, up, loc), torch.where(better, down, log_scale)
        rate = torch.where(better, rate, rate / 2)
    return loc, log_scale
