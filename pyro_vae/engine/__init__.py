"""A training step traced once, compiled, and replayed."""

from pyro_vae.engine.svi import CompiledSVI

__all__ = ["CompiledSVI"]
