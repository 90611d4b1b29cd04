"""Draw from the prior and posterior predictive distributions, in ArviZ's schema."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import __version__, versions
from pyro_vae.core.component import Distribution, evaluating
from pyro_vae.core.device import seeded, validate_seed
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import Data, row_names
from pyro_vae.diagnose.sites import groups_of_sites
from pyro_vae.errors import SettingsError, type_of
from pyro_vae.evidence.kinds import countable_features
from pyro_vae.evidence.psis import BAD, LEAST
from pyro_vae.evidence.weights import smoothed

From: TypeAlias = Literal["guide", "psis"]

PROPOSALS = 10
"""The default number of proposals per resampled draw; there are at least 1000."""


NOTES = {
    "posterior": 'az.plot_pair takes one datum at a time: var_names=["z"], coords={"datum": its label}',
    "posterior_predictive": (
        'az.plot_ppc_pit takes one feature at a time: coords={"feature": its label}; the latents were inferred from '
        "the same data, so its values are closer to 0.5 than uniform values. az.plot_ppc_rootogram takes one feature, "
        "too: tree.sel(feature=its label)"
    ),
    "log_likelihood": (
        "of each datum given its own latent: az.loo and az.plot_loo_pit cannot estimate held-out log p(x) from it, "
        "since without the datum its latent has the prior distribution; use pyro_vae.log_evidence and "
        "pyro_vae.compare_models"
    ),
}
"""Notes on the use of the groups with ArviZ."""


@torch.no_grad()
@takes_settings
def to_datatree(
    vae: Amortized,
    x: Any,
    *,
    draws: int = 100,
    prior_draws: int = 100,
    seed: int = 0,
    posterior: From = "guide",
    proposals: int | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    chunk: int = 2**22,
) -> xr.DataTree:
    """Draw from the posterior, the prior and their predictive distributions, in ArviZ's schema.

    .. math:: z_i \\sim q(z | x_i), \\; \\tilde x_i \\sim p(x | z_i); \\quad z \\sim p(z), \\; \\tilde x \\sim p(x | z)

    The guide is sampled first, and then the likelihood, unobserved. Pyro's ``Predictive(model, guide=guide)(x)``
    passes ``x`` to both, so that its "posterior predictive" is the data themselves.

    With ``posterior="psis"``, the draws of each datum are resampled from ``proposals`` draws of the guide by their
    Pareto-smoothed importance weights. They are draws from the posterior itself if the guide covers it (``khat`` below
    0.7) and there are enough proposals (``ess`` is their effective sample size).

    Args:
        vae: a VAE, or a :class:`pyro_vae.Pair`, whose sites are variables of their own names, over the dimension
            ``<name>_dim`` if the event has one. The prior is then that of the first row.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        draws: the number of posterior draws per datum, at least 1.
        prior_draws: the number of draws from the prior, at least 1.
        seed: of all draws.
        posterior: ``"guide"`` or ``"psis"``.
        proposals: for ``"psis"``, the number of proposals per datum, at least 25; by default ten for each draw, and at
            least 1000.
        coords: labels of ``datum``, ``feature`` and ``latent``. By default, ``datum`` has the row labels and
            ``feature`` the columns of :class:`~pyro_vae.data.Data`; the others are numbered from 0.
        chunk: the approximate number of values of decoded proposals to process at a time.

    Returns:
        Groups ``posterior`` (z), ``posterior_predictive`` (x), ``log_likelihood`` (x), ``sample_stats``, ``prior``
        (z), ``prior_predictive`` (x) and ``observed_data`` (x), with dims ``chain, draw, datum, latent | feature``.
        The log-likelihood is that of a datum given its own latent, and must not be used for cross-validation:
        ``az.loo`` warns of a high k̂ (it may not if z hardly matters, but its result is not an elpd), and
        ``az.plot_loo_pit``, which needs a log-likelihood of each value, raises an error. ``az.plot_pair`` takes one
        datum at a time, ``coords={"datum": 0}``, and ``az.plot_ppc_pit`` one feature, ``coords={"feature": 0}``, by
        their labels. The attribute ``note`` of these groups repeats this. If all features are counts or categories and
        no value is missing, x is an integer in all three groups.
        ``sample_stats`` holds ``lp`` (log p(x, z)) and ``log_weight`` (log p(x, z) - log q(z|x)) of each draw,
        and ``khat`` and ``ess`` of each datum's importance weights: those of the proposals, or of the guide's draws if
        there are at least 25.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data.
        SettingsError: if a number of draws is below 1, or the labels have the wrong number or mix text, numbers and
            times.

    References:
        | Visualization in Bayesian workflow (Gabry et al., 2019), https://arxiv.org/abs/1709.01449
        | Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> tree = to_datatree(vae, torch.ones(3, 5), draws=10, coords={"datum": ["a", "b", "c"]})
        >>> dict(tree["posterior_predictive"].sizes)
        {'chain': 1, 'draw': 10, 'datum': 3, 'feature': 5}
        >>> tree["posterior"].z.sel(datum="b").dims
        ('chain', 'draw', 'latent')
    """
    validate_seed(seed)
    whole("draws", draws, 1)
    whole("prior_draws", prior_draws, 1)
    if posterior not in get_args(From):
        raise SettingsError(f"posterior is {posterior!r}; it must be guide or psis")
    proposals = max(1000, PROPOSALS * draws) if proposals is None else whole("proposals", proposals, LEAST)
    whole("chunk", chunk, 1)
    x = data_for(vae, x)
    given = rows_for(vae, x)
    rows = given.like(vae)
    resampled = None if posterior == "guide" else proposals
    with seeded(seed, rows.x.device), evaluating(vae, draws * len(rows)):
        if isinstance(vae, VAE):
            groups = _groups(vae, rows, draws, prior_draws, resampled, chunk)
        else:
            groups = groups_of_sites(vae, rows, draws=draws, prior_draws=prior_draws, proposals=resampled)
    stamp = {"created_at": datetime.now(UTC).isoformat(), "inference_library": "pyro_vae", "seed": seed}
    attributes = {
        **stamp, "inference_library_version": __version__, **versions(), "posterior_from": posterior,
        "data_hash": data_hash(row_hashes(given)),
    }  # fmt: skip
    labels = _labels(coords, x, groups)
    root = {"/": xr.Dataset(attrs=attributes)}
    notes = {name: {"note": note} for name, note in NOTES.items()}
    named = {
        name: _with_coordinates(group, labels).assign_attrs(attributes | notes.get(name, {}))
        for name, group in groups.items()
    }
    return xr.DataTree.from_dict(root | named)


def _groups(
    vae: VAE, rows: Rows, draws: int, prior_draws: int, proposals: int | None, chunk: int
) -> dict[str, xr.Dataset]:
    """Make the groups of a VAE, from draws of the guide, or from draws resampled from proposals."""
    if proposals is None:
        drawn = _sample_guide(vae, rows, draws)
    else:
        size = max(1, chunk // (proposals * rows.x[0].numel()))
        drawn = _concatenate([_resample(vae, part, draws, proposals) for part in rows.split(size)])
    x_new = vae.likelihood(drawn.z, rows).sample()
    z_prior, p_prior = from_the_prior(vae, prior_draws, rows.context)
    x_prior = p_prior.sample()
    seen = rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan)
    if all(countable_features(vae, rows)):
        seen, x_new, x_prior = _as_integers(seen, x_new, x_prior)
    return {
        "posterior": _variable("z", drawn.z, "datum", "latent"),
        "posterior_predictive": _variable("x", x_new, "datum", "feature"),
        "log_likelihood": _variable("x", drawn.log_likelihood, "datum"),
        "sample_stats": drawn.stats(),
        "prior": _variable("z", z_prior, "latent"),
        "prior_predictive": _variable("x", x_prior, "feature"),
        "observed_data": xr.Dataset({"x": (("datum", "feature"), seen.flatten(1).cpu().numpy())}),
    }


def _as_integers(*groups: Tensor) -> tuple[Tensor, ...]:
    """Convert counts and categories to integers, which ArviZ needs, if no value is fractional or missing."""
    return tuple(x.long() for x in groups) if all(bool((x == x.round()).all()) for x in groups) else groups


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Posterior draws and their statistics, shape ``(draw, datum, …)``; ``khat`` and ``ess`` are over ``datum``."""

    z: Tensor
    log_likelihood: Tensor
    lp: Tensor
    log_weight: Tensor
    khat: Tensor | None
    ess: Tensor | None

    def stats(self) -> xr.Dataset:
        stats = xr.merge([_variable("lp", self.lp, "datum"), _variable("log_weight", self.log_weight, "datum")])
        if self.khat is not None and self.ess is not None:
            stats = stats.assign(
                khat=("datum", self.khat.cpu().numpy(), {"threshold": BAD}), ess=("datum", self.ess.cpu().numpy())
            )
        return stats


def _evaluate(vae: VAE, rows: Rows, z: Tensor, q: Distribution) -> _Drawn:
    log_likelihood = vae.likelihood(z, rows).log_prob(rows.x)
    lp = log_likelihood + vae.prior(*rows.given).log_prob(z)
    return _Drawn(z, log_likelihood, lp, lp.double() - q.log_prob(z).double(), None, None)


def _sample_guide(vae: VAE, rows: Rows, draws: int) -> _Drawn:
    q = vae.posterior(rows)
    drawn = _evaluate(vae, rows, q.sample((draws,)), q)
    if draws < LEAST:
        return drawn
    return _smooth_weights(drawn)[0]


def _smooth_weights(drawn: _Drawn) -> tuple[_Drawn, Tensor]:
    """Add k̂ and the effective sample size, and return the normalized weights too, shape ``(draw, datum)``."""
    log_weights, khat = smoothed(drawn.log_weight)
    weights = log_weights.softmax(0)
    ess = 1 / (weights**2).sum(0)
    return _Drawn(drawn.z, drawn.log_likelihood, drawn.lp, drawn.log_weight, khat, ess), weights


def _resample(vae: VAE, rows: Rows, draws: int, proposals: int) -> _Drawn:
    q = vae.posterior(rows)
    drawn, weights = _smooth_weights(_evaluate(vae, rows, q.sample((proposals,)), q))
    chosen = torch.multinomial(weights.T, draws, replacement=True).T  # (draw, datum)
    column = torch.arange(len(rows), device=chosen.device)
    z, log_likelihood, lp, log_weight = (
        value[chosen, column] for value in (drawn.z, drawn.log_likelihood, drawn.lp, drawn.log_weight)
    )
    return _Drawn(z, log_likelihood, lp, log_weight, drawn.khat, drawn.ess)


def _concatenate(parts: list[_Drawn]) -> _Drawn:
    draws = (torch.cat([getattr(p, name) for p in parts], 1) for name in ("z", "log_likelihood", "lp", "log_weight"))
    return _Drawn(*draws, *(torch.cat([getattr(p, name) for p in parts]) for name in ("khat", "ess")))


def from_the_prior(vae: VAE, draws: int, context: Tensor | None) -> tuple[Tensor, Distribution]:
    """Draw latents from the prior, and return p(x|z) at each; each draw uses the context of a random datum.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> z, likelihood = from_the_prior(vae, 7, None)
        >>> z.shape, likelihood.mean.shape
        (torch.Size([7, 2]), torch.Size([7, 5]))
    """
    if context is None:
        z = vae.prior().sample((draws,))
        return z, vae.decoder(z)
    drawn = context[torch.randint(len(context), (draws,), device=context.device)]
    prior = vae.prior(drawn)
    z = prior.sample(() if prior.batch_shape else (draws,))
    return z, vae.decoder(z, drawn)


def _variable(name: str, draws: Tensor, *dims: str) -> xr.Dataset:
    """Make a variable of one chain from draws, with the feature dimensions flattened."""
    array = draws.flatten(len(dims)).unsqueeze(0).cpu().numpy()
    return xr.Dataset({name: (("chain", "draw", *dims), array)})


def _labels(coords: Mapping[str, Sequence[Any]] | None, x: Any, groups: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """Return the labels of the dimensions, after validating their numbers."""
    sizes = {**groups["posterior"].sizes, **groups["observed_data"].sizes}
    if coords is not None and not isinstance(coords, Mapping):
        raise SettingsError(f"coords is {type_of(coords)}; pass {{dimension: its labels}}")
    columns = x.columns if isinstance(x, Data) else None
    features = {"feature": columns} if columns is not None and len(columns) == sizes.get("feature") else {}
    labels = {"datum": row_names(x, sizes["datum"]), **features, **(coords or {})}
    for name, given in labels.items():
        if name not in sizes or name in ("chain", "draw"):
            *most, last = sorted(str(dim) for dim in {*sizes} - {"chain", "draw"})
            raise SettingsError(f"coords has labels of {name!r}; it may label {', '.join(most)} and {last}")
        if np.ndim(np.asarray(given)) != 1 or len(given) != sizes[name]:
            raise SettingsError(
                f"coords[{name!r}] has {np.size(np.asarray(given))} labels for {sizes[name]}; pass one for each"
            )
    return {name: _as_label_array(name, given) for name, given in labels.items()}


def _as_label_array(name: str, given: Any) -> np.ndarray:
    """Convert labels to an array that a file can hold.

    Raises:
        SettingsError: if the labels are not all numbers, all times or all text.
    """
    array = np.asarray(given) if isinstance(given, np.ndarray) else pd.Index(given, tupleize_cols=False).to_numpy()
    kinds = sorted({type(label).__name__ for label in given}) if array.dtype == object else []
    if array.dtype.kind == "c" or any(kind != "str" for kind in kinds):
        raise SettingsError(
            f"coords[{name!r}] holds labels of type {' and '.join(kinds) or array.dtype}, which no file can hold; pass "
            "only text, only numbers or only times"
        )
    return array.astype(str) if kinds else array


def _with_coordinates(group: xr.Dataset, labels: Mapping[str, Any]) -> xr.Dataset:
    return group.assign_coords({dim: labels.get(str(dim), range(size)) for dim, size in group.sizes.items()})
