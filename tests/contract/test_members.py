"""The contract that every prior, likelihood and posterior keeps."""

import copy
import inspect

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import z_score
from helpers.members import BASES, DISCRETE, FEATURES, LATENTS, LIKELIHOODS, POSTERIORS, PRIORS, exported, make
from pyro.distributions.torch_distribution import TorchDistributionMixin
from safetensors.torch import load, save

import pyro_vae as pv

BATCHES = [(), (4,), (2, 4)]


def class_of(name: str) -> str:
    """The class, without the kind before it and the settings behind."""
    return name.split(" ", 1)[1].split(",")[0]


def is_prior(name: str) -> bool:
    return name.startswith("prior ")


TABLES = {"prior": PRIORS, "likelihood": LIKELIHOODS, "posterior": POSTERIORS}
MEMBERS = {f"{kind} {name}": make for kind, table in TABLES.items() for name, make in table.items()}
COUNTABLE = [name for name in MEMBERS if name.startswith("likelihood ") and class_of(name) in DISCRETE]
DENSITIES = [name for name in MEMBERS if name not in {*COUNTABLE, "likelihood Blocks"}]
SMOOTH = [name for name in DENSITIES if name != "likelihood ContinuousBernoulli"]


def given(name: str, batch: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    if is_prior(name):
        return ()
    size = LATENTS if name.startswith("likelihood ") else FEATURES
    return (torch.randn(*batch, size, dtype=torch.float64),)


def event_of(name: str) -> tuple[int]:
    return (FEATURES,) if name.startswith("likelihood ") else (LATENTS,)


@pytest.mark.parametrize(
    ("module", "table"),
    [(pv.priors, PRIORS), (pv.likelihoods, LIKELIHOODS), (pv.posteriors, POSTERIORS)],
    ids=["priors", "likelihoods", "posteriors"],
)
def test_the_table_covers_every_exported_member(module, table):
    assert {name.split(",")[0] for name in table} == exported(module) - BASES


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("name", MEMBERS)
def test_shapes(name, batch):
    d = make(MEMBERS[name])(*given(name, batch))
    assert isinstance(d, TorchDistributionMixin)
    assert d.batch_shape == (() if is_prior(name) else batch)
    assert d.event_shape == event_of(name)
    assert d.sample((7,)).shape == (7, *d.batch_shape, *d.event_shape)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_batch_is_its_rows(name):
    if is_prior(name):
        pytest.skip("a prior is given nothing")
    member, (rows,) = make(MEMBERS[name]), given(name, (2, 4))
    value = member(rows).sample()
    whole = member(rows).log_prob(value)
    for i, j in np.ndindex(2, 4):
        assert abs(member(rows[i, j]).log_prob(value[i, j]) - whole[i, j]) < 1e-12


@pytest.mark.parametrize("name", DENSITIES)
def test_the_density_integrates_to_one(name):
    """By importance sampling from a wider law: E[p/r] = 1; a density 3 % off is seen (power, below)."""
    d = make(MEMBERS[name])(*given(name, ()))
    around = d.sample((4000,))
    wide = dist.StudentT(3.0, around.mean(0), 1.2 * around.std(0))  # heavier tails than any member has
    if name not in SMOOTH:
        wide = dist.Uniform(torch.zeros_like(around[0]), 1.0)
    wide = wide.to_event(1)
    x = wide.sample((200_000,))
    ratio = (d.log_prob(x) - wide.log_prob(x)).exp().detach()
    assert abs(z_score(ratio, 1.0)) < 5
    assert abs(z_score(1.03 * ratio, 1.0)) > 5


@pytest.mark.parametrize("name", SMOOTH)
def test_samples_agree_with_the_density(name):
    """Score identity: E[∂ log p(x) / ∂x₁] = 0 for samples of p; samples moved by 0.05 sd are seen (power)."""
    d = make(MEMBERS[name])(*given(name, ()))
    x = d.sample((50_000,))
    moved = x + 0.05 * torch.eye(x.shape[1])[0] * x.std(0)

    def score(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(d.log_prob(at).sum(), at)[0][:, 0]

    assert abs(z_score(score(x), 0.0)) < 5
    assert abs(z_score(score(moved), 0.0)) > 5


@pytest.mark.parametrize("name", [name for name in SMOOTH if class_of(name) != "Flow"])
def test_samples_have_the_moments_they_say(name):
    """Mean and variance; 10 % more variance and a mean moved by 0.05 sd are seen (power). A flow says none."""
    d = make(MEMBERS[name])(*given(name, ()))
    x = d.sample((50_000,))
    standard = ((x - d.mean) / d.variance.sqrt()).detach()[:, 0]
    assert abs(z_score(standard, 0.0)) < 5
    assert abs(z_score(standard, 0.05)) > 5
    assert abs(z_score(standard**2, 1.0)) < 5
    assert abs(z_score(1.1 * standard**2, 1.0)) > 5


def probabilities(d):
    """The values that a feature can take, up to a far quantile, and their probabilities, by feature."""
    base = d.base_dist
    far = torch.arange(int((base.mean + 60 * base.stddev).max()), dtype=torch.float64).unsqueeze(-1)
    values = base.enumerate_support(expand=False) if base.has_enumerate_support else far
    values = values.expand(-1, FEATURES)
    return values, base.log_prob(values).exp().detach()


@pytest.mark.parametrize("name", COUNTABLE)
def test_the_probabilities_sum_to_one_and_have_the_moments(name):
    d = make(MEMBERS[name])(*given(name, ()))
    values, p = probabilities(d)
    assert torch.allclose(p.sum(0), torch.ones_like(p[0]), atol=1e-9, rtol=0)
    mean = (p * values).sum(0)
    assert torch.allclose(d.mean, mean, rtol=1e-8)
    assert torch.allclose(d.variance, (p * (values - mean) ** 2).sum(0), rtol=1e-6)


@pytest.mark.parametrize("name", COUNTABLE)
def test_samples_have_the_probabilities(name):
    """Chi-square, as a z-score; samples of which 3 % are moved to the second value are seen (power)."""
    d, n = make(MEMBERS[name])(*given(name, ())), 50_000
    x = d.sample((n,))
    values, p = probabilities(d)
    moved = torch.where(torch.rand(n, 1, dtype=torch.float64) < 0.03, values[1], x)

    def z(samples, feature):
        expected = n * p[:, feature]
        counts = (samples[:, feature, None] == values[:, feature]).sum(0).double()
        assert counts.sum() == n, "all samples are on the grid"
        common = expected >= 10
        rest = torch.stack([counts[~common].sum(), expected[~common].sum()])
        square = ((counts - expected) ** 2 / expected)[common].sum() + (rest[0] - rest[1]) ** 2 / rest[1].clamp(min=1)
        freedom = common.sum() - 1 + (rest[1] >= 1)
        return ((square - freedom) / (2 * freedom) ** 0.5).item()

    for feature in range(FEATURES):
        assert abs(z(x, feature)) < 5
        assert z(moved, feature) > 5


@pytest.mark.parametrize("name", MEMBERS)
def test_a_gradient_reaches_every_parameter(name):
    member = make(MEMBERS[name])
    d = member(*given(name, (4,)))
    parameters = dict(member.named_parameters())
    if not parameters:
        assert is_prior(name), "only a prior may have nothing to learn"
        return
    total = d.log_prob(d.sample((5,) if is_prior(name) else ())).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients), list(parameters)


@pytest.mark.parametrize("name", MEMBERS)
def test_saved_and_loaded_it_is_the_same(name):
    first, rows = make(MEMBERS[name]), given(name, (4,))
    value = first(*rows).sample((4,) if is_prior(name) else ())
    torch.manual_seed(1)
    second = MEMBERS[name]().double()
    second.load_state_dict(load(save(first.state_dict())))
    assert torch.equal(first(*rows).log_prob(value), second(*rows).log_prob(value))
    copied = copy.deepcopy(first).eval()
    assert torch.equal(first(*rows).log_prob(value), copied(*rows).log_prob(value)), "eval = train"


@pytest.mark.parametrize("name", MEMBERS)
def test_its_repr_names_it(name):
    assert class_of(name) in repr(make(MEMBERS[name]))


@pytest.mark.parametrize("name", MEMBERS)
def test_settings_after_the_essential_ones_are_named(name):
    """At most a network or size, and one number, by position."""
    signature = inspect.signature(type(MEMBERS[name]()).__init__)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= 3, signature
