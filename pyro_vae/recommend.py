"""Which estimator to train with, by what was measured."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

SURE = 3.0
"""So many standard errors apart is told apart."""


@dataclass(frozen=True)
class _Candidate:
    """A cell of a comparison, judged by the gradient that carries the least signal per second."""

    estimator: str
    particles: int
    group: str
    log_efficiency: float
    error: float

    @property
    def called(self) -> str:
        return f"{self.estimator} at K = {self.particles}"


def recommend(comparison: xr.Dataset) -> str:
    """Which estimator to train with and why, and how sure that is, in two sentences.

    What counts is the signal of a step per second: ``efficiency``, the squared signal-to-noise ratio
    of the gradient divided by the seconds it takes, of Θ or φ, whichever has less. Estimators
    whose gradient is known, or seen here, to be biased are left out.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`.

    Returns:
        The sentences; with a dimension ``moment``, a line of them for each.

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
    if "moment" in comparison.dims:
        each = (comparison.isel(moment=i) for i in range(comparison.sizes["moment"]))
        return "\n".join(f"At the {table.moment.item()}: {recommend(table)}" for table in each)
    candidates = sorted(_candidates(comparison), key=lambda c: -c.log_efficiency)
    if not candidates:
        return (
            "No estimator can be recommended: none has a gradient whose signal stands out of its noise here. "
            f"Compare with more draws than {comparison.attrs['draws']}, or nearer to the start of training."
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
    efficiency, error = cell.efficiency.item(), cell.efficiency_se.item()
    if np.isinf(efficiency):
        return _Candidate(name, particles, group, np.inf, 0.0)
    if not efficiency > 0:
        return _Candidate(name, particles, group, -np.inf, np.inf)
    relative = error / efficiency
    return _Candidate(name, particles, group, float(np.log(efficiency)), relative if np.isfinite(relative) else np.inf)


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
    draws = comparison.attrs["draws"]
    if not others:
        return "There was no other to compare it with."
    close = [c for c in others if not _ahead(best, c) >= SURE]
    if close:
        named = ", ".join(c.called for c in close[:3]) + (f" and {len(close) - 3} more" if len(close) > 3 else "")
        return f"This is not sure: {draws} draws do not tell it from {named} (under {SURE:g} standard errors)."
    z = min(_ahead(best, c) for c in others)
    behind = "behind by as much as can be" if np.isinf(z) else f"{z:.0f} standard errors behind"
    return f"This is sure by {draws} draws: the next, {others[0].called}, is {behind}."


def _ahead(best: _Candidate, other: _Candidate) -> float:
    """How many standard errors apart the logarithms of two efficiencies are; NaN where both are without noise."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.subtract(best.log_efficiency, other.log_efficiency) / np.hypot(best.error, other.error))
