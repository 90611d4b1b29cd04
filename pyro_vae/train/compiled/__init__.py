"""A training step traced once, compiled, and replayed."""

from pyro_vae.train.compiled.svi import CompiledSVI

__all__ = ["CompiledSVI"]
