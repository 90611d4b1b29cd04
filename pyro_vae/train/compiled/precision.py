"""Compute in TF32 or bfloat16 on request."""

import contextlib
from collections.abc import Iterator

import torch

from pyro_vae.errors import SettingsError

PRECISIONS = ("float32", "tf32", "bf16")


def validate_precision(precision: str) -> None:
    """Raise if the precision is unknown."""
    if precision not in PRECISIONS:
        raise SettingsError(f"precision is {precision!r}; it must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}")


@contextlib.contextmanager
def computing_in(precision: str, device: str) -> Iterator[None]:
    """Use TF32 matrix products or autocast to bfloat16 inside; by default the parameters' precision."""
    if precision == "bf16":
        # The cache would pass tensors of one trace to the next.
        with torch.autocast(device, torch.bfloat16, cache_enabled=False):
            yield
        return
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        if precision == "tf32":
            torch.set_float32_matmul_precision(before)
