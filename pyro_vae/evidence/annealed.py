"""Annealed importance sampling from q(z|x) or p(z) to p(x, z), by Hamiltonian moves of all data and chains at once."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_vae.core.compatibility import support_of
from pyro_vae.core.component import Distribution, distribution
from pyro_vae.core.joined import JoinedPosterior, JoinedPrior
from pyro_vae.core.pair import Amortised, Pair
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.errors import ModelError
from pyro_vae.evidence.weights import Found, Plan, measured

PLACES = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Where along the path step sizes are tuned, in the pilot run; between them they are interpolated."""

PILOT_CHAINS, PILOT_MOVES = 16, 12
"""Chains per datum of the pilot run, and their moves at each place."""

WANTED = 0.75
"""The share of accepted moves that step sizes are tuned to."""

STEEPNESS = 2.0
"""Of the logistic curve that temperatures from the guide lie on."""

POWER = 4
"""Of the curve that temperatures from the prior lie on."""


def temperature(place: float) -> float:
    """β at a place along the path from 0 to 1: a logistic curve, so that both ends are left and reached slowly.

    Example:
        >>> [round(temperature(place), 3) for place in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.197, 0.5, 1.0]
    """
    low, high, here = (1 / (1 + math.exp(-STEEPNESS * (2 * s - 1))) for s in (0.0, 1.0, place))
    return (here - low) / (high - low)


def slow_at_first(place: float) -> float:
    """β at a place along the path from the prior, where a little of the likelihood changes most: ``place⁴``.

    References:
        | Marginal Likelihood Estimation via Power Posteriors (Friel & Pettitt, 2008),
          https://doi.org/10.1111/j.1467-9868.2007.00650.x

    Example:
        >>> slow_at_first(0.5), slow_at_first(1.0)
        (0.0625, 1.0)
    """
    return place**POWER


@dataclass(frozen=True, eq=False)
class State:
    """Chains, and both ends of the path there.

    Args:
        z: latents, shape ``(K, datum, *event)``.
        log_q: log q(z|x), or log p(z) on a path from the prior, shape ``(K, datum)``.
        log_p: log p(x, z).
        slope_q: the gradient of the former by z.
        slope_p: that of the latter.
    """

    z: Tensor
    log_q: Tensor
    log_p: Tensor
    slope_q: Tensor
    slope_p: Tensor

    def log_density(self, beta: float) -> Tensor:
        """(1 - β) log q + β log p, shape ``(K, datum)``."""
        return (1 - beta) * self.log_q + beta * self.log_p

    def slope(self, beta: float) -> Tensor:
        """Its gradient by z."""
        return (1 - beta) * self.slope_q + beta * self.slope_p

    def log_ratio(self) -> Tensor:
        """log p - log q in double precision."""
        return self.log_p.double() - self.log_q.double()

    def where(self, kept: Tensor, other: "State") -> "State":
        """This where ``kept``, shape ``(K, datum)``, else the other."""
        wide = like_event(kept, self.z)
        return State(
            torch.where(wide, self.z, other.z),
            torch.where(kept, self.log_q, other.log_q),
            torch.where(kept, self.log_p, other.log_p),
            torch.where(wide, self.slope_q, other.slope_q),
            torch.where(wide, self.slope_p, other.slope_p),
        )


def like_event(value: Tensor, z: Tensor) -> Tensor:
    """A value per chain and datum, or per datum, to go with latents.

    Example:
        >>> like_event(torch.ones(3), torch.ones(4, 3, 2, 2)).shape
        torch.Size([3, 1, 1])
    """
    return value.reshape(*value.shape, *[1] * (z.dim() - 2))


@dataclass(frozen=True, eq=False)
class Path:
    """The path from q(z|x), or from p(z), to p(x, z) for some rows.

    .. math:: \\log f_\\beta(z) = (1 - \\beta) \\log q(z | x) + \\beta \\log p(x, z)

    Args:
        rows: the data.
        q: the distribution that chains start from, at β = 0.
        log_joint: log p(x, z) of latents, of parts without gradients.
        schedule: β at a place from 0 to 1.
    """

    rows: Rows
    q: Distribution | JoinedPosterior
    log_joint: Callable[[Tensor], Tensor]
    schedule: Callable[[float], float] = temperature

    @classmethod
    def of(cls, vae: Amortised, rows: Rows) -> "Path":
        """The path from the guide.

        Raises:
            ModelError: if z is discrete or bounded.

        Example:
            >>> import pyro_vae as pv
            >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
            >>> Path.of(vae, Rows(torch.ones(3, 5))).at(torch.zeros(4, 3, 2)).slope_p.shape
            torch.Size([4, 3, 2])
        """
        if isinstance(vae, Pair):
            joined = vae.posterior(rows)
            return cls(rows, joined, joined.log_joint)
        assert isinstance(vae, VAE)
        with torch.no_grad():
            q = vae.posterior(rows)
        refuse_latents(q, "encoder")
        return cls(rows, q, cls.joint_of(vae, rows, cls.prior_of(vae, rows)))

    @classmethod
    def from_prior(cls, vae: Amortised, rows: Rows) -> "Path":
        """The path from the prior, which does not use the guide; it raises as :meth:`of` does."""
        if isinstance(vae, Pair):
            joined = JoinedPrior(vae, rows)
            return cls(rows, joined, joined.log_joint, slow_at_first)
        assert isinstance(vae, VAE)
        prior = cls.prior_of(vae, rows)
        return cls(rows, prior, cls.joint_of(vae, rows, prior), slow_at_first)

    @staticmethod
    def joint_of(vae: VAE, rows: Rows, prior: Distribution) -> Callable[[Tensor], Tensor]:
        """log p(x, z) of latents, with a prior that is computed once."""

        def log_joint(z: Tensor) -> Tensor:
            return prior.log_prob(z) + vae.likelihood(z, rows).log_prob(rows.x)

        return log_joint

    @staticmethod
    def prior_of(vae: VAE, rows: Rows) -> Distribution:
        """p(z) at the contexts of the rows; a ModelError if z is discrete or bounded."""
        with torch.no_grad():
            prior = distribution(vae.prior, "prior", *rows.given)
        refuse_latents(prior, "prior")
        return prior

    def draw(self, chains: int) -> Tensor:
        """Latents that ``chains`` chains of each datum start from, shape ``(chains, datum, *event)``."""
        return self.q.sample((chains,) if self.q.batch_shape else (chains, len(self.rows)))

    def at(self, z: Tensor) -> State:
        """Both ends and their gradients; NaN where z is not finite, so that no move ends there."""
        finite = z.isfinite()
        inside = finite.flatten(2).all(-1)
        nan = torch.full((), torch.nan, dtype=z.dtype, device=z.device)
        with torch.enable_grad():
            z = torch.where(finite, z, torch.zeros_like(nan)).detach().requires_grad_()
            log_q = self.q.log_prob(z)
            log_p = self.log_joint(z)
            (slope_q,) = torch.autograd.grad(log_q.sum(), z)
            (slope_p,) = torch.autograd.grad(log_p.sum(), z)
        slope_p = torch.where(like_event(inside, z), slope_p, nan)
        return State(z.detach(), log_q.detach(), torch.where(inside, log_p.detach(), nan), slope_q, slope_p)


@contextmanager
def still(vae: Amortised) -> Iterator[None]:
    """Inside, no parameter asks for a gradient, and a move may land where the decoder is not finite: it is not taken.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> with still(vae):
        ...     any(p.requires_grad for p in vae.parameters())
        False
    """
    trained = [p for p in vae.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def refuse_latents(d: Distribution, role: str) -> None:
    """Refuse latents that cannot be moved by gradients.

    Raises:
        ModelError: if they are discrete, or not of all real numbers.

    Example:
        >>> import pyro.distributions as dist
        >>> refuse_latents(dist.Normal(torch.zeros(2), 1.0).to_event(1), "prior")
    """
    support = support_of(d)
    if support is not None and not isinstance(support, type(torch.distributions.constraints.real)):
        kind = "discrete" if support.is_discrete else "bounded"
        raise ModelError(
            f"the {role} gives {kind} latents ({type(support).__name__}), and annealing moves z by gradients over all "
            'real numbers; take method="iw" or "psis"'
        )


@dataclass(frozen=True, eq=False)
class Tuning:
    """Step sizes and scales of the moves, datum by datum, at :data:`PLACES`; fixed before the run they serve.

    Args:
        log_step: log ε, shape ``(place, datum)``.
        log_scale: log of each latent's scale, shape ``(place, datum, *event)``.
    """

    log_step: Tensor
    log_scale: Tensor

    def at(self, place: float) -> tuple[Tensor, Tensor]:
        """ε of shape ``(datum,)`` and scales of shape ``(datum, *event)`` at a place along the path.

        Example:
            >>> tuning = Tuning(torch.arange(5.0).unsqueeze(1), torch.zeros(5, 1, 2))
            >>> [round(tuning.at(s)[0].log().item(), 6) for s in (0.0, 0.3, 1.0)]
            [0.0, 0.5, 4.0]
        """
        spacing = PLACES[1] - PLACES[0]
        position = min(max((place - PLACES[0]) / spacing, 0.0), len(PLACES) - 1.0)
        low = min(int(position), len(PLACES) - 2)
        log_step, log_scale = (
            torch.lerp(values[low], values[low + 1], position - low) for values in (self.log_step, self.log_scale)
        )
        return log_step.exp(), log_scale.exp()


def tuned(path: Path, plan: Plan) -> Tuning:
    """The pilot run: chains of its own, thrown away, that find step sizes and scales for each datum along the path.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> path = Path.of(vae, Rows(torch.ones(3, 5)))
        >>> tuned(path, Plan(4, 1, 2, lambda: None)).log_scale.shape
        torch.Size([5, 3, 2])
    """
    state = path.at(path.draw(PILOT_CHAINS))
    log_step = state.log_p.new_full((len(path.rows),), math.log(0.5))
    steps, scales = [], []
    for place in PLACES:
        for move in range(PILOT_MOVES):
            if move in (0, PILOT_MOVES // 2):
                scale = state.z.std(0).clamp(min=1e-6)
            state, chance = moved(path, state, path.schedule(place), log_step.exp(), scale, plan.leapfrog)
            log_step = log_step + 1.5 / (1 + move / 4) * (chance.mean(0) - WANTED)
            plan.tick()
        steps.append(log_step)
        scales.append(scale.log())
    return Tuning(torch.stack(steps), torch.stack(scales))


PILOT = len(PLACES) * PILOT_MOVES
"""The pilot's moves."""


def moved(path: Path, state: State, beta: float, step: Tensor, scale: Tensor, leapfrog: int) -> tuple[State, Tensor]:
    """One Hamiltonian move of every chain, which leaves ``f_β`` as it is.

    Step sizes are jittered and their number is drawn, from 1 to ``leapfrog``, both knowing nothing of the chains: of
    one length, orbits could close on themselves, and a move would lead nowhere.

    Args:
        path: both ends.
        state: where the chains are.
        beta: β.
        step: ε in units of ``scale``, shape ``(datum,)``.
        scale: of each latent, shape ``(datum, *event)``.
        leapfrog: steps at most.

    Returns:
        Where the chains are then, and each one's chance that the move was taken, shape ``(K, datum)``.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> path = Path.of(vae, Rows(torch.ones(3, 5)))
        >>> _ = torch.manual_seed(0)
        >>> state, chance = moved(path, path.at(torch.zeros(4, 3, 2)), 0.5, torch.ones(3), torch.ones(3, 2) / 9, 4)
        >>> bool((chance > 0.5).all())
        True
    """
    jitter = 0.8 + 0.4 * torch.rand_like(state.log_q)
    stride = like_event(step * jitter, state.z) * scale
    start = torch.randn_like(state.z)
    momentum, new = start + stride / 2 * state.slope(beta), state
    steps = int(torch.randint(1, leapfrog + 1, ()))
    for i in range(steps):
        new = path.at(new.z + stride * momentum)
        momentum = momentum + (stride if i < steps - 1 else stride / 2) * new.slope(beta)
    kinetic = (start**2 - momentum**2).flatten(2).sum(-1) / 2
    log_ratio = new.log_density(beta) - state.log_density(beta) + kinetic
    chance = log_ratio.clamp(max=0).exp().nan_to_num(0.0)
    return new.where(accepted(log_ratio), state), chance


def accepted(log_ratio: Tensor) -> Tensor:
    """Metropolis' rule; what is not a number is not accepted.

    Example:
        >>> accepted(torch.tensor([0.0, -torch.inf, torch.nan]))
        tensor([ True, False, False])
    """
    return torch.rand_like(log_ratio).log() < log_ratio


def along(path: Path, state: State, places: Sequence[float], tuning: Tuning, plan: Plan) -> tuple[Tensor, Tensor]:
    """The log-weights that chains gather from one end of the path to the other.

    .. math:: \\log w = \\sum_t (\\beta_t - \\beta_{t-1}) [\\log p(x, z_{t-1}) - \\log q(z_{t-1} | x)]

    Args:
        path: both ends.
        state: the chains, drawn from the end that they set out from.
        places: along the path, upwards from 0 to 1 or downwards; downwards the sum is over the same terms.
        tuning: of the moves.
        plan: of the run.

    Returns:
        log w of shape ``(K, datum)``, and the mean chance of acceptance per datum (NaN without moves).

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5).as_vae()
        >>> path = Path.of(vae, Rows(torch.ones(3, 5).double()))
        >>> plan = Plan(4, 1, 2, lambda: None)
        >>> along(path, path.at(path.q.sample((4,))), [0.0, 0.5, 1.0], tuned(path, plan), plan)[0].std() < 1e-9
        tensor(True)
    """
    log_weights, chances = torch.zeros_like(state.log_ratio()), []
    for here, there in itertools.pairwise(places):
        log_weights = log_weights + abs(path.schedule(there) - path.schedule(here)) * state.log_ratio()
        if 0 < there < 1:
            state, chance = moved(path, state, path.schedule(there), *tuning.at(there), plan.leapfrog)
            chances.append(chance.mean(0))
        plan.tick()
    acceptance = torch.stack(chances).mean(0) if chances else torch.full_like(log_weights[0], torch.nan)
    return log_weights, acceptance.double()


def places(temperatures: int) -> list[float]:
    """Evenly from 0 to 1.

    Example:
        >>> places(2)
        [0.0, 0.5, 1.0]
    """
    return [t / temperatures for t in range(temperatures + 1)]


def annealed(vae: Amortised, rows: Rows, plan: Plan) -> Found:
    """Estimate log p(x) by the log of the mean weight of chains from q(z|x) to p(x, z).

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> list(annealed(vae, Rows(torch.ones(3, 5)), Plan(4, 3, 2, lambda: None)))
        ['log_evidence', 'mcse', 'khat', 'bias', 'bias_se', 'acceptance']
    """
    with still(vae):
        return anneal(Path.of(vae, rows), plan)


def annealed_from_prior(vae: Amortised, rows: Rows, plan: Plan) -> Found:
    """Estimate log p(x) by the log of the mean weight of chains from p(z) to p(x, z).

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x, _ = torch.ones(3, 5).double(), torch.manual_seed(0)
        >>> found = annealed_from_prior(linear.as_vae(), Rows(x), Plan(50, 30, 4, lambda: None))
        >>> bool((abs(found["log_evidence"] - linear.log_marginal(x)) < 5 * found["mcse"]).all())
        True
    """
    with still(vae):
        return anneal(Path.from_prior(vae, rows), plan)


def anneal(path: Path, plan: Plan) -> Found:
    """Tune the moves in a pilot run, then run the chains along the path and average their weights.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> with still(vae):
        ...     found = anneal(Path.of(vae, Rows(torch.ones(3, 5))), Plan(4, 3, 2, lambda: None))
        >>> found["acceptance"].shape
        torch.Size([3])
    """
    tuning = tuned(path, plan)
    state = path.at(path.draw(plan.num_particles))
    log_weights, acceptance = along(path, state, places(plan.temperatures), tuning, plan)
    return {**measured(log_weights), "acceptance": acceptance}
