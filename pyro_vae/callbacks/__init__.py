"""What looks after a training: callbacks of :func:`pyro_vae.fit`."""

from pyro_vae.callbacks.base import Callback

__all__ = ["Callback"]
