"""Rank VAEs with different components by their evidence of held-out data."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from rich import box
from rich.markup import escape
from rich.table import Table

from pyro_vae.core.format import format_estimate
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings
from pyro_vae.data.fingerprint import row_hashes, validate_not_trained_on
from pyro_vae.data.repeats import clustered_error, count, distinct_rows, warn_of_duplicates
from pyro_vae.data.rows import rows_for
from pyro_vae.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from pyro_vae.evidence import log_evidence
from pyro_vae.evidence.atoms import MEANING, atoms, warn_of_atoms
from pyro_vae.evidence.kinds import CAUTION, countable_features, differing, kind


@takes_settings
def rank(vaes: Mapping[str, VAE | Sequence[VAE]], x: Any, *, num_particles: int = 500, seed: int = 0) -> xr.Dataset:
    """Rank trained VAEs by the evidence of held-out data, best first.

    .. math:: \\frac1n \\sum_i \\log p(x_i), \\qquad \\Delta_m = \\frac1n \\sum_i \\log p_m(x_i) - \\log p_{best}(x_i)

    The standard errors are over data (and include the Monte-Carlo error); the error of a difference is paired. They
    are clustered by distinct row: duplicate rows in ``x`` are not independent data, and a
    :class:`~pyro_vae.errors.DuplicateRowsWarning` is given. Densities and probabilities are not comparable: if a
    feature has a density under one model and a probability under another, the attribute ``caution`` names it.

    If each model was trained with several seeds, log p(x) is the mean over seeds, and the errors include the spread
    over seeds: :math:`\\sqrt{s_x^2 / n + s_{seed}^2 / S}` for n data and S seeds.

    Args:
        vaes: name → trained VAE, or a list of VAEs that differ only in their seed, of equal length for each name.
        x: held-out data, shape ``(datum, *features)``, at least 2.
        num_particles: of the importance-weighted bound.
        seed: of the particles.

    Returns:
        A dataset over ``model``, best first: ``log_evidence``, ``se``, ``difference``, ``difference_se``,
        in nats per datum; ``mcse``, the root mean square of the Monte-Carlo errors per datum; ``kind``, whether
        p(x) is a probability, a density or both; ``seed_log_evidence``, per seed if there are several; ``note``, empty
        (see :func:`with_failures`).

    Raises:
        DataError: if the data are not finite numbers in rows, outside the support of a likelihood, or were trained on.
        ModelError: if a VAE does not match the data.
        SettingsError: if there is no VAE, or only one datum.

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
    if not vaes:
        raise SettingsError("vaes is empty; pass at least one VAE")
    several = {name: [vae] if isinstance(vae, VAE) else list(vae) for name, vae in vaes.items()}
    if len(sizes := {len(trained) for trained in several.values()}) > 1 or 0 in sizes:
        raise SettingsError(f"vaes: the models have {sorted(sizes)} seeds; pass equally many for each, at least 1")
    checked = {name: rows_for(trained[0], x) for name, trained in several.items()}  # before any is evaluated
    validate_several_rows(len(next(iter(checked.values()))))
    for name, trained in several.items():
        for vae in trained:
            validate_not_trained_on(
                vae, row_hashes(checked[name]), getattr(x, "row_labels", None), name=name, source="x"
            )
    countable = {name: countable_features(trained[0], checked[name]) for name, trained in several.items()}
    found = {
        name: [log_evidence(vae, x, num_particles=num_particles, seed=seed) for vae in trained]
        for name, trained in several.items()
    }
    every = np.stack([[one.log_evidence.values for one in each] for each in found.values()])  # (model, seed, datum)
    order = np.argsort(-every.mean((1, 2)), kind="stable")
    every, names = every[order], [list(found)[i] for i in order]
    each, apart = every.mean(1), (every - every[0]).mean(1)
    probabilities = [name for name in names if all(countable[name])]
    rows = next(iter(checked.values()))
    number = distinct_rows(rows, each[names.index(probabilities[0])] if probabilities else None)
    remedy = "standard errors are clustered by distinct row"
    warn_of_duplicates(number, source="x", remedy=remedy, stacklevel=3)
    unlike = differing(countable, getattr(x, "columns", None))
    shared = atoms(rows, countable.values(), getattr(x, "columns", None)) if len(several) > 1 else ""
    warn_of_atoms(shared, source="x", stacklevel=3)
    nats = {"units": "nats per datum"}
    ranked = xr.Dataset(
        {
            "log_evidence": ("model", each.mean(1), nats),
            "se": ("model", _error(every, number), nats),
            "difference": ("model", apart.mean(1), nats),
            "difference_se": ("model", _error(every - every[0], number), nats),
            "mcse": ("model", [_mcse(found[name]) for name in names], {"units": "nats"}),
            "datum_log_evidence": (("model", "datum"), each, {"units": "nats"}),
            "kind": ("model", [kind(countable[name]) for name in names]),
        },
        {"model": names},
        {
            "num_particles": num_particles,
            "seed": seed,
            "data": each.shape[1],
            "distinct": count(number),
            "seeds": every.shape[1],
            "caution": f"{CAUTION} {unlike[0].upper()}{unlike[1:]}."
            if unlike
            else f"{shared}; {MEANING}"
            if shared
            else "",
            "atoms": shared,
        },
    )
    if every.shape[1] > 1:
        ranked["seed_log_evidence"] = ("model", "seed"), every.mean(2), nats
    return with_failures(ranked, {})


def _error(every: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Compute the standard error of the mean over seeds and data, of values with dims ``(model, seed, datum)``."""
    seeds = every.shape[1]
    of_data = clustered_error(every.mean(1), number) ** 2
    return np.sqrt(of_data + (every.mean(2).var(1, ddof=1) / seeds if seeds > 1 else 0.0))


def _mcse(found: Sequence[xr.Dataset]) -> float:
    return float(np.sqrt(np.mean([(one.mcse**2).mean() for one in found]) / len(found)))


def validate_several_rows(rows: int) -> None:
    """Raise if there are too few held-out data for a standard error.

    Example:
        >>> validate_several_rows(2)
    """
    if rows < 2:
        raise SettingsError("there is 1 held-out datum; standard errors need at least 2")


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
    table = Table(
        title=f"log p(x) per held-out datum ({ranked.attrs['data']} data{_distinct(ranked)}, "
        f"{ranked.attrs['num_particles']} particles"
        f"{f', {seeds} seeds' if (seeds := ranked.attrs['seeds']) > 1 else ''})",
        caption=f"±: standard error over {_over(ranked)}; that of a difference is paired. {caution}".strip(),
        box=box.SIMPLE,
    )
    table.add_column("model", overflow="fold")
    table.add_column("nats", justify="right", no_wrap=True)
    table.add_column("difference from best", justify="right", no_wrap=True)
    for name in ranked.model.values:
        row = ranked.sel(model=name)
        label = escape(f"{name} ({row.kind.item()})" if caution and row.kind.item() else str(name))
        if row.note.item():
            table.add_row(label, "diverged", "")
            continue
        behind = format_estimate(row.difference.item(), row.difference_se.item(), over="") if row.difference < 0 else ""
        table.add_row(label, format_estimate(row.log_evidence.item(), row.se.item(), over=""), behind)
    return table


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
    axes.set_yticks(range(count), [_label(ranked.sel(model=name)) for name in ranked.model.values])
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
