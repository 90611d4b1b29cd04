"""Draws of each site of a Pyro model and its guide, as the groups of a DataTree."""

from collections.abc import Iterable

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.core.pair import Amortised
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import samples
from pyro_vae.elbo.log_weights import Weights, at_particles, weigh, with_values, without_enumeration
from pyro_vae.errors import ModelError
from pyro_vae.evidence.psis import BAD, LEAST
from pyro_vae.evidence.weights import smoothed

Draws = dict[str, Tensor]
"""By site, shape ``(draw, datum, *event)``."""


@torch.no_grad()
def groups_of_sites(
    pair: Amortised, rows: Rows, *, draws: int, prior_draws: int, proposals: int | None
) -> dict[str, xr.Dataset]:
    """Draw from posterior and prior, and the data that they predict, with a variable for each site.

    Args:
        pair: a model and its guide.
        rows: on its device and in its precision.
        draws: posterior draws per datum.
        prior_draws: draws from the prior.
        proposals: draws of the guide, of which ``draws`` are taken by their smoothed weights; if None, none are
            resampled.

    Returns:
        The groups of :func:`pyro_vae.to_datatree`.

    Raises:
        ModelError: if a site lies in a further plate.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> pair = pv.Pair(vae.model, vae.guide)
        >>> groups = groups_of_sites(pair, Rows(torch.ones(3, 5)), draws=10, prior_draws=4, proposals=None)
        >>> groups["posterior"].z.dims, groups["prior"].z.shape
        (('chain', 'draw', 'datum', 'z_dim'), (1, 4, 2))
    """
    guide = without_enumeration(pair.guide)
    w = weigh(pair.model, guide, *rows.arguments(), num_particles=proposals or draws, given_globals=True)
    if w.global_sites and proposals:
        raise ModelError(
            f"draws are resampled for each datum, and site {w.global_sites[0]} has one draw for all data; take "
            "posterior='guide', or resample the pair given a draw of that site (pair.condition)"
        )
    judged = len(w.log) >= LEAST and not w.global_sites
    weights, khat = smoothed(w.log) if judged else (w.log, None)
    chosen = _chosen(weights, draws) if proposals else torch.arange(draws).unsqueeze(1).expand(draws, len(rows))
    column = torch.arange(len(rows), device=weights.device)
    latents = {
        name: value if name in w.global_sites else _validated(name, value, w)[chosen, column]
        for name, value in w.latents.items()
    }
    observed = [name for name, site in samples(w.model_trace) if site["is_observed"]]
    stats = _variables({"lp": w.joint[chosen, column], "log_weight": w.log[chosen, column]})
    if khat is not None:
        ess = 1 / weights.softmax(0).square().sum(0)
        stats = stats.assign(khat=("datum", khat.cpu().numpy(), {"threshold": BAD}), ess=("datum", ess.cpu().numpy()))
    predicted = _values(_replayed(pair, rows, with_values(w.guide_trace, latents), draws), observed)
    prior = _replayed(pair, rows.take(slice(1)), None, prior_draws)
    seen = {name: w.model_trace.nodes[name]["value"] for name in observed}
    return {
        "posterior": _of_latents(latents, w.global_sites),
        "posterior_predictive": _variables(predicted, observed),
        "log_likelihood": _variables({"x": w.likelihood[chosen, column]}),
        "sample_stats": stats,
        "prior": _of_latents(_values(prior, latents), w.global_sites).isel(datum=0, missing_dims="ignore"),
        "prior_predictive": _variables(_values(prior, observed), observed).isel(datum=0),
        "observed_data": _variables({name: x.unsqueeze(0) for name, x in seen.items()}, observed).isel(chain=0, draw=0),
    }


def _chosen(weights: Tensor, draws: int) -> Tensor:
    """The numbers of the proposals that are taken for each datum, shape ``(draw, datum)``."""
    return torch.multinomial(weights.softmax(0).T, draws, replacement=True).T


def _validated(name: str, value: Tensor, w: Weights) -> Tensor:
    event = w.guide_trace.nodes[name]["fn"].event_dim
    if value.dim() - event != 2 or value.shape[:2] != w.log.shape:
        raise ModelError(
            f"site {name} has shape {tuple(value.shape)} for {len(w.log)} draws of {w.log.shape[1]} data: it lies in a "
            "further plate, which has no name in a DataTree here; make that plate a dimension of the event (to_event)"
        )
    return value


def _replayed(pair: Amortised, rows: Rows, latents: Trace | None, draws: int) -> Trace:
    """The model with its data drawn, too, at latents or at those of its own."""
    model = poutine.uncondition(at_particles(pair.model, draws))
    model = model if latents is None else poutine.replay(model, trace=latents)
    return poutine.trace(model).get_trace(*rows.arguments())


def _values(trace: Trace, names: Iterable[str]) -> Draws:
    return {name: trace.nodes[name]["value"] for name in names}


def _of_latents(values: Draws, shared: list[str]) -> xr.Dataset:
    """A variable of one chain for each latent; that of a global site has no datum."""
    local = _variables({name: value for name, value in values.items() if name not in shared})
    return local.assign({name: _of_all_data(name, values[name]) for name in shared})


def _of_all_data(name: str, value: Tensor) -> tuple[tuple[str, ...], np.ndarray]:
    """Draws of a global site, in place of whose data there is one, as a variable."""
    value = value.squeeze(1) if value.shape[1] == 1 else value
    behind = [f"{name}_dim"] if value.dim() > 1 else []
    array = value.flatten(1) if behind else value
    return ("chain", "draw", *behind), array.unsqueeze(0).cpu().numpy()


def _variables(values: Draws, observed: Iterable[str] = ()) -> xr.Dataset:
    """A variable of one chain for each site; all its dimensions behind the data in one, called feature for data."""
    names, made = list(observed), {}
    for name, value in values.items():
        behind = ["feature" if names == [name] else f"{name}_dim"] if value.dim() > 2 else []
        array = value.flatten(2) if behind else value
        made[name] = (("chain", "draw", "datum", *behind), array.unsqueeze(0).cpu().numpy())
    return xr.Dataset(made)
