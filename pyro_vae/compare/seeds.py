"""Combine comparisons of trainings that differ only in their seed."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from pyro_vae.errors import SettingsError

WORST = ("difference", "gradient_difference", "peak_memory")
"""Variables that are maxima over draws, and therefore over seeds."""
ALIKE = ("draws", "size", "dtype")
"""Attributes that must be equal in all comparisons."""
ORDERED = ("moment", "estimator")
"""Dimensions whose labels are not sorted alphabetically."""
LISTED = ("device", "threads", "reference", "log_evidence")
"""Attributes that list all values if the comparisons differ."""
BY_SEED = ("efficiency", "efficiency_se")
"""Variables that are stored per seed, as ``seed_…``, to compare estimators in pairs."""


def over_seeds(comparisons: Sequence[xr.Dataset]) -> xr.Dataset:
    """Average comparisons of trainings that differ in their seed; errors include the spread over seeds.

    .. math:: \\bar v = \\frac1S \\sum_s v_s, \\qquad
        se^2 = \\frac1S \\max\\Big(\\tfrac1{S-1} \\sum_s (v_s - \\bar v)^2,\\ \\tfrac1S \\sum_s se_s^2\\Big)

    The error thus includes the variation between trainings. The spread of few seeds may be small by chance, so it is
    never taken as smaller than the error over draws. Differences from the hand-derived ELBO and peak memory are the
    maxima over seeds.

    Args:
        comparisons: at least 2 results of :func:`pyro_vae.compare_elbos`, one per training, on the same held-out data
            and with different ``seed``; a dimension ``moment`` is averaged moment by moment.

    Returns:
        A dataset like that of one comparison, without single draws (``value``, ``noise_seed``), but with
        ``seed_efficiency`` and its error, by which :func:`pyro_vae.recommend` compares estimators in pairs. Moments and
        estimators that some seeds lack are left out and named in the attribute ``left_out``; ``seeds`` lists the seeds.

    Raises:
        SettingsError: if there is only one comparison, one does not come from a single training, two have the same
            seed, data, draws or precision differ, or no moment or estimator is common to all.

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
    comparisons = _validated(comparisons)
    every = stacked([one.drop_vars(("value", "noise_seed"), errors="ignore") for one in comparisons], join="inner")
    mean = every.mean("seed", skipna=False, keep_attrs=True)
    errors = {f"{name}_se": _error(every, str(name)) for name in every if f"{name}_se" in every}
    worst = {name: every[name].max("seed", skipna=False, keep_attrs=True) for name in WORST if name in every}
    left_out = "; ".join(dict.fromkeys([*_distinct_values("left_out", comparisons), *_not_shared(comparisons)]))
    seeds = {f"seed_{name}": every[name] for name in BY_SEED if name in every}
    return mean.assign(errors | worst | seeds).assign_attrs(
        {**every.attrs, "seeds": _seeds(comparisons), "left_out": left_out.strip("; ")}
    )


def stacked(comparisons: Sequence[xr.Dataset], *, join: Literal["inner", "outer"] = "outer") -> xr.Dataset:
    """Stack comparisons along a dimension ``seed``.

    Args:
        comparisons: from :func:`pyro_vae.compare_elbos`, with different seeds.
        join: moments and estimators that some comparisons lack are left out with "inner", and NaN with "outer".

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
    return together.assign_attrs(
        {name: "; ".join(found) for name in LISTED if len(found := _distinct_values(name, every)) > 1}
    )


def _labels(dimension: str, comparisons: Sequence[xr.Dataset]) -> list[Any]:
    """List the labels in the order of the comparison with the most of them; joining would sort them."""
    each = [one[dimension].values.tolist() for one in comparisons if dimension in one.dims]
    return [*dict.fromkeys(label for labels in sorted(each, key=len, reverse=True) for label in labels)]


def _distinct_values(name: str, comparisons: Sequence[xr.Dataset]) -> list[str]:
    """List the distinct values of an attribute."""
    return [*dict.fromkeys(str(one.attrs[name]) for one in comparisons if name in one.attrs)]


def drawn(comparison: xr.Dataset) -> str:
    """Say how many draws and seeds a comparison has.

    Args:
        comparison: from :func:`pyro_vae.compare_elbos`, or the mean of several.

    Example:
        >>> drawn(xr.Dataset(attrs={"draws": 20})), drawn(xr.Dataset(attrs={"draws": 20, "seeds": [0, 1, 2]}))
        ('20 draws', '20 draws of each of 3 seeds')
    """
    draws, seeds = comparison.attrs["draws"], comparison.attrs.get("seeds")
    return f"{draws} draws" if seeds is None else f"{draws} draws of each of {len(seeds)} seeds"


def validate_not_stacked(comparison: xr.Dataset) -> None:
    """Raise if several comparisons are stacked where one is needed.

    Raises:
        SettingsError: if ``comparison`` stacks several seeds.

    Example:
        >>> validate_not_stacked(xr.Dataset({"elbo": 0.0}))
    """
    if "elbo" in comparison and "seed" in comparison.elbo.dims:
        raise SettingsError(
            "the comparison stacks several seeds; select one with .sel(seed=...), or average them with "
            "pyro_vae.over_seeds([stacked.sel(seed=s) for s in stacked.seed])"
        )


def _seeds(comparisons: Sequence[xr.Dataset]) -> list[int]:
    return [int(one.attrs["seed"] if "seed" in one.attrs else one.coords["seed"]) for one in comparisons]


def _error(every: xr.Dataset, name: str) -> xr.DataArray:
    """Compute the standard error of the mean over seeds."""
    known = (every[f"{name}_se"] ** 2).mean("seed", skipna=False)
    with np.errstate(invalid="ignore"):  # an efficiency without noise is infinite
        variance = every[name].var("seed", ddof=1, skipna=False)
    largest = xr.apply_ufunc(np.fmax, variance, known) / every.sizes["seed"]
    return (largest**0.5).assign_attrs(every[f"{name}_se"].attrs)


def _not_shared(comparisons: Sequence[xr.Dataset]) -> list[str]:
    """Describe the labels that some comparisons have and others lack."""
    described = []
    for dimension in ("moment", "estimator", "particles"):
        each = [one.get(dimension, xr.DataArray([])).values.tolist() for one in comparisons]
        some = dict.fromkeys(label for labels in each for label in labels if any(label not in other for other in each))
        described += [f"{dimension} {label}: not in every seed" for label in some]
    return described


def _validated(comparisons: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """Validate that the comparisons can be averaged, and return them as a list."""
    every = [] if isinstance(comparisons, xr.Dataset) else list(comparisons)
    for i, one in enumerate(every):
        if not (isinstance(one, xr.Dataset) and _is_single_comparison(one)):
            raise SettingsError(f"comparisons[{i}] is not a comparison of one training from pyro_vae.compare_elbos")
    if len(every) < 2:
        raise SettingsError(f"comparisons holds {max(len(every), 1)} comparison; pass a list with at least 2 seeds")
    _validate_averageable(every)
    return every


def _is_single_comparison(comparison: xr.Dataset) -> bool:
    single = "seed" in comparison.attrs or ("seed" in comparison.coords and not comparison.seed.ndim)
    return single and "datum" in comparison.dims and all(name in comparison.attrs for name in ALIKE)


def _validate_averageable(comparisons: Sequence[xr.Dataset]) -> None:
    """Raise if the comparisons cannot be averaged."""
    seeds = _seeds(comparisons)
    if len(set(seeds)) < len(seeds):
        raise SettingsError(f"the comparisons have the seeds {seeds}; use a different seed= for each")
    for what in ALIKE:
        if len(found := {one.attrs[what] for one in comparisons}) > 1:
            raise SettingsError(f"the comparisons differ in {what}: {sorted(map(str, found))}; it must be equal in all")
    if len(found := {one.sizes["datum"] for one in comparisons}) > 1:
        raise SettingsError(f"the comparisons are of {sorted(found)} data; compare on the same held-out data")
    for what in ORDERED:
        having = [{*one[what].values.tolist()} for one in comparisons if what in one.dims]
        if having and (len(having) < len(comparisons) or not set.intersection(*having)):
            raise SettingsError(f"the comparisons have no {what} in common; compare the same ones in each training")
