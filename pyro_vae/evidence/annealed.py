"""Annealed importance sampling from q(z|x) or p(z) to p(x, z), with Hamiltonian moves."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_vae.core.compatibility import validate_real
from pyro_vae.core.component import Distribution
from pyro_vae.core.joined import JoinedPosterior
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.evidence.weights import Estimates, Plan, estimate_log_mean

POSITIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""The positions along the path at which the pilot run tunes step sizes, which are interpolated in between."""

PILOT_CHAINS, PILOT_MOVES = 16, 12
"""The number of chains per datum in the pilot run, and of their moves at each position."""

TARGET_ACCEPTANCE = 0.75
"""The acceptance rate to which step sizes are tuned."""

STEEPNESS = 2.0
"""The steepness of the logistic schedule from the guide."""

POWER = 4
"""The exponent of the schedule from the prior."""


def temperature(position: float) -> float:
    """Return β at a position along the path, on a logistic curve that changes slowly near both ends.

    Example:
        >>> [round(temperature(position), 3) for position in (0.0, 0.25, 0.5, 1.0)]
        [0.0, 0.197, 0.5, 1.0]
    """
    low, high, value = (1 / (1 + math.exp(-STEEPNESS * (2 * s - 1))) for s in (0.0, 1.0, position))
    return (value - low) / (high - low)


def power_temperature(position: float) -> float:
    """Return β at a position along the path from the prior, ``position⁴``.

    β changes slowly near the prior, where a small weight of the likelihood has the largest effect.

    References:
        | Marginal Likelihood Estimation via Power Posteriors (Friel & Pettitt, 2008),
          https://doi.org/10.1111/j.1467-9868.2007.00650.x

    Example:
        >>> power_temperature(0.5), power_temperature(1.0)
        (0.0625, 1.0)
    """
    return position**POWER


@dataclass(frozen=True, eq=False)
class State:
    """The chains, with the log-densities of both ends of the path and their gradients.

    Args:
        z: latents, shape ``(K, datum, *event)``.
        log_q: log q(z|x), or log p(z) on a path from the prior, shape ``(K, datum)``.
        log_p: log p(x, z), shape ``(K, datum)``.
        slope_q: the gradient of ``log_q`` with respect to z.
        slope_p: the gradient of ``log_p`` with respect to z.
    """

    z: Tensor
    log_q: Tensor
    log_p: Tensor
    slope_q: Tensor
    slope_p: Tensor

    def log_density(self, beta: float) -> Tensor:
        """Return (1 - β) log q + β log p, shape ``(K, datum)``."""
        return (1 - beta) * self.log_q + beta * self.log_p

    def slope(self, beta: float) -> Tensor:
        """Return the gradient of :meth:`log_density` with respect to z."""
        return (1 - beta) * self.slope_q + beta * self.slope_p

    def log_ratio(self) -> Tensor:
        """Return log p - log q in double precision."""
        return self.log_p.double() - self.log_q.double()

    def where(self, condition: Tensor, other: "State") -> "State":
        """Select chains from this state where ``condition``, shape ``(K, datum)``, else from the other state."""
        wide = append_event_dims(condition, self.z)
        return State(
            torch.where(wide, self.z, other.z),
            torch.where(condition, self.log_q, other.log_q),
            torch.where(condition, self.log_p, other.log_p),
            torch.where(wide, self.slope_q, other.slope_q),
            torch.where(wide, self.slope_p, other.slope_p),
        )


def append_event_dims(value: Tensor, z: Tensor) -> Tensor:
    """Append dimensions to a value per datum, or per chain and datum, so that it broadcasts with latents.

    Example:
        >>> append_event_dims(torch.ones(3), torch.ones(4, 3, 2, 2)).shape
        torch.Size([3, 1, 1])
    """
    return value.reshape(*value.shape, *[1] * (z.dim() - 2))


@dataclass(frozen=True, eq=False)
class Path:
    """The path of densities from q(z|x), or from p(z), to p(x, z).

    .. math:: \\log f_\\beta(z) = (1 - \\beta) \\log q(z | x) + \\beta \\log p(x, z)

    Args:
        rows: the data.
        q: the distribution of the chains at β = 0.
        log_joint: log p(x, z) as a function of z; its parameters must not require gradients.
        schedule: β as a function of the position, from 0 to 1.
    """

    rows: Rows
    q: Distribution | JoinedPosterior
    log_joint: Callable[[Tensor], Tensor]
    schedule: Callable[[float], float] = temperature

    @classmethod
    def from_guide(cls, vae: Amortized, rows: Rows) -> "Path":
        """Build the path from the guide.

        Raises:
            ModelError: if z is discrete or bounded.

        Example:
            >>> import pyro_vae as pv
            >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
            >>> Path.from_guide(vae, Rows(torch.ones(3, 5))).at(torch.zeros(4, 3, 2)).slope_p.shape
            torch.Size([4, 3, 2])
        """
        with torch.no_grad():
            q, prior = vae.posterior(rows), vae.prior_of(rows)
        validate_real(q, "the encoder")
        validate_real(prior, "the prior")
        return cls(rows, q, vae.log_joint_of(rows))

    @classmethod
    def from_prior(cls, vae: Amortized, rows: Rows) -> "Path":
        """Build the path from the prior, which does not use the guide; it raises as :meth:`from_guide` does."""
        with torch.no_grad():
            prior = vae.prior_of(rows)
        validate_real(prior, "the prior")
        return cls(rows, prior, vae.log_joint_of(rows), power_temperature)

    def draw(self, chains: int) -> Tensor:
        """Draw the initial latents of ``chains`` chains per datum, shape ``(chains, datum, *event)``."""
        return self.q.sample((chains,) if self.q.batch_shape else (chains, len(self.rows)))

    def at(self, z: Tensor) -> State:
        """Evaluate both ends and their gradients; NaN where z is not finite, so that such a move is rejected."""
        finite = z.isfinite()
        inside = finite.flatten(2).all(-1)
        nan = torch.full((), torch.nan, dtype=z.dtype, device=z.device)
        with torch.enable_grad():
            z = torch.where(finite, z, torch.zeros_like(nan)).detach().requires_grad_()
            log_q = self.q.log_prob(z)
            log_p = self.log_joint(z)
            (slope_q,) = torch.autograd.grad(log_q.sum(), z)
            (slope_p,) = torch.autograd.grad(log_p.sum(), z)
        slope_p = torch.where(append_event_dims(inside, z), slope_p, nan)
        return State(z.detach(), log_q.detach(), torch.where(inside, log_p.detach(), nan), slope_q, slope_p)


@contextmanager
def frozen(vae: Amortized) -> Iterator[None]:
    """Turn off parameter gradients and Pyro's validation, since the decoder may not be finite at a rejected move.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> with frozen(vae):
        ...     any(p.requires_grad for p in vae.parameters())
        False
    """
    trainable = [p for p in vae.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass(frozen=True, eq=False)
class Tuning:
    """The step sizes and scales of the moves of each datum at :data:`POSITIONS`, from the pilot run.

    Args:
        log_step: log ε, shape ``(position, datum)``.
        log_scale: the logarithm of the scale of each latent, shape ``(position, datum, *event)``.
    """

    log_step: Tensor
    log_scale: Tensor

    def at(self, position: float) -> tuple[Tensor, Tensor]:
        """Interpolate ε, shape ``(datum,)``, and the scales, shape ``(datum, *event)``, at a position.

        Example:
            >>> tuning = Tuning(torch.arange(5.0).unsqueeze(1), torch.zeros(5, 1, 2))
            >>> [round(tuning.at(s)[0].log().item(), 6) for s in (0.0, 0.3, 1.0)]
            [0.0, 0.5, 4.0]
        """
        spacing = POSITIONS[1] - POSITIONS[0]
        index = min(max((position - POSITIONS[0]) / spacing, 0.0), len(POSITIONS) - 1.0)
        low = min(int(index), len(POSITIONS) - 2)
        log_step, log_scale = (
            torch.lerp(values[low], values[low + 1], index - low) for values in (self.log_step, self.log_scale)
        )
        return log_step.exp(), log_scale.exp()


def tune(path: Path, plan: Plan) -> Tuning:
    """Tune step sizes and scales of each datum along the path in a pilot run, whose chains are discarded.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> path = Path.from_guide(vae, Rows(torch.ones(3, 5)))
        >>> tune(path, Plan(4, 1, 2, lambda: None)).log_scale.shape
        torch.Size([5, 3, 2])
    """
    state = path.at(path.draw(PILOT_CHAINS))
    log_step = state.log_p.new_full((len(path.rows),), math.log(0.5))
    steps, scales = [], []
    for position in POSITIONS:
        for i in range(PILOT_MOVES):
            if i in (0, PILOT_MOVES // 2):
                scale = state.z.std(0).clamp(min=1e-6)
            state, acceptance = move(path, state, path.schedule(position), log_step.exp(), scale, plan.leapfrog)
            log_step = log_step + 1.5 / (1 + i / 4) * (acceptance.mean(0) - TARGET_ACCEPTANCE)
            plan.tick()
        steps.append(log_step)
        scales.append(scale.log())
    return Tuning(torch.stack(steps), torch.stack(scales))


PILOT = len(POSITIONS) * PILOT_MOVES
"""The number of moves in the pilot run."""


def move(path: Path, state: State, beta: float, step: Tensor, scale: Tensor, leapfrog: int) -> tuple[State, Tensor]:
    """Make one Hamiltonian move of every chain, which leaves ``f_β`` invariant.

    The step size is jittered and the number of leapfrog steps is drawn from 1 to ``leapfrog``, both independently of
    the chains. With a fixed length, trajectories could be periodic and return to their start.

    Args:
        path: the path.
        state: the chains.
        beta: β.
        step: ε in units of ``scale``, shape ``(datum,)``.
        scale: the scale of each latent, shape ``(datum, *event)``.
        leapfrog: the largest number of leapfrog steps.

    Returns:
        The chains after the move, and their acceptance probabilities, shape ``(K, datum)``.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011), https://arxiv.org/abs/1206.1901

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> path = Path.from_guide(vae, Rows(torch.ones(3, 5)))
        >>> _ = torch.manual_seed(0)
        >>> state, chance = move(path, path.at(torch.zeros(4, 3, 2)), 0.5, torch.ones(3), torch.ones(3, 2) / 9, 4)
        >>> bool((chance > 0.5).all())
        True
    """
    jitter = 0.8 + 0.4 * torch.rand_like(state.log_q)
    stride = append_event_dims(step * jitter, state.z) * scale
    start = torch.randn_like(state.z)
    momentum, new = start + stride / 2 * state.slope(beta), state
    steps = int(torch.randint(1, leapfrog + 1, ()))
    for i in range(steps):
        new = path.at(new.z + stride * momentum)
        momentum = momentum + (stride if i < steps - 1 else stride / 2) * new.slope(beta)
    kinetic = (start**2 - momentum**2).flatten(2).sum(-1) / 2
    log_ratio = new.log_density(beta) - state.log_density(beta) + kinetic
    acceptance = log_ratio.clamp(max=0).exp().nan_to_num(0.0)
    return new.where(accept(log_ratio), state), acceptance


def accept(log_ratio: Tensor) -> Tensor:
    """Draw acceptance by the Metropolis rule; NaN is rejected.

    Example:
        >>> accept(torch.tensor([0.0, -torch.inf, torch.nan]))
        tensor([ True, False, False])
    """
    return torch.rand_like(log_ratio).log() < log_ratio


def traverse(path: Path, state: State, positions: Sequence[float], tuning: Tuning, plan: Plan) -> tuple[Tensor, Tensor]:
    """Move chains from one end of the path to the other and accumulate their log-weights.

    .. math:: \\log w = \\sum_t (\\beta_t - \\beta_{t-1}) [\\log p(x, z_{t-1}) - \\log q(z_{t-1} | x)]

    Args:
        path: the path.
        state: the chains, drawn from the end of the path at which they start.
        positions: positions along the path, from 0 to 1 or from 1 to 0; the terms of the sum are the same for both.
        tuning: the step sizes and scales of the moves.
        plan: the settings of the run.

    Returns:
        log w of shape ``(K, datum)``, and the mean acceptance probability per datum (NaN without moves).

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5).as_vae()
        >>> path = Path.from_guide(vae, Rows(torch.ones(3, 5).double()))
        >>> plan = Plan(4, 1, 2, lambda: None)
        >>> traverse(path, path.at(path.q.sample((4,))), [0.0, 0.5, 1.0], tune(path, plan), plan)[0].std() < 1e-9
        tensor(True)
    """
    log_weights, acceptances = torch.zeros_like(state.log_ratio()), []
    for start, end in itertools.pairwise(positions):
        log_weights = log_weights + abs(path.schedule(end) - path.schedule(start)) * state.log_ratio()
        if 0 < end < 1:
            state, acceptance = move(path, state, path.schedule(end), *tuning.at(end), plan.leapfrog)
            acceptances.append(acceptance.mean(0))
        plan.tick()
    mean = torch.stack(acceptances).mean(0) if acceptances else torch.full_like(log_weights[0], torch.nan)
    return log_weights, mean.double()


def even_positions(temperatures: int) -> list[float]:
    """Space positions evenly from 0 to 1.

    Example:
        >>> even_positions(2)
        [0.0, 0.5, 1.0]
    """
    return [t / temperatures for t in range(temperatures + 1)]


def anneal_from_guide(vae: Amortized, rows: Rows, plan: Plan) -> Estimates:
    """Estimate log p(x) by the log of the mean weight of chains from q(z|x) to p(x, z).

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> list(anneal_from_guide(vae, Rows(torch.ones(3, 5)), Plan(4, 3, 2, lambda: None)))
        ['log_evidence', 'mcse', 'khat', 'bias', 'bias_se', 'acceptance']
    """
    with frozen(vae):
        return anneal(Path.from_guide(vae, rows), plan)


def anneal_from_prior(vae: Amortized, rows: Rows, plan: Plan) -> Estimates:
    """Estimate log p(x) by the log of the mean weight of chains from p(z) to p(x, z).

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x, _ = torch.ones(3, 5).double(), torch.manual_seed(0)
        >>> found = anneal_from_prior(linear.as_vae(), Rows(x), Plan(50, 30, 4, lambda: None))
        >>> bool((abs(found["log_evidence"] - linear.log_marginal(x)) < 5 * found["mcse"]).all())
        True
    """
    with frozen(vae):
        return anneal(Path.from_prior(vae, rows), plan)


def anneal(path: Path, plan: Plan) -> Estimates:
    """Tune the moves in a pilot run, then run the chains along the path and average their weights.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> with frozen(vae):
        ...     found = anneal(Path.from_guide(vae, Rows(torch.ones(3, 5))), Plan(4, 3, 2, lambda: None))
        >>> found["acceptance"].shape
        torch.Size([3])
    """
    tuning = tune(path, plan)
    state = path.at(path.draw(plan.num_particles))
    log_weights, acceptance = traverse(path, state, even_positions(plan.temperatures), tuning, plan)
    return {**estimate_log_mean(log_weights), "acceptance": acceptance}
