"""Estimators of the evidence lower bound, from their papers.

Each takes a :class:`Model` and returns, per datum, its value and two surrogates: what it differentiates by Θ and what
it differentiates by φ. Where these differ from the value, the paper's gradient is written out.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from helpers.reference_models import Model, frozen, normal

Bound = tuple[Tensor, Tensor, Tensor]
Estimator = Callable[[Model], Bound]


def loss_and_gradients(estimator: Estimator, model: Model) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Minus the bound, summed over data and times n/m, and its gradients by Θ and by φ."""
    value, by_theta, by_phi = (-model.scale * part.sum() for part in estimator(model))

    def gradient(of: Tensor, by: dict[str, Tensor]) -> dict[str, Tensor]:
        found = torch.autograd.grad(of, list(by.values()), retain_graph=True, materialize_grads=True)
        return dict(zip(by, found, strict=True))

    return value.detach(), gradient(by_theta, model.theta), gradient(by_phi, model.phi)


def share(log_w: Tensor) -> Tensor:
    """Normalised weights, as constants."""
    w = (log_w - log_w.amax(0)).exp().detach()
    return w / w.sum(0)


def log_mean(log_w: Tensor) -> Tensor:
    return log_w.exp().mean(0).log()


def elbo(m: Model) -> Bound:
    """Kingma & Welling (2013): the mean of log w, differentiated through the draws."""
    bound = m.log_w(m.z, m.phi).mean(0)
    return bound, bound, bound


def sticking(m: Model) -> Bound:
    """Roeder et al. (2017): by φ only through z."""
    bound, _, _ = elbo(m)
    return bound, bound, m.log_w(m.z, frozen(m.phi)).mean(0)


def analytic(m: Model) -> Bound:
    """Kingma & Welling (2013), equation (10): the KL in closed form."""
    (kl,) = m.kl(m.theta, m.phi, m.z)
    bound = m.likelihood(m.theta, m.z).mean(0) - m.beta * kl.sum(-1)
    return bound, bound, bound


def iwae(m: Model) -> Bound:
    """Burda et al. (2015): the gradients of log w, weighted by the normalised weights."""
    log_w = m.log_w(m.z, m.phi)
    surrogate = (share(log_w) * log_w).sum(0)
    return log_mean(log_w), surrogate, surrogate


def dreg(m: Model) -> Bound:
    """Tucker et al. (2018); with β the score counts β times, so its share w̃ - β w̃ (1 - w̃)."""
    log_w, path = m.log_w(m.z, m.phi), m.log_w(m.z, frozen(m.phi))
    w = share(log_w)
    return log_mean(log_w), (w * log_w).sum(0), ((w - m.beta * w * (1 - w)) * path).sum(0)


def iwae_sticking(m: Model) -> Bound:
    """Tucker et al. (2018), section 5: IWAE's gradient without its score."""
    log_w, path = m.log_w(m.z, m.phi), m.log_w(m.z, frozen(m.phi))
    return log_mean(log_w), (share(log_w) * log_w).sum(0), (share(log_w) * path).sum(0)


def renyi(m: Model, *, alpha: float) -> Bound:
    """Li & Turner (2016): weights w^(1 - α), normalised; at ±∞ one particle's alone."""
    log_w = m.log_w(m.z, m.phi)
    if alpha == 1:
        return elbo(m)
    if math.isinf(alpha):
        bound = torch.stack([column.min() if alpha > 0 else column.max() for column in log_w.unbind(1)])
        return bound, bound, bound
    surrogate = (share((1 - alpha) * log_w) * log_w).sum(0)
    return (log_w.exp() ** (1 - alpha)).mean(0).log() / (1 - alpha), surrogate, surrogate


def miwae(m: Model, *, groups: int) -> Bound:
    """Rainforth et al. (2018), section 5: the mean of the bounds of groups; particle k is of group k mod M."""
    log_w = m.log_w(m.z, m.phi)
    bound = sum(log_mean(log_w[g::groups]) for g in range(groups)) / groups
    return bound, bound, bound


def ciwae(m: Model, *, mix: float) -> Bound:
    """Rainforth et al. (2018), section 5: β ELBO + (1 - β) IWAE."""
    one, other = elbo(m), iwae(m)
    return tuple(mix * a + (1 - mix) * b for a, b in zip(one, other, strict=True))


def piwae(m: Model, *, groups: int) -> Bound:
    """Rainforth et al. (2018), section 5: by Θ the gradient of IWAE, by φ that of MIWAE."""
    return (*iwae(m)[:2], miwae(m, groups=groups)[2])


def fixed(m: Model) -> tuple[Tensor, Tensor, Tensor]:
    """At draws that are constants: log w, log p(x, z) and log q(z|x), the last not weighted by β."""
    z = tuple(value.detach() for value in m.z)
    return m.log_w(z, m.phi), m.joint(z), m.posterior(m.phi, z)


def score_function(m: Model) -> Bound:
    """Kool et al. (2019): each particle's log w less the mean of the others', times the gradient of its log q."""
    log_w, joint, score = fixed(m)
    bar = log_w.detach()
    signal = torch.stack([bar[k] - _others(bar, k).mean(0) for k in range(len(bar))])
    return log_w.mean(0), joint.mean(0), (signal * score).mean(0)


def vimco(m: Model) -> Bound:
    """Mnih & Rezende (2016): the baseline has the geometric mean of the other weights."""
    log_w, joint, score = fixed(m)
    w, total = log_w.detach().exp(), 0
    for k in range(len(w)):
        geometric = _others(w, k).prod(0) ** (1 / (len(w) - 1))
        without = ((_others(w, k).sum(0) + geometric) / len(w)).log()
        total = total + (w.mean(0).log() - without) * score[k]
    return log_mean(log_w), (share(log_w) * joint).sum(0), total + (share(log_w) * log_w).sum(0)


def _others(values: Tensor, k: int) -> Tensor:
    return torch.cat([values[:k], values[k + 1 :]])


def thermodynamic(m: Model, *, partitions: int, first: float) -> Bound:
    """Masrani et al. (2019): E[∇f] + Cov[∇ log π_β, f], f = log w, by w^β."""
    log_w, joint, score = fixed(m)
    f, parts, steps = log_w.detach(), [0, 0, 0], max(partitions - 1, 1)
    for low, high in pairwise([0.0, *(first ** (1 - t / steps) for t in range(partitions - 1)), 1.0]):
        w = share(low * f)
        deviation = w * (f - (w * f).sum(0))  # Cov[g, f] = Σ w g (f - E f)
        by_theta = (w * joint + deviation * low * joint).sum(0)
        by_phi = (w * -m.beta * score + deviation * (1 - low * m.beta) * score).sum(0)
        terms = (w * f).sum(0), by_theta, by_phi
        parts = [part + (high - low) * term for part, term in zip(parts, terms, strict=True)]
    return tuple(parts)


def printed(m: Model) -> Bound:
    """The note's equation (26): squared errors without 1 / 2s², and the KL in closed form."""
    (kl,) = m.kl(m.theta, m.phi, m.z)
    bound = -m.squares(m.theta, m.z).mean(0) - kl.sum(-1)
    return bound, bound, bound


FORMULAS = {
    "ELBO": elbo, "STL": sticking, "AnalyticKL": analytic, "IWAE": iwae, "DReG": dreg, "IWAESTL": iwae_sticking,
    "Renyi": renyi, "MIWAE": miwae, "CIWAE": ciwae, "PIWAE": piwae, "ScoreFunction": score_function, "VIMCO": vimco,
    "Thermodynamic": thermodynamic,
}  # fmt: skip


def formula(of: object) -> Estimator:
    """That of an estimator of the package, by the name of its class and with its settings."""
    return partial(FORMULAS[type(of).__name__], **of.settings())


# --- Objectives around an estimator ---


def weighted(m: Model, *, inside: Estimator, beta: float) -> Bound:
    """Higgins et al. (2017): log p(z) - log q(z|x) counts β times."""
    return inside(replace(m, beta=beta * m.beta))


def missing_bits(m: Model, nats: float) -> Tensor:
    """What the batch's mean KL of each latent lacks of λ."""
    means = torch.cat([kl.flatten(0, -2).mean(0) for kl in m.kl(m.theta, m.phi, m.z)])
    return sum(nats - mean for mean in means if mean < nats)


def free_bits(m: Model, *, inside: Estimator, nats: float) -> Bound:
    """Kingma et al. (2016), appendix C.8: the batch's mean KL of each latent costs max(λ, KL) in the place of KL."""
    return tuple(part - m.beta * missing_bits(m, nats) for part in inside(m))


def total_correlation(m: Model, *, inside: Estimator, beta: float) -> Bound:
    """Chen et al. (2018): minibatch-weighted sampling of q(z) and of each q(z_j)."""
    (loc, scale), z = m.encoded(m.phi), m.z[0][0]
    density = torch.stack([normal(one, loc, scale).exp() for one in z])  # (of i, under l, latent)
    number = len(z) * (m.scale * len(z))
    joint, single = (density.prod(-1).sum(1) / number).log(), (density.sum(1) / number).log().sum(-1)
    return tuple(part - (beta - 1) * (joint - single) for part in inside(m))


def squared_mmd(first: Tensor, second: Tensor) -> Tensor:
    """Gretton et al. (2012), lemma 6, with the kernel exp(-‖a - b‖² / d)."""
    n, d = first.shape

    def kernels(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(-((x - y) ** 2).sum() / d).exp() for x in a for y in b]).sum()

    within = kernels(first, first) + kernels(second, second) - 2 * n  # less those of a point with itself
    return within / (n * (n - 1)) - 2 * kernels(first, second) / n**2


def info_vae(m: Model, *, inside: Estimator, alpha: float, weight: float, of_prior: Tensor) -> Bound:
    """Zhao et al. (2017)."""
    penalty = (alpha + weight - 1) * squared_mmd(m.z[0][0], of_prior)
    return tuple(part - penalty for part in inside(replace(m, beta=(1 - alpha) * m.beta)))


# --- Schedules ---


def linear(step: int, *, steps: int, start: float, end: float) -> float:
    """Bowman et al. (2016): a line that ends after ``steps``."""
    return end if step >= steps else (start * (steps - step) + end * step) / steps


def cyclical(step: int, *, steps: int, cycles: int, ramp: float, start: float, end: float) -> float:
    """Fu et al. (2019)."""
    position = (step * cycles / steps) % 1
    return end if step >= steps or position >= ramp else start + (end - start) * position / ramp
