"""Where to compute, and with which random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyro_vae.errors import SettingsError


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device asked for; ``"auto"`` is CUDA where there is one, else the CPU.

    Args:
        device: ``"auto"``, or what ``torch.device`` takes.

    Raises:
        SettingsError: if there is no such device.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.zeros((), device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(" device type at start")[0]
        raise SettingsError(f"device {device} cannot be used here ({reason}); use auto or cpu") from error
    return chosen


def describe_device(device: torch.device) -> str:
    """What a person calls the device.

    Example:
        >>> describe_device(torch.device("cpu")).startswith("CPU (")
        True
    """
    if device.type == "cuda":
        return f"CUDA ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' * (threads != 1)})" if device.type == "cpu" else str(device)


def refuse_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not take.

    Args:
        seed: a whole number between -2**62 and 2**62.

    Raises:
        SettingsError: if it is another.

    Example:
        >>> refuse_seed(2**64)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: seed is 18446744073709551616; it must be a whole number between ...
    """
    if not isinstance(seed, int) or abs(seed) >= 2**62:
        raise SettingsError(f"seed is {seed}; it must be a whole number between -2**62 and 2**62")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed`` inside, and the global generators as they were outside.

    Args:
        seed: of torch's generators.
        device: a CUDA device whose generator is to be kept too, or the CPU.

    Example:
        >>> with seeded(0, torch.device("cpu")):
        ...     a = torch.rand(())
        >>> with seeded(0, torch.device("cpu")):
        ...     bool(a == torch.rand(()))
        True
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch's own seeds every kind of device there may be, which takes longer than many a draw.
        (torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed)(seed)
        yield
