"""Coverage of what ``compare_elbos`` and ``over_seeds`` report."""

import itertools
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
import xarray as xr

import pyro_vae as pv
from helpers.checks import linear_gaussian
from helpers.coverage_checks import Draws, Row, Study, drawn, measured, of_seed, with_errors
from pyro_vae.compare import cost, gradient_moments
from pyro_vae.compare import measure as compare_measure

DRAWS, NUMBERS, EACH = 100, 20, 200


def moments_of(gradients: torch.Tensor) -> gradient_moments.Moments:
    """Moments of gradients of shape ``(draw, repetition, number)``, each repetition a parameter of its own."""
    draws, repetitions, numbers = gradients.shape
    moments = gradient_moments.Moments([numbers] * repetitions, draws, like=gradients)
    for one in gradients:
        moments.add([one.flatten()])
    return moments


NOISE = {
    "normal": lambda size: torch.randn(size).double(),
    # Student's t with 5 degrees of freedom: the fourth moment exists, that of the error of a variance hardly.
    "t": lambda size: torch.distributions.StudentT(5.0).sample(size).double() * (3 / 5) ** 0.5,
    "lognormal": lambda size: (torch.randn(size).double().exp() - np.exp(0.5)) / np.sqrt(np.exp(2) - np.exp(1)),
}


@of_seed
def simulated_gradient(noise: str, norm: float, *, seed: int) -> dict[str, Draws]:
    """Gradients of known mean, ``norm`` long, and variance 1 in each of NUMBERS numbers."""
    gradients = NOISE[noise]((DRAWS, EACH, NUMBERS))
    gradients[..., 0] += norm
    truth = {"gradient_norm": norm, "gradient_variance": NUMBERS, "gradient_snr": norm / NUMBERS**0.5}
    return with_errors(table_of(gradients), truth)


def table_of(own, *, reference=None, of_elbo=None) -> dict[str, np.ndarray]:
    """The columns on gradients of a cell with these, of whose measurements ``_gradients`` reads four."""
    own, reference, of_elbo = (None if one is None else moments_of(one) for one in (own, reference, of_elbo))
    groups = [[i] for i in range(EACH)]
    found = SimpleNamespace(moments=[own], groups=groups, references=[reference], of_elbo=of_elbo)
    return {name: column[0][0] for name, column in compare_measure._gradients(found).items()}


@of_seed
def simulated_bias(bias: float, *, seed: int) -> dict[str, Draws]:
    """A gradient of norm 1 beside that of a reference of twice the draws, ``bias`` apart."""
    own, reference = torch.randn(DRAWS, EACH, NUMBERS).double(), torch.randn(2 * DRAWS, EACH, NUMBERS).double()
    own, reference = own / NUMBERS**0.5, reference / NUMBERS**0.5
    own[..., :2] += torch.tensor([1.0, bias])
    reference[..., 0] += 1
    return with_errors(table_of(own, reference=reference), {"gradient_bias": bias})


@of_seed
def simulated_alignment(cosine: float, *, seed: int) -> dict[str, Draws]:
    """Two gradients of norm 1 whose means are at an angle."""
    own, other = (torch.randn(DRAWS, EACH, NUMBERS).double() / NUMBERS**0.5 for _ in range(2))
    own[..., 0] += 1
    other[..., :2] += torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    return with_errors(table_of(own, of_elbo=other), {"elbo_alignment": cosine})


class Clock:
    """A clock that each step moves on by the next of given times."""

    def __init__(self, times) -> None:
        self.times, self.now, self.started = iter(times), 0.0, False

    def perf_counter(self) -> float:
        self.now += next(self.times) if self.started else 0.0
        self.started = not self.started
        return self.now


@of_seed
def simulated_seconds(shape: str, *, seed: int) -> dict[str, Draws]:
    """Independent times of known median 1: lognormal, one in ten twenty times as long where disturbed."""
    rng = np.random.default_rng(seed)
    times = np.exp(0.1 * rng.normal(size=(compare_measure.TIMED_REPEATS, EACH)))
    longer = rng.random(times.shape) < (0.1 if shape == "disturbed" else 0.0)
    times = np.where(longer, 20 * times, times)
    truth = 1.0 if shape == "quiet" else DISTURBED
    with patch.object(cost, "time", Clock(times.ravel())):
        found = cost.median_seconds([lambda: None] * EACH, torch.device("cpu"), compare_measure.TIMED_REPEATS)
    return {"seconds_se": drawn(*found, truth)}


DISTURBED = float(np.exp(0.1 * 0.13971))  # the 0.5 / 0.9 quantile of the lognormal: Φ⁻¹(0.5556) = 0.1397


@cache
def subject() -> tuple[pv.exact.LinearGaussian, pv.VAE, torch.Tensor]:
    """A linear-Gaussian VAE of one latent whose diagonal guide is off, and 8 data."""
    torch.manual_seed(0)
    model = linear_gaussian(3, 1)
    vae, x = model.as_vae(diagonal=True), model.sample(8)
    with torch.no_grad():
        for parameter in vae.encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, vae, x


NODES = 5  # Gauss-Hermite is exact for polynomials of degree 9; the square of the score function's gradient has 8


class NoReference:
    """An estimator without a reference, whose gradients would take most of the time."""

    def reference(self) -> None:
        return None


class Reparameterized(NoReference, pv.elbo.ELBO):
    pass


class Score(NoReference, pv.elbo.ScoreFunction):
    pass


def exact_gradient(score: bool) -> dict[str, float]:
    """Norm, variance and signal-to-noise ratio of the gradient, by quadrature over the noise of each datum.

    Of the ELBO of one particle by reparameterization, or of two particles by the score function with each the other's
    baseline; the gradient is a polynomial in the noise.
    """
    _, vae, x = subject()
    node, weight = np.polynomial.hermite_e.hermegauss(NODES)
    weight, particles = weight / weight.sum(), 2 if score else 1
    means, squares = [], []
    for datum in x:
        q = vae.encoder(datum)
        grid = list(itertools.product(range(NODES), repeat=particles))
        each = torch.stack([_gradient(vae, datum, q, torch.tensor(node[list(at)]), score) for at in grid])
        chance = torch.tensor([np.prod(weight[list(at)]) for at in grid]).unsqueeze(1)
        means.append((chance * each).sum(0))
        squares.append((chance * each**2).sum(0))
    mean, square = torch.stack(means), torch.stack(squares)
    norm = (mean.sum(0) / len(x)).norm().item()
    variance = ((square - mean**2).sum() / len(x) ** 2).item()
    return {"norm": norm, "variance": variance, "snr": norm / variance**0.5}


def _gradient(vae: pv.VAE, x: torch.Tensor, q, noise: torch.Tensor, score: bool) -> torch.Tensor:
    z = q.base_dist.loc + q.base_dist.scale * noise.unsqueeze(1)
    z = z.detach() if score else z
    joint, log_q = vae.prior().log_prob(z) + vae.decoder(z).log_prob(x), q.log_prob(z)
    log_w = joint - log_q
    term = ((log_w - log_w.flip(0)).detach() * log_q + joint).mean() if score else log_w.mean()
    leaves = list(vae.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(term, leaves, retain_graph=True)])


@cache
def truths() -> dict[str, dict[str, float]]:
    return {"ELBO": exact_gradient(False), "ScoreFunction": exact_gradient(True)}


def compared(elbos, medians, seed: int, draws: int, **settings) -> xr.Dataset:
    """A comparison by a clock whose times are lognormal with the given medians, cell by cell."""
    noise = 0.1 * np.random.default_rng(seed).normal(size=(compare_measure.TIMED_REPEATS, len(medians)))
    with patch.object(cost, "time", Clock((np.exp(noise) * medians).ravel())):
        return pv.compare_elbos(subject()[1], subject()[2], elbos, draws=draws, seed=seed, **settings)


def two_estimators(seed: int) -> dict[str, Draws]:
    """Bound and gradient of the ELBO, and the gradient of the score function, whose tails are heavier."""
    model, vae, x = subject()
    evidence = pv.log_evidence(vae, x, num_particles=100, seed=seed + 10**6)
    elbos = {"ELBO": Reparameterized(1), "ScoreFunction": Score(2)}
    every = compared(elbos, (1.0, 3.0), seed, 20, log_evidence=evidence).sel(parameter_group="all")
    elbo = model.elbo(x, vae.encoder(x)).mean()
    found = {}
    for name, particles, seconds in ("ELBO", 1, 1.0), ("ScoreFunction", 2, 3.0):
        exact = truths()[name]
        truth = {f"gradient_{moment}": value for moment, value in exact.items()}
        truth |= {"efficiency": exact["snr"] ** 2 / seconds, "elbo": elbo}
        truth |= {"bias": elbo - model.log_marginal(x).mean()} if name == "ELBO" else {}
        of_cell = with_errors(every.sel(estimator=name, particles=particles), truth)
        found |= {f"{name}: {error}": value for error, value in of_cell.items()}
    return found


def propagated(seed: int) -> dict[str, Draws]:
    """What is made of the errors of ratios and seconds, of 200 tables of two cells each."""
    rng = np.random.default_rng(seed)
    snr, seconds, relative = np.array([[1.0], [2.0]]), np.array([[1.0], [2.0]]), 0.05
    cells = {
        "gradient_snr": snr * (1 + relative * rng.normal(size=(2, EACH))),
        "gradient_snr_se": snr * np.full((2, EACH), relative),
        "seconds": seconds * (1 + relative * rng.normal(size=(2, EACH))),
        "seconds_se": seconds * np.full((2, EACH), relative),
        "gradient_variance": np.ones((2, EACH)),
    }
    table = xr.Dataset({name: (("particles", "table"), value) for name, value in cells.items()}, {"particles": [1, 4]})
    found = compare_measure._with_efficiency(table).transpose("table", "particles")
    return with_errors(found, {"efficiency": [[1.0, 2.0]], "speedup": [[1.0, 2.0]]})


SEEDS = {
    "spread": lambda rng, size: rng.normal(size=size),
    "alike": lambda rng, size: np.zeros(size),
    "collapsing": lambda rng, size: np.where(rng.random(size) < 0.2, -4.0, 1.0) + 0.1 * rng.normal(size=size),
}


@of_seed
def seeds_of(kind: str, number: int, *, seed: int) -> dict[str, Draws]:
    """Trainings whose bounds differ from seed to seed by noise of mean 0, each with a standard error of 0.1."""
    rng = np.random.default_rng(seed)
    elbo = SEEDS[kind](rng, (number, EACH)) + 0.1 * rng.normal(size=(number, EACH))
    attributes = {"draws": 10, "size": 10, "dtype": "torch.float64"}
    each = [
        xr.Dataset(
            {"elbo": ("estimator", row), "elbo_se": ("estimator", np.full(EACH, 0.1))},
            {"estimator": range(EACH), "datum": range(2)},
            {**attributes, "seed": i},
        )
        for i, row in enumerate(elbo)
    ]
    return with_errors(pv.over_seeds(each), {"elbo": 0.0})


NINE = "10 blocks of draws leave 9 degrees of freedom"
FEW = Row(0.88, 0.985, (0.8, 1.3), NINE)
RATIOS = {"efficiency_se": Row(), "speedup_se": Row(0.95, 0.995, (0.5, 1.25), "half of the cells are 1 by definition")}
CLOSE = Row(0.93, 1.0, (0.6, 1.25), "near 0, the estimate is the root of a noisy square")
NAMES = ("norm", "variance", "snr")
MOMENTS = {f"gradient_{name}_se": FEW for name in NAMES}
HIDDEN = {f"gradient_{name}_se": FEW if name == "variance" else CLOSE for name in NAMES}
TAILS = "the error of a variance depends on the fourth moment, which few draws reveal"

RARELY = "large gradients are rare: the sd of the squared gradient over draws is six times its mean"


def of_gradients(noise: str, norm: float, rows, seeds: int = 2) -> Study:
    ratio = norm / NUMBERS**0.5
    setting = f"{noise} gradients of {NUMBERS} numbers, signal-to-noise ratio {ratio:.2g}, {DRAWS} draws"
    return Study("compare_elbos", setting, simulated_gradient(noise, norm), rows, seeds)


def of_biases(bias: float, row: Row) -> Study:
    setting = f"a bias of {bias:g} of the norm, normal gradients, {DRAWS} draws"
    return Study("compare_elbos", setting, simulated_bias(bias), {"gradient_bias_se": row}, 2)


def of_alignments(cosine: float, row: Row) -> Study:
    setting = f"a cosine of {cosine:g}, normal gradients, {DRAWS} draws"
    return Study("compare_elbos", setting, simulated_alignment(cosine), {"elbo_alignment_se": row}, 2)


def of_seconds(shape: str, words: str) -> Study:
    return Study("compare_elbos", f"11 timings, {words}", simulated_seconds(shape), {"seconds_se": Row()}, 2, quick=1)


def of_seeds(kind: str, words: str, number: int, row: Row) -> Study:
    return Study("over_seeds", f"{number} seeds, {words}", seeds_of(kind, number), {"elbo_se": row}, 2, quick=1)


STUDIES = [
    Study(
        "compare_elbos", "linear-Gaussian, one latent, 8 data, 20 draws, log p(x) by 100 particles", two_estimators,
        {
            "ELBO: elbo_se": Row(), "ELBO: bias_se": Row(), "ScoreFunction: elbo_se": Row(),
            "ELBO: gradient_norm_se": FEW, "ELBO: gradient_snr_se": FEW, "ELBO: efficiency_se": FEW,
            "ELBO: gradient_variance_se": measured(0.85, TAILS),
            "ScoreFunction: gradient_norm_se": measured(0.85, RARELY),
            "ScoreFunction: gradient_variance_se": measured(0.45, RARELY),
            "ScoreFunction: gradient_snr_se": measured(0.85, RARELY),
            "ScoreFunction: efficiency_se": measured(0.85, RARELY),
        },
        seeds=200,
    ),
    Study("compare_elbos", "ratios and seconds known to 5 %", propagated, RATIOS, 2, quick=1),
    of_gradients("normal", NUMBERS**0.5, MOMENTS),
    of_gradients("normal", 0.3, HIDDEN),
    of_gradients("normal", 0.0, HIDDEN),
    of_gradients("t", 1.0, MOMENTS),
    of_gradients("lognormal", 1.0, {**MOMENTS, "gradient_variance_se": measured(0.83, TAILS)}),
    of_biases(0.0, CLOSE),
    of_biases(0.1, CLOSE),
    of_biases(1.0, FEW),
    of_alignments(0.0, FEW),
    of_alignments(0.6, FEW),
    of_seconds("quiet", "lognormal"),
    of_seconds("disturbed", "one in ten 20 times as long"),
    of_seeds("spread", "seeds differ more than draws", 3, measured(0.81, "2 degrees of freedom")),
    of_seeds("spread", "seeds differ more than draws", 5, measured(0.88, "4 degrees of freedom")),
    of_seeds("spread", "seeds differ more than draws", 10, Row(0.88, 0.985, None, "9 degrees of freedom")),
    of_seeds("alike", "seeds do not differ", 3, Row(0.94, 1.0, (0.6, 1.1), "the larger of two errors is reported")),
    of_seeds(
        "collapsing", "one seed in five collapses", 5, measured(0.67, "a third of the groups of 5 show no collapse")
    ),
]  # fmt: skip
