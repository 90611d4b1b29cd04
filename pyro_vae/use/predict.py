"""Counterfactual predictions: data as they would be in another context."""

from dataclasses import replace
from typing import Any

import torch
import xarray as xr

from pyro_vae.core.device import refuse_seed
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import SettingsError
from pyro_vae.use.inputs import read
from pyro_vae.use.reconstruct import decoded
from pyro_vae.use.sample import contexts


@torch.no_grad()
@takes_settings
def predict(
    vae: VAE,
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
    """Predict data in another context: encode in their own, decode in the other.

    .. math:: \\tilde x_i \\sim \\int p(\\tilde x | z, c')\\, q(z | x_i, c_i)\\, dz

    So the latents of a datum stay what its own context c and its values say, and the decoder alone sees c'. Where the
    prior depends on the context too (``ContextNormal``), z is not moved along with it: what c' changes in z is left
    out. The noise of x is drawn anew. Whether the difference is an effect is a question of how the contexts came about.

    The draws of z are those of :func:`pyro_vae.reconstruct` with the same ``draws``, ``seed`` and ``chunk``, so that
    differences from it, or between two contexts, hold no noise of draws but that of the difference itself.

    Args:
        vae: a conditional VAE, whose decoder sees the context.
        data: what :func:`pyro_vae.reconstruct` takes.
        context: c', one for all rows, shape ``(c,)`` or ``(1, c)``, or one for each, shape ``(datum, c)``; of a VAE
            that was trained on named context columns also a table of these, as ``{"batch": ["b"]}``.
        own_context: c, shape ``(datum, c)``; not given where the data have their own.
        mask: booleans, the shape of the data: true where observed.
        draws: of z for each datum, at least 2.
        seed: of the draws.
        chunk: about so many numbers at a time, on a GPU 64 times as many; another chunk makes other draws.
        progress: whether to show a bar.

    Returns:
        A dataset as that of :func:`pyro_vae.reconstruct`: ``x``, the mean; ``x_sd``, the standard deviation of x
        itself; ``x_mcse``, the standard error of the mean over the draws.

    Raises:
        DataError: if the data are not those that the VAE takes, or ``context`` is not finite or not of one row or all.
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
        ...     decoder=pv.likelihoods.Normal(torch.nn.Linear(2 + 1, 3)),  # whose last column is the effect of a batch
        ...     encoder=pv.posteriors.DiagNormal(pv.nn.mlp(3 + 1, [8], 4)),
        ... )
        >>> x, batch = torch.randn(5, 3), torch.zeros(5, 1)
        >>> effect = predict(vae, x, own_context=batch, context=[1.0]).x - pv.reconstruct(vae, x, context=batch).x
        >>> bool((effect - vae.decoder.net.weight[:, 2].numpy(force=True)).max() < 1e-6)
        True
    """
    whole("draws", draws, 2)
    whole("chunk", chunk, 1)
    refuse_seed(seed)
    table = read(vae, data, context=own_context, mask=mask)
    if table.first.context is None:
        raise SettingsError("the data have no context of their own, in which they are encoded; give it as own_context=")
    if context is None:
        raise SettingsError("context is None; give the context to predict in")
    (others,) = contexts(vae, context, len(table))
    left = others

    def in_the_other(rows: Rows) -> Rows:
        nonlocal left  # the blocks come in the order of the contexts
        other, left = left.split([len(rows), len(left) - len(rows)])
        return replace(rows, context=other)

    return decoded(vae, table, in_the_other, draws=draws, seed=seed, chunk=chunk, progress=progress)
