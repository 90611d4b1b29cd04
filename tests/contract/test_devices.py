"""Every part, estimator and method gives on a GPU what it gives on the CPU; the same tests are rehearsed on the CPU."""

from functools import partial
from itertools import cycle

import pyro
import pytest
import torch
from helpers.engine_checks import BATCH, BOUNDS, ROWS, adam, apart, both, data_of, estimators, parts_of, vae_of
from helpers.members import ESTIMATORS, FEATURES, LATENTS, LIKELIHOODS, OBJECTIVES, POSTERIORS, PRIORS
from pyro import poutine

import pyro_vae as pv
from pyro_vae.core.standardize import Standardize
from pyro_vae.evidence.estimate import METHODS

ONE_BY_ONE = [
    (kind, name)
    for kind, table in (("prior", PRIORS), ("likelihood", LIKELIHOODS), ("posterior", POSTERIORS))
    for name in table
]
TRIPLES = list(zip(cycle(PRIORS), LIKELIHOODS, cycle(POSTERIORS), strict=False))
AVERAGED = {"AnalyticKL": ESTIMATORS["AnalyticKL"], **OBJECTIVES}
"""Estimators whose value is random where the posterior is exact."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)


def of_given_latents(vae, x, z):
    """log p(x, z) and log q(z | x), and the gradient of their difference."""
    pyro.clear_param_store()
    sums = []
    for program in (vae.model, vae.guide):
        trace = poutine.trace(poutine.condition(program, {"z": z})).get_trace(x)
        sums.append(trace.log_prob_sum())
    parameters = [p for p in vae.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sums[0] - sums[1], parameters, materialize_grads=True)
    return [value.detach().cpu() for value in (*sums, *gradients)]


@pytest.mark.parametrize(("kind", "name"), ONE_BY_ONE)
def test_densities_and_gradients_are_those_of_the_cpu(kind, name, device):
    x = data_of(name if kind == "likelihood" else "Normal")
    z = vae_of(**{kind: name}).encoder(x).sample()
    expected = of_given_latents(vae_of(**{kind: name}), x, z)
    found = of_given_latents(vae_of(**{kind: name}).to(device), x.to(device), z.to(device))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    shifted = of_given_latents(vae_of(**{kind: name}), x, z + 1e-6)
    assert (shifted[0] - expected[0]).abs() > 1e-9, "power: the densities see a change of 1e-6"


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_standardizing_vae_is_the_same_on_both(name, device):
    vae, moved = (standardizing(name) for _ in range(2))
    torch.manual_seed(5)
    x = vae.decoder(torch.randn(ROWS, LATENTS).double()).sample()
    z = vae.encoder(x).sample()
    expected, found = of_given_latents(vae, x, z), of_given_latents(moved.to(device), x.to(device), z.to(device))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def standardizing(likelihood):
    vae = vae_of(likelihood=likelihood)
    units = Standardize(torch.full((FEATURES,), 1e3).double(), torch.full((FEATURES,), 10.0).double())
    return pv.VAE(prior=vae.prior, decoder=vae.decoder, encoder=vae.encoder, standardize=units)


def exact_model():
    weight = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pv.exact.LinearGaussian(weight, torch.arange(5).double(), 0.5)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in AVERAGED])
def test_every_estimator_is_exact_where_the_posterior_is(name, device):
    model = exact_model()
    x = model.sample(7)
    vae, estimator = model.as_vae().to(device), ESTIMATORS[name]()
    loss = float(estimator.loss(vae.model, vae.guide, x.to(device), 7))
    assert loss == pytest.approx(-model.log_marginal(x).sum().item(), rel=1e-9)


@pytest.mark.cuda
@pytest.mark.parametrize("name", AVERAGED)
def test_every_objective_has_the_mean_of_the_cpu(name, cuda):
    """Over 300 draws, 5 standard errors; a beta that is off by 5 % is seen."""
    model = exact_model()
    x = model.sample(40)
    means = []
    for where in ("cpu", cuda):
        torch.manual_seed(0 if where == "cpu" else 1)
        vae, estimator = model.as_vae(diagonal=True).to(where), AVERAGED[name]()
        losses = torch.tensor([float(estimator.loss(vae.model, vae.guide, x.to(where), 40)) for _ in range(300)])
        means.append((losses.mean(), losses.std() / 300**0.5))
    (theirs, first), (ours, second) = means
    error = (first**2 + second**2).sqrt()
    assert abs(theirs - ours) < 5 * error
    assert 5 * error < 0.02 * theirs.abs(), "power"


@pytest.mark.parametrize("method", METHODS)
def test_every_evidence_covers_the_truth(method, device):
    model = exact_model()
    x = model.sample(20)
    found = pv.log_evidence(model.as_vae(diagonal=True).to(device), x, method=method, num_particles=50)
    if method == "bdmc":  # of data that it draws itself
        x = torch.as_tensor(found.x.values)
    for name in ("lower", "upper") if method == "bdmc" else ("log_evidence",):
        assert float((found[name] - model.log_marginal(x).numpy()).mean()) == pytest.approx(0.0, abs=0.05)
        assert abs(float((found[name] - model.log_marginal(x + 1).numpy()).mean())) > 0.5, "power: the data matter"


@pytest.mark.cuda
@pytest.mark.parametrize("name", estimators())
def test_every_estimator_trains_in_a_cuda_graph_as_uncompiled(name, cuda):
    assert_captured_and_the_same(partial(vae_of), data_of(), estimators()[name], cuda)


@pytest.mark.cuda
@pytest.mark.parametrize(("prior", "likelihood", "posterior"), TRIPLES)
def test_every_part_trains_in_a_cuda_graph_as_uncompiled(prior, likelihood, posterior, cuda):
    assert_captured_and_the_same(
        partial(vae_of, prior, likelihood, posterior), data_of(likelihood), pv.elbo.Trace_ELBO, cuda
    )


def assert_captured_and_the_same(make, x, loss, cuda):
    """A graph takes the steps after its warm-up, and the parameters come out as without it."""
    x = x.to(cuda)
    pair = both(
        lambda: parts_of(make().to(cuda)), lambda step: (x.roll(step, 0)[:BATCH], ROWS),
        optim=adam, loss=loss, backend="inductor",
    )  # fmt: skip
    graphs = [graph for replay in pair[1][2]._replays._made.values() for graph in replay._graphs]
    assert graphs, "it was captured"
    assert apart(pair[0][1], pair[1][1]) < BOUNDS[torch.float64]
