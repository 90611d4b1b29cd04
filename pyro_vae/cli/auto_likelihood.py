"""``--likelihood auto``: the likelihoods that the columns of the data suggest, as settings of a run."""

from typing import Any

from jsonargparse import Namespace

from pyro_vae.cli.settings import training
from pyro_vae.core.format import Console
from pyro_vae.data import Data, Proposal, Suggestion, suggest
from pyro_vae.data.columns import list_names
from pyro_vae.likelihoods import Blocks
from pyro_vae.train.distributed.group import writes

AUTO = "auto"
"""The setting that asks for it."""


def settle_likelihood(settings: Namespace, data: Data) -> None:
    """Set the likelihood that the data suggest where ``auto`` is asked for, and print it.

    The settings then name classes, so that a run is made again without another look at the data.

    Example:
        >>> import torch
        >>> settings = training().parse_args(["--data", "x.npy", "--likelihood", "auto"])
        >>> settle_likelihood(settings, Data(torch.tensor([[0.0], [1.0]]), columns=["ill"], source="x.npy"))
        x.npy: likelihood of 'ill': Bernoulli (only 0 and 1)
        >>> settings.likelihood.class_path
        'pyro_vae.likelihoods.Bernoulli'
    """
    if settings.likelihood != AUTO:
        return
    suggestion = suggest(data)
    described = {"data": settings.data, "likelihood": as_setting(suggestion)}
    settings.likelihood = training().parse_object(described).likelihood
    if writes():
        for kind in suggestion.kinds:
            reason = f" ({kind.reason})" if len(kind.columns) == 1 else ""
            line = f"{data.source}: likelihood of {list_names(kind.columns)}: {kind}{reason}"
            Console().print(line, soft_wrap=True)


def as_setting(suggestion: Suggestion) -> dict[str, Any]:
    """Describe proposed likelihoods as a YAML file does: one class, or blocks of several.

    Example:
        >>> as_setting(suggest({"a": [0, 1], "b": [1, 0]}))
        {'class_path': 'pyro_vae.likelihoods.Bernoulli'}
    """
    kinds = suggestion.kinds
    if len(kinds) == 1:
        return _described(kinds[0])
    blocks = [[_described(kind), len(kind.columns)] for kind in kinds]
    return {"class_path": f"pyro_vae.likelihoods.{Blocks.__name__}", "init_args": {"blocks": blocks}}


def _described(kind: Proposal) -> dict[str, Any]:
    named: dict[str, Any] = {"class_path": f"pyro_vae.likelihoods.{kind.likelihood.__name__}"}
    return named | ({"init_args": kind.settings} if kind.settings else {})
