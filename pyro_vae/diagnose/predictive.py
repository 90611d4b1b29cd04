"""Do the model's own data sets look like the one observed, before training and after?"""

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
from pyro_vae.core.component import Distribution, evaluating, observed
from pyro_vae.core.device import refuse_seed, seeded
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate, format_p, format_rounded
from pyro_vae.core.generate import latents
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.errors import SettingsError
from pyro_vae.evidence import atoms
from pyro_vae.evidence.kinds import countable_features

Statistic: TypeAlias = Callable[[Tensor], Tensor]


def _of_cells(function: Statistic) -> Statistic:
    """A statistic of all observed numbers of a data set, wherever they stand."""
    return lambda x: function(x[~x.isnan()])


def _spread(x: Tensor) -> Tensor:
    return x.std(correction=0)


ZEROS = "share of zeros"

STATISTICS: Mapping[str, Statistic] = MappingProxyType(
    {
        "mean": _of_cells(torch.mean),
        "sd": _of_cells(_spread),
        "smallest": _of_cells(torch.min),
        "largest": _of_cells(torch.max),
        ZEROS: _of_cells(lambda x: (x == 0).double().mean()),
        "sd of row means": lambda x: _of_cells(_spread)(x.flatten(1).nanmean(1)),
    }
)
"""What is compared of the whole table, where its columns have one unit."""

OF_COLUMNS = ("mean", "sd", "smallest", "largest", ZEROS)
"""What is compared of each column."""

WORST = 12
"""So many statistics of single columns are kept, the farthest off first."""

LIKELIHOOD = "mean log p(x|z)"

DOUBTFUL, FAR = 0.05, 4.0
"""The two-sided p-value, times the number of statistics, below which a model is called doubtful, and the distance in
standard deviations of the replicated data sets beyond which it is then called bad, if none of them is as far off."""


@torch.no_grad()
@takes_settings
def predictive_check(
    vae: VAE,
    x: Any,
    *,
    statistics: Mapping[str, Statistic] | None = None,
    draws: int = 500,
    seed: int = 0,
    chunk: int = 2**22,
) -> xr.Dataset:
    """Posterior predictive checks: statistics of the data against those of data sets the model replicates.

    .. math:: z_i \\sim q(z | x_i), \\; \\tilde x_i \\sim p(x | z_i): \\quad
        p_T = P(T(\\tilde x) > T(x)) + \\tfrac12 P(T(\\tilde x) = T(x))

    Each replicated data set has a datum for each given one, at its own latent, context and missing cells. A p-value
    near 0 or 1 says that the model cannot make what the statistic sees. Since each datum's latent was inferred from
    that datum, p-values of a right model lie nearer to ½ than uniform ones: the check is conservative. Give
    held-out data; :func:`prior_check` compares with data sets of new latents, and its p-values are uniform.

    One discrepancy is always there: the mean of log p(x|z) per datum, of data and replicate at the same latents.

    Args:
        vae: a VAE.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        statistics: functions of a data set of shape ``(datum, *features)`` that give one number, by name; a cell that
            is missing is NaN in data and replicates. By default mean, sd, smallest, largest and share of zeros of each
            column and, where columns have one unit, ``diagnose.STATISTICS`` of the whole table: these, and the sd of
            the rows' means; the share of zeros only of what is countable or 0 in more than a fifth of the rows. Columns
            with names are taken to have units of their own, unless they are pixels.
        draws: replicated data sets, at least 20.
        seed: of all draws.
        chunk: about so many numbers at a time, but at least one data set.

    Returns:
        A dataset over ``statistic`` (the whole table's first, then the 12 of single columns that are farthest off, the
        worst first; the coordinate ``family`` tells them apart) of ``observed`` and ``replicated`` (both over ``draw``;
        only the discrepancy differs from draw to draw in the data), ``p_value``, ``p_value_se`` (the standard deviation
        of the Beta distribution that the number of replicates above leaves for it) and ``z_score``, how many standard
        deviations of the replicates the data lie above their mean. ``column_p_value`` is of all statistics of columns
        together: how many of the replicates have one as far from the mean of the replicates, in their standard
        deviations, as the farthest one of the data.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data.
        SettingsError: if ``draws`` is below 20, or a statistic is no function to one finite number.

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
    vae: VAE,
    x: Any,
    *,
    statistics: Mapping[str, Statistic] | None = None,
    draws: int = 500,
    seed: int = 0,
    chunk: int = 2**22,
) -> xr.Dataset:
    """Prior predictive checks: :func:`predictive_check` with latents from the prior, which needs no training.

    .. math:: z_i \\sim p(z), \\; \\tilde x_i \\sim p(x | z_i): \\quad p_T = P(T(\\tilde x) > T(x))
        + \\tfrac12 P(T(\\tilde x) = T(x))

    Before training it shows what data sets the choice of prior, decoder and likelihood amounts to; after it, whether
    new data sets of the model look like held-out data. If data are from the model, each p-value is uniform. The
    guide is not used, and there is no discrepancy.

    Args:
        vae: a VAE.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        statistics: as for :func:`predictive_check`.
        draws: replicated data sets, at least 20.
        seed: of all draws.
        chunk: about so many numbers at a time, but at least one data set.

    Returns:
        A dataset like that of :func:`predictive_check`.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data.
        SettingsError: if ``draws`` is below 20, or a statistic is no function to one finite number.

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
    vae: VAE, x: Any, statistics: Mapping[str, Statistic] | None, draws: int, seed: int, chunk: int, *, prior: bool
) -> xr.Dataset:
    whole("draws", draws, 20)
    whole("chunk", chunk, 1)
    refuse_seed(seed)
    x = data_for(vae, x)
    functions = _functions(statistics) if statistics is not None else STATISTICS if _has_one_unit(x) else {}
    rows = rows_for(vae, x).like(vae)
    columns = [_of_columns(_seen(rows.x, rows.mask))] if statistics is None else []
    with_zeros = _with_zeros(vae, rows, columns[0]) if columns else np.array([True])
    if not with_zeros.any():
        functions = {name: function for name, function in functions.items() if name != ZEROS}
    of_data = [_number(name, function, _seen(rows.x, rows.mask)) for name, function in functions.items()]
    seen, made = [], []
    with seeded(seed, rows.x.device), evaluating(vae, draws * len(rows)):
        for replicated, discrepancies in _replicates(vae, rows, draws, chunk, prior):
            of_replicate = [_number(name, function, replicated) for name, function in functions.items()]
            seen.append(of_data + discrepancies[:1])
            made.append(of_replicate + discrepancies[1:])
            if columns:
                columns.append(_of_columns(replicated))
    names = [*functions, *[LIKELIHOOD] * (not prior)]
    found = _summary(np.array(seen), np.array(made), names)
    if columns:
        labels = getattr(x, "columns", None)
        found = _with_columns(np.array(seen), np.array(made), names, np.stack(columns), labels, with_zeros)
    return found.assign_attrs(
        {"latents": "prior" if prior else "posterior", "data": len(rows), "draws": draws, "seed": seed, **versions()}
    )


def _has_one_unit(x: Any) -> bool:
    """Whether the columns have one unit: not where they have names, unless they are pixels."""
    return getattr(x, "columns", None) is None or getattr(x, "image_shape", None) is not None


def _with_zeros(vae: VAE, rows: Rows, of_columns: np.ndarray) -> np.ndarray:
    """Columns whose share of zeros says something: a density makes none, so that a few show only how x was rounded."""
    return np.array(countable_features(vae, rows)) | (of_columns[OF_COLUMNS.index(ZEROS)] > atoms.SHARE)


def _of_columns(x: Tensor) -> np.ndarray:
    """The statistics of each column, shape ``(statistic, column)``; 0 where nothing was observed."""
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
    with_zeros: np.ndarray,
) -> xr.Dataset:
    """Summarise the table's statistics and the worst ones of single columns, ``(1 + draw, statistic, column)``."""
    named = [f"column {j}" for j in range(columns.shape[-1])] if labels is None else [*map(str, labels)]
    counted = np.array([with_zeros if of == ZEROS else np.ones_like(with_zeros) for of in OF_COLUMNS]).ravel()
    every = list(compress((f"{of} of {name}" for of in OF_COLUMNS for name in named), counted))
    flat = columns.reshape(len(columns), -1)[:, counted]  # the data first
    centre, spread = flat[1:].mean(0), flat[1:].std(0, ddof=1)
    tiny = 1e-9 * np.abs(flat).max(0)  # equal numbers may differ by so much
    with np.errstate(divide="ignore", invalid="ignore"):
        far = np.abs(flat - centre) / np.where(spread > tiny, spread, 0.0)
    far = np.where(np.abs(flat - centre) <= tiny, 0.0, far)
    apart = np.abs(flat[0] - centre)  # tells those apart that never vary in replicates, which are infinitely far
    worst, farthest = np.lexsort((-apart, -far[0]))[:WORST], far.max(1)
    of_data = np.repeat(flat[:1, worst], len(made), 0)
    found = _summary(
        np.hstack([seen, of_data]), np.hstack([made, flat[1:, worst]]), [*names, *(every[i] for i in worst)]
    )
    family = ["table"] * len(names) + ["column"] * len(worst)
    found["column_p_value"] = (), (farthest >= farthest[0]).mean(), {"units": "probability"}
    return found.assign_coords(family=("statistic", family)).assign_attrs(column_statistics=len(every))


def _functions(statistics: Any) -> Mapping[str, Statistic]:
    if not isinstance(statistics, Mapping) or not statistics or not all(map(callable, statistics.values())):
        raise SettingsError('statistics must be functions of a data set, by name, as {"mean": torch.mean}')
    return statistics


def _number(name: str, function: Statistic, x: Tensor) -> float:
    """What a statistic gives, if that is one finite number."""
    version = _version(x)
    value = function(x)
    if _version(x) != version:
        raise SettingsError(f"statistic {name!r} changes the data; let it work on a copy, x.clone()")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(f"statistic {name!r} gives no single number; make it one, as by .mean()") from error
    if not math.isfinite(number):
        hint = "; missing cells are NaN, so use torch.nanmean and the like" if bool(x.isnan().any()) else ""
        raise SettingsError(f"statistic {name!r} gives {number}; it must be a finite number{hint}")
    return number


def _version(x: Tensor) -> int:
    """Which grows with each change in place, where torch counts them."""
    return 0 if x.is_inference() else x._version


def _seen(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.clone() if mask is None else x.masked_fill(~mask, torch.nan)


def _replicates(vae: VAE, rows: Rows, draws: int, chunk: int, prior: bool) -> Iterator[tuple[Tensor, list[float]]]:
    """Replicated data sets, and of each the discrepancy of data and replicate; none from the prior."""
    parts = list(rows.split(max(1, chunk // rows.x[0].numel())))
    guides = [None if prior else vae.posterior(part) for part in parts]
    block = max(1, chunk // rows.x.numel())
    for start in range(0, draws, block):
        shape = (min(block, draws - start),)
        made = [_replicate(vae, part, q, shape) for part, q in zip(parts, guides, strict=True)]
        scores = torch.stack([scores for _, scores in made]).sum(0) / len(rows)
        for x, score in zip(torch.cat([x for x, _ in made], 1), scores.tolist(), strict=True):
            yield x, [] if prior else score


def _replicate(vae: VAE, rows: Rows, q: Distribution | None, shape: tuple[int]) -> tuple[Tensor, Tensor]:
    """Replicates of some rows, and the sums of log p(x|z) of data and replicate, ``(draw, 2)``."""
    z = latents(vae, rows, shape) if q is None else q.sample(shape)
    p = vae.likelihood(z, rows)
    x = p.sample()
    scores = [p.log_prob(value).double().sum(-1) for value in (rows.x, observed(x, rows.mask))]
    return _seen(x, rows.mask), torch.stack(scores, -1)


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
    """Do replicated data sets look like the one observed?

    The smallest two-sided p-value of the table's statistics is multiplied by their number; all statistics of single
    columns have one p-value together, multiplied by one more than that. A p-value is made as large as the number of
    draws leaves open, so that few draws cannot condemn a model.

    Args:
        found: from :func:`predictive_check` or :func:`prior_check`.

    Returns:
        Fine where the corrected p-value is at least 0.05; otherwise bad where that statistic of the data is farther off
        than any replicate's, by more than 4 of their standard deviations, else doubtful.

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
    parts: list[tuple[float, float]] = []  # the corrected p-value, and how far off the worst is, if beyond replicates
    told = []
    if number:
        above = table.p_value.values * draws
        two_sided = 2 * (np.minimum(above, draws - above) + 1) / (draws + 2)
        far = np.abs(table.z_score.values)
        worst = int(np.lexsort((-far, two_sided))[0])
        beyond = min(above[worst], draws - above[worst]) < 1
        parts.append((min(1.0, number * float(two_sided[worst])), float(far[worst]) * beyond))
        told.append(_of_table(table.isel(statistic=worst), number, draws, found.attrs["data"], parts[-1][0]))
    if columns is not None:
        beyond = float(found.column_p_value) * (draws + 1) < 2  # the data themselves are one
        parts.append((min(1.0, (number + 1) * float(found.column_p_value)), float(abs(columns.z_score[0])) * beyond))
        told.append(_worst_columns(found, columns, parts[-1][0]))
    corrected = min(p for p, _ in parts)
    distance = max([far for p, far in parts if p < DOUBTFUL] or [far for _, far in parts])
    blind = 2 * number / (draws + 2) >= DOUBTFUL
    level: Level = "fine" if corrected >= DOUBTFUL and not blind else "bad" if distance > FAR else "doubtful"
    told.append(f"bad where the farthest is off by more than {FAR:g} sd of the replicates, and by more than in any")
    which = found.attrs["latents"]
    advice = "" if level == "fine" else _advice(which, blind and level != "bad")
    return Finding(f"{which} predictive check", level, "; ".join(told), advice)


def _of_table(shown: xr.Dataset, number: int, draws: int, data: int, corrected: float) -> str:
    spread = float(shown.replicated.std(ddof=1))
    name = shown.statistic.item()
    which = f"of {number} statistics of the table the {name} is the farthest off" if number > 1 else f"the {name} is"
    return (
        f"{which}{':' if number > 1 else ''} {_observed(shown, spread)} in {data} data, "
        f"{format_estimate(float(shown.replicated.mean()), spread, over='')} in {draws} replicates (mean and sd), "
        f"{format_p(float(shown.p_value), draws, float(shown.p_value_se))}; two-sided"
        f"{f' for all {number}' if number > 1 else ''}, p is at most {corrected:.2g} (doubtful below {DOUBTFUL})"
    )


def _observed(shown: xr.Dataset, spread: float) -> str:
    """A statistic of the data, to the decimal place that its spread over replicates allows."""
    return format_rounded(float(shown.observed.mean()), spread or math.nan)


def _worst_columns(found: xr.Dataset, columns: xr.Dataset, corrected: float, most: int = 3) -> str:
    worst = [
        f"the {one.statistic.item()} ({_observed(one, spread)}, in replicates "
        f"{format_estimate(float(one.replicated.mean()), spread, over='')})"
        for one in (columns.isel(statistic=i) for i in range(min(most, columns.sizes["statistic"])))
        for spread in [float(one.replicated.std(ddof=1))]
    ]
    p, draws = float(found.column_p_value), found.sizes["draw"]
    times = f", corrected for those of the table p is at most {corrected:.2g}" if corrected > p else ""
    return (
        f"of {found.attrs['column_statistics']} statistics of single columns the farthest off are {', '.join(worst)}; "
        f"for all of them {format_p(p, draws, math.sqrt(p * (1 - p) / (draws + 1)))}{times} (doubtful below {DOUBTFUL})"
    )


def _advice(which: str, blind: bool) -> str:
    if blind:
        return "draw more replicates: so few cannot tell"
    if which == "prior":
        return "another likelihood, scale or prior, or training: data such as these are not what the model makes"
    return "a likelihood with the spread, tails or zeros of the data, or a decoder with more room"
