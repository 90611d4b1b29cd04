"""Coverage of the Monte-Carlo errors of ``log_evidence``, on guides that are too narrow and on one that misses a mode.

A guide whose sd is f times the posterior's has weights ``exp(ε² (1 - f²) / 2)``, of tail index k = 1 - f².
"""

from functools import partial

import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv
from helpers.checks import linear_gaussian
from helpers.coverage_checks import Draws, Row, Study, drawn, measured, of_seed
from helpers.guides import altered

EACH = 200


def evidence_of(vae: pv.VAE, x: torch.Tensor, log_marginal, method: str, seed: int) -> dict[str, Draws]:
    """The errors of a method, against the exact log p(x) of the data, or of those that it simulates."""
    found = pv.log_evidence(vae, x, method=method, seed=seed, **SETTINGS[method])
    if method != "bdmc":
        khat = found.khat.values if "khat" in found else None
        return {"mcse": drawn(found.log_evidence, found.mcse, log_marginal(x), khat=khat)}
    truth = log_marginal(torch.as_tensor(found.x.values))
    names = {"log_evidence": "mcse", "lower": "lower_mcse", "upper": "upper_mcse_given_z"}
    return {error: drawn(found[value], found[error], truth) for value, error in names.items()}


@of_seed
def narrow(method: str, k: float, *, seed: int) -> dict[str, Draws]:
    """log p(x) of 200 data by a guide with tail index k."""
    model = linear_gaussian(3, 1)
    return evidence_of(altered(model, factor=(1 - k) ** 0.5), model.sample(EACH), model.log_marginal, method, seed)


class Square(nn.Module):
    """x = (z², z²) + noise, so that z and -z explain x alike."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return (z**2).expand(*z.shape[:-1], 2)


class OneMode(nn.Module):
    """Laplace's approximation at the positive mode alone."""

    def forward(self, x: torch.Tensor):
        mode = x.mean(-1, keepdim=True).clamp(min=0.25).sqrt()
        return dist.Normal(mode, (1 + 2 * (2 * mode / NOISE) ** 2).rsqrt()).to_event(1)


NOISE = 0.5


@of_seed
def two_modes(method: str, *, seed: int) -> dict[str, Draws]:
    """Data whose latent has two modes of equal weight, far apart."""
    prior, likelihood = pv.priors.StandardNormal(1), pv.likelihoods.Normal(Square(), scale=NOISE)
    vae = pv.VAE(prior=prior, decoder=likelihood, encoder=OneMode()).double()
    x = vae.decoder(1.2 + torch.rand(EACH, 1).double()).sample()
    return evidence_of(vae, x, partial(pv.exact.quadrature_log_marginal, vae, points=641), method, seed)


TAIL = "the weights have infinite variance: without the rare largest weights, estimate and error are too low"
MISSED = "no draw of the guide reaches the other mode, which the weights do not show; log p(x) is too low by log 2"
MISSED_BY_SOME = "as above for data with two separate modes; some simulated data have one mode"
ONE_DRAW = "all chains of the upper bound start at one exact draw, in one mode, and the error is conditional on it"
WEIGHTED, ANNEALED = {"num_particles": 500}, {"num_particles": 16, "temperatures": 10}
SETTINGS = {"iw": WEIGHTED, "psis": WEIGHTED, "ais": ANNEALED, "bdmc": ANNEALED}


def said(method: str) -> str:
    return f"{method}, {'500 particles' if SETTINGS[method] is WEIGHTED else '16 chains, 10 temperatures'}"


def of_narrow(method: str, k: float, row: Row | dict[str, Row]) -> Study:
    setting, rows = f"{said(method)}, a guide with tail index {k:g}", {"mcse": row} if isinstance(row, Row) else row
    return Study("log_evidence", setting, narrow(method, k), rows, 2, quick=int(method != "bdmc"))


def of_two_modes(method: str, rows: dict[str, Row]) -> Study:
    return Study("log_evidence", f"{said(method)}, two modes, one missed by the guide", two_modes(method), rows, 2)


FEW = "16 chains are few for the error of a mean of weights, and the logarithm is skewed"


def of_bounds_near(lower: float) -> dict[str, Row]:
    return {"mcse": Row(0.88, 0.985, (0.8, 1.35)), "lower_mcse": measured(lower, FEW), "upper_mcse_given_z": Row()}


STUDIES = [
    of_narrow("iw", 0.1, Row()),
    of_narrow("iw", 0.3, Row(0.89)),
    of_narrow("iw", 0.5, measured(0.88, TAIL)),
    of_narrow("iw", 0.7, measured(0.74, TAIL)),
    of_narrow("psis", 0.1, Row()),
    of_narrow("psis", 0.3, Row(0.89)),
    of_narrow("psis", 0.5, measured(0.88, TAIL)),
    of_narrow("psis", 0.7, measured(0.68, TAIL)),
    of_narrow("ais", 0.1, Row(0.87, 0.985, (0.8, 1.35), FEW)),
    of_narrow("ais", 0.5, measured(0.88, FEW)),
    of_narrow("bdmc", 0.1, of_bounds_near(0.87)),
    of_narrow("bdmc", 0.5, of_bounds_near(0.84)),
    *(of_two_modes(method, {"mcse": measured(0.0, MISSED)}) for method in ("iw", "psis", "ais")),
    of_two_modes(
        "bdmc",
        {
            "mcse": measured(0.80, MISSED_BY_SOME), "lower_mcse": measured(0.48, MISSED_BY_SOME),
            "upper_mcse_given_z": measured(0.54, ONE_DRAW),
        },
    ),
]  # fmt: skip
