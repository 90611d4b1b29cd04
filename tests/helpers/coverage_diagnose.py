"""Coverage of what ``converged``, ``inference_gaps`` and ``collapse`` report, of series and models known exactly."""

import math

import numpy as np
import torch
import xarray as xr
from torch import nn

import pyro_vae as pv
from helpers.checks import linear_gaussian
from helpers.coverage_checks import Draws, Row, Study, measured, of_seed, with_errors
from helpers.guides import off_centre
from pyro_vae.diagnose import collapse
from pyro_vae.diagnose.convergence import converged

MODEL = linear_gaussian()
NATS = ("mean_kl", "mutual_information", "marginal_kl", "kl", "marginal_kl_of_latent")


def autoregressive(phi: float, epochs: int, runs: int, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Stationary AR(1) series of variance 1, with white noise of a variance on top; shape ``(run, epoch)``."""
    steps = generator.normal(size=(runs, epochs)) * math.sqrt(1 - phi**2)
    values = np.empty((runs, epochs))
    values[:, 0] = generator.normal(size=runs)
    for t in range(1, epochs):
        values[:, t] = phi * values[:, t - 1] + steps[:, t]
    return values + math.sqrt(noise) * generator.normal(size=(runs, epochs))


@of_seed
def trends(phi: float, epochs: int, noise: float = 0.0, *, seed: int) -> dict[str, Draws]:
    """The slope and the mean of 400 runs whose ELBO stays where it is."""
    values = autoregressive(phi, epochs, 400, noise, np.random.default_rng(seed))
    dims = ("epoch", "quantity"), {"epoch": range(1, epochs + 1), "quantity": ["elbo"]}
    runs = [xr.Dataset({"value": (dims[0], one[:, None])}, dims[1]) for one in values]
    found = converged(runs, tail=1.0)
    return with_errors(found.isel(quantity=0), {"slope": 0.0, "mean": 0.0})


def of_trends(slope: float, mean: float) -> dict[str, Row]:
    """Held to what was measured; too much is the price of not knowing how strongly iterates depend on each other."""
    wide, narrow = "conservative: φ is unknown", "a short series has little information about φ"
    return {
        name: Row(figure - 0.02, min(1.0, figure + 0.02), None, wide if figure > 0.96 else narrow)
        for name, figure in {"slope_se": slope, "mean_se": mean}.items()
    }


TRENDS = {
    (0.0, 20, 0.0): (0.973, 0.955),
    (0.0, 40, 0.0): (0.968, 0.960),
    (0.0, 200, 0.0): (0.966, 0.958),
    (0.5, 20, 0.0): (0.982, 0.975),
    (0.5, 40, 0.0): (0.982, 0.974),
    (0.5, 200, 0.0): (0.975, 0.962),
    (0.9, 20, 0.0): (0.925, 0.969),
    (0.9, 40, 0.0): (0.962, 0.986),
    (0.9, 200, 0.0): (0.990, 0.989),
    (0.9, 20, 1.0): (0.905, 0.824),
    (0.9, 40, 1.0): (0.927, 0.913),
    (0.9, 200, 1.0): (0.984, 0.970),
}
"""φ, epochs and the variance of white noise on top; measured coverage of the slope and of the mean."""


def gaps_of_each_datum(seed: int) -> dict[str, Draws]:
    """The data are the repetitions: each has draws of its own."""
    x, vae, precision = MODEL.sample(250), off_centre(MODEL, 1.0, 0.7), MODEL.precision
    truth = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    with torch.no_grad():
        elbo, best = MODEL.elbo(x, vae.encoder(x)), MODEL.elbo(x, MODEL.best_diagonal(x))
    found = pv.inference_gaps(vae, x, steps=300, num_particles=400, seed=seed)
    exact = {"elbo": elbo, "best_elbo": best, "gap": MODEL.log_marginal(x) - elbo, "approximation_gap": truth}
    exact |= {"amortization_gap": best - elbo, "closed": truth}
    return with_errors(found, exact)


def weighted_evidence(seed: int) -> dict[str, Draws]:
    """log p(x) where no oracle is found, so that it is importance-weighted with the best q."""
    model = linear_gaussian(latents=3)
    vae, x = model.as_vae(diagonal=True), model.sample(250)
    vae.decoder.net = nn.Sequential(vae.decoder.net, nn.Identity())
    found = pv.inference_gaps(vae, x, steps=60, num_particles=200, seed=seed)
    return with_errors(found, {"log_evidence": model.log_marginal(x)}, khat=found.khat)


def mixture_vae() -> pv.VAE:
    vae = MODEL.as_vae(diagonal=True)
    vae.prior = pv.priors.GaussianMixture(2, components=3).double()
    return vae


@of_seed
def surgery(scales: tuple[float, ...], *, seed: int) -> dict[str, Draws]:
    """``collapse`` of given data, as many as scales, against very many draws; 50 seeds of draws."""
    torch.manual_seed(0)
    x = MODEL.sample(len(scales)) * torch.tensor(scales).double().unsqueeze(-1)
    vae = mixture_vae()
    truth = collapse(vae, x, draws=40_000, seed=10**6)
    found = xr.concat([collapse(vae, x, draws=8, seed=100 * seed + i) for i in range(50)], "run")
    return with_errors(found, {name: truth[name] for name in NATS})


@of_seed
def variances(data: int, *, seed: int) -> dict[str, Draws]:
    """The variance of the posterior means over data of the model: I less the posterior's covariance."""
    truth = (torch.eye(2).double() - MODEL.precision.inverse()).diagonal()
    found = [collapse(MODEL.as_vae(), MODEL.sample(data), draws=2, seed=s) for s in range(250)]
    return with_errors(xr.concat(found, "run"), {"mean_variance": truth})


def rows(names: tuple[str, ...]) -> dict[str, Row]:
    return {f"{name}_se": Row() for name in names}


def _told(phi: float, epochs: int, noise: float) -> str:
    return f"{epochs} epochs, AR(1) with φ = {phi:g}{' plus white noise of its variance' if noise else ''}"


GAPS = ("elbo", "best_elbo", "gap", "approximation_gap", "amortization_gap", "closed")
FEW, SPREAD = (1.0,) * 10, (0.2, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
SAMPLE = "a sample variance is skewed, and its error is as uncertain as the variance"

STUDIES = [
    *(
        Study("diagnose.converged", _told(*case), trends(*case), of_trends(*figures), quick=int(case[:2] == (0.5, 40)))
        for case, figures in TRENDS.items()
    ),
    Study(
        "inference_gaps", "a linear-Gaussian VAE with an inaccurate guide, 300 steps, 400 draws", gaps_of_each_datum,
        rows(GAPS),
    ),
    Study(
        "inference_gaps", "log p(x) importance-weighted, 60 steps, 200 draws", weighted_evidence,
        rows(("log_evidence",)),
    ),
    Study("diagnose.collapse", "10 data, 8 draws, a mixture prior", surgery(FEW), rows(NATS), 5),
    Study("diagnose.collapse", "10 data far apart, 8 draws, a mixture prior", surgery(SPREAD), rows(NATS), 5, 1),
    Study("diagnose.collapse", "200 data", variances(200), {"mean_variance_se": Row()}),
    Study("diagnose.collapse", "20 data", variances(20), {"mean_variance_se": measured(0.83, SAMPLE)}),
]  # fmt: skip
