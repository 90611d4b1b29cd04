"""``check``: run all diagnostics of a VAE on held-out data within a time budget, and print a verdict."""

import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded, validate_seed
from pyro_vae.core.format import Console
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import above_zero, takes_settings, whole
from pyro_vae.data.fingerprint import row_hashes, trained_on
from pyro_vae.data.repeats import warn_of_too_small_errors
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.diagnose import DIAGNOSTICS, CheckInput, Finding
from pyro_vae.diagnose.datatree import to_datatree
from pyro_vae.elbo import log_weights
from pyro_vae.errors import DataError, ModelError, SettingsError

PILOT = 32
"""The number of particles to measure the time of an evaluation with."""
CLOCK = "clock"
"""The name of the seconds that a check has spent, kept beside its diagnostics."""
FEWEST_DRAWS = 4
"""A p-value uses at least 5 times this many replicated data sets."""


OF_Q = ("khat", "reconstructions", "sbc")
"""Diagnostics that detect that q is wrong; the inference gaps show the reason."""
WHY = "see the inference gaps below, which separate the loss of the family of q from that of the encoder"


@dataclass
class Checked:
    """The results so far."""

    groups: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@takes_settings
def check(
    vae: Amortized,
    x: Any,
    *,
    history: xr.Dataset | None = None,
    train: Any = None,
    gold: int = 2,
    draws: int = 100,
    budget: float = 180.0,
    seed: int = 0,
    progress: bool = False,
    keep: MutableMapping[str, xr.Dataset] | None = None,
) -> xr.DataTree:
    """Run all diagnostics of a trained VAE, and print what is fine, what is not, and what to try next.

    .. math:: q(z|x) \\approx p(z|x)? \\qquad \\tilde x \\sim x? \\qquad z \\text{ used}? \\qquad \\text{converged}?

    The workflow of Gelman et al.: the importance weights of q, simulation-based calibration,
    posterior and prior predictive checks, collapse, the inference gaps, NUTS as a gold standard for a few data, and
    the convergence of training. The verdict is printed.

    Args:
        vae: a trained VAE or :class:`pyro_vae.Pair`. Diagnostics that the model does not allow (NUTS of discrete
            latents, inference gaps of an unknown variational family, draws of data from a model that uses the values of
            x other than as ``obs=x``) are left out and listed with the reason.
        x: held-out data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context, mask and row
            labels, by which findings name data; at least two, and a few hundred are enough. The verdict says if some
            are training data.
        history: the history of the fit, to judge convergence.
        train: the training data, for the baselines; by default these are fitted to other parts of ``x``.
        gold: the number of data to sample with NUTS, the first of ``x``.
        draws: the number of posterior draws per datum in the groups for ArviZ; there are five times as many replicated
            data sets.
        budget: the time limit in seconds. Diagnostics that would exceed the remaining time are left out and listed.
        seed: of all draws.
        progress: whether to print each diagnostic before it runs.
        keep: a mapping for the result of each diagnostic, such as a ``dict``. Results that it already has are not
            computed again: pass it again after Ctrl-C, with the same VAE, data and settings.

    Returns:
        ArviZ's groups from :func:`~pyro_vae.to_datatree`, a group for each diagnostic, and
        ``findings`` (about, level, why, next).

    Raises:
        DataError: if there are fewer than two data, or the data are not finite numbers in rows or are outside the
            support of the likelihood.
        ModelError: if the VAE does not fit the data.
        SettingsError: if a setting is out of its range.

    References:
        | Bayesian Workflow (Gelman et al., 2020), https://arxiv.org/abs/2011.01808

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)
        >>> tree = pv.check(linear.as_vae(), linear.sample(30), gold=0, draws=60, budget=2)
        Verdict: ...
        >>> findings(tree)[0].level
        'fine'
    """
    validate_seed(seed)
    whole("gold", gold, 0)
    whole("draws", draws, FEWEST_DRAWS)
    above_zero("budget", budget)
    _validate_history(history)
    x = data_for(vae, x)
    given, console = rows_for(vae, x), Console(stderr=True, quiet=not progress)
    if len(given) < 2:
        raise DataError("there is only one datum; pass at least 2, since most diagnostics need a spread over data")
    warn_of_too_small_errors(given, source="x", stacklevel=3)
    rows = given.like(vae)
    kept: MutableMapping[str, xr.Dataset] = {} if keep is None else keep
    started, found = time.perf_counter() - _seconds(kept, "spent"), Checked()
    evaluation = _seconds(kept, "evaluation") or _measure_evaluation(vae, rows, seed)
    gold = min(gold, len(rows))
    check_input = CheckInput(vae, x, rows, evaluation, history, gold, draws, seed, train)
    for diagnostic in DIAGNOSTICS:
        if not diagnostic.applies(check_input):
            found.left_out += [f"{diagnostic.about} (needs {diagnostic.needs})"] if diagnostic.needs else []
            continue
        seconds = diagnostic.seconds(check_input)
        title = f"{diagnostic.about} (about {seconds:.0f} s)"
        left = budget - (time.perf_counter() - started)
        if diagnostic.name not in kept and seconds > max(budget / 50, left):  # always run the fast diagnostics
            found.left_out.append(title)
            continue
        if diagnostic.name not in kept:
            console.print(f"{title} ...")
            try:
                result = diagnostic.run(check_input)
            except ModelError as error:  # such as latents that NUTS cannot move, or a guide of unknown family
                if not found.findings:
                    raise  # the first diagnostic needs nothing but log-weights
                found.left_out.append(f"{diagnostic.about} ({error})")
                continue
            kept[CLOCK] = xr.Dataset({"evaluation": evaluation, "spent": time.perf_counter() - started})
            kept[diagnostic.name] = result
        found.groups[diagnostic.name] = kept[diagnostic.name]
        found.findings[diagnostic.name] = diagnostic.judge(found.groups[diagnostic.name])
    found.findings = _defer_to_gaps(found.findings)
    table = _as_dataset(found, seed, len(rows), trained_on(vae, row_hashes(given), getattr(x, "row_labels", None)))
    table.attrs |= {"model": _describe(vae), "chosen_epoch": _chosen_epoch(history)}
    arviz = to_datatree(vae, x, draws=draws, prior_draws=draws, seed=seed)
    tree = xr.DataTree.from_dict({**arviz.to_dict(), **found.groups, "findings": table})
    Console().print(verdict(tree), soft_wrap=True)
    return tree


def _seconds(kept: Mapping[str, xr.Dataset], name: str) -> float:
    """Return the seconds that an interrupted check measured; 0 for a new check."""
    return float(kept[CLOCK][name]) if CLOCK in kept else 0.0


def _defer_to_gaps(found: dict[str, Finding]) -> dict[str, Finding]:
    """Replace the advice on q by a reference to the gaps, if these find a fault of the family or the encoder."""
    if "gaps" not in found or found["gaps"].level == "fine":
        return found
    return {name: replace(one, next=WHY) if one.next and name in OF_Q else one for name, one in found.items()}


def _chosen_epoch(history: xr.Dataset | None) -> int:
    """Return the epoch whose weights validation data chose, or 0 if it is the last one or none was chosen."""
    chosen = 0 if history is None else int(history.attrs.get("weights_epoch", 0))
    return chosen if history is not None and chosen < history.sizes["epoch"] else 0


def _describe(vae: Amortized) -> str:
    """Describe the parts of a model and its size."""
    named = ", ".join(f"{role} {name}" for role, name in vae.part_names().items())
    return f"{named}; {sum(parameter.numel() for parameter in vae.parameters()):,} parameters"


@torch.no_grad()
def _measure_evaluation(vae: Amortized, rows: Rows, seed: int) -> float:
    """Measure the seconds to evaluate log p(x, z) - log q(z | x) for one z of one datum; the best of five trials."""
    part, seconds = rows.take(slice(100)), []
    with seeded(seed, rows.x.device), evaluating(vae, PILOT * len(part)):
        for _ in range(5):
            started = time.perf_counter()
            float(log_weights(vae.model, vae.guide, *part.arguments(), num_particles=PILOT).sum())
            seconds.append(time.perf_counter() - started)
    return min(seconds) / (PILOT * len(part))


def is_history(found: Any) -> bool:
    """Return whether an object is the history of a fit, or of its iterates.

    Example:
        >>> is_history(xr.Dataset({"train_elbo": ("epoch", [1.0])})), is_history(xr.Dataset())
        (True, False)
    """
    if not isinstance(found, xr.Dataset) or "epoch" not in found.sizes or not {"train_elbo", "value"} & {*found}:
        return False
    columns = {"train_elbo", "validation_elbo", "validation_below_best", "validation_below_best_se"}
    known = columns & {*found}
    kept = found.attrs.get("weights_epoch", 0)
    return (
        all(found[name].dims == ("epoch",) and found[name].dtype.kind in "fiu" for name in known)
        and ("validation_below_best" not in known or known == columns)
        and found.epoch.dtype.kind in "iu"
        and isinstance(kept, int | np.integer)
    )


def _validate_history(history: Any) -> None:
    """Raise a SettingsError if the history is not one, before any diagnostic runs."""
    if history is None:
        return
    if not is_history(history):
        raise SettingsError("history holds no ELBO by epoch; pass the history of a fit, or None")


def _as_dataset(found: Checked, seed: int, data: int, trained: str = "") -> xr.Dataset:
    every = found.findings.values()
    columns = {name: [getattr(finding, name) for finding in every] for name in ("level", "why", "next")}
    return xr.Dataset(
        {name: ("about", values) for name, values in columns.items()},
        coords={"about": [finding.about for finding in every], "group": ("about", list(found.findings))},
        attrs={"left_out": "; ".join(found.left_out), "trained_on": trained, "seed": seed, "data": data, **versions()},
    )


def findings(tree: xr.DataTree) -> list[Finding]:
    """Return the findings of :func:`check` from its tree.

    Example:
        >>> one = Checked(findings={"q": Finding("q", "fine", "x")})
        >>> tree = xr.DataTree.from_dict({"findings": _as_dataset(one, 0, 9)})
        >>> findings(tree)[0].level
        'fine'
    """
    table = tree["findings"].to_dataset()
    every = (table.isel(about=i) for i in range(table.sizes["about"]))
    return [Finding(str(f.about.item()), f.level.item(), str(f.why.item()), str(f.next.item())) for f in every]


def verdict(tree: xr.DataTree) -> str:
    """Return the conclusion of :func:`check`, followed by each finding.

    Example:
        >>> one = Checked(findings={"q": Finding("q", "fine", "x")})
        >>> tree = xr.DataTree.from_dict({"findings": _as_dataset(one, 0, 9)})
        >>> print(verdict(tree))
        Verdict: 1 of 1 diagnostics is fine, on 9 data.
        fine      q: x
    """
    return "\n".join([conclusion(tree), *map(str, findings(tree))])


def conclusion(tree: xr.DataTree) -> str:
    """Return the first line of the verdict.

    Example:
        >>> one = Checked(findings={"q": Finding("q", "bad", "x")})
        >>> tree = xr.DataTree.from_dict({"findings": _as_dataset(one, 0, 9)})
        >>> conclusion(tree)
        'Verdict: 0 of 1 diagnostics are fine, on 9 data; bad: q.'
    """
    every, about = findings(tree), tree["findings"].attrs
    fine = sum(finding.level == "fine" for finding in every)
    parts = [f"{fine} of {len(every)} diagnostics {'is' if fine == 1 else 'are'} fine, on {about['data']} data"]
    for level in "bad", "doubtful":
        if named := [f.about for f in every if f.level == level]:
            parts.append(f"{level}: {', '.join(named)}")
    text = f"Verdict: {'; '.join(parts)}."
    text += "".join(
        f" {names[0].upper()}{names[1:]} point to one fault: {fault}." for fault, names in _shared_faults(tree).items()
    )
    if about.get("trained_on"):
        text += f" Training data are among them ({about['trained_on']}): results on new data may be worse."
    if chosen := about.get("chosen_epoch"):
        text += (
            f" Validation data chose the weights (epoch {chosen}): if these are the same data, results on new data may "
            "be worse."
        )
    return f"{text} Left out: {about['left_out']}." if about["left_out"] else text


def _shared_faults(tree: xr.DataTree) -> dict[str, str]:
    """Return each fault that several findings detect, with their names, so that it is not counted several times."""
    groups, faults = tree["findings"].group.values, {one.name: one.fault for one in DIAGNOSTICS if one.fault}
    detected: dict[str, list[str]] = {}
    for group, finding in zip(groups, findings(tree), strict=True):
        if finding.level != "fine" and group in faults:
            detected.setdefault(faults[group], []).append(finding.about)
    return {fault: f"{', '.join(names[:-1])} and {names[-1]}" for fault, names in detected.items() if len(names) > 1}
