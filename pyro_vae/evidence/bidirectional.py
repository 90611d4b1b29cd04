"""Bidirectional Monte Carlo: log p(x) of simulated data, from below and from above."""

import torch
from torch import Tensor

from pyro_vae.core.component import observed
from pyro_vae.core.generate import latents
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.evidence.annealed import Path, State, Tuning, along, moved, places, still, tuned
from pyro_vae.evidence.weights import Found, Plan, log_mean, tail_shape

APART = 10
"""Moves that spread the chains of the upper bound over the posterior (or its mode): all start at one exact draw."""


def simulated(vae: VAE, rows: Rows) -> tuple[Tensor, Rows]:
    """As many data as there are rows, at their contexts and masks, and the latents that made them.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> z, rows = simulated(vae, Rows(torch.ones(3, 5)))
        >>> z.shape, rows.x.shape
        (torch.Size([3, 2]), torch.Size([3, 5]))
    """
    z = latents(vae, rows)
    x = vae.likelihood(z, rows).sample()
    return z, Rows(observed(x, rows.mask), rows.context, rows.mask)


def bidirectional(vae: VAE, rows: Rows, plan: Plan) -> Found:
    """Bound log p(x) of data simulated like the rows, from below and from above.

    The latents that made a datum are an exact draw from its posterior, from which annealing can go
    backwards; the mean of the inverse weights is then unbiased for ``1 / p(x)``. A datum has one exact draw. All chains
    of its upper bound start there, so they are independent only given that draw, and the spread of their weights is the
    error given that draw. Where the posterior has several modes the chains stay in the mode of the draw, and the upper
    bound changes far more from draw to draw than that error says; the gap of the bounds then shows it.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> sorted(bidirectional(vae, Rows(torch.ones(3, 5)), Plan(4, 3, 2, lambda: None)))[:4]
        ['acceptance', 'khat', 'log_evidence', 'lower']
    """
    with still(vae):
        z, rows = simulated(vae, rows)
        path, upwards = Path.of(vae, rows), places(plan.temperatures)
        tuning = tuned(path, plan)
        start = path.at(path.draw(plan.num_particles))
        forward, acceptance = along(path, start, upwards, tuning, plan)
        exact = exact_draws(path, z, tuning, plan)
        backward, again = along(path, exact, upwards[::-1], tuning, plan)
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
        "acceptance": (acceptance + again) / 2,
        "x": rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan),
        "z": z,
    }


def exact_draws(path: Path, z: Tensor, tuning: Tuning, plan: Plan) -> State:
    """Start chains at one exact draw from each posterior, and spread them by moves that leave that posterior as it is.

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
