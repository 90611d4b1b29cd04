"""What estimates of the evidence are worth, in words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate
from pyro_vae.evidence.psis import BAD as BAD_KHAT
from pyro_vae.evidence.psis import GOOD as GOOD_KHAT

CLOSE_ENOUGH, TOO_FAR = 0.1, 1.0
"""Nats per datum by which log p(x) may be off: below the first all is fine, above the second it is bad."""

NOISY = 0.3
"""Standard error (nats) above which a handful of weights make the mean, so that the error is not known itself."""

SOME, HALF = 0.1, 0.5
"""Shares of the data for which the weights may be bad: above the first nothing is fine, above the second it is bad."""

ERRORS, PRECISE = 2.0, 0.2
"""Estimates from two starts agree within so many standard errors, if these errors come to so many nats at most."""

LEVELS: tuple[Level, ...] = ("fine", "doubtful", "bad")

COVER = "take a guide that covers the posterior: another mode, or mass that inference gaps show q to miss"
CHECK = "run pyro_vae.evidence.cross_check(vae, x, found) and judge what it returns"
RICHER = 'take method="ais" or more particles, or a richer posterior'
SLOWER = "repeat pyro_vae.evidence.cross_check with more temperatures or particles"


@dataclass(frozen=True)
class Part:
    """One part of a judgement."""

    level: Level
    why: str
    next: str = ""


def judge_evidence(found: xr.Dataset) -> Finding:
    """Judge how far off log p(x) may be.

    With two bounds, their mean gap decides. Otherwise four things do: the measured bias, the standard errors, k̂, and
    the agreement with a second estimate from another start (:func:`~pyro_vae.evidence.cross_check`). The first three
    come from the draws that were made, and are good where the guide misses a mode; so without the fourth nothing is
    fine.

    Args:
        found: from :func:`pyro_vae.log_evidence` or :func:`~pyro_vae.evidence.cross_check`.

    Returns:
        ``fine`` where log p(x) is off by less than 0.1 nats per datum and a check that could have shown more agrees;
        ``bad`` where it is off by more than 1, or more than half of the data have a k̂ above 0.7; else ``doubtful``.

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


def _by_size(off: float) -> Level:
    return "fine" if off < CLOSE_ENOUGH else "doubtful" if off < TOO_FAR else "bad"


def _with_error(values: Sequence[float] | np.ndarray) -> str:
    """The mean and, of several, its standard error."""
    values = np.asarray(values, dtype=float)
    error = float(values.std(ddof=1)) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return format_estimate(values.mean(), error, "nats", over="data")


LIMITS = f"(fine below {CLOSE_ENOUGH:g}, bad above {TOO_FAR:g})"


def _gap(found: xr.Dataset) -> Part:
    gap = (found.upper - found.lower).values
    error = float(gap.std(ddof=1) / np.sqrt(len(gap))) if len(gap) > 1 else np.inf
    why = f"the bounds on log p(x) of {len(gap)} simulated data are {_with_error(gap)} apart {LIMITS}"
    level = _by_size(abs(float(gap.mean())))
    if level == "fine" and ERRORS * error > PRECISE:
        level, why = "doubtful", f"{why}, too imprecise to say more"
    return Part(level, why, "raise temperatures, simulate more data, or take a richer posterior: the path is shorter")


def _bias(found: xr.Dataset) -> Part:
    off = -found.bias.values.astype(float)
    why = (
        f"by {found.attrs['estimate']} with {found.attrs['num_particles']} particles, log p(x) of {len(off)} data is "
        f"measured to lie {_with_error(off)} low {LIMITS}, that of half of them less than {np.nanmedian(off):.2g} low"
    )
    return Part(_by_size(abs(float(off.mean()))), why, RICHER)


def _noise(found: xr.Dataset) -> Part:
    noisy = float((found.mcse > NOISY).mean())
    error = float(np.sqrt((found.mcse**2).mean()))
    why = f"the standard error of a datum is {error:.3g} nats, above {NOISY:g} for {noisy:.0%}"
    return Part("doubtful" if noisy > SOME else "fine", why, RICHER)


def _tails(found: xr.Dataset) -> Part:
    if found.khat.isnull().any():
        return Part("doubtful", "k̂ is not known, as it takes 25 particles", "take at least 25 particles")
    heavy, rough = (float((found.khat > limit).mean()) for limit in (BAD_KHAT, GOOD_KHAT))
    level: Level = "bad" if heavy > HALF else "doubtful" if heavy > SOME else "fine"
    why = f"k̂ is above {BAD_KHAT} for {heavy:.0%} and above {GOOD_KHAT} for {rough:.0%}"
    if rough > SOME:
        why += ", where the measured bias is rough and may be too small"
    return Part(level, why, RICHER)


def agreement(found: xr.Dataset) -> Part:
    """Whether a second estimate agrees, which would lie higher if the first missed a mode."""
    if "difference" not in found:
        return Part("doubtful", "no check was run that would show a mode that was missed", CHECK)
    number = found.sizes["checked"]
    apart, error = float(found.difference.mean()), float(np.sqrt((found.difference_se**2).sum())) / number
    second = f"{found.attrs['second_estimate']} gives {format_estimate(abs(apart), error, 'nats', over='draws')} "
    second += f"{'more' if apart < 0 else 'less'} for {number} of them"
    if apart < -max(CLOSE_ENOUGH, ERRORS * error):
        share = float(found.difference.min()) / float(found.difference.sum())
        most = f" (by one datum, {share:.0%} of it)" if number > 1 and share > HALF else ""
        return Part(_by_size(-apart), f"{second}, so that much was missed{most}", COVER)
    heavy = float((found.second_khat > BAD_KHAT).mean())
    if heavy > SOME:
        return Part("doubtful", f"{second}, but its own k̂ is above {BAD_KHAT} for {heavy:.0%}", SLOWER)
    if abs(apart) <= CLOSE_ENOUGH + ERRORS * error and ERRORS * error <= PRECISE:
        return Part("fine", f"{second}, which agrees")
    why = "too imprecise to check anything" if ERRORS * error > PRECISE else "too low to check anything"
    return Part("doubtful", f"{second}, {why}", SLOWER)
