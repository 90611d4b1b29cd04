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
        The sentences.

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
            if np.isfinite(worst.log_efficiency):
                found.append(worst)
    return found


def _candidate(cell: xr.Dataset, name: str, particles: int, group: str) -> _Candidate:
    efficiency, error = cell.efficiency.item(), cell.efficiency_se.item()
    with np.errstate(divide="ignore"):
        return _Candidate(
            name, particles, group, float(np.log(efficiency)), error / efficiency if efficiency else np.inf
        )


def _is_biased(cell: xr.Dataset) -> bool:
    """Seen here: beyond five errors and 5 % of the gradient."""
    bias = cell.gradient_bias.sel(parameter_group="all")
    return bool((bias > 5 * cell.gradient_bias_se.sel(parameter_group="all")) & (bias > 0.05))


def _why(best: _Candidate, others: list[_Candidate], comparison: xr.Dataset) -> str:
    usual = next((c for c in others if c.estimator in ("Trace_ELBO", "ELBO") and c.particles == 1), None)
    efficiency = np.exp(best.log_efficiency)
    text = (
        f"of {len(others) + 1} choices its gradient carries the most signal per second, "
        f"{efficiency:.3g} ± {efficiency * best.error:.2g} in squared signal-to-noise of {best.group}, "
        "where it has less"
    )
    if usual:
        times = np.exp(best.log_efficiency - usual.log_efficiency)
        text += f", {times:.2g} times that of {usual.called}"
    bias = comparison.sel(estimator=best.estimator, particles=best.particles)
    if np.isfinite(bias.bias):
        text += f"; its bound lies {-bias.bias.item():.3g} ± {bias.bias_se.item():.2g} nats per datum below log p(x)"
    return text


def _how_sure(best: _Candidate, others: list[_Candidate], comparison: xr.Dataset) -> str:
    draws = comparison.attrs["draws"]
    close = [c for c in others if best.log_efficiency - c.log_efficiency < SURE * np.hypot(best.error, c.error)]
    if close:
        named = ", ".join(c.called for c in close[:3]) + (f" and {len(close) - 3} more" if len(close) > 3 else "")
        return f"This is not sure: {draws} draws do not tell it from {named} (under {SURE:g} standard errors)."
    if not others:
        return "There was no other to compare it with."
    z = (best.log_efficiency - others[0].log_efficiency) / np.hypot(best.error, others[0].error)
    return f"This is sure by {draws} draws: the next, {others[0].called}, is {z:.0f} standard errors behind."
