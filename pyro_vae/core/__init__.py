"""The VAE, its wiring into Pyro, and what every room shares."""

from pyro_vae.core.component import Conditional
from pyro_vae.core.vae import VAE

__all__ = ["VAE", "Conditional"]
