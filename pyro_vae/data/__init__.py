"""Read, validate, split and stream data sets."""

from typing import Any

import torch

from pyro_vae.core.device import make_generator
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings
from pyro_vae.data.readers import load, load_held_out
from pyro_vae.data.rows import mask_nan, rows_for, rows_of
from pyro_vae.data.spread import mean_and_sd
from pyro_vae.data.streams import stream
from pyro_vae.data.suggest import Proposal, Suggestion, suggest
from pyro_vae.data.values import Data, as_tensor
from pyro_vae.errors import DataError, SettingsError

__all__ = [
    "Data", "Proposal", "Rows", "Suggestion", "as_tensor", "digits", "load", "load_held_out", "mask_nan", "mean_and_sd",
    "rows_for", "rows_of", "split", "stream", "suggest",
]  # fmt: skip


@takes_settings
def split(data: Any, fraction: float = 0.2, *, seed: int = 0) -> tuple[Data, Data]:
    """Split rows at random into training and held-out data.

    Args:
        data: :class:`Data`, or any input of :func:`load`.
        fraction: the held-out share, between 0 and 1; each part has at least one row.
        seed: the seed of the shuffle.

    Returns:
        The training data and the held-out data.

    Raises:
        SettingsError: if ``fraction`` is not between 0 and 1.
        DataError: if there are fewer than two rows, or the data cannot be used.

    Example:
        >>> train, test = split(Data(torch.zeros(10, 2)), 0.3)
        >>> len(train.x), len(test.x)
        (7, 3)
    """
    if not 0 < fraction < 1:
        raise SettingsError(f"the held-out fraction is {fraction}; it must lie between 0 and 1")
    data = load(data)
    n = len(data.x)
    if n < 2:
        raise DataError(f"{data.source}: a single row cannot be split; give at least 2 rows")
    held_out = min(max(round(fraction * n), 1), n - 1)
    order = torch.randperm(n, generator=make_generator(seed))
    return data.rows(order[held_out:]), data.rows(order[:held_out])


def digits() -> Data:
    """Load the 1797 handwritten 8 × 8 digits of scikit-learn, grey levels divided by 16.

    References:
        | Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, 1998), https://doi.org/10.24432/C50P49

    Example:
        >>> data = digits()
        >>> data.x.shape, data.image_shape, data.x.max().item()
        (torch.Size([1797, 64]), (8, 8), 1.0)
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.as_tensor(bunch.data / 16, dtype=torch.float32)
    return Data(x, torch.as_tensor(bunch.target), image_shape=(8, 8), source="scikit-learn's digits")
