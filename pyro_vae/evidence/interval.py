"""An interval for log p(x) that accounts for the tail of the weights beyond the largest draw."""

import numpy as np
import xarray as xr

from pyro_vae.errors import SettingsError

HEAVIEST = 0.9
"""The value at which k̂ is clipped; as k̂ approaches 1, the interval becomes useless."""


def interval(found: xr.Dataset) -> xr.Dataset:
    """Compute an interval for log p(x) of each datum, which is longer above than below.

    .. math:: \\big[\\log \\hat p - 2\\,\\mathrm{mcse}, \\;
        \\log \\hat p - \\mathrm{bias} + 2\\,\\mathrm{mcse} / (1 - \\hat k)^{3/2}\\big], \\qquad 0 \\le \\hat k \\le 0.9

    With heavy-tailed weights, nearly every estimate is too low and its standard error too small, which the upper end
    accounts for. The power 3/2 was chosen by simulation; ``docs/evidence.md`` has the measured coverage. The interval
    does not account for a mode that no draw has reached.

    Args:
        found: the result of :func:`pyro_vae.log_evidence` with any method but ``"bdmc"`` and at least 25 particles.

    Returns:
        ``low`` and ``high`` over ``datum``, in nats.

    Raises:
        SettingsError: if ``found`` has no bias or no k̂.

    Example:
        >>> import torch, pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x = linear.sample(50)
        >>> ends, truth = interval(pv.log_evidence(linear.as_vae(diagonal=True), x)), linear.log_marginal(x).numpy()
        >>> bool(((ends.low < truth) & (truth < ends.high)).mean() > 0.9)
        True
    """
    if "bias" not in found or bool(found.khat.isnull().any()):
        raise SettingsError(
            "found has no bias or no k̂; pass an estimate by a method other than bdmc with at least 25 particles"
        )
    low, high = ends(*(found[name].values for name in ("log_evidence", "mcse", "khat", "bias")))
    nats = {"units": "nats"}
    return xr.Dataset({"low": ("datum", low, nats), "high": ("datum", high, nats)}, {"datum": found.datum})


def ends(value: np.ndarray, mcse: np.ndarray, khat: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the lower and the upper end of :func:`interval`.

    Example:
        >>> low, high = ends(*map(np.array, (0.0, 0.1, 0.0, -0.02)))
        >>> float(low), round(float(high), 6)
        (-0.2, 0.22)
    """
    return value - 2 * mcse, value - bias + 2 * mcse / (1 - khat.clip(0, HEAVIEST)) ** 1.5
