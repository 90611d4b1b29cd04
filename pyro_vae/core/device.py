"""Devices, seeds and generators of random numbers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyro_vae.core.one_at_a_time import one_at_a_time
from pyro_vae.core.validation import python_number
from pyro_vae.errors import SettingsError


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """Return a device; ``"auto"`` is CUDA if available, else the CPU.

    Args:
        device: ``"auto"``, or an argument of ``torch.device``.

    Raises:
        SettingsError: if the device is not available.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.zeros((), device=chosen).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(" device type at start")[0]
        raise SettingsError(f"device {device} is not available ({reason}); use auto or cpu") from error
    return chosen


def describe_device(device: torch.device) -> str:
    """Describe a device for people.

    Example:
        >>> describe_device(torch.device("cpu")).startswith("CPU (")
        True
    """
    if device.type == "cuda":
        return f"CUDA ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"CPU ({threads} thread{'s' * (threads != 1)})" if device.type == "cpu" else str(device)


GPU_CHUNK = 64
"""The chunk size on a GPU, as a multiple of that on a CPU: kernels on smaller chunks would leave the GPU idle."""


def numbers_at_once(chunk: int, device: torch.device) -> int:
    """Return how many numbers to process at once: ``chunk``, or 64 times as many on a GPU.

    Example:
        >>> numbers_at_once(100, torch.device("cpu")), numbers_at_once(100, torch.device("cuda"))
        (100, 6400)
    """
    return chunk if device.type == "cpu" else GPU_CHUNK * chunk


def validate_seed(seed: int) -> None:
    """Validate that torch's generators accept a seed.

    Args:
        seed: a whole number between -2**62 and 2**62.

    Raises:
        SettingsError: if the seed is not such a number.

    Example:
        >>> validate_seed(2**64)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: seed is 18446744073709551616; it must be a whole number between ...
    """
    seed = python_number(seed)
    if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**62:
        raise SettingsError(f"seed is {seed}; it must be a whole number between -2**62 and 2**62")


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Derive the seed of one stream of random numbers from the seed of a run.

    .. math:: s' = \\mathrm{BLAKE2b}(s, \\text{purpose}, n_1, n_2, \\dots) \\bmod 2^{62}

    Streams that differ in seed, purpose, epoch, step or process are independent. Arithmetic such as ``seed + 1`` or
    ``seed * 2**32 + epoch`` does not ensure this: the first is the seed of another run, and torch's generator on a CPU
    keeps only the low 32 bits of the second. Derived seeds differ in these bits too, except with probability 2⁻³² for
    each pair.

    Args:
        seed: of the run, any whole number.
        purpose: what the random numbers are for, in words; each use has its own.
        numbers: the epoch, the step or the rank of a process, which distinguish streams of one purpose.

    Returns:
        A whole number from 0 to 2**62 - 1.

    References:
        | BLAKE2: Simpler, Smaller, Fast as MD5 (Aumasson et al., 2013), https://www.blake2.net/blake2.pdf

    Example:
        >>> derive_seed(0, "order of the data", 1) == derive_seed(0, "order of the data", 1)
        True
        >>> len({derive_seed(seed, "order of the data", epoch) % 2**32 for seed in range(10) for epoch in range(10)})
        100
    """
    parts = (int(seed), purpose, *map(int, numbers))
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**62


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator of random numbers that is independent of torch's global ones.

    Args:
        seed: any whole number; a different one gives a different stream, on a CPU too.
        device: where the numbers are drawn.

    Example:
        >>> first, second = (torch.rand(3, generator=make_generator(seed)) for seed in (0, 2**32))
        >>> bool((first == second).any())
        False
    """
    return torch.Generator(device).manual_seed(_with_all_bits(seed))


def _with_all_bits(seed: int) -> int:
    """Hash a seed that torch's generator on a CPU would truncate to its low 32 bits."""
    return seed if 0 <= seed < 2**32 else derive_seed(seed, "all bits")


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators inside, and restore them afterwards.

    Threads share these generators, so only one thread is inside at a time; the others wait.

    Args:
        seed: any whole number; a different one gives a different stream, on a CPU too.
        device: the CPU, or a CUDA device whose generator is seeded and restored too.

    Example:
        >>> with seeded(0, torch.device("cpu")):
        ...     a = torch.rand(())
        >>> with seeded(0, torch.device("cpu")):
        ...     bool(a == torch.rand(()))
        True
    """
    with one_at_a_time(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed seeds every type of device, which takes longer than many draws.
        seed_torch = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        seed_torch(_with_all_bits(seed))
        yield
