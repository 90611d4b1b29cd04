"""The error of each member's log-density in single precision, over the whole range of its numbers, against 30 digits.

A subject is a member with settings: what the library computes of numbers and values that single precision holds, what
it should, and the points where both are compared.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import zuko
from mpmath import mp, mpf
from torch import Tensor, nn

import pyro_vae as pv
from helpers import reference_likelihoods as reference

BOUND = 1e-3
"""Nats, or one part in a million of more than 1,000 nats; of a gradient, relative."""

Point = tuple[tuple[float, ...], tuple[float, ...]]
"""Numbers of a network and the values of an event."""


@dataclass(frozen=True)
class Subject:
    """A member with settings.

    Args:
        density: from numbers ``(points, k)`` and values ``(points, event)`` to the log-density and the gradient by
            numbers and, for a latent, by its value.
        truth: the same log-density of one point, to 30 digits; without one the member itself in double precision.
        points: where they are compared.
        range: these points, in words.
        usual: how many points from the front are of ordinary size; the error of bfloat16 is that at these.
    """

    density: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    truth: Callable[[Sequence, Sequence], mpf] | None
    points: list[Point]
    range: str
    usual: int = 2


@dataclass(frozen=True)
class Figures:
    """Largest errors: of the log-density, nats; of its gradient, relative; of the log-density with bfloat16, nats."""

    value: float
    gradient: float
    bf16: float


def single(value: float) -> float:
    """The nearest number of single precision."""
    return torch.tensor(value, dtype=torch.float32).item()


# --- What the library computes ---


def slopes(log_prob: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.autograd.grad(log_prob.sum(), leaves, materialize_grads=True, allow_unused=True)
    return log_prob.detach(), torch.cat([g.flatten(1) for g in found], 1)


def of_network(make: Callable[[nn.Module], nn.Module], numbers: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A likelihood whose network is the identity."""
    leaf = numbers.detach().requires_grad_()
    return slopes(make(nn.Identity())(leaf).log_prob(x), leaf)


def scaled(make: Callable[..., nn.Module], numbers: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A likelihood of a location and a learned scale."""
    loc, likelihood = numbers[:, :1].detach().requires_grad_(), make(nn.Identity(), learn_scale=True)
    likelihood.log_scale = nn.Parameter(numbers[:, 1:].detach().clone().to(x.dtype))
    return slopes(likelihood(loc).log_prob(x), loc, likelihood.log_scale)


def posterior(make: Callable[[nn.Module], nn.Module], numbers: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    leaf, z = numbers.detach().requires_grad_(), z.detach().requires_grad_()
    q = make(nn.Identity())
    return slopes((q.distribution(leaf) if isinstance(q, pv.posteriors.Refined) else q(leaf)).log_prob(z), leaf, z)


def prior(make: Callable[[], nn.Module], split: dict[str, tuple[int, ...]], numbers: Tensor, z: Tensor):
    """A prior whose parameters are given for each point, by name and shape."""
    p, z = make().to(z.dtype), z.detach().requires_grad_()
    shares = numbers.to(z.dtype).split([math.prod(shape) for shape in split.values()], 1)
    for (name, shape), share in zip(split.items(), shares, strict=True):
        setattr(p, name, nn.Parameter(share.reshape(-1, *shape).detach().clone()))
    return slopes(p().log_prob(z), *(getattr(p, name) for name in split), z)


def vamp(numbers: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A VampPrior of two pseudo-inputs, which the encoder takes for μ and log σ, one point at a time."""
    found = []
    for row, at in zip(numbers, z, strict=True):
        p = pv.priors.VampPrior(torch.zeros(2, 2), components=2)
        p._encoder = (pv.posteriors.DiagNormal(nn.Identity()),)
        p.pseudo_inputs = nn.Parameter(row.reshape(2, 2).detach().clone().to(z.dtype))
        at = at.detach().requires_grad_()
        log_prob = p().log_prob(at)
        gradient = torch.autograd.grad(log_prob, [p.pseudo_inputs, at])
        found.append((log_prob.detach()[None], torch.cat([g.flatten() for g in gradient])[None]))
    return torch.cat([one for one, _ in found]), torch.cat([g for _, g in found])


def context_normal(numbers: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    leaf, z = numbers.detach().requires_grad_(), z.detach().requires_grad_()
    return slopes(pv.priors.ContextNormal(nn.Identity())(leaf).log_prob(z), leaf, z)


def flow(make: Callable[[], nn.Module], numbers: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A flow of fixed weights; the numbers are those that it is given, if it is given some."""
    torch.manual_seed(0)
    part, leaf, z = make().to(z.dtype), numbers.detach().requires_grad_(), z.detach().requires_grad_()
    d = part(leaf) if isinstance(part, pv.posteriors.Flow) else part()
    return slopes(d.log_prob(z), leaf, z)


# --- What it should compute ---


def first_value(log_density: Callable, numbers: Sequence, x: Sequence) -> mpf:
    return log_density(numbers, x[0])


def mixture(numbers: Sequence, z: Sequence) -> mpf:
    """Of two normals: their logits, locations and log-scales."""
    parts = [numbers[i] + reference.normal((numbers[2 + i], numbers[4 + i]), z[0]) for i in (0, 1)]
    return mp.log(sum(map(mp.exp, parts))) - mp.log(mp.exp(numbers[0]) + mp.exp(numbers[1]))


def vamp_density(numbers: Sequence, z: Sequence) -> mpf:
    """Numbers (μ, log σ) of each pseudo-input."""
    return mixture((0, 0, numbers[0], numbers[2], numbers[1], numbers[3]), z)


def correlated(factor: Callable[[Sequence], mp.matrix], numbers: Sequence, z: Sequence) -> mpf:
    """N(z | μ, Σ) in two dimensions, Σ made of the numbers."""
    with mp.workdps(80):
        sigma = factor(numbers)
        det = sigma[0, 0] * sigma[1, 1] - sigma[0, 1] ** 2
        a, b = z[0] - numbers[0], z[1] - numbers[1]
        square = (sigma[1, 1] * a**2 - 2 * sigma[0, 1] * a * b + sigma[0, 0] * b**2) / det
        return -square / 2 - mp.log(det) / 2 - mp.log(2 * mp.pi)


def from_cholesky(numbers: Sequence) -> mp.matrix:
    a, b, c = mp.exp(numbers[2]), mp.exp(numbers[3]), numbers[4]
    return mp.matrix([[a * a, a * c], [a * c, b * b + c * c]])


def from_low_rank(numbers: Sequence) -> mp.matrix:
    a, b, v, w = mp.exp(2 * numbers[2]), mp.exp(2 * numbers[3]), numbers[4], numbers[5]
    return mp.matrix([[a + v * v, v * w], [v * w, b + w * w]])


def blocks(numbers: Sequence, x: Sequence) -> mpf:
    return reference.bernoulli(numbers[:1], x[0]) + reference.poisson(numbers[1:], x[1])


# --- Where they are compared ---


def spread(locs: Sequence[float], log_scales: Sequence[float], quantiles: Sequence[float]) -> list[Point]:
    """(location, log-scale) and a value so many scales from the location."""
    every = itertools.product(locs, log_scales, quantiles)
    return [((single(loc), single(s)), (single(loc + math.exp(s) * q),)) for loc, s, q in every]


def exact(points: list[Point]) -> list[Point]:
    """The same points in numbers of single precision."""
    return [(tuple(map(single, numbers)), tuple(map(single, values))) for numbers, values in points]


USUAL = [((0.3, -0.7), (0.9,)), ((-1.7, 0.4), (2.1,))]
LOG_SCALES = (-13.8, -4.0, 0.3, 5.0, 13.8)
LOCATED = exact(USUAL) + spread((0.0, -1.7, 1e3), LOG_SCALES, (0.4, -2.5, 30.0))
SCALES = "scales 1e-6 to 1e6, up to 30 scales from the location"


def real(member: str, log_density: Callable, **settings) -> Subject:
    make = partial(getattr(pv.likelihoods, member), **settings)
    return Subject(partial(scaled, make), partial(first_value, log_density), LOCATED, SCALES)


def levels(make: Callable, log_density: Callable, points: list[Point], words: str) -> Subject:
    return Subject(partial(of_network, make), partial(first_value, log_density), points, words)


def counted(numbers: Sequence[float], mean: float, sd: float, most: float) -> list[Point]:
    """Counts at the ends, and -3, ½ and 4 standard deviations from the mean."""
    counts = {0.0, 1.0, min(5.0, most), *(float(round(mean + k * sd)) for k in (-3, 0.5, 4))}
    kept = sorted({single(x) for x in counts if 0 <= x <= most and single(x) <= most})
    return [(tuple(map(single, numbers)), (x,)) for x in kept]


def binomial(n: int) -> Subject:
    points = [((single(-0.7),), (single(n // 3),)), ((single(0.4),), (single(n // 2),))]
    for logit in (-18.0, -7.3, -2.2, 0.0, 5.1, 18.0):
        p = 1 / (1 + math.exp(-logit))
        points += counted([logit], n * p, math.sqrt(n * p * (1 - p)), n)
        points.append(((single(logit),), (float(n),)))
    density, truth = partial(pv.likelihoods.Binomial, total_count=n), partial(reference.binomial, total_count=n)
    return levels(density, truth, points, f"{n:,} trial{'s' * (n > 1)}, logits ±18")


def poisson() -> list[Point]:
    usual = counted([1.7], 5.5, 2.3, 1e9)[1:3]
    rates = (-80.0, -20.0, -3.1, 0.2, 2.3, 7.1, 13.8155, 18.42, 19.99, 20.5)
    return usual + [p for r in rates for p in counted([r], math.exp(r), math.exp(r / 2), 4.8e8)]


def negative_binomial() -> list[Point]:
    points = counted([0.6, 0.9], 4.5, 3.6, 1e9)[1:3]
    for k, mean in itertools.product((-19.9, -10.0, -1.1, 0.3, 3.3, 10.2, 15.0, 19.9), (1e-3, 1.3, 1.1e3, 1e8)):
        logit = math.log(mean) - k
        if logit <= 20:
            points += counted([logit, k], mean, math.sqrt(mean * (1 + math.exp(logit))), 4.8e8)
    return points


def with_zeros(member: Callable, log_density: Callable, of_counts: Subject) -> Subject:
    """Counts at the points of another subject, at 0 and at 1, beside logits of a zero."""
    usual = [((single(logit), *n), x) for logit, (n, x) in zip((0.4, -1.7), of_counts.points[:2], strict=True)]
    values = {(numbers, value): None for numbers, (x,) in of_counts.points[2:] for value in (0.0, 1.0, x)}
    logits = itertools.cycle(map(single, (0.3, -30.0, 5.0, -2.0, 30.0, 80.0, -80.0)))
    points = [((logit, *numbers), (x,)) for logit, (numbers, x) in zip(logits, values, strict=False)]
    counts = of_counts.density.args[0]
    truth = partial(first_value, partial(log_density, counts=of_counts.truth.args[0]))
    words = f"logits of a zero ±80, {of_counts.range}"
    return Subject(partial(of_network, partial(member, counts=counts)), truth, usual + points, words)


def discretized(levels: int) -> list[Point]:
    last = levels - 1
    points = [((0.4, -0.7, 0.1, -0.47, s, -2.1), (single(k / last),)) for s in (-1.3, -2.0) for k in (0, last // 3)]
    least = -6.9 if levels == 256 else -12.4
    for s, m, k in itertools.product((least, -3.0, 0.5, 6.9), (-0.62, 0.31), (0, 1, last // 4, last - 1, last)):
        points.append(((0.4, -0.7, m, -0.47, s, -2.1), (single(k / last),)))
    return [(tuple(map(single, numbers)), x) for numbers, x in points]


def logistic(levels: int) -> Subject:
    make = partial(pv.likelihoods.DiscretizedLogisticMixture, components=2, levels=levels)
    density = partial(reference.logistic_mixture, levels=levels)
    return Subject(
        partial(of_network, make),
        partial(first_value, density),
        discretized(levels),
        f"{levels:,} levels, log s from its minimum to 6.9",
    )


SURE = [single(sign * logit) for logit in (1.3, 0.7, 1e-3, 15.0, 30.0, 80.0) for sign in (1, -1)]
NEARLY_FLAT = [0.0, 1e-6, 0.01, 0.6, 0.999, 1.001, 4.0, 30.0, 1e3, 1e6]
GREYS = [0.2, 0.9, 0.0, 1e-7, 1 - 6e-8, 1.0]
FOUR = [(0.2, -1.0, 3.0, 0.7), (1.3, 0.1, -0.4, 0.0), (30.0, -30.0, 0.0, 1.0), (80.0, 0.0, 0.0, 0.5), (1e3, 0, -1e3, 5)]
MIXED = [
    ((0.4, -0.7, loc, -1.1, s, 0.3), (single(loc + math.exp(s) * q),))
    for s in sorted(LOG_SCALES, key=abs)
    for loc in (0.3, 200.0)
    for q in (0.4, -2.5, 30.0)
]
CORRELATED = [
    ((0.3, -1.2, a, b, c), (single(0.3 + math.exp(a) * u), single(-1.2 + c * u + math.exp(b) * v)))
    for a, b, c in [(0.1, -0.3, 0.5), (-0.4, 0.2, -0.9), (-13.8, 0.4, 0.0), (0.2, -6.9, 1.3), (6.9, -6.9, 0.7),
                    (-13.8, 13.8, -2.0), (13.8, -13.8, 1e-3), (13.8, 13.8, 2.0)]
    for u, v in [(0.4, -1.3), (-2.2, 0.6)]
]  # fmt: skip
LOW_RANK = [
    ((0.3, -1.2, a, b, 0.8 * w, -1.7 * w), (single(0.3 + 0.8 * w * u), single(-1.2 - 1.7 * w * u + 0.3 * math.exp(b))))
    for a, b, w in [(0.1, -0.3, 1.0), (-0.4, 0.2, 0.5), (-6.9, -6.0, 1.0), (-13.8, -13.0, 1e-3), (-6.9, 3.0, 1.0),
                       (13.8, 13.0, 1e6), (-13.8, -13.8, 1.0)]
    for u in (0.4, -1.3)
]  # fmt: skip


RELAXED = [
    (logits, ratios)
    for logits in [(0.3, -1.2, 0.5), (2.0, 0.1, -0.7), (12.0, -9.0, 3.0), (-80.0, 40.0, 0.0)]
    for ratios in [(0.4, -1.1), (3.0, 2.0), (-15.0, 9.0), (160.0, -80.0), (-1e3, 1e3)]
]
RATIOS = "τ = 0.5, 3 categories, logits ±80, log-ratios ±1,000"


def concrete(numbers: Sequence, z: Sequence) -> mpf:
    """The Concrete density of three categories at τ = ½, of log-ratios."""
    rest = [logit - y / 2 for logit, y in zip(numbers, (*z, mpf(0)), strict=True)]
    return mp.log(2) + 2 * mp.log(mpf(1) / 2) + sum(rest) - 3 * mp.log(sum(map(mp.exp, rest)))


def t(df: float) -> Callable:
    return partial(reference.student_t, df=df)


def priors() -> dict[str, Subject]:
    both = {"loc": (1,), "log_scale": (1,)}
    at = [((0.0,), (z,)) for z in (0.5, -1.75, 0.0, 30.0, -1e4)]

    def located(make, log_density):
        return Subject(partial(prior, make, both), partial(first_value, log_density), LOCATED, SCALES)

    def of_z(numbers, z):
        leaf, z = numbers.detach().requires_grad_(), z.detach().requires_grad_()
        return slopes(pv.priors.StandardNormal(1).to(z.dtype)().log_prob(z), leaf, z)

    mixture_of_two = {"logits": (2,), "loc": (2, 1), "log_scale": (2, 1)}
    heavy = {df: partial(pv.priors.StudentT, 1, df=df) for df in (0.5, 5.0, 1e6, 1e9)}
    vamps = [((n[2], n[4], n[3], n[5]), z) for n, z in exact(MIXED)]
    return {
        "StandardNormal": Subject(of_z, lambda _, z: reference.normal((0, 0), z[0]), at, "z from -1e4 to 1e4"),
        "Normal": located(partial(pv.priors.Normal, 1), reference.normal),
        "Laplace": located(partial(pv.priors.Laplace, 1), reference.laplace),
        **{f"StudentT, df={df:g}": located(make, t(df)) for df, make in heavy.items()},
        "GaussianMixture": Subject(
            partial(prior, partial(pv.priors.GaussianMixture, 1, components=2), mixture_of_two), mixture, exact(MIXED),
            SCALES, usual=1,
        ),
        "VampPrior": Subject(vamp, vamp_density, vamps, SCALES, usual=1),
        "ContextNormal": Subject(context_normal, partial(first_value, reference.normal), LOCATED, SCALES),
        "GumbelSoftmax": Subject(
            partial(prior, partial(pv.priors.GumbelSoftmax, 2, categories=3, temperature=0.5), {"logits": (1, 3)}),
            concrete, exact(RELAXED), RATIOS,
        ),
        "Flow": Subject(
            partial(flow, lambda: pv.priors.Flow(zuko.flows.MAF(2, transforms=1, hidden_features=[8]))), None,
            [((0.0,), (0.5, -1.75)), ((0.0,), (4.0, -3.0))], "a MAF at initialization, z from -5 to 5",
        ),
    }  # fmt: skip


def posteriors() -> dict[str, Subject]:
    def maf():
        return pv.posteriors.Flow(zuko.flows.MAF(2, context=1, transforms=1, hidden_features=[8]))

    normal = partial(first_value, reference.normal)
    return {
        "DiagNormal": Subject(partial(posterior, pv.posteriors.DiagNormal), normal, LOCATED, SCALES),
        "FullNormal": Subject(
            partial(posterior, pv.posteriors.FullNormal), partial(correlated, from_cholesky), exact(CORRELATED),
            "L_jj 1e-6 to 1e6",
        ),
        "LowRankNormal": Subject(
            partial(posterior, pv.posteriors.LowRankNormal), partial(correlated, from_low_rank), exact(LOW_RANK),
            "σ 1e-6 to 1e6, W up to 1e6 σ",
        ),
        "GumbelSoftmax": Subject(
            partial(posterior, partial(pv.posteriors.GumbelSoftmax, categories=3, temperature=0.5)), concrete,
            exact(RELAXED), RATIOS,
        ),
        "Flow": Subject(
            partial(flow, maf), None, [((single(0.3),), (0.5, -1.75)), ((-2.0,), (4.0, -3.0))],
            "a MAF at initialization, z from -5 to 5",
        ),
        "Refined": Subject(partial(posterior, pv.posteriors.Refined), normal, LOCATED, f"as for DiagNormal: {SCALES}"),
    }  # fmt: skip


def likelihoods() -> dict[str, Subject]:
    hetero = partial(reference.heteroscedastic, min_scale=1e-3)
    grey = [((single(sign * logit),), (single(x),)) for x in GREYS for logit in NEARLY_FLAT[::-1] for sign in (1, -1)]
    grey.sort(key=lambda point: abs(abs(point[0][0]) - 0.6))
    mixed = [
        ((logit, r), (bit, x)) for logit in (0.7, -15.0) for bit in (0.0, 1.0) for (r,), (x,) in poisson()
    ]  # fmt: skip
    rates = [point for point in poisson() if point[0][0] >= -20]
    rare = levels(pv.likelihoods.Poisson, reference.poisson, rates, "rates 2e-9 to 4.8e8")
    density = pv.likelihoods.NegativeBinomial, reference.negative_binomial
    dispersed, less = (
        levels(*density, points, f"means 1e-3 to 1e8, r 2e-9 to {r}")
        for points, r in (
            (negative_binomial(), "4.4e8"), ([p for p in negative_binomial() if p[0][1] <= 15], "3e6"),
        )
    )  # fmt: skip
    return {
        "Normal": real("Normal", reference.normal),
        "HeteroscedasticNormal": levels(pv.likelihoods.HeteroscedasticNormal, reference.normal, LOCATED, SCALES),
        "HeteroscedasticNormal, min_scale=0.001": levels(
            partial(pv.likelihoods.HeteroscedasticNormal, min_scale=1e-3), hetero, LOCATED, SCALES
        ),
        **{f"StudentT, df={df:g}": real("StudentT", t(df), df=df) for df in (2.5, 4.0, 1e6, 1e9)},
        "Laplace": real("Laplace", reference.laplace),
        "Bernoulli": levels(
            pv.likelihoods.Bernoulli, reference.bernoulli, [((logit,), (x,)) for logit in SURE for x in (0.0, 1.0)],
            "logits ±80",
        ),
        "ContinuousBernoulli": levels(
            pv.likelihoods.ContinuousBernoulli, reference.continuous_bernoulli, grey, "logits ±1e6"
        ),
        "Categorical": levels(
            partial(pv.likelihoods.Categorical, levels=4), reference.categorical,
            exact([(logits, (float(x),)) for logits in FOUR for x in range(4)]), "4 levels, logits ±1,000",
        ),
        **{f"DiscretizedLogisticMixture, levels={n}": logistic(n) for n in (256, 65536)},
        **{f"Binomial, total_count={n:g}": binomial(n) for n in (1, 8, 10**7, 10**8, 10**9)},
        "Poisson": levels(pv.likelihoods.Poisson, reference.poisson, poisson(), "rates and counts to 4.8e8"),
        "NegativeBinomial": dispersed,
        **{f"ZeroInflated, {name}": with_zeros(pv.likelihoods.ZeroInflated, reference.zero_inflated, counts)
           for name, counts in (("Poisson", rare), ("NegativeBinomial", dispersed))},
        **{f"Hurdle, {name}": with_zeros(pv.likelihoods.Hurdle, reference.hurdle, counts)
           for name, counts in (("Poisson", rare), ("NegativeBinomial", less))},
        "Blocks": Subject(
            partial(of_network, partial(pv.likelihoods.Blocks, blocks=[(pv.likelihoods.Bernoulli, 1),
                                                                       (pv.likelihoods.Poisson, 1)])),
            blocks, exact(mixed), "the ranges of its blocks, here Bernoulli and Poisson",
        ),
    }  # fmt: skip


SUBJECTS: dict[str, dict[str, Subject]] = {
    "likelihoods": likelihoods(), "priors": priors(), "posteriors": posteriors()
}  # fmt: skip


# --- The comparison ---


@dataclass
class Truth:
    """Values and gradients of a subject, as double precision holds them."""

    values: Tensor
    gradients: Tensor
    numbers: Tensor = field(repr=False)
    x: Tensor = field(repr=False)


def truth_of(subject: Subject) -> Truth:
    numbers = torch.tensor([n for n, _ in subject.points], dtype=torch.float64)
    x = torch.tensor([v for _, v in subject.points], dtype=torch.float64)
    if subject.truth is None:
        return Truth(*subject.density(numbers, x), numbers, x)
    with mp.workdps(30):
        values = [float(subject.truth([mpf(n) for n in ns], [mpf(v) for v in vs])) for ns, vs in subject.points]
        gradients = [_gradient(subject.truth, ns, vs) for ns, vs in subject.points]
    return Truth(torch.tensor(values, dtype=torch.float64), torch.tensor(gradients, dtype=torch.float64), numbers, x)


def _gradient(log_density: Callable, numbers: Sequence[float], values: Sequence[float]) -> list[float]:
    """By each number, then by each value, which is that of a latent or cut off."""
    size = len(numbers)
    return reference.gradient(lambda every, _: log_density(every[:size], every[size:]), [*numbers, *values], 0.0)


def measure(subject: Subject) -> Figures:
    """The largest errors over the points of a subject."""
    truth = truth_of(subject)
    value, gradient = subject.density(truth.numbers.float(), truth.x.float())
    expected = truth.gradients[:, : gradient.shape[1]]
    coarse, _ = subject.density(truth.numbers.bfloat16().float(), truth.x.float())
    off = (coarse.double() - truth.values).abs()[: subject.usual]
    return Figures(worst(value, truth.values), relative(gradient, expected), off.max().item())


def worst(found: Tensor, truth: Tensor) -> float:
    """The largest error in nats, of more than 1,000 nats in thousandths of these."""
    return ((found.double() - truth).abs() / (truth.abs() / 1e3).clamp(min=1)).max().item()


def relative(found: Tensor, truth: Tensor) -> float:
    """The largest relative error; what is below 1e-30 single precision does not hold."""
    return ((found.double() - truth).abs() / truth.abs().clamp(min=1e-30)).max().item()
