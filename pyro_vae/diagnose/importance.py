"""Pareto k̂ and effective sample size of the importance weights of q, for each datum."""

import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import numbers_at_once, seeded, validate_seed
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate
from pyro_vae.core.pair import Amortized
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import row_names
from pyro_vae.elbo import log_weights
from pyro_vae.errors import ModelError
from pyro_vae.evidence.psis import BAD, GOOD, LEAST, psis, tail_length

SOME, MANY = 0.02, 0.25
"""The shares of data with k̂ above BAD beyond which q is doubtful, and bad."""


@torch.no_grad()
@takes_settings
def khat(vae: Amortized, x: Any, *, num_particles: int = 1000, seed: int = 0, chunk: int = 2**20) -> xr.Dataset:
    """Estimate the Pareto shape k̂ and the effective sample size of each datum's importance weights.

    .. math:: w_{ki} = p(x_i, z_{ki}) / q(z_{ki} | x_i), \\qquad
        \\mathrm{ESS}_i = \\frac{(\\sum_k w_{ki})^2}{\\sum_k w_{ki}^2}

    k̂ is the shape of the generalized Pareto distribution fitted to the largest weights of one datum; weights of
    several data are never pooled. An exact guide has constant weights: no tail (k̂ is then 0), and an ESS of K. If q is
    too narrow somewhere, the weights have a heavy tail, and the estimated ESS is too high.

    Args:
        vae: a VAE or a :class:`pyro_vae.Pair`.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        num_particles: K, at least 25; the error of k̂ falls as its fourth root.
        seed: of the particles.
        chunk: the approximate number of values to process at a time (64 times as many on a GPU).

    Returns:
        A dataset over ``datum``, labelled by row if the rows have labels: ``khat``; ``ess``, the effective sample size
        (of K) of the smoothed weights; and ``khat_se``, ``ess_se``, their Monte-Carlo standard errors (from
        large-sample formulas; that of ESS is reliable for k̂ below ¼). Over ``threshold`` (0.5 and 0.7): ``share``, the
        share of data whose k̂ is above it, and ``share_se``, its standard error for this number of data (of a Beta
        distribution, so that a share of 0 has an error too).

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data, or a weight is not a number.
        SettingsError: if ``num_particles`` is below 25.

    References:
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
        | Yes, but Did It Work? (Yao et al., 2018), https://arxiv.org/abs/1802.02538

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> found = khat(linear.as_vae(), torch.ones(3, 5), num_particles=100)
        >>> found.khat.values, found.ess.values.round(9)
        (array([0., 0., 0.]), array([100., 100., 100.]))
    """
    whole("num_particles", num_particles, LEAST)
    whole("chunk", chunk, 1)
    validate_seed(seed)
    x = data_for(vae, x)
    rows, parts = rows_for(vae, x).like(vae), []
    names = row_names(x, len(rows))
    size = max(1, numbers_at_once(chunk, rows.x.device) // (num_particles * rows.x[0].numel()))
    with seeded(seed, rows.x.device), evaluating(vae, num_particles * min(size, len(rows))):
        for start, part in enumerate(rows.split(size)):
            weights = log_weights(vae.model, vae.guide, *part.arguments(), num_particles=num_particles)
            _validate_weights(weights, names[start * size :])
            smoothed, shape = psis(weights)
            parts.append(np.stack([shape, _shape_error(shape, num_particles), *_effective(smoothed)]))
    shape, shape_se, ess, ess_se = np.concatenate(parts, 1)
    above = np.array([(shape > threshold).mean() for threshold in (GOOD, BAD)])
    units = {"khat": "1", "ess": f"draws, of {num_particles}", "share": "share of the data"}
    found = {"khat": shape, "khat_se": shape_se, "ess": ess, "ess_se": ess_se}
    variables = {name: ("datum", value, {"units": units[name.split("_")[0]]}) for name, value in found.items()}
    middle, number = (above * len(shape) + 1) / (len(shape) + 2), len(shape)
    shares = {"share": above, "share_se": np.sqrt(middle * (1 - middle) / (number + 3))}
    return xr.Dataset(
        variables | {name: ("threshold", value, {"units": units["share"]}) for name, value in shares.items()},
        coords={"datum": names, "threshold": [GOOD, BAD]},
        attrs={"good_below": GOOD, "bad_above": BAD, "num_particles": num_particles, "seed": seed, **versions()},
    )


def _validate_weights(log_weights: Tensor, names: np.ndarray) -> None:
    """Raise a ModelError that names the first datum whose weights have a sum of 0, infinity or NaN."""
    wrong = (~log_weights.logsumexp(0).isfinite()).nonzero()
    if len(wrong):
        raise ModelError(
            f"the importance weights of datum {names[int(wrong[0])]} are all 0, or one is infinite or NaN; check the "
            "densities of the decoder, prior and encoder for it"
        )


def _shape_error(shape: np.ndarray, num_particles: int) -> np.ndarray:
    """Return the standard error of k̂: (1 + k) / √M for large M, shrunk as the prior of the fit shrinks k̂ to ½."""
    tail, prior = tail_length(num_particles), 10
    unshrunk = (shape * (tail + prior) - prior / 2) / tail
    error = (1 + np.maximum(unshrunk, -0.5)) * math.sqrt(tail) / (tail + prior)
    return np.where(shape == 0, 0.0, error)


def _effective(smoothed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the effective sample size of normalized log-weights, and its standard error by the delta method."""
    number = smoothed.shape[1]
    weights = number * np.exp(smoothed)  # with mean 1
    square = (weights**2).mean(1)
    slope = 2 * weights / square[:, None] - weights**2 / square[:, None] ** 2  # up to a constant
    return number / square, math.sqrt(number) * slope.std(1)


def judge_khat(found: xr.Dataset) -> Finding:
    """Judge whether q's importance weights are reliable.

    Args:
        found: from :func:`khat`.

    Returns:
        Fine if at most 2 % of the data have k̂ above 0.7 and the median is below 0.5, bad if more than a quarter
        are above 0.7, else doubtful.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> judge_khat(khat(vae, torch.ones(3, 5))).level
        'fine'
    """
    shape, number = found.khat.values, found.sizes["datum"]
    share, error = float(found.share[-1]), float(found.share_se[-1])
    typical, worst = float(np.median(shape)), int(shape.argmax())
    name = found.datum.values[worst]
    level: Level = "bad" if share > MANY else "fine" if share <= SOME and typical < GOOD else "doubtful"
    why = (
        f"k̂ is above {BAD} for {format_estimate(100 * share, 100 * error, '%', over='data')} of {number} data; its "
        f"median is {typical:.2f} (good below {GOOD}), and the worst is datum {name} with "
        f"{format_estimate(shape[worst], float(found.khat_se[worst]), over='draws')}; "
        f"median ESS {float(found.ess.median()):.0f} of {found.attrs['num_particles']}"
    )
    return Finding("importance weights (k̂)", level, why, "" if level == "fine" else NEXT)


NEXT = (
    "look at the worst data (plots.khat), and do not use q's draws or weights for them; use a richer posterior "
    "(FullNormal, Flow, Refined) or a larger encoder, or train longer if the validation ELBO still rises"
)
