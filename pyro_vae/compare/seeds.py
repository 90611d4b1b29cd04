"""Comparisons of trainings that differ in their seed alone, as one."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from pyro_vae.errors import SettingsError

WORST = ("difference", "gradient_difference", "peak_memory")
"""What is the largest over seeds, as it is over draws."""
ALIKE = ("draws", "size", "dtype")
"""Attributes in which comparisons must agree."""
ORDERED = ("moment", "estimator")
"""Dimensions whose labels have an order of their own."""
LISTED = ("device", "threads", "reference", "log_evidence")
"""Attributes whose values are all listed where the comparisons differ in them."""
BY_SEED = ("efficiency", "efficiency_se")
"""What is kept of each seed, as ``seed_…``, to tell estimators apart by it."""


def over_seeds(comparisons: Sequence[xr.Dataset]) -> xr.Dataset:
    """The mean of comparisons of trainings that differ in their seed, with errors that hold how much these differ.

    .. math:: \\bar v = \\frac1S \\sum_s v_s, \\qquad
        se^2 = \\frac1S \\max\\Big(\\tfrac1{S-1} \\sum_s (v_s - \\bar v)^2,\\ \\tfrac1S \\sum_s se_s^2\\Big)

    What another training would have given too is in the error; a spread that comes out smaller than the draws of
    each alone allow, as that of few seeds may, is not believed. Differences to the hand-derived ELBO and peak
    memory are the largest over seeds.

    Args:
        comparisons: one from :func:`pyro_vae.compare_elbos` of each training, on the same held-out data and each with
            a ``seed`` of draws of its own, at least 2; with a dimension ``moment``, each moment by itself.

    Returns:
        A dataset as of one comparison, without the single draws (``value``, ``noise_seed``), and with
        ``seed_efficiency`` and its error, by which :func:`pyro_vae.recommend` tells estimators apart in pairs. What
        not every seed has, as a moment or an estimator, is left out, and the attribute ``left_out`` says so;
        ``seeds`` are the seeds.

    Raises:
        SettingsError: if there is one only, one is none of a single training, seeds of draws are alike, data, draws or
            precision differ, or there is no moment or estimator that all have.

    References:
        | Deep Reinforcement Learning that Matters (Henderson et al., 2018), https://arxiv.org/abs/1709.06560

    Example:
        >>> import torch, pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> trained = [pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5) for _ in range(3)]
        >>> x, chosen = trained[0].sample(20), {"ELBO": pv.elbo.ELBO()}
        >>> each = [pv.compare_elbos(m.as_vae(), x, chosen, draws=5, seed=s) for s, m in enumerate(trained)]
        >>> mean = over_seeds(each)
        >>> bool(mean.elbo_se > max(one.elbo_se for one in each))  # trainings differ more than draws do
        True
    """
    comparisons = _seen(comparisons)
    every = stacked([one.drop_vars(("value", "noise_seed"), errors="ignore") for one in comparisons], join="inner")
    mean = every.mean("seed", skipna=False, keep_attrs=True)
    errors = {f"{name}_se": _error(every, str(name)) for name in every if f"{name}_se" in every}
    worst = {name: every[name].max("seed", skipna=False, keep_attrs=True) for name in WORST if name in every}
    left_out = "; ".join(dict.fromkeys([*_told("left_out", comparisons), *_not_shared(comparisons)]))
    seeds = {f"seed_{name}": every[name] for name in BY_SEED if name in every}
    return mean.assign(errors | worst | seeds).assign_attrs(
        {**every.attrs, "seeds": _seeds(comparisons), "left_out": left_out.strip("; ")}
    )


def stacked(comparisons: Sequence[xr.Dataset], *, join: Literal["inner", "outer"] = "outer") -> xr.Dataset:
    """Comparisons side by side, by ``seed``.

    Args:
        comparisons: from :func:`pyro_vae.compare_elbos`, each of another seed.
        join: of moments and estimators that some lack, "inner" to leave them out, "outer" for NaN.

    Example:
        >>> one = xr.Dataset({"elbo": 0.0}, attrs={"seed": 0})
        >>> stacked([one, one.assign_attrs(seed=1)]).seed.values.tolist()
        [0, 1]
    """
    every = [one.drop_vars("seed", errors="ignore") for one in comparisons]
    every = [one.reset_coords("noise_seed") if "noise_seed" in one.coords else one for one in every]
    together = xr.concat(
        every, xr.Variable("seed", _seeds(comparisons)), join=join, combine_attrs="drop_conflicts",
        data_vars="all", coords="minimal", compat="override",
    )  # fmt: skip
    in_order = {name: [each for each in _labels(name, every) if each in together[name].values] for name in ORDERED}
    together = together.sel({name: labels for name, labels in in_order.items() if name in together.dims})
    return together.assign_attrs({name: "; ".join(told) for name in LISTED if len(told := _told(name, every)) > 1})


def _labels(dimension: str, comparisons: Sequence[xr.Dataset]) -> list[Any]:
    """Labels in the order of the one that has most of them, which joining would sort."""
    each = [one[dimension].values.tolist() for one in comparisons if dimension in one.dims]
    return [*dict.fromkeys(label for own in sorted(each, key=len, reverse=True) for label in own)]


def _told(name: str, comparisons: Sequence[xr.Dataset]) -> list[str]:
    """The different values of an attribute, each once."""
    return [*dict.fromkeys(str(one.attrs[name]) for one in comparisons if name in one.attrs)]


def drawn(comparison: xr.Dataset) -> str:
    """How much a comparison rests on, in words.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`, or the mean of several.

    Example:
        >>> drawn(xr.Dataset(attrs={"draws": 20})), drawn(xr.Dataset(attrs={"draws": 20, "seeds": [0, 1, 2]}))
        ('20 draws', '20 draws of each of 3 seeds')
    """
    draws, seeds = comparison.attrs["draws"], comparison.attrs.get("seeds")
    return f"{draws} draws" if seeds is None else f"{draws} draws of each of {len(seeds)} seeds"


def refuse_stacked(comparison: xr.Dataset) -> None:
    """Refuse comparisons side by side where one is needed.

    Raises:
        SettingsError: if they are.

    Example:
        >>> refuse_stacked(xr.Dataset({"elbo": 0.0}))
    """
    if "elbo" in comparison and "seed" in comparison.elbo.dims:
        raise SettingsError(
            "the comparison holds those of several seeds side by side; take one, by .sel(seed=...), or "
            "pyro_vae.over_seeds([each.sel(seed=s) for s in each.seed])"
        )


def _seeds(comparisons: Sequence[xr.Dataset]) -> list[int]:
    return [int(one.attrs["seed"] if "seed" in one.attrs else one.coords["seed"]) for one in comparisons]


def _error(every: xr.Dataset, name: str) -> xr.DataArray:
    """Of the mean over seeds."""
    known = (every[f"{name}_se"] ** 2).mean("seed", skipna=False)
    with np.errstate(invalid="ignore"):  # an efficiency without noise is infinite
        seen = every[name].var("seed", ddof=1, skipna=False)
    largest = xr.apply_ufunc(np.fmax, seen, known) / every.sizes["seed"]
    return (largest**0.5).assign_attrs(every[f"{name}_se"].attrs)


def _not_shared(comparisons: Sequence[xr.Dataset]) -> list[str]:
    """What one of them has and another lacks, in words."""
    said = []
    for dimension in ("moment", "estimator", "particles"):
        each = [one.get(dimension, xr.DataArray([])).values.tolist() for one in comparisons]
        some = dict.fromkeys(label for own in each for label in own if any(label not in other for other in each))
        said += [f"{dimension} {label}: not every seed has it" for label in some]
    return said


def _seen(comparisons: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """The comparisons, seen to have a mean."""
    every = [] if isinstance(comparisons, xr.Dataset) else list(comparisons)
    for i, one in enumerate(every):
        if not (isinstance(one, xr.Dataset) and _is_of_one(one)):
            raise SettingsError(f"comparisons[{i}] is none of a single training, as pyro_vae.compare_elbos gives it")
    if len(every) < 2:
        raise SettingsError(f"there is {max(len(every), 1)} comparison; give a list of those of at least 2 seeds")
    _refuse(every)
    return every


def _is_of_one(comparison: xr.Dataset) -> bool:
    of_one = "seed" in comparison.attrs or ("seed" in comparison.coords and not comparison.seed.ndim)
    return of_one and "datum" in comparison.dims and all(name in comparison.attrs for name in ALIKE)


def _refuse(comparisons: Sequence[xr.Dataset]) -> None:
    """Refuse comparisons that have no mean."""
    seeds = _seeds(comparisons)
    if len(set(seeds)) < len(seeds):
        raise SettingsError(f"the comparisons have the seeds {seeds}; give each draws of its own, by another seed=")
    for what in ALIKE:
        if len(found := {one.attrs[what] for one in comparisons}) > 1:
            raise SettingsError(f"the comparisons differ in {what}: {sorted(map(str, found))}; give comparisons alike")
    if len(found := {one.sizes["datum"] for one in comparisons}) > 1:
        raise SettingsError(f"the comparisons are of {sorted(found)} data; compare on the same held-out data")
    for what in ORDERED:
        having = [{*one[what].values.tolist()} for one in comparisons if what in one.dims]
        if having and (len(having) < len(comparisons) or not set.intersection(*having)):
            raise SettingsError(f"the comparisons have no {what} that all have; give comparisons alike")
