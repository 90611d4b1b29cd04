"""The table of constructors that drives the contract tests: a new member is one row here.

Latents are 3, features 6. Networks are small, in double precision once :func:`make` has built them.
"""

from collections.abc import Callable

import torch
from torch import nn

import pyro_vae as pv

LATENTS, FEATURES = 3, 6

PRIORS: dict[str, Callable[[], nn.Module]] = {
    "StandardNormal": lambda: pv.priors.StandardNormal(LATENTS),
}

LIKELIHOODS: dict[str, Callable[[], nn.Module]] = {
    "Normal": lambda: pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES), scale=0.7),
    "Normal, learned scale": lambda: pv.likelihoods.Normal(
        pv.nn.mlp(LATENTS, [8], FEATURES), scale=0.7, learn_scale=True
    ),
}

POSTERIORS: dict[str, Callable[[], nn.Module]] = {
    "DiagNormal": lambda: pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 2 * LATENTS)),
}

# What is exported beside members: the bases, which a member extends.
BASES = {"Prior", "Likelihood", "Posterior"}


def make(constructor: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return constructor().double()


def exported(module) -> set[str]:
    """The members that a module of parts exports: its own public classes."""
    own = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {name for name, value in own.items() if value.__module__ == module.__name__ and not name.startswith("_")}
