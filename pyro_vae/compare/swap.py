"""Rank models with different components by their evidence of held-out data."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from rich import box
from rich.markup import escape
from rich.table import Table

from pyro_vae.compare.held_out import evaluate_models
from pyro_vae.core.format import format_estimate
from pyro_vae.core.pair import Amortized
from pyro_vae.core.validation import takes_settings
from pyro_vae.data.repeats import clustered_error, count
from pyro_vae.errors import SettingsError, type_of
from pyro_vae.evidence.atoms import MEANING
from pyro_vae.evidence.estimate import Method
from pyro_vae.evidence.kinds import CAUTION
from pyro_vae.evidence.psis import BAD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY_BAD = 0.1
"""If k̂ is bad for a larger share of the data, the table warns."""


@takes_settings
def rank(
    vaes: Mapping[str, Amortized | Sequence[Amortized]],
    x: Any,
    *,
    method: Method = "iw",
    num_particles: int | None = None,
    temperatures: int = 100,
    leapfrog: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Rank trained models by the evidence of held-out data, best first.

    .. math:: \\frac1n \\sum_i \\log p(x_i), \\qquad \\Delta_m = \\frac1n \\sum_i \\log p_m(x_i) - \\log p_{best}(x_i)

    The standard errors are over data (and include the Monte-Carlo error); the error of a difference is paired. They
    are clustered by distinct row: duplicate rows in ``x`` are not independent data, and a
    :class:`~pyro_vae.errors.DuplicateRowsWarning` is given. Densities and probabilities are not comparable: if a
    feature has a density under one model and a probability under another, the attribute ``caution`` names it.

    If each model was trained with several seeds, log p(x) is the mean over seeds, and the errors include the spread
    over seeds: :math:`\\sqrt{s_x^2 / n + s_{seed}^2 / S}` for n data and S seeds. For one training of each model,
    :func:`~pyro_vae.compare_models` says more.

    Args:
        vaes: name → trained VAE or Pair, or a list of those that differ only in their seed, of equal length for each
            name.
        x: held-out data, shape ``(datum, *features)``, at least 2.
        method: ``"iw"``, ``"psis"``, ``"ais"`` or ``"ais_prior"``; this and the following settings are those of
            :func:`~pyro_vae.log_evidence`.
        num_particles: draws or chains per datum.
        temperatures: of ``"ais"`` and ``"ais_prior"``.
        leapfrog: of ``"ais"`` and ``"ais_prior"``.
        seed: of the particles, the same for each model.
        progress: whether to show a progress bar.

    Returns:
        A dataset over ``model``, best first: ``log_evidence``, ``se``, ``difference``, ``difference_se``,
        in nats per datum; ``mcse``, the root mean square of the Monte-Carlo errors per datum; ``bad_khat``, the share
        of data with k̂ above 0.7, whose log p(x) is probably too low; ``kind``, whether p(x) is a probability, a density
        or both; ``seed_log_evidence``, per seed if there are several; ``note``, empty (see :func:`with_failures`).

    Raises:
        DataError: if the data are not finite numbers in rows, are fewer than two, outside the support of a likelihood,
            or were trained on.
        ModelError: if a model does not match the data.
        SettingsError: if there is no model, or a setting is out of range.

    References:
        | Practical Bayesian model evaluation (Vehtari, Gelman & Gabry, 2017), https://arxiv.org/abs/1507.04544

    Example:
        >>> import torch, pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> other = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.9)
        >>> ranked = rank({"wrong": other.as_vae(), "right": linear.as_vae()}, linear.sample(200))
        >>> ranked.model.values.tolist()
        ['right', 'wrong']
    """
    several = _validated(vaes)
    held_out = evaluate_models(
        several,
        x,
        source="x",
        stacklevel=3,
        method=method,
        num_particles=num_particles,
        temperatures=temperatures,
        leapfrog=leapfrog,
        seed=seed,
        progress=progress,
    )
    every = np.array([[one.log_evidence.values for one in each] for each in held_out.evidence.values()])
    order = np.argsort(-every.mean((1, 2)), kind="stable")
    names = [list(several)[i] for i in order]
    ranked = _ranking({name: held_out.evidence[name] for name in names}, every[order], held_out.row_number)
    unlike, shared = held_out.incomparable, held_out.atoms
    ranked["kind"] = "model", [held_out.kinds[name] for name in names]
    ranked.attrs |= {
        "seed": seed,
        "caution": f"{CAUTION} {unlike[0].upper()}{unlike[1:]}."
        if unlike
        else f"{shared}; {MEANING}"
        if shared
        else "",
        "atoms": shared,
    }
    return with_failures(ranked, {})


def _validated(vaes: Mapping[str, Amortized | Sequence[Amortized]]) -> dict[str, list[Any]]:
    """Return the list of each model's seeds."""
    if not isinstance(vaes, Mapping):
        raise SettingsError(f"vaes is {type_of(vaes)}; pass {{name: vae, other: vae}}")
    if not vaes:
        raise SettingsError("vaes is empty; pass at least one VAE")
    several = {name: list(vae) if isinstance(vae, list | tuple) else [vae] for name, vae in vaes.items()}
    for name, trained in several.items():
        if wrong := next((vae for vae in trained if not isinstance(vae, Amortized)), None):
            raise SettingsError(
                f"vaes[{name!r}] is {type_of(wrong)}; pass a VAE or a Pair, or a list with one per seed"
            )
    if len(sizes := {len(trained) for trained in several.values()}) > 1 or 0 in sizes:
        raise SettingsError(f"vaes: the models have {sorted(sizes)} seeds; pass equally many for each, at least 1")
    return several


def _ranking(found: Mapping[str, Sequence[xr.Dataset]], every: np.ndarray, number: np.ndarray) -> xr.Dataset:
    """Make the ranking of models that are sorted; values have dims ``(model, seed, datum)``."""
    each, apart, nats = every.mean(1), (every - every[0]).mean(1), {"units": "nats per datum"}
    first = next(iter(found.values()))[0].attrs
    ranked = xr.Dataset(
        {
            "log_evidence": ("model", each.mean(1), nats),
            "se": ("model", _error(every, number), nats),
            "difference": ("model", apart.mean(1), nats),
            "difference_se": ("model", _error(every - every[0], number), nats),
            "mcse": ("model", [_mcse(seeds) for seeds in found.values()], {"units": "nats"}),
            "bad_khat": ("model", [_bad_khat(seeds) for seeds in found.values()], {"units": "1"}),
            "datum_log_evidence": (("model", "datum"), each, {"units": "nats"}),
        },
        {"model": [*found]},
        {
            "method": first["method"],
            "num_particles": first["num_particles"],
            "data": each.shape[1],
            "distinct": count(number),
            "seeds": every.shape[1],
        },
    )
    if every.shape[1] > 1:
        ranked["seed_log_evidence"] = ("model", "seed"), every.mean(2), nats
    return ranked


def _error(every: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Compute the standard error of the mean over seeds and data, of values with dims ``(model, seed, datum)``."""
    seeds = every.shape[1]
    of_data = clustered_error(every.mean(1), number) ** 2
    return np.sqrt(of_data + (every.mean(2).var(1, ddof=1) / seeds if seeds > 1 else 0.0))


def _mcse(found: Sequence[xr.Dataset]) -> float:
    return float(np.sqrt(np.mean([(one.mcse**2).mean() for one in found]) / len(found)))


def _bad_khat(found: Sequence[xr.Dataset]) -> float:
    """Return the share of data and seeds with k̂ above 0.7; NaN if k̂ is not estimated."""
    khat = np.array([one.khat.values if "khat" in one else np.nan for one in found])
    return float("nan") if np.isnan(khat).all() else float((khat > BAD).mean())


def with_failures(ranked: xr.Dataset, failures: Mapping[str, str]) -> xr.Dataset:
    """Append models that could not be trained to a ranking, with the reason in ``note``.

    Args:
        ranked: from :func:`rank`.
        failures: name → reason of the failure.

    Returns:
        The ranking; failed models have NaN and a ``note``.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> both = with_failures(rank({"a": linear.as_vae()}, linear.sample(5)), {"b": "the loss became nan"})
        >>> both.model.values.tolist(), both.note.values.tolist()
        (['a', 'b'], ['', 'the loss became nan'])
    """
    names = [str(name) for name in ranked.model.values]
    every = ranked.reindex(model=[*names, *failures], fill_value={"kind": "", "note": ""})
    return every.assign(note=("model", [*("" for _ in names), *failures.values()]))


def ranking_table(ranked: xr.Dataset) -> Table:
    """Tabulate a ranking, a row per model, best first.

    A notebook displays the table; a script prints it with ``rich.print``.

    Args:
        ranked: from :func:`rank`.

    Returns:
        The table, of the library rich.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> ranking_table(rank({"a": linear.as_vae()}, linear.sample(5))).row_count
        1
    """
    caution = ranked.attrs["caution"]
    errors = f"±: standard error over {_over(ranked)}; that of a difference is paired."
    table = Table(
        title=f"log p(x) per held-out datum ({ranked.attrs['data']} data{_distinct(ranked)}, "
        f"{ranked.attrs['num_particles']} {_draws(ranked)}"
        f"{f', {seeds} seeds' if (seeds := ranked.attrs['seeds']) > 1 else ''})",
        caption=" ".join(filter(None, [errors, _low(ranked), caution])),
        box=box.SIMPLE,
    )
    table.add_column("model", overflow="fold")
    table.add_column("nats", justify="right", no_wrap=True)
    table.add_column("difference from best", justify="right", no_wrap=True)
    if has_khat := "bad_khat" in ranked and bool(ranked.bad_khat.notnull().any()):
        table.add_column(f"k̂ > {BAD}", justify="right", no_wrap=True)
    for name in ranked.model.values:
        row = ranked.sel(model=name)
        label = escape(f"{name} ({row.kind.item()})" if caution and row.kind.item() else str(name))
        if row.note.item():
            table.add_row(label, "diverged")
            continue
        behind = format_estimate(row.difference.item(), row.difference_se.item(), over="") if row.difference < 0 else ""
        cells = [format_estimate(row.log_evidence.item(), row.se.item(), over=""), behind]
        table.add_row(label, *cells, *[f"{row.bad_khat.item():.0%}"] * has_khat)
    return table


def _draws(ranked: xr.Dataset) -> str:
    """Name the draws of a datum."""
    if (method := ranked.attrs.get("method", "iw")) == "iw":
        return "particles"
    return f"{'chains' if method.startswith('ais') else 'particles'}, {method}"


def _low(ranked: xr.Dataset) -> str:
    """Explain the shares of k̂ if one is large."""
    if "bad_khat" not in ranked or not (ranked.bad_khat > MANY_BAD).any():
        return ""
    annealed = str(ranked.attrs.get("method")).startswith("ais")
    remedy = "temperatures, or chains" if annealed else 'particles, or method="ais" in Python'
    return f"Where k̂ is above {BAD}, log p(x) is probably too low; take more {remedy}."


def _over(ranked: xr.Dataset) -> str:
    """Say what the standard errors are over."""
    return "data and seeds" if ranked.attrs["seeds"] > 1 else "data"


def _distinct(ranked: xr.Dataset) -> str:
    distinct = ranked.attrs["distinct"]
    return f" in {distinct} distinct rows" if distinct < ranked.attrs["data"] else ""


def ranking_figure(ranked: xr.Dataset) -> "Figure":
    """Plot the difference of each VAE from the best, with two standard errors of the paired difference.

    Args:
        ranked: from :func:`rank`.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> _ = ranking_figure(rank({"a": linear.as_vae()}, linear.sample(5)))
    """
    count = ranked.sizes["model"]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.6 + 0.42 * count), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="#777777", lw=1)
    axes.errorbar(
        ranked.difference, range(count), xerr=2 * ranked.difference_se, fmt="o", color="#0072B2", capsize=4, ms=6
    )
    axes.set_yticks(range(count), [_label(ranked.sel(model=name)) for name in ranked.model.values], parse_math=False)
    axes.invert_yaxis()
    best = ranked.isel(model=0)
    value = format_estimate(best.log_evidence.item(), best.se.item(), "nats per datum", over="")
    axes.set(
        xlabel="log p(x) per held-out datum, difference from the best (nats)",
        title=f"Best: {value} (bars: ± 2 standard errors, over {_over(ranked)})",
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3, axis="x")
    if ranked.attrs["caution"]:
        figure.supxlabel(ranked.attrs["caution"], fontsize=9)
    return figure


def _label(row: xr.Dataset) -> str:
    return f"{row.model.item()}{' (diverged)' if row.note.item() else ''}"
