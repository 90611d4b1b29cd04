"""Figures of training, predictions, comparisons and diagnostics; each function returns a matplotlib ``Figure``.

The figures are made without ``pyplot``, so nothing global is touched and no window is opened.
"""

from pyro_vae.plots.comparison import compare, elbos_by_datum
from pyro_vae.plots.evidence import bdmc, models
from pyro_vae.plots.pictures import history, latent_space, prior_samples, reconstructions

__all__ = [
    "bdmc",
    "compare",
    "elbos_by_datum",
    "history",
    "latent_space",
    "models",
    "prior_samples",
    "reconstructions",
]
