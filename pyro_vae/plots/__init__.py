"""Figures of training, predictions, comparisons and diagnostics; each function returns a matplotlib ``Figure``.

The figures are made without ``pyplot``, so nothing global is touched and no window is opened.
"""

from pyro_vae.plots.comparison import compare, elbos_by_datum
from pyro_vae.plots.gaps import converged, gaps, nuts
from pyro_vae.plots.pictures import history, latent_space, prior_samples, reconstructions

__all__ = [
    "compare",
    "converged",
    "elbos_by_datum",
    "gaps",
    "history",
    "latent_space",
    "nuts",
    "prior_samples",
    "reconstructions",
]
