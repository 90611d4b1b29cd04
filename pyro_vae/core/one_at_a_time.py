"""A lock for global state: Pyro's handlers, Pyro's validation and torch's generators."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pyro.poutine import runtime

from pyro_vae.errors import ModelError

_LOCK = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one thread in at a time; raise inside Pyro's handlers.

    Raises:
        ModelError: if a handler of Pyro is active, which would change the model and the guide.

    Example:
        >>> import pyro
        >>> with pyro.poutine.trace(), one_at_a_time():
        ...     pass
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: called inside a handler of Pyro (TraceMessenger), which would change ...
    """
    with _LOCK:
        if runtime._PYRO_STACK:
            kind = type(runtime._PYRO_STACK[-1]).__name__
            raise ModelError(
                f"called inside a handler of Pyro ({kind}), which would change model and guide; call this function "
                "outside handlers, and not while another thread runs Pyro"
            )
        yield
