"""Write a VAE or a whole training to files, and read it back."""

from pyro_vae.train.checkpoint.rotation import Checkpoints
from pyro_vae.train.checkpoint.save_load import load, save

__all__ = ["Checkpoints", "load", "save"]
