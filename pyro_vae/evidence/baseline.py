"""Simple models of the same data, whose held-out log-likelihood stands beside that of a VAE."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.device import make_generator, refuse_seed, seeded
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.data.repeats import clustered_error, distinct_rows
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import row_names
from pyro_vae.elbo.per_datum import per_datum_elbo
from pyro_vae.errors import DataError
from pyro_vae.evidence.estimate import log_evidence
from pyro_vae.evidence.kinds import countable_features

FOLDS = 5
"""Without training data, the baselines of each fifth of the held-out rows are fitted to the others."""

ROWS_PER_FEATURE = 5
"""A full covariance is fitted where there are so many rows for each feature."""

MOST_ROWS, MOST_FEATURES = 20_000, 2000
"""Baselines are fitted to at most so many rows, drawn at random; of more features no covariance is estimated."""

LEVELS = 256
"""At least so many values are possible for a countable feature that is no whole number, such as a grey level."""

ERRORS = 2.0
"""A difference stands out where it is more than so many standard errors."""

INDEPENDENT = ("independent Gaussians", "column frequencies", "independent columns")
"""The baselines that know nothing but each column by itself, one of which is always there."""

Density = Callable[[Tensor], Tensor]


@takes_settings
def baseline(
    vae: VAE,
    x: Any,
    *,
    train: Any = None,
    evidence: xr.Dataset | None = None,
    num_particles: int = 500,
    seed: int = 0,
) -> xr.Dataset:
    """Compare a VAE with simple models by log p of the same held-out data.

    .. math:: d_b = \\frac1n \\sum_i \\log p_{\\mathrm{VAE}}(x_i) - \\log p_b(x_i)

    The baselines are fitted in closed form: independent columns (normals for real features; for countable ones the
    frequencies of the values, with one row's worth of a geometric distribution for values that were not seen), Poisson
    for whole numbers above 1, and, for real data without missing values, probabilistic PCA with as many latents as the
    VAE (of the columns as they are or standardized, whichever describes the training data better) and, where there are
    5 rows for each feature, a normal with a full covariance. The variance of
    rounding is added to that of each column: it is that of the smallest step between two of its values. Baselines do
    not see the context.

    Args:
        vae: a trained VAE.
        x: held-out data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask; at
            least two.
        train: the data that the baselines are fitted to: those that the VAE was trained on. If not given, each fifth of
            ``x`` is scored by baselines fitted to the others, which have fewer rows than the VAE had.
        evidence: from :func:`pyro_vae.log_evidence` of the same VAE and data, where it has been estimated already.
        num_particles: of the importance-weighted estimate of log p(x), where it has not.
        seed: of the particles and the fifths.

    Returns:
        A dataset in nats: ``log_evidence`` and ``elbo`` over ``datum``; ``log_likelihood`` over ``baseline, datum``;
        over ``baseline``, ``difference`` (of log p(x) from the baseline) and ``elbo_difference``, each per datum with
        ``…_se``, the standard error of the paired differences over data.

    Raises:
        DataError: if there are fewer than two held-out rows, the training data have other columns, or the evidence is
            of other data.
        ModelError: if the VAE does not fit the data.

    References:
        | Probabilistic Principal Component Analysis (Tipping & Bishop, 1999), https://doi.org/10.1111/1467-9868.00196

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> found = baseline(linear.as_vae(), linear.sample(100), train=linear.sample(400))
        >>> found.baseline.values.tolist()
        ['independent Gaussians', 'full-covariance Gaussian', 'probabilistic PCA (2)']
        >>> bool(found.difference[0] > 5 * found.difference_se[0])
        True
    """
    refuse_seed(seed)
    x = data_for(vae, x, source="x")
    rows = rows_for(vae, x, source="x")
    if len(rows) < 2:
        raise DataError("x holds 1 datum, which has no standard error; give at least 2")
    fitted = None if train is None else _some(rows_for(vae, train, source="train"), seed)
    countable, latents = countable_features(vae, rows), _latents(vae, rows)
    scores = (
        _cross_fitted(rows, countable, latents, seed) if fitted is None else _scores(fitted, rows, countable, latents)
    )
    if evidence is None:
        evidence = log_evidence(vae, x, num_particles=num_particles, seed=seed)
    elif evidence.attrs["data_hash"] != data_hash(row_hashes(rows)):
        raise DataError("evidence is of other data than x; give that of x, or none")
    with seeded(seed, vae.like(rows.x[:1]).device):
        elbo = per_datum_elbo(vae, rows, num_particles=16).double().cpu().numpy()
    each = np.stack([score.numpy() for score in scores.values()])
    number, of_vae = distinct_rows(rows), evidence.log_evidence.values.astype(float)
    per_datum = {"units": "nats per datum"}
    variables: dict[str, Any] = {
        "log_evidence": ("datum", of_vae, {"units": "nats"}),
        "elbo": ("datum", elbo, {"units": "nats"}),
        "log_likelihood": (("baseline", "datum"), each, {"units": "nats"}),
    }
    for name, what, own in (("difference", "log p(x)", of_vae), ("elbo_difference", "ELBO", elbo)):
        told = {"long_name": f"{what}, VAE − baseline", "reference": 0.0}
        variables[name] = "baseline", (own - each).mean(1), per_datum | told
        variables[f"{name}_se"] = "baseline", clustered_error(own - each, number), per_datum
    about = {
        "fitted_to": f"{len(fitted)} training data" if fitted is not None else "the other four fifths of the same data",
        "context": "not seen" if rows.context is not None else "",
        "num_particles": evidence.attrs["num_particles"], "seed": seed, "errors": ERRORS,
        "errors_over": "data, in pairs", **versions(),
    }  # fmt: skip
    return xr.Dataset(variables, {"baseline": list(scores), "datum": row_names(x, len(rows))}, about)


@torch.no_grad()
def _latents(vae: VAE, rows: Rows) -> int:
    one = rows.take(slice(1)).like(vae)
    return int(vae.prior(*one.given).event_shape.numel())


def _some(rows: Rows, seed: int) -> Rows:
    if len(rows) <= MOST_ROWS:
        return rows
    return rows.take(torch.randperm(len(rows), generator=make_generator(seed))[:MOST_ROWS].to(rows.x.device))


def _cross_fitted(rows: Rows, countable: tuple[bool, ...], latents: int, seed: int) -> dict[str, Tensor]:
    fold = torch.randperm(len(rows), generator=make_generator(seed)) % min(FOLDS, len(rows))
    found: dict[str, Tensor] = {}
    parts = [
        (fold == k, _scores(rows.take(fold != k), rows.take(fold == k), countable, latents)) for k in fold.unique()
    ]
    names = [name for name in parts[0][1] if all(name in scores for _, scores in parts)]
    for name in names:
        found[name] = torch.empty(len(rows), dtype=torch.float64)
        for chosen, scores in parts:
            found[name][chosen] = scores[name]
    return found


def _scores(train: Rows, held_out: Rows, countable: tuple[bool, ...], latents: int) -> dict[str, Tensor]:
    """The log-likelihood of each held-out row by each baseline, by name."""
    seen, new = _table(train), _table(held_out)
    if seen.shape[1] != new.shape[1]:
        raise DataError(f"train has {seen.shape[1]} columns, and x {new.shape[1]}; give data of the same columns")
    rounding = _rounding(seen)
    columns = [
        (_frequencies(seen[:, j]) if countable[j] else _normal(seen[:, j], rounding[j]))(new[:, j])
        for j in range(len(countable))
    ]
    name = "column frequencies" if all(countable) else "independent columns" if any(countable) else INDEPENDENT[0]
    found = {name: torch.stack(columns, 1).nansum(1)}
    if all(countable) and bool((seen.nan_to_num() == seen.nan_to_num().round()).all()) and seen.nan_to_num().max() > 1:
        rate = (seen.nansum(0) + 0.5) / ((~seen.isnan()).sum(0) + 1)
        found["independent Poisson"] = (
            torch.distributions.Poisson(rate).log_prob(new.nan_to_num()).where(~new.isnan(), torch.zeros(())).sum(1)
        )
    if any(countable) or seen.isnan().any() or new.isnan().any():
        return found
    return found | _joint(seen, new, rounding, latents)


def _joint(seen: Tensor, new: Tensor, rounding: Tensor, latents: int) -> dict[str, Tensor]:
    """Normals whose columns depend on each other."""
    n, features = seen.shape
    found: dict[str, Tensor] = {}
    if not 2 <= features <= MOST_FEATURES:
        return found
    apart = seen - seen.mean(0)
    covariance = apart.T @ apart / n + rounding.diag()
    if n >= ROWS_PER_FEATURE * features:
        found["full-covariance Gaussian"] = _multivariate(seen.mean(0), covariance)(new)
    if latents < features - 1:
        sds = covariance.diag().sqrt()
        of_units = [_principal(covariance, scale, latents) for scale in (torch.ones_like(sds), sds)]
        fits = [_multivariate(seen.mean(0), own) for own in of_units]
        found[f"probabilistic PCA ({latents})"] = max(fits, key=lambda fit: float(fit(seen).mean()))(new)
    return found


def _principal(covariance: Tensor, scale: Tensor, latents: int) -> Tensor:
    """The covariance of probabilistic PCA of columns divided by a scale, in the columns' own units."""
    units = torch.outer(scale, scale)
    values, vectors = torch.linalg.eigh(covariance / units)
    values[:-latents] = values[:-latents].mean()
    smoothed = (vectors * values) @ vectors.T
    return (smoothed + smoothed.T) / 2 * units


def _table(rows: Rows) -> Tensor:
    """A column for each feature, NaN where missing."""
    x = rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan)
    return x.flatten(1).detach().double().cpu()


def _rounding(seen: Tensor) -> Tensor:
    """The variance of rounding of each column: that of its smallest step, or where it is constant of the table's."""
    steps = [_step(column) for column in seen.T]
    least = min((step for step in steps if step > 0), default=1.0)
    return torch.tensor([step or least for step in steps], dtype=torch.float64).square() / 12


def _step(column: Tensor) -> float:
    values = column[~column.isnan()].unique()
    return float(values.diff().min()) if len(values) > 1 else 0.0


def _normal(column: Tensor, rounding: Tensor) -> Density:
    own = column[~column.isnan()]
    scale = (own.var(correction=0) + rounding).sqrt() if len(own) else torch.ones((), dtype=torch.float64)
    centre = own.mean() if len(own) else torch.zeros((), dtype=torch.float64)
    return lambda x: -0.5 * ((x - centre) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def _multivariate(mean: Tensor, covariance: Tensor) -> Density:
    return torch.distributions.MultivariateNormal(mean, covariance, validate_args=False).log_prob


def _frequencies(column: Tensor) -> Density:
    """The shares of the values, mixed with a distribution over all values that counts as one row."""
    own = column[~column.isnan()]
    values, counts = own.unique(return_counts=True)
    whole = bool((own == own.round()).all() and (own >= 0).all())
    mean = float(own.mean()) if len(own) else 0.0
    ratio = (mean + 0.5) / (mean + 1.5)  # of a geometric distribution, whose mean is half more

    def log_prob(x: Tensor) -> Tensor:
        met = (x.unsqueeze(-1) == values).double() @ counts.double()
        rest = (1 - ratio) * ratio ** x.nan_to_num() if whole else torch.full_like(x, 1 / max(LEVELS, len(values)))
        return ((met + rest) / (len(own) + 1)).log().where(~x.isnan(), x)

    return log_prob


def judge_baseline(found: xr.Dataset) -> Finding:
    """Does the VAE say more about new data than simple models do?

    Args:
        found: from :func:`baseline`.

    Returns:
        ``"bad"`` where log p(x) of the VAE lies below that of independent columns by more than 2 standard errors of the
        paired difference, ``"doubtful"`` where it is not above theirs by as much, or lies below another baseline by as
        much, or another is better for most data (2 standard errors beyond half of them) and not worse in the mean; else
        ``"fine"``.

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> judge_baseline(baseline(linear.as_vae(), linear.sample(100))).level
        'fine'
    """
    apart, error = found.difference.values, found.difference_se.values
    simple = np.array([str(name) in INDEPENDENT for name in found.baseline.values])
    below, above = apart < -ERRORS * error, apart > ERRORS * error
    better = (found.log_evidence > found.log_likelihood).mean("datum").values
    by_few = ~above & ~below & (abs(better - 0.5) > ERRORS * 0.5 / math.sqrt(found.sizes["datum"]))
    unclear = below.any() or not above[simple].all() or (by_few & (better < 0.5)).any()
    level: Level = "bad" if below[simple].any() else "doubtful" if unclear else "fine"
    told = ", ".join(
        f"{format_estimate(d, s, over='', signed=True)} over {name}"
        for name, d, s in zip(found.baseline.values, apart, error, strict=True)
    )
    of_elbo = ", ".join(
        format_estimate(d, s, over="", signed=True)
        for d, s in zip(found.elbo_difference.values, found.elbo_difference_se.values, strict=True)
    )
    near = [str(name) for name in found.baseline.values[~below & ~above]]
    why = (
        f"log p(x) of {found.sizes['datum']} data is in nats per datum {told} (paired, s.e. over data; the ELBO "
        f"{of_elbo}); the baselines were fitted to {found.attrs['fitted_to']}"
    )
    if near:
        told = ", ".join(f"{name} ({_by_datum(found, name)})" for name in near)
        why += f"; within {ERRORS:g} standard errors, so not told apart: {told}"
    if found.attrs["context"]:
        why += " and do not see the context"
    return Finding("baselines", level, why, "" if level == "fine" else _advice(found, below, by_few))


def _by_datum(found: xr.Dataset, name: str) -> str:
    """For how many data the VAE is better than a baseline, and the farthest, which a mean does not show."""
    each = (found.log_evidence - found.log_likelihood.sel(baseline=name)).values
    farthest = int(abs(each).argmax())
    told = f"{np.median(each):+.3g} at the median and {each[farthest]:+.3g} for datum {found.datum.values[farthest]}"
    return f"the VAE is better for {int((each > 0).sum())} of {len(each)} data, by {told}"


def _advice(found: xr.Dataset, below: np.ndarray, by_few: np.ndarray) -> str:
    if not below.any() and by_few.any():
        return "few data decide the mean: look at those with the largest differences, and try likelihoods.StudentT"
    if not below.any():
        return "not told apart from independent columns: hold out more rows, or see whether the columns depend at all"
    best = str(found.baseline.values[int(found.difference.values.argmin())])
    return (
        f"new data are better described by {best}: see whether training ended too early or overfits, standardize the "
        "columns, and give each column a scale of its own (per_feature)"
    )
