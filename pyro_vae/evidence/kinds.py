"""Whether log p(x) is of a density or of a probability: the two are not to be compared."""

from typing import Any

import torch

from pyro_vae.core import VAE, evaluating, infer
from pyro_vae.device import seeded
from pyro_vae.kl import base
from pyro_vae.likelihoods._distributions import Side
from pyro_vae.rows import Rows

CAUTION = "Densities and probabilities are not in the same units: compare models of one kind only."


@torch.no_grad()
def countable_features(vae: VAE, rows: Rows) -> tuple[bool, ...]:
    """Of each feature, whether its values are countable, so that a probability is had of it and not a density.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
        >>> countable_features(vae, Rows(torch.zeros(3, 2)))
        (False, False)
    """
    one = rows.take(slice(1)).like(vae)
    given = () if one.context is None else (one.context,)
    with seeded(0, one.x.device), evaluating(vae):
        z = infer(vae.encoder, one.x, one.context, one.mask).sample()
        likelihood = vae.decoder(z, *given)
    features = base(likelihood)
    parts, sizes = (features.parts, features.sizes) if isinstance(features, Side) else ([features], [rows.x[0].numel()])
    return tuple(_is_discrete(part) for part, size in zip(parts, sizes, strict=True) for _ in range(size))


def _is_discrete(d: Any) -> bool:
    """Whether a distribution is of countable values; one that does not say is taken for a density."""
    try:
        return bool(d.support.is_discrete)
    except NotImplementedError:
        return False


def kind(features: tuple[bool, ...]) -> str:
    """What :func:`countable_features` says, in a word.

    Example:
        >>> kind((True, True)), kind((True, False)), kind((False,))
        ('probability', 'both', 'density')
    """
    return "probability" if all(features) else "both" if any(features) else "density"
