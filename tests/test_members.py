"""The contract that every prior, likelihood and posterior keeps."""

import copy
import inspect

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from checks import z_score
from members import BASES, FEATURES, LATENTS, LIKELIHOODS, POSTERIORS, PRIORS, exported, make
from pyro.distributions.torch_distribution import TorchDistributionMixin
from safetensors.torch import load, save

import pyro_vae as pv

BATCHES = [(), (4,), (2, 4)]
MEMBERS = {**PRIORS, **LIKELIHOODS, **POSTERIORS}


def given(name: str, batch: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    if name in PRIORS:
        return ()
    size = LATENTS if name in LIKELIHOODS else FEATURES
    return (torch.randn(*batch, size, dtype=torch.float64),)


def event_of(name: str) -> tuple[int]:
    return (FEATURES,) if name in LIKELIHOODS else (LATENTS,)


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
    assert d.batch_shape == (() if name in PRIORS else batch)
    assert d.event_shape == event_of(name)
    assert d.sample((7,)).shape == (7, *d.batch_shape, *d.event_shape)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_batch_is_its_rows(name):
    if name in PRIORS:
        pytest.skip("a prior is given nothing")
    member, (rows,) = make(MEMBERS[name]), given(name, (2, 4))
    value = torch.randn(2, 4, *event_of(name), dtype=torch.float64)
    whole = member(rows).log_prob(value)
    for i, j in np.ndindex(2, 4):
        assert abs(member(rows[i, j]).log_prob(value[i, j]) - whole[i, j]) < 1e-12


@pytest.mark.parametrize("name", MEMBERS)
def test_the_density_integrates_to_one(name):
    """By importance sampling from a wider normal: E[p/r] = 1; a density 3 % off is seen (power, below)."""
    d = make(MEMBERS[name])(*given(name, ()))
    wide = dist.Normal(d.mean, 1.3 * d.stddev).to_event(1)
    x = wide.sample((100_000,))
    ratio = (d.log_prob(x) - wide.log_prob(x)).exp().detach()
    assert abs(z_score(ratio, 1.0)) < 5
    assert abs(z_score(1.03 * ratio, 1.0)) > 5


@pytest.mark.parametrize("name", MEMBERS)
def test_samples_have_the_moments_of_the_density(name):
    """Score identity: E[∇ log p(x)] = 0 for samples of p; samples shifted by 0.05 sd are seen (power)."""
    d = make(MEMBERS[name])(*given(name, ()))
    x = d.sample((50_000,))

    def score(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(d.log_prob(at).sum(), at)[0][:, 0]

    assert abs(z_score(score(x), 0.0)) < 5
    assert abs(z_score(score(x + 0.05 * d.stddev), 0.0)) > 5
    variance = ((x - d.mean) ** 2 / d.variance).detach()[:, 0]
    assert abs(z_score(variance, 1.0)) < 5
    assert abs(z_score(1.05 * variance, 1.0)) > 5


@pytest.mark.parametrize("name", MEMBERS)
def test_a_gradient_reaches_every_parameter(name):
    member = make(MEMBERS[name])
    d = member(*given(name, (4,)))
    parameters = dict(member.named_parameters())
    if not parameters:
        assert name in PRIORS, "only a prior may have nothing to learn"
        return
    total = d.log_prob(torch.randn(4, *event_of(name), dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()))
    assert all(gradient.abs().max() > 0 for gradient in gradients), list(parameters)


@pytest.mark.parametrize("name", MEMBERS)
def test_saved_and_loaded_it_is_the_same(name):
    first, value = make(MEMBERS[name]), torch.randn(4, *event_of(name), dtype=torch.float64)
    torch.manual_seed(1)
    second = MEMBERS[name]().double()
    second.load_state_dict(load(save(first.state_dict())))
    rows = given(name, (4,))
    assert torch.equal(first(*rows).log_prob(value), second(*rows).log_prob(value))
    copied = copy.deepcopy(first).eval()
    assert torch.equal(first(*rows).log_prob(value), copied(*rows).log_prob(value)), "eval = train"


@pytest.mark.parametrize("name", MEMBERS)
def test_its_repr_names_it(name):
    assert name.split(",")[0] in repr(make(MEMBERS[name]))


@pytest.mark.parametrize("name", MEMBERS)
def test_settings_after_the_essential_ones_are_named(name):
    """At most a network or size, and one number, by position."""
    signature = inspect.signature(type(MEMBERS[name]()).__init__)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= 3, signature
