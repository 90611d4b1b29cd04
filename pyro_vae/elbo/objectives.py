"""Objectives that wrap an estimator: weighted or annealed KL, free bits, and penalties."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.core.traces import Program, Site, loss_name, samples
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.bounds import Estimator, format_settings
from pyro_vae.elbo.given import as_estimator
from pyro_vae.elbo.kl import family
from pyro_vae.elbo.log_weights import Weights, replace_gradient
from pyro_vae.errors import ModelError, SettingsError

__all__ = ["TCVAE", "Beta", "Cyclical", "FreeBits", "InfoVAE", "Linear", "Schedule"]


class Schedule(ABC):
    """A number that changes during training, computed from the step by tensor operations.

    Args:
        steps: the number of steps until its last change.

    Example:
        >>> class Halving(Schedule):
        ...     def at(self, step):
        ...         return 0.5 ** (step / self.steps)
        >>> Halving(10).at(torch.tensor(20.0))
        tensor(0.2500)
    """

    @takes_settings
    def __init__(self, steps: int) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise SettingsError(f"{type(self).__name__}: steps is {steps}; it must be a whole number of at least 1")
        self.steps = steps

    @abstractmethod
    def at(self, step: Tensor) -> Tensor:
        """Return the number at a step, counted from 0; a tensor of shape ``()``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v:g}' for k, v in vars(self).items())})"


class Linear(Schedule):
    """A linear schedule from one number to another, then constant.

    .. math:: \\beta_t = a + (b - a) \\min(t / T, 1)

    Args:
        steps: the number of steps T, at least 1.
        start: the first number a.
        end: the last number b.

    References:
        | Generating Sentences from a Continuous Space (Bowman et al., 2016), https://arxiv.org/abs/1511.06349
        | Ladder Variational Autoencoders (Sønderby et al., 2016), https://arxiv.org/abs/1602.02282

    Example:
        >>> [Linear(10).at(torch.tensor(t)).item() for t in (0.0, 5.0, 20.0)]
        [0.0, 0.5, 1.0]
    """

    @takes_settings
    def __init__(self, steps: int, *, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__(steps)
        self.start, self.end = float(start), float(end)

    def at(self, step: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * (step / self.steps).clamp(max=1)


class Cyclical(Schedule):
    """A cyclical schedule: each cycle rises linearly and then stays constant, as does the end of the last cycle.

    .. math:: \\beta_t = a + (b - a) \\min(\\tau / R, 1), \\qquad \\tau = (t \\bmod T / C) / (T / C)

    Args:
        steps: the number of steps T of all cycles together, at least 1.
        cycles: the number of cycles C, at least 1.
        ramp: the rising share R of a cycle, above 0 and at most 1.
        start: the first number a of a cycle.
        end: the last number b of a cycle.

    Raises:
        SettingsError: if a setting is out of range.

    References:
        | Cyclical Annealing Schedule (Fu et al., 2019), https://arxiv.org/abs/1903.10145

    Example:
        >>> [Cyclical(100, cycles=2).at(torch.tensor(t)).item() for t in (0.0, 12.5, 30.0, 50.0, 200.0)]
        [0.0, 0.5, 1.0, 0.0, 1.0]
    """

    @takes_settings
    def __init__(self, steps: int, *, cycles: int = 4, ramp: float = 0.5, start: float = 0.0, end: float = 1.0) -> None:
        super().__init__(steps)
        if not isinstance(cycles, int) or cycles < 1 or not 0 < ramp <= 1:
            raise SettingsError(
                f"Cyclical: cycles is {cycles} and ramp {ramp}; cycles must be a whole number of at least 1, "
                "ramp above 0 and at most 1"
            )
        self.cycles, self.ramp, self.start, self.end = cycles, float(ramp), float(start), float(end)

    def at(self, step: Tensor) -> Tensor:
        period = self.steps / self.cycles
        within = torch.where(step < self.steps, (step % period) / period, 1.0)
        return self.start + (self.end - self.start) * (within / self.ramp).clamp(max=1)


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
        >>> from pyro_vae.elbo import ELBO
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
        kl = kl_divergence(_factors(name, q["fn"]), _factors(name, p["fn"]))
    except NotImplementedError as error:
        families = f"{family(q['fn'])} from {family(p['fn'])}"
        raise ModelError(
            f"FreeBits needs the KL of each latent, but the KL of {families} has no closed form; use Beta"
        ) from error
    return kl.flatten(0, -2).mean(0)


def _factors(name: str, fn: Any) -> Any:
    """The distributions of the individual latents."""
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1 and not fn.base_dist.event_shape:
        return fn.base_dist
    raise ModelError(f"the latents at site {name} are not independent in {family(fn)}; use a diagonal distribution")


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
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 1), torch.zeros(5), 0.5).as_vae(diagonal=True)
        >>> w = pv.elbo.ELBO().weigh(vae.model, vae.guide, torch.randn(7, 5))
        >>> bool(total_correlation(w).abs().max() < 1e-5)  # zero for one latent
        True
    """
    name, q, _ = _only_pair(w, "TCVAE")
    z, factors = w.drawn[name][particle], _factors(name, q["fn"])
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
