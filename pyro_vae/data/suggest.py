"""Propose a likelihood for each column of a table from its values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rich import box
from rich.table import Table
from torch import Tensor

from pyro_vae.core.format import as_text, format_rounded
from pyro_vae.data.readers import load
from pyro_vae.data.values import Data
from pyro_vae.likelihoods import (
    Bernoulli,
    Blocks,
    Categorical,
    ContinuousBernoulli,
    Likelihood,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
)
from pyro_vae.likelihoods.blocks import Block
from pyro_vae.likelihoods.counts import MOST

HEAVY = 3.0
"""Tails are heavy if the excess kurtosis is above that of a Laplace distribution."""

FAR = 10
"""Overdispersed whole numbers of at least this are measurements, not counts."""

MOST_LEVELS = 20
"""Underdispersed whole numbers from 0 on are levels if there are at most this many."""

LEARNED: dict[str, Any] = {"scale": 0.5, "learn_scale": True}
"""The settings of a learned scale, one per column."""


@dataclass(frozen=True)
class Proposal:
    """A proposed likelihood for columns, with the reason.

    Args:
        columns: the names of the columns, or their numbers as text.
        likelihood: the class of the likelihood.
        reason: the deciding figure, in words.
        settings: the settings of the likelihood.

    Example:
        >>> str(Proposal(["colour"], Categorical, "3 names", {"levels": 3}))
        'Categorical(levels=3)'
    """

    columns: Sequence[str]
    likelihood: type[Likelihood]
    reason: str
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={self.settings[name]:g}" for name in ("df", "levels") if name in self.settings)
        return self.likelihood.__name__ + (f"({shown})" if shown else "")

    def like(self, other: "Proposal") -> bool:
        """Return whether two proposals have the same likelihood and settings."""
        return (self.likelihood, self.settings) == (other.likelihood, other.settings)


@dataclass(frozen=True)
class Suggestion:
    """The likelihoods that :func:`suggest` proposes; ``print`` shows them as a table.

    Args:
        proposals: the proposals in the order of the columns.

    Example:
        >>> few = Suggestion([Proposal(["a"], Normal, "numbers"), Proposal(["b", "c"], Normal, "numbers")])
        >>> [n for _, n in few.blocks], few.outputs
        ([3], 3)
    """

    proposals: Sequence[Proposal]

    @property
    def kinds(self) -> list[Proposal]:
        """The proposals, merged over consecutive columns with the same likelihood and settings."""
        runs: list[list[Proposal]] = []
        for proposal in self.proposals:
            if runs and runs[-1][0].like(proposal):
                runs[-1].append(proposal)
            else:
                runs.append([proposal])
        return [_merged(run) for run in runs]

    @property
    def blocks(self) -> list[Block]:
        """The blocks that :class:`~pyro_vae.likelihoods.Blocks` takes."""
        return [
            (partial(kind.likelihood, **kind.settings) if kind.settings else kind.likelihood, len(kind.columns))
            for kind in self.kinds
        ]

    @property
    def outputs(self) -> int:
        """The number of outputs that the decoder network needs."""
        return Blocks.outputs(sum(len(proposal.columns) for proposal in self.proposals), blocks=self.blocks)

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE, padding=0, pad_edge=False, show_edge=False)
        table.add_column("column", max_width=21, overflow="fold")
        table.add_column("likelihood", no_wrap=True)
        table.add_column("reason", max_width=32)
        for proposal in self.proposals:
            first, last = proposal.columns[0], proposal.columns[-1]
            table.add_row(first if len(proposal.columns) == 1 else f"{first} to {last}", str(proposal), proposal.reason)
        return as_text(table)


def _merged(proposals: Sequence[Proposal]) -> Proposal:
    """Merge proposals of the same likelihood; a learned scale becomes one scale per column."""
    names = [name for proposal in proposals for name in proposal.columns]
    settings, reasons = dict(proposals[0].settings), dict.fromkeys(proposal.reason for proposal in proposals)
    if settings.get("learn_scale"):
        settings["per_feature"] = len(names)
    return Proposal(names, proposals[0].likelihood, "; ".join(reasons), settings)


def suggest(data: Any) -> Suggestion:
    """Propose a likelihood for each column, with the reason.

    Categories become Categorical; 0 and 1 become Bernoulli. Whole numbers from 0 on become counts, depending on their
    index of dispersion :math:`D = s^2 / m`, which is in :math:`1 \\pm 2 \\sqrt{2 / (n - 1)}` for a Poisson
    distribution. Above, the proposal is NegativeBinomial if the smallest number is below 10. Below, where no mixture of
    Poisson distributions lies, it is Categorical if the largest number is below 20. All other columns become Normal,
    or StudentT if the excess kurtosis is above 3. All pixels of images have the same likelihood: ContinuousBernoulli
    for grey levels from 0 to 1.

    The marginal distribution of a column does not show how it varies given the latents, so a proposal is a starting
    point.

    Args:
        data: :class:`~pyro_vae.data.Data`, or an input of :func:`~pyro_vae.data.load`; missing values are left out.

    Returns:
        The proposals. ``.blocks`` is the input of :class:`~pyro_vae.likelihoods.Blocks`, ``.outputs`` the number of
        outputs that the decoder network needs, and ``print`` shows a table.

    Raises:
        DataError: if the data cannot be used.

    References:
        | Statistical Methods for Research Workers (Fisher, 1925), chapter III,
          http://psychclassics.yorku.ca/Fisher/Methods/chap3.htm
        | Handling Incomplete Heterogeneous Data Using VAEs (Nazábal et al., 2018), https://arxiv.org/abs/1807.03653

    Example:
        >>> suggestion = suggest({"size": [1.5, 2.5, 4.0, 2.0], "visits": [1, 3, 0, 2], "ill": [0, 1, 1, 0]})
        >>> print(suggestion)
        column likelihood reason
        ─────────────────────────────────────────────
        size   Normal     excess kurtosis -1.0
        visits Poisson    variance 1.1 times the mean
        ill    Bernoulli  only 0 and 1
        >>> suggestion.outputs
        3
    """
    data = data if isinstance(data, Data) else load(data, missing=[])
    x = data.x.double().flatten(1)
    seen = ~x.isnan() if data.mask is None else data.mask.flatten(1)
    names = [*map(str, range(x.shape[1]) if data.columns is None else data.columns)]
    if data.image_shape is not None:
        return Suggestion([_propose_for_images(x[seen], names)])
    known = data.categories
    return Suggestion([_propose_for_column(x[seen[:, i], i], name, known.get(name)) for i, name in enumerate(names)])


def _propose_for_column(values: Tensor, name: str, known: Sequence[str] | None) -> Proposal:
    if known is not None:
        levels = max(2, len(known))
        return Proposal([name], Categorical, f"{len(known)} name{'s' if len(known) > 1 else ''}", {"levels": levels})
    if not len(values):
        return Proposal([name], Normal, "no value is observed: drop it", {"scale": 1.0})
    if _are_bits(values):
        return Proposal([name], Bernoulli, _describe_bits(values))
    counts = _propose_for_counts(values, name) if _are_counts(values) else None
    return counts or _propose_for_numbers(values, name)


def _propose_for_images(values: Tensor, names: Sequence[str]) -> Proposal:
    """Propose one likelihood for all pixels."""
    if _are_bits(values):
        return Proposal(names, Bernoulli, _describe_bits(values))
    if bool(((values >= 0) & (values <= 1)).all()):
        return Proposal(names, ContinuousBernoulli, "grey levels from 0 to 1")
    return Proposal(names, Normal, "pixels of images", dict(LEARNED))


def _are_bits(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _describe_bits(values: Tensor) -> str:
    return "only 0 and 1" if len(values.unique()) > 1 else f"always {int(values[0])}: drop it"


def _are_counts(values: Tensor) -> bool:
    return bool(((values >= 0) & (values <= MOST) & (values == values.floor())).all())


def _propose_for_counts(values: Tensor, name: str) -> Proposal | None:
    """Propose a likelihood for whole numbers from 0 on; None if they look like measurements."""
    least, most = int(values.min()), int(values.max())
    if least == most:
        return None
    dispersion, band = float(values.var() / values.mean()), 2 * math.sqrt(2 / (len(values) - 1))
    reason = f"variance {format_rounded(dispersion, math.nan)} times the mean"
    if abs(dispersion - 1) <= band:
        return Proposal([name], Poisson, reason)
    if dispersion > 1 and least < FAR:
        return Proposal([name], NegativeBinomial, reason)
    if dispersion < 1 and most < MOST_LEVELS:
        return Proposal([name], Categorical, f"{reason}: levels 0 to {most}", {"levels": most + 1})
    return None


def _propose_for_numbers(values: Tensor, name: str) -> Proposal:
    centered = values - values.mean()
    variance = centered.square().mean()
    if values.min() == values.max():
        reason = f"always {format_rounded(values[0].item(), math.nan)}, so its scale is fixed: drop it"
        return Proposal([name], Normal, reason, {"scale": 1.0})
    if len(values.unique()) == 2:
        return Proposal([name], Normal, "only 2 values: recode them as 0 and 1", dict(LEARNED))
    kurtosis = float(centered.pow(4).mean() / variance.square()) - 3
    whole = f"whole numbers from {int(values.min())} on, " if _are_counts(values) else ""
    reason = f"{whole}excess kurtosis {format_rounded(kurtosis, math.nan)}"
    if kurtosis > HEAVY:
        return Proposal([name], StudentT, reason, {"df": 4.0, **LEARNED})
    return Proposal([name], Normal, reason, dict(LEARNED))
