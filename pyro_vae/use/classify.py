"""Classify data with a model whose discrete class is summed out."""

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.core.component import evaluating
from pyro_vae.core.device import numbers_at_once, seeded, validate_seed
from pyro_vae.core.pair import Pair
from pyro_vae.core.rows import Rows
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import row_names
from pyro_vae.elbo.log_weights import weigh
from pyro_vae.errors import ModelError


@torch.no_grad()
@takes_settings
def classify(pair: Pair, x: Any, *, num_particles: int = 100, seed: int = 0, chunk: int = 2**22) -> xr.Dataset:
    """Compute the probability of each class of each datum, by Bayes' rule and by the guide.

    .. math:: p(y | x_i) \\approx \\frac{\\sum_k w_{kiy}}{\\sum_{ky'} w_{kiy'}}, \\qquad
        w_{kiy} = \\frac{p(x_i, y, z_{kiy})}{q(z_{kiy} | x_i, y)}

    Args:
        pair: a model and a guide; the guide has one discrete site with ``infer={"enumerate": "parallel"}``.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask. Do not pass known
            labels in the context: a label that the model observes gets probability 1.
        num_particles: number of particles K, at least 2.
        seed: seed of the particles.
        chunk: approximate number of array elements to process at once.

    Returns:
        A dataset over ``datum`` and ``class`` (numbers from 0): ``probability`` with its Monte-Carlo standard error
        ``probability_se`` (delta method), and ``guide_probability``, the mean of q(y|x) over particles. Over ``datum``:
        ``predicted``, the most probable class.

    Raises:
        DataError: if the data are not finite numbers in rows.
        ModelError: if the guide does not enumerate exactly one site.
        SettingsError: if a setting is out of its range.

    References:
        | Semi-supervised Learning with Deep Generative Models (Kingma et al., 2014), https://arxiv.org/abs/1406.5298

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_vae as pv
        >>> centers = torch.tensor([-1.0, 1.0])
        >>> def model(x, size=None):
        ...     with pyro.plate("data", len(x) if size is None else size, subsample=x):
        ...         y = pyro.sample("y", dist.Categorical(torch.ones(2)))
        ...         pyro.sample("x", dist.Normal(centers[y].unsqueeze(-1), 1.0).to_event(1), obs=x)
        >>> def guide(x, size=None):
        ...     with pyro.plate("data", len(x) if size is None else size, subsample=x):
        ...         pyro.sample("y", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        >>> pv.classify(pv.Pair(model, guide), torch.tensor([[0.0], [0.5]])).probability.values.round(3)
        array([[0.5  , 0.5  ],
               [0.269, 0.731]])
    """
    whole("num_particles", num_particles, 2)
    whole("chunk", chunk, 1)
    validate_seed(seed)
    x = data_for(pair, x)
    rows = rows_for(pair, x).like(pair)
    size = max(1, numbers_at_once(chunk, rows.x.device) // (num_particles * rows.x[0].numel()))
    with seeded(seed, rows.x.device), evaluating(pair, num_particles * min(size, len(rows))):
        parts = [_probabilities(pair, part, num_particles) for part in rows.split(size)]
    estimates = dict(zip(("probability", "probability_se", "guide_probability"), torch.cat(parts, 1), strict=True))
    variables = {name: (("datum", "class"), value.double().cpu().numpy()) for name, value in estimates.items()}
    predicted = estimates["probability"].argmax(1).cpu().numpy()
    coords = {"datum": row_names(x, len(rows)), "class": np.arange(estimates["probability"].shape[1])}
    return xr.Dataset(
        {**variables, "predicted": ("datum", predicted)}, coords, {"num_particles": num_particles, "seed": seed}
    )


def _probabilities(pair: Pair, rows: Rows, num_particles: int) -> Tensor:
    """Compute p(y|x), its standard error and q(y|x), shape ``(3, datum, class)``."""
    w = weigh(pair.model, pair.guide, *rows.arguments(), num_particles=num_particles)
    if len(w.enumerated) != 1:
        raise ModelError(
            f"the guide enumerates {', '.join(w.enumerated) or 'no site'}, but classify needs exactly one such site; "
            'set infer={"enumerate": "parallel"} for the site of the class only'
        )
    log = w.log_by_class
    share = (log - log.logsumexp((0, 1))).exp()
    probability = share.sum(1)
    influence = share - probability.unsqueeze(1) * share.sum(0)  # of each particle on the ratio (delta method)
    error = (num_particles / (num_particles - 1) * influence.square().sum(1)).sqrt()
    return torch.stack([part.T for part in (probability, error, w.log_q_by_class.exp().mean(1))])
