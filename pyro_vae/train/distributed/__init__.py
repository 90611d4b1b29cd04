"""Train one VAE with several processes."""

from pyro_vae.train.distributed.group import Group, joined

__all__ = ["Group", "joined"]
