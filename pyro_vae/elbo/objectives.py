"""Objectives around an estimator: its KL weighted, annealed, floored, or joined by a penalty."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from pyro_vae.core.traces import Program, Site, loss_name, samples
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.bounds import Estimator, shown
from pyro_vae.elbo.given import as_estimator
from pyro_vae.elbo.kl import family
from pyro_vae.elbo.log_weights import Weights, valued
from pyro_vae.errors import ModelError, SettingsError

__all__ = ["TCVAE", "Beta", "Cyclical", "FreeBits", "InfoVAE", "Linear", "Schedule"]


class Schedule(ABC):
    """A number that changes while training, computed from the step by tensor operations.

    Args:
        steps: how many steps it needs to come to its end.

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
        """The number at a step, counted from 0; a tensor of shape ``()``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v:g}' for k, v in vars(self).items())})"


class Linear(Schedule):
    """A straight line from one number to another, which it then keeps.

    .. math:: \\beta_t = a + (b - a) \\min(t / T, 1)

    Args:
        steps: T, at least 1.
        start: a.
        end: b.

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
    """Several straight lines, one after another, each followed by a rest; the last number is kept.

    .. math:: \\beta_t = a + (b - a) \\min(\\tau / R, 1), \\qquad \\tau = (t \\bmod T / C) / (T / C)

    Args:
        steps: T, all cycles together, at least 1.
        cycles: C, at least 1.
        ramp: R, the share of a cycle that rises, above 0 and at most 1.
        start: a.
        end: b.

    Raises:
        SettingsError: if a setting is out of its range.

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
                f"Cyclical: cycles is {cycles} and ramp {ramp}; cycles is a whole number of at least 1, ramp in (0, 1]"
            )
        self.cycles, self.ramp, self.start, self.end = cycles, float(ramp), float(start), float(end)

    def at(self, step: Tensor) -> Tensor:
        period = self.steps / self.cycles
        within = torch.where(step < self.steps, (step % period) / period, 1.0)
        return self.start + (self.end - self.start) * (within / self.ramp).clamp(max=1)


class Objective(Estimator):
    """The base of objectives: an estimator and what is changed of it.

    Objectives nest. Each takes every estimator of :mod:`pyro_vae.elbo`, with the gradient of the sum of the two; the
    table in ``docs/comparing_estimators.md`` says which pairs take several latent sites or a discrete guide. A
    penalty has its own gradient, whatever an estimator does to that of its bound (:class:`DReG` weights it,
    :class:`ScoreFunction` passes none through the latents).

    Args:
        elbo: an estimator of :mod:`pyro_vae.elbo`, its class, or another objective.

    Raises:
        ModelError: if ``elbo`` is not made of log-weights, as Pyro's own are not.

    Example:
        >>> import pyro_vae as pv
        >>> pv.elbo.Beta(pv.elbo.Trace_ELBO())
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: Beta goes around an estimator of pyro_vae.elbo, this is Trace_ELBO; use ELBO, ...
    """

    neutral: tuple[dict[str, Any], ...] = ()
    """Settings with which it is the estimator inside."""

    def __init__(self, elbo: Estimator | type[Estimator]) -> None:
        inside = as_estimator(elbo)
        if not isinstance(inside, Estimator):
            raise ModelError(
                f"{type(self).__name__} goes around an estimator of pyro_vae.elbo, this is {loss_name(inside)}; "
                "use ELBO, AnalyticKL or another of them"
            )
        super().__init__(inside.num_particles)
        self.elbo = inside

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
        """That of the estimator inside."""
        return self.elbo.known_bias

    @property
    def reweights_latents(self) -> bool:  # type: ignore[override]
        """That of the estimator inside."""
        return self.elbo.reweights_latents

    def called(self) -> str:
        return f"{type(self).__name__}({', '.join([self.elbo.called(), *shown(self.settings())])})"

    def target(self) -> str:
        if self.settings() in self.neutral:
            return self.elbo.target()
        return f"{type(self).__name__}({', '.join([self.elbo.target(), *shown(self.settings())])})"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([repr(self.elbo), *shown(self.settings())])})"


class Beta(Objective):
    """The KL weighted by β, exactly, at every latent site of both model and guide; β may follow a schedule.

    .. math:: \\log w_{ki} = \\log p(x_i | z_{ki}) + \\beta \\, (\\log p(z_{ki}) - \\log q(z_{ki} | x_i))

    Around :class:`ELBO` or :class:`AnalyticKL` it is the β-VAE; it takes every estimator. With a schedule,
    ``step`` counts the steps of training; :func:`pyro_vae.fit` logs the true ELBO beside this objective,
    and refuses a warm-up that is longer than the training.

    Args:
        elbo: the estimator, or its class.
        beta: a number of at least 0, or a :class:`Schedule`.

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
        """β at this step, where the data are."""
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
    """A KL below λ nats per latent costs no more than λ: those nats are free.

    .. math:: \\mathcal L_i - \\sum_j \\max(0, \\lambda - \\overline{KL}_j), \\qquad
        \\overline{KL}_j = \\text{mean over the batch of } KL(q(z_j | x_i) \\,\\|\\, p(z_j))

    A β goes around it: ``Beta(FreeBits(ELBO()), 0.5)``. The floor is of the mean over the batch and the particles, so
    minibatches of different sizes have different objectives. It takes every estimator for one latent site.

    Args:
        elbo: the estimator, or its class.
        nats: λ, at least 0, in nats per latent.

    Raises:
        SettingsError: if ``nats`` is below 0.
        ModelError: when called, unless the latents are independent in prior and posterior, with a KL in closed form;
            for several latent sites around an estimator that weights or stops the gradient through them
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
                f"FreeBits around {self.elbo.called()} takes one latent site, but the guide has {', '.join(w.drawn)}: "
                "that estimator changes the gradient through one site into the KL of another; use IWAE or ELBO"
            )
        missing = [_number(t) * (self.nats - _kl_by_latent(n, q, p)).clamp(min=0).sum() for n, q, p, t in w.kl_pairs()]
        return self.elbo.bound(w) - torch.stack(missing).sum()


def _number(temperature: float | Tensor) -> float | Tensor:
    return temperature.mean() if isinstance(temperature, Tensor) else temperature


def _kl_by_latent(name: str, q: Site, p: Site) -> Tensor:
    """The mean over the batch of the KL of each latent, shape ``(latent,)``."""
    try:
        kl = kl_divergence(_factors(name, q["fn"]), _factors(name, p["fn"]))
    except NotImplementedError as error:
        families = f"{family(q['fn'])} from {family(p['fn'])}"
        raise ModelError(f"free bits need the KL of each latent, and that of {families} has no closed form") from error
    return kl.flatten(0, -2).mean(0)


def _factors(name: str, fn: Any) -> Any:
    """The distributions of single latents."""
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1 and not fn.base_dist.event_shape:
        return fn.base_dist
    raise ModelError(f"the latents at site {name} are not independent in {family(fn)}; take a diagonal distribution")


class TCVAE(Objective):
    """The total correlation of the aggregate posterior weighted by β: latents that vary independently.

    .. math:: \\mathcal L_i - (\\beta - 1) \\Bigl(\\log q(z_i) - \\sum_j \\log q(z_{ij})\\Bigr), \\qquad
        q(z) \\approx \\frac1{nm} \\sum_{l \\in \\mathrm{batch}} q(z | x_l)

    The aggregate posterior is estimated from the minibatch, by Chen et al.'s weighted sampling, which is biased.
    The gradient of the penalty passes through the latents; where the guide is discrete, it is the score
    function's, with the penalty of a second particle as its baseline.

    Args:
        elbo: the estimator, or its class; the penalty uses its first particle.
        beta: β, the weight of the total correlation; 1 changes nothing.

    Raises:
        ModelError: when called, unless there is one latent site, with independent latents in the posterior.

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
    """The total correlation of the first particle, with the score-function gradient where no other passes its latent.

    .. math:: \\nabla_\\phi E f(z_{1i}) = E \\bigl(f(z_{1i}) - f(z_{2i})\\bigr) \\nabla_\\phi \\log q(z_{1i} | x_i)
        + E \\partial_\\phi f(z_{1i})

    The second particle is the baseline. It does not depend on the first, so the gradient stays unbiased.
    """
    value = total_correlation(w)
    if all(site["fn"].has_rsample for _, site in samples(w.guide_trace)):
        return value
    return valued(value, value + (value - total_correlation(w, particle=1)).detach() * w.score[0])


def total_correlation(w: Weights, *, particle: int = 0) -> Tensor:
    """``log q(z_i) - Σ_j log q(z_ij)`` of one particle of each datum, estimated from the batch.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 1), torch.zeros(5), 0.5).as_vae(diagonal=True)
        >>> w = pv.elbo.ELBO().weigh(vae.model, vae.guide, torch.randn(7, 5))
        >>> bool(total_correlation(w).abs().max() < 1e-5)  # one latent correlates with no other
        True
    """
    name, q, _ = _only_pair(w, "TCVAE")
    z, factors = w.drawn[name][particle], _factors(name, q["fn"])
    # (of datum, particle, under datum, latent): under each datum's own q
    log_q = factors.log_prob(z[:, None, None])[:, particle]
    of_all = math.log(w.size * len(z))
    joint = log_q.sum(-1).logsumexp(1) - of_all
    return joint - (log_q.logsumexp(1) - of_all).sum(-1)


class InfoVAE(Objective):
    """The KL weighted by 1 - α, and the distance of the aggregate posterior from the prior by λ + α - 1.

    .. math:: E_q \\log p(x_i | z) - (1 - \\alpha) KL(q(z | x_i) \\,\\|\\, p(z))
        - (\\alpha + \\lambda - 1) \\, MMD^2(q(z), p(z))

    The maximum mean discrepancy, with the kernel :math:`\\exp(-\\|z - z'\\|^2 / d)`, is estimated without bias from
    the batch's latents and as many draws of the prior. α = 0, λ = 1 is the estimator itself; α = 1 an MMD-VAE.
    Its gradient passes through the latents to φ and through the prior's draws to Θ; where one of the two cannot be
    reparameterised (a discrete guide, a mixture as prior), it is the score function's.

    Args:
        elbo: the estimator, or its class; the penalty uses its first particle.
        alpha: α, at most 1.
        weight: λ, at least ``1 - alpha``.

    Raises:
        SettingsError: if a setting is out of its range.
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
                f"InfoVAE: alpha is {alpha} and weight {weight}; alpha is at most 1, weight at least 1 - alpha"
            )
        self.alpha, self.weight = float(alpha), float(weight)

    def settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "weight": self.weight}

    def bound(self, w: Weights) -> Tensor:
        name, q, p = _only_pair(w, "InfoVAE")
        z, prior = w.drawn[name], p["fn"]()
        if z.shape[1] < 2:
            raise ModelError("InfoVAE compares the latents of a batch with the prior; give at least two data")
        distance = squared_mmd(z[0], prior[0], _ones(q["fn"], z), _ones(p["fn"], prior))
        return self.elbo.bound(w.tempered(1 - self.alpha)) - (self.alpha + self.weight - 1) * distance


def _ones(fn: Any, draws: Tensor) -> Tensor | None:
    """Importance weights of 1 for the first particle, which carry the score where no gradient passes the draws."""
    if fn.has_rsample:
        return None
    log = fn.log_prob(draws.detach())[0]
    return (log - log.detach()).exp()


def squared_mmd(
    first: Tensor, second: Tensor, first_weights: Tensor | None = None, second_weights: Tensor | None = None
) -> Tensor:
    """The squared maximum mean discrepancy of two samples, without bias.

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

    of_first, of_second, between = kernel(first, first), kernel(second, second), kernel(first, second)
    if first_weights is not None:
        of_first = of_first * first_weights * first_weights.unsqueeze(1)
        between = between * first_weights.unsqueeze(1)
    if second_weights is not None:
        of_second = of_second * second_weights * second_weights.unsqueeze(1)
        between = between * second_weights
    alone = of_first.diagonal().sum() + of_second.diagonal().sum()
    within = (of_first.sum() + of_second.sum() - alone) / (m * (m - 1))
    return within - 2 * between.mean()
