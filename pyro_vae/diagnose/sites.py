"""Draw each site of a Pyro model and its guide, as the groups of a DataTree."""

from collections.abc import Iterable

import numpy as np
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import samples
from pyro_vae.elbo.log_weights import at_particles, weigh, with_values, without_enumeration
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import ModelError
from pyro_vae.evidence.psis import BAD, LEAST
from pyro_vae.evidence.weights import smoothed

Draws = dict[str, Tensor]
"""Values of each site, shape ``(draw, datum, *event)``."""


@torch.no_grad()
def groups_of_sites(
    pair: Amortized, rows: Rows, *, draws: int, prior_draws: int, proposals: int | None
) -> dict[str, xr.Dataset]:
    """Draw from the posterior, the prior and their predictive distributions; each site is a variable.

    Args:
        pair: a model and its guide.
        rows: the data, on the device and in the precision of the pair.
        draws: posterior draws per datum.
        prior_draws: draws from the prior.
        proposals: number of draws of the guide, from which ``draws`` are resampled by their smoothed weights; None for
            draws of the guide without resampling.

    Returns:
        The groups of :func:`pyro_vae.to_datatree`.

    Raises:
        ModelError: if a site lies in a second plate, or draws of a pair with global sites are to be resampled.

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
            f"cannot resample the draws of each datum, since site {w.global_sites[0]} has one draw for all data; use "
            "posterior='guide', or condition the pair on a draw of this site (pair.condition)"
        )
    can_smooth = len(w.log) >= LEAST and not w.global_sites
    weights, khat = smoothed(w.log) if can_smooth else (w.log, None)
    chosen = _resample(weights, draws) if proposals else torch.arange(draws).unsqueeze(1).expand(draws, len(rows))
    column = torch.arange(len(rows), device=weights.device)
    latents = {
        name: value if name in w.global_sites else _validate_shape(name, value, w)[chosen, column]
        for name, value in w.latents.items()
    }
    observed = [name for name, site in samples(w.model_trace) if site["is_observed"]]
    stats = _variables({"lp": w.joint[chosen, column], "log_weight": w.log[chosen, column]})
    if khat is not None:
        ess = 1 / weights.softmax(0).square().sum(0)
        stats = stats.assign(khat=("datum", khat.cpu().numpy(), {"threshold": BAD}), ess=("datum", ess.cpu().numpy()))
    predicted = _values(_draw_data(pair, rows, with_values(w.guide_trace, latents), draws), observed)
    prior = _draw_prior(pair, rows, prior_draws, [*latents, *observed], w.global_sites)
    seen = {name: w.model_trace.nodes[name]["value"] for name in observed}
    return {
        "posterior": _latent_variables(latents, w.global_sites),
        "posterior_predictive": _variables(predicted, observed),
        "log_likelihood": _variables({"x": w.likelihood[chosen, column]}),
        "sample_stats": stats,
        "prior": _latent_variables({n: prior[n] for n in latents}, w.global_sites).isel(datum=0, missing_dims="ignore"),
        "prior_predictive": _variables({n: prior[n] for n in observed}, observed).isel(datum=0),
        "observed_data": _variables({name: x.unsqueeze(0) for name, x in seen.items()}, observed).isel(chain=0, draw=0),
    }


def _resample(weights: Tensor, draws: int) -> Tensor:
    """Return the indices of the resampled proposals of each datum, shape ``(draw, datum)``."""
    return torch.multinomial(weights.softmax(0).T, draws, replacement=True).T


def _validate_shape(name: str, value: Tensor, w: Weights) -> Tensor:
    event = w.guide_trace.nodes[name]["fn"].event_dim
    if value.dim() - event != 2 or value.shape[:2] != w.log.shape:
        raise ModelError(
            f"site {name} has shape {tuple(value.shape)} for {len(w.log)} draws of {w.log.shape[1]} data, so it lies "
            "in a second plate, which DataTrees do not support; make that plate a dimension of the event (to_event)"
        )
    return value


def _draw_data(pair: Amortized, rows: Rows, latents: Trace | None, draws: int) -> Trace:
    """Run the model with its data drawn, at given latents or at draws from the prior."""
    model = poutine.uncondition(at_particles(pair.model, draws))
    model = model if latents is None else poutine.replay(model, trace=latents)
    return poutine.trace(model).get_trace(*rows.arguments())


def _draw_prior(pair: Amortized, rows: Rows, draws: int, names: list[str], shared: list[str]) -> Draws:
    """Draw one datum at a time, each with the context of a random row; with global sites, that of the first row."""
    if rows.context is None or shared:
        return _values(_draw_data(pair, rows.take(slice(1)), None, draws), names)
    index = torch.randint(len(rows), (draws,), device=rows.x.device)
    drawn = _values(_draw_data(pair, rows.take(index), None, 1), names)
    return {name: value.transpose(0, 1) for name, value in drawn.items()}


def _values(trace: Trace, names: Iterable[str]) -> Draws:
    return {name: trace.nodes[name]["value"] for name in names}


def _latent_variables(values: Draws, shared: list[str]) -> xr.Dataset:
    """Return a variable of one chain for each latent; variables of global sites have no dimension ``datum``."""
    local = _variables({name: value for name, value in values.items() if name not in shared})
    return local.assign({name: _global_variable(name, values[name]) for name in shared})


def _global_variable(name: str, value: Tensor) -> tuple[tuple[str, ...], np.ndarray]:
    """Return draws of a global site as a variable; a dimension of size 1 in place of the data is dropped."""
    value = value.squeeze(1) if value.shape[1] == 1 else value
    event = [f"{name}_dim"] if value.dim() > 1 else []
    array = value.flatten(1) if event else value
    return ("chain", "draw", *event), array.unsqueeze(0).cpu().numpy()


def _variables(values: Draws, observed: Iterable[str] = ()) -> xr.Dataset:
    """Return a variable of one chain for each site; its event is one dimension, ``feature`` for observed data."""
    names, variables = list(observed), {}
    for name, value in values.items():
        event = ["feature" if names == [name] else f"{name}_dim"] if value.dim() > 2 else []
        array = value.flatten(2) if event else value
        variables[name] = (("chain", "draw", "datum", *event), array.unsqueeze(0).cpu().numpy())
    return xr.Dataset(variables)
