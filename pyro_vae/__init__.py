"""Variational autoencoders in Pyro: verified estimators, interchangeable components, model evidence."""

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pyro_vae.__about__ import __version__

if TYPE_CHECKING:
    from pyro_vae import data, diagnose, elbo, errors, likelihoods, nn, plots, posteriors, priors
    from pyro_vae.compare.elbos import compare_elbos
    from pyro_vae.compare.models import compare_models
    from pyro_vae.compare.recommend import recommend
    from pyro_vae.compare.seeds import over_seeds
    from pyro_vae.core.component import Conditional
    from pyro_vae.core.pair import Pair
    from pyro_vae.core.vae import VAE
    from pyro_vae.diagnose import inference_gaps
    from pyro_vae.diagnose.check import check
    from pyro_vae.diagnose.datatree import to_datatree
    from pyro_vae.diagnose.describe import describe
    from pyro_vae.evidence import exact, log_evidence
    from pyro_vae.train import callbacks
    from pyro_vae.train.checkpoint.rotation import Checkpoints
    from pyro_vae.train.checkpoint.save_load import load, save
    from pyro_vae.train.compiled import CompiledSVI
    from pyro_vae.train.fit import Fit, fit
    from pyro_vae.use import sklearn
    from pyro_vae.use.encode import encode
    from pyro_vae.use.impute import impute
    from pyro_vae.use.labelled import as_table
    from pyro_vae.use.predict import predict
    from pyro_vae.use.reconstruct import reconstruct
    from pyro_vae.use.sample import sample
    from pyro_vae.use.score import score
    from pyro_vae.use.walks import interpolate, traverse

_HOMES = {
    "compare.elbos": ["compare_elbos"],
    "compare.models": ["compare_models"],
    "core.pair": ["Pair"],
    "compare.recommend": ["recommend"],
    "compare.seeds": ["over_seeds"],
    "core.component": ["Conditional"],
    "core.vae": ["VAE"],
    "diagnose": ["inference_gaps"],
    "diagnose.check": ["check"],
    "diagnose.datatree": ["to_datatree"],
    "diagnose.describe": ["describe"],
    "evidence": ["log_evidence"],
    "train.checkpoint.rotation": ["Checkpoints"],
    "train.checkpoint.save_load": ["load", "save"],
    "train.compiled": ["CompiledSVI"],
    "train.fit": ["Fit", "fit"],
    "use.classify": ["classify"],
    "use.encode": ["encode"],
    "use.impute": ["impute"],
    "use.labelled": ["as_table"],
    "use.predict": ["predict"],
    "use.reconstruct": ["reconstruct"],
    "use.sample": ["sample"],
    "use.walks": ["interpolate", "traverse"],
    "use.score": ["score"],
}
"""Public names by module; importing them on first use keeps torch out of ``pyro-vae --help``."""

_MOVED = {
    "callbacks": "train.callbacks",
    "exact": "evidence.exact",
    "sklearn": "use.sklearn",
    "swap": "compare.swap",
}
"""Short import paths, including those of earlier versions, and the modules they stand for."""


def _use_one_thread() -> None:
    """Use one thread in a forked process: torch would wait forever for the other threads, which only the parent has."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):  # missing on Windows
    os.register_at_fork(after_in_child=_use_one_thread)


def __getattr__(name: str) -> Any:
    """Import a public name, a subpackage or a moved module on first use."""
    home = next((home for home, names in _HOMES.items() if name in names), None)
    try:
        found = importlib.import_module(f"pyro_vae.{home or _MOVED.get(name, name)}")
    except ModuleNotFoundError as error:
        if error.name != f"pyro_vae.{name}":
            raise
        raise AttributeError(f"module 'pyro_vae' has no attribute {name!r}") from None
    value = globals()[name] = getattr(found, name) if home else found
    return value


def __dir__() -> list[str]:
    """List the public names, for tab completion."""
    return sorted(__all__)


class _Moved(ModuleType):
    """A module under its short import path, loaded on first access."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__all__":  # tools that scan sys.modules must not trigger the import
            raise AttributeError(name)
        return getattr(importlib.import_module(f"pyro_vae.{_MOVED[self.__name__.partition('.')[2]]}"), name)


for _name in _MOVED:
    sys.modules[f"pyro_vae.{_name}"] = _Moved(f"pyro_vae.{_name}")

__all__ = [
    "VAE",
    "Checkpoints",
    "CompiledSVI",
    "Conditional",
    "Fit",
    "Pair",
    "__version__",
    "as_table",
    "callbacks",
    "check",
    "classify",
    "compare_elbos",
    "compare_models",
    "data",
    "describe",
    "diagnose",
    "elbo",
    "encode",
    "errors",
    "exact",
    "fit",
    "impute",
    "inference_gaps",
    "interpolate",
    "likelihoods",
    "load",
    "log_evidence",
    "nn",
    "over_seeds",
    "plots",
    "posteriors",
    "predict",
    "priors",
    "recommend",
    "reconstruct",
    "sample",
    "save",
    "score",
    "sklearn",
    "to_datatree",
    "traverse",
]
