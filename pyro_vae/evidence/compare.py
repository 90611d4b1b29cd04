"""Models compared by log p(x) of held-out data, in the shape of ArviZ's comparison."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae._hashes import data_hash, refuse_trained_on, row_hashes
from pyro_vae.core import VAE
from pyro_vae.diagnose.weights import BAD as BAD_KHAT
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.evidence.estimate import METHODS, Method, log_evidence, refuse_method
from pyro_vae.evidence.kinds import CAUTION, countable_features, kind
from pyro_vae.rows import rows_for, rows_of

TIED = 2.0
"""Models whose difference is within so many standard errors of it are not told apart."""

NO_BIAS = 0.1
"""Nats, of all data together: a smaller Monte-Carlo bias does not matter, though a difference have no error at all."""

FEW, CLOSE = 100, 4.0
"""With fewer data, or a smaller difference, the normal approximation to its error is poor (Sivula et al., 2025)."""

NOT_LOO = (
    "elpd is the sum of log p(x) over held-out data; PSIS-LOO of the data's own latents would not estimate it: without "
    "a datum its latent falls back to the prior"
)


def compare_models(
    models: Mapping[str, VAE | xr.Dataset],
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
    of ``se`` and ``dse`` already; ``mcse`` and ``diff_mcse`` say how much of them it is. That its logarithm lies
    below log p(x) is no part of them: ``mc_bias`` says by about how much.

    Args:
        models: name → VAE, or the dataset that :func:`log_evidence` made of it and of ``x_test``; at least two.
        x_test: held-out data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask;
            at least two.
        method: ``"iw"``, ``"psis"`` or ``"ais"``, as in :func:`log_evidence`, as are the settings below.
        num_particles: draws or chains per datum.
        temperatures: of ``"ais"``.
        leapfrog: of ``"ais"``.
        seed: of the particles, the same for each model.
        progress: whether to show a bar.

    Returns:
        A row per model, best first, in nats:

        - ``rank``, from 0; ``elpd``, ``se``: the sum of log p(x) and its standard error over data;
        - ``elpd_diff``, ``dse``: that minus the best model's, and the standard error of the paired differences;
          ``p_worse``: the chance of being worse than the best, in a normal approximation;
        - ``weight``: of the mixture of all models that gives the held-out data most probability (stacking);
        - ``mcse``, ``diff_mcse``: the Monte-Carlo standard errors of ``elpd`` and ``elpd_diff``; ``mc_bias``;
        - ``kind``: whether p(x) is a probability, a density or both, which are not to be compared;
        - ``diag_diff``: ``tied`` where the difference is within two standard errors, ``N < 100`` and
          ``|elpd_diff| < 4`` where these are themselves not certain; ``diag_elpd``: k̂ above 0.7, or a bias that
          matters; ``warning``: whether there is such.

        ``attrs`` hold the method, the hash of the data and what is to be known of the table.

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
    hashes = _checked(models, x_test)
    settings = {"method": method, "num_particles": num_particles, "temperatures": temperatures, "leapfrog": leapfrog}
    found = {
        name: model
        if isinstance(model, xr.Dataset)
        else log_evidence(model, x_test, **settings, seed=seed, progress=progress)  # type: ignore[arg-type]
        for name, model in models.items()
    }
    kinds = {
        name: kind(countable_features(model, rows_of(x_test)))
        if isinstance(model, VAE)
        else str(model.attrs.get("kind", "not known"))
        for name, model in models.items()
    }
    table = _table(found).assign(kind=pd.Series(kinds))
    mixed = len({value for value in kinds.values() if value != "not known"}) > 1
    table.attrs = {
        "method": ", ".join(sorted({one.attrs["method"] for one in found.values()})), "data": len(hashes),
        "data_hash": data_hash(hashes), "seed": seed, "note": NOT_LOO, "caution": CAUTION if mixed else "",
        **versions(),
    }  # fmt: skip
    return table


def _checked(models: Mapping[str, Any], x_test: Any) -> np.ndarray:
    """The hashes of the held-out rows, all models seen to fit them before the first is evaluated."""
    rows = rows_of(x_test, source="x_test")
    if len(rows) < 2:
        raise DataError("x_test holds 1 datum, of which no standard error can be had; give at least 2")
    hashes = row_hashes(rows)
    for name, model in models.items():
        if isinstance(model, xr.Dataset):
            _refuse_dataset(name, model, data_hash(hashes))
        elif isinstance(model, VAE):
            rows_for(model, x_test, source="x_test")
            refuse_trained_on(model, hashes, name=name)
        else:
            raise SettingsError(
                f"models[{name!r}] is a {type(model).__name__}; give a VAE or what log_evidence made of one"
            )
    return hashes


def _refuse_dataset(name: str, found: xr.Dataset, expected: str) -> None:
    if not {"log_evidence", "mcse"} <= set(found):
        raise SettingsError(f"models[{name!r}] holds no log_evidence with mcse; give what log_evidence returned")
    if found.attrs.get("method") == "bdmc":
        raise DataError(f"the evidence of {name!r} is of data simulated from it; estimate that of x_test, as by ais")
    if found.attrs.get("data_hash") != expected:
        raise DataError(f"the evidence of {name!r} is of other data than x_test; estimate it of x_test")
    if told := found.attrs.get("trained_on"):
        raise DataError(f"x_test was trained on: {told}, are training data of {name!r}; give rows that were held out")


def _table(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    each = np.stack([one.log_evidence.values.astype(float) for one in found.values()])  # (model, datum)
    errors = np.stack([one.mcse.values.astype(float) for one in found.values()])
    order = np.argsort(-each.sum(1), kind="stable")
    names = [list(found)[i] for i in order]
    each, errors, n = each[order], errors[order], each.shape[1]
    apart, variance = each - each[0], (errors**2).sum(1)
    dse = np.sqrt(n) * apart.std(1, ddof=1)
    table = pd.DataFrame(
        {
            "rank": range(len(names)),
            "elpd": each.sum(1),
            "elpd_diff": apart.sum(1),
            "weight": stacking_weights(each),
            "se": np.sqrt(n) * each.std(1, ddof=1),
            "dse": dse,
            "p_worse": [_p_worse(d, s) for d, s in zip(apart.sum(1), dse, strict=True)],
            "mcse": np.sqrt(variance),
            "diff_mcse": np.where(np.arange(len(names)) == 0, 0.0, np.sqrt(variance + variance[0])),
            "mc_bias": -variance / 2,
        },
        index=names,
    )
    table["diag_diff"] = [_about_difference(row, n) if row["rank"] else "" for _, row in table.iterrows()]
    least = table.dse[1:].min()
    table["diag_elpd"] = [_about_elpd(found[name], table.loc[name], least) for name in names]
    return table.assign(warning=table.diag_elpd != "")


def _p_worse(difference: float, error: float) -> float:
    if difference == 0:
        return math.nan
    return 0.5 * (1 - math.erf(difference / (max(error, 1e-12) * math.sqrt(2))))


def _about_difference(row: pd.Series, n: int) -> str:
    told = {
        "tied": abs(row.elpd_diff) <= TIED * row.dse,
        f"N < {FEW}": n < FEW,
        f"|elpd_diff| < {CLOSE:g}": abs(row.elpd_diff) < CLOSE,
    }
    return "; ".join(name for name, true in told.items() if true)


def _about_elpd(found: xr.Dataset, row: pd.Series, least: float) -> str:
    told = []
    if "khat" in found and (count := int((found.khat > BAD_KHAT).sum())):
        told.append(f"{count} k̂ > {BAD_KHAT}")
    if -row.mc_bias > max(row.dse, least, NO_BIAS):
        told.append("mc_bias > dse")
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
