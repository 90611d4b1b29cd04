"""Train a VAE: the training loop, callbacks, compiled steps, workers and checkpoints."""

from pyro_vae.elbo.per_datum import per_datum_elbo
from pyro_vae.train.fit import Fit, fit

__all__ = ["Fit", "fit", "per_datum_elbo"]
