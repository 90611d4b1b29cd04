"""Prior and posterior predictive, as ArviZ's groups."""

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
from pyro_vae.core.device import refuse_seed, seeded
from pyro_vae.core.pair import Pair
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import Data, row_names
from pyro_vae.diagnose.sites import groups_of_sites
from pyro_vae.errors import SettingsError
from pyro_vae.evidence.kinds import countable_features
from pyro_vae.evidence.psis import BAD, LEAST
from pyro_vae.evidence.weights import smoothed

From: TypeAlias = Literal["guide", "psis"]

PROPOSALS = 10
"""Draws of the guide for each draw that is resampled of them, where no number is asked for; at least 1000."""


NOTES = {
    "posterior": 'az.plot_pair takes one datum at a time: var_names=["z"], coords={"datum": its label}',
    "posterior_predictive": (
        'az.plot_ppc_pit takes one feature at a time: coords={"feature": its label}; latents were inferred from the '
        "same data, so that its values lie nearer to 0.5 than uniform ones. az.plot_ppc_rootogram takes one, too: "
        "tree.sel(feature=its label)"
    ),
    "log_likelihood": (
        "of each datum given its own latent: az.loo and az.plot_loo_pit do not estimate held-out log p(x) from it, "
        "since without the datum its latent falls back to the prior; use pyro_vae.log_evidence and "
        "pyro_vae.compare_models"
    ),
}
"""What to know before a group is given to ArviZ."""


@torch.no_grad()
@takes_settings
def to_datatree(
    vae: VAE | Pair,
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
    """Draws from posterior and prior, and the data they predict, in ArviZ's schema.

    .. math:: z_i \\sim q(z | x_i), \\; \\tilde x_i \\sim p(x | z_i); \\quad z \\sim p(z), \\; \\tilde x \\sim p(x | z)

    The guide is sampled first and the likelihood afterwards, unobserved. Pyro's ``Predictive(model,
    guide=guide)(x)`` hands ``x`` to both, and its "posterior predictive" is the data.

    With ``posterior="psis"`` the draws of each datum are taken, with replacement, from ``proposals`` draws of the
    guide by their Pareto-smoothed importance weights: draws of the posterior itself, as far as the guide covers it
    (where ``khat`` is below 0.7) and there are proposals enough (``ess`` says how many draws they are worth).

    Args:
        vae: a VAE, or a :class:`pyro_vae.Pair`, of which each site has a variable of its own name, over the dimension
            ``<name>_dim`` where its event has one. The prior is then that of the first row.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        draws: posterior draws per datum, at least 1.
        prior_draws: draws from the prior, at least 1.
        seed: of all draws.
        posterior: ``"guide"`` or ``"psis"``.
        proposals: per datum, at least 25; if not given, ten for each draw and at least 1000. Of ``"psis"`` only.
        coords: labels of ``datum``, ``feature`` and ``latent``, where the numbers from 0 are not to be theirs; the
            columns of :class:`~pyro_vae.data.Data` are labels of ``feature`` already, and its row labels of ``datum``.
        chunk: about so many numbers of decoded proposals at a time.

    Returns:
        Groups ``posterior`` (z), ``posterior_predictive`` (x), ``log_likelihood`` (x), ``sample_stats``, ``prior``
        (z), ``prior_predictive`` (x) and ``observed_data`` (x), with dims ``chain, draw, datum, latent | feature``.
        The log-likelihood is that of a datum given its own latent: no cross-validation can be made of it. So
        ``az.loo`` warns of a high k̂ (where z hardly matters it may not, and is no elpd either), and
        ``az.plot_loo_pit``, which takes a log-likelihood of each number, refuses it. ``az.plot_pair`` takes one datum
        at a time, ``coords={"datum": 0}``, and ``az.plot_ppc_pit`` one feature, ``coords={"feature": 0}``, by their
        labels. The attribute ``note`` of these groups says so. Counts and categories are integers in all three groups
        of x, where each feature is one and none is missing.
        ``sample_stats`` holds ``lp`` (log p(x, z)) and ``log_weight`` (log p(x, z) - log q(z|x)) of each draw,
        and ``khat`` and ``ess`` of each datum's importance weights: of the proposals, or of the guide's draws where
        there are 25 or more.

    Raises:
        DataError: if the data are not finite numbers in rows, or outside the support of the likelihood.
        ModelError: if the VAE does not fit the data.
        SettingsError: if a number of draws is below 1, or labels are not as many as there are things to label, or mix
            text, numbers and times.

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
    refuse_seed(seed)
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
        if isinstance(vae, Pair):
            groups = groups_of_sites(vae, rows, draws=draws, prior_draws=prior_draws, proposals=resampled)
        else:
            groups = _groups(vae, rows, draws, prior_draws, resampled, chunk)
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
    """The groups of a VAE; of draws of the guide, or of draws that are taken of so many proposals."""
    if proposals is None:
        drawn = _of_the_guide(vae, rows, draws)
    else:
        size = max(1, chunk // (proposals * rows.x[0].numel()))
        drawn = _joined([_resampled(vae, part, draws, proposals) for part in rows.split(size)])
    x_new = vae.likelihood(drawn.z, rows).sample()
    z_prior, of_the_prior = from_the_prior(vae, prior_draws, rows.context)
    x_prior = of_the_prior.sample()
    seen = rows.x if rows.mask is None else rows.x.masked_fill(~rows.mask, torch.nan)
    if all(countable_features(vae, rows)):
        seen, x_new, x_prior = _as_whole_numbers(seen, x_new, x_prior)
    return {
        "posterior": _variable("z", drawn.z, "datum", "latent"),
        "posterior_predictive": _variable("x", x_new, "datum", "feature"),
        "log_likelihood": _variable("x", drawn.log_likelihood, "datum"),
        "sample_stats": drawn.stats(),
        "prior": _variable("z", z_prior, "latent"),
        "prior_predictive": _variable("x", x_prior, "feature"),
        "observed_data": xr.Dataset({"x": (("datum", "feature"), seen.flatten(1).cpu().numpy())}),
    }


def _as_whole_numbers(*of_x: Tensor) -> tuple[Tensor, ...]:
    """Counts and categories as integers, as ArviZ asks of them; what has fractions, or is missing, as it was."""
    return tuple(x.long() for x in of_x) if all(bool((x == x.round()).all()) for x in of_x) else of_x


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Posterior draws and what is known of them, all but the last two of shape ``(draw, datum, …)``."""

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


def _scored(vae: VAE, rows: Rows, z: Tensor, q: Distribution) -> _Drawn:
    log_likelihood = vae.likelihood(z, rows).log_prob(rows.x)
    lp = log_likelihood + vae.prior(*rows.given).log_prob(z)
    return _Drawn(z, log_likelihood, lp, lp.double() - q.log_prob(z).double(), None, None)


def _of_the_guide(vae: VAE, rows: Rows, draws: int) -> _Drawn:
    q = vae.posterior(rows)
    drawn = _scored(vae, rows, q.sample((draws,)), q)
    if draws < LEAST:
        return drawn
    return _weighed(drawn)[0]


def _weighed(drawn: _Drawn) -> tuple[_Drawn, Tensor]:
    """With k̂ and the effective sample size, and the normalised weights, shape ``(draw, datum)``."""
    log_weights, khat = smoothed(drawn.log_weight)
    weights = log_weights.softmax(0)
    ess = 1 / (weights**2).sum(0)
    return _Drawn(drawn.z, drawn.log_likelihood, drawn.lp, drawn.log_weight, khat, ess), weights


def _resampled(vae: VAE, rows: Rows, draws: int, proposals: int) -> _Drawn:
    q = vae.posterior(rows)
    drawn, weights = _weighed(_scored(vae, rows, q.sample((proposals,)), q))
    chosen = torch.multinomial(weights.T, draws, replacement=True).T  # (draw, datum)
    column = torch.arange(len(rows), device=chosen.device)
    z, log_likelihood, lp, log_weight = (
        value[chosen, column] for value in (drawn.z, drawn.log_likelihood, drawn.lp, drawn.log_weight)
    )
    return _Drawn(z, log_likelihood, lp, log_weight, drawn.khat, drawn.ess)


def _joined(parts: list[_Drawn]) -> _Drawn:
    draws = (torch.cat([getattr(p, name) for p in parts], 1) for name in ("z", "log_likelihood", "lp", "log_weight"))
    return _Drawn(*draws, *(torch.cat([getattr(p, name) for p in parts]) for name in ("khat", "ess")))


def from_the_prior(vae: VAE, draws: int, context: Tensor | None) -> tuple[Tensor, Distribution]:
    """Latents of the model and the likelihood of each; each draw takes the context of a datum drawn at random.

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
    """Draws as a variable of one chain; all feature dimensions in one."""
    array = draws.flatten(len(dims)).unsqueeze(0).cpu().numpy()
    return xr.Dataset({name: (("chain", "draw", *dims), array)})


def _labels(coords: Mapping[str, Sequence[Any]] | None, x: Any, groups: Mapping[str, xr.Dataset]) -> dict[str, Any]:
    """The labels asked for, seen to be as many as there are things to label."""
    sizes = {**groups["posterior"].sizes, **groups["observed_data"].sizes}
    if coords is not None and not isinstance(coords, Mapping):
        raise SettingsError(f"coords is a {type(coords).__name__}; give {{dimension: its labels}}")
    columns = x.columns if isinstance(x, Data) else None
    own = {"feature": columns} if columns is not None and len(columns) == sizes.get("feature") else {}
    labels = {"datum": row_names(x, sizes["datum"]), **own, **(coords or {})}
    for name, given in labels.items():
        if name not in sizes or name in ("chain", "draw"):
            *most, last = sorted(str(dim) for dim in {*sizes} - {"chain", "draw"})
            raise SettingsError(f"coords has labels of {name!r}; it may have some of {', '.join(most)} and {last}")
        if np.ndim(np.asarray(given)) != 1 or len(given) != sizes[name]:
            raise SettingsError(
                f"coords[{name!r}] has {np.size(np.asarray(given))} labels for {sizes[name]}; give one for each"
            )
    return {name: _of_one_kind(name, given) for name, given in labels.items()}


def _of_one_kind(name: str, given: Any) -> np.ndarray:
    """Labels as an array that a file can hold.

    Raises:
        SettingsError: if they are not all numbers, all times or all text.
    """
    array = np.asarray(given) if isinstance(given, np.ndarray) else pd.Index(given, tupleize_cols=False).to_numpy()
    kinds = sorted({type(label).__name__ for label in given}) if array.dtype == object else []
    if array.dtype.kind == "c" or any(kind != "str" for kind in kinds):
        raise SettingsError(
            f"coords[{name!r}] holds labels of type {' and '.join(kinds) or array.dtype}, which no file can hold; give "
            "all of them as text, as numbers or as times"
        )
    return array.astype(str) if kinds else array


def _with_coordinates(group: xr.Dataset, labels: Mapping[str, Any]) -> xr.Dataset:
    return group.assign_coords({dim: labels.get(str(dim), range(size)) for dim, size in group.sizes.items()})
