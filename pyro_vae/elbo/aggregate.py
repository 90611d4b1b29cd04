"""Objectives with a penalty on the aggregate posterior q(z), estimated from the batch."""

import math
from typing import Any

from torch import Tensor

from pyro_vae.core.traces import Site, samples
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.copies import replace_gradient
from pyro_vae.elbo.estimator import Estimator
from pyro_vae.elbo.objectives import Objective, latent_factors
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import ModelError, SettingsError

__all__ = ["TCVAE", "InfoVAE"]


class TCVAE(Objective):
    """The β-TCVAE: the total correlation of the aggregate posterior weighted by β, for independent latents.

    .. math:: \\mathcal L_i - (\\beta - 1) \\Bigl(\\log q(z_i) - \\sum_j \\log q(z_{ij})\\Bigr), \\qquad
        q(z) \\approx \\frac1{nm} \\sum_{l \\in \\mathrm{batch}} q(z | x_l)

    The aggregate posterior is estimated from the minibatch by the weighted sampling of Chen et al., which is biased.
    The gradient of the penalty is reparameterized; for a discrete guide, it is the score-function gradient with the
    penalty of a second particle as its baseline.

    Args:
        elbo: the estimator, or its class; the penalty uses its first particle.
        beta: the weight β of the total correlation; 1 gives the estimator itself.

    Raises:
        ModelError: when called, unless there is one latent site whose latents are independent in the posterior.

    References:
        | Isolating Sources of Disentanglement in VAEs (Chen et al., 2018), https://arxiv.org/abs/1802.04942

    Example:
        >>> from pyro_vae.elbo import ELBO
        >>> TCVAE(ELBO(), beta=6.0)
        TCVAE(ELBO(1), beta=6)
    """

    couples_data = True

    neutral = ({"beta": 1.0},)

    @takes_settings
    def __init__(self, elbo: Estimator | type[Estimator], beta: float = 6.0) -> None:
        super().__init__(elbo)
        self.beta = float(beta)

    def settings(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def bound(self, w: Weights) -> Tensor:
        return self.elbo.bound(w) - (self.beta - 1) * _differentiable_total_correlation(w)


def _only_pair(w: Weights, objective: str) -> tuple[str, Site, Site]:
    pairs = [pair[:3] for pair in w.kl_pairs()]
    if len(pairs) != 1 or w.drawn[pairs[0][0]].dim() != 3:
        raise ModelError(f"{objective} takes one latent site of shape (datum, latent); there are {list(w.drawn)}")
    return pairs[0]


def _differentiable_total_correlation(w: Weights) -> Tensor:
    """The total correlation of the first particle, with a score-function gradient if the guide has no other.

    .. math:: \\nabla_\\phi E f(z_{1i}) = E \\bigl(f(z_{1i}) - f(z_{2i})\\bigr) \\nabla_\\phi \\log q(z_{1i} | x_i)
        + E \\partial_\\phi f(z_{1i})

    The second particle is the baseline. It does not depend on the first, so the gradient is unbiased.
    """
    value = total_correlation(w)
    if all(site["fn"].has_rsample for _, site in samples(w.guide_trace)):
        return value
    return replace_gradient(value, value + (value - total_correlation(w, particle=1)).detach() * w.score[0])


def total_correlation(w: Weights, *, particle: int = 0) -> Tensor:
    """Estimate ``log q(z_i) - Σ_j log q(z_ij)`` of one particle of each datum from the batch.

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 1), torch.zeros(5), 0.5).as_vae(diagonal=True)
        >>> w = pv.elbo.ELBO().weigh(vae.model, vae.guide, torch.randn(7, 5))
        >>> bool(total_correlation(w).abs().max() < 1e-5)  # zero for one latent
        True
    """
    name, q, _ = _only_pair(w, "TCVAE")
    z, factors = w.drawn[name][particle], latent_factors(name, q["fn"])
    # Dimensions: datum of the latent, particle, datum of q, latent.
    log_q = factors.log_prob(z[:, None, None])[:, particle]
    log_count = math.log(w.size * len(z))
    joint = log_q.sum(-1).logsumexp(1) - log_count
    return joint - (log_q.logsumexp(1) - log_count).sum(-1)


class InfoVAE(Objective):
    """The InfoVAE: the KL weighted by 1 - α, plus the MMD of the aggregate posterior weighted by λ + α - 1.

    .. math:: E_q \\log p(x_i | z) - (1 - \\alpha) KL(q(z | x_i) \\,\\|\\, p(z))
        - (\\alpha + \\lambda - 1) \\, MMD^2(q(z), p(z))

    The maximum mean discrepancy (MMD) from the prior, with the kernel :math:`\\exp(-\\|z - z'\\|^2 / d)`, is estimated
    without bias from the latents of the batch and an equal number of draws from the prior. α = 0, λ = 1 gives the
    estimator itself; α = 1 gives the MMD-VAE. The gradient passes through the latents to φ and through the draws from
    the prior to Θ; it is a score-function gradient where they are not reparameterizable (a discrete guide, a mixture
    prior).

    Args:
        elbo: the estimator, or its class; the penalty uses its first particle.
        alpha: α, at most 1.
        weight: λ, at least ``1 - alpha``.

    Raises:
        SettingsError: if a setting is out of range.
        ModelError: when called, unless there is one latent site and at least two data.

    References:
        | InfoVAE (Zhao, Song & Ermon, 2017), https://arxiv.org/abs/1706.02262
        | A Kernel Two-Sample Test (Gretton et al., 2012), https://www.jmlr.org/papers/v13/gretton12a.html

    Example:
        >>> from pyro_vae.elbo import ELBO
        >>> InfoVAE(ELBO(), alpha=0.5, weight=10.0)
        InfoVAE(ELBO(1), alpha=0.5, weight=10)
    """

    couples_data = True

    neutral = ({"alpha": 0.0, "weight": 1.0},)

    @takes_settings
    def __init__(self, elbo: Estimator | type[Estimator], *, alpha: float = 0.0, weight: float = 10.0) -> None:
        super().__init__(elbo)
        if not (alpha <= 1 and weight >= 1 - alpha and math.isfinite(alpha) and math.isfinite(weight)):
            raise SettingsError(
                f"InfoVAE: alpha is {alpha} and weight {weight}; alpha must be at most 1, weight at least 1 - alpha"
            )
        self.alpha, self.weight = float(alpha), float(weight)

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "weight": self.weight}

    def bound(self, w: Weights) -> Tensor:
        name, q, p = _only_pair(w, "InfoVAE")
        z, prior = w.drawn[name], p["fn"]()
        if z.shape[1] < 2:
            raise ModelError("InfoVAE needs batches of at least two data to compare their latents with the prior")
        distance = squared_mmd(z[0], prior[0], _score_weights(q["fn"], z), _score_weights(p["fn"], prior))
        return self.elbo.bound(w.tempered(1 - self.alpha)) - (self.alpha + self.weight - 1) * distance


def _score_weights(fn: Any, draws: Tensor) -> Tensor | None:
    """Importance weights of value 1 whose gradient is the score; None if the draws are reparameterized."""
    if fn.has_rsample:
        return None
    log = fn.log_prob(draws.detach())[0]
    return (log - log.detach()).exp()


def squared_mmd(
    first: Tensor, second: Tensor, first_weights: Tensor | None = None, second_weights: Tensor | None = None
) -> Tensor:
    """Estimate the squared maximum mean discrepancy between two samples without bias.

    Args:
        first: shape ``(m, d)``.
        second: shape ``(m, d)``.
        first_weights: importance weights, shape ``(m,)``; 1 if not given.
        second_weights: importance weights, shape ``(m,)``; 1 if not given.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> bool(squared_mmd(torch.randn(500, 2), torch.randn(500, 2) + 1) > 0.05)
        True
    """
    m = len(first)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return ((a[:, None] - b[None]).square().sum(-1) / -a.shape[-1]).exp()

    k_first, k_second, k_between = kernel(first, first), kernel(second, second), kernel(first, second)
    if first_weights is not None:
        k_first = k_first * first_weights * first_weights.unsqueeze(1)
        k_between = k_between * first_weights.unsqueeze(1)
    if second_weights is not None:
        k_second = k_second * second_weights * second_weights.unsqueeze(1)
        k_between = k_between * second_weights
    diagonal = k_first.diagonal().sum() + k_second.diagonal().sum()
    within = (k_first.sum() + k_second.sum() - diagonal) / (m * (m - 1))
    return within - 2 * k_between.mean()
