"""``--likelihood auto``: choose the likelihoods that the columns of the data suggest."""

from typing import Any

from jsonargparse import Namespace

from pyro_vae.cli.settings import training
from pyro_vae.core.format import Console
from pyro_vae.data import Data, Proposal, Suggestion, suggest
from pyro_vae.data.columns import list_names
from pyro_vae.likelihoods import Blocks
from pyro_vae.train.distributed.group import writes

AUTO = "auto"
"""The value of ``--likelihood``."""


def settle_likelihood(settings: Namespace, data: Data) -> None:
    """Replace ``likelihood: auto`` by the likelihoods that the data suggest, and print them.

    The settings then name classes, so that a repeated run uses the same likelihoods.

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
    chosen = {"data": settings.data, "likelihood": as_setting(suggestion)}
    settings.likelihood = training().parse_object(chosen).likelihood
    if writes():
        for kind in suggestion.kinds:
            reason = f" ({kind.reason})" if len(kind.columns) == 1 else ""
            line = f"{data.source}: likelihood of {list_names(kind.columns)}: {kind}{reason}"
            Console().print(line, soft_wrap=True)


def as_setting(suggestion: Suggestion) -> dict[str, Any]:
    """Write proposed likelihoods as a setting of a YAML file: one class, or blocks of several.

    Example:
        >>> as_setting(suggest({"a": [0, 1], "b": [1, 0]}))
        {'class_path': 'pyro_vae.likelihoods.Bernoulli'}
    """
    kinds = suggestion.kinds
    if len(kinds) == 1:
        return _class_setting(kinds[0])
    blocks = [[_class_setting(kind), len(kind.columns)] for kind in kinds]
    return {"class_path": f"pyro_vae.likelihoods.{Blocks.__name__}", "init_args": {"blocks": blocks}}


def _class_setting(kind: Proposal) -> dict[str, Any]:
    setting: dict[str, Any] = {"class_path": f"pyro_vae.likelihoods.{kind.likelihood.__name__}"}
    return setting | ({"init_args": kind.settings} if kind.settings else {})
