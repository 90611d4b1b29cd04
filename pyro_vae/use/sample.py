"""Sample new rows from the model."""

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pyro_vae.core.compatibility import called
from pyro_vae.core.component import Distribution, evaluating
from pyro_vae.core.device import derive_seed, numbers_at_once, seeded, validate_seed
from pyro_vae.core.pair import Amortized
from pyro_vae.core.progress import ticking
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.context import context_names
from pyro_vae.data.frames import is_table
from pyro_vae.data.masks import validate_same_labels
from pyro_vae.data.rows import context_like, context_numbers
from pyro_vae.data.values import Data, as_tensor
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.priors import ContextNormal
from pyro_vae.use.inputs import Names
from pyro_vae.use.labelled import label


@torch.no_grad()
@takes_settings
def sample(
    vae: Amortized, n: int, *, context: Any = None, seed: int = 0, chunk: int = 2**22, progress: bool = False
) -> xr.Dataset:
    """Sample new rows from the model.

    .. math:: z \\sim p(z), \\qquad x \\sim p(x | z)

    Args:
        vae: a VAE, or a :class:`pyro_vae.Pair` that was trained or has checked data; its model runs without data.
        n: the number of rows, at least 1.
        context: the context of a conditional VAE, one for all rows, shape ``(c,)`` or ``(1, c)``, or one for each row,
            shape ``(n, c)``; for a VAE that was trained on named context columns also a table of these columns, e.g.
            ``{"batch": ["b"]}``.
        seed: of the draws.
        chunk: the approximate number of values to process at a time (64 times as many on a GPU); another chunk gives
            other draws.
        progress: whether to show a progress bar.

    Returns:
        A dataset over ``datum`` and ``feature``: ``x``, the sampled rows in the units of the data. The features have
        the names of the training columns, and :func:`pyro_vae.as_table` replaces codes by the names of categories.

    Raises:
        DataError: if the context is not finite, or has neither one row nor n rows.
        ModelError: if the model needs a context and gets none, or one of another width; for a Pair, if its model uses
            the values of x other than as ``obs=x``, or has a latent outside the plate over data.
        SettingsError: if a setting is out of its range.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> sample(vae, 3).x.shape
        (3, 2)
    """
    whole("n", n, 1)
    whole("chunk", chunk, 1)
    validate_seed(seed)
    given = contexts(vae, context, n)
    rows = Rows(vae.stand_in(n), *given)
    device = rows.x.device
    with evaluating(vae):
        with seeded(seed, device):  # one row, to find out the number of values
            z, likelihood = _draw_one(vae, rows.take(slice(1)))
        size = max(1, numbers_at_once(chunk, device) // max(likelihood.event_shape.numel(), z.numel()))
        starts, drawn = range(0, n, size), []
        with ticking("Sampling", len(starts), progress) as tick:
            for first in starts:
                block = rows.take(slice(first, first + size))
                with seeded(derive_seed(seed, "sampling", first), device):
                    x = vae.likelihood(vae.draw_latents(block), block).sample()
                drawn.append(x.reshape(len(x), -1).cpu().numpy())
                tick()
    return label({"x": (["datum", "feature"], np.concatenate(drawn))}, Names.of(vae), seed=seed)


def _draw_one(vae: Amortized, row: Rows) -> tuple[Tensor, Distribution]:
    """Draw z of one row from the prior, and return p(x|z) too; an error names the context that the model needs."""
    parts = {role: getattr(vae, role, None) for role in ("prior", "decoder")}
    numbers = _inputs(parts["prior"]) if isinstance(parts["prior"], ContextNormal) else 0
    try:
        z = vae.draw_latents(row)
        numbers = _inputs(parts["decoder"]) - z.shape[-1]
        return z, vae.likelihood(z, row)
    except ModelError as error:
        raise _with_needed_context(error, vae, row.given, numbers) from error


def contexts(vae: Amortized, context: Any, n: int, labels: np.ndarray | None = None) -> tuple[Tensor, ...]:
    """Expand a context to n rows, on the device and in the precision of a VAE; return ``()`` without a context.

    Args:
        vae: the VAE.
        context: as for :func:`sample`.
        n: the number of rows.
        labels: the row labels of the data that the contexts belong to, if any.

    Raises:
        DataError: if the context has neither one row nor n rows, or they are labelled differently from the data.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> contexts(vae, [1.0, 2.0], 3)[0].shape
        torch.Size([3, 2])
    """
    if context is None:
        return ()
    named = _named(vae, context)
    context = context_numbers(named)
    array = context if isinstance(context, Tensor) else np.asarray(context)
    rows = vae.like(as_tensor(array[None] if array.ndim == 1 else array, source="context"))
    if rows.dim() != 2 or len(rows) not in (1, n):
        raise DataError(f"the context has shape {tuple(rows.shape)}, for {n} rows; give one row, or {n}")
    if len(rows) > 1:
        validate_same_labels("context", getattr(named, "row_labels", None), labels, "context")
    return (rows.expand(n, -1),)


def _named(vae: Amortized, context: Any) -> Any:
    """Read a table of context columns as in training; return any other context unchanged."""
    known = vae.trained_on
    if not is_table(context) and not isinstance(context, Data):
        return context
    if known is None or not known.context_columns:
        raise SettingsError("context is a table, but the VAE was not trained on named context columns; give numbers")
    return context_like(known, context)


def likelihood_at(vae: VAE, z: Tensor, given: tuple[Tensor, ...]) -> Distribution:
    """Return p(x|z) at latents in contexts from :func:`contexts`.

    Raises:
        ModelError: if the decoder cannot be called with these contexts; the message names the context that it needs.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> likelihood_at(vae, torch.zeros(3, 1), ()).batch_shape
        torch.Size([3])
    """
    try:
        return called("decoder", vae.decoder, z, *given)
    except ModelError as error:
        raise _with_needed_context(error, vae, given, _inputs(vae.decoder) - z.shape[-1]) from error


def prior_at(vae: VAE, given: tuple[Tensor, ...]) -> Distribution:
    """Return p(z) in contexts from :func:`contexts`.

    Raises:
        ModelError: if the prior cannot be called with these contexts; the message names the context that it needs.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> prior_at(vae, ()).event_shape
        torch.Size([1])
    """
    try:
        return called("prior", vae.prior, *given)
    except ModelError as error:
        numbers = _inputs(vae.prior) if isinstance(vae.prior, ContextNormal) else 0
        raise _with_needed_context(error, vae, given, numbers) from error


def _inputs(part: nn.Module | None) -> int:
    """Return the number of inputs of the first linear layer, or 0 if there is none."""
    layers = () if part is None else part.modules()
    return next((layer.in_features for layer in layers if isinstance(layer, nn.Linear)), 0)


def _with_needed_context(error: ModelError, vae: Amortized, given: tuple[Tensor, ...], numbers: int) -> ModelError:
    """Return an error that names the context that the model needs, or ``error`` if the context is not the cause.

    ``numbers`` is the width of the context for a VAE that was not trained on named context columns.
    """
    known, names, where = vae.trained_on, "", ""
    if known is not None and known.context_columns:
        each = context_names(known.context_columns, known.categories)
        numbers, names = len(each), f" ({', '.join(each)})"
        where = "; for pyro-vae sample, name a table of contexts with --data"
    width = given[0].shape[-1] if given else 0
    if numbers <= 0 or width == numbers:
        return error
    received = f"one of {width}" if width else "none"
    return ModelError(
        f"the model needs a context of {numbers} number{'s' * (numbers > 1)}{names} and got {received}; "
        f"pass context= of shape ({numbers},){where}"
    )
