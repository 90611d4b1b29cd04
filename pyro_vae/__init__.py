"""Variational autoencoders in Pyro: checked estimators, parts that swap, posteriors with evidence."""

from pyro_vae import callbacks, data, diagnose, elbo, errors, exact, likelihoods, nn, posteriors, priors
from pyro_vae.__about__ import __version__
from pyro_vae._checkpoints import Checkpoints
from pyro_vae.checkpoint import load, save
from pyro_vae.compare import compare_elbos
from pyro_vae.core import VAE, Conditional
from pyro_vae.describe import describe
from pyro_vae.diagnose import inference_gaps
from pyro_vae.engine import CompiledSVI
from pyro_vae.evidence import compare_models, log_evidence
from pyro_vae.pair import Pair
from pyro_vae.predict import to_datatree
from pyro_vae.recommend import recommend
from pyro_vae.seeds import over_seeds
from pyro_vae.train import Fit, fit
from pyro_vae.workflow import check

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
