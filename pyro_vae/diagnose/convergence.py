"""Judge whether SVI has converged, from its iterates as chains."""

from typing import Any

import numpy as np
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.format import format_estimate
from pyro_vae.core.validation import above_zero, takes_settings
from pyro_vae.diagnose.iterates import INVARIANT, Iterates, tail_length
from pyro_vae.errors import DataError, SettingsError, type_of
from pyro_vae.train.overfitting import ERRORS, NATS, fall_of_validation

RHAT = 1.1
"""The largest R̂ of iterates that counts as stationary."""

LEAST = 10
"""The fewest iterates at the end of a run for a trend with an error."""

MOST = 30
"""The number of blocks that a longer series is averaged over before its error is estimated."""

PHIS = 40
"""The number of autocorrelations that the error of a trend is averaged over."""


@takes_settings
def converged(runs: Any, *, tail: float = 0.5, nats: float = 0.1) -> xr.Dataset:
    """Test whether the last iterates of SVI are stationary, and the same for all seeds.

    .. math:: \\hat R = \\sqrt{\\frac{N - 1}{N} + \\frac{B}{N W}}, \\qquad
        \\mathrm{ELBO}_t = a + b t + \\epsilon_t, \\qquad
        \\epsilon_t = \\phi \\epsilon_{t-1} + \\eta_t, \\qquad
        P(|\\hat b - b| < h) = \\int t_{N-2}\\big(h / s_\\phi\\big) \\, p(\\phi | \\hat\\epsilon) \\, d\\phi

    The last part of each run is split in halves, which count as chains: R̂ is large if they differ, that is, if a run
    still moves or runs with different seeds ended at different values. R̂ has no unit: if the noise is small enough, it
    shows a drift of a thousandth of a nat. The trend therefore also gives the rise of the ELBO in nats over these
    epochs.

    The iterates of a run are autocorrelated, and a short run says little about how strongly. Each standard error is
    therefore that of an AR(1) process (of block means, for more than 30 epochs), averaged over the posterior of its
    coefficient φ, and ± 2 standard errors are the central 95 % of that average. In 2000 simulations of 20, 40 and 200
    epochs, ± 2 ``slope_se`` contained the true slope in .976, .970 and .971 of the series at φ = 0; in .985, .985 and
    .978 at φ = .5; in .927, .964 and .992 at φ = .9; and, outside the model, in .909, .930 and .986 for such an AR(1)
    plus white noise of the same variance. The price is power: the intervals are 1.0 to 2.6 times as wide as if φ were
    known. Over 40 epochs at φ = .5, a rise of four standard deviations of an iterate is detected in .45 of the series,
    a rise of six in .83. ``mean_se`` is computed in the same way; its lowest coverage there was .83 (20 epochs of AR(1)
    plus noise), .96 within the model.

    Args:
        runs: :class:`Iterates`, a result of :func:`pyro_vae.fit`, its history, or a list of these, one per seed.
        tail: the share of each run's epochs to judge, above 0 and at most 1; at least 10 epochs.
        nats: the largest rise of the ELBO per datum over these epochs that counts as converged, above 0.

    Returns:
        A dataset over ``quantity`` of ``rhat`` (all runs together), ``mean`` and ``mean_se``; over ``chain`` (the runs)
        ``slope`` (nats per datum and epoch), ``rise`` (over the epochs judged), each with ``…_se``; ``elbo`` over
        ``chain, epoch``; if the histories have a validation ELBO, ``fall`` and ``fall_se`` over ``chain``, its decrease
        since its best epoch; and, from Iterates, ``own_rhat`` of each run's means of q and weights over
        ``chain, own``.

    Raises:
        DataError: if a run has another type, or recorded no epoch.
        SettingsError: if a setting is out of its range, or a run too short.

    References:
        | Robust, Accurate Stochastic Optimization for Variational Inference (Dhaka et al., 2020),
          https://arxiv.org/abs/2009.00666
        | Rank-Normalization, Folding, and Localization: An Improved R̂ (Vehtari et al., 2021),
          https://arxiv.org/abs/1903.08008
        | Bias Reduction of Autoregressive Estimates in Time Series Regression Model through Restricted Maximum
          Likelihood (Cheang & Reinsel, 2000), https://doi.org/10.1080/01621459.2000.10474318

    Example:
        >>> rng = np.random.default_rng(0)
        >>> steady = xr.Dataset({"train_elbo": ("epoch", rng.normal(0, 0.03, size=80))}, {"epoch": range(1, 81)})
        >>> [judge_converged(converged(history)).level for history in (steady, steady + 0.1 * steady.epoch)]
        ['fine', 'bad']
    """
    above_zero("nats", nats)
    several = list(runs) if isinstance(runs, list | tuple) else [runs]
    if not several:
        raise DataError("there are no runs; pass Iterates, or a result of fit")
    tables = [_table(run) for run in several]
    quantities = [q for q in INVARIANT if all(q in t.quantity for t in tables)]
    last = min(tail_length(tail, t.sizes["epoch"]) for t in tables)
    if last < LEAST:
        raise SettingsError(f"the last {tail:g} of the run has {last} epochs, and a trend needs {LEAST}; train longer")
    ends = [t.isel(epoch=slice(-last, None)) for t in tables]
    for number, end in enumerate(ends):
        _validate_finite(end, number)
    values = np.stack([end.value.sel(quantity=quantities).values for end in ends])  # (chain, epoch, quantity)
    pairs = [_trend(end.epoch.values, v[:, 0]) for end, v in zip(ends, values, strict=True)]
    slope, slope_se = np.array(pairs).T
    longest = max(tables, key=lambda t: t.sizes["epoch"])
    series = np.full((len(tables), longest.sizes["epoch"]), np.nan)
    for row, table in zip(series, tables, strict=True):
        row[: table.sizes["epoch"]] = table.value.sel(quantity="elbo")
    nat = {"units": "nats per datum"}
    span = float(np.ptp(ends[0].epoch.values))
    mean, error = _means(values)
    variables: dict[str, Any] = {
        "rhat": ("quantity", _rhat(values)),
        "mean": (("chain", "quantity"), mean, nat),
        "mean_se": (("chain", "quantity"), error, nat),
        "slope": ("chain", slope, {"units": "nats per datum and epoch"}),
        "slope_se": ("chain", slope_se, {"units": "nats per datum and epoch"}),
        "rise": ("chain", slope * span, nat),
        "rise_se": ("chain", slope_se * span, nat),
        "elbo": (("chain", "epoch"), series, nat),
    }
    coordinates: dict[str, Any] = {"quantity": quantities, "chain": range(len(tables)), "epoch": longest.epoch.values}
    if (fall := _fall(several)) is not None:
        variables |= {name: ("chain", values, nat) for name, values in fall.items()}
    if all("own_value" in t and t.sizes["own"] == tables[0].sizes["own"] for t in tables):
        own = np.stack([_rhat(end.own_value.values[None]) for end in ends])
        variables["own_rhat"] = ("chain", "own"), own
        coordinates["kind"] = "own", tables[0].kind.values
    return xr.Dataset(
        variables, coordinates, {"tail": last, "threshold_rhat": RHAT, "threshold_nats": nats, **versions()}
    )


def _table(run: Any) -> xr.Dataset:
    """Return the value of each quantity after each epoch."""
    run = run if isinstance(run, xr.Dataset) else getattr(run, "history", run)
    run = run() if callable(run) else run
    if isinstance(run, xr.Dataset) and "train_elbo" in run:
        return xr.Dataset(
            {"value": (("epoch", "quantity"), run.train_elbo.values[:, None])},
            {"epoch": run.epoch.values, "quantity": ["elbo"]},
        )
    if isinstance(run, xr.Dataset) and "value" in run:
        return run
    raise DataError(f"a run is {type_of(run)}; pass Iterates, a result of fit, its history, or a list of these")


def _fall(runs: list[Any]) -> dict[str, list[float]] | None:
    """Return the decrease of each run's validation ELBO since its best epoch, if all histories have one."""
    histories = [run.fitted if isinstance(run, Iterates) else getattr(run, "history", run) for run in runs]
    found = [fall_of_validation(one) if isinstance(one, xr.Dataset) else None for one in histories]
    if any(one is None for one in found):
        return None
    falls = [one for one in found if one is not None]
    values = {name: [float(one[name]) for one in falls] for name in ("fall", "fall_se")}
    kept = [int(one.kept_epoch) for one in falls]  # 0 if the weights are not those of a single epoch
    return values | {
        "epochs_after_kept": [one.sizes["epoch"] - k if k else 0 for one, k in zip(falls, kept, strict=True)]
    }


def _validate_finite(end: xr.Dataset, number: int) -> None:
    """Raise a DataError if a run diverged."""
    wrong = ~np.isfinite(end.value.values).all(1)
    if wrong.any():
        raise DataError(
            f"run {number} diverged: its ELBO is not finite in epoch {end.epoch.values[wrong.argmax()]}; train "
            "again at a lower learning rate"
        )


def _rhat(values: np.ndarray) -> np.ndarray:
    """Compute R̂ of values ``(chain, epoch, …)`` with each chain split in halves; 1 if the values are constant."""
    from pyro_vae.core.arviz import array_stats

    half = values.shape[1] // 2
    halves = np.concatenate([values[:, :half], values[:, -half:]])
    still = np.ptp(halves, axis=(0, 1)) == 0
    rhat = np.ones(values.shape[2:])
    if not still.all():
        with np.errstate(divide="ignore"):  # infinite if the halves are constant at different values
            rhat[~still] = array_stats.rhat(halves[..., ~still], chain_axis=0, draw_axis=1, method="identity")
    return rhat


def _standard_errors(design: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Estimate the standard error of the last coefficient of a least-squares fit to autocorrelated series.

    The errors of the fit are AR(1) with coefficient φ. Each φ of a grid has its restricted likelihood, and, given φ,
    the coefficient has a t distribution. The central 95 % interval of the mixture extends by two standard errors to
    each side. The grid follows the prior 1 / √(1 - φ²), which allows for strong dependence even if a short series
    looks independent. Long series are averaged over blocks first: block means are closer to AR(1) than iterates.

    Args:
        design: shape ``(epoch, coefficient)``.
        values: shape ``(series, epoch)``.
    """
    from scipy.special import stdtr, stdtrit

    design, values = (_block_means(each) for each in (design, values.T))
    number, coefficients = design.shape
    freedom = number - coefficients
    phi = np.sin(np.pi / 2 * np.arange(1 - PHIS, PHIS, 2) / PHIS)[:, None, None]
    lag = np.abs(np.subtract.outer(np.arange(number), np.arange(number)))
    covariance = phi**lag  # up to a factor, which cancels below
    root = np.linalg.cholesky(covariance)
    to_last = np.linalg.pinv(design)[-1]
    rest = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    size = np.maximum(np.abs(rest).max(0), np.finfo(float).tiny)  # scale each series, so that no square underflows
    q, r = np.linalg.qr(np.linalg.solve(root, design[None]))
    white = np.linalg.solve(root, (rest / size)[None])
    square = np.maximum(((white - q @ (q.swapaxes(1, 2) @ white)) ** 2).sum(1), np.finfo(float).tiny)  # (phi, series)
    determinants = sum(np.log(np.abs(np.diagonal(m, axis1=1, axis2=2))).sum(1, keepdims=True) for m in (root, r))
    log_weight = -determinants - freedom / 2 * np.log(square)
    weight = np.exp(log_weight - log_weight.max(0))
    weight /= weight.sum(0)
    scale = np.sqrt(square / freedom * (covariance @ to_last @ to_last)[:, None])
    low, high = np.zeros(len(size)), stdtrit(freedom, 0.975) * scale.max(0)
    for _ in range(50):
        middle = (low + high) / 2
        inside = (weight * (2 * stdtr(freedom, middle / scale) - 1)).sum(0) < 0.95
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.where(np.ptp(values, 0) > 0, size * high / 2, 0.0)


def _block_means(values: np.ndarray) -> np.ndarray:
    """Average values ``(epoch, …)`` over at most ``MOST`` blocks of equal length; the first epochs may be left out."""
    size = -(-len(values) // MOST)
    return values[len(values) % size :].reshape(-1, size, *values.shape[1:]).mean(1)


def _means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each run's mean of each quantity, and its standard error, from ``(chain, epoch, quantity)``."""
    series = values.swapaxes(1, 2).reshape(-1, values.shape[1])
    error = _standard_errors(np.ones((values.shape[1], 1)), series)
    return values.mean(1), error.reshape(len(values), -1)


def _trend(epoch: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """Return the slope of the least-squares line through one run's iterates, and its standard error."""
    time = epoch - epoch.mean()
    error = _standard_errors(np.stack([np.ones_like(time), time], 1), values[None])
    return float(time @ values / (time @ time)), float(error[0])


def judge_converged(found: xr.Dataset) -> Finding:
    """Judge whether the iterates are stationary.

    Args:
        found: from :func:`converged`.

    Returns:
        ``"bad"`` if the ELBO still rises by more than the threshold, ``"fine"`` if it changes by less and runs with
        different seeds agree, else ``"doubtful"``. If the validation ELBO has fallen
        (:func:`~pyro_vae.diagnose.overfitting`), or has chosen the weights of an earlier epoch, the advice is not to
        train longer, and a rise is doubtful.

    Example:
        >>> steady = xr.Dataset({"train_elbo": ("epoch", np.full(20, 3.0))}, {"epoch": range(1, 21)})
        >>> judge_converged(converged(steady)).level
        'fine'
    """
    nats, limit, last = found.attrs["threshold_nats"], found.attrs["threshold_rhat"], found.attrs["tail"]
    rise, error = found.rise.values, found.rise_se.values
    elbo_rhat, means = float(found.rhat.sel(quantity="elbo")), found["mean"].sel(quantity="elbo").values
    apart = elbo_rhat > limit and np.ptp(means) > nats
    rising, falling = bool((rise - 2 * error > nats).any()), bool((rise + 2 * error < -nats).any())
    steady = bool((np.abs(rise) + 2 * error <= nats).all())
    chosen = "epochs_after_kept" in found and bool((found.epochs_after_kept > 0).all())
    level: Level = "bad" if rising and not chosen else "fine" if steady and not apart else "doubtful"
    k = int((rise - 2 * error if rising else np.abs(rise) + 2 * error).argmax())  # the run that decides the level
    why = (
        f"the ELBO rose by {format_estimate(rise[k], error[k], 'nats per datum', over=f'the last {last} epochs')} "
        f"(threshold {nats:g}), and R̂ of its iterates is {elbo_rhat:.3f} (threshold {limit})"
    )
    if len(rise) > 1:
        why += f"; {len(rise)} runs ended {np.ptp(means):.3f} nats apart"
    if "own_rhat" in found:
        why += (
            f"; R̂ is above {limit} for {float((found.own_rhat > limit).mean()):.0%} of the recorded weights and means "
            "of q"
        )
    fallen = "fall" in found and bool((found.fall > np.maximum(NATS, ERRORS * found.fall_se)).any())
    if fallen:
        why += f"; the validation ELBO has fallen by up to {found.fall.values.max():.2g} nats since its best epoch"
    steps = {
        "do not train longer: the ELBO of new data falls (see overfitting)": fallen and not steady,
        "nothing: the validation ELBO chose these weights, and later weights were no better on validation data": (
            chosen and not fallen
        ),
        "train longer": rising and not fallen and not chosen,
        "pass validation_data to fit, to detect overfitting": rising and "fall" not in found,
        "lower the learning rate: the ELBO falls": falling,
        "train longer or lower the learning rate, since noise may hide a trend; Iterates.average has less noise": not (
            rising or falling or steady or fallen or chosen
        ),
        "keep the run with the highest ELBO on held-out data, and train with more seeds": apart and not rising,
    }
    return Finding("convergence of SVI", level, why, "; ".join(step for step, taken in steps.items() if taken))
