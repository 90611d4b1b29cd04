"""What looks after a training: callbacks of :func:`pyro_vae.fit`."""

from pyro_vae.callbacks.averages import EMA, SWA
from pyro_vae.callbacks.base import Callback
from pyro_vae.callbacks.divergence import Explosion, RollBack
from pyro_vae.callbacks.schedules import Schedule
from pyro_vae.callbacks.stopping import EarlyStopping
from pyro_vae.callbacks.tensorboard import TensorBoard

__all__ = ["EMA", "SWA", "Callback", "EarlyStopping", "Explosion", "RollBack", "Schedule", "TensorBoard"]
