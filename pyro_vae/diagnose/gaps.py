"""Inference gaps: the loss of the ELBO by the variational family, and by amortization."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded, validate_seed
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate, format_rounded
from pyro_vae.core.progress import counting
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import above_zero, takes_settings, whole
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import row_names
from pyro_vae.diagnose.free import Free, amortized, as_full, climb, diagonal, weights
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.evidence import known_evidence
from pyro_vae.evidence.exact import LinearGaussian, quadrature_log_marginal
from pyro_vae.evidence.psis import BAD as KHAT
from pyro_vae.evidence.psis import psis

FINE, BAD = 0.05, 0.3
"""Gaps per latent, in nats: q loses .043 with sds at .8 of the best, .32 at .5, and .045 with means off by .3 sd."""

SHARE = 0.05
"""The share of the data that may lie beyond a threshold."""

GRIDS = (161, 321)
"""The numbers of quadrature points per latent to try."""

CONVERGED = 0.01
"""The largest difference between the halves of the optimizer's steps, in nats per latent: a fifth of a fine gap."""

ERRORS_OVER = "draws of the q found, for the given data; neither data nor the optimization"
"""What the standard errors cover."""

VALUES = ("log_evidence", "elbo", "best_elbo", "richer_elbo")
DIFFERENCES = {
    "gap": ("log_evidence", "elbo"),
    "approximation_gap": ("log_evidence", "best_elbo"),
    "amortization_gap": ("best_elbo", "elbo"),
    "closed": ("richer_elbo", "best_elbo"),
    "richer_gap": ("log_evidence", "richer_elbo"),
}
MAY_BE_OFF = {
    "approximation_gap": ("optimization_error", None),
    "amortization_gap": (None, "optimization_error"),
    "richer_gap": ("richer_optimization_error", None),
}
"""For each gap, the optimization errors by which it may be too large and too small."""


@torch.no_grad()
@takes_settings
def inference_gaps(
    vae: VAE,
    x: Any,
    *,
    log_evidence: Any = None,
    steps: int = 400,
    rate: float = 0.2,
    particles: int = 16,
    num_particles: int = 1000,
    chunk: int = 2**22,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Split log p(x) - ELBO of each datum into the approximation gap and the amortization gap.

    .. math:: \\log p(x) - \\mathcal L(q_\\phi)
        = \\underbrace{\\log p(x) - \\mathcal L(q^*)}_{\\text{approximation}}
        + \\underbrace{\\mathcal L(q^*) - \\mathcal L(q_\\phi)}_{\\text{amortization}}, \\qquad
        q^* = \\arg\\max_{q \\in \\mathcal Q} \\mathcal L(q)

    The variational family contains q for any outputs of the encoder's network: the outputs for each datum are free
    parameters, optimized from those of the encoder. Refined posteriors are diagonal normals; of a flow, the context is
    free. A richer family shows the possible gain: normals with a full covariance, or the family itself if it is better.

    For each datum, the best q of start, middle and end of the optimization is selected on one set of draws and
    evaluated on another, so that no bound is biased upwards. Normals of all kinds use the same noise, so that their
    differences have small errors; a difference can be below 0 within its error.

    Each standard error is over draws from the q found, for the given data. It does not include the error of the
    optimization: since q* is only the best q found, the approximation gap may be too large and the amortization gap too
    small, by the same amount. The steps are therefore taken in two halves, the second of which restarts from the end of
    the first with the full learning rate. ``optimization_error`` is the difference of the ELBOs at the ends of the two
    halves: small at an optimum, large if the second half still gains or overshoots. If it is too large,
    :func:`judge_gaps` reports that the optimizer has not converged, and calls no gap fine.

    Without an oracle (for a linear-Gaussian VAE, or one with at most two latents), log p(x) is importance-weighted with
    the best q found; check ``khat`` then.

    Args:
        vae: a VAE.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        log_evidence: log p(x) of each datum, if known: from :func:`pyro_vae.log_evidence`, or numbers.
        steps: the number of optimizer steps for each family, in two halves, at least 2.
        rate: the initial learning rate of each half, above 0, in units of the network's outputs; it decays later.
        particles: the number of draws per datum and step, at least 1.
        num_particles: the number of draws per datum to evaluate the bounds with, at least 50.
        chunk: the approximate number of values to process at a time.
        seed: of all draws.
        progress: whether to show a progress bar.

    Returns:
        A dataset over ``datum``, in nats: ``log_evidence``, ``elbo``, ``best_elbo`` (of the family), ``richer_elbo``;
        ``gap``, the sum of ``approximation_gap`` and ``amortization_gap``; ``closed``, the gain of the richer family
        over the best of the family, and ``richer_gap``, the gap that remains; ``optimization_error`` and
        ``richer_optimization_error`` of either family; each with its Monte-Carlo standard error ``…_se``.

    Raises:
        DataError: if the data do not fit, or ``log_evidence`` is not one finite number per datum.
        ModelError: if the VAE does not fit the data, or the variational family of its encoder is unknown.
        SettingsError: if a setting is out of its range.

    References:
        | Inference Suboptimality in Variational Autoencoders (Cremer, Li & Duvenaud, 2018),
          https://arxiv.org/abs/1801.03558
        | Sticking the Landing (Roeder, Wu & Duvenaud, 2017), https://arxiv.org/abs/1703.09194

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> gaps = inference_gaps(linear.as_vae(diagonal=True), linear.sample(3), steps=50, num_particles=200)
        >>> A = linear.precision  # the best diagonal normal loses ½ (Σ log A_jj - log det A)
        >>> exact = 0.5 * (A.diagonal().log().sum() - A.logdet())
        >>> bool((abs(gaps.approximation_gap - exact.item()) < 5 * gaps.approximation_gap_se).all())
        True
    """
    _validate_settings(steps, rate, particles, num_particles, seed)
    x = data_for(vae, x)
    rows = rows_for(vae, x).like(vae)
    known = _as_known(log_evidence, rows)
    optimized, evaluated = (max(1, chunk // (k * rows.x[0].numel())) for k in (particles, num_particles))
    at_once = particles * min(optimized, len(rows))
    with seeded(seed, rows.x.device), evaluating(vae, at_once), counting("inference gaps", progress) as count:
        known = known or _oracle(vae, rows)
        start, parts = amortized(vae, rows), []
        slices = _slices(len(rows), optimized)
        for block in count(iter(slices), len(slices)):
            members = _optimize(vae, rows.take(block), start.take(block), steps=steps, rate=rate, particles=particles)
            for part in _slices(len(members[0].parameters), evaluated):
                known_here = known and _Known(known.value[block][part], known.error[block][part], known.source)
                some = [member.take(part) for member in members]
                parts.append(_evaluate(vae, rows.take(block).take(part), some, known_here, num_particles))
    source = known.source if known else "importance-weighted with the best q found"
    variables = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return xr.Dataset(
        {name: ("datum", value, {} if name == "khat" else {"units": "nats"}) for name, value in variables.items()},
        {"datum": row_names(x, len(rows))},
        {
            "family": start.name, "richer_family": f"FullNormal or {start.name}", "log_evidence_from": source,
            "latents": start.q().event_shape[0], "threshold_fine": FINE, "threshold_bad": BAD,
            "threshold_optimization": CONVERGED, "threshold_units": "nats per latent", "threshold_share": SHARE,
            "threshold_khat": KHAT, "errors_over": ERRORS_OVER, "steps": steps, "num_particles": num_particles,
            "seed": seed, **versions(),
        },
    )  # fmt: skip


def _validate_settings(steps: int, rate: float, particles: int, num_particles: int, seed: int) -> None:
    whole("steps", steps, 2)
    above_zero("rate", rate)
    whole("particles", particles, 1)
    whole("num_particles", num_particles, 50)
    validate_seed(seed)
    if torch.is_inference_mode_enabled():
        raise SettingsError("inference mode is on, in which q cannot be optimized; call this outside of it")


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, n, size)]


@dataclass(frozen=True)
class _Known:
    """log p(x) of each datum, its standard error, and its source."""

    value: Tensor
    error: Tensor
    source: str


def _as_known(log_evidence: Any, rows: Rows) -> _Known | None:
    if log_evidence is None:
        return None
    known_evidence(None, rows, log_evidence)  # raises unless it is one finite number per datum
    labelled = isinstance(log_evidence, xr.Dataset)
    value = torch.as_tensor(np.asarray(log_evidence["log_evidence"] if labelled else log_evidence, dtype=float))
    error = torch.as_tensor(np.asarray(log_evidence["mcse"], dtype=float)) if labelled else torch.zeros(len(rows))
    return _Known(value.to(rows.x.device), error.to(rows.x.device), "given")


def _oracle(vae: VAE, rows: Rows) -> _Known | None:
    """Compute log p(x) in closed form or by quadrature, if the VAE allows it."""
    if rows.context is not None or rows.mask is not None:
        return None
    oracles = [("linear-Gaussian", lambda: LinearGaussian.of(vae).log_marginal(rows.x))]
    for points in GRIDS:
        oracles.append(("quadrature", partial(quadrature_log_marginal, vae, rows.x, points=points)))
    for source, oracle in oracles:
        with contextlib.suppress(ModelError, SettingsError):  # not such a model, or the grid is too coarse
            value = oracle().double()
            return _Known(value, torch.zeros_like(value), source)
    return None


def _optimize(vae: VAE, rows: Rows, start: Free, *, steps: int, **settings: Any) -> list[Free]:
    """Return the amortized q, and q half-way through and at the end of the optimization, for both families.

    Full normals start from the best diagonal normals: from a poor start, correlations make the optimization very slow.
    """

    def climb_twice(begin: Free) -> tuple[Free, Free]:
        half = climb(vae, rows, begin, steps=steps - steps // 2, **settings)
        return half, climb(vae, rows, half, steps=steps // 2, **settings)

    is_full, q = start.name == "FullNormal", start.q()
    half, end = climb_twice(diagonal(q.mean, q.stddev) if is_full else start)
    wide_half, wide = climb_twice(as_full(end.q()))
    return [start, *((wide_half, wide) if is_full else (half, end)), wide_half, wide]


def _weights_with_common_noise(vae: VAE, rows: Rows, members: Sequence[Free], num_particles: int) -> Tensor:
    """Compute the log-weights of each member with the same noise, shape ``(member, K, datum)``."""
    seed, found = int(torch.randint(2**32, ())), []
    for member in members:
        with seeded(seed, rows.x.device):
            found.append(weights(vae, rows, member, num_particles))
    return torch.stack(found)


def _evaluate(
    vae: VAE, rows: Rows, members: Sequence[Free], known: _Known | None, num_particles: int
) -> dict[str, np.ndarray]:
    """Estimate each bound and difference with its error; q is selected on other draws than it is evaluated on."""
    trial = _weights_with_common_noise(vae, rows, members, num_particles).mean(1)
    log_weights = _weights_with_common_noise(vae, rows, members, num_particles)

    def best_of(first: int) -> Tensor:
        chosen = trial[:first].argmax(0)
        return log_weights.gather(0, chosen.expand(1, *log_weights.shape[1:]))[0]

    amortized_weights, half, end, wide_half, wide = log_weights
    best, richer = best_of(3), best_of(5)
    bounds = {"elbo": amortized_weights, "best_elbo": best, "richer_elbo": richer}
    # The terms whose mean has the error of each estimate; for the log of a mean, to first order.
    value = {name: w.mean(0) for name, w in bounds.items()}
    spread = {name: w - value[name] for name, w in bounds.items()}
    if known is None:
        value["log_evidence"] = richer.logsumexp(0) - math.log(num_particles)
        spread["log_evidence"] = (richer - value["log_evidence"]).exp() - 1
    else:
        value["log_evidence"], spread["log_evidence"] = known.value, torch.zeros_like(amortized_weights)
    known_error = torch.zeros_like(value["elbo"]) if known is None else known.error

    def error(values: Tensor, of_evidence: bool) -> Tensor:
        return (values.var(0) / num_particles + known_error.square() * of_evidence).sqrt()

    found = {}
    for name in VALUES:
        found[name], found[f"{name}_se"] = value[name], error(spread[name], name == "log_evidence")
    for name, (more, less) in DIFFERENCES.items():
        found[name] = value[more] - value[less]
        found[f"{name}_se"] = error(spread[more] - spread[less], more == "log_evidence")
    for name, apart in {"optimization_error": end - half, "richer_optimization_error": wide - wide_half}.items():
        found[name], found[f"{name}_se"] = apart.mean(0).abs(), error(apart, False)
    arrays = {name: tensor.cpu().numpy() for name, tensor in found.items()}
    return arrays if known is not None else {**arrays, "khat": psis(richer)[1]}


def judge_gaps(gaps: xr.Dataset) -> Finding:
    """Judge whether the gaps are small, and if not, whether the family or the encoder is the cause.

    The means of both gaps over the given data are compared with thresholds in nats per latent. Their intervals include
    two Monte-Carlo standard errors and the optimization error, which makes the amortization gap too small and the
    approximation gap too large. The optimizer has not converged if the two halves of its steps end more than 0.01 nats
    per latent apart.

    Args:
        gaps: from :func:`inference_gaps`.

    Returns:
        ``"fine"`` if both gaps are below the lower threshold and the optimizer has converged, ``"bad"`` if one is
        above the upper threshold, also without the datum with the largest gap.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 1), torch.zeros(5), 0.5)
        >>> judge_gaps(inference_gaps(linear.as_vae(), torch.ones(3, 5), steps=200, num_particles=50)).level
        'fine'
    """
    latents = gaps.attrs["latents"]
    fine, bad = gaps.attrs["threshold_fine"] * latents, gaps.attrs["threshold_bad"] * latents
    amortization, approximation, closed = (
        mean_gap(gaps, name) for name in ("amortization_gap", "approximation_gap", "closed")
    )
    levels = [_level(gap.low, gap.high, fine, bad) for gap in (amortization, approximation)]
    heaviest = int(gaps.gap.values.argmax())
    if alone := "bad" in levels and gaps.sizes["datum"] > 1 and not _is_bad_without(gaps, heaviest, bad):
        levels = ["doubtful" if level == "bad" else level for level in levels]
    beyond = float((gaps.gap - 2 * gaps.gap_se > bad).mean())
    tails = float((gaps.khat > gaps.attrs["threshold_khat"]).mean()) if "khat" in gaps else 0.0
    share = gaps.attrs["threshold_share"]
    if max(beyond, tails) > share or not optimizer_converged(gaps):
        levels.append("doubtful")
    why = (
        f"the encoder loses {amortization} nats to the best {gaps.attrs['family']} found for each datum, which loses "
        f"{approximation} nats to log p(x) ({gaps.attrs['log_evidence_from']}), means of these "
        f"{gaps.sizes['datum']} data ± standard errors over draws{_over_data(gaps)}; {_optimization(gaps)}; "
        f"up to {fine:.3g} is fine, above {bad:.3g} bad; {beyond:.0%} of the data lose more than {bad:.3g} nats in "
        f"total, half of them less than {float(gaps.gap.median()):.3g}"
    )
    if alone:
        worst = gaps.isel(datum=heaviest)
        why += f"; only datum {worst.datum.item()}, which loses {float(worst.gap):.3g} nats, makes a mean bad"
    if tails > share:
        why += f", and k̂ is above {gaps.attrs['threshold_khat']} for {tails:.0%}, whose log p(x) is unreliable"
    level: Level = "bad" if "bad" in levels else "doubtful" if "doubtful" in levels else "fine"
    steps = _next(levels, closed, approximation.value, tails > share)
    if not optimizer_converged(gaps):
        steps = "; ".join(filter(None, [f"first use more than {gaps.attrs['steps']} steps", steps]))
    return Finding("inference gaps", level, why, steps)


def _over_data(gaps: xr.Dataset) -> str:
    """Describe the standard errors of both means over data, which apply to other data."""
    n = gaps.sizes["datum"]
    errors = [float(gaps[name].std(ddof=1)) / math.sqrt(n) for name in ("amortization_gap", "approximation_gap")]
    text = " and ".join(format_rounded(error, error) for error in errors)
    return f" (over data {text})" if n > 1 else ""


@dataclass(frozen=True)
class MeanGap:
    """The mean of a gap over the given data, in nats.

    Args:
        value: the mean.
        error: its standard error over draws.
        low: the mean minus two standard errors and the optimization error by which it may be too large.
        high: the mean plus two standard errors and the optimization error by which it may be too small.
    """

    value: float
    error: float
    low: float
    high: float

    def __str__(self) -> str:
        return format_estimate(self.value, self.error, over="")


def mean_gap(gaps: xr.Dataset, name: str) -> MeanGap:
    """Average a gap over data, with its Monte-Carlo error and the optimization error.

    Args:
        gaps: from :func:`inference_gaps`.
        name: the name of one of its variables.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 1), torch.zeros(5), 0.5)
        >>> gaps = inference_gaps(linear.as_vae(), torch.ones(3, 5), steps=200, num_particles=50)
        >>> abs(mean_gap(gaps, "gap").value) < 0.001
        True
    """

    def average(name: str) -> tuple[float, float]:
        return float(gaps[name].mean()), float(np.sqrt((gaps[f"{name}_se"] ** 2).sum()) / gaps.sizes["datum"])

    def upper_limit(name: str | None) -> float:
        mean, error = (0.0, 0.0) if name is None else average(name)
        return mean + 2 * error

    (value, error), (below, above) = average(name), (upper_limit(one) for one in MAY_BE_OFF.get(name, (None, None)))
    return MeanGap(value, error, value - 2 * error - below, value + 2 * error + above)


def _is_bad_without(gaps: xr.Dataset, datum: int, bad: float) -> bool:
    """Return whether a mean gap is above the upper threshold without one datum."""
    rest = gaps.drop_isel(datum=datum)
    return any(mean_gap(rest, name).low > bad for name in ("amortization_gap", "approximation_gap"))


def optimizer_converged(gaps: xr.Dataset) -> bool:
    """Return whether both halves of the optimizer's steps end at the same ELBO, in both families.

    Args:
        gaps: from :func:`inference_gaps`.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 1), torch.zeros(5), 0.5)
        >>> optimizer_converged(inference_gaps(linear.as_vae(), torch.ones(3, 5), steps=200, num_particles=50))
        True
    """
    errors = (mean_gap(gaps, name) for name in ("optimization_error", "richer_optimization_error"))
    return all(error.low <= gaps.attrs["threshold_optimization"] * gaps.attrs["latents"] for error in errors)


def _optimization(gaps: xr.Dataset) -> str:
    """Describe the optimization error."""
    error, richer = (mean_gap(gaps, name) for name in ("optimization_error", "richer_optimization_error"))
    text = f"the halves of the optimizer's {gaps.attrs['steps']} steps end {error} nats apart"
    if optimizer_converged(gaps):
        return text
    return (
        f"{text} ({richer} in the richer family), so it has not converged: the true loss of the encoder may be larger, "
        "and that of the family smaller"
    )


def _level(low: float, high: float, fine: float, bad: float) -> Level:
    return "fine" if high <= fine else "bad" if low > bad else "doubtful"


def _next(levels: Sequence[Level], closed: MeanGap, approximation: float, tails: bool) -> str:
    steps = []
    if levels[0] != "fine":
        steps.append(
            "wrap the encoder in posteriors.Refined; if its training data lose as much, widen its network, or train "
            "longer if the validation ELBO still rises"
        )
    if levels[1] != "fine" and closed.value > 0.5 * approximation:
        steps.append(f"use posteriors.FullNormal or LowRankNormal, which can gain {closed} nats of the family's loss")
    elif levels[1] != "fine":
        steps.append("use posteriors.Flow: normals with a full covariance would gain little")
    if tails:
        steps.append("pass log_evidence from pv.log_evidence(method='ais')")
    if not steps and len(levels) > 2:
        steps.append("look at the data with the largest gaps")
    return "; ".join(steps)
