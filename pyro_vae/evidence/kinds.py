"""Which features have a density and which a probability under a model; the two are not comparable."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import xarray as xr

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import samples, traces
from pyro_vae.elbo.kl import base
from pyro_vae.likelihoods._distributions import Side

CAUTION = "Densities and probabilities are not in the same units: compare models of one kind only."
NOT_KNOWN = "not known"


@torch.no_grad()
def countable_features(vae: Amortized, rows: Rows) -> tuple[bool, ...]:
    """Return whether the values of each feature are countable, so that they have a probability, not a density.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
        >>> countable_features(vae, Rows(torch.zeros(3, 2)))
        (False, False)
    """
    one = Rows(rows.x, rows.context).take(slice(1)).like(vae)
    with seeded(0, one.x.device), evaluating(vae, len(one)):
        sites = [site for _, site in samples(traces(vae.model, vae.guide, *one.arguments())[0]) if site["is_observed"]]
    flags = [flag for site in sites for flag in _countable(site["fn"], site["value"].numel())]
    return tuple(flags) if len(flags) == rows.x[0].numel() else (all(flags),) * rows.x[0].numel()


def _countable(likelihood: Any, size: int) -> list[bool]:
    """Whether each of the ``size`` values of a site is countable."""
    features = base(likelihood)
    parts, sizes = (features.parts, features.sizes) if isinstance(features, Side) else ([features], [size])
    return [_is_discrete(part) for part, n in zip(parts, sizes, strict=True) for _ in range(n)]


def _is_discrete(d: Any) -> bool:
    """Whether the values of a distribution are countable; False if its support is not implemented."""
    try:
        return bool(d.support.is_discrete)
    except NotImplementedError:
        return False


def kind(features: tuple[bool, ...]) -> str:
    """Summarize :func:`countable_features` in a word.

    Example:
        >>> kind((True, True)), kind((True, False)), kind((False,))
        ('probability', 'both', 'density')
    """
    return "probability" if all(features) else "both" if any(features) else "density"


def encode_features(features: tuple[bool, ...]) -> str:
    """Encode :func:`countable_features` as a dataset attribute: runs of equal kind.

    Example:
        >>> encode_features((False, False, True))
        'density:2 probability:1'
    """
    return " ".join(f"{kind((value,))}:{len([*run])}" for value, run in groupby(features))


def known_features(found: xr.Dataset, size: int) -> tuple[bool, ...] | None:
    """Return whether each feature of saved evidence is countable, or None if this is unknown.

    Args:
        found: the result of :func:`pyro_vae.log_evidence`. Files from before the attribute ``countable`` existed have
            the attribute ``kind`` only, which is enough unless it is "both".
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
    """Describe the features with a density under one model and a probability under another; empty if none.

    Args:
        features: the result of :func:`countable_features` by model, or None if it is unknown.
        columns: the names of the features; by default, features are numbered from 0.

    Example:
        >>> differing({"a": (False, True, True), "b": (True, True, True)})
        'feature 0 is a density under a and a probability under b'
        >>> differing({"a": (False, False), "b": (True, True)}, ["height", "age"])
        'features height, age are a density under a and a probability under b'
        >>> differing({"a": (False, True), "b": None})
        ''
    """
    known = {name: flags for name, flags in features.items() if flags is not None}
    groups = dict[tuple[bool, ...], list[int]]()
    for i, flags in enumerate(zip(*known.values(), strict=True)):
        if len(set(flags)) > 1:
            groups.setdefault(flags, []).append(i)
    descriptions = []
    for flags, indices in groups.items():
        models = {
            value: ", ".join(name for name, flag in zip(known, flags, strict=True) if flag == value) for value in (0, 1)
        }
        subject = (
            f"feature {_names(indices, columns)} is"
            if len(indices) == 1
            else f"features {_names(indices, columns)} are"
        )
        descriptions.append(f"{subject} a density under {models[0]} and a probability under {models[1]}")
    return "; ".join(descriptions)


def _names(indices: Sequence[int], columns: Sequence[str] | None, most: int = 5) -> str:
    """Features by name, or by ranges of numbers."""
    if columns is not None:
        names = [str(columns[i]) for i in indices]
    else:
        runs = [[i for _, i in run] for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0])]
        names = [f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
