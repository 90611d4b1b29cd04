"""Figures of training, predictions, comparisons and diagnostics; each function returns a matplotlib ``Figure``.

The figures are made without ``pyplot``, so that no global state changes and no window opens. :func:`explore` returns a
web page instead.
"""

from pyro_vae.plots.calibration import coverage, predictive_check, reliability, sbc
from pyro_vae.plots.comparison import compare, elbos_by_datum
from pyro_vae.plots.estimates import estimates, with_errors
from pyro_vae.plots.evidence import bdmc, models
from pyro_vae.plots.explorer import explore
from pyro_vae.plots.gaps import converged, gaps, nuts
from pyro_vae.plots.guide import collapse, khat
from pyro_vae.plots.pictures import history, latent_space, prior_samples, reconstructions

__all__ = [
    "bdmc",
    "collapse",
    "compare",
    "converged",
    "coverage",
    "elbos_by_datum",
    "estimates",
    "explore",
    "gaps",
    "history",
    "khat",
    "latent_space",
    "models",
    "nuts",
    "predictive_check",
    "prior_samples",
    "reconstructions",
    "reliability",
    "sbc",
    "with_errors",
]
