"""The VAE, its Pyro model and guide, and helpers shared by all subpackages."""

from pyro_vae.core.component import Conditional
from pyro_vae.core.vae import VAE

__all__ = ["VAE", "Conditional"]
