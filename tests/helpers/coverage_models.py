"""Coverage of errors over data: ``compare_models``, ``swap.rank``, the history of ``fit`` and its ``EarlyStopping``."""

from functools import partial

import numpy as np
import torch

import pyro_vae as pv
from helpers.checks import linear_gaussian
from helpers.coverage_checks import Draws, Row, Study, drawn, measured, of_seed, with_errors
from helpers.guides import altered
from pyro_vae.compare import swap
from pyro_vae.elbo.per_datum import per_datum_elbo
from pyro_vae.train.callbacks._paired import difference

MODEL = linear_gaussian(3, 1)
WORSE = pv.exact.LinearGaussian(MODEL.weight, MODEL.bias + 0.3, 0.9)
EACH = 200


def heavy(n: int) -> torch.Tensor:
    """Data with the mean and covariance of MODEL and the tails of Student's t with 5 degrees of freedom."""
    mixed = (3 / torch.distributions.Chi2(5.0).sample((n, 1)).double()).sqrt()
    return MODEL.bias + (MODEL.sample(n) - MODEL.bias) * mixed


def far(n: int) -> torch.Tensor:
    """Data of MODEL but for one in fifty, 6 standard deviations off in one feature; mean as of MODEL."""
    x = MODEL.sample(n)
    hit = torch.rand(n) < 0.02
    x[:, 0] += torch.where(hit, 6 * (1 - 2 * torch.randint(2, (n,))), 0).double()
    return x


COVARIANCE = MODEL.weight @ MODEL.weight.T + MODEL.scale**2 * torch.eye(3).double()
OUTLIERS = COVARIANCE + torch.diag(torch.tensor([0.02 * 36, 0, 0]).double())
DATA = {"normal": (MODEL.sample, COVARIANCE), "t": (heavy, COVARIANCE), "outliers": (far, OUTLIERS)}


def expected(model: pv.exact.LinearGaussian, covariance: torch.Tensor) -> float:
    """The mean of log p(x) over data of MODEL's mean and a covariance: that at the mean less half a trace."""
    own = model.weight @ model.weight.T + model.scale**2 * torch.eye(3).double()
    return (model.log_marginal(MODEL.bias[None])[0] - 0.5 * torch.linalg.solve(own, covariance).trace()).item()


@of_seed
def compared(data: str, n: int, *, seed: int) -> dict[str, Draws]:
    """Two models whose log p(x) is exact; the truth is the mean over all data there could be."""
    sample, covariance = DATA[data]
    table = pv.compare_models({"a": MODEL.as_vae(), "b": WORSE.as_vae()}, sample(n), num_particles=2, seed=seed)
    truth = {"a": n * expected(MODEL, covariance), "b": n * expected(WORSE, covariance)}
    best, other = table.index
    return {
        "se": drawn(table.elpd[best], table.se[best], truth[best]),
        "dse": drawn(table.elpd_diff[other], table.dse[other], truth[other] - truth[best]),
    }


X = MODEL.sample(20)
GUIDES = {"right": altered(MODEL, factor=0.95), "other": altered(WORSE, factor=1.2)}


def estimated(seed: int) -> dict[str, Draws]:
    """Monte-Carlo errors: the data stay, the particles are others."""
    table = pv.compare_models(GUIDES, X, num_particles=200, seed=seed)
    truth = {"right": MODEL.log_marginal(X).sum().item(), "other": WORSE.log_marginal(X).sum().item()}
    best, other = table.index
    return {
        "mcse": drawn(table.elpd[best], table.mcse[best], truth[best]),
        "diff_mcse": drawn(table.elpd_diff[other], table.diff_mcse[other], truth[other] - truth[best]),
    }


@of_seed
def ranked(data: str, n: int, *, seed: int) -> dict[str, Draws]:
    sample, covariance = DATA[data]
    found = swap.rank({"a": MODEL.as_vae(), "b": WORSE.as_vae()}, sample(n), num_particles=2, seed=seed)
    truth = {"a": expected(MODEL, covariance), "b": expected(WORSE, covariance)}
    best, other = found.model.values
    return {
        "se": drawn(found.log_evidence[0], found.se[0], truth[best]),
        "difference_se": drawn(found.difference[1], found.difference_se[1], truth[other] - truth[best]),
    }


def ranked_over_seeds(seed: int) -> dict[str, Draws]:
    """log p(x) as a sum of independent parts of datum and of seed, 200 models at once."""
    rng = np.random.default_rng(seed)
    every = rng.normal(size=(EACH, 1, 100)) + 0.3 * rng.normal(size=(EACH, 5, 1))
    return {"se": drawn(every.mean((1, 2)), swap._error(every, np.arange(every.shape[-1])), 0.0)}


@of_seed
def fitted(data: str, *, seed: int) -> dict[str, Draws]:
    """The ELBO of data that a VAE does not learn from, as its rate is next to nothing."""
    sample, covariance = DATA[data]
    vae = MODEL.as_vae()
    settings = {"epochs": 1, "optimizer": partial(torch.optim.SGD, lr=1e-30), "engine": "eager", "seed": seed}
    found = pv.fit(vae, sample(40), validation_data=sample(40), progress=False, device="cpu", **settings).history
    return with_errors(found, dict.fromkeys(("train_elbo", "validation_elbo"), expected(MODEL, covariance)))


@of_seed
def paired(data: str, *, seed: int) -> dict[str, Draws]:
    """The difference of two VAEs on the same data with the same noise, by which early stopping judges."""
    sample, covariance = DATA[data]
    x, found = sample(40 * EACH), []
    for model in WORSE, MODEL:
        torch.manual_seed(seed)
        found.append(per_datum_elbo(model.as_vae(), x).reshape(EACH, 40))
    value, error = np.array([difference(*pair) for pair in zip(*found, strict=True)]).T
    return {"difference": drawn(value, error, expected(WORSE, covariance) - expected(MODEL, covariance))}


RARE = "outliers dominate, and many samples of this size have none"
TAILED = "log p(x) of such data has the tails of t₂.₅, so its sample variance has infinite variance"
WORDS = {"normal": "", "t": ", data with the tails of t₅", "outliers": ", one outlier in 50 data"}


def of_data(function: str, measure, quantities: tuple[str, str], data: str, n: int, row: Row = Row()) -> Study:  # noqa: B008
    setting = f"{n} data{WORDS[data]}, log p(x) exact"
    return Study(function, setting, measure(data, n), dict.fromkeys(quantities, row), 200)


def of_elbos(function: str, measure, quantities: tuple[str, ...], data: str, seeds: int, row: Row = Row()) -> Study:  # noqa: B008
    setting = f"40 data{WORDS[data]}"
    return Study(function, setting, measure(data), dict.fromkeys(quantities, row), seeds, quick=int(seeds < 10))


MODELS, RANK, FIT = ("se", "dse"), ("se", "difference_se"), ("train_elbo_se", "validation_elbo_se")

STUDIES = [
    of_data("compare_models", compared, MODELS, "normal", 100),
    of_data("compare_models", compared, MODELS, "t", 100),
    of_data("compare_models", compared, MODELS, "outliers", 50, Row(0.85, 0.985, None, RARE)),
    Study(
        "compare_models", "20 fixed data, 200 particles", estimated,
        {"mcse": Row(), "diff_mcse": Row(0.9, 1.0, (0.4, 1.25), "the shared seed correlates the errors of models")},
        200,
    ),
    of_data("swap.rank", ranked, RANK, "normal", 50),
    of_data("swap.rank", ranked, RANK, "t", 50, measured(0.86, TAILED)),
    Study("swap.rank", "100 data and 5 seeds", ranked_over_seeds, {"se": measured(0.89, "4 degrees of freedom")}, 2, 1),
    of_elbos("fit", fitted, FIT, "normal", 200),
    of_elbos("fit", fitted, FIT, "t", 200, measured(0.87, TAILED)),
    of_elbos("callbacks.EarlyStopping", paired, ("difference",), "normal", 2),
    of_elbos("callbacks.EarlyStopping", paired, ("difference",), "outliers", 2, measured(0.92, RARE)),
]  # fmt: skip
