"""How good is q(z|x)? Each diagnostic gives labelled data, and a finding in words."""

from pyro_vae.diagnose.finding import Finding
from pyro_vae.diagnose.weights import psis

__all__ = ["Finding", "psis"]
