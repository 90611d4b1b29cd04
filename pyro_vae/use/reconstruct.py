"""Reconstruct data by the posterior predictive mean of each feature."""

from collections.abc import Callable
from typing import Any

import torch
import xarray as xr

from pyro_vae.core.device import validate_seed
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.use.features import likelihood_of, summarize, width_of
from pyro_vae.use.inputs import Found, Table, by_block, read
from pyro_vae.use.labelled import label


@torch.no_grad()
@takes_settings
def reconstruct(
    vae: Amortized,
    data: Any,
    *,
    context: Any = None,
    mask: Any = None,
    draws: int = 100,
    seed: int = 0,
    chunk: int = 2**22,
    progress: bool = False,
) -> xr.Dataset:
    """Compute the posterior predictive mean and standard deviation of each feature.

    .. math:: \\tilde x_i \\sim \\int p(\\tilde x | z)\\, q(z | x_i)\\, dz

    The mean of x given z is averaged over draws of z, in the units of the data. If it has no closed form (a
    ``DiscretizedLogisticMixture``, custom distributions), x is drawn too.

    The mean of a ``Bernoulli`` is the probability of a 1; the mean of counts and grey levels need not be whole. Codes
    of a ``Categorical`` have no mean: their reconstruction is the most probable code.

    Args:
        vae: a VAE or a :class:`pyro_vae.Pair`.
        data: what :func:`pyro_vae.data.rows_for` takes, or a :func:`pyro_vae.data.stream`, which is read once; memory
            is bounded, except for the result.
        context: of a conditional VAE, shape ``(datum, c)``, or a table, matched by name.
        mask: booleans, the shape of the data: true where observed; missing values are reconstructed too.
        draws: the number of draws of z for each datum, at least 2.
        seed: of the draws.
        chunk: the approximate number of values to process at a time (64 times as many on a GPU); another chunk gives
            other draws.
        progress: whether to show a progress bar.

    Returns:
        A dataset over ``datum`` and ``feature``: ``x``, the mean; ``x_sd``, the standard deviation of **x itself**,
        which includes the noise of the likelihood and the uncertainty of z (it does not shrink with more draws and is
        not the error of the mean); ``x_mcse``, the standard error of the mean over draws. For codes, ``x`` is the
        most probable code, both errors are NaN, and ``x_probability`` with ``x_probability_mcse`` is the probability
        of that code.

    Raises:
        DataError: if the values or columns of the data do not fit the VAE.
        ModelError: if the VAE does not fit the data, or a Pair has a latent outside the plate over data.
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
    validate_seed(seed)
    table = read(vae, data, context=context, mask=mask)
    return encode_and_decode(vae, table, lambda rows: rows, draws=draws, seed=seed, chunk=chunk, progress=progress)


@torch.no_grad()
def encode_and_decode(
    vae: Amortized,
    table: Table,
    rows_to_decode: Callable[[Rows], Rows],
    *,
    draws: int,
    seed: int,
    chunk: int,
    progress: bool,
) -> xr.Dataset:
    """Encode the rows of a table, and decode them in the same or another context.

    Args:
        vae: a VAE.
        table: the rows.
        rows_to_decode: a function that returns, for each block in order, the rows with the decoder's context.
        draws: the number of draws of z for each row.
        seed: of the draws.
        chunk: the approximate number of values to process at a time.
        progress: whether to show a progress bar.

    Example:
        >>> import pyro_vae as pv
        >>> from pyro_vae.use.inputs import read
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 1.0).as_vae()
        >>> settings = {"draws": 10, "seed": 0, "chunk": 100, "progress": False}
        >>> encode_and_decode(vae, read(vae, torch.ones(3, 2)), lambda rows: rows, **settings).x.shape
        (3, 2)
    """

    def compute(rows: Rows) -> Found:
        z = vae.posterior(rows).sample((draws,))
        found = summarize(vae.likelihood(z, rows_to_decode(rows)), z.new_full(z.shape[:2], 1 / draws))
        return {name: value.to(rows.x.dtype) for name, value in found.items()}

    found = by_block(
        vae, table, compute, draws=draws, width=width_of(likelihood_of(vae, table.first)), chunk=chunk, seed=seed,
        purpose="Reconstructing", progress=progress,
    )  # fmt: skip
    variables = {name: (["datum", "feature"], value) for name, value in found.items()}
    return label(variables, table.names, draws=draws, seed=seed)
