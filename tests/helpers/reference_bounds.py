"""Every estimator and objective from its paper, in plain torch: nothing here is of the package.

An estimator is its value and what it multiplies three gradients with, particle by particle and datum by datum:

    by Θ   Σ_k theta_k ∂ log p(x, z_k) / ∂Θ
    by φ   Σ_k score_k ∂ log q(z_k | x) / ∂φ  +  Σ_k path_k (∂ log w_k / ∂z_k) ∂z_k / ∂φ

with log w = log p(x | z) + t (log p(z) - log q(z | x)), the score at fixed z and the path at fixed φ.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reference:
    """A value of shape (batch,) and coefficients of shape (K, batch).

    With ``closed_kl`` the coefficients are those of log p(x | z) alone, and t KL is taken away.
    """

    value: Tensor
    theta: Tensor
    score: Tensor
    path: Tensor
    closed_kl: bool = False


def log_mean_exp(log: Tensor) -> Tensor:
    return torch.logsumexp(log, 0) - math.log(log.shape[0])


def elbo(log_w, t):
    """Kingma & Welling (2013)."""
    each = torch.full_like(log_w, 1 / len(log_w))
    return Reference(log_w.mean(0), each, -t * each, each)


def stl(log_w, t):
    """Roeder et al. (2017): without the score."""
    each = torch.full_like(log_w, 1 / len(log_w))
    return Reference(log_w.mean(0), each, 0 * each, each)


def analytic(log_w, t):
    """Kingma & Welling (2013), with the KL in closed form; the value is formed where the KL is."""
    each = torch.full_like(log_w, 1 / len(log_w))
    return Reference(log_w.mean(0), each, 0 * each, each, closed_kl=True)


def iwae(log_w, t):
    """Burda et al. (2015)."""
    share = log_w.exp() / log_w.exp().sum(0)
    return Reference(log_mean_exp(log_w), share, -t * share, share)


def dreg(log_w, t):
    """Tucker et al. (2018); with t = 1 the path has the squares of the shares."""
    share = log_w.exp() / log_w.exp().sum(0)
    return Reference(log_mean_exp(log_w), share, 0 * share, (1 - t) * share + t * share**2)


def iwae_stl(log_w, t):
    """Tucker et al. (2018), section 5: the score is left out, wrongly."""
    share = log_w.exp() / log_w.exp().sum(0)
    return Reference(log_mean_exp(log_w), share, 0 * share, share)


def renyi(log_w, t, alpha):
    """Li & Turner (2016)."""
    if alpha == 1:
        return elbo(log_w, t)
    if math.isinf(alpha):
        best = log_w.max(0) if alpha < 0 else log_w.min(0)
        share = torch.zeros_like(log_w).scatter(0, best.indices.unsqueeze(0), 1.0)
        return Reference(best.values, share, -t * share, share)
    power = ((1 - alpha) * log_w).exp()
    share = power / power.sum(0)
    return Reference(power.mean(0).log() / (1 - alpha), share, -t * share, share)


def grouped(log_w, groups):
    """The mean over groups of the bound of each (particle k is of group k mod M), and each particle's weight in it."""
    value, weight = torch.zeros_like(log_w[0]), torch.zeros_like(log_w)
    for g in range(groups):
        of_group = iwae(log_w[g::groups], 1.0)
        value = value + of_group.value / groups
        weight[g::groups] = of_group.theta / groups
    return value, weight


def miwae(log_w, t, groups):
    """Rainforth et al. (2018)."""
    value, weight = grouped(log_w, groups)
    return Reference(value, weight, -t * weight, weight)


def ciwae(log_w, t, mix):
    """Rainforth et al. (2018)."""
    one, other = elbo(log_w, t), iwae(log_w, t)

    def mixed(part):
        return mix * getattr(one, part) + (1 - mix) * getattr(other, part)

    return Reference(*(mixed(part) for part in ("value", "theta", "score", "path")))


def piwae(log_w, t, groups):
    """Rainforth et al. (2018): Θ by IWAE, φ by MIWAE."""
    whole, (_, weight) = iwae(log_w, t), grouped(log_w, groups)
    return Reference(whole.value, whole.theta, -t * weight, weight)


def score_function(log_w, t):
    """Williams (1992), Kool et al. (2019): each particle against the mean of the others."""
    k = len(log_w)
    advantage = torch.stack([log_w[i] - torch.cat([log_w[:i], log_w[i + 1 :]]).mean(0) for i in range(k)])
    return Reference(log_w.mean(0), torch.full_like(log_w, 1 / k), advantage / k, 0 * log_w)


def vimco(log_w, t):
    """Mnih & Rezende (2016), equation (7): the geometric mean of the others stands in for each weight."""
    share, value, signals = log_w.exp() / log_w.exp().sum(0), log_mean_exp(log_w), []
    for i in range(len(log_w)):
        others = torch.cat([log_w[:i], log_w[i + 1 :]])
        signals.append(value - log_mean_exp(torch.cat([others, others.mean(0, keepdim=True)])))
    return Reference(value, share, torch.stack(signals) - t * share, 0 * share)


def thermodynamic(log_w, t, partitions, first):
    """Masrani et al. (2019): E_β[∂f] + Cov_β(∂ log π_β, f), where log π_β = log q + β log w and f = log w."""
    between = [first ** (1 - i / (partitions - 1)) for i in range(partitions)] if partitions > 1 else [1.0]
    betas = [0.0, *between]
    value, theta, score = torch.zeros_like(log_w[0]), torch.zeros_like(log_w), torch.zeros_like(log_w)
    for beta, later in itertools.pairwise(betas):
        share = (beta * log_w).exp() / (beta * log_w).exp().sum(0)
        mean = (share * log_w).sum(0)
        centred = share * (log_w - mean)
        value = value + (later - beta) * mean
        theta = theta + (later - beta) * (share + beta * centred)
        score = score + (later - beta) * (centred - t * (share + beta * centred))
    return Reference(value, theta, score, 0 * theta)


@dataclass(frozen=True)
class Row:
    """An estimator of the library: its formula here, how many particles it takes, and the settings of both."""

    formula: Callable[..., Reference]
    particles: int
    settings: dict[str, float]

    def __call__(self, log_w: Tensor, t: float) -> Reference:
        return self.formula(log_w, t, **self.settings)


def row(formula: Callable[..., Reference], particles: int = 3, **settings: float) -> Row:
    return Row(formula, particles, settings)


ESTIMATORS = {
    "ELBO": row(elbo),
    "STL": row(stl),
    "AnalyticKL": row(analytic),
    "IWAE": row(iwae),
    "DReG": row(dreg),
    "IWAESTL": row(iwae_stl),
    "Renyi": row(renyi, alpha=0.5),
    "Renyi, above 1": row(renyi, alpha=2.0),
    "Renyi, the largest": row(renyi, alpha=-math.inf),
    "MIWAE": row(miwae, 4, groups=2),
    "CIWAE": row(ciwae, mix=0.3),
    "PIWAE": row(piwae, 4, groups=2),
    "ScoreFunction": row(score_function),
    "VIMCO": row(vimco),
    "Thermodynamic": row(thermodynamic, 4, partitions=3, first=0.03),
}
"""A row per estimator: the class before the comma, and what the words after it say of the settings."""


def normal_log_prob(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Of each number by itself."""
    return -0.5 * ((z - loc) / scale) ** 2 - torch.log(scale + 0 * z) - 0.5 * math.log(2 * math.pi)


def normal_kl(q, p) -> Tensor:
    """Of each latent, from (loc, scale) of q and of p."""
    (m, s), (loc, scale) = q, p
    return torch.log(scale / s) + (s**2 + (m - loc) ** 2) / (2 * scale**2) - 0.5


def fixed(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in parameters.items()}


def surrogate(formula, program, latents, theta, phi, t):
    """The value of an estimator, shape (batch,), with its gradient by Θ and φ.

    Args:
        program: with ``log_likelihood(latents, theta)``, ``log_prior(latents, theta)``, ``log_q(latents, phi)``
            and, for one latent, ``kl(theta, phi)``, of shape (K, batch) and the last (batch,).
        latents: as functions of φ.
    """
    at = [z.detach() for z in latents]
    ll, prior, q = program.log_likelihood(at, theta), program.log_prior(at, theta), program.log_q(at, phi)
    found = formula((ll + t * (prior - q)).detach(), t)
    along = program.log_likelihood(latents, fixed(theta))
    if found.closed_kl:
        kl = program.kl(theta, phi)
        moving = (found.theta * ll + found.path * along).sum(0) - t * kl
        return (ll.mean(0) - t * kl).detach() + moving - moving.detach()
    along = along + t * (program.log_prior(latents, fixed(theta)) - program.log_q(latents, fixed(phi)))
    moving = (found.theta * (ll + t * prior) + found.score * q + found.path * along).sum(0)
    return found.value + moving - moving.detach()


def free_bits(kls, nats):
    """Kingma et al. (2016), appendix C.8: what the mean KL of each latent lacks; kls of shape (..., latent)."""
    return sum(torch.clamp(nats - kl.flatten(0, -2).mean(0), min=0).sum() for kl in kls)


def total_correlation(z, loc, scale, size):
    """Chen et al. (2018), by datum: each z under the q of every datum of the batch, of ``size`` data in all."""
    m, found = len(z), []
    for i in range(m):
        each = torch.stack([normal_log_prob(z[i], loc[j], scale[j]) for j in range(m)])
        log_nm = math.log(size * m)
        joint = torch.logsumexp(each.sum(-1), 0) - log_nm
        found.append(joint - sum(torch.logsumexp(each[:, l], 0) - log_nm for l in range(z.shape[-1])))  # noqa: E741
    return torch.stack(found)


def squared_mmd(first, second):
    """Gretton et al. (2012), lemma 6, with the kernel exp(-‖a - b‖² / d)."""
    m, d = first.shape

    def k(a, b):
        return torch.exp(-((a - b) ** 2).sum() / d)

    within = sum(k(s[i], s[j]) for s in (first, second) for i in range(m) for j in range(m) if i != j)
    return within / (m * (m - 1)) - 2 * sum(k(a, b) for a in first for b in second) / m**2
