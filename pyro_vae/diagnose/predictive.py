"""Prior and posterior predictive checks: compare statistics of the data with those of replicated data sets."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating, observed
from pyro_vae.core.device import seeded, validate_seed
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate, format_p, format_rounded
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.errors import SettingsError
from pyro_vae.evidence import atoms
from pyro_vae.evidence.kinds import countable_features

Statistic: TypeAlias = Callable[[Tensor], Tensor]


def _over_observed(function: Statistic) -> Statistic:
    """Turn a function into a statistic of all observed values of a data set."""
    return lambda x: function(x[~x.isnan()])


def _sd(x: Tensor) -> Tensor:
    return x.std(correction=0)


ZEROS = "share of zeros"

STATISTICS: Mapping[str, Statistic] = MappingProxyType(
    {
        "mean": _over_observed(torch.mean),
        "sd": _over_observed(_sd),
        "smallest": _over_observed(torch.min),
        "largest": _over_observed(torch.max),
        ZEROS: _over_observed(lambda x: (x == 0).double().mean()),
        "sd of row means": lambda x: _over_observed(_sd)(x.flatten(1).nanmean(1)),
    }
)
"""The statistics of the whole table, if its columns have one unit."""

OF_COLUMNS = ("mean", "sd", "smallest", "largest", ZEROS)
"""The statistics of each column."""

WORST = 12
"""The number of statistics of single columns to report, the farthest off first."""

LIKELIHOOD = "mean log p(x|z)"

DOUBTFUL, FAR = 0.05, 4.0
"""A model is doubtful if the two-sided p-value times the number of statistics is below DOUBTFUL, and then bad if the
distance is above FAR standard deviations of the replicated data sets, and larger than that of any of them."""


@torch.no_grad()
@takes_settings
def predictive_check(
    vae: Amortized,
    x: Any,
    *,
    statistics: Mapping[str, Statistic] | None = None,
    draws: int = 500,
    seed: int = 0,
    chunk: int = 2**22,
) -> xr.Dataset:
    """Compare statistics of the data with those of data sets replicated from the posterior predictive.

    .. math:: z_i \\sim q(z | x_i), \\; \\tilde x_i \\sim p(x | z_i): \\quad
        p_T = P(T(\\tilde x) > T(x)) + \\tfrac12 P(T(\\tilde x) = T(x))

    Each replicated data set has a datum for each given datum, with the same latent, context and missing values. A
    p-value near 0 or 1 shows that the model cannot reproduce the statistic. Since each datum's latent was inferred from
    that datum, the p-values of a correct model are closer to ½ than uniform p-values: the check is conservative. Use
    held-out data; :func:`prior_check` compares with data sets from new latents, and its p-values are uniform.

    One discrepancy is always included: the mean of log p(x|z) per datum, of data and replicate at the same latents.

    Args:
        vae: a VAE or a :class:`pyro_vae.Pair`.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        statistics: functions from a data set of shape ``(datum, *features)`` to one number, by name; missing values are
            NaN in data and replicates. By default the mean, sd, smallest and largest value and share of zeros of each
            column, and, if the columns have one unit, ``diagnose.STATISTICS`` of the whole table: the same, and the sd
            of the row means. The share of zeros is used only for countable columns, and for columns that are 0 in more
            than a fifth of the rows. Columns with names are assumed to have different units, unless they are pixels.
        draws: the number of replicated data sets, at least 20.
        seed: of all draws.
        chunk: the approximate number of values to process at a time, but at least one data set.

    Returns:
        A dataset over ``statistic`` (those of the whole table, then the 12 of single columns that are farthest off, the
        worst first; the coordinate ``family`` distinguishes them) of ``observed`` and ``replicated`` (both over
        ``draw``; only the discrepancy of the data depends on the draw), ``p_value``, ``p_value_se`` (the standard
        deviation of its Beta distribution given the number of replicates above) and ``z_score``, the difference of the
        data from the mean of the replicates in standard deviations of the replicates. ``column_p_value`` is a joint
        p-value of all statistics of columns: the share of replicates whose largest distance from the mean of the
        replicates, in standard deviations, is at least that of the data.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data, or a Pair has a latent outside the plate over data.
        SettingsError: if ``draws`` is below 20, or a statistic does not return one finite number.

    References:
        | Resampling-Based Multiple Testing (Westfall & Young, 1993), ISBN 978-0-471-55761-6
        | Posterior Predictive Assessment of Model Fitness via Realized Discrepancies (Gelman, Meng & Stern, 1996),
          https://www.jstor.org/stable/24306036
        | Posterior Predictive p-Values (Meng, 1994), https://doi.org/10.1214/aos/1176325622

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> _ = torch.manual_seed(0)
        >>> found = predictive_check(linear.as_vae(), linear.sample(30), statistics={"sd": torch.std}, draws=50)
        >>> found.statistic.values.tolist(), bool((abs(found.p_value - 0.5) < 0.45).all())
        (['sd', 'mean log p(x|z)'], True)
    """
    return _check(vae, x, statistics, draws, seed, chunk, prior=False)


@torch.no_grad()
@takes_settings
def prior_check(
    vae: Amortized,
    x: Any,
    *,
    statistics: Mapping[str, Statistic] | None = None,
    draws: int = 500,
    seed: int = 0,
    chunk: int = 2**22,
) -> xr.Dataset:
    """Compare statistics of the data with those of data sets replicated from the prior predictive.

    .. math:: z_i \\sim p(z), \\; \\tilde x_i \\sim p(x | z_i): \\quad p_T = P(T(\\tilde x) > T(x))
        + \\tfrac12 P(T(\\tilde x) = T(x))

    Before training, the check shows the data sets that the prior, decoder and likelihood imply; after training, whether
    new data sets from the model look like held-out data. If the data are from the model, each p-value is uniform. The
    guide is not used, and there is no discrepancy.

    Args:
        vae: a VAE or a :class:`pyro_vae.Pair`.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        statistics: as for :func:`predictive_check`.
        draws: the number of replicated data sets, at least 20.
        seed: of all draws.
        chunk: the approximate number of values to process at a time, but at least one data set.

    Returns:
        A dataset like that of :func:`predictive_check`.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data; for a Pair, if its model uses the values of x other than as
            ``obs=x``, or has a latent outside the plate over data.
        SettingsError: if ``draws`` is below 20, or a statistic does not return one finite number.

    References:
        | Visualization in Bayesian workflow (Gabry et al., 2019), https://arxiv.org/abs/1709.01449
        | Sampling and Bayes' Inference in Scientific Modelling and Robustness (Box, 1980),
          https://doi.org/10.2307/2982063

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> found = prior_check(linear.as_vae(), 100 * torch.ones(30, 5), statistics={"mean": torch.mean}, draws=50)
        >>> found.p_value.values
        array([0.])
    """
    return _check(vae, x, statistics, draws, seed, chunk, prior=True)


def _check(
    vae: Amortized,
    x: Any,
    statistics: Mapping[str, Statistic] | None,
    draws: int,
    seed: int,
    chunk: int,
    *,
    prior: bool,
) -> xr.Dataset:
    whole("draws", draws, 20)
    whole("chunk", chunk, 1)
    validate_seed(seed)
    x = data_for(vae, x)
    functions = _validate_statistics(statistics) if statistics is not None else STATISTICS if _has_one_unit(x) else {}
    rows = rows_for(vae, x).like(vae)
    columns = [_column_statistics(_with_nan(rows.x, rows.mask))] if statistics is None else []
    has_zeros = _has_zeros(vae, rows, columns[0]) if columns else np.array([True])
    if not has_zeros.any():
        functions = {name: function for name, function in functions.items() if name != ZEROS}
    of_data = [_evaluate(name, function, _with_nan(rows.x, rows.mask)) for name, function in functions.items()]
    seen, made = [], []
    with seeded(seed, rows.x.device), evaluating(vae, draws * len(rows)):
        for replicated, discrepancies in _replicates(vae, rows, draws, chunk, prior):
            of_replicate = [_evaluate(name, function, replicated) for name, function in functions.items()]
            seen.append(of_data + discrepancies[:1])
            made.append(of_replicate + discrepancies[1:])
            if columns:
                columns.append(_column_statistics(replicated))
    names = [*functions, *[LIKELIHOOD] * (not prior)]
    found = _summary(np.array(seen), np.array(made), names)
    if columns:
        labels = getattr(x, "columns", None)
        found = _with_columns(np.array(seen), np.array(made), names, np.stack(columns), labels, has_zeros)
    return found.assign_attrs(
        {"latents": "prior" if prior else "posterior", "data": len(rows), "draws": draws, "seed": seed, **versions()}
    )


def _has_one_unit(x: Any) -> bool:
    """Return whether the columns have one unit: if they have no names, or are pixels."""
    return getattr(x, "columns", None) is None or getattr(x, "image_shape", None) is not None


def _has_zeros(vae: Amortized, rows: Rows, statistics: np.ndarray) -> np.ndarray:
    """Return whether the share of zeros of each column is informative; in continuous data, a few zeros are rounding."""
    return np.array(countable_features(vae, rows)) | (statistics[OF_COLUMNS.index(ZEROS)] > atoms.SHARE)


def _column_statistics(x: Tensor) -> np.ndarray:
    """Compute the statistics of each column, shape ``(statistic, column)``; 0 for a column without observed values."""
    x = x.flatten(1).double()
    missing = x.isnan()
    mean = x.nanmean(0)
    sd = ((x - mean) ** 2).nanmean(0).sqrt()
    least, most = x.masked_fill(missing, math.inf).amin(0), x.masked_fill(missing, -math.inf).amax(0)
    zeros = (x == 0).double().masked_fill(missing, math.nan).nanmean(0)
    found: np.ndarray = torch.stack([mean, sd, least, most, zeros]).masked_fill(missing.all(0), 0.0).cpu().numpy()
    return found


def _with_columns(
    seen: np.ndarray,
    made: np.ndarray,
    names: list[str],
    columns: np.ndarray,
    labels: Sequence[str] | None,
    has_zeros: np.ndarray,
) -> xr.Dataset:
    """Summarize the table's statistics and the worst ones of single columns, ``(1 + draw, statistic, column)``."""
    titles = [f"column {j}" for j in range(columns.shape[-1])] if labels is None else [*map(str, labels)]
    used = np.array([has_zeros if of == ZEROS else np.ones_like(has_zeros) for of in OF_COLUMNS]).ravel()
    every = list(compress((f"{of} of {title}" for of in OF_COLUMNS for title in titles), used))
    flat = columns.reshape(len(columns), -1)[:, used]  # the data come first
    centre, spread = flat[1:].mean(0), flat[1:].std(0, ddof=1)
    tiny = 1e-9 * np.abs(flat).max(0)  # the rounding error of equal values
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.abs(flat - centre) / np.where(spread > tiny, spread, 0.0)
    far = np.where(np.abs(flat - centre) <= tiny, 0.0, far)
    distance = np.abs(flat[0] - centre)  # orders statistics that are constant in the replicates, so infinitely far
    worst, farthest = np.lexsort((-distance, -far[0]))[:WORST], far.max(1)
    of_data = np.repeat(flat[:1, worst], len(made), 0)
    found = _summary(
        np.hstack([seen, of_data]), np.hstack([made, flat[1:, worst]]), [*names, *(every[i] for i in worst)]
    )
    family = ["table"] * len(names) + ["column"] * len(worst)
    found["column_p_value"] = (), (farthest >= farthest[0]).mean(), {"units": "probability"}
    return found.assign_coords(family=("statistic", family)).assign_attrs(column_statistics=len(every))


def _validate_statistics(statistics: Any) -> Mapping[str, Statistic]:
    if not isinstance(statistics, Mapping) or not statistics or not all(map(callable, statistics.values())):
        raise SettingsError('statistics must be functions of a data set, by name, such as {"mean": torch.mean}')
    return statistics


def _evaluate(name: str, function: Statistic, x: Tensor) -> float:
    """Evaluate a statistic, and validate that the result is one finite number."""
    version = _version(x)
    value = function(x)
    if _version(x) != version:
        raise SettingsError(f"statistic {name!r} changes the data in place; let it copy them, x.clone()")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"statistic {name!r} does not return a single number; use .mean(), for example") from error
    if not math.isfinite(number):
        hint = "; missing values are NaN, so use torch.nanmean or similar" if bool(x.isnan().any()) else ""
        raise SettingsError(f"statistic {name!r} returns {number}; it must be a finite number{hint}")
    return number


def _version(x: Tensor) -> int:
    """Return torch's counter of in-place changes, or 0 in inference mode."""
    return 0 if x.is_inference() else x._version


def _with_nan(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.clone() if mask is None else x.masked_fill(~mask, torch.nan)


def _replicates(
    vae: Amortized, rows: Rows, draws: int, chunk: int, prior: bool
) -> Iterator[tuple[Tensor, list[float]]]:
    """Yield replicated data sets, each with the discrepancies of data and replicate (none for the prior)."""
    parts = list(rows.split(max(1, chunk // rows.x[0].numel())))
    guides = [None if prior else vae.posterior(part) for part in parts]
    block = max(1, chunk // rows.x.numel())
    for start in range(0, draws, block):
        shape = (min(block, draws - start),)
        made = [_replicate(vae, part, q, shape) for part, q in zip(parts, guides, strict=True)]
        scores = torch.stack([scores for _, scores in made]).sum(0) / len(rows)
        for x, score in zip(torch.cat([x for x, _ in made], 1), scores.tolist(), strict=True):
            yield x, [] if prior else score


def _replicate(vae: Amortized, rows: Rows, q: Any, shape: tuple[int]) -> tuple[Tensor, Tensor]:
    """Replicate some rows, and return the sums of log p(x|z) of data and replicate too, ``(draw, 2)``."""
    z = vae.draw_latents(rows, shape) if q is None else q.sample(shape)
    p = vae.likelihood(z, rows)
    x = p.sample()
    scores = [p.log_prob(value).double().sum(-1) for value in (rows.x, observed(x, rows.mask))]
    return _with_nan(x, rows.mask), torch.stack(scores, -1)


def _summary(seen: np.ndarray, made: np.ndarray, names: list[str]) -> xr.Dataset:
    draws = len(made)
    above = (made > seen).sum(0) + 0.5 * (made == seen).sum(0)
    posterior_mean = (above + 1) / (draws + 2)
    difference = seen.mean(0) - made.mean(0)
    spread = (made - seen).std(0, ddof=1)
    share = {"units": "probability"}
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.where(difference == 0, 0.0, difference / spread)
    found = {
        "observed": (("draw", "statistic"), seen, {"units": "of the statistic"}),
        "replicated": (("draw", "statistic"), made, {"units": "of the statistic"}),
        "p_value": ("statistic", above / draws, share),
        "p_value_se": ("statistic", np.sqrt(posterior_mean * (1 - posterior_mean) / (draws + 3)), share),
        "z_score": ("statistic", far, {"units": "standard deviations of the replicates"}),
    }
    coords = {"draw": range(draws), "statistic": np.array(names, dtype=str)}
    return xr.Dataset(found, coords, attrs={"doubtful_below": DOUBTFUL, "far_beyond": FAR})


def judge_predictive_check(found: xr.Dataset) -> Finding:
    """Judge whether replicated data sets look like the observed one.

    The smallest two-sided p-value of the table's statistics is multiplied by their number; the joint p-value of all
    statistics of single columns is multiplied by one more than that. The p-values are upper limits for the number of
    draws, so that few draws cannot make a model look bad.

    Args:
        found: from :func:`predictive_check` or :func:`prior_check`.

    Returns:
        Fine if the corrected p-value is at least 0.05; otherwise bad if the statistic of the data is more than 4
        standard deviations of the replicates off, and farther than that of any replicate, else doubtful.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> judge_predictive_check(prior_check(linear.as_vae(), 100 * torch.ones(30, 5))).level
        'bad'
    """
    draws = found.sizes["draw"]
    columns = found.isel(statistic=found.family.values == "column") if "family" in found.coords else None
    table = found if columns is None else found.isel(statistic=found.family.values == "table")
    number = table.sizes["statistic"]
    parts: list[tuple[float, float]] = []  # corrected p-values, and the distances of statistics beyond all replicates
    sentences = []
    if number:
        above = table.p_value.values * draws
        two_sided = 2 * (np.minimum(above, draws - above) + 1) / (draws + 2)
        far = np.abs(table.z_score.values)
        worst = int(np.lexsort((-far, two_sided))[0])
        beyond = min(above[worst], draws - above[worst]) < 1
        parts.append((min(1.0, number * float(two_sided[worst])), float(far[worst]) * beyond))
        sentences.append(_worst_of_table(table.isel(statistic=worst), number, draws, found.attrs["data"], parts[-1][0]))
    if columns is not None:
        beyond = float(found.column_p_value) * (draws + 1) < 2  # the data count as one data set
        parts.append((min(1.0, (number + 1) * float(found.column_p_value)), float(abs(columns.z_score[0])) * beyond))
        sentences.append(_worst_columns(found, columns, parts[-1][0]))
    corrected = min(p for p, _ in parts)
    distance = max([far for p, far in parts if p < DOUBTFUL] or [far for _, far in parts])
    too_few = 2 * number / (draws + 2) >= DOUBTFUL
    level: Level = "fine" if corrected >= DOUBTFUL and not too_few else "bad" if distance > FAR else "doubtful"
    sentences.append(f"bad if the farthest is more than {FAR:g} sd of the replicates off, and farther than any of them")
    which = found.attrs["latents"]
    advice = "" if level == "fine" else _advice(which, too_few and level != "bad")
    return Finding(f"{which} predictive check", level, "; ".join(sentences), advice)


def _worst_of_table(shown: xr.Dataset, number: int, draws: int, data: int, corrected: float) -> str:
    spread = float(shown.replicated.std(ddof=1))
    name = shown.statistic.item()
    which = f"of {number} statistics of the table, the {name} is the farthest off" if number > 1 else f"the {name} is"
    return (
        f"{which}{':' if number > 1 else ''} {_format_observed(shown, spread)} in {data} data, "
        f"{format_estimate(float(shown.replicated.mean()), spread, over='')} in {draws} replicates (mean and sd), "
        f"{format_p(float(shown.p_value), draws, float(shown.p_value_se))}; two-sided"
        f"{f' for all {number}' if number > 1 else ''}, p is at most {corrected:.2g} (doubtful below {DOUBTFUL})"
    )


def _format_observed(shown: xr.Dataset, spread: float) -> str:
    """Format a statistic of the data, rounded by its standard deviation over replicates."""
    return format_rounded(float(shown.observed.mean()), spread or math.nan)


def _worst_columns(found: xr.Dataset, columns: xr.Dataset, corrected: float, most: int = 3) -> str:
    worst = [
        f"the {one.statistic.item()} ({_format_observed(one, spread)}, in replicates "
        f"{format_estimate(float(one.replicated.mean()), spread, over='')})"
        for one in (columns.isel(statistic=i) for i in range(min(most, columns.sizes["statistic"])))
        for spread in [float(one.replicated.std(ddof=1))]
    ]
    p, draws = float(found.column_p_value), found.sizes["draw"]
    times = f", corrected for those of the table, p is at most {corrected:.2g}" if corrected > p else ""
    return (
        f"of {found.attrs['column_statistics']} statistics of single columns, the farthest off are {', '.join(worst)}; "
        f"for all of them {format_p(p, draws, math.sqrt(p * (1 - p) / (draws + 1)))}{times} (doubtful below {DOUBTFUL})"
    )


def _advice(which: str, too_few: bool) -> str:
    if too_few:
        return "draw more replicates: there are too few for a conclusion"
    if which == "prior":
        return "train, or change the likelihood, its scale or the prior: the model does not generate such data"
    return "use a likelihood with the spread, tails or zeros of the data, or a larger decoder"
