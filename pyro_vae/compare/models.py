"""Compare models by log p(x) of held-out data, in the format of ``az.compare``."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae.compare.held_out import evaluate_models
from pyro_vae.compare.models_table import ModelComparison
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate
from pyro_vae.core.pair import Amortized
from pyro_vae.core.validation import takes_settings
from pyro_vae.data.fingerprint import data_hash
from pyro_vae.data.repeats import clustered_error, count
from pyro_vae.errors import SettingsError
from pyro_vae.evidence.atoms import REMEDY
from pyro_vae.evidence.estimate import Method
from pyro_vae.evidence.generative import Guides, guides_of_one_model
from pyro_vae.evidence.judge import agreement
from pyro_vae.evidence.kinds import CAUTION
from pyro_vae.evidence.psis import BAD as BAD_KHAT

TIED = 2.0
"""Models are tied if their difference is within this many standard errors."""

NO_BIAS = 0.1
"""A smaller Monte-Carlo bias of the sum over data, in nats, is negligible, even for a difference without error."""

FEW, CLOSE = 100, 4.0
"""With fewer data or a smaller difference, the normal approximation of the error is poor (Sivula et al., 2025)."""

CROSS_CHECK = "compare what pyro_vae.evidence.cross_check(vae, x_test, found) returns for each model"

NOT_LOO = (
    "elpd is the sum of log p(x) over held-out data; PSIS-LOO over the latents of each datum does not estimate it: "
    "without its datum, a latent falls back to the prior"
)


@takes_settings
def compare_models(
    models: Mapping[str, Amortized | xr.Dataset],
    x_test: Any,
    *,
    method: Method = "iw",
    num_particles: int | None = None,
    temperatures: int = 100,
    leapfrog: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Compare models by the evidence of held-out data, with errors of the paired differences.

    .. math:: \\mathrm{elpd}_m = \\sum_i \\log p_m(x_i), \\qquad
        \\mathrm{dse}_m = \\sqrt n \\, \\mathrm{sd}_i [\\log p_m(x_i) - \\log p_{best}(x_i)]

    The table has the format of ``az.compare``, but does not use PSIS-LOO. LOO would weight draws of a datum's latent z
    by the inverse likelihood of the datum. Without the datum, however, its latent falls back to the prior, far from
    the draws of the posterior, while the decoder's weights remain fitted to the datum. Conditional
    log-likelihoods of a VAE therefore do not estimate elpd. Here z is integrated out and the data are held out, so no
    correction is needed.

    Estimates of log p(x) have a Monte-Carlo error, which is part of the spread over data, and so already included in
    ``se`` and ``dse``; ``mcse`` and ``diff_mcse`` give its share. Their bias is not included: uneven weights make
    log p(x) too low, and ``mc_bias`` estimates by how much. If the bias matters, or k̂ is above 0.7, a difference may
    come from the guides rather than the models, and the table warns. None of these columns shows a mode that a guide
    misses; :func:`~pyro_vae.evidence.cross_check` can. Two entries with the same prior and decoder are one generative
    model, and any difference between them comes from their guides.

    Duplicate rows in ``x_test`` are not independent data: a :class:`~pyro_vae.errors.DuplicateRowsWarning` is given,
    and standard errors are clustered by distinct row. If each row occurs r times, ``elpd_diff`` and ``dse`` are both r
    times those of the distinct rows. Rows of few countable values, which coincide by chance, do not count as
    duplicates.

    An atom is a value that more than a fifth of the rows share exactly, such as a pixel value of 0. If the feature
    has a density under all models, their difference is that of densities at one point, which a narrow likelihood makes
    arbitrarily large: an :class:`~pyro_vae.errors.AtomsWarning` is given, and the attribute ``atoms`` names the
    features.

    Args:
        models: name → VAE or Pair, or its dataset from :func:`log_evidence` of ``x_test``; at least two.
        x_test: held-out data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask;
            at least two.
        method: ``"iw"``, ``"psis"``, ``"ais"`` or ``"ais_prior"``; this and the following settings are those of
            :func:`log_evidence`.
        num_particles: draws or chains per datum.
        temperatures: of ``"ais"`` and ``"ais_prior"``.
        leapfrog: of ``"ais"`` and ``"ais_prior"``.
        seed: of the particles, the same for each model.
        progress: whether to show a progress bar.

    Returns:
        A row per model, best first, in nats; ``print`` shows a table:

        - ``rank``, from 0; ``elpd``, ``se``: the sum of log p(x) and its standard error over data;
        - ``elpd_diff``, ``dse``: the difference of ``elpd`` from the best model, and the standard error of the paired
          differences; ``p_worse``: the probability of being worse than the best, in a normal approximation;
        - ``weight``: the model's weight in the mixture with the highest log-likelihood of the held-out data (stacking);
        - ``mcse``, ``diff_mcse``: the Monte-Carlo standard errors of ``elpd`` and ``elpd_diff``; ``mc_bias``: the
          bias of ``elpd``, measured by :func:`log_evidence` or else minus half the variance of its error;
        - ``kind``: whether p(x) is a probability, a density or both; models are comparable only if each feature has
          the same kind under all of them;
        - ``diag_diff``: ``tied`` if the difference is within two standard errors; ``N < 100`` (distinct rows) and
          ``|elpd_diff| < 4`` if these errors are themselves uncertain; ``diag_elpd``: k̂ above 0.7, a bias that
          matters, or another guide of the same model; ``warning``: whether ``diag_elpd`` is not empty.

        ``attrs`` contain the method, the numbers of data and of distinct rows, the hash of the data, the features that
        are not comparable (``unlike``), the models whose features are unknown (``not_known``), and the entries that
        are one generative model (``same_model``; ``same_model_apart`` if their difference exceeds two standard
        errors).

    Raises:
        DataError: if the data were trained on, are fewer than two or are not finite numbers in rows, or a dataset
            is of other data.
        ModelError: if a VAE does not match the data.
        SettingsError: if there are fewer than two models, or a setting is out of range.

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
    if not isinstance(models, Mapping) or len(models) < 2:
        raise SettingsError("models: a comparison needs at least two models; pass {name: vae, other: vae}")
    held_out = evaluate_models(
        {name: [model] for name, model in models.items()},
        x_test,
        source="x_test",
        stacklevel=3,
        method=method,
        num_particles=num_particles,
        temperatures=temperatures,
        leapfrog=leapfrog,
        seed=seed,
        progress=progress,
    )
    found = {name: one for name, (one,) in held_out.evidence.items()}
    pairs = guides_of_one_model(found, held_out.row_number)
    table = ModelComparison(_table(found, held_out.row_number, pairs).assign(kind=pd.Series(held_out.kinds)))
    table.attrs = {
        "method": ", ".join(sorted({one.attrs["method"] for one in found.values()})), "data": len(held_out.hashes),
        "distinct": count(held_out.row_number), "data_hash": data_hash(held_out.hashes), "seed": seed, "note": NOT_LOO,
        "caution": CAUTION if held_out.incomparable else "", "unlike": held_out.incomparable, "atoms": held_out.atoms,
        "not_known": ", ".join(name for name, own in held_out.features.items() if own is None),
        "not_checked": "; ".join(_not_checked(found)),
        "same_model": "; ".join(str(pair) for pair in pairs), "same_model_apart": any(map(_is_apart, pairs)),
        **versions(),
    }  # fmt: skip
    return table


def _not_checked(found: Mapping[str, xr.Dataset]) -> list[str]:
    """List why the estimate of a model may have missed a mode, unless a second estimate agrees."""
    parts = {name: agreement(one) for name, one in found.items()}
    return [f"{name}: {part.why}" for name, part in parts.items() if part.level != "fine"]


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
    """Return the bias of the sum of log p(x): as measured, or to second order in the error of the weights."""
    measured = float(found.bias.sum(skipna=False)) if "bias" in found else math.nan
    return -variance / 2 if math.isnan(measured) else measured


def _is_apart(pair: Guides) -> bool:
    return abs(pair.difference) > max(TIED * pair.error, NO_BIAS)


def _p_worse(difference: float, error: float) -> float:
    if difference == 0:
        return math.nan
    return 0.5 * (1 - math.erf(difference / (max(error, 1e-12) * math.sqrt(2))))


def _about_difference(row: pd.Series, distinct: int, share: float) -> str:
    notes = {
        "tied": abs(row.elpd_diff) <= TIED * row.dse,
        f"N < {FEW}": distinct < FEW,
        f"|elpd_diff| < {CLOSE:g}": abs(row.elpd_diff) * share < CLOSE,  # over distinct rows
    }
    return "; ".join(note for note, true in notes.items() if true)


def _about_elpd(found: xr.Dataset, row: pd.Series, least: float, twin: str) -> str:
    notes = []
    if "khat" in found and (heavy := int((found.khat > BAD_KHAT).sum())):
        notes.append(f"{heavy} k̂ > {BAD_KHAT}")
    if abs(row.mc_bias) > max(row.dse, least, NO_BIAS):
        notes.append("mc_bias > dse")
    if abs(row.mc_bias) > max(abs(row.elpd_diff) / 2, NO_BIAS) and row["rank"]:
        notes.append("mc_bias > half of elpd_diff")
    if twin:
        notes.append(f"the model of {twin} with another guide")
    return "; ".join(notes)


def stacking_weights(each: np.ndarray) -> np.ndarray:
    """Compute the stacking weights, those of the best mixture, by expectation maximization.

    .. math:: \\max_w \\sum_i \\log \\sum_m w_m p_m(x_i), \\qquad w_m \\ge 0, \\; \\sum_m w_m = 1

    Args:
        each: log p of each model and datum, shape ``(model, datum)``.

    Returns:
        The weights, shape ``(model,)``.

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
    """Judge whether the best model of a comparison is clearly better than the others.

    Args:
        table: from :func:`pyro_vae.compare_models`.

    Returns:
        ``fine`` if the best model is clearly better than all others, and a second estimate of each agrees
        (:func:`~pyro_vae.evidence.cross_check`). ``doubtful`` if it is tied with another, if there is no second
        estimate, if k̂ or the bias of an estimate indicates that a difference may come from the guides, or if it is
        unknown which features are densities. ``bad`` if a feature is a density under one model and a probability
        under another, if densities are compared at atoms, or if one generative model differs significantly from
        itself under two guides.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> table = pv.compare_models({"a": linear.as_vae(), "b": linear.as_vae()}, linear.sample(20))
        >>> judge_models(table).level
        'doubtful'
    """
    best, others, about = str(table.index[0]), table.iloc[1:], "model comparison"
    if table.attrs["unlike"]:
        remedy = "compare models under which each feature has the same kind; for a density of counts, dequantize them"
        return Finding(about, "bad", table.attrs["unlike"], remedy)
    if table.attrs.get("atoms"):
        return Finding(about, "bad", f"{table.attrs['atoms']} where p(x) is a density under all models", REMEDY)
    tied = [str(name) for name in others.index[others.elpd_diff.abs() <= TIED * others.dse]]
    differences = "; ".join(
        f"{name} {format_estimate(row.elpd_diff, row.dse, over='', signed=True)}" for name, row in others.iterrows()
    )
    why = f"{best} has the highest evidence of {_data(table)}; differences (nats, ± over data, in pairs): {differences}"
    if tied:
        why += f" (tied within {TIED:g} standard errors: {', '.join(tied)})"
    if table.attrs["same_model"]:
        why += f"; {table.attrs['same_model']}"
    if table.warning.any():
        level: Level = "bad" if table.attrs["same_model_apart"] else "doubtful"
        warned = [
            f"{name} ({row.diag_elpd}; mc_bias {row.mc_bias:.2g})" for name, row in table[table.warning].iterrows()
        ]
        why += f"; the difference may come from the guides, not the models: {', '.join(warned)}"
        return Finding(about, level, why, 'estimate with method="ais" or more particles, or use a richer posterior')
    if table.attrs["not_known"]:
        why += f"; it is unknown which features of {table.attrs['not_known']} are densities"
        return Finding(about, "doubtful", why, "estimate its evidence again with log_evidence")
    if tied:
        return Finding(about, "doubtful", why, "hold out more data, or choose the simpler model")
    if table.attrs["not_checked"]:
        return Finding(about, "doubtful", f"{why}; {table.attrs['not_checked']}", CROSS_CHECK)
    return Finding(about, "fine", why)


def _data(table: pd.DataFrame) -> str:
    n, distinct = table.attrs["data"], table.attrs["distinct"]
    return f"{n} held-out data" + (f" ({distinct} distinct rows)" if distinct < n else "")
