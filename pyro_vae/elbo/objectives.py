"""Objectives that wrap an estimator: a weighted or annealed KL, and free bits."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.core.traces import Program, Site, loss_name
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.estimator import Estimator, format_settings
from pyro_vae.elbo.given import as_estimator
from pyro_vae.elbo.kl import family
from pyro_vae.elbo.schedules import Schedule
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import ModelError, SettingsError

__all__ = ["Beta", "FreeBits"]


class Objective(Estimator):
    """Base class of objectives, which wrap an estimator and change its bound.

    Objectives nest, and each wraps any estimator of :mod:`pyro_vae.elbo`. The table in
    ``docs/comparing_estimators.md`` lists the pairs that take several latent sites or a discrete guide. A penalty
    has its own gradient, independent of changes that an estimator makes to the gradient of its bound
    (:class:`DReG` weights the gradient through the latents, :class:`ScoreFunction` stops it).

    Args:
        elbo: an estimator of :mod:`pyro_vae.elbo`, its class, or another objective.

    Raises:
        ModelError: if ``elbo`` is not an estimator of :mod:`pyro_vae.elbo`; Pyro's estimators have no log-weights.

    Example:
        >>> import pyro_vae as pv
        >>> pv.elbo.Beta(pv.elbo.Trace_ELBO())
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: Beta wraps an estimator of pyro_vae.elbo, not Trace_ELBO; use ELBO, ...
    """

    neutral: tuple[dict[str, Any], ...] = ()
    """Settings with which it equals the wrapped estimator."""

    def __init__(self, elbo: Estimator | type[Estimator]) -> None:
        estimator = as_estimator(elbo)
        if not isinstance(estimator, Estimator):
            raise ModelError(
                f"{type(self).__name__} wraps an estimator of pyro_vae.elbo, not {loss_name(estimator)}; "
                "use ELBO, AnalyticKL or another of its estimators"
            )
        super().__init__(estimator.num_particles)
        self.elbo = estimator

    def weigh(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Weights:
        w = self.elbo.weigh(model, guide, *args, **kwargs)
        if w.global_sites:
            raise ModelError(
                f"{self} changes the bound of each datum, of which site {w.global_sites[0]} outside the plate over "
                "data is no part; use ELBO, STL or Trace_ELBO"
            )
        return w

    def advance(self) -> None:
        self.elbo.advance()

    def restart(self) -> None:
        self.elbo.restart()

    def schedules(self) -> list[Schedule]:
        return self.elbo.schedules()

    @takes_settings
    def with_particles(self, num_particles: int) -> "Estimator":
        other = super().with_particles(num_particles)
        other.elbo = self.elbo.with_particles(num_particles)
        return other

    def reference(self) -> Estimator:
        other = super().with_particles(self.num_particles)
        other.elbo = self.elbo.reference()
        return other

    @property
    def known_bias(self) -> str:  # type: ignore[override]
        """The known bias of the wrapped estimator."""
        return self.elbo.known_bias

    @property
    def reweights_latents(self) -> bool:  # type: ignore[override]
        """Whether the wrapped estimator stops or weights the gradient from the model to the latents."""
        return self.elbo.reweights_latents

    def called(self) -> str:
        return f"{type(self).__name__}({', '.join([self.elbo.called(), *format_settings(self.settings())])})"

    def target(self) -> str:
        if self.settings() in self.neutral:
            return self.elbo.target()
        return f"{type(self).__name__}({', '.join([self.elbo.target(), *format_settings(self.settings())])})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([repr(self.elbo), *format_settings(self.settings())])})"


class Beta(Objective):
    """The ELBO with its KL weighted by β at all latent sites; β may follow a schedule.

    .. math:: \\log w_{ki} = \\log p(x_i | z_{ki}) + \\beta \\, (\\log p(z_{ki}) - \\log q(z_{ki} | x_i))

    It wraps any estimator; with :class:`ELBO` or :class:`AnalyticKL` it is the objective of the β-VAE. With a
    schedule, ``step`` counts the training steps; :func:`pyro_vae.fit` logs the ELBO with β = 1 next to this objective,
    and raises an error if the schedule is longer than the training.

    Args:
        elbo: the estimator, or its class.
        beta: the weight β, a number of at least 0, or a :class:`Schedule`.

    Raises:
        SettingsError: if ``beta`` is below 0.

    References:
        | beta-VAE (Higgins et al., 2017), https://openreview.net/forum?id=Sy2fzU9gl

    Example:
        >>> from pyro_vae.elbo import ELBO, Linear
        >>> Beta(ELBO(), 4.0), Beta(ELBO(), Linear(100))
        (Beta(ELBO(1), beta=4), Beta(ELBO(1), beta=Linear(steps=100, start=0, end=1)))
    """

    neutral = ({"beta": 1.0},)

    @takes_settings
    def __init__(self, elbo: Estimator | type[Estimator], beta: float | Schedule = 1.0) -> None:
        super().__init__(elbo)
        if not isinstance(beta, Schedule) and not (beta >= 0 and math.isfinite(beta)):
            raise SettingsError(f"Beta: beta is {beta}; it must be a finite number of at least 0, or a schedule")
        self.beta = beta if isinstance(beta, Schedule) else float(beta)
        self.step = torch.zeros(())

    def temperature(self, device: torch.device) -> float | Tensor:
        """Return β at the current step, on the device of the data."""
        if not isinstance(self.beta, Schedule):
            return self.beta
        if self.step.device != device:
            self.step = self.step.to(device)
        return self.beta.at(self.step)

    def settings(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def bound(self, w: Weights) -> Tensor:
        return self.elbo.bound(w.tempered(self.temperature(w.device)))

    def advance(self) -> None:
        super().advance()
        self.step += 1

    def restart(self) -> None:
        super().restart()
        self.step.zero_()

    @takes_settings
    def with_particles(self, num_particles: int) -> "Estimator":
        other = super().with_particles(num_particles)
        other.step = self.step.clone()
        return other

    def reference(self) -> Estimator:
        other = super().reference()
        other.step = self.step.clone()
        return other

    def schedules(self) -> list[Schedule]:
        return super().schedules() + ([self.beta] if isinstance(self.beta, Schedule) else [])


class FreeBits(Objective):
    """Free bits: the KL of each latent costs at least λ nats, so there is no gain in reducing it below λ.

    .. math:: \\mathcal L_i - \\sum_j \\max(0, \\lambda - \\overline{KL}_j), \\qquad
        \\overline{KL}_j = \\text{mean over the batch of } KL(q(z_j | x_i) \\,\\|\\, p(z_j))

    To weight the KL too, use ``Beta(FreeBits(ELBO()), 0.5)``. The threshold applies to the mean over the batch and the
    particles, so the objective depends on the batch size. With one latent site, it wraps any estimator.

    Args:
        elbo: the estimator, or its class.
        nats: the threshold λ in nats per latent, at least 0.

    Raises:
        SettingsError: if ``nats`` is below 0.
        ModelError: when called, unless the latents are independent in prior and posterior and their KL has a closed
            form; also for several latent sites with an estimator that weights or stops the gradient through the latents
            (:class:`DReG`, :class:`PIWAE`, :class:`ScoreFunction`, :class:`VIMCO`, :class:`Thermodynamic`).

    References:
        | Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), appendix C.8,
          https://arxiv.org/abs/1606.04934

    Example:
        >>> from pyro_vae.elbo import ELBO
        >>> FreeBits(ELBO(), nats=0.5)
        FreeBits(ELBO(1), nats=0.5)
    """

    couples_data = True

    neutral = ({"nats": 0.0},)

    @takes_settings
    def __init__(self, elbo: Estimator | type[Estimator], nats: float = 0.5) -> None:
        super().__init__(elbo)
        if not (nats >= 0 and math.isfinite(nats)):
            raise SettingsError(f"FreeBits: nats is {nats}; it must be a finite number of at least 0")
        self.nats = float(nats)

    def settings(self) -> dict[str, Any]:
        return {"nats": self.nats}

    def bound(self, w: Weights) -> Tensor:
        if len(w.drawn) > 1 and self.reweights_latents:
            raise ModelError(
                f"FreeBits with {self.elbo.called()} takes one latent site, but the guide has {', '.join(w.drawn)}: "
                "the estimator changes the gradient of the KL of one site through another; use IWAE or ELBO"
            )
        penalties = [
            _mean_factor(factor) * (self.nats - _kl_by_latent(name, q, p)).clamp(min=0).sum()
            for name, q, p, factor in w.kl_pairs()
        ]
        return self.elbo.bound(w) - torch.stack(penalties).sum()


def _mean_factor(factor: float | Tensor) -> float | Tensor:
    return factor.mean() if isinstance(factor, Tensor) else factor


def _kl_by_latent(name: str, q: Site, p: Site) -> Tensor:
    """The mean over the batch of the KL of each latent, shape ``(latent,)``."""
    try:
        kl = kl_divergence(latent_factors(name, q["fn"]), latent_factors(name, p["fn"]))
    except NotImplementedError as error:
        families = f"{family(q['fn'])} from {family(p['fn'])}"
        raise ModelError(
            f"FreeBits needs the KL of each latent, but the KL of {families} has no closed form; use Beta"
        ) from error
    return kl.flatten(0, -2).mean(0)


def latent_factors(name: str, fn: Any) -> Any:
    """The distributions of the individual latents."""
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1 and not fn.base_dist.event_shape:
        return fn.base_dist
    raise ModelError(f"the latents at site {name} are not independent in {family(fn)}; use a diagonal distribution")
