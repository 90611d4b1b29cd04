"""Each likelihood against its log-density to 30 digits: value, gradient, missing values, moments and samples."""

from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from helpers import reference_likelihoods as reference
from mpmath import mp
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae import likelihoods

SCALE = 0.75  # which single precision holds exactly
REAL = (-mp.inf, -3, -1, 0.3, 1, 3, mp.inf)
COUNTS = list(range(80))


@dataclass
class Case:
    """A likelihood as a function of its network, its reference, and points: numbers of the network and a value.

    ``scaled`` is for one whose log-scale is a number of the reference but not of the network. At the ``usual`` numbers
    moments and samples are looked at, over the ``support``.
    """

    make: object
    log_density: object
    points: list
    usual: list | None = None
    support: tuple | list = ()
    scaled: bool = False


LOCATIONS = [((0.3,), 0.9), ((-1.5,), 2.0), ((4.0,), 3.75), ((0.0,), -30.0)]
FAR = [*LOCATIONS, ((-0.1,), 1e6)]
LOGITS = [-700.0, -30.0, -2.5, -0.3, 0.0, 1e-3, 0.4, 3.0, 30.0, 700.0]
NEAR_HALF = [0.0, 1e-12, -1e-7, 1e-4, -0.02, 0.3, -0.99, 0.999, 1.001, -1.3, 2.6, -12.0, 40.0, -300.0]
MIXTURE = (0.4, -0.7, 1.1, -0.5, 0.2, 0.8, -1.2, -2.5, -0.4)


def scaled(member, log_density, points=FAR, **settings):
    make = partial(getattr(likelihoods, member), scale=SCALE, **settings)
    return Case(make, log_density, points, [0.3], REAL, scaled=True)


student_t = partial(reference.student_t, df=4.5)
CASES = {
    "Normal": scaled("Normal", reference.normal, LOCATIONS),
    "Normal, learned scale": scaled("Normal", reference.normal, LOCATIONS, learn_scale=True),
    "Normal, a scale per feature": scaled("Normal", reference.normal, LOCATIONS, per_feature=len(LOCATIONS)),
    "HeteroscedasticNormal": Case(
        partial(likelihoods.HeteroscedasticNormal, min_scale=0.125),
        partial(reference.heteroscedastic, min_scale=0.125),
        [((0.3, -0.4), 0.9), ((-1.5, 1.2), 2.0), ((4.0, -6.0), 3.75), ((0.0, 5.0), -30.0)],
        [0.3, -0.4],
        REAL,
    ),
    "HeteroscedasticNormal, any scale": Case(
        likelihoods.HeteroscedasticNormal,
        partial(reference.heteroscedastic, min_scale=0.0),
        [((0.3, -0.4), 0.9), ((-1.5, 1.2), 2.0), ((4.0, -9.0), 3.75)],
        [0.3, 0.2],
        REAL,
    ),
    "StudentT": scaled("StudentT", student_t, df=4.5),
    "StudentT, learned scale": scaled("StudentT", student_t, df=4.5, learn_scale=True),
    "StudentT, a scale per feature": scaled("StudentT", student_t, df=4.5, per_feature=len(FAR)),
    "Laplace": scaled("Laplace", reference.laplace),
    "Laplace, learned scale": scaled("Laplace", reference.laplace, learn_scale=True),
    "Laplace, a scale per feature": scaled("Laplace", reference.laplace, per_feature=len(FAR)),
    "Bernoulli": Case(
        likelihoods.Bernoulli,
        reference.bernoulli,
        [((logit,), x) for logit in LOGITS if abs(logit) < 100 for x in (0.0, 1.0)],
        [0.4],
        [0, 1],
    ),
    "ContinuousBernoulli": Case(
        likelihoods.ContinuousBernoulli,
        reference.continuous_bernoulli,
        [((logit,), x) for logit in NEAR_HALF for x in (0.0, 0.3, 1.0)],
        [1.7],
        (0, 1),
    ),
    "ContinuousBernoulli, about one half": Case(
        likelihoods.ContinuousBernoulli, reference.continuous_bernoulli, [((0.3,), 0.2)], [0.3], (0, 1)
    ),
    "ContinuousBernoulli, nearly at one half": Case(
        likelihoods.ContinuousBernoulli, reference.continuous_bernoulli, [((9e-3,), 0.2)], [9e-3], (0, 1)
    ),
    "ContinuousBernoulli, below one half": Case(
        likelihoods.ContinuousBernoulli, reference.continuous_bernoulli, [((-4.0,), 0.2)], [-4.0], (0, 1)
    ),
    "Categorical": Case(
        partial(likelihoods.Categorical, levels=4),
        reference.categorical,
        [((0.2, -1.0, 3.0, 0.7), x) for x in (0.0, 1.0, 2.0, 3.0)] + [((40.0, -40.0, 0.0, 1.0), 1.0)],
        [0.2, -1.0, 1.0, 0.7],
        [0, 1, 2, 3],
    ),
    "DiscretizedLogisticMixture": Case(
        partial(likelihoods.DiscretizedLogisticMixture, components=3, levels=6),
        partial(reference.logistic_mixture, levels=6),
        [(MIXTURE, k / 5) for k in range(6)]
        + [((0.4, 9.0, -9.0, -1.0, 1.0, 0.0, -9.0, -7.5, -7.001), k / 5) for k in (0, 2, 5)]
        + [((0.4, 2.0, -1.0, -3.0, 2.0, 0.0, 7.5, 6.9, 8.0), k / 5) for k in (0, 1, 5)],
        MIXTURE,
        [k / 5 for k in range(6)],
    ),
    "DiscretizedLogisticMixture, 8 bits": Case(
        partial(likelihoods.DiscretizedLogisticMixture, components=1),
        partial(reference.logistic_mixture, levels=256),
        [((0.3, -0.5, s), k / 255) for s in (-6.5, -3.0, 0.5) for k in (0, 1, 64, 254, 255)],
    ),
    "Binomial": Case(
        partial(likelihoods.Binomial, total_count=7),
        partial(reference.binomial, total_count=7),
        [((logit,), x) for logit in (-30.0, -2.5, 0.0, 0.4, 30.0) for x in (0.0, 1.0, 4.0, 7.0)],
        [0.4],
        list(range(8)),
    ),
    "Poisson": Case(
        likelihoods.Poisson,
        reference.poisson,
        [((r,), x) for r, x in ((-3.0, 0.0), (0.2, 1.0), (2.0, 12.0), (6.0, 380.0), (19.0, 2.0), (-19.0, 1.0))]
        + [((r,), 3.0) for r in (-25.0, -20.5, 20.5, 22.0)],
        [1.2],
        COUNTS,
    ),
    "NegativeBinomial": Case(
        likelihoods.NegativeBinomial,
        reference.negative_binomial,
        [((logit, k), x) for logit in (-3.0, 0.4, 2.0) for k in (-1.0, 0.0, 1.5) for x in (0.0, 1.0, 6.0)]
        + [(pair, 2.0) for pair in ((-22.0, 0.5), (21.0, -2.0), (0.3, -21.0), (-9.0, 9.9), (-15.0, 9.5))],
        [-0.5, 0.8],
        COUNTS,
    ),
}


def with_zeros(member, log_density, counts, usual):
    """The points of a likelihood of counts, half of them at 0 and 2 too, beside logits of a zero."""
    case = CASES[counts]
    points = [
        (((0.3, -30.0, 4.0)[i % 3], *numbers), value)
        for i, (numbers, x) in enumerate(case.points)
        for value in sorted({x, *((0.0, 2.0) if i % 2 else ())})
    ]
    make = partial(member, counts=case.make)
    return Case(make, partial(log_density, counts=case.log_density), points, usual, case.support)


inflated = partial(with_zeros, likelihoods.ZeroInflated, reference.zero_inflated)
hurdle = partial(with_zeros, likelihoods.Hurdle, reference.hurdle)
CASES |= {
    "ZeroInflated, Poisson": inflated("Poisson", [-0.4, 1.2]),
    "ZeroInflated, NegativeBinomial": inflated("NegativeBinomial", [0.3, -0.5, 0.8]),
    "ZeroInflated, Binomial": inflated("Binomial", [0.3, 0.4]),
    "Hurdle, Poisson": hurdle("Poisson", [-0.9, -0.2]),
    "Hurdle, NegativeBinomial": hurdle("NegativeBinomial", [0.3, -0.5, 0.1]),
    "Hurdle, Binomial": hurdle("Binomial", [0.3, -1.4]),
}


def laid_out(points):
    """The network's output: the first number of all features, then the second of all, and so on."""
    return torch.tensor([numbers for numbers, _ in points], dtype=torch.float64).T.flatten()


def site(decoder, z, x, mask):
    """What the model observes, given the latents; the network is the identity."""
    vae = pv.VAE(prior=pv.priors.StandardNormal(z.shape[-1]), decoder=decoder, encoder=nn.Identity()).double()
    model = poutine.condition(vae.model, {"z": z})
    observed = poutine.trace(model).get_trace(x, None, None, mask).nodes["x"]
    return observed["fn"].log_prob(observed["value"])


def made(case):
    """The likelihood, its log-scale moved from where it starts, and the log-scale that the reference is given."""
    likelihood = case.make(nn.Identity()).double()
    if not case.scaled:
        return likelihood, ()
    if likelihood.learn_scale:
        likelihood.log_scale.data = torch.full_like(likelihood.log_scale, 0.4)
        return likelihood, (0.4,)
    return likelihood, (mp.log(SCALE),)


def closeness(found, truth, least=1.0):
    """Of two numbers, relative to the greater of the truth and ``least``."""
    found, truth = (torch.as_tensor(value, dtype=torch.float64).detach() for value in (found, truth))
    return ((found - truth).abs() / truth.abs().clamp(min=least)).max().item()


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_30_digits(name):
    """Each row observes one feature alone: what is missing, and holds NaN, adds nothing and has no gradient."""
    case = CASES[name]
    likelihood, log_scale = made(case)
    number = len(case.points)
    only = torch.eye(number, dtype=torch.bool)
    x = torch.tensor([x for _, x in case.points], dtype=torch.float64).where(only, torch.nan)
    out = laid_out(case.points).repeat(number, 1).requires_grad_()
    logs = site(likelihood, out, x, only)
    (gradient, *of_scale) = torch.autograd.grad(logs.sum(), [out, *likelihood.parameters()])
    own = gradient.unflatten(1, (-1, number)).movedim(1, 2)
    assert not own[~only].any()
    for i, (numbers, value) in enumerate(case.points):
        every = [*numbers, *log_scale]
        assert closeness(logs[i], float(case.log_density([mp.mpf(n) for n in every], value))) < 1e-10
        slopes = reference.gradient(case.log_density, every, value)
        assert closeness(own[i, i], slopes[: len(numbers)], least=1e-3) < 1e-10 * max(1, abs(value)), case.points[i]
        if of_scale and of_scale[0].dim():
            assert closeness(of_scale[0][i], slopes[-1]) < 1e-10
    if of_scale and not of_scale[0].dim():
        total = sum(reference.gradient(case.log_density, [*n, *log_scale], v)[-1] for n, v in case.points)
        assert closeness(of_scale[0], total) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_the_whole_is_the_sum_of_its_features(name):
    case = CASES[name]
    likelihood, log_scale = made(case)
    x = torch.tensor([[x for _, x in case.points]], dtype=torch.float64)
    out = laid_out(case.points)[None]
    total = sum(case.log_density([mp.mpf(n) for n in (*numbers, *log_scale)], x) for numbers, x in case.points)
    assert closeness(site(likelihood, out, x, None), float(total)) < 1e-10
    assert closeness(likelihood(out).log_prob(x), float(total)) < 1e-10


DRAWN = [name for name, case in CASES.items() if case.usual]


def density_of(case):
    """The density at the usual numbers."""
    numbers = [mp.mpf(n) for n in (*case.usual, *made(case)[1])]
    return cache(lambda x: mp.exp(case.log_density(numbers, x)))


def moments(case):
    """The mean and variance of that density."""
    expected = partial(reference.expectation, density_of(case), case.support)
    mean = expected(lambda x: x)
    return mean, expected(lambda x: (x - mean) ** 2)


def usual(case):
    """The likelihood of as many equal features as there are points, which a scale per feature is for."""
    with torch.no_grad():
        return made(case)[0](laid_out([(case.usual, 0.0)] * len(case.points)))


@pytest.mark.parametrize("name", DRAWN)
def test_mean_and_variance_are_the_densitys(name):
    case = CASES[name]
    d, (mean, variance) = usual(case), moments(case)
    assert abs(reference.expectation(density_of(case), case.support) - 1) < 1e-9
    assert closeness(d.mean, mean) < 1e-7
    assert closeness(d.variance, variance, least=1e-3) < 1e-7


@pytest.mark.parametrize("name", DRAWN)
def test_samples_lie_below_a_threshold_as_often_as_the_density_says(name):
    """At three thresholds; samples moved by a fifth of a standard deviation are seen (power), where they are many."""
    case = CASES[name]
    density, (mean, variance) = density_of(case), moments(case)
    x = usual(case).sample((20_000 // len(case.points),)).flatten()
    thresholds = [mean + shift * variance**0.5 for shift in (-0.8, 0.05, 0.7)]
    below = {t: reference.expectation(density, up_to(case.support, t)) for t in thresholds}

    def worst(samples):
        seen = [(p, (samples <= t).double().mean().item()) for t, p in below.items() if 0.01 < p < 0.99]
        return max(abs(share - p) / (p * (1 - p) / len(samples)) ** 0.5 for p, share in seen)

    assert worst(x) < 5
    assert isinstance(case.support, list) or worst(x + 0.2 * variance**0.5) > 5, "power"


def up_to(support, threshold):
    """The part of a support that lies below a threshold."""
    if isinstance(support, list):
        return [x for x in support if x <= threshold]
    return (*[x for x in support if x < threshold], threshold)


# --- Blocks ---

BLOCKS = ["Normal, learned scale", "Bernoulli", "Categorical", "DiscretizedLogisticMixture", "NegativeBinomial"]
BLOCKS += ["ZeroInflated, NegativeBinomial", "Hurdle, Poisson"]
COLUMNS = [2, 1, 2, 3, 1, 2, 2]


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_their_parts_side_by_side(masked):
    cases = [CASES[name] for name in BLOCKS]
    points = [case.points[:n] for case, n in zip(cases, COLUMNS, strict=True)]
    blocks = [(case.make, n) for case, n in zip(cases, COLUMNS, strict=True)]
    likelihood = likelihoods.Blocks(nn.Identity(), blocks).double()
    likelihood.blocks[0].log_scale.data.fill_(0.4)
    assert likelihoods.Blocks.outputs(sum(COLUMNS), blocks=blocks) == likelihood.net_outputs
    seen = (
        torch.tensor([[True, False, True, False, True, True, False, True, True, True, False, True, True]])
        if masked
        else None
    )
    kept = [True] * sum(COLUMNS) if seen is None else seen[0].tolist()
    x = torch.tensor([[x for block in points for _, x in block]], dtype=torch.float64)
    out = torch.cat([laid_out(block) for block in points])[None].requires_grad_()
    logs = site(likelihood, out, x, seen)
    gradient, of_scale = torch.autograd.grad(logs.sum(), [out, likelihood.blocks[0].log_scale])
    total, slopes, scale_slope, flags = 0, [], 0, iter(kept)
    for case, block in zip(cases, points, strict=True):
        mine = []
        for numbers, value in block:
            every, seen_here = [*numbers, *([0.4] if case.scaled else [])], next(flags)
            total += seen_here * case.log_density([mp.mpf(n) for n in every], value)
            slope = [seen_here * s for s in reference.gradient(case.log_density, every, value)]
            scale_slope += slope.pop() if case.scaled else 0
            mine.append(slope)
        slopes.append(torch.tensor(mine, dtype=torch.float64).T.flatten())
    assert closeness(logs, float(total)) < 1e-10
    assert closeness(gradient, torch.cat(slopes)[None]) < 1e-10
    assert closeness(of_scale, scale_slope) < 1e-10


def test_the_mean_variance_and_samples_of_blocks_stand_side_by_side():
    cases = [CASES[name] for name in BLOCKS]
    blocks = [(case.make, n) for case, n in zip(cases, COLUMNS, strict=True)]
    likelihood = likelihoods.Blocks(nn.Identity(), blocks).double()
    likelihood.blocks[0].log_scale.data.fill_(0.4)
    with torch.no_grad():
        d = likelihood(torch.cat([laid_out([(case.usual, 0.0)] * n) for case, n in zip(cases, COLUMNS, strict=True)]))
    each = [moments(case) for case, n in zip(cases, COLUMNS, strict=True) for _ in range(n)]
    mean, variance = torch.tensor(each, dtype=torch.float64).T
    assert closeness(d.mean, mean) < 1e-7
    assert closeness(d.variance, variance) < 1e-7
    x = d.sample((5000,))
    assert ((x.mean(0) - mean).abs() < 5 * (variance / len(x)).sqrt()).all()


COVERED = {name.split(",")[0] for name in CASES} | {"Blocks"}
