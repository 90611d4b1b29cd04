"""Models compared by log p(x) of held-out data, in the shape of ArviZ's comparison."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae.compare.models_table import ModelComparison
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate
from pyro_vae.core.pair import Amortised
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings
from pyro_vae.data.fingerprint import data_hash, refuse_trained_on, row_hashes
from pyro_vae.data.repeats import clustered_error, count, distinct_rows, warn_of_duplicates
from pyro_vae.data.rows import data_for, rows_for, rows_of
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.evidence.atoms import REMEDY, atoms, warn_of_atoms
from pyro_vae.evidence.estimate import METHODS, Method, log_evidence, refuse_method
from pyro_vae.evidence.generative import Guides, guides_of_one_model
from pyro_vae.evidence.judge import agreement
from pyro_vae.evidence.kinds import CAUTION, NOT_KNOWN, differing, kind, known_features
from pyro_vae.evidence.psis import BAD as BAD_KHAT

TIED = 2.0
"""Models whose difference is within so many standard errors of it are not told apart."""

NO_BIAS = 0.1
"""Nats, of all data together: a smaller Monte-Carlo bias does not matter, even if a difference has no error at all."""

FEW, CLOSE = 100, 4.0
"""With fewer data, or a smaller difference, the normal approximation to its error is poor (Sivula et al., 2025)."""

CROSS_CHECK = "compare what pyro_vae.evidence.cross_check(vae, x_test, found) returns for each model"

NOT_LOO = (
    "elpd is the sum of log p(x) over held-out data; PSIS-LOO of the data's own latents would not estimate it: without "
    "a datum its latent falls back to the prior"
)


@takes_settings
def compare_models(
    models: Mapping[str, Amortised | xr.Dataset],
    x_test: Any,
    *,
    method: Method = "iw",
    num_particles: int | None = None,
    temperatures: int = 100,
    leapfrog: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Compare models by the evidence of held-out data, with the errors of the paired differences.

    .. math:: \\mathrm{elpd}_m = \\sum_i \\log p_m(x_i), \\qquad
        \\mathrm{dse}_m = \\sqrt n \\, \\mathrm{sd}_i [\\log p_m(x_i) - \\log p_{best}(x_i)]

    The table is that of ``az.compare``, but PSIS-LOO is not what it reports. LOO would weight draws of a datum's
    own latent z by one over the likelihood of that datum; without it that latent falls back to the prior, from
    which the posterior's draws are far, and the decoder's weights, which were fitted to the datum, stay as they
    are. So the conditional log-likelihoods of a VAE do not estimate elpd. Here z is integrated out and the data
    are held out, so that no correction is needed.

    An estimate of log p(x) is itself a random number. Its Monte-Carlo error is part of the spread over data, and so
    of ``se`` and ``dse`` already; ``mcse`` and ``diff_mcse`` say how much of them it is. Its bias, by which
    uneven weights make log p(x) too low, is no part of them: ``mc_bias`` estimates it. Where it matters, or k̂ is above
    0.7, a difference may come from the guides and not from the models, and the table warns. A mode that a guide misses
    is in none of these columns; :func:`~pyro_vae.evidence.cross_check` can show it. Two entries with the same prior and
    decoder are one generative model, and any difference between them comes from their guides.

    Rows that ``x_test`` holds several times are no independent data: a :class:`~pyro_vae.errors.DuplicateRowsWarning`
    says so, and standard errors are clustered by distinct row. Where each row occurs r times, ``elpd_diff`` and
    ``dse`` are both r times those of the distinct rows. Rows of few countable values, which are equal by chance,
    do not count as duplicates.

    An atom is a value that more than a fifth of the rows share exactly, such as a pixel that is 0. Where such a feature
    is a density under all models, their difference is that of densities at one point, which can be made as large as one
    likes by a narrow likelihood: an :class:`~pyro_vae.errors.AtomsWarning` says so, and the attribute ``atoms`` names
    the features.

    Args:
        models: name → VAE or Pair, or the dataset that :func:`log_evidence` made of it and of ``x_test``; at least two.
        x_test: held-out data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask;
            at least two.
        method: ``"iw"``, ``"psis"``, ``"ais"`` or ``"ais_prior"``, as in :func:`log_evidence`, like the settings
            below.
        num_particles: draws or chains per datum.
        temperatures: of ``"ais"`` and ``"ais_prior"``.
        leapfrog: of ``"ais"`` and ``"ais_prior"``.
        seed: of the particles, the same for each model.
        progress: whether to show a bar.

    Returns:
        A row per model, best first, in nats, which ``print`` shows as a table:

        - ``rank``, from 0; ``elpd``, ``se``: the sum of log p(x) and its standard error over data;
        - ``elpd_diff``, ``dse``: that minus the best model's, and the standard error of the paired differences;
          ``p_worse``: the chance of being worse than the best, in a normal approximation;
        - ``weight``: of the mixture of all models that gives the held-out data most probability (stacking);
        - ``mcse``, ``diff_mcse``: the Monte-Carlo standard errors of ``elpd`` and ``elpd_diff``; ``mc_bias``: the
          bias of ``elpd``, as measured by :func:`log_evidence` or else minus half the variance of its error;
        - ``kind``: whether p(x) is a probability, a density or both; models are comparable only if each feature is of
          the same kind under all of them;
        - ``diag_diff``: ``tied`` where the difference is within two standard errors, ``N < 100`` (distinct rows) and
          ``|elpd_diff| < 4`` where these errors are themselves uncertain; ``diag_elpd``: k̂ above 0.7, a bias that
          matters, or another guide of the same model; ``warning``: whether there is such.

        ``attrs`` hold the method, the number of data and of distinct rows, the hash of the data, the features that
        are not comparable (``unlike``), the models whose features are not known (``not_known``), and which entries
        are one generative model (``same_model``; ``same_model_apart`` if their difference is above two standard
        errors).

    Raises:
        DataError: if the data were trained on, are fewer than two, are not finite numbers in rows, or a dataset
            is of others.
        ModelError: if a VAE does not fit them.
        SettingsError: if there are fewer than two models, or a setting is out of its range.

    References:
        | Practical Bayesian model evaluation (Vehtari, Gelman & Gabry, 2017), https://arxiv.org/abs/1507.04544
        | Using Stacking to Average Bayesian Predictive Distributions (Yao et al., 2018),
          https://arxiv.org/abs/1704.02030
        | Uncertainty in Bayesian Leave-One-Out Cross-Validation Based Model Comparison (Sivula et al., 2025),
          https://arxiv.org/abs/2008.10296

    Example:
        >>> import torch, pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> other = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.9)
        >>> table = compare_models({"wrong": other.as_vae(), "right": linear.as_vae()}, linear.sample(200))
        >>> list(table.index), bool(table.elpd_diff["wrong"] < -10 * table.dse["wrong"])
        (['right', 'wrong'], True)
    """
    refuse_method(method, tuple(name for name in METHODS if name != "bdmc"))
    if not isinstance(models, Mapping) or len(models) < 2:
        raise SettingsError("a comparison needs at least two models; give {name: vae, other: vae}")
    first = next((model for model in models.values() if isinstance(model, Amortised)), None)
    x_test = x_test if first is None else data_for(first, x_test, source="x_test")
    rows, hashes = _checked(models, x_test)
    settings = {"method": method, "num_particles": num_particles, "temperatures": temperatures, "leapfrog": leapfrog}
    found = {
        name: model
        if isinstance(model, xr.Dataset)
        else log_evidence(model, x_test, **settings, seed=seed, progress=progress)  # type: ignore[arg-type]
        for name, model in models.items()
    }
    features = {name: known_features(one, rows.x[0].numel()) for name, one in found.items()}
    number = distinct_rows(rows, _log_probability(found, features))
    remedy = "standard errors are clustered by distinct row"
    warn_of_duplicates(number, source="x_test", remedy=remedy, stacklevel=3)
    kinds = {name: NOT_KNOWN if own is None else kind(own) for name, own in features.items()}
    pairs = guides_of_one_model(found, number)
    table = ModelComparison(_table(found, number, pairs).assign(kind=pd.Series(kinds)))
    unlike = differing(features, getattr(x_test, "columns", None))
    told = atoms(rows, features.values(), getattr(x_test, "columns", None))
    warn_of_atoms(told, source="x_test", stacklevel=3)
    table.attrs = {
        "method": ", ".join(sorted({one.attrs["method"] for one in found.values()})), "data": len(hashes),
        "distinct": count(number), "data_hash": data_hash(hashes), "seed": seed, "note": NOT_LOO,
        "caution": CAUTION if unlike else "", "unlike": unlike, "atoms": told,
        "not_known": ", ".join(name for name, own in features.items() if own is None),
        "not_checked": "; ".join(_not_checked(found)),
        "same_model": "; ".join(str(pair) for pair in pairs), "same_model_apart": any(map(_is_apart, pairs)),
        **versions(),
    }  # fmt: skip
    return table


def _not_checked(found: Mapping[str, xr.Dataset]) -> list[str]:
    """Why the estimate of each model may have missed a mode, where no second estimate agrees."""
    parts = {name: agreement(one) for name, one in found.items()}
    return [f"{name}: {part.why}" for name, part in parts.items() if part.level != "fine"]


def _log_probability(
    found: Mapping[str, xr.Dataset], features: Mapping[str, tuple[bool, ...] | None]
) -> np.ndarray | None:
    """log p of each row by the best model under which it has a probability and not a density, if there is one."""
    each = [one.log_evidence.values.astype(float) for name, one in found.items() if all(features[name] or (False,))]
    return max(each, key=np.sum) if each else None


def _checked(models: Mapping[str, Any], x_test: Any) -> tuple[Rows, np.ndarray]:
    """Validate all models against the held-out rows before the first is evaluated; the rows and their hashes."""
    rows = rows_of(x_test, source="x_test")
    if len(rows) < 2:
        raise DataError("x_test holds 1 datum, which has no standard error; give at least 2")
    hashes = row_hashes(rows)
    for name, model in models.items():
        if isinstance(model, xr.Dataset):
            _refuse_dataset(name, model, data_hash(hashes))
        elif isinstance(model, Amortised):
            own = rows_for(model, x_test, source="x_test")  # its columns may be in another order
            refuse_trained_on(model, row_hashes(own), getattr(x_test, "row_labels", None), name=name)
        else:
            raise SettingsError(
                f"models[{name!r}] is a {type(model).__name__}; give a VAE, a Pair or what log_evidence made of one"
            )
    return rows, hashes


def _refuse_dataset(name: str, found: xr.Dataset, expected: str) -> None:
    if not {"log_evidence", "mcse"} <= set(found):
        raise SettingsError(f"models[{name!r}] holds no log_evidence with mcse; give what log_evidence returned")
    if found.attrs.get("method") == "bdmc":
        raise DataError(f"the evidence of {name!r} is of data simulated from it; estimate that of x_test, as by ais")
    if found.attrs.get("data_hash") != expected:
        raise DataError(f"the evidence of {name!r} is of other data than x_test; estimate it of x_test")
    if shared := found.attrs.get("trained_on"):
        raise DataError(f"x_test overlaps the training data of model {name!r}: {shared}; use held-out data")


def _table(found: Mapping[str, xr.Dataset], number: np.ndarray, pairs: list[Guides]) -> pd.DataFrame:
    each = np.stack([one.log_evidence.values.astype(float) for one in found.values()])  # (model, datum)
    errors = np.stack([one.mcse.values.astype(float) for one in found.values()])
    order = np.argsort(-each.sum(1), kind="stable")
    names = [list(found)[i] for i in order]
    each, errors, n = each[order], errors[order], each.shape[1]
    apart, variance = each - each[0], (errors**2).sum(1)
    dse = n * clustered_error(apart, number)
    table = pd.DataFrame(
        {
            "rank": range(len(names)),
            "elpd": each.sum(1),
            "elpd_diff": apart.sum(1),
            "weight": stacking_weights(each),
            "se": n * clustered_error(each, number),
            "dse": dse,
            "p_worse": [_p_worse(d, s) for d, s in zip(apart.sum(1), dse, strict=True)],
            "mcse": np.sqrt(variance),
            "diff_mcse": np.where(np.arange(len(names)) == 0, 0.0, np.sqrt(variance + variance[0])),
            "mc_bias": [_bias(found[name], v) for name, v in zip(names, variance, strict=True)],
        },
        index=names,
    )
    share = count(number) / n
    table["diag_diff"] = [
        _about_difference(row, count(number), share) if row["rank"] else "" for _, row in table.iterrows()
    ]
    least = table.dse[1:].min()
    twins = {pair.other: pair.best for pair in pairs if abs(pair.difference) > NO_BIAS}
    table["diag_elpd"] = [_about_elpd(found[name], table.loc[name], least, twins.get(name, "")) for name in names]
    return table.assign(warning=table.diag_elpd != "")


def _bias(found: xr.Dataset, variance: float) -> float:
    """The bias of the sum of log p(x): measured, or else to the second order in the error of the weights."""
    measured = float(found.bias.sum(skipna=False)) if "bias" in found else math.nan
    return -variance / 2 if math.isnan(measured) else measured


def _is_apart(pair: Guides) -> bool:
    return abs(pair.difference) > max(TIED * pair.error, NO_BIAS)


def _p_worse(difference: float, error: float) -> float:
    if difference == 0:
        return math.nan
    return 0.5 * (1 - math.erf(difference / (max(error, 1e-12) * math.sqrt(2))))


def _about_difference(row: pd.Series, distinct: int, share: float) -> str:
    told = {
        "tied": abs(row.elpd_diff) <= TIED * row.dse,
        f"N < {FEW}": distinct < FEW,
        f"|elpd_diff| < {CLOSE:g}": abs(row.elpd_diff) * share < CLOSE,  # of the distinct rows
    }
    return "; ".join(name for name, true in told.items() if true)


def _about_elpd(found: xr.Dataset, row: pd.Series, least: float, twin: str) -> str:
    told = []
    if "khat" in found and (heavy := int((found.khat > BAD_KHAT).sum())):
        told.append(f"{heavy} k̂ > {BAD_KHAT}")
    if abs(row.mc_bias) > max(row.dse, least, NO_BIAS):
        told.append("mc_bias > dse")
    if abs(row.mc_bias) > max(abs(row.elpd_diff) / 2, NO_BIAS) and row["rank"]:
        told.append("mc_bias > half of elpd_diff")
    if twin:
        told.append(f"the model of {twin} with another guide")
    return "; ".join(told)


def stacking_weights(each: np.ndarray) -> np.ndarray:
    """The weights of the mixture that gives the data most probability, by expectation maximisation.

    .. math:: \\max_w \\sum_i \\log \\sum_m w_m p_m(x_i), \\qquad w_m \\ge 0, \\; \\sum_m w_m = 1

    Args:
        each: log p of each model and datum, shape ``(model, datum)``.

    Returns:
        Shape ``(model,)``.

    Example:
        >>> stacking_weights(np.log([[0.5, 0.5, 0.5], [0.1, 0.1, 0.1]])).round(6).tolist()
        [1.0, 0.0]
    """
    density = np.exp(each - each.max(0))
    weights = np.full(len(each), 1 / len(each))
    for _ in range(5000):
        share = weights[:, None] * density
        new = (share / share.sum(0)).mean(1)
        if np.abs(new - weights).max() < 1e-10:
            return new
        weights = new
    return weights


def judge_models(table: pd.DataFrame) -> Finding:
    """Judge whether the best model of a comparison is told apart from the others.

    Args:
        table: from :func:`pyro_vae.compare_models`.

    Returns:
        ``fine`` where the best is told apart from all others, and a second estimate of each agrees
        (:func:`~pyro_vae.evidence.cross_check`). ``doubtful`` where it is tied with one, where there is no such check,
        where k̂ or the bias of an estimate says that a difference may come from the guides and not from the models, or
        where it is not known which features are densities. ``bad`` where a feature is a density under one model and a
        probability under another, where densities are compared at atoms, or where one generative model with two guides
        is told apart from itself.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> table = pv.compare_models({"a": linear.as_vae(), "b": linear.as_vae()}, linear.sample(20))
        >>> judge_models(table).level
        'doubtful'
    """
    best, others, about = str(table.index[0]), table.iloc[1:], "model comparison"
    if table.attrs["unlike"]:
        remedy = "compare models that take each feature for the same kind, as by dequantising counts for a density"
        return Finding(about, "bad", table.attrs["unlike"], remedy)
    if table.attrs.get("atoms"):
        return Finding(about, "bad", f"{table.attrs['atoms']} where p(x) is a density under all models", REMEDY)
    tied = [str(name) for name in others.index[others.elpd_diff.abs() <= TIED * others.dse]]
    told = "; ".join(
        f"{name} {format_estimate(row.elpd_diff, row.dse, over='', signed=True)}" for name, row in others.iterrows()
    )
    why = f"{best} has the most evidence of {_data(table)}, in nats beside it (± over data, in pairs): {told}"
    if tied:
        why += f" (within {TIED:g} standard errors, so not told apart: {', '.join(tied)})"
    if table.attrs["same_model"]:
        why += f"; {table.attrs['same_model']}"
    if table.warning.any():
        level: Level = "bad" if table.attrs["same_model_apart"] else "doubtful"
        warned = [
            f"{name} ({row.diag_elpd}; mc_bias {row.mc_bias:.2g})" for name, row in table[table.warning].iterrows()
        ]
        why += f"; the difference may come from the guides, not from the models: {', '.join(warned)}"
        return Finding(about, level, why, 'estimate by method="ais" or with more particles, or take a richer posterior')
    if table.attrs["not_known"]:
        why += f"; which features are densities is not known of {table.attrs['not_known']}"
        return Finding(about, "doubtful", why, "estimate its evidence again by log_evidence")
    if tied:
        return Finding(about, "doubtful", why, "hold out more data, or take the simpler model")
    if table.attrs["not_checked"]:
        return Finding(about, "doubtful", f"{why}; {table.attrs['not_checked']}", CROSS_CHECK)
    return Finding(about, "fine", why)


def _data(table: pd.DataFrame) -> str:
    n, distinct = table.attrs["data"], table.attrs["distinct"]
    return f"{n} held-out data" + (f" ({distinct} distinct rows)" if distinct < n else "")
