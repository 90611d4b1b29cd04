"""Callbacks of :func:`pyro_vae.fit`."""

from pyro_vae.train.callbacks.averages import EMA, SWA
from pyro_vae.train.callbacks.base import Callback
from pyro_vae.train.callbacks.divergence import Explosion, RollBack
from pyro_vae.train.callbacks.schedules import Schedule
from pyro_vae.train.callbacks.stopping import EarlyStopping
from pyro_vae.train.callbacks.tensorboard import TensorBoard

__all__ = ["EMA", "SWA", "Callback", "EarlyStopping", "Explosion", "RollBack", "Schedule", "TensorBoard"]
