"""Importance-weighted bounds and their kin, with reparameterized gradients."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.copies import replace_gradient
from pyro_vae.elbo.estimator import Estimator, log_mean_exp
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import SettingsError

__all__ = ["CIWAE", "IWAE", "IWAESTL", "MIWAE", "PIWAE", "DReG", "Renyi"]


def importance_weighted(num_particles: int) -> str:
    """Return the name of the importance-weighted bound; with one particle, it is the ELBO.

    Example:
        >>> importance_weighted(1), importance_weighted(50)
        ('ELBO', 'IWAE(50)')
    """
    return "ELBO" if num_particles == 1 else f"IWAE({num_particles})"


class IWAE(Estimator):
    """The importance-weighted bound, which is tighter with more particles.

    .. math:: \\mathcal L_i^K = \\log \\frac1K \\sum_k w_{ki}, \\qquad
        K (\\log p(x_i) - E \\mathcal L_i^K) \\to \\tfrac12 \\chi^2(p \\,\\|\\, q)

    The signal-to-noise ratio of its gradient with respect to φ falls as :math:`K^{-1/2}`; that of :class:`DReG` grows.

    References:
        | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> vae, x = linear.as_vae(), torch.ones(3, 5).double()
        >>> bool((IWAE(8).loss(vae.model, vae.guide, x) + linear.log_marginal(x).sum()).abs() < 1e-12)
        True
    """

    def bound(self, w: Weights) -> Tensor:
        return log_mean_exp(w.log)

    def target(self) -> str:
        return importance_weighted(self.num_particles)

    def reference(self) -> Estimator:
        return DReG(self.num_particles)


class DReG(IWAE):
    """The importance-weighted bound with the doubly reparameterized gradient with respect to φ.

    .. math:: \\nabla_\\phi \\mathcal L_i^K = E \\sum_k \\tilde w_{ki}^2
        \\frac{\\partial \\log w_{ki}}{\\partial z_{ki}} \\frac{\\partial z_{ki}}{\\partial \\phi}, \\qquad
        \\tilde w_{ki} = w_{ki} / \\textstyle\\sum_l w_{li}

    The gradient is unbiased; with respect to Θ it equals that of :class:`IWAE`. The signal-to-noise ratio with respect
    to φ grows with K. With one particle it is :class:`STL`. If the KL is weighted by β, so is the score, and the factor
    is :math:`(1 - \\beta) \\tilde w_{ki} + \\beta \\tilde w_{ki}^2`.

    References:
        | Doubly Reparameterized Gradient Estimators (Tucker et al., 2018), https://arxiv.org/abs/1810.04152

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5).as_vae()
        >>> DReG(5).differentiable_loss(vae.model, vae.guide, torch.ones(3, 5).double()).backward()
        >>> bool(max(p.grad.abs().max() for p in vae.guide.parameters()) < 1e-12)
        True
    """

    path_gradient = True
    reweights_latents = True

    def bound(self, w: Weights) -> Tensor:
        share = w.log.detach().softmax(0)
        temperature = w.common_temperature()
        factor = 1 - temperature + temperature * share
        for name, z in w.latents.items():
            if z.requires_grad:  # multiply the gradient from the model to the guide by the second factor
                z.register_hook(partial(torch.mul, w.by_site(factor, name)))
        return replace_gradient(log_mean_exp(w.log), (share * (w.joint - factor * w.posterior)).sum(0))

    def reference(self) -> Estimator:
        return IWAE(self.num_particles)


class IWAESTL(IWAE):
    """The importance-weighted bound with the path gradient only. **Biased**: for comparison, not for training.

    .. math:: E \\sum_k \\tilde w_{ki} \\frac{\\partial \\log w_{ki}}{\\partial z_{ki}}
        \\frac{\\partial z_{ki}}{\\partial \\phi} \\ne \\nabla_\\phi \\mathcal L_i^K \\quad (K > 1)

    The omitted score is weighted, so its mean is not zero; use :class:`DReG` instead.

    References:
        | Doubly Reparameterized Gradient Estimators (Tucker et al., 2018), section 5, https://arxiv.org/abs/1810.04152

    Example:
        >>> IWAESTL(4).known_bias
        'its gradient by φ omits a score whose weighted mean is not zero (Tucker et al., 2018)'
    """

    path_gradient = True
    known_bias = "its gradient by φ omits a score whose weighted mean is not zero (Tucker et al., 2018)"


class Renyi(Estimator):
    """The variational Rényi bound of order α.

    .. math:: \\mathcal L_i^\\alpha = \\frac1{1 - \\alpha} \\log \\frac1K \\sum_k w_{ki}^{1 - \\alpha}
        \\;\\to\\; \\log p(x_i) - D_\\alpha(q \\,\\|\\, p(z | x_i))

    α = 0 is :class:`IWAE`, α = 1 the :class:`ELBO` and α = -∞ the largest weight. For α < 0 the limit lies above
    log p(x). With K particles the estimate of the limit is biased; for α > 1 it is biased upwards and needs very many
    particles.

    Args:
        num_particles: the number of particles K, at least 1.
        alpha: the order α, any number or an infinity.

    Raises:
        SettingsError: if ``alpha`` is NaN.

    References:
        | Rényi Divergence Variational Inference (Li & Turner, 2016), https://arxiv.org/abs/1602.02311

    Example:
        >>> import pyro_vae as pv
        >>> vae, x = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae(), torch.ones(3, 5)
        >>> losses = []
        >>> for elbo in Renyi(4, alpha=0.0), IWAE(4):
        ...     _ = torch.manual_seed(0)
        ...     losses.append(elbo.loss(vae.model, vae.guide, x))
        >>> torch.equal(*losses)
        True
    """

    @takes_settings
    def __init__(self, num_particles: int = 2, *, alpha: float = 0.5) -> None:
        super().__init__(num_particles)
        if math.isnan(alpha):
            raise SettingsError("Renyi: alpha is NaN; it must be a number or an infinity")
        self.alpha = float(alpha)

    def bound(self, w: Weights) -> Tensor:
        if self.alpha == 1:
            return w.log.mean(0)
        if math.isinf(self.alpha):
            return w.log.amax(0) if self.alpha < 0 else w.log.amin(0)
        return log_mean_exp((1 - self.alpha) * w.log) / (1 - self.alpha)

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha}

    def target(self) -> str:
        known = {0.0: importance_weighted(self.num_particles), 1.0: "ELBO"}
        return "ELBO" if self.num_particles == 1 else known.get(self.alpha, super().target())


class MIWAE(Estimator):
    """The mean of several importance-weighted bounds, between the ELBO and IWAE.

    .. math:: \\mathcal L_i = \\frac1M \\sum_{g=1}^M \\log \\frac MK \\sum_{k \\in g} w_{ki}

    Args:
        num_particles: the total number of particles K, a multiple of ``groups``.
        groups: the number of groups M, at least 1.

    Raises:
        SettingsError: if ``num_particles`` is not a multiple of ``groups``.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Example:
        >>> MIWAE(8, groups=3)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: MIWAE: num_particles is 8; it must be a multiple of groups, 3
    """

    @takes_settings
    def __init__(self, num_particles: int = 4, *, groups: int = 2) -> None:
        self.groups = groups
        super().__init__(num_particles)

    def _validate_particles(self, num_particles: int) -> None:
        super()._validate_particles(num_particles)
        if not isinstance(self.groups, int) or self.groups < 1 or num_particles % self.groups:
            raise SettingsError(
                f"{type(self).__name__}: num_particles is {num_particles}; it must be a multiple of groups, "
                f"{self.groups}"
            )

    def bound(self, w: Weights) -> Tensor:
        return log_mean_exp(w.log.unflatten(0, (-1, self.groups))).mean(0)

    def settings(self) -> dict[str, Any]:
        return {"groups": self.groups}

    def target(self) -> str:
        two_bounds = isinstance(self, PIWAE) and self.groups > 1  # one for Θ and one for φ
        return super().target() if two_bounds else importance_weighted(self.num_particles // self.groups)


class CIWAE(Estimator):
    """A convex combination of the ELBO and the importance-weighted bound of the same particles.

    .. math:: \\mathcal L_i = \\frac\\beta K \\sum_k \\log w_{ki} + (1 - \\beta) \\log \\frac1K \\sum_k w_{ki}

    Args:
        num_particles: the number of particles K, at least 1.
        mix: the weight β of the ELBO, from 0 (:class:`IWAE`) to 1 (:class:`ELBO`).

    Raises:
        SettingsError: if ``mix`` is out of range.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Example:
        >>> CIWAE(8, mix=0.25)
        CIWAE(8, mix=0.25)
    """

    @takes_settings
    def __init__(self, num_particles: int = 2, *, mix: float = 0.5) -> None:
        super().__init__(num_particles)
        if not 0 <= mix <= 1:
            raise SettingsError(f"CIWAE: mix is {mix}; it must be from 0 to 1")
        self.mix = float(mix)

    def bound(self, w: Weights) -> Tensor:
        return self.mix * w.log.mean(0) + (1 - self.mix) * log_mean_exp(w.log)

    def settings(self) -> dict[str, Any]:
        return {"mix": self.mix}

    def target(self) -> str:
        known = {0.0: importance_weighted(self.num_particles), 1.0: "ELBO"}
        return "ELBO" if self.num_particles == 1 else known.get(self.mix, super().target())


class PIWAE(MIWAE):
    """The importance-weighted bound of all particles for Θ, the mean of the bounds of several groups for φ.

    .. math:: \\nabla_\\Theta \\log \\frac1K \\sum_k w_{ki}, \\qquad
        \\nabla_\\phi \\frac1M \\sum_{g=1}^M \\log \\frac MK \\sum_{k \\in g} w_{ki}

    Its value is the bound for Θ. The decoder runs once, but its gradient with respect to the latents is computed twice.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Example:
        >>> PIWAE(8, groups=4)
        PIWAE(8, groups=4)
    """

    reweights_latents = True

    def bound(self, w: Weights) -> Tensor:
        log = w.log.detach()
        theta_share, groups = log.softmax(0), log.unflatten(0, (-1, self.groups))
        phi_share = groups.softmax(0).flatten(0, 1) / self.groups
        path = _path_term(phi_share * w.joint, w)
        for z in w.latents.values():
            if z.requires_grad:  # the gradient from the model has the weights for Θ; `path` replaces it
                z.register_hook(torch.zeros_like)
        return replace_gradient(log_mean_exp(log), (theta_share * w.joint - phi_share * w.posterior + path).sum(0))


def _path_term(value: Tensor, w: Weights) -> Tensor:
    """``Σ_j (∂ value / ∂z_j) z_j`` with fixed slopes: its gradient is that of ``value`` through the latents alone."""
    moving = [name for name, z in w.latents.items() if z.requires_grad]
    if not (moving and value.requires_grad):
        return torch.zeros_like(value)
    at = [w.latents[name] for name in moving]
    slopes = torch.autograd.grad(value.sum(), at, retain_graph=True, materialize_grads=True, allow_unused=True)
    parts = [w.by_event(slope * w.drawn[name], name) for name, slope in zip(moving, slopes, strict=True)]
    return torch.stack(parts).sum(0)
