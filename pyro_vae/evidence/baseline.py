"""Simple baseline models to compare the held-out log-likelihood of a VAE with."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.device import make_generator, seeded, validate_seed
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
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
"""The number of folds; without training data, each fold of the held-out rows is scored by baselines of the others."""

ROWS_PER_FEATURE = 5
"""The smallest number of rows per feature for a full covariance."""

MOST_ROWS, MOST_FEATURES = 20_000, 2000
"""The largest number of training rows, drawn at random, and the largest number of features for a covariance."""

LEVELS = 256
"""The smallest number of possible values of a countable feature with fractions, such as a grey level."""

ERRORS = 2.0
"""The number of standard errors above which a difference counts as significant."""

INDEPENDENT = ("independent Gaussians", "column frequencies", "independent columns")
"""The baselines with independent columns, one of which is always fitted."""

Density = Callable[[Tensor], Tensor]


@takes_settings
def baseline(
    vae: Amortized,
    x: Any,
    *,
    train: Any = None,
    evidence: xr.Dataset | None = None,
    num_particles: int = 500,
    seed: int = 0,
) -> xr.Dataset:
    """Compare a VAE with simple models by the log-likelihood of the same held-out data.

    .. math:: d_b = \\frac1n \\sum_i \\log p_{\\mathrm{VAE}}(x_i) - \\log p_b(x_i)

    The baselines are fitted in closed form:

    - independent columns: normals for real features; for countable features the frequencies of their values, mixed with
      a geometric distribution of the weight of one row, for unseen values;
    - Poisson distributions, for whole numbers above 1;
    - probabilistic PCA with the number of latents of the VAE, on the original or the standardized columns, whichever
      fits the training data better, for real data without missing values;
    - a normal with a full covariance, for real data without missing values and at least 5 rows per feature.

    The rounding variance of each column, from the smallest difference between two of its values, is added to its
    variance. Baselines ignore the context.

    Args:
        vae: a trained VAE or :class:`pyro_vae.Pair`.
        x: held-out data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask; at
            least two rows.
        train: the data to which the baselines are fitted, usually the training data of the VAE. By default, each fifth
            of ``x`` is scored by baselines fitted to the other fifths, which may have fewer rows than the VAE had.
        evidence: the result of :func:`pyro_vae.log_evidence` for the same VAE and data, if available.
        num_particles: the number of particles of the importance-weighted estimate of log p(x), without ``evidence``.
        seed: the seed of the particles and the folds.

    Returns:
        A dataset in nats: ``log_evidence`` and ``elbo`` over ``datum``; ``log_likelihood`` over ``baseline, datum``;
        over ``baseline``, ``difference`` (log p(x) minus that of the baseline) and ``elbo_difference``, each per datum
        with ``…_se``, the standard error of the paired differences over data.

    Raises:
        DataError: if there are fewer than two held-out rows, if the training data have other columns, or if
            ``evidence`` belongs to other data.
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
    validate_seed(seed)
    x = data_for(vae, x, source="x")
    rows = rows_for(vae, x, source="x")
    if len(rows) < 2:
        raise DataError("x holds 1 datum, which gives no standard error; pass at least 2")
    fitted = None if train is None else _subsample(rows_for(vae, train, source="train"), seed)
    countable, latents = countable_features(vae, rows), _number_of_latents(vae, rows)
    scores = _cross_fit(rows, countable, latents, seed) if fitted is None else _scores(fitted, rows, countable, latents)
    if evidence is None:
        evidence = log_evidence(vae, x, num_particles=num_particles, seed=seed)
    elif evidence.attrs["data_hash"] != data_hash(row_hashes(rows)):
        raise DataError("evidence belongs to other data than x; pass the evidence of x, or omit it")
    with seeded(seed, vae.like(rows.x[:1]).device):
        elbo = per_datum_elbo(vae, rows, num_particles=16).double().cpu().numpy()
    log_likelihood = np.stack([score.numpy() for score in scores.values()])
    number, log_p = distinct_rows(rows), evidence.log_evidence.values.astype(float)
    per_datum = {"units": "nats per datum"}
    variables: dict[str, Any] = {
        "log_evidence": ("datum", log_p, {"units": "nats"}),
        "elbo": ("datum", elbo, {"units": "nats"}),
        "log_likelihood": (("baseline", "datum"), log_likelihood, {"units": "nats"}),
    }
    for name, quantity, values in (("difference", "log p(x)", log_p), ("elbo_difference", "ELBO", elbo)):
        label = {"long_name": f"{quantity}, VAE − baseline", "reference": 0.0}
        variables[name] = "baseline", (values - log_likelihood).mean(1), per_datum | label
        variables[f"{name}_se"] = "baseline", clustered_error(values - log_likelihood, number), per_datum
    attributes = {
        "fitted_to": f"{len(fitted)} training data" if fitted is not None else "the other four fifths of the same data",
        "context": "not seen" if rows.context is not None else "",
        "num_particles": evidence.attrs["num_particles"], "seed": seed, "errors": ERRORS,
        "errors_over": "data, in pairs", **versions(),
    }  # fmt: skip
    return xr.Dataset(variables, {"baseline": list(scores), "datum": row_names(x, len(rows))}, attributes)


@torch.no_grad()
def _number_of_latents(vae: Amortized, rows: Rows) -> int:
    one = rows.take(slice(1)).like(vae)
    with seeded(0, one.x.device):
        return int(vae.prior_of(one).event_shape.numel())


def _subsample(rows: Rows, seed: int) -> Rows:
    if len(rows) <= MOST_ROWS:
        return rows
    return rows.take(torch.randperm(len(rows), generator=make_generator(seed))[:MOST_ROWS].to(rows.x.device))


def _cross_fit(rows: Rows, countable: tuple[bool, ...], latents: int, seed: int) -> dict[str, Tensor]:
    """The log-likelihood of each row by each baseline, fitted to the other folds."""
    fold = torch.randperm(len(rows), generator=make_generator(seed)) % min(FOLDS, len(rows))
    log_likelihood: dict[str, Tensor] = {}
    parts = [
        (fold == k, _scores(rows.take(fold != k), rows.take(fold == k), countable, latents)) for k in fold.unique()
    ]
    names = [name for name in parts[0][1] if all(name in scores for _, scores in parts)]
    for name in names:
        log_likelihood[name] = torch.empty(len(rows), dtype=torch.float64)
        for chosen, scores in parts:
            log_likelihood[name][chosen] = scores[name]
    return log_likelihood


def _scores(train: Rows, held_out: Rows, countable: tuple[bool, ...], latents: int) -> dict[str, Tensor]:
    """The log-likelihood of each held-out row by each baseline, by name."""
    seen, new = _table(train), _table(held_out)
    if seen.shape[1] != new.shape[1]:
        raise DataError(f"train has {seen.shape[1]} columns but x {new.shape[1]}; pass data with the same columns")
    rounding = _rounding(seen)
    columns = [
        (_frequencies(seen[:, j]) if countable[j] else _normal(seen[:, j], rounding[j]))(new[:, j])
        for j in range(len(countable))
    ]
    name = "column frequencies" if all(countable) else "independent columns" if any(countable) else INDEPENDENT[0]
    scores = {name: torch.stack(columns, 1).nansum(1)}
    if all(countable) and bool((seen.nan_to_num() == seen.nan_to_num().round()).all()) and seen.nan_to_num().max() > 1:
        rate = (seen.nansum(0) + 0.5) / ((~seen.isnan()).sum(0) + 1)
        scores["independent Poisson"] = (
            torch.distributions.Poisson(rate).log_prob(new.nan_to_num()).where(~new.isnan(), torch.zeros(())).sum(1)
        )
    if any(countable) or seen.isnan().any() or new.isnan().any():
        return scores
    return scores | _correlated(seen, new, rounding, latents)


def _correlated(seen: Tensor, new: Tensor, rounding: Tensor, latents: int) -> dict[str, Tensor]:
    """The log-likelihood of each held-out row under normals with correlated columns."""
    n, features = seen.shape
    scores: dict[str, Tensor] = {}
    if not 2 <= features <= MOST_FEATURES:
        return scores
    centred = seen - seen.mean(0)
    covariance = centred.T @ centred / n + rounding.diag()
    if n >= ROWS_PER_FEATURE * features:
        scores["full-covariance Gaussian"] = _multivariate(seen.mean(0), covariance)(new)
    if latents < features - 1:
        sds = covariance.diag().sqrt()
        covariances = [_pca_covariance(covariance, scale, latents) for scale in (torch.ones_like(sds), sds)]
        fits = [_multivariate(seen.mean(0), fitted) for fitted in covariances]
        scores[f"probabilistic PCA ({latents})"] = max(fits, key=lambda fit: float(fit(seen).mean()))(new)
    return scores


def _pca_covariance(covariance: Tensor, scale: Tensor, latents: int) -> Tensor:
    """The covariance of probabilistic PCA on columns divided by ``scale``, in the units of the columns."""
    units = torch.outer(scale, scale)
    values, vectors = torch.linalg.eigh(covariance / units)
    values[:-latents] = values[:-latents].mean()
    smoothed = (vectors * values) @ vectors.T
    return (smoothed + smoothed.T) / 2 * units


def _table(rows: Rows) -> Tensor:
    """The rows as a table with one column per feature, NaN where missing."""
    x = rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan)
    return x.flatten(1).detach().double().cpu()


def _rounding(seen: Tensor) -> Tensor:
    """The rounding variance of each column, from its smallest step; for a constant column, from that of the table."""
    steps = [_smallest_step(column) for column in seen.T]
    smallest = min((step for step in steps if step > 0), default=1.0)
    return torch.tensor([step or smallest for step in steps], dtype=torch.float64).square() / 12


def _smallest_step(column: Tensor) -> float:
    values = column[~column.isnan()].unique()
    return float(values.diff().min()) if len(values) > 1 else 0.0


def _normal(column: Tensor, rounding: Tensor) -> Density:
    observed = column[~column.isnan()]
    scale = (observed.var(correction=0) + rounding).sqrt() if len(observed) else torch.ones((), dtype=torch.float64)
    centre = observed.mean() if len(observed) else torch.zeros((), dtype=torch.float64)
    return lambda x: -0.5 * ((x - centre) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def _multivariate(mean: Tensor, covariance: Tensor) -> Density:
    return torch.distributions.MultivariateNormal(mean, covariance, validate_args=False).log_prob


def _frequencies(column: Tensor) -> Density:
    """The shares of the values, mixed with a distribution over all values with the weight of one row."""
    observed = column[~column.isnan()]
    values, counts = observed.unique(return_counts=True)
    whole = bool((observed == observed.round()).all() and (observed >= 0).all())
    mean = float(observed.mean()) if len(observed) else 0.0
    ratio = (mean + 0.5) / (mean + 1.5)  # the ratio of a geometric distribution with mean `mean + 0.5`

    def log_prob(x: Tensor) -> Tensor:
        count = (x.unsqueeze(-1) == values).double() @ counts.double()
        other = (1 - ratio) * ratio ** x.nan_to_num() if whole else torch.full_like(x, 1 / max(LEVELS, len(values)))
        return ((count + other) / (len(observed) + 1)).log().where(~x.isnan(), x)

    return log_prob


def judge_baseline(found: xr.Dataset) -> Finding:
    """Judge whether the VAE predicts new data better than simple models do.

    Args:
        found: the result of :func:`baseline`.

    Returns:
        ``"bad"`` if log p(x) of the VAE is lower than that of independent columns by more than 2 standard errors of the
        paired difference. ``"doubtful"`` if it is not higher than that of independent columns by 2 standard errors,
        if it is lower than that of another baseline by 2 standard errors, or if a baseline is better for most data
        (more than half by 2 standard errors) and not significantly worse in the mean. Otherwise ``"fine"``.

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> judge_baseline(baseline(linear.as_vae(), linear.sample(100))).level
        'fine'
    """
    difference, error = found.difference.values, found.difference_se.values
    independent = np.array([str(name) in INDEPENDENT for name in found.baseline.values])
    below, above = difference < -ERRORS * error, difference > ERRORS * error
    better = (found.log_evidence > found.log_likelihood).mean("datum").values
    by_few = ~above & ~below & (abs(better - 0.5) > ERRORS * 0.5 / math.sqrt(found.sizes["datum"]))
    unclear = below.any() or not above[independent].all() or (by_few & (better < 0.5)).any()
    level: Level = "bad" if below[independent].any() else "doubtful" if unclear else "fine"
    differences = ", ".join(
        f"{format_estimate(d, s, over='', signed=True)} over {name}"
        for name, d, s in zip(found.baseline.values, difference, error, strict=True)
    )
    elbo_differences = ", ".join(
        format_estimate(d, s, over="", signed=True)
        for d, s in zip(found.elbo_difference.values, found.elbo_difference_se.values, strict=True)
    )
    why = (
        f"log p(x) of {found.sizes['datum']} data, in nats per datum, is {differences} (paired, s.e. over data; the "
        f"ELBO is {elbo_differences}); the baselines were fitted to {found.attrs['fitted_to']}"
    )
    if found.attrs["context"]:
        why += " and ignore the context"
    if unresolved := [str(name) for name in found.baseline.values[~below & ~above]]:
        names = ", ".join(f"{name} ({_by_datum(found, name)})" for name in unresolved)
        why += f"; not distinguishable within {ERRORS:g} standard errors: {names}"
    return Finding("baselines", level, why, "" if level == "fine" else _advice(found, below, by_few))


def _by_datum(found: xr.Dataset, name: str) -> str:
    """The share of data for which the VAE is better, the median difference and the largest one."""
    differences = (found.log_evidence - found.log_likelihood.sel(baseline=name)).values
    largest = int(abs(differences).argmax())
    return (
        f"the VAE is better for {int((differences > 0).sum())} of {len(differences)} data, by "
        f"{np.median(differences):+.3g} at the median and {differences[largest]:+.3g} for datum "
        f"{found.datum.values[largest]}"
    )


def _advice(found: xr.Dataset, below: np.ndarray, by_few: np.ndarray) -> str:
    if not below.any() and by_few.any():
        return "few data decide the mean: inspect the data with the largest differences, and try likelihoods.StudentT"
    if not below.any():
        return (
            "the VAE is not distinguishable from independent columns: hold out more rows, or check whether the columns "
            "depend on each other"
        )
    best = str(found.baseline.values[int(found.difference.values.argmin())])
    return (
        f"{best} describes new data better: check whether training ended too early or overfits, standardize the "
        "columns, and learn a scale per column (per_feature)"
    )
