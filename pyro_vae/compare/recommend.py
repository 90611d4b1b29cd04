"""Recommend an estimator to train with, from a comparison."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from pyro_vae.compare.seeds import drawn, validate_not_stacked
from pyro_vae.core.format import format_estimate
from pyro_vae.core.validation import takes_settings
from pyro_vae.errors import SettingsError
from pyro_vae.evidence.psis import BAD, LEAST

SURE = 3.0
"""Estimators differ significantly if they are this many standard errors apart."""

ELBO = "ELBO"
"""The default bound of a recommendation, if the comparison has it."""


@dataclass(frozen=True)
class _Candidate:
    """A cell of a comparison, judged by the parameter group with the least signal per second.

    Args:
        estimator: the name of the estimator.
        particles: the number of particles.
        group: the parameter group.
        each: the log efficiency, per seed.
        errors: the standard errors of ``each``.
        khat: the tail shape of the squared gradient norm over draws; NaN if unknown.
        bias: the relative bias of the gradient; NaN if unknown.
    """

    estimator: str
    particles: int
    group: str
    each: np.ndarray
    errors: np.ndarray
    khat: float = 0.0
    bias: float = 0.0

    @property
    def called(self) -> str:
        return f"{self.estimator} at K = {self.particles}"

    @property
    def log_efficiency(self) -> float:
        return float(self.each.mean())

    @property
    def error(self) -> float:
        return _error(self.each, self.errors**2)


@takes_settings
def recommend(comparison: xr.Dataset, *, target: str | None = None) -> str:
    """Say which estimator of a bound to train with, why, and how certain this is.

    Estimators are ranked within one bound, the coordinate ``target`` of the comparison: the ELBO or, if it is not in
    the comparison, the bound with the most estimators. The criterion is the signal of a step per second,
    ``efficiency``: the squared signal-to-noise ratio of the gradient divided by its seconds, of Θ or φ, whichever is
    lower. Estimators with a gradient bias that is known, or found in the comparison, are left out.

    An estimator of another bound changes the objective, so it is not ranked. For each such bound one sentence says
    how much its value differs, and how much a step along its gradient raises the ELBO.

    The result is not certain if the bias of the best gradient is unknown, or if the squared gradients have so heavy a
    tail (k̂ above 0.7, or fewer than 25 draws) that their errors are unreliable. Over seeds, estimators are compared by
    Student's t at the error rate of 3 standard errors: 3 seeds need a difference of 19 of their standard errors, 5
    seeds 6.6, and 10 seeds 4.1.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`.
        target: the bound to recommend an estimator of, such as "IWAE(8)".

    Returns:
        Two sentences, and one for each other bound; with a dimension ``moment``, one line for each moment.

    Raises:
        SettingsError: if ``comparison`` stacks several seeds, or has no such ``target``.

    References:
        | Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018),
          https://arxiv.org/abs/1802.04537
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> import pyro_vae as pv, torch
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> other = pv.exact.LinearGaussian(torch.randn(5, 2), torch.ones(5), 0.5)
        >>> print(recommend(pv.compare_elbos(other.as_vae(diagonal=True), linear.sample(20), draws=50)))
        Train with ...
    """
    validate_not_stacked(comparison)
    if "moment" in comparison.dims:
        each = (comparison.isel(moment=i) for i in range(comparison.sizes["moment"]))
        return "\n".join(f"At the {table.moment.item()}: {recommend(table, target=target)}" for table in each)
    bounds = _bounds(comparison)
    chosen = _chosen(bounds, target)
    candidates = sorted(_candidates(comparison, bounds.get(chosen, [])), key=lambda c: -c.log_efficiency)
    if not candidates:
        first = (
            f"No estimator can be recommended: none {f'of {_the(chosen)} ' if len(bounds) > 1 else ''}has a gradient "
            f"with a signal above its noise here. Compare with more than {drawn(comparison)}, or closer to the start "
            "of training."
        )
    else:
        best, *others = candidates
        why, sure = _why(best, others, comparison, chosen), _certainty(best, others, comparison, chosen)
        first = f"Train with {best.called}: {why}. {sure}"
    own = [(c.estimator, c.particles) for c in candidates] or bounds.get(chosen, [])
    changes = [_changed(comparison, name, cells, chosen, own[0]) for name, cells in bounds.items() if name != chosen]
    return " ".join([first, *changes])


_Cell = tuple[str, int]


def _bounds(comparison: xr.Dataset) -> dict[str, list[_Cell]]:
    """Group the non-empty cells by the bound that they estimate."""
    found = dict[str, list[_Cell]]()
    for name in comparison.estimator.values:
        for k in comparison.particles.values:
            cell = comparison.sel(estimator=name, particles=k)
            if cell.elbo.notnull():
                found.setdefault(_target(cell), []).append((str(name), int(k)))
    return found


def _target(cell: xr.Dataset) -> str:
    """Return the cell's bound; in comparisons saved by versions without ``target``, use ``bound``, which lacks K."""
    if "target" in cell.coords:
        return str(cell.target.item())
    bound = str(cell.bound.item())
    return bound if bound == ELBO else f"{bound} at K = {cell.particles.item()}"


def _chosen(bounds: dict[str, list[_Cell]], target: str | None) -> str:
    if target is not None and target not in bounds:
        raise SettingsError(f"target is {target!r}; the comparison has estimators of {', '.join(bounds) or 'no bound'}")
    if target is not None or ELBO in bounds or not bounds:
        return target or ELBO
    return max(bounds, key=lambda name: len(bounds[name]))


def _join_some(names: Sequence[str], between: str) -> str:
    """Join the first three names, and say how many more there are.

    Example:
        >>> _join_some("ABC", ", "), _join_some("ABCDE", " or ")
        ('A, B, C', 'A or B or C or 2 more')
    """
    more = [f"{len(names) - 3} more"] if len(names) > 3 else []
    return between.join([*names[:3], *more])


def _the(bound: str) -> str:
    return f"the {bound}" if bound == ELBO else bound


def _changed(comparison: xr.Dataset, bound: str, cells: list[_Cell], chosen: str, base: _Cell) -> str:
    """Say what training with another bound means."""
    named = _join_some([f"{name} at K = {k}" for name, k in cells], " or ")
    to = "" if bound == named else f" to {_the(bound)}"
    cell, reference = (comparison.sel(estimator=name, particles=k) for name, k in (cells[0], base))
    value, error = _apart(cell, reference)
    text = f"Training with {named} changes the objective{to}"
    if np.isfinite(value):
        side = "above" if value > 0 else "below"
        apart = format_estimate(abs(value), error, "nats per datum", over=drawn(comparison))
        text += f": its value lies {apart} {side} that of {_the(chosen)}"
    if (
        bound != ELBO
        and "elbo_alignment" in cell
        and np.isfinite(share := cell.elbo_alignment.sel(parameter_group="all").item())
    ):
        error = cell.elbo_alignment_se.sel(parameter_group="all").item()
        text += (
            f", and a small step along its gradient raises the ELBO {format_estimate(share, error, over='')} times as "
            "much as a step of the same length along the gradient of the ELBO"
        )
    return text + "."


def _apart(cell: xr.Dataset, other: xr.Dataset) -> tuple[float, float]:
    """Compute the difference of two values and its standard error over draws, paired if the draws are available."""
    if "value" in cell:
        apart = (cell.value - other.value).values
        return float(apart.mean()), float(apart.std(ddof=1) / np.sqrt(len(apart)))
    return (cell.elbo - other.elbo).item(), float(np.hypot(cell.elbo_se, other.elbo_se))


def _candidates(comparison: xr.Dataset, cells: list[_Cell]) -> list[_Candidate]:
    groups = [g for g in ("Θ", "φ") if g in comparison.parameter_group.values] or ["all"]
    found = []
    for name, k in cells:
        cell = comparison.sel(estimator=name, particles=k)
        if cell.known_bias.item() or _is_biased(cell):
            continue
        every = [_candidate(cell.sel(parameter_group=g), name, k, g, _bias(cell)) for g in groups]
        worst = min(every, key=lambda c: c.log_efficiency)
        if worst.log_efficiency > -np.inf:
            found.append(worst)
    return found


def _bias(cell: xr.Dataset) -> float:
    return float(cell.gradient_bias.sel(parameter_group="all"))


def _candidate(cell: xr.Dataset, name: str, particles: int, group: str, bias: float) -> _Candidate:
    """Make a candidate; an infinite efficiency (no noise) has error 0, and an unknown error counts as infinite."""
    of = "seed_efficiency" if "seed_efficiency" in cell else "efficiency"
    efficiency, error = (np.atleast_1d(cell[variable].values).astype(float) for variable in (of, f"{of}_se"))
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(np.isinf(efficiency), 0.0, error / efficiency)
        each = np.log(np.where(efficiency > 0, efficiency, 0.0))
    khat = float(cell.gradient_khat) if "gradient_khat" in cell else np.nan
    return _Candidate(name, particles, group, each, np.where(np.isfinite(relative), relative, np.inf), khat, bias)


def _error(each: np.ndarray, squares: np.ndarray) -> float:
    """Compute the error of a mean over seeds: from the variance over seeds or the mean squared error, if larger."""
    with np.errstate(invalid="ignore"):
        variance = each.var(ddof=1) if len(each) > 1 else 0.0
    return float(np.sqrt(np.fmax(variance, squares.mean()) / len(each)))


def _is_biased(cell: xr.Dataset) -> bool:
    """Return whether the measured bias exceeds five standard errors and 5 % of the gradient."""
    bias = cell.gradient_bias.sel(parameter_group="all")
    return bool((bias > 5 * cell.gradient_bias_se.sel(parameter_group="all")) & (bias > 0.05))


def _why(best: _Candidate, others: list[_Candidate], comparison: xr.Dataset, bound: str) -> str:
    among = f"of {len(others) + 1} choices for {_the(bound)} its" if others else "its"
    both = {"Θ", "φ"} <= set(comparison.parameter_group.values.tolist())
    text = f"{among} gradient {_signal(best)}" + (f" of {best.group}, the lower of the two groups" if both else "")
    usual = next((c for c in others if c.estimator in ("Trace_ELBO", "ELBO") and c.particles == 1), None)
    if usual and np.isfinite(best.log_efficiency):
        text += f", {_times(best, usual)} times that of {usual.called}"
    return text + _bound_gap(comparison.sel(estimator=best.estimator, particles=best.particles))


def _times(best: _Candidate, usual: _Candidate) -> str:
    """Format the ratio of two efficiencies, whose logarithms have independent errors."""
    ratio = float(np.exp(best.log_efficiency - usual.log_efficiency))
    return format_estimate(ratio, ratio * float(np.hypot(best.error, usual.error)), over="")


def _signal(best: _Candidate) -> str:
    if np.isinf(best.log_efficiency):
        return "has no noise"
    efficiency = np.exp(best.log_efficiency)
    most = format_estimate(float(efficiency), float(efficiency) * best.error, over="")
    return f"carries the most signal per second, {most} in squared signal-to-noise"


def _bound_gap(cell: xr.Dataset) -> str:
    bias, error = cell.bias.item(), cell.bias_se.item()
    if np.isnan(bias):
        return ""
    if abs(bias) < max(SURE * error, 1e-9):
        return f"; its bound is log p(x) to within {max(SURE * error, 1e-9):.1g} nats per datum"
    apart = format_estimate(abs(bias), error, "nats per datum", over=drawn(cell))
    return f"; its bound lies {apart} {'below' if bias < 0 else 'above'} log p(x)"


def _certainty(best: _Candidate, others: list[_Candidate], comparison: xr.Dataset, bound: str) -> str:
    if not others:
        return f"There is no other estimator of {_the(bound)} to compare it with."
    close = [c for c in others if not _errors_ahead(best, c) >= SURE]
    if close:
        named = _join_some([c.called for c in close], ", ")
        return f"This is not certain: {drawn(comparison)} do not separate it from {named} ({_criterion(best)})."
    z = min(_errors_ahead(best, c) for c in others)
    behind = "infinitely far behind" if np.isinf(z) else f"{z:.0f} standard errors behind"
    if doubt := _doubt(best, others, comparison):
        return f"This is not certain, although the next, {others[0].called}, is {behind}: {doubt}."
    return f"This is certain over {drawn(comparison)}: the next, {others[0].called}, is {behind}."


def _doubt(best: _Candidate, others: list[_Candidate], comparison: xr.Dataset) -> str:
    """Say why the standard errors are unreliable; return an empty string if they are not."""
    if np.isnan(best.bias):
        return "the bias of its gradient is unknown"
    if any(np.isnan(c.khat) for c in (best, *others)):
        return f"{drawn(comparison)} are too few to detect a heavy tail of the gradient; use at least {LEAST}"
    heavy = [c for c in (best, *others) if c.khat > BAD]
    if heavy:
        named = ", ".join(f"{c.called} (k̂ = {c.khat:.2f})" for c in heavy[:3])
        return f"the squared gradient has a heavy tail, so the error of its variance is unreliable, with {named}"
    return ""


def _criterion(best: _Candidate) -> str:
    """Name the criterion of significance."""
    return f"under {SURE:g} standard errors" + (", by Student's t over seeds" if len(best.each) > 1 else "")


def _errors_ahead(best: _Candidate, other: _Candidate) -> float:
    """Compute how many standard errors apart two log efficiencies are; NaN if both are without noise.

    Over seeds, Student's t is converted to the normal quantile of the same tail probability, as few seeds may have a
    small spread by chance.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = best.each - other.each
        ratio = float(np.divide(apart.mean(), _error(apart, best.errors**2 + other.errors**2)))
    return ratio if len(apart) == 1 else _normal_quantile(ratio, len(apart) - 1)


def _normal_quantile(ratio: float, freedom: int) -> float:
    from scipy.stats import norm, t

    return float(np.copysign(norm.isf(t.sf(abs(ratio), freedom)), ratio))
