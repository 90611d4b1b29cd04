"""Estimators that differentiate through their samples; each is a few lines on the log-weights."""

import copy
import math
from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_vae.core.traces import Program, TensorELBO, samples
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.kl import closed_form
from pyro_vae.elbo.log_weights import Weights, valued, weigh
from pyro_vae.errors import ModelError, SettingsError

__all__ = ["CIWAE", "ELBO", "IWAE", "IWAESTL", "MIWAE", "PIWAE", "STL", "AnalyticKL", "DReG", "Estimator", "Renyi"]


class Estimator(TensorELBO):
    """The base of estimators made of log-weights: a member says what its bound is, given them.

    .. math:: \\mathrm{loss} = - \\frac nm \\sum_{i \\in \\mathrm{batch}} \\hat{\\mathcal L}_i(\\log w_{1i}, \\ldots,
        \\log w_{Ki})

    The bound is formed of unscaled log-weights and n/m multiplies it after, so it is unbiased for
    minibatches. All particles are drawn at once, and what is returned are tensors: nothing waits for
    a GPU. Each is a ``pyro.infer.ELBO``, so ``SVI(..., loss=)`` and :func:`pyro_vae.fit` take it.

    Args:
        num_particles: K, at least the member's ``least_particles``.

    Raises:
        SettingsError: if there are too few particles.
        ModelError: when called, if the guide cannot be reparameterised, or a site has no log-weight per datum.

    Example:
        >>> class Largest(Estimator):
        ...     def bound(self, w):
        ...         return w.log.amax(0)
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> Largest(3).loss(vae.model, vae.guide, torch.ones(4, 5)).shape
        torch.Size([])
    """

    least_particles = 1
    path_gradient = False
    known_bias = ""
    reweights_latents = False
    """Whether it stops or weights the gradient through the latents that the model saw, as no penalty should have it."""
    couples_data = False
    """Whether the bound of a datum depends on the others of its batch, which then cannot be spread over processes."""
    takes_globals = False
    """Whether it is linear in the log-weights, so that sites outside the plate over data add their own part once."""

    @takes_settings
    def __init__(self, num_particles: int = 1) -> None:
        self._refuse_particles(num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)

    def _refuse_particles(self, num_particles: int) -> None:
        if not isinstance(num_particles, int) or num_particles < self.least_particles:
            raise SettingsError(
                f"{type(self).__name__}: num_particles is {num_particles}; "
                f"it must be a whole number of at least {self.least_particles}"
            )

    @abstractmethod
    def bound(self, w: Weights) -> Tensor:
        """The bound of each datum, shape ``(batch,)``; its gradient is the estimator's."""

    def reference(self) -> "Estimator":
        """An estimator whose gradient is unbiased for this one's bound, another where there is one."""
        return self

    @takes_settings
    def with_particles(self, num_particles: int) -> "Estimator":
        """A copy with another number of particles."""
        self._refuse_particles(num_particles)
        other = copy.copy(self)
        other.num_particles = num_particles
        return other

    def advance(self) -> None:
        """Take notice that a step of training was made."""

    def restart(self) -> None:
        """Begin again, as before the first step of training."""

    def schedules(self) -> list[Any]:
        """The schedules it follows."""
        return []

    def weigh(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Weights:
        """One pass over model and guide."""
        w = weigh(
            model, guide, *args, num_particles=self.num_particles, path_gradient=self.path_gradient,
            given_globals=self.takes_globals, **kwargs,
        )  # fmt: skip
        w.refuse()
        for name, site in samples(w.guide_trace):
            if not site["fn"].has_rsample and name not in w.enumerated:
                raise ModelError(
                    f"site {name} has a {type(site['fn']).__name__}, which no gradient passes through; "
                    "use ScoreFunction or VIMCO"
                )
        return w

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the bound, summed over data and scaled by n/m; a tensor of shape ``()``."""
        w = self.weigh(model, guide, *args, **kwargs)
        return -w.total(self.bound(w))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, its gradient added to ``.grad`` of every parameter; what follows a schedule takes a step."""
        loss = super().loss_and_grads(model, guide, *args, **kwargs)
        self.advance()
        return loss

    def settings(self) -> dict[str, Any]:
        """What distinguishes it from another of its class, but for the number of particles."""
        return {}

    def called(self) -> str:
        """Its class and settings, whatever the number of particles."""
        own = shown(self.settings())
        return type(self).__name__ + (f"({', '.join(own)})" if own else "")

    def target(self) -> str:
        """The bound that it estimates, K included where it depends on K; other estimators may share it."""
        return repr(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([str(self.num_particles), *shown(self.settings())])})"


def shown(settings: dict[str, Any]) -> list[str]:
    """Settings as a person writes them.

    Example:
        >>> shown({"alpha": 0.5, "groups": 2})
        ['alpha=0.5', 'groups=2']
    """
    return [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items()]


def log_mean_exp(log: Tensor) -> Tensor:
    """``log 1/K Σ exp``, over the first dimension.

    Example:
        >>> log_mean_exp(torch.tensor([[0.0], [0.0]]))
        tensor([0.])
    """
    return log.logsumexp(0) - math.log(len(log))


class ELBO(Estimator):
    """The evidence lower bound with its KL sampled; value and gradient are those of Pyro's ``Trace_ELBO``.

    .. math:: \\mathcal L_i = \\frac1K \\sum_k \\log w_{ki}

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> vae, x = linear.as_vae(), torch.ones(3, 5).double()
        >>> bool((ELBO().loss(vae.model, vae.guide, x) + linear.log_marginal(x).sum()).abs() < 1e-12)
        True
    """

    takes_globals = True

    def bound(self, w: Weights) -> Tensor:
        return w.log.mean(0)

    def target(self) -> str:
        return "ELBO"

    def reference(self) -> Estimator:
        return STL(self.num_particles)


class STL(ELBO):
    """The ELBO with the path-only gradient, "sticking the landing": no noise where q is the posterior.

    .. math:: \\nabla_\\phi \\mathcal L_i = \\frac1K \\sum_k \\frac{\\partial \\log w_{ki}}{\\partial z_{ki}}
        \\frac{\\partial z_{ki}}{\\partial \\phi}

    What is left out, the score of q, has mean zero, so the gradient stays unbiased. Where q is far too
    narrow its noise is much larger than that of :class:`ELBO`.

    References:
        | Sticking the Landing (Roeder, Wu & Duvenaud, 2017), https://arxiv.org/abs/1703.09194

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5).as_vae()
        >>> STL().differentiable_loss(vae.model, vae.guide, torch.ones(3, 5).double()).backward()
        >>> bool(max(p.grad.abs().max() for p in vae.guide.parameters()) < 1e-12)
        True
    """

    path_gradient = True

    def reference(self) -> Estimator:
        return ELBO(self.num_particles)


class AnalyticKL(ELBO):
    """The ELBO with its KL in closed form: Pyro's ``TraceMeanField_ELBO``, made strict.

    .. math:: \\mathcal L_i = \\frac1K \\sum_k \\log p(x_i | z_{ki}) - KL(q(z | x_i) \\,\\|\\, p(z))

    Refused is what Pyro's gets silently wrong: a KL without a closed form (Pyro samples it instead), a
    latent site scaled in the model but not alike in the guide (Pyro takes the guide's scale and
    ignores the model's), and more than one latent site (where the KL of the sum need not be the sum
    of the KLs).

    Args:
        num_particles: K, at least 1.
        strict: whether a KL without a closed form is refused; if not, it is sampled, as Pyro does.

    Raises:
        ModelError: when called on such a pair.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> vae.prior = pv.priors.StudentT(2)
        >>> AnalyticKL().loss(vae.model, vae.guide, torch.zeros(3, 5))
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: the KL of MultivariateNormal from StudentT at site z has no closed form ...
    """

    takes_globals = False

    @takes_settings
    def __init__(self, num_particles: int = 1, *, strict: bool = True) -> None:
        super().__init__(num_particles)
        self.strict = strict

    def bound(self, w: Weights) -> Tensor:
        pairs = list(w.kl_pairs())
        if len(pairs) != 1:
            raise ModelError(
                f"AnalyticKL takes one latent site, the guide has {[name for name, *_ in pairs]}; use Trace_ELBO"
            )
        ((name, q, p, temperature),) = pairs
        kl = closed_form(name, q, p, strict=self.strict)
        return w.log.mean(0) if kl is None else (w.likelihood - temperature * w.by_datum(kl)).mean(0)

    def reference(self) -> Estimator:
        return ELBO(self.num_particles)


def importance_weighted(num_particles: int) -> str:
    """The name of the importance-weighted bound, which with one particle is the ELBO.

    Example:
        >>> importance_weighted(1), importance_weighted(50)
        ('ELBO', 'IWAE(50)')
    """
    return "ELBO" if num_particles == 1 else f"IWAE({num_particles})"


class IWAE(Estimator):
    """The importance-weighted bound, tighter with every particle.

    .. math:: \\mathcal L_i^K = \\log \\frac1K \\sum_k w_{ki}, \\qquad
        K (\\log p(x_i) - E \\mathcal L_i^K) \\to \\tfrac12 \\chi^2(p \\,\\|\\, q)

    The signal-to-noise ratio of its gradient by φ falls as :math:`K^{-1/2}`; :class:`DReG` mends that.

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
    """The importance-weighted bound with the doubly reparameterised gradient by φ.

    .. math:: \\nabla_\\phi \\mathcal L_i^K = E \\sum_k \\tilde w_{ki}^2
        \\frac{\\partial \\log w_{ki}}{\\partial z_{ki}} \\frac{\\partial z_{ki}}{\\partial \\phi}, \\qquad
        \\tilde w_{ki} = w_{ki} / \\textstyle\\sum_l w_{li}

    Unbiased, as the gradient of :class:`IWAE` is, whose gradient by Θ it shares; its signal-to-noise
    ratio by φ grows with K. With one particle it is :class:`STL`. Where the KL is weighted by β, the score is too,
    and the factor is :math:`(1 - \\beta) \\tilde w_{ki} + \\beta \\tilde w_{ki}^2`.

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
        again = 1 - temperature + temperature * share
        for name, z in w.latents.items():
            if z.requires_grad:  # what flows back from the model to the guide is weighted once more
                z.register_hook(partial(torch.mul, w.by_site(again, name)))
        return valued(log_mean_exp(w.log), (share * (w.joint - again * w.posterior)).sum(0))

    def reference(self) -> Estimator:
        return IWAE(self.num_particles)


class IWAESTL(IWAE):
    """The importance-weighted bound with the path-only gradient. **Biased**: shown to be compared, not to train with.

    .. math:: E \\sum_k \\tilde w_{ki} \\frac{\\partial \\log w_{ki}}{\\partial z_{ki}}
        \\frac{\\partial z_{ki}}{\\partial \\phi} \\ne \\nabla_\\phi \\mathcal L_i^K \\quad (K > 1)

    The score that is left out is weighted here, so its mean is not zero; :class:`DReG` is what it should be.

    References:
        | Doubly Reparameterized Gradient Estimators (Tucker et al., 2018), section 5, https://arxiv.org/abs/1810.04152

    Example:
        >>> IWAESTL(4).known_bias
        'its gradient by φ leaves out a score whose weighted mean is not zero (Tucker et al., 2018)'
    """

    path_gradient = True
    known_bias = "its gradient by φ leaves out a score whose weighted mean is not zero (Tucker et al., 2018)"


class Renyi(Estimator):
    """The variational Rényi bound of order α.

    .. math:: \\mathcal L_i^\\alpha = \\frac1{1 - \\alpha} \\log \\frac1K \\sum_k w_{ki}^{1 - \\alpha}
        \\;\\to\\; \\log p(x_i) - D_\\alpha(q \\,\\|\\, p(z | x_i))

    α = 0 is :class:`IWAE`, α = 1 the :class:`ELBO`, α = -∞ the largest weight; below 0 its limit lies above
    log p(x). With K particles it is biased for its limit, upwards in α > 1, where Monte Carlo needs a great many.

    Args:
        num_particles: K, at least 1.
        alpha: α, any number, infinities included.

    Raises:
        SettingsError: if ``alpha`` is no number.

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
            raise SettingsError("Renyi: alpha is no number; give one, or an infinity")
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
    """The mean of several importance-weighted bounds: between the ELBO and IWAE.

    .. math:: \\mathcal L_i = \\frac1M \\sum_{g=1}^M \\log \\frac MK \\sum_{k \\in g} w_{ki}

    Args:
        num_particles: K, all of them, a multiple of ``groups``.
        groups: M, at least 1.

    Raises:
        SettingsError: if the groups do not divide the particles.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Example:
        >>> MIWAE(8, groups=3)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: MIWAE: 8 particles cannot be shared out to 3 groups; make one divide the other
    """

    @takes_settings
    def __init__(self, num_particles: int = 4, *, groups: int = 2) -> None:
        self.groups = groups
        super().__init__(num_particles)

    def _refuse_particles(self, num_particles: int) -> None:
        super()._refuse_particles(num_particles)
        if not isinstance(self.groups, int) or self.groups < 1 or num_particles % self.groups:
            raise SettingsError(
                f"{type(self).__name__}: {num_particles} particles cannot be shared out to {self.groups} groups; "
                "make one divide the other"
            )

    def bound(self, w: Weights) -> Tensor:
        return log_mean_exp(w.log.unflatten(0, (-1, self.groups))).mean(0)

    def settings(self) -> dict[str, Any]:
        return {"groups": self.groups}

    def target(self) -> str:
        has_two = isinstance(self, PIWAE) and self.groups > 1  # bounds, one for Θ and one for φ
        return super().target() if has_two else importance_weighted(self.num_particles // self.groups)


class CIWAE(Estimator):
    """A mixture of the ELBO and the importance-weighted bound, of the same particles.

    .. math:: \\mathcal L_i = \\frac\\beta K \\sum_k \\log w_{ki} + (1 - \\beta) \\log \\frac1K \\sum_k w_{ki}

    Args:
        num_particles: K, at least 1.
        mix: β, from 0 (:class:`IWAE`) to 1 (:class:`ELBO`).

    Raises:
        SettingsError: if ``mix`` is out of its range.

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
    """Θ learns from the importance-weighted bound of all particles, φ from the mean of that of several groups.

    .. math:: \\nabla_\\Theta \\log \\frac1K \\sum_k w_{ki}, \\qquad
        \\nabla_\\phi \\frac1M \\sum_{g=1}^M \\log \\frac MK \\sum_{k \\in g} w_{ki}

    Its value is the former. The decoder runs once; its gradient by the latents is computed a second time.

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
        every, grouped = log.softmax(0), log.unflatten(0, (-1, self.groups))
        own = grouped.softmax(0).flatten(0, 1) / self.groups
        path = _along_latents(own * w.joint, w)
        for z in w.latents.values():
            if z.requires_grad:  # what flows back from the model has the weights of Θ; the path has those of φ
                z.register_hook(torch.zeros_like)
        return valued(log_mean_exp(log), (every * w.joint - own * w.posterior + path).sum(0))


def _along_latents(value: Tensor, w: Weights) -> Tensor:
    """``Σ_j (∂ value / ∂z_j) z_j``, the slopes fixed: its gradient is that of value through the latents alone."""
    moving = [name for name, z in w.latents.items() if z.requires_grad]
    if not (moving and value.requires_grad):
        return torch.zeros_like(value)
    at = [w.latents[name] for name in moving]
    slopes = torch.autograd.grad(value.sum(), at, retain_graph=True, materialize_grads=True, allow_unused=True)
    parts = [w.by_event(slope * w.drawn[name], name) for name, slope in zip(moving, slopes, strict=True)]
    return torch.stack(parts).sum(0)
