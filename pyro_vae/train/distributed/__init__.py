"""Many devices: processes that train one VAE together, and pools of processes that train one each."""

from pyro_vae.train.distributed.group import Group, joined

__all__ = ["Group", "joined"]
