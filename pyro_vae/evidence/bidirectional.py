"""Bidirectional Monte Carlo: lower and upper bounds on log p(x) of simulated data."""

import torch
from torch import Tensor

from pyro_vae.core.component import observed
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.evidence.annealed import Path, State, Tuning, even_positions, frozen, move, traverse, tune
from pyro_vae.evidence.weights import Estimates, Plan, log_mean, tail_shape

SPREADING_MOVES = 10
"""Moves that spread the chains of the upper bound, which all start at one exact draw, over the posterior or a mode."""


def simulate(vae: Amortized, rows: Rows) -> tuple[Tensor, Rows]:
    """Simulate one datum per row, with its context and mask; return the latents and the data.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> z, rows = simulate(vae, Rows(torch.ones(3, 5)))
        >>> z.shape, rows.x.shape
        (torch.Size([3, 2]), torch.Size([3, 5]))
    """
    z = vae.draw_latents(rows)
    x = vae.likelihood(z, rows).sample()
    return z, Rows(observed(x, rows.mask), rows.context, rows.mask)


def bidirectional(vae: Amortized, rows: Rows, plan: Plan) -> Estimates:
    """Bound log p(x) of simulated data from below and from above.

    The latents from which a datum was simulated are an exact draw from its posterior. Annealing from this draw
    backwards gives weights whose inverses are unbiased for ``1 / p(x)``. There is one exact draw per datum, at which
    all chains of the upper bound start, so the chains are independent only given the draw, and the error from the
    spread of their weights is conditional on it. If the posterior has several modes, the chains stay in the mode of the
    draw, and the upper bound varies far more from draw to draw than this error; the gap between the bounds shows it.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> sorted(bidirectional(vae, Rows(torch.ones(3, 5)), Plan(4, 3, 2, lambda: None)))[:4]
        ['acceptance', 'khat', 'log_evidence', 'lower']
    """
    with frozen(vae):
        z, rows = simulate(vae, rows)
        path, upwards = Path.from_guide(vae, rows), even_positions(plan.temperatures)
        tuning = tune(path, plan)
        start = path.at(path.draw(plan.num_particles))
        forward, forward_acceptance = traverse(path, start, upwards, tuning, plan)
        exact = spread_exact_draws(path, z, tuning, plan)
        backward, backward_acceptance = traverse(path, exact, upwards[::-1], tuning, plan)
    lower, lower_error = log_mean(forward)
    inverse, upper_error = log_mean(-backward)
    half_gap = (lower + inverse) / 2
    return {
        "log_evidence": (lower - inverse) / 2,
        "mcse": (half_gap**2 + (lower_error**2 + upper_error**2) / 4).sqrt(),
        "khat": tail_shape(forward),
        "lower": lower,
        "lower_mcse": lower_error,
        "upper": -inverse,
        "upper_mcse_given_z": upper_error,
        "acceptance": (forward_acceptance + backward_acceptance) / 2,
        "x": rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan),
        "z": z,
    }


def spread_exact_draws(path: Path, z: Tensor, tuning: Tuning, plan: Plan) -> State:
    """Start chains at one exact draw per datum, and spread them by moves that leave the posterior invariant.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> plan = Plan(4, 3, 2, lambda: None)
        >>> z, rows = simulate(vae, Rows(torch.ones(3, 5)))
        >>> path = Path.from_guide(vae, rows)
        >>> spread_exact_draws(path, z, tune(path, plan), plan).z.shape
        torch.Size([4, 3, 2])
    """
    state = path.at(z.expand(plan.num_particles, *z.shape))
    for _ in range(SPREADING_MOVES):
        state, _ = move(path, state, 1.0, *tuning.at(1.0), plan.leapfrog)
        plan.tick()
    return state
