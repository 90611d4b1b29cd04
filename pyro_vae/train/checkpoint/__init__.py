"""Save a VAE or the state of a training to files, and load it."""

from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.checkpoint.save_load import load, save

__all__ = ["Checkpoints", "load", "save"]
