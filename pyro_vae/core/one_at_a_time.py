"""What all threads of a process share: Pyro's handlers, Pyro's validation and torch's global generators."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from pyro.poutine import runtime

from pyro_vae.errors import ModelError

_LOCK = threading.RLock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """One thread at a time inside, others wait; and none inside Pyro's handlers.

    Raises:
        ModelError: if a handler is around, which would change what model and guide do.

    Example:
        >>> import pyro
        >>> with pyro.poutine.trace(), one_at_a_time():
        ...     pass
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: this is called inside one of Pyro's handlers, a TraceMessenger, ...
    """
    with _LOCK:
        if runtime._PYRO_STACK:
            kind = type(runtime._PYRO_STACK[-1]).__name__
            raise ModelError(
                f"this is called inside one of Pyro's handlers, a {kind}, which would change "
                "what model and guide do; call it outside, and not while another thread runs Pyro"
            )
        yield
