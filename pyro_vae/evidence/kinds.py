"""Which features of p(x) are densities and which probabilities: the two cannot be compared."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import xarray as xr

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded
from pyro_vae.core.pair import Amortised
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import samples, traces
from pyro_vae.elbo.kl import base
from pyro_vae.likelihoods._distributions import Side

CAUTION = "Densities and probabilities are not in the same units: compare models of one kind only."
NOT_KNOWN = "not known"


@torch.no_grad()
def countable_features(vae: Amortised, rows: Rows) -> tuple[bool, ...]:
    """Whether the values of each feature are countable: they then have a probability and not a density.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
        >>> countable_features(vae, Rows(torch.zeros(3, 2)))
        (False, False)
    """
    one = Rows(rows.x, rows.context).take(slice(1)).like(vae)
    with seeded(0, one.x.device), evaluating(vae, len(one)):
        sites = [site for _, site in samples(traces(vae.model, vae.guide, *one.arguments())[0]) if site["is_observed"]]
    found = [flag for site in sites for flag in _countable(site["fn"], site["value"].numel())]
    return tuple(found) if len(found) == rows.x[0].numel() else (all(found),) * rows.x[0].numel()


def _countable(likelihood: Any, size: int) -> list[bool]:
    """Whether each of so many values of a site is countable."""
    features = base(likelihood)
    parts, sizes = (features.parts, features.sizes) if isinstance(features, Side) else ([features], [size])
    return [_is_discrete(part) for part, n in zip(parts, sizes, strict=True) for _ in range(n)]


def _is_discrete(d: Any) -> bool:
    """Whether a distribution is of countable values; one that does not say is taken for a density."""
    try:
        return bool(d.support.is_discrete)
    except NotImplementedError:
        return False


def kind(features: tuple[bool, ...]) -> str:
    """What :func:`countable_features` says, in a word.

    Example:
        >>> kind((True, True)), kind((True, False)), kind((False,))
        ('probability', 'both', 'density')
    """
    return "probability" if all(features) else "both" if any(features) else "density"


def as_text(features: tuple[bool, ...]) -> str:
    """What :func:`countable_features` says, as an attribute of a dataset: runs of equal kind.

    Example:
        >>> as_text((False, False, True))
        'density:2 probability:1'
    """
    return " ".join(f"{kind((value,))}:{len([*run])}" for value, run in groupby(features))


def known_features(found: xr.Dataset, size: int) -> tuple[bool, ...] | None:
    """Which features of saved evidence are countable, or None if it does not say so for each of them.

    Args:
        found: from :func:`pyro_vae.log_evidence`; one that was saved before the attribute ``countable`` existed
            has its ``kind`` only, which says it unless that is "both".
        size: the number of features.

    Example:
        >>> known_features(xr.Dataset(attrs={"countable": "density:2 probability:1"}), 3)
        (False, False, True)
        >>> known_features(xr.Dataset(attrs={"kind": "both"}), 3) is None
        True
    """
    text = str(found.attrs.get("countable", f"{found.attrs.get('kind')}:{size}"))
    runs = re.findall(r"(density|probability):(\d+)", text)
    features = tuple(name == "probability" for name, length in runs for _ in range(int(length)))
    return features if len(features) == size else None


def differing(features: Mapping[str, tuple[bool, ...] | None], columns: Sequence[str] | None = None) -> str:
    """Name the features that are a density under one model and a probability under another; empty if there are none.

    Args:
        features: model → from :func:`countable_features`, or None where it is not known.
        columns: the names of the features; otherwise they are numbered from 0.

    Example:
        >>> differing({"a": (False, True, True), "b": (True, True, True)})
        'feature 0 is a density under a and a probability under b'
        >>> differing({"a": (False, False), "b": (True, True)}, ["height", "age"])
        'features height, age are a density under a and a probability under b'
        >>> differing({"a": (False, True), "b": None})
        ''
    """
    known = {name: own for name, own in features.items() if own is not None}
    alike = dict[tuple[bool, ...], list[int]]()
    for i, column in enumerate(zip(*known.values(), strict=True)):
        if len(set(column)) > 1:
            alike.setdefault(column, []).append(i)
    told = []
    for column, indices in alike.items():
        under = {
            value: ", ".join(name for name, own in zip(known, column, strict=True) if own == value) for value in (0, 1)
        }
        what = (
            f"feature {_named(indices, columns)} is"
            if len(indices) == 1
            else f"features {_named(indices, columns)} are"
        )
        told.append(f"{what} a density under {under[0]} and a probability under {under[1]}")
    return "; ".join(told)


def _named(indices: Sequence[int], columns: Sequence[str] | None, most: int = 5) -> str:
    """Features by name, or by runs of numbers."""
    if columns is not None:
        told = [str(columns[i]) for i in indices]
    else:
        runs = [[i for _, i in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
        told = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")
