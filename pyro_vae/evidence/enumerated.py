"""The discrete model that a Gumbel-softmax VAE relaxes, and its evidence by enumeration."""

import copy
from typing import Any

import torch
from torch import Tensor

from pyro_vae.core.component import evaluating
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import rows_for
from pyro_vae.errors import ModelError, type_of
from pyro_vae.nn import OnSimplex

MOST = 100_000
"""The largest number of combinations of categories that is enumerated."""


def discrete(vae: VAE) -> VAE:
    """Build the VAE with one-hot latents that a Gumbel-softmax VAE relaxes; they share all parameters.

    The bounds of the relaxed VAE (**relaxed bounds**) do not bound log p(x) of the discrete VAE; the bounds of the
    discrete VAE (**discrete bounds**) do. The discrete guide is not reparameterizable: train it with
    :class:`pyro_vae.elbo.ScoreFunction`, :class:`~pyro_vae.elbo.VIMCO` or Pyro's ``TraceEnum_ELBO``.

    Args:
        vae: a VAE whose prior and encoder are ``GumbelSoftmax`` and whose decoder's network is an ``OnSimplex``.

    Raises:
        ModelError: if a component is not of this type.

    References:
        | The Concrete Distribution (Maddison, Mnih & Teh, 2017), https://arxiv.org/abs/1611.00712

    Example:
        >>> import pyro_vae as pv
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> relaxed = pv.VAE(
        ...     prior=pv.priors.GumbelSoftmax(2, categories=3),
        ...     decoder=pv.likelihoods.Bernoulli(pv.nn.OnSimplex(nn.Linear(3, 5), 2, 3)),
        ...     encoder=pv.posteriors.GumbelSoftmax(nn.Linear(5, 3), 3),
        ... )
        >>> vae = discrete(relaxed)
        >>> vae.encoder(torch.zeros(1, 5)).mean.shape  # the probability of each category
        torch.Size([1, 3])
        >>> vae.decoder.net is relaxed.decoder.net.net
        True
    """
    parts = {"prior": vae.prior, "encoder": vae.encoder}
    for role, part in parts.items():
        if not callable(getattr(part, "discrete", None)):
            raise ModelError(f"the {role} is {type_of(part)}; it must be a GumbelSoftmax")
    net = getattr(vae.decoder, "net", None)
    if not isinstance(net, OnSimplex):
        raise ModelError(
            f"the decoder's network is {type_of(net)}; wrap it in pyro_vae.nn.OnSimplex, which converts "
            "log-ratios to shares of categories"
        )
    decoder = copy.copy(vae.decoder)
    decoder._modules = {**vae.decoder._modules, "net": net.net}
    return VAE(prior=vae.prior.discrete(), decoder=decoder, encoder=vae.encoder.discrete())  # type: ignore[operator]


@torch.no_grad()
@takes_settings
def enumerated_log_marginal(vae: VAE, x: Any, *, chunk: int = 2**22) -> Tensor:
    """Compute log p(x) of a VAE with categorical latents exactly, by enumeration.

    .. math:: \\log p(x) = \\log \\sum_z p(z)\\, p(x | z)

    Args:
        vae: a VAE whose prior has ``enumerate_support``, such as one from :func:`discrete`; its encoder is not used.
        x: data, as :func:`pyro_vae.data.rows_for` takes them.
        chunk: the approximate number of decoded numbers to hold at a time.

    Returns:
        log p(x) in nats, shape ``(datum,)``.

    Raises:
        DataError: if the data do not fit the VAE.
        ModelError: if the prior is not discrete, or has more than 100,000 combinations.

    Example:
        >>> import pyro_vae as pv
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> vae = discrete(pv.VAE(
        ...     prior=pv.priors.GumbelSoftmax(1, categories=2),
        ...     decoder=pv.likelihoods.Bernoulli(pv.nn.OnSimplex(nn.Linear(2, 1), 1, 2)),
        ...     encoder=pv.posteriors.GumbelSoftmax(nn.Linear(1, 2), 2),
        ... ))
        >>> bool((enumerated_log_marginal(vae, [[0.0], [1.0]]).exp().sum() - 1).abs() < 1e-6)
        True
    """
    whole("chunk", chunk, 1)
    rows = rows_for(vae, x).like(vae)
    prior = vae.prior(*rows.given)
    if not prior.has_enumerate_support:
        raise ModelError(f"the prior {type(vae.prior).__name__} is not discrete; use pyro_vae.log_evidence instead")
    states = _states(prior)
    size = max(1, chunk // max(1, rows.x.numel()))
    with evaluating(vae):
        return torch.stack([_log_joint(vae, rows, part) for part in states.split(size)]).logsumexp(0)


def _states(prior: Any) -> Tensor:
    """All combinations, shape ``(combination, 1, latent)``."""
    variables, categories = getattr(prior, "logits", torch.empty(1, 1)).shape[-2:]
    if categories**variables > MOST:
        raise ModelError(
            f"{variables} variables of {categories} categories have more than {MOST:,} combinations; estimate log p(x) "
            "with pyro_vae.log_evidence instead"
        )
    values: Tensor = prior.enumerate_support(expand=False)
    return values.reshape(len(values), 1, -1)


def _log_joint(vae: VAE, rows: Rows, states: Tensor) -> Tensor:
    """The logarithm of the sum of p(x, z) over some combinations, shape ``(datum,)``."""
    return vae.log_joint(states.expand(-1, len(rows), -1), rows).logsumexp(0)
