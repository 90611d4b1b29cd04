"""Variational autoencoders in Pyro: checked estimators, parts that swap, posteriors with evidence."""

import importlib
import sys
from typing import Any

from pyro_vae import data, diagnose, elbo, errors, exact, likelihoods, nn, posteriors, priors
from pyro_vae.__about__ import __version__
from pyro_vae.compare import swap
from pyro_vae.compare.elbos import compare_elbos
from pyro_vae.compare.models import compare_models
from pyro_vae.compare.pair import Pair
from pyro_vae.compare.recommend import recommend
from pyro_vae.compare.seeds import over_seeds
from pyro_vae.core.component import Conditional
from pyro_vae.core.vae import VAE
from pyro_vae.diagnose import inference_gaps
from pyro_vae.diagnose.check import check
from pyro_vae.diagnose.datatree import to_datatree
from pyro_vae.diagnose.describe import describe
from pyro_vae.evidence import log_evidence
from pyro_vae.train import callbacks
from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.checkpoint.save_load import load, save
from pyro_vae.train.compiled import CompiledSVI
from pyro_vae.train.fit import Fit, fit

# Paths of earlier versions, which go on working.
sys.modules["pyro_vae.callbacks"] = callbacks
sys.modules["pyro_vae.swap"] = swap


def __getattr__(name: str) -> Any:
    """Import ``pyro_vae.plots`` when it is first asked for: matplotlib takes a second."""
    if name == "plots":
        return importlib.import_module("pyro_vae.plots")
    raise AttributeError(f"module 'pyro_vae' has no attribute {name!r}")


__all__ = [
    "VAE",
    "Checkpoints",
    "CompiledSVI",
    "Conditional",
    "Fit",
    "Pair",
    "__version__",
    "callbacks",
    "check",
    "compare_elbos",
    "compare_models",
    "data",
    "describe",
    "diagnose",
    "elbo",
    "errors",
    "exact",
    "fit",
    "inference_gaps",
    "likelihoods",
    "load",
    "log_evidence",
    "nn",
    "over_seeds",
    "posteriors",
    "priors",
    "recommend",
    "save",
    "to_datatree",
]
