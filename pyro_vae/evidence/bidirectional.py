"""Bidirectional Monte Carlo: log p(x) of simulated data, from below and from above."""

import torch
from torch import Tensor

from pyro_vae.core import VAE, observed
from pyro_vae.diagnose._prior import latents, likelihood
from pyro_vae.evidence.annealed import Path, State, Tuning, along, moved, places, still, tuned
from pyro_vae.evidence.weights import Found, Plan, log_mean
from pyro_vae.rows import Rows

APART = 10
"""Moves that take the chains from above apart, all of which start at the one exact draw."""


def simulated(vae: VAE, rows: Rows) -> tuple[Tensor, Rows]:
    """As many data as there are rows, at their contexts and masks, and the latents that made them.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> z, rows = simulated(vae, Rows(torch.ones(3, 5)))
        >>> z.shape, rows.x.shape
        (torch.Size([3, 2]), torch.Size([3, 5]))
    """
    z = latents(vae, len(rows), rows.context)
    x = likelihood(vae, z, rows.context).sample()
    return z, Rows(observed(x, rows.mask), rows.context, rows.mask)


def bidirectional(vae: VAE, rows: Rows, plan: Plan) -> Found:
    """The bounds of data simulated like the rows.

    The latents that made a datum are an exact draw from its posterior, from which annealing can go
    backwards; the mean of the inverse weights is then unbiased for ``1 / p(x)``.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> sorted(bidirectional(vae, Rows(torch.ones(3, 5)), Plan(4, 3, 2, lambda: None)))[:3]
        ['acceptance', 'log_evidence', 'lower']
    """
    with still(vae):
        z, rows = simulated(vae, rows)
        path, upwards = Path.of(vae, rows), places(plan.temperatures)
        tuning = tuned(path, plan)
        start = path.at(path.q.sample((plan.num_particles,)))
        forward, acceptance = along(path, start, upwards, tuning, plan)
        exact = exact_draws(path, z, tuning, plan)
        backward, again = along(path, exact, upwards[::-1], tuning, plan)
    lower, lower_error = log_mean(forward)
    inverse, upper_error = log_mean(-backward)
    return {
        "log_evidence": (lower - inverse) / 2,
        "mcse": torch.hypot(lower_error, upper_error) / 2,
        "lower": lower,
        "lower_mcse": lower_error,
        "upper": -inverse,
        "upper_mcse": upper_error,
        "acceptance": (acceptance + again) / 2,
        "x": rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan),
        "z": z,
    }


def exact_draws(path: Path, z: Tensor, tuning: Tuning, plan: Plan) -> State:
    """Chains at one exact draw from each posterior, taken apart by moves that leave it the posterior's.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> plan = Plan(4, 3, 2, lambda: None)
        >>> z, rows = simulated(vae, Rows(torch.ones(3, 5)))
        >>> path = Path.of(vae, rows)
        >>> exact_draws(path, z, tuned(path, plan), plan).z.shape
        torch.Size([4, 3, 2])
    """
    state = path.at(z.expand(plan.num_particles, *z.shape))
    for _ in range(APART):
        state, _ = moved(path, state, 1.0, *tuning.at(1.0), plan.leapfrog)
        plan.tick()
    return state
