"""Compare q with NUTS as a gold standard, for selected data."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.__about__ import versions
from pyro_vae.core.compatibility import validate_real
from pyro_vae.core.component import evaluating
from pyro_vae.core.device import seeded, validate_seed
from pyro_vae.core.finding import Finding, Level
from pyro_vae.core.pair import Amortized
from pyro_vae.core.progress import counting
from pyro_vae.core.rows import Rows
from pyro_vae.core.vae import VAE
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.data.rows import data_for, rows_for
from pyro_vae.data.values import row_names
from pyro_vae.errors import DataError, ModelError, SettingsError

MOST = 100
"""The largest number of data: each needs a separate run, in Python."""

RHAT, ESS, DIVERGENT = 1.05, 100, 0.01
"""NUTS is reliable with at most this R̂, at least this effective sample size and at most this share of divergences."""

FINE, BAD = 0.1, 0.25
"""Wasserstein distances in sds of the posterior: those of a bias of .1 and .25; sds of q at .8 give .16, at .5 .4."""

FLOORS = 3.0
"""Two samples from one distribution are further apart than this many floors in less than one of a thousand cases."""


@torch.no_grad()
@takes_settings
def nuts(
    vae: Amortized,
    x: Any,
    *,
    data: int | Sequence[int] | None = None,
    chains: int = 4,
    warmup: int = 200,
    draws: int = 500,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Sample p(z|x) of selected data with NUTS, and measure the distance of q(z|x) for each latent.

    .. math:: z_i \\sim p(z | x_i) \\propto p(z)\\, p(x_i | z), \\qquad
        W_1 = \\int_0^1 |F_{\\mathrm{NUTS}}^{-1}(u) - F_q^{-1}(u)| \\, du

    Each chain of Pyro's NUTS starts from a draw of q and is scaled by q's mean and sds: a good q makes it fast, and a
    poor q does not make it wrong. Since all chains start in q, they may miss a mode that q misses. Each distance has a
    floor, the expected distance between two samples of the same sizes from the posterior itself:

    .. math:: \\mathrm{floor} = \\sqrt{\\tfrac 2\\pi} \\sqrt{\\tfrac1{\\mathrm{ESS}} + \\tfrac1S}
        \\int \\sqrt{F (1 - F)} \\, dz

    Args:
        vae: a VAE, or a :class:`pyro_vae.Pair`, whose ``latent`` are those of all sites, as ``z1[0]``.
        x: data, shape ``(datum, *features)``, or :class:`~pyro_vae.data.Data` with context and mask.
        data: the data to sample, at most 100: a list of indices (from 0, regardless of row labels), or the number of
            the first data; by default all.
        chains: the number of chains per datum, at least 2; they run one after another.
        warmup: the number of warmup draws of each chain, which are discarded, at least 20.
        draws: the number of draws of each chain after warmup, at least 20.
        seed: of all draws.
        progress: whether to show a progress bar.

    Returns:
        A dataset of draws ``z`` from NUTS and ``q`` from q over ``chain, draw, datum, latent``, and over ``datum,
        latent``:
        ``rhat`` and ``ess``; ``mean``, ``sd``, ``q_mean`` and ``q_sd``, each with its Monte-Carlo standard error
        ``…_se``, in units of z; ``wasserstein`` and ``wasserstein_floor`` in sds of the posterior. Over ``chain,
        datum``: ``divergences`` and ``acceptance``.

    Raises:
        DataError: if the data do not fit, or an index is out of range.
        ModelError: if the VAE does not fit the data, or its latents are not in one dimension.
        SettingsError: if a setting is out of its range, or there are too many data.

    References:
        | The No-U-Turn Sampler (Hoffman & Gelman, 2014), https://arxiv.org/abs/1111.4246
        | Rank-Normalization, Folding, and Localization: An Improved R̂ (Vehtari et al., 2021),
          https://arxiv.org/abs/1903.08008

    Example:
        >>> import pyro_vae as pv
        >>> _ = torch.manual_seed(0)
        >>> linear = pv.exact.LinearGaussian(torch.randn(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> x = linear.sample(3)
        >>> found = nuts(linear.as_vae(), x, data=[2], chains=2, warmup=50, draws=50)
        >>> z_score = (found["mean"] - linear.posterior(x).mean[[2]].numpy()) / found["mean_se"]
        >>> bool((abs(z_score) < 5).all()), found.datum.values
        (True, array([2]))
    """
    for name, value, least in ("chains", chains, 2), ("warmup", warmup, 20), ("draws", draws, 20):
        whole(name, value, least)
    validate_seed(seed)
    if torch.is_inference_mode_enabled():
        raise SettingsError("inference mode is on, in which NUTS has no gradients; call this outside of it")
    x = data_for(vae, x)
    rows = rows_for(vae, x).like(vae)
    index = _select(data, len(rows))
    names = row_names(x, len(rows))[index]
    rows = rows.take(torch.as_tensor(index, device=rows.x.device))
    with seeded(seed, rows.x.device), evaluating(vae, chains), counting("NUTS chains", progress) as count:
        _validate_number(vae, rows, chains * (warmup + draws))
        q = _sample_q(vae, rows, chains, draws)
        runs = (_run_chain(vae, rows, q, i, c, warmup, draws) for i in range(len(rows)) for c in range(chains))
        found = list(count(runs, len(rows) * chains))
    z = torch.stack([run[0] for run in found]).unflatten(0, (len(rows), chains)).movedim(0, 2)
    divergences, acceptance = (np.array([run[k] for run in found]).reshape(len(rows), chains).T for k in (1, 2))
    latents = range(z.shape[-1]) if isinstance(vae, VAE) else vae.latent_names(rows)
    both = {name: value.double().cpu().numpy() for name, value in {"z": z, "q": q}.items()}
    return xr.Dataset(
        {name: (("chain", "draw", "datum", "latent"), value, {"units": "z"}) for name, value in both.items()}
        | {name: (("datum", "latent"), *value) for name, value in _compare(**both).items()}
        | {"divergences": (("chain", "datum"), divergences), "acceptance": (("chain", "datum"), acceptance)},
        {"chain": range(chains), "draw": range(draws), "datum": names, "latent": latents},
        {
            "sampler": "pyro.infer.NUTS, started from q", "warmup": warmup, "seed": seed, "threshold_rhat": RHAT,
            "threshold_ess": ESS, "threshold_divergent": DIVERGENT, "threshold_fine": FINE, "threshold_bad": BAD,
            "threshold_floors": FLOORS, **versions(),
        },
    )  # fmt: skip


def _select(data: int | Sequence[int] | None, n: int) -> list[int]:
    if data is None:
        return list(range(n))
    chosen = np.asarray(data)
    if chosen.ndim == 0:
        return list(range(min(whole("data", chosen.item(), 1), n)))
    index = chosen.tolist()
    right = chosen.ndim == 1 and chosen.dtype.kind in "iu" and 0 < len(set(index)) == len(index)
    if not right or not 0 <= min(index) <= max(index) < n:
        raise DataError(
            f"data selects {index[:10]} of {n} data; pass indices from 0 to {n - 1}, at least one and none twice"
        )
    return index


def _validate_number(vae: Amortized, rows: Rows, steps: int) -> None:
    """Raise a SettingsError with the run time if there are too many data; a draw needs about five gradients."""
    if len(rows) <= MOST:
        return
    first = rows.take(slice(0, 1))
    place = _sample_q(vae, first, 1, 1)[0, 0, 0].requires_grad_()
    potential = _potential(vae, first, torch.zeros_like(place), torch.ones_like(place))
    with torch.enable_grad():
        torch.autograd.grad(potential({"z": place}), place)
        started = time.perf_counter()
        for _ in range(5):
            torch.autograd.grad(potential({"z": place}), place)
    hours = (time.perf_counter() - started) * steps * len(rows) / 3600
    raise SettingsError(
        f"NUTS for {len(rows):,} data would take about {hours:.2g} hours here, and at most {MOST} are allowed; "
        "select some, e.g. data=10 for the first ten, or a list of indices"
    )


def _sample_q(vae: Amortized, rows: Rows, chains: int, draws: int) -> Tensor:
    """Sample q, shape ``(chains, draws, datum, latent)``."""
    q = vae.posterior(rows)
    if q.event_dim != 1:
        raise ModelError(f"NUTS needs latents in one dimension, these have shape {tuple(q.event_shape)}")
    validate_real(q, "the encoder")
    return q.sample((chains, draws))


def _potential(vae: Amortized, row: Rows, loc: Tensor, scale: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return ``-log p(x, loc + scale u)`` of one datum as a function of u."""

    log_joint = vae.log_joint_of(row)

    def potential(values: dict[str, Tensor]) -> Tensor:
        return -log_joint((loc + scale * values["z"]).unsqueeze(0)).sum()

    return potential


def _run_chain(
    vae: Amortized, rows: Rows, q: Tensor, datum: int, chain: int, warmup: int, draws: int
) -> tuple[Tensor, int, float]:
    """Run one chain for one datum, and return its draws, the number of divergences and the acceptance rate."""
    from pyro.infer import MCMC, NUTS

    q_draws = q[:, :, datum].flatten(0, 1)
    loc, scale = q_draws.mean(0), q_draws.std(0)
    potential = _potential(vae, rows.take(slice(datum, datum + 1)), loc, scale)
    start = (q[chain, torch.randint(len(q[chain]), ()), datum] - loc) / scale
    with torch.enable_grad():
        kernel = NUTS(potential_fn=potential)
        mcmc = MCMC(kernel, draws, warmup, initial_params={"z": start}, disable_progbar=True)
        mcmc.run()
    statistics = mcmc.diagnostics()
    z = loc + scale * mcmc.get_samples()["z"].detach()
    return z, len(statistics["divergences"]["chain 0"]), float(statistics["acceptance rate"]["chain 0"])


def _compare(z: np.ndarray, q: np.ndarray) -> dict[str, tuple[np.ndarray, dict[str, str]]]:
    """Return the moments of both samples and the distances between them, each with its unit."""
    from pyro_vae.core.arviz import array_stats

    axes, latent, sds = {"chain_axis": 0, "draw_axis": 1}, {"units": "z"}, {"units": "sd of the posterior"}
    with np.errstate(divide="ignore", invalid="ignore"):  # chains that never move have an infinite R̂
        rhat, ess = array_stats.rhat(z, **axes), array_stats.ess(z, **axes)
    found: dict[str, tuple[np.ndarray, dict[str, str]]] = {"rhat": (rhat, {}), "ess": (ess, {"units": "draws"})}
    for prefix, sample in ("", z), ("q_", q):
        for moment, value in ("mean", sample.mean((0, 1))), ("sd", sample.std((0, 1), ddof=1)):
            found[f"{prefix}{moment}"] = value, latent
            found[f"{prefix}{moment}_se"] = array_stats.mcse(sample, method=moment, **axes), latent
    a, b = (np.sort(sample.reshape(-1, *sample.shape[2:]), 0) for sample in (z, q))
    below = np.arange(1, len(a))[:, None, None] / len(a)
    spread = (np.diff(a, axis=0) * np.sqrt(below * (1 - below))).sum(0)
    floor = np.sqrt(2 / np.pi * (1 / np.minimum(ess, len(a)) + 1 / len(b))) * spread
    sd = found["sd"][0]
    with np.errstate(divide="ignore", invalid="ignore"):
        distances = np.abs(a - b).mean(0) / sd, floor / sd
    return found | {"wasserstein": (distances[0], sds), "wasserstein_floor": (distances[1], sds)}


def judge_nuts(found: xr.Dataset) -> Finding:
    """Judge whether q is close to the posterior that NUTS samples.

    A distance counts if it is larger than between two samples from one distribution, and if NUTS is reliable for the
    datum.

    Args:
        found: from :func:`nuts`.

    Returns:
        ``"bad"`` if at least a quarter of the data have a latent that is far off, ``"doubtful"`` if fewer have, if a
        latent is in between, or if NUTS is not reliable.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 1), torch.zeros(5), 0.5).as_vae()
        >>> _ = vae.encoder.net.bias.data.add_(3.0)
        >>> judge_nuts(nuts(vae, torch.ones(1, 5), chains=2, warmup=50, draws=150)).level
        'bad'
    """
    limits = {name: found.attrs[f"threshold_{name}"] for name in ("rhat", "ess", "divergent", "fine", "bad", "floors")}
    noise = limits["floors"] * found.wasserstein_floor
    divergent = found.divergences.sum("chain") / (found.sizes["chain"] * found.sizes["draw"])
    sound = (found.rhat.max("latent") <= limits["rhat"]) & (found.ess.min("latent") >= limits["ess"])
    sound &= divergent <= limits["divergent"]
    far = (found.wasserstein > np.maximum(noise, limits["bad"])).any("latent") & sound
    near = (found.wasserstein <= np.maximum(noise, limits["fine"])) & (noise <= limits["bad"])
    level: Level = "bad" if float(far.mean()) >= 0.25 else "fine" if bool(near.all() & sound.all()) else "doubtful"
    worst = found.isel(found.wasserstein.fillna(np.inf).argmax(("datum", "latent")))
    why = (
        f"q is farthest from NUTS in latent {worst.latent.item()} of datum {worst.datum.item()}, by "
        f"{float(worst.wasserstein):.2f} posterior sd (Wasserstein-1; between two samples from one distribution: "
        f"{float(worst.wasserstein_floor):.2f}), and far off for {int(far.sum())} of {found.sizes['datum']} data (up "
        f"to {limits['fine']} is fine, above {limits['bad']} bad); "
        f"NUTS has R̂ ≤ {float(found.rhat.max()):.3f} (threshold {limits['rhat']}), at least "
        f"{float(found.ess.min()):.0f} effective draws (threshold {limits['ess']}) and {float(divergent.mean()):.1%} "
        f"divergences, and is reliable for {int(sound.sum())} of {found.sizes['datum']} data"
    )
    poor = not sound.all() or bool((noise > limits["bad"]).any())
    return Finding("q compared with NUTS", level, why, _next(level, poor))


def _next(level: Level, poor: bool) -> str:
    improve = "use inference_gaps to see whether a richer posterior or a better encoder would help"
    rerun = "run NUTS with a longer warmup and more draws; if R̂ stays large, the posterior may have several modes"
    steps = {rerun: poor, improve: level == "bad" or (level == "doubtful" and not poor)}
    return "; ".join(step for step, applies in steps.items() if applies)
