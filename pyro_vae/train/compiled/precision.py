"""Coarser arithmetic, on request."""

import contextlib
from collections.abc import Iterator

import torch

from pyro_vae.errors import SettingsError

PRECISIONS = ("float32", "tf32", "bf16")


def refuse_precision(precision: str) -> None:
    """Refuse a precision that is none of three."""
    if precision not in PRECISIONS:
        raise SettingsError(f"precision is {precision}; it must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}")


@contextlib.contextmanager
def computing_in(precision: str, device: str) -> Iterator[None]:
    """Matrix products in TF32, or autocast to bfloat16, inside; the parameters' own precision otherwise."""
    if precision == "bf16":
        # The cache would hand one trace's tensors to the next.
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
