"""Judgement of the error of estimates of the evidence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate
from pyro_vae.evidence.psis import BAD as BAD_KHAT
from pyro_vae.evidence.psis import GOOD as GOOD_KHAT

CLOSE_ENOUGH, TOO_FAR = 0.1, 1.0
"""Errors of log p(x) in nats per datum: fine below the first, bad above the second."""

NOISY = 0.3
"""The standard error (nats) above which a few weights dominate the mean, so that the error itself is unreliable."""

SOME, HALF = 0.1, 0.5
"""Shares of the data with bad weights: doubtful above the first, bad above the second."""

ERRORS, PRECISE = 2.0, 0.2
"""Two estimates agree within this many standard errors, if these amount to at most this many nats."""

LEVELS: tuple[Level, ...] = ("fine", "doubtful", "bad")

COVER = "use a guide that covers the posterior: q misses a mode, or mass that inference gaps can show"
CHECK = "run pyro_vae.evidence.cross_check(vae, x, found) and judge its result"
RICHER = 'use method="ais", more particles, or a richer posterior'
SLOWER = "repeat pyro_vae.evidence.cross_check with more temperatures or particles"


@dataclass(frozen=True)
class Part:
    """A part of a judgement: its level, the reason, and the next step."""

    level: Level
    why: str
    next: str = ""


def judge_evidence(found: xr.Dataset) -> Finding:
    """Judge the error of an estimate of log p(x).

    For ``"bdmc"``, the mean gap between the bounds decides. Otherwise four criteria decide: the bias, the standard
    errors, k̂, and the agreement with a second estimate from another start
    (:func:`~pyro_vae.evidence.cross_check`). The first three depend on the draws only and look good even if the guide
    misses a mode, so without the fourth the result is at best ``doubtful``.

    Args:
        found: the result of :func:`pyro_vae.log_evidence` or :func:`~pyro_vae.evidence.cross_check`.

    Returns:
        ``fine`` if the error of log p(x) is below 0.1 nats per datum and a second estimate agrees; ``bad`` if it is
        above 1 nat per datum, or if k̂ is above 0.7 for more than half of the data; otherwise ``doubtful``.

    References:
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> vae, x = linear.as_vae(), torch.ones(3, 5).double()
        >>> found = pv.log_evidence(vae, x)
        >>> judge_evidence(found).level, judge_evidence(pv.evidence.cross_check(vae, x, found)).level
        ('doubtful', 'fine')
    """
    bounds = found.attrs["method"] == "bdmc"
    parts = [_gap(found)] if bounds else [_bias(found), _noise(found), _tails(found), agreement(found)]
    level = max((part.level for part in parts), key=LEVELS.index)
    steps = dict.fromkeys(part.next for part in parts if part.level != "fine")
    return Finding("evidence", level, "; ".join(part.why for part in parts), "; ".join(steps))


def _level(error: float) -> Level:
    return "fine" if error < CLOSE_ENOUGH else "doubtful" if error < TOO_FAR else "bad"


def _with_error(values: Sequence[float] | np.ndarray) -> str:
    """The mean and, for several values, its standard error."""
    values = np.asarray(values, dtype=float)
    error = float(values.std(ddof=1)) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return format_estimate(values.mean(), error, "nats", over="data")


LIMITS = f"(fine below {CLOSE_ENOUGH:g}, bad above {TOO_FAR:g})"


def _gap(found: xr.Dataset) -> Part:
    gap = (found.upper - found.lower).values
    error = float(gap.std(ddof=1) / np.sqrt(len(gap))) if len(gap) > 1 else np.inf
    why = f"the bounds on log p(x) of {len(gap)} simulated data are {_with_error(gap)} apart {LIMITS}"
    level = _level(abs(float(gap.mean())))
    if level == "fine" and ERRORS * error > PRECISE:
        level, why = "doubtful", f"{why}, which is too imprecise"
    return Part(level, why, "use more temperatures, simulate more data, or use a richer posterior (a shorter path)")


def _bias(found: xr.Dataset) -> Part:
    deficit = -found.bias.values.astype(float)
    why = (
        f"{found.attrs['estimate']} with {found.attrs['num_particles']} particles underestimates log p(x) of "
        f"{len(deficit)} data by {_with_error(deficit)} {LIMITS}, with a median of {np.nanmedian(deficit):.2g}"
    )
    return Part(_level(abs(float(deficit.mean()))), why, RICHER)


def _noise(found: xr.Dataset) -> Part:
    noisy = float((found.mcse > NOISY).mean())
    error = float(np.sqrt((found.mcse**2).mean()))
    why = f"the standard error of a datum is {error:.3g} nats, above {NOISY:g} for {noisy:.0%} of the data"
    return Part("doubtful" if noisy > SOME else "fine", why, RICHER)


def _tails(found: xr.Dataset) -> Part:
    if found.khat.isnull().any():
        return Part("doubtful", "k̂ is unknown, since it needs 25 particles", "use at least 25 particles")
    heavy, rough = (float((found.khat > limit).mean()) for limit in (BAD_KHAT, GOOD_KHAT))
    level: Level = "bad" if heavy > HALF else "doubtful" if heavy > SOME else "fine"
    why = f"k̂ is above {BAD_KHAT} for {heavy:.0%} and above {GOOD_KHAT} for {rough:.0%} of the data"
    if rough > SOME:
        why += ", where the estimated bias is rough and may be too small"
    return Part(level, why, RICHER)


def agreement(found: xr.Dataset) -> Part:
    """Judge whether a second estimate agrees; it would be higher if the first missed a mode."""
    if "difference" not in found:
        return Part("doubtful", "no check for missed modes was run", CHECK)
    number = found.sizes["checked"]
    difference, error = float(found.difference.mean()), float(np.sqrt((found.difference_se**2).sum())) / number
    second = f"{found.attrs['second_estimate']} gives {format_estimate(abs(difference), error, 'nats', over='draws')} "
    second += f"{'more' if difference < 0 else 'less'} for {number} of them"
    if difference < -max(CLOSE_ENOUGH, ERRORS * error):
        share = float(found.difference.min()) / float(found.difference.sum())
        outlier = f" ({share:.0%} of it from one datum)" if number > 1 and share > HALF else ""
        return Part(_level(-difference), f"{second}, which the first estimate missed{outlier}", COVER)
    heavy = float((found.second_khat > BAD_KHAT).mean())
    if heavy > SOME:
        return Part("doubtful", f"{second}, but its k̂ is above {BAD_KHAT} for {heavy:.0%} of them", SLOWER)
    if abs(difference) <= CLOSE_ENOUGH + ERRORS * error and ERRORS * error <= PRECISE:
        return Part("fine", f"{second}, which agrees")
    why = "too imprecise for a check" if ERRORS * error > PRECISE else "too low for a check"
    return Part("doubtful", f"{second}, {why}", SLOWER)
