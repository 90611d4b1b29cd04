"""Which estimator to train with, by what was measured."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from pyro_vae.seeds import drawn, refuse_stacked

SURE = 3.0
"""So many standard errors apart is told apart."""


@dataclass(frozen=True)
class _Candidate:
    """A cell of a comparison, judged by the gradient that carries the least signal per second.

    Args:
        estimator: its name.
        particles: how many.
        group: of the parameters whose gradient it is.
        each: the logarithm of its efficiency, of one seed or each of several.
        errors: of each.
    """

    estimator: str
    particles: int
    group: str
    each: np.ndarray
    errors: np.ndarray

    @property
    def called(self) -> str:
        return f"{self.estimator} at K = {self.particles}"

    @property
    def log_efficiency(self) -> float:
        return float(self.each.mean())

    @property
    def error(self) -> float:
        return _error(self.each, self.errors**2)


def recommend(comparison: xr.Dataset) -> str:
    """Which estimator to train with and why, and how sure that is, in two sentences.

    What counts is the signal of a step per second: ``efficiency``, the squared signal-to-noise ratio
    of the gradient divided by the seconds it takes, of Θ or φ, whichever has less. Estimators
    whose gradient is known, or seen here, to be biased are left out. Over seeds estimators are told apart by
    Student's t, as seldom wrongly as by 3 standard errors: 3 seeds need 19 of their own errors, 5 need 6.6, 10 4.1.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`.

    Returns:
        The sentences; with a dimension ``moment``, a line of them for each.

    Raises:
        SettingsError: if it holds comparisons of several seeds side by side.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537

    Example:
        >>> import pyro_vae as pv, torch
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> vae = linear.as_vae(diagonal=True)
        >>> print(recommend(pv.compare_elbos(vae, linear.sample(20), draws=20)))
        Train with ...
    """
    refuse_stacked(comparison)
    if "moment" in comparison.dims:
        each = (comparison.isel(moment=i) for i in range(comparison.sizes["moment"]))
        return "\n".join(f"At the {table.moment.item()}: {recommend(table)}" for table in each)
    candidates = sorted(_candidates(comparison), key=lambda c: -c.log_efficiency)
    if not candidates:
        return (
            "No estimator can be recommended: none has a gradient whose signal stands out of its noise here. "
            f"Compare with more than {drawn(comparison)}, or nearer to the start of training."
        )
    best, *others = candidates
    return f"Train with {best.called}: {_why(best, others, comparison)}. {_how_sure(best, others, comparison)}"


def _candidates(comparison: xr.Dataset) -> list[_Candidate]:
    groups = [g for g in ("Θ", "φ") if g in comparison.parameter_group.values] or ["all"]
    found = []
    for name in comparison.estimator.values:
        for k in comparison.particles.values:
            cell = comparison.sel(estimator=name, particles=k)
            if np.isnan(cell.elbo) or cell.known_bias.item() or _is_biased(cell):
                continue
            every = [_candidate(cell.sel(parameter_group=g), str(name), int(k), g) for g in groups]
            worst = min(every, key=lambda c: c.log_efficiency)
            if worst.log_efficiency > -np.inf:
                found.append(worst)
    return found


def _candidate(cell: xr.Dataset, name: str, particles: int, group: str) -> _Candidate:
    """Without noise its efficiency is infinite, and sure; where its error is not to be had, it is not sure at all."""
    of = "seed_efficiency" if "seed_efficiency" in cell else "efficiency"
    efficiency, error = (np.atleast_1d(cell[variable].values).astype(float) for variable in (of, f"{of}_se"))
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(np.isinf(efficiency), 0.0, error / efficiency)
        each = np.log(np.where(efficiency > 0, efficiency, 0.0))
    return _Candidate(name, particles, group, each, np.where(np.isfinite(relative), relative, np.inf))


def _error(each: np.ndarray, squares: np.ndarray) -> float:
    """Of the mean over seeds of numbers whose own squared errors are known: what their spread says, if that is more."""
    with np.errstate(invalid="ignore"):
        seen = each.var(ddof=1) if len(each) > 1 else 0.0
    return float(np.sqrt(np.fmax(seen, squares.mean()) / len(each)))


def _is_biased(cell: xr.Dataset) -> bool:
    """Seen here: beyond five errors and 5 % of the gradient."""
    bias = cell.gradient_bias.sel(parameter_group="all")
    return bool((bias > 5 * cell.gradient_bias_se.sel(parameter_group="all")) & (bias > 0.05))


def _why(best: _Candidate, others: list[_Candidate], comparison: xr.Dataset) -> str:
    among = f"of {len(others) + 1} choices its" if others else "its"
    both = {"Θ", "φ"} <= set(comparison.parameter_group.values.tolist())
    text = f"{among} gradient {_signal(best)}" + (f" of {best.group}, where it has less" if both else "")
    usual = next((c for c in others if c.estimator in ("Trace_ELBO", "ELBO") and c.particles == 1), None)
    if usual and np.isfinite(best.log_efficiency):
        text += f", {np.exp(best.log_efficiency - usual.log_efficiency):.2g} times that of {usual.called}"
    return text + _where_its_bound_lies(comparison.sel(estimator=best.estimator, particles=best.particles))


def _signal(best: _Candidate) -> str:
    if np.isinf(best.log_efficiency):
        return "has no noise"
    efficiency = np.exp(best.log_efficiency)
    error = f"{efficiency * best.error:.2g}" if np.isfinite(best.error) else "?"
    return f"carries the most signal per second, {efficiency:.3g} ± {error} in squared signal-to-noise"


def _where_its_bound_lies(cell: xr.Dataset) -> str:
    bias, error = cell.bias.item(), cell.bias_se.item()
    if np.isnan(bias):
        return ""
    if abs(bias) < max(SURE * error, 1e-9):
        return f"; its bound is log p(x) to within {max(SURE * error, 1e-9):.1g} nats per datum"
    return f"; its bound lies {abs(bias):.3g} ± {error:.2g} nats per datum {'below' if bias < 0 else 'above'} log p(x)"


def _how_sure(best: _Candidate, others: list[_Candidate], comparison: xr.Dataset) -> str:
    if not others:
        return "There was no other to compare it with."
    close = [c for c in others if not _ahead(best, c) >= SURE]
    if close:
        named = ", ".join(c.called for c in close[:3]) + (f" and {len(close) - 3} more" if len(close) > 3 else "")
        return f"This is not sure: {drawn(comparison)} do not tell it from {named} ({_by(best)})."
    z = min(_ahead(best, c) for c in others)
    behind = "behind by as much as can be" if np.isinf(z) else f"{z:.0f} standard errors behind"
    return f"This is sure by {drawn(comparison)}: the next, {others[0].called}, is {behind}."


def _by(best: _Candidate) -> str:
    """By what they are not told apart."""
    return f"under {SURE:g} standard errors" + (", by Student's t, as seeds are few" if len(best.each) > 1 else "")


def _ahead(best: _Candidate, other: _Candidate) -> float:
    """How many standard errors apart, seed by seed, two logarithms are; NaN where both are without noise.

    Over seeds by Student's t, told as so many errors of a normal variable as are as seldom: few seeds differ little
    by chance, and often.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = best.each - other.each
        ratio = float(np.divide(apart.mean(), _error(apart, best.errors**2 + other.errors**2)))
    return ratio if len(apart) == 1 else _of_normal(ratio, len(apart) - 1)


def _of_normal(ratio: float, freedom: int) -> float:
    from scipy.stats import norm, t

    return float(np.copysign(norm.isf(t.sf(abs(ratio), freedom)), ratio))
