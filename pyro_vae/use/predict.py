"""Predict data in another context."""

from dataclasses import replace
from typing import Any

import torch
import xarray as xr

from pyro_vae.core.device import validate_seed
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import SettingsError
from pyro_vae.use.inputs import read
from pyro_vae.use.reconstruct import encode_and_decode
from pyro_vae.use.sample import contexts


@torch.no_grad()
@takes_settings
def predict(
    vae: Amortized,
    data: Any,
    *,
    context: Any,
    own_context: Any = None,
    mask: Any = None,
    draws: int = 100,
    seed: int = 0,
    chunk: int = 2**22,
    progress: bool = False,
) -> xr.Dataset:
    """Predict data in another context: encode in their own context, decode in the other.

    .. math:: \\tilde x_i \\sim \\int p(\\tilde x | z, c')\\, q(z | x_i, c_i)\\, dz

    The latents of a datum depend on its values and its own context c; only the decoder sees c'. If the prior depends on
    the context too (``ContextNormal``), the effect of c' on z is left out. The noise of x is drawn independently.
    Whether the difference between two contexts is causal depends on how the contexts were assigned.

    The draws of z are those of :func:`pyro_vae.reconstruct` with the same ``draws``, ``seed`` and ``chunk``, so that
    the difference from a reconstruction, or between two contexts, uses common random numbers.

    Args:
        vae: a conditional VAE, whose decoder sees the context, or a :class:`pyro_vae.Pair` whose model takes one.
        data: what :func:`pyro_vae.reconstruct` takes.
        context: c', one for all rows, shape ``(c,)`` or ``(1, c)``, or one for each row, shape ``(datum, c)``; for a
            VAE that was trained on named context columns also a table of these columns, e.g. ``{"batch": ["b"]}``.
        own_context: c, shape ``(datum, c)``; not needed if the data hold it.
        mask: booleans, the shape of the data: true where observed.
        draws: the number of draws of z for each datum, at least 2.
        seed: of the draws.
        chunk: the approximate number of values to process at a time (64 times as many on a GPU); another chunk gives
            other draws.
        progress: whether to show a progress bar.

    Returns:
        A dataset like that of :func:`pyro_vae.reconstruct`: ``x``, the mean; ``x_sd``, the standard deviation of x
        itself; ``x_mcse``, the standard error of the mean over draws.

    Raises:
        DataError: if the data do not fit the VAE, or ``context`` is not finite or has neither one row nor all.
        ModelError: if the VAE does not fit the data or their contexts.
        SettingsError: if the data have no context of their own, or a setting is out of its range.

    References:
        | Learning Structured Output Representation using Deep Conditional Generative Models (Sohn et al., 2015),
          https://proceedings.neurips.cc/paper/2015/hash/8d55a249e6baa5c06772297520da2051-Abstract.html
        | Deep Generative Modeling for Single-Cell Transcriptomics (Lopez et al., 2018),
          https://doi.org/10.1038/s41592-018-0229-2

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> vae = pv.VAE(
        ...     prior=pv.priors.StandardNormal(2),
        ...     decoder=pv.likelihoods.Normal(torch.nn.Linear(2 + 1, 3)),  # the last column is the effect of a batch
        ...     encoder=pv.posteriors.DiagNormal(pv.nn.mlp(3 + 1, [8], 4)),
        ... )
        >>> x, batch = torch.randn(5, 3), torch.zeros(5, 1)
        >>> effect = predict(vae, x, own_context=batch, context=[1.0]).x - pv.reconstruct(vae, x, context=batch).x
        >>> bool((effect - vae.decoder.net.weight[:, 2].numpy(force=True)).max() < 1e-6)
        True
    """
    whole("draws", draws, 2)
    whole("chunk", chunk, 1)
    validate_seed(seed)
    table = read(vae, data, context=own_context, mask=mask)
    if table.first.context is None:
        raise SettingsError("the data have no context to be encoded in; pass it as own_context=")
    if context is None:
        raise SettingsError("context is None; pass the context to predict in")
    (remaining,) = contexts(vae, context, len(table), table.names.row_labels)

    def replace_context(rows: Rows) -> Rows:
        nonlocal remaining  # the blocks come in the order of the contexts
        other, remaining = remaining.split([len(rows), len(remaining) - len(rows)])
        return replace(rows, context=other)

    return encode_and_decode(vae, table, replace_context, draws=draws, seed=seed, chunk=chunk, progress=progress)
