"""Two evaluations of the same data with the same noise, and weights kept for later."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from pyro_vae.errors import SettingsError
from pyro_vae.train.callbacks.base import Callback, Run


def difference(values: Tensor, than: Tensor) -> tuple[float, float]:
    """The mean of paired differences and its standard error, NaN for one pair alone.

    Example:
        >>> import torch
        >>> difference(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
        (2.0, 1.0)
    """
    each = values.double() - than.to(values.device).double()
    spread = each.std().item() if len(each) > 1 else math.nan
    return each.mean().item(), spread / math.sqrt(len(each))


def copied(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights and buffers, by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def refuse_second(run: Run, mine: Callback) -> None:
    """Refuse two callbacks that would each put other weights into the VAE at the end.

    Raises:
        SettingsError: naming both.
    """
    callbacks: Sequence[Callback] = getattr(run, "callbacks", ())
    others = [other for other in callbacks if other is not mine and other.final]
    if mine.final and others:
        raise SettingsError(
            f"{type(mine).__name__} would end with {mine.final}, and {type(others[0]).__name__} with "
            f"{others[0].final}; give all but one of them restore=False"
        )
