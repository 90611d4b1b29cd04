"""Reconstructions of data: what the posterior predictive expects of each feature."""

from collections.abc import Callable
from typing import Any

import torch
import xarray as xr

from pyro_vae.core.device import refuse_seed
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.use.features import likelihood_of, summarize, width_of
from pyro_vae.use.inputs import Found, Table, by_block, read
from pyro_vae.use.labelled import label


@torch.no_grad()
@takes_settings
def reconstruct(
    vae: VAE,
    data: Any,
    *,
    context: Any = None,
    mask: Any = None,
    draws: int = 100,
    seed: int = 0,
    chunk: int = 2**22,
    progress: bool = False,
) -> xr.Dataset:
    """Reconstruct data: the mean and the spread of the posterior predictive of each feature.

    .. math:: \\tilde x_i \\sim \\int p(\\tilde x | z)\\, q(z | x_i)\\, dz

    The mean of x given z is averaged over draws of z, in the units of the data. Where a likelihood has none in closed
    form (a ``DiscretizedLogisticMixture``, distributions of your own), x is drawn too.

    The mean of a ``Bernoulli`` is the probability of a 1, that of counts and grey levels a number between them. Codes
    of a ``Categorical`` have no mean: their reconstruction is the most probable code.

    Args:
        vae: a VAE.
        data: what :func:`pyro_vae.data.rows_for` takes, or a :func:`pyro_vae.data.stream`, which is read once; all but
            the result stays in bounded memory.
        context: of a conditional VAE, shape ``(datum, c)``.
        mask: booleans, the shape of the data: true where observed; what is missing is reconstructed too.
        draws: of z for each datum, at least 2.
        seed: of the draws.
        chunk: about so many numbers at a time, on a GPU 64 times as many; another chunk makes other draws.
        progress: whether to show a bar.

    Returns:
        A dataset over ``datum`` and ``feature``: ``x``, the mean; ``x_sd``, the standard deviation of **x itself**, in
        which are both the noise of the likelihood and what is not known of z (it does not fall with more draws and is
        not the error of the mean); ``x_mcse``, the standard error of the mean over the draws. Of codes, ``x`` is the
        most probable one, both errors are NaN, and ``x_probability`` with ``x_probability_mcse`` is the probability
        of that code.

    Raises:
        DataError: if the data are not those that the VAE takes, by value or by column.
        ModelError: if the VAE does not fit the data.
        SettingsError: if a setting is out of its range.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> found = reconstruct(vae, {"a": [0.0, 3.0], "b": [0.0, 3.0]}, draws=1000)
        >>> exact = 2.0  # W E[z|x]
        >>> bool(abs(found.x.sel(datum=1, feature="a") - exact) < 5 * found.x_mcse.sel(datum=1, feature="a"))
        True
    """
    whole("draws", draws, 2)
    whole("chunk", chunk, 1)
    refuse_seed(seed)
    table = read(vae, data, context=context, mask=mask)
    return decoded(vae, table, lambda rows: rows, draws=draws, seed=seed, chunk=chunk, progress=progress)


@torch.no_grad()
def decoded(
    vae: VAE,
    table: Table,
    seen_by_decoder: Callable[[Rows], Rows],
    *,
    draws: int,
    seed: int,
    chunk: int,
    progress: bool,
) -> xr.Dataset:
    """Encode the rows of a table, and decode them as rows of another context, or of their own.

    Args:
        vae: a VAE.
        table: the rows.
        seen_by_decoder: gives, for each block in its order, the rows with the context that the decoder sees.
        draws: of z for each row.
        seed: of the draws.
        chunk: about so many numbers at a time.
        progress: whether to show a bar.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.use.inputs import read
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> settings = {"draws": 10, "seed": 0, "chunk": 100, "progress": False}
        >>> decoded(vae, read(vae, torch.ones(3, 2)), lambda rows: rows, **settings).x.shape
        (3, 2)
    """

    def compute(rows: Rows) -> Found:
        z = vae.posterior(rows).sample((draws,))
        found = summarize(vae.likelihood(z, seen_by_decoder(rows)), z.new_full(z.shape[:2], 1 / draws))
        return {name: value.to(rows.x.dtype) for name, value in found.items()}

    found = by_block(
        vae, table, compute, draws=draws, width=width_of(likelihood_of(vae, table.first)), chunk=chunk, seed=seed,
        purpose="Reconstructing", progress=progress,
    )  # fmt: skip
    variables = {name: (["datum", "feature"], value) for name, value in found.items()}
    return label(variables, table.names, draws=draws, seed=seed)
