"""Networks; each takes ``(*batch, features)``, with any number of batch dimensions."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from pyro_vae.errors import SettingsError


def mlp(
    in_features: int,
    hidden: Sequence[int],
    out_features: int,
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """A multilayer perceptron; with no hidden layer, a linear map.

    .. math:: f(v) = W_L\\, a(\\dots a(W_1 v + b_1) \\dots) + b_L

    Args:
        in_features: numbers per input, at least 1.
        hidden: the width of each hidden layer; empty for a linear map.
        out_features: numbers per output, at least 1.
        activation: a class or function that makes the activation a.

    Returns:
        A network from ``(*batch, in_features)`` to ``(*batch, out_features)``.

    Raises:
        SettingsError: if a width is below 1.

    References:
        | Learning representations by back-propagating errors (Rumelhart, Hinton & Williams, 1986),
          https://doi.org/10.1038/323533a0

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> mlp(8, [128], 64)(torch.zeros(7, 5, 8)).shape
        torch.Size([7, 5, 64])
    """
    widths = [in_features, *hidden, out_features]
    if min(widths) < 1:
        raise SettingsError(f"the layers are {widths} wide; every width must be at least 1")
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])
