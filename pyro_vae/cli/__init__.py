"""The command line: ``pyro-vae``."""

from pyro_vae.cli.main import main

__all__ = ["main"]
