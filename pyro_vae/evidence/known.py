"""The exact or given log p(x) of data, where one is available."""

import math
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.evidence.exact import LinearGaussian, quadrature_log_marginal


def known_evidence(vae: Any, rows: Rows, given: Any = None) -> tuple[float, float, str]:
    """Return the mean of log p(x), its standard error, and its source.

    The source is ``"given"``, an oracle (``"linear-Gaussian"`` or ``"quadrature"``), or ``"not known"`` with NaN.

    Args:
        vae: a VAE; a linear-Gaussian VAE or a VAE with at most two latents has an oracle.
        rows: the data.
        given: a dataset from :func:`log_evidence` or numbers of shape ``(datum,)``; None to use an oracle.

    Raises:
        DataError: if ``given`` is not one number per datum.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> known_evidence(linear.as_vae(), Rows(torch.ones(3, 5)))[2]
        'linear-Gaussian'
    """
    if given is None:
        return _oracle(vae, rows)
    mcse = np.asarray(given["mcse"], dtype=float) if isinstance(given, xr.Dataset) else np.zeros(1)
    values = given["log_evidence"] if isinstance(given, xr.Dataset) else given
    try:
        values = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
    except (TypeError, ValueError) as error:
        raise DataError("log_evidence holds a value that is not a number; pass one number per datum") from error
    if not np.isfinite(values).all():
        raise DataError("log_evidence holds a value that is not finite; pass one finite number per datum")
    if values.shape != (len(rows),):
        raise DataError(f"log_evidence has shape {values.shape} for {len(rows)} data; pass one number per datum")
    return float(values.mean()), float(np.sqrt((mcse**2).sum()) / len(values)), "given"


@torch.no_grad()
def _oracle(vae: Any, rows: Rows) -> tuple[float, float, str]:
    unknown = math.nan, math.nan, "not known"
    if not isinstance(vae, VAE) or rows.context is not None or rows.mask is not None:
        return unknown
    try:
        return float(LinearGaussian.of(vae).log_marginal(rows.x).mean()), 0.0, "linear-Gaussian"
    except (ModelError, SettingsError):  # such as a VAE with a scale per feature
        pass
    try:
        return float(quadrature_log_marginal(vae, rows.x).mean()), 0.0, "quadrature"
    except (ModelError, SettingsError):
        return unknown
