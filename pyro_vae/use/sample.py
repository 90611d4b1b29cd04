"""New rows from the model."""

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import derive_seed, numbers_at_once, refuse_seed, seeded
from pyro_vae.core.progress import ticking
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import as_tensor
from pyro_vae.errors import DataError
from pyro_vae.use.inputs import Names
from pyro_vae.use.labelled import label


@torch.no_grad()
@takes_settings
def sample(
    vae: VAE, n: int, *, context: Any = None, seed: int = 0, chunk: int = 2**22, progress: bool = False
) -> xr.Dataset:
    """Draw new rows from the model.

    .. math:: z \\sim p(z), \\qquad x \\sim p(x | z)

    Args:
        vae: a VAE.
        n: how many rows, at least 1.
        context: of a conditional VAE, one for all rows, shape ``(c,)`` or ``(1, c)``, or one for each, shape
            ``(n, c)``.
        seed: of the draws.
        chunk: about so many numbers at a time, on a GPU 64 times as many; another chunk makes other draws.
        progress: whether to show a bar.

    Returns:
        A dataset over ``datum`` and ``feature``: ``x``, rows as the data are, in their units; the features have the
        names of the columns that the VAE was trained on, and :func:`pyro_vae.as_table` turns codes into the names of
        categories.

    Raises:
        DataError: if the context is not finite or not of one row or n rows.
        SettingsError: if a setting is out of its range.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> sample(vae, 3).x.shape
        (3, 2)
    """
    whole("n", n, 1)
    whole("chunk", chunk, 1)
    refuse_seed(seed)
    given = contexts(vae, context, n)
    device = vae.like(torch.empty(0)).device
    with evaluating(vae):
        with seeded(seed, device):  # to see how many numbers there are
            z = _from_the_prior(vae, 1, *(rows[:1] for rows in given))
            width = vae.decoder(z, *(rows[:1] for rows in given)).event_shape.numel()
        size = max(1, numbers_at_once(chunk, device) // max(width, z.numel()))
        starts, drawn = range(0, n, size), []
        with ticking("Sampling", len(starts), progress) as tick:
            for first in starts:
                number, own = min(size, n - first), [rows[first : first + size] for rows in given]
                with seeded(derive_seed(seed, "sampling", first), device):
                    x = vae.decoder(_from_the_prior(vae, number, *own), *own).sample()
                drawn.append(x.flatten(1).cpu().numpy())
                tick()
    return label({"x": (["datum", "feature"], np.concatenate(drawn))}, Names.of(vae), seed=seed)


def contexts(vae: VAE, context: Any, n: int) -> tuple[Tensor, ...]:
    """A context for each of n rows, where there is one, on the device and in the precision of a VAE.

    Raises:
        DataError: if it is not of one row or n rows.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> contexts(vae, [1.0, 2.0], 3)[0].shape
        torch.Size([3, 2])
    """
    if context is None:
        return ()
    array = context if isinstance(context, Tensor) else np.asarray(context)
    rows = vae.like(as_tensor(array[None] if array.ndim == 1 else array, source="context"))
    if rows.dim() != 2 or len(rows) not in (1, n):
        raise DataError(f"the context has shape {tuple(rows.shape)} for {n} rows; give one row, or {n}")
    return (rows.expand(n, -1),)


def _from_the_prior(vae: VAE, number: int, *context: Tensor) -> Tensor:
    prior = vae.prior(*context)
    return prior.sample(() if prior.batch_shape else (number,))
