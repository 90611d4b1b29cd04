"""The version, and those of what it stands on."""

import platform
from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """The versions that a result depends on.

    Example:
        >>> list(versions())
        ['pyro_vae', 'pyro', 'torch', 'python']
    """
    return {
        "pyro_vae": __version__,
        "pyro": metadata.version("pyro-ppl"),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }
