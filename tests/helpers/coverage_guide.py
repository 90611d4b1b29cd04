"""Coverage of the errors of the diagnostics: ``sbc``, the predictive checks, ``khat``, ``nuts`` and ``converged``."""

import itertools
from functools import cache
from unittest.mock import patch

import numpy as np
import torch
import xarray as xr
from scipy.signal import lfilter

import pyro_vae as pv
from helpers.checks import linear_gaussian
from helpers.coverage_checks import Draws, Row, Study, drawn, measured, of_seed, uniform, with_errors
from helpers.guides import altered
from pyro_vae.diagnose import _ecdf, convergence, gold_standard

EACH = 200


@of_seed
def ranks_of(simulations: int, latents: int, *, seed: int) -> dict[str, Draws]:
    """Ranks of an exact guide, whose central intervals hold the latents as often as they say."""
    found = pv.diagnose.sbc(linear_gaussian(4, latents).as_vae(), simulations=simulations, draws=19, seed=seed)
    names = ("coverage", "expected_coverage")
    shown = found.isel(quantity=slice(0, -1)).transpose("level", ...)
    levels = {"coverage": found.level.values[:, None], "expected_coverage": found.level.values}
    every = {
        f"{name}_se": drawn(*(v[None] for v in np.broadcast_arrays(shown[name], shown[f"{name}_se"], levels[name])))
        for name in names
    }
    return every | {"joint_p_value": uniform(found.joint_p_value), "p_value": uniform(found.p_value.values[None])}


RANKS, LEVELS = 40, 10
EXACT_SETS = 200_000


@cache
def exact_law() -> np.ndarray:
    """The rarest tail of 200,000 sets of uniform ranks, sorted."""
    return np.sort(_ecdf.tails(RANKS, LEVELS)[np.arange(LEVELS - 1), _sets(0, EXACT_SETS)].min(1))


def _sets(seed: int, number: int) -> np.ndarray:
    uniform_ranks = np.full(LEVELS, 1 / LEVELS)
    return np.random.default_rng(seed).multinomial(RANKS, uniform_ranks, size=number).cumsum(1)[:, :-1]


def simulated_p_values(seed: int) -> dict[str, Draws]:
    """The p-value of sets of ranks, by 10,000 simulated sets of other seeds, against one by 200,000."""
    counts, law = _sets(seed, 1)[0], _law(seed)
    least = _ecdf.tails(RANKS, LEVELS)[np.arange(LEVELS - 1), counts].min()
    truth = np.searchsorted(exact_law(), least * (1 + 1e-9), side="right") / EXACT_SETS
    with patch.object(_ecdf, "null", lambda number, levels: law):
        p, error = _ecdf.p_value(counts, RANKS)
    return {"p_value_se": drawn(p, error, truth)}


def _law(seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed + 10**6)
    with patch.object(np.random, "default_rng", lambda _: generator):
        return _ecdf.null.__wrapped__(RANKS, LEVELS)


@of_seed
def replicated(shift: float, *, seed: int) -> dict[str, Draws]:
    """The mean of all cells, whose p-value is a normal tail; ``shift`` is in standard deviations of the replicates."""
    model = linear_gaussian(3, 1)
    x, vae = model.sample(20), model.as_vae()
    ones = torch.ones(3).double()
    given = model.posterior(x)
    mean = (given.mean @ model.weight.T + model.bias).mean()
    covariance = model.weight @ given.covariance_matrix[0] @ model.weight.T + model.scale**2 * torch.eye(3).double()
    sd = (ones @ covariance @ ones / (9 * len(x))).sqrt()
    observed = (mean + shift * sd).item()
    values = itertools.chain([observed], itertools.repeat(None))  # a number of its own for the data, which come first
    statistics = {"mean": lambda one: one.mean().item() if (value := next(values)) is None else value}
    found = pv.diagnose.predictive_check(vae, x, statistics=statistics, draws=100, seed=seed).isel(statistic=0)
    truth = torch.special.ndtr(torch.tensor(-shift).double())
    return with_errors(found, {"p_value": truth})


def new_data(seed: int) -> dict[str, Draws]:
    """Prior predictive p-values of data of the model."""
    model = linear_gaussian(3, 1)
    found = pv.diagnose.prior_check(model.as_vae(), model.sample(20), draws=199, seed=seed)
    p = found.p_value[found.family.values == "table"]
    two_sided = 2 * np.minimum(p, 1 - p)
    return {"p_value": uniform(two_sided.values[None])}


@of_seed
def tails_of(k: float, *, seed: int) -> dict[str, Draws]:
    """k̂ and the effective sample size of 200 data by a guide with tail index k."""
    model = linear_gaussian(3, 1)
    vae = altered(model, factor=(1 - k) ** 0.5)
    found = pv.diagnose.khat(vae, model.sample(EACH), num_particles=1000, seed=seed)
    exact = {"ess": 1000 * (1 - 2 * k) ** 0.5 / (1 - k)} if k < 0.5 else {}
    return with_errors(found, {"khat": found.khat.mean(), **exact}, khat=found.khat)


def shares(seed: int) -> dict[str, Draws]:
    """The share of 25 data whose k̂ is above 0.5, by a guide for which a half is; the truth by 2,000 data."""
    model = linear_gaussian(3, 1)
    vae = altered(model, factor=0.5**0.5)
    many = pv.diagnose.khat(vae, model.sample(2000), num_particles=200, seed=seed)
    share = (many.khat.values > 0.5).mean()
    found = [
        pv.diagnose.khat(vae, model.sample(25), num_particles=200, seed=10**6 * seed + i).isel(threshold=0)
        for i in range(40)
    ]
    return {"share_se": drawn([f.share for f in found], [f.share_se for f in found], share)}


def autoregressive(rng, rho: float, size: tuple[int, ...]) -> np.ndarray:
    """Stationary normal series of variance 1 along the second axis."""
    noise = rng.normal(size=size) * (1 - rho**2) ** 0.5
    noise[:, 0] /= (1 - rho**2) ** 0.5
    return lfilter([1.0], [1.0, -rho], noise, axis=1)


@of_seed
def chains_of(rho: float, tails: str = "normal", *, seed: int) -> dict[str, Draws]:
    """Four chains of 250 draws of N(0, 1), or of a lognormal made of it."""
    rng = np.random.default_rng(seed)
    z = autoregressive(rng, rho, (4, 250, EACH, 1))
    q = rng.normal(size=z.shape)
    mean, sd = 0.0, 1.0
    if tails == "lognormal":
        z, mean, sd = np.exp(z), np.exp(0.5), np.sqrt((np.e - 1) * np.e)
    found = {name: value[:, 0] for name, (value, _) in gold_standard._compare(z, q).items()}
    return with_errors(found, {"mean": mean, "sd": sd, "q_mean": 0.0, "q_sd": 1.0})


def stuck(seed: int) -> dict[str, Draws]:
    """Chains each in one of two modes, -2 or 2, that never leave it."""
    rng = np.random.default_rng(seed)
    z = autoregressive(rng, 0.5, (4, 250, EACH, 1)) + rng.choice([-2, 2], (4, 1, EACH, 1))
    found = {name: value[:, 0] for name, (value, _) in gold_standard._compare(z, z).items()}
    return with_errors(found, {"mean": 0.0})


@of_seed
def iterates(rho: float, *, seed: int) -> dict[str, Draws]:
    """The mean of the last 40 epochs of 200 runs."""
    values = autoregressive(np.random.default_rng(seed), rho, (EACH, 40))
    runs = [xr.Dataset({"train_elbo": ("epoch", one)}, {"epoch": range(1, 41)}) for one in values]
    found = convergence.converged(runs, tail=1.0).isel(quantity=0)
    return with_errors(found, {"mean": 0.0})


SHORT = "the error is averaged over the autocorrelations compatible with a short series, which is conservative"
CAUTIOUS = Row(0.94, 1.0, None, SHORT)
FOURTH = "the error of the mean squared weight depends on the fourth moment, which is finite for k below 0.25 only"
ONE_IN_TEN = "one in ten samples exceeds the statistic; otherwise the error, of a Beta distribution, is conservative"
STUCK = "in one of eight repetitions all four chains are in one mode, which R̂ cannot detect"
SELDOM = Row(0.9, 1.0, (0.2, 1.25), ONE_IN_TEN)
MORE = {"khat_se": Row(), "ess_se": measured(0.69, FOURTH)}
P = {name: Row(0.9, 1.0, None) for name in ("p_value", "joint_p_value")}
GRAINS = Row(0.9, 0.985, (0.8, 1.25))
CHAINS = {"mean_se": Row(), "sd_se": Row(0.9, 1.0, (0.7, 1.25)), "q_mean_se": Row(), "q_sd_se": Row()}
LOGNORMAL = {
    "mean_se": Row(),
    "sd_se": measured(0.88, "the error of an sd depends on the fourth moment, which few draws reveal"),
}

STUDIES = [
    Study(
        "diagnose.sbc", "an exact guide, 2 latents, 200 simulations", ranks_of(200, 2),
        {"coverage_se": GRAINS, "expected_coverage_se": GRAINS, **P}, 200, quick=5,
    ),
    Study(
        "diagnose.sbc", "an exact guide, 1 latent, 30 simulations", ranks_of(30, 1),
        {"coverage_se": GRAINS, "expected_coverage_se": GRAINS, **P}, 200,
    ),
    Study("diagnose.sbc", f"{RANKS} ranks of {LEVELS} values", simulated_p_values, {"p_value_se": Row()}, 200),
    Study("diagnose.predictive_check", "100 draws, p = 0.5", replicated(0.0), {"p_value_se": Row()}, 200, quick=5),
    Study("diagnose.predictive_check", "100 draws, p = 0.023", replicated(2.0), {"p_value_se": Row()}, 200),
    Study("diagnose.predictive_check", "100 draws, p = 0.0013", replicated(3.0), {"p_value_se": SELDOM}, 200),
    Study("diagnose.prior_check", "20 data of the model, 199 draws", new_data, {"p_value": Row(0.9, 0.99, None)}, 200),
    Study("diagnose.khat", "1000 particles, tail index 0.1", tails_of(0.1), {"khat_se": Row(), "ess_se": Row()}, 2, 1),
    Study("diagnose.khat", "1000 particles, tail index 0.3", tails_of(0.3), MORE, 2),
    Study("diagnose.khat", "1000 particles, tail index 0.7", tails_of(0.7), {"khat_se": Row()}, 2),
    Study("diagnose.khat", "25 data, half of them above 0.5", shares, {"share_se": Row()}, 5),
    Study("diagnose.nuts", "4 chains of 250 draws, autocorrelation 0.5", chains_of(0.5), CHAINS, 2),
    Study("diagnose.nuts", "4 chains of 250 draws, autocorrelation 0.9", chains_of(0.9), CHAINS, 2),
    Study("diagnose.nuts", "4 chains of 250 lognormal draws", chains_of(0.5, "lognormal"), LOGNORMAL, 2),
    Study("diagnose.nuts", "4 chains, each stuck in one of two modes", stuck, {"mean_se": measured(0.85, STUCK)}, 2),
    Study("diagnose.converged", "40 epochs, autocorrelation 0", iterates(0.0), {"mean_se": Row()}, 2),
    Study("diagnose.converged", "40 epochs, autocorrelation 0.5", iterates(0.5), {"mean_se": CAUTIOUS}, 2),
    Study("diagnose.converged", "40 epochs, autocorrelation 0.9", iterates(0.9), {"mean_se": CAUTIOUS}, 2),
]  # fmt: skip
