"""Trace a training step once, compile it and replay it."""

from pyro_vae.train.compiled.svi import CompiledSVI

__all__ = ["CompiledSVI"]
