"""``check``: all diagnostics of a VAE on held-out data, within a budget, and a verdict."""

import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import xarray as xr

from pyro_vae.__about__ import versions
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import refuse_seed, seeded
from pyro_vae.core.format import Console
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import above_zero, takes_settings, whole
from pyro_vae.data.fingerprint import row_hashes, trained_on
from pyro_vae.data.repeats import warn_of_too_small_errors
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.diagnose import DIAGNOSTICS, CheckInput, Finding
from pyro_vae.diagnose.datatree import to_datatree
from pyro_vae.elbo import log_weights
from pyro_vae.errors import DataError, SettingsError

PILOT = 32
"""Particles of the trial that measures what an evaluation costs."""
CLOCK = "clock"
"""The name under which the seconds that a check has spent are kept beside its diagnostics."""
FEWEST_DRAWS = 4
"""A p-value uses at least 5 times this many replicated data sets."""


OF_Q = ("khat", "reconstructions", "sbc")
"""Diagnostics that see that q is off; the inference gaps see why."""
WHY = "see inference gaps below, which tell what the family of q loses from what its encoder does"


@dataclass
class Checked:
    """What has been found so far."""

    groups: dict[str, Any] = field(default_factory=dict)
    findings: dict[str, Finding] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@takes_settings
def check(
    vae: VAE,
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
    """Look at a trained VAE from all sides, and say what is fine, what is not, how sure that is, and what to try next.

    .. math:: q(z|x) \\approx p(z|x)? \\qquad \\tilde x \\sim x? \\qquad z \\text{ used}? \\qquad \\text{converged}?

    The workflow of Gelman et al.: the importance weights of q, simulation-based calibration,
    posterior and prior predictive checks, collapse, the inference gaps, NUTS as a gold standard for a few data, and
    the training's own history. The verdict is printed.

    Args:
        vae: a trained VAE.
        x: held-out data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context, mask and row
            labels, by which findings name data; at least two, and a few hundred are enough. Where they were trained
            on, the verdict says so.
        history: of the fit, to see whether it had converged.
        train: what the VAE was trained on, for the baselines; otherwise these are fitted to other parts of ``x``.
        gold: so many of the first data are given to NUTS.
        draws: of the posterior of each datum in the groups for ArviZ; five times as many replicated data sets.
        budget: seconds. What is expected to take longer than what is left of them is left out, by name.
        seed: of all draws.
        progress: say what is being done.
        keep: what each diagnostic has found is put there as soon as it is done, and not computed again where it is
            there already: a ``dict``, say, that is given again after Ctrl-C, for the same VAE, data and settings.

    Returns:
        ArviZ's groups as :func:`~pyro_vae.to_datatree` gives them, a group for each diagnostic, and
        ``findings`` (about, level, why, next).

    Raises:
        DataError: if the data are fewer than two, not finite numbers in rows, or outside the support of the
            likelihood.
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
    refuse_seed(seed)
    whole("gold", gold, 0)
    whole("draws", draws, FEWEST_DRAWS)
    above_zero("budget", budget)
    _refuse_history(history)
    x = data_for(vae, x)
    given, console = rows_for(vae, x), Console(stderr=True, quiet=not progress)
    if len(given) < 2:
        raise DataError("there is one datum only; give at least 2, since most of what is checked is a spread over data")
    warn_of_too_small_errors(given, source="x", stacklevel=3)
    rows = given.like(vae)
    kept: MutableMapping[str, xr.Dataset] = {} if keep is None else keep
    started, found = time.perf_counter() - _seconds(kept, "spent"), Checked()
    evaluation = _seconds(kept, "evaluation") or _seconds_of_an_evaluation(vae, rows, seed)
    gold = min(gold, len(rows))
    given_to_each = CheckInput(vae, x, rows, evaluation, history, gold, draws, seed, train)
    for diagnostic in DIAGNOSTICS:
        if not diagnostic.applies(given_to_each):
            found.left_out += [f"{diagnostic.about} (it takes {diagnostic.needs})"] if diagnostic.needs else []
            continue
        seconds = diagnostic.seconds(given_to_each)
        title = f"{diagnostic.about} (about {seconds:.0f} s)"
        left = budget - (time.perf_counter() - started)
        if diagnostic.name not in kept and seconds > max(budget / 50, left):  # what takes next to nothing is run
            found.left_out.append(title)
            continue
        if diagnostic.name not in kept:
            console.print(f"{title} ...")
            result, spent = diagnostic.run(given_to_each), time.perf_counter() - started
            kept[CLOCK] = xr.Dataset({"evaluation": evaluation, "spent": spent})
            kept[diagnostic.name] = result
        found.groups[diagnostic.name] = kept[diagnostic.name]
        found.findings[diagnostic.name] = diagnostic.judge(found.groups[diagnostic.name])
    found.findings = _with_one_remedy(found.findings)
    table = _as_dataset(found, seed, len(rows), trained_on(vae, row_hashes(given), getattr(x, "row_labels", None)))
    table.attrs |= {"model": _in_words(vae), "chosen_epoch": _chosen_epoch(history)}
    arviz = to_datatree(vae, x, draws=draws, prior_draws=draws, seed=seed)
    tree = xr.DataTree.from_dict({**arviz.to_dict(), **found.groups, "findings": table})
    Console().print(verdict(tree), soft_wrap=True)
    return tree


def _seconds(kept: Mapping[str, xr.Dataset], what: str) -> float:
    """The seconds that were measured before a check was interrupted; 0 if it begins."""
    return float(kept[CLOCK][what]) if CLOCK in kept else 0.0


def _with_one_remedy(found: dict[str, Finding]) -> dict[str, Finding]:
    """Have the gaps alone say how to mend q, where they say that family or encoder is at fault."""
    if "gaps" not in found or found["gaps"].level == "fine":
        return found
    return {name: replace(one, next=WHY) if one.next and name in OF_Q else one for name, one in found.items()}


def _chosen_epoch(history: xr.Dataset | None) -> int:
    """The epoch before the last whose weights validation data chose; 0 if they chose none."""
    kept = 0 if history is None else int(history.attrs.get("weights_epoch", 0))
    return kept if history is not None and kept < history.sizes["epoch"] else 0


def _in_words(vae: VAE) -> str:
    """The parts of a VAE and its size."""
    parts = {"prior": vae.prior, "likelihood": vae.decoder, "posterior": vae.encoder}
    named = ", ".join(f"{role} {type(part).__name__}" for role, part in parts.items())
    return f"{named}; {sum(parameter.numel() for parameter in vae.parameters()):,} parameters"


@torch.no_grad()
def _seconds_of_an_evaluation(vae: VAE, rows: Rows, seed: int) -> float:
    """Of log p(x, z) - log q(z | x) for one datum and one z, among many; the best of five trials."""
    part, seconds = rows.take(slice(100)), []
    with seeded(seed, rows.x.device), evaluating(vae, PILOT * len(part)):
        for _ in range(5):
            started = time.perf_counter()
            float(log_weights(vae.model, vae.guide, *part.arguments(), num_particles=PILOT).sum())
            seconds.append(time.perf_counter() - started)
    return min(seconds) / (PILOT * len(part))


def is_history(found: Any) -> bool:
    """Whether something is the history of a fit, or of its iterates.

    Example:
        >>> is_history(xr.Dataset({"train_elbo": ("epoch", [1.0])})), is_history(xr.Dataset())
        (True, False)
    """
    return isinstance(found, xr.Dataset) and "epoch" in found.sizes and bool({"train_elbo", "value"} & set(found))


def _refuse_history(history: Any) -> None:
    """Refuse what is no history, before anything is run."""
    if history is None:
        return
    if not is_history(history):
        raise SettingsError("history holds no ELBO by epoch; give the history of what fit returned, or None")


def _as_dataset(found: Checked, seed: int, data: int, trained: str = "") -> xr.Dataset:
    every = found.findings.values()
    columns = {name: [getattr(finding, name) for finding in every] for name in ("level", "why", "next")}
    return xr.Dataset(
        {name: ("about", values) for name, values in columns.items()},
        coords={"about": [finding.about for finding in every], "group": ("about", list(found.findings))},
        attrs={"left_out": "; ".join(found.left_out), "trained_on": trained, "seed": seed, "data": data, **versions()},
    )


def findings(tree: xr.DataTree) -> list[Finding]:
    """What :func:`check` found, as it is kept in its tree.

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
    """The conclusion of :func:`check`: how many of the questions are answered well, then each answer.

    Example:
        >>> one = Checked(findings={"q": Finding("q", "fine", "x")})
        >>> tree = xr.DataTree.from_dict({"findings": _as_dataset(one, 0, 9)})
        >>> print(verdict(tree))
        Verdict: of 1 question 1 is fine, by 9 data.
        fine      q: x
    """
    return "\n".join([conclusion(tree), *map(str, findings(tree))])


def conclusion(tree: xr.DataTree) -> str:
    """The first line of the verdict.

    Example:
        >>> one = Checked(findings={"q": Finding("q", "bad", "x")})
        >>> tree = xr.DataTree.from_dict({"findings": _as_dataset(one, 0, 9)})
        >>> conclusion(tree)
        'Verdict: of 1 question 0 are fine; bad: q, by 9 data.'
    """
    every, about = findings(tree), tree["findings"].attrs
    fine = sum(finding.level == "fine" for finding in every)
    parts = [f"of {len(every)} question{'s' * (len(every) != 1)} {fine} {'is' if fine == 1 else 'are'} fine"]
    for level in "bad", "doubtful":
        if named := [f.about for f in every if f.level == level]:
            parts.append(f"{level}: {', '.join(named)}")
    text = f"Verdict: {'; '.join(parts)}, by {about['data']} data."
    text += "".join(
        f" {views[0].upper()}{views[1:]} see one fault: {fault}." for fault, views in _seen_by_several(tree).items()
    )
    if about.get("trained_on"):
        text += f" They were trained on ({about['trained_on']}): new data may fare worse."
    if chosen := about.get("chosen_epoch"):
        text += f" Validation data chose the weights (epoch {chosen}): if they are these data, new data may fare worse."
    return f"{text} Left out: {about['left_out']}." if about["left_out"] else text


def _seen_by_several(tree: xr.DataTree) -> dict[str, str]:
    """Each fault that more than one finding sees, with their names, so that it is not counted as several."""
    groups, faults = tree["findings"].group.values, {one.name: one.fault for one in DIAGNOSTICS if one.fault}
    views: dict[str, list[str]] = {}
    for group, finding in zip(groups, findings(tree), strict=True):
        if finding.level != "fine" and group in faults:
            views.setdefault(faults[group], []).append(finding.about)
    return {fault: f"{', '.join(names[:-1])} and {names[-1]}" for fault, names in views.items() if len(names) > 1}
