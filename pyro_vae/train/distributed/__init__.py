"""Many devices: processes that train one VAE together."""

from pyro_vae.train.distributed.group import Group, joined

__all__ = ["Group", "joined"]
