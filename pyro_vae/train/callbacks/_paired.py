"""Helpers of callbacks: paired differences, copies of weights, and a check for conflicting callbacks."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks.base import Callback, Run


def difference(values: Tensor, than: Tensor) -> tuple[float, float]:
    """Compute the mean of paired differences and its standard error, NaN for a single pair.

    Example:
        >>> import torch
        >>> difference(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
        (2.0, 1.0)
    """
    each = values.double() - than.to(values.device).double()
    spread = each.std().item() if len(each) > 1 else math.nan
    return each.mean().item(), spread / math.sqrt(len(each))


def copied(module: nn.Module) -> dict[str, Tensor]:
    """Copy the weights and buffers, by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def validate_single_restore(run: Run, mine: Callback) -> None:
    """Raise if two callbacks would each replace the weights of the VAE at the end.

    Raises:
        SettingsError: naming both callbacks.
    """
    callbacks: Sequence[Callback] = getattr(run, "callbacks", ())
    others = [other for other in callbacks if other is not mine and other.final]
    if mine.final and others:
        raise SettingsError(
            f"callbacks: {type(mine).__name__} restores {mine.final} at the end, and {type(others[0]).__name__} "
            f"restores {others[0].final}; pass restore=False to all but one of them"
        )
