"""What estimates of the evidence are worth, in words."""

import numpy as np
import pandas as pd
import xarray as xr

from pyro_vae.diagnose.finding import Finding, Level
from pyro_vae.diagnose.weights import BAD as BAD_KHAT
from pyro_vae.evidence.compare import TIED

CLOSE_ENOUGH, TOO_FAR = 0.1, 1.0
"""Nats per datum by which log p(x) may be off: below the first all is fine, above the second it is bad."""

NOISY = 0.3
"""Standard error (nats) above which a handful of weights make the mean, so that the error is not known itself."""

SOME, HALF = 0.1, 0.5
"""Shares of the data for which the weights may be bad: above the first nothing is fine, above the second it is bad."""


def judge_evidence(found: xr.Dataset) -> Finding:
    """How far off may log p(x) be?

    By the gap of the bounds where there are two, else by what the spread of the weights says: half its square, by
    which the bound lies low. A guide that misses part of the posterior makes that too small; so nothing is fine where
    a tenth of the data have a k̂ above 0.7 or a standard error above 0.3 nats, and with half of them above that
    k̂ it is bad.

    Args:
        found: from :func:`pyro_vae.log_evidence`.

    Returns:
        ``fine`` below 0.1 nats per datum, ``bad`` above 1.

    References:
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> judge_evidence(pv.log_evidence(linear.as_vae(), torch.ones(3, 5), num_particles=10)).level
        'fine'
    """
    n, method = found.sizes["datum"], found.attrs["method"]
    if method == "bdmc":
        gap = (found.upper - found.lower).values
        off = float(gap.mean())
        error = f" ± {gap.std(ddof=1) / np.sqrt(n):.2g}" if n > 1 else ""
        why = f"the bounds on log p(x) of {n} simulated data are {off:.3g}{error} nats apart"
    else:
        off = float((found.mcse**2).mean() / 2)
        why = (
            f"by {found.attrs['estimate']} with {found.attrs['num_particles']} particles, log p(x) of {n} data has "
            f"a mean error of {_root_mean_square(found.mcse):.3g} nats and lies about {off:.2g} nats low"
        )
    level: Level = "fine" if off < CLOSE_ENOUGH else "doubtful" if off < TOO_FAR else "bad"
    why += f" (fine below {CLOSE_ENOUGH:g}, bad above {TOO_FAR:g})"
    if method != "bdmc":
        noisy = float((found.mcse > NOISY).mean())
        level = "doubtful" if level == "fine" and noisy > SOME else level
        why += f"; the error is above {NOISY:g} for {noisy:.0%}"
    if "khat" in found:
        heavy = float((found.khat > BAD_KHAT).mean())
        level = "bad" if heavy > HALF else "doubtful" if level == "fine" and heavy > SOME else level
        why += f"; k̂ is above {BAD_KHAT} for {heavy:.0%}"
    return Finding("evidence", level, why, _next(method) if level != "fine" else "")


def _next(method: str) -> str:
    if method in ("iw", "psis"):
        return 'take method="ais", or a richer posterior'
    return "raise temperatures, or take a richer posterior, from which the path is shorter"


def _root_mean_square(values: xr.DataArray) -> float:
    return float(np.sqrt((values**2).mean()))


def judge_models(table: pd.DataFrame) -> Finding:
    """Judge whether the best model of a comparison is told apart from the others.

    Args:
        table: from :func:`pyro_vae.compare_models`.

    Returns:
        ``fine`` where the best is told apart from all others. ``doubtful`` where it is tied with one, where
        k̂ or the bias of an estimate says that a difference may come from the guides and not from the models, or
        where it is not known which features are densities. ``bad`` where a feature is a density under one model and a
        probability under another, or one generative model with two guides is told apart from itself.

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
    tied = [str(name) for name in others.index[others.elpd_diff.abs() <= TIED * others.dse]]
    told = "; ".join(f"{name} {row.elpd_diff:+.4g} ± {row.dse:.2g}" for name, row in others.iterrows())
    why = f"{best} has the most evidence of {_data(table)}, in nats beside it: {told}"
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
    return Finding(about, "fine", why)


def _data(table: pd.DataFrame) -> str:
    n, distinct = table.attrs["data"], table.attrs["distinct"]
    return f"{n} held-out data" + (f" ({distinct} distinct rows)" if distinct < n else "")
