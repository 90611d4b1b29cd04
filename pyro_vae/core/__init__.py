"""The VAE, its wiring into Pyro, and what every room shares."""

from pyro_vae.core.vae import VAE, Conditional

__all__ = ["VAE", "Conditional"]
