"""Posteriors: their layouts and settings, flows in plates, and refinement against the linear-Gaussian oracle."""

import copy
import gc
import math

import pyro.distributions as dist
import pytest
import torch
import zuko
from helpers.checks import linear_gaussian, small_vae, z_score
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.elbo import AnalyticKL, HandDerivedELBO, log_weights
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.posteriors import DiagNormal, Flow, FullNormal, LowRankNormal, Refined
from pyro_vae.posteriors.refined import _orthogonal_pairs


class Given(nn.Module):
    """A network that gives the same numbers for every row."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor(numbers, dtype=torch.float64))

    def forward(self, x):
        return self.numbers.expand(*x.shape[:-1], -1)


def rows(*batch):
    return torch.randn(*batch, 6, dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    return bool(((a - b).abs() <= tolerance).all())


def test_the_full_normal_reads_mean_diagonal_then_rows_below_it():
    q = FullNormal(Given(1, 2, 3, 0.1, 0.2, 0.3, 4, 5, 6))(rows(2))
    e = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).exp().tolist()
    factor = torch.tensor([[e[0], 0, 0], [4, e[1], 0], [5, 6, e[2]]], dtype=torch.float64)
    assert q.mean[1].tolist() == [1, 2, 3]
    assert torch.equal(q.scale_tril[1], factor)
    assert FullNormal(Given(1, 0.1))(rows(2)).event_shape == (1,)


def test_the_low_rank_normal_reads_mean_log_scale_then_rows_of_the_factor():
    q = LowRankNormal(Given(1, 2, 0.1, 0.2, 3, 4, 5, 6, 7, 8), 3)(rows(2))
    factor = torch.tensor([[3, 4, 5], [6, 7, 8]], dtype=torch.float64)
    covariance = factor @ factor.T + torch.tensor([0.2, 0.4], dtype=torch.float64).exp().diag()
    assert q.mean[1].tolist() == [1, 2]
    assert close(q.covariance_matrix[1], covariance)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_outputs_is_what_the_network_must_give(size):
    for kind in (DiagNormal, FullNormal, LowRankNormal, lambda net: LowRankNormal(net, 2)):
        rank = {"rank": 2} if not isinstance(kind, type) else {}
        count = (kind if isinstance(kind, type) else LowRankNormal).outputs(size, **rank)
        assert kind(nn.Linear(6, count))(torch.zeros(3, 6)).event_shape == (size,)
    assert Refined.outputs(size) == DiagNormal.outputs(size)


@pytest.mark.parametrize("kind", [FullNormal, LowRankNormal, lambda net: LowRankNormal(net, 4)])
def test_another_number_of_outputs_is_refused(kind):
    with pytest.raises(ModelError, match="gives 4 numbers; a"):
        kind(nn.Linear(6, 4))(torch.zeros(3, 6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankNormal(nn.Linear(6, 4), 0), "rank is 0"),
        (lambda: Refined(nn.Linear(6, 4), steps=0), "steps is 0"),
        (lambda: Refined(nn.Linear(6, 4), rate=0.0), r"rate is 0\.0"),
        (lambda: Refined(nn.Linear(6, 4), rate=float("inf")), "rate is inf"),
        (lambda: Refined(nn.Linear(6, 4), particles=3), "particles is 3"),
        (lambda: Refined(nn.Linear(6, 4), particles=0), "particles is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(SettingsError, match=message):
        make()


@pytest.mark.parametrize("kind", [DiagNormal, FullNormal, LowRankNormal])
def test_a_context_stands_behind_the_features(kind):
    member = kind(nn.Linear(6 + 2, kind.outputs(3))).double()
    x, context = rows(4), rows(4)[:, :2]
    q, whole = member(x, context), kind(member.net)(torch.cat([x, context], -1))
    z = torch.randn(4, 3).double()
    assert torch.equal(q.log_prob(z), whole.log_prob(z))
    assert not torch.equal(q.log_prob(z), member(x, context + 1).log_prob(z)), "power"


@pytest.mark.parametrize("kind", [FullNormal, LowRankNormal])
def test_the_exact_posterior_is_in_the_family_and_reaches_the_evidence(kind):
    """Two latents, of which one direction is W: rank 1 and the diagonal hold any 2 × 2 covariance."""
    model = linear_gaussian(features=6)
    x, exact = model.sample(3), model.posterior(model.bias[None])
    covariance, to_mean = exact.covariance_matrix[0], model._posterior_map()
    if kind is FullNormal:
        factor = torch.linalg.cholesky(covariance)
        shape = [*factor.diagonal().log(), factor[1, 0]]
    else:
        a = covariance[0, 1].abs().sqrt()
        w = torch.stack([a, a * covariance[0, 1].sign()])
        ratio = (covariance[0, 0] / covariance[1, 1]) ** 0.25
        w = w * torch.stack([ratio, 1 / ratio])
        shape = [*(0.5 * (covariance.diagonal() - w**2).log()), *w]
    net = nn.Linear(6, kind.outputs(2)).double()
    with torch.no_grad():
        net.weight.zero_()[:2] = to_mean
        net.bias.copy_(torch.stack([*(-to_mean @ model.bias), *shape]))
    vae = model.as_vae()
    vae.encoder = kind(net)
    assert close(log_weights(vae.model, vae.guide, x, num_particles=5), model.log_marginal(x), 1e-10)
    assert close(model.elbo(x, vae.encoder(x)), model.log_marginal(x), 1e-10)


def flow_vae(flow=None):
    vae = small_vae()
    torch.manual_seed(0)
    flow = zuko.flows.MAF(3, context=4, transforms=2, hidden_features=[8]) if flow is None else flow
    vae.encoder = Flow(flow, net=pv.nn.mlp(6, [8], 4)).double()
    return vae


FLOWS = {
    "MAF": lambda: zuko.flows.MAF(3, context=4, transforms=2, hidden_features=[8]),
    "NICE": lambda: zuko.flows.NICE(3, context=4, transforms=2, hidden_features=[8]),
    "NSF": lambda: zuko.flows.NSF(3, context=4, transforms=2, hidden_features=[8]),
}


@pytest.mark.parametrize("batch", [(), (4,), (2, 4)], ids=str)
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_has_samples_densities_and_a_mean_of_every_batch_shape(name, batch):
    q = flow_vae(FLOWS[name]()).encoder(rows(*batch))
    z = q.rsample((7,))
    assert q.has_rsample
    assert z.requires_grad
    assert z.shape == (7, *batch, 3)
    assert q.log_prob(z).shape == (7, *batch)
    assert q.mean.shape == (*batch, 3)
    wider = q.expand((5, *batch))
    z = wider()
    assert z.shape == (5, *batch, 3)
    assert wider.batch_shape == (5, *batch)
    assert close(wider.log_prob(z), q.log_prob(z), 1e-10)
    assert len({z[i].sum().item() for i in range(5)}) == 5, "each its own draw"


def test_a_flows_mean_is_that_of_its_samples_and_leaves_the_generator_alone():
    q = flow_vae().encoder(rows())
    state = torch.get_rng_state()
    mean = q.mean
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(mean, q.mean)
    x = q.sample((200_000,))
    standard_error = x.std(0) / 256**0.5
    assert ((mean - x.mean(0)).abs() < 5 * standard_error).all()
    assert ((mean + x.std(0) - x.mean(0)).abs() > 5 * standard_error).all(), "power: a mean off by one sd"


def test_a_flow_keeps_no_samples():
    q = flow_vae().encoder(rows(4))
    z = [q.log_prob(q()) for _ in range(3)]
    assert len(z) == 3
    assert not q.cache


@pytest.mark.parametrize("path_gradient", [False, True])
def test_a_flow_has_log_weights_and_the_path_gradient_is_that_of_the_detached_score(path_gradient):
    """Σ (log p - log q) less the part of log q that flows through φ at a fixed sample."""
    vae, x = flow_vae(), rows(5)
    phi = list(vae.guide.parameters())
    torch.manual_seed(1)
    weights = log_weights(vae.model, vae.guide, x, num_particles=7, path_gradient=path_gradient)
    assert weights.shape == (7, 5)
    found = torch.autograd.grad(weights.sum(), phi)
    torch.manual_seed(1)
    q = vae.encoder(x)
    wide = q.expand((7, 5))
    z = wide.rsample()
    frozen = copy.deepcopy(vae.encoder).requires_grad_(False)(x) if path_gradient else q
    by_hand = (vae.prior().log_prob(z) + vae.decoder(z).log_prob(x) - frozen.log_prob(z)).sum()
    truth = torch.autograd.grad(by_hand, phi)
    assert close(weights.sum(), by_hand, 1e-9)
    assert all(close(a, b, 1e-9) for a, b in zip(found, truth, strict=True))


def test_a_flow_estimates_a_bound_of_the_evidence_and_trains():
    model = linear_gaussian(features=6, latents=3)
    vae, x = model.as_vae(), model.sample(64)
    vae.encoder = flow_vae().encoder
    with torch.no_grad():
        weights = log_weights(vae.model, vae.guide, x[:1], num_particles=20_000)[:, 0]
    evidence = model.log_marginal(x[:1])
    ratio = (weights - evidence).exp()
    assert weights.mean() < evidence
    assert abs(z_score(ratio, 1.0)) < 5, "importance weights are unbiased for the evidence"
    before = log_weights(vae.model, vae.guide, x, num_particles=50).mean().item()
    pv.fit(vae, x, epochs=30, batch_size=32, device="cpu", progress=False)
    assert log_weights(vae.model, vae.guide, x, num_particles=50).mean().item() > before


def test_what_is_no_flow_is_refused():
    with pytest.raises(ModelError, match=r"pip install pyro-vae\[flows\]"):
        Flow(lambda x: x)
    with pytest.raises(ModelError, match="Linear does not return a distribution"):
        Flow(nn.Linear(6, 3))(torch.zeros(2, 6))


def refined_linear(**settings):
    """An encoder that knows nothing about the oracle, to be refined."""
    model = linear_gaussian(features=6, latents=3)
    torch.manual_seed(5)
    amortized = DiagNormal(nn.Linear(6, 6)).double()
    vae = model.as_vae(diagonal=True)
    vae.encoder = Refined(amortized, **settings)
    return model, vae, amortized, model.sample(20)


def test_refining_shrinks_every_datums_gap_and_reaches_the_best_diagonal():
    """With as many noise directions as latents the steps are exact for a linear decoder: the gap goes to 0."""
    gaps = []
    for steps in (1, 5, 20, 300):
        model, vae, amortized, x = refined_linear(steps=steps, particles=6)
        best = model.elbo(x, model.best_diagonal(x))
        gaps.append(best - model.elbo(x, vae.encoder(x)))
    start = best - model.elbo(x, amortized(x))
    assert (start > 1).all(), "power: there is something to gain"
    for before, after in zip([start, *gaps], gaps, strict=False):
        assert (after < before).all()
    q, best = vae.encoder(x), model.best_diagonal(x)
    assert close(gaps[-1], 0.0, 1e-8)
    assert close(q.mean, best.mean, 1e-4)
    assert close(q.stddev, best.stddev, 1e-4)
    assert not close(q.mean, best.mean + 0.001, 1e-4), "power"


def test_a_rate_far_too_large_lowers_no_datums_estimate():
    for rate in (30.0, 1e200):
        model, vae, amortized, x = refined_linear(steps=3, rate=rate, particles=6)
        assert (model.elbo(x, vae.encoder(x)) >= model.elbo(x, amortized(x)) - 1e-12).all()


@pytest.mark.parametrize("latents", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("particles", [2, 4, 6, 8, 10, 14, 16, 18, 50])
def test_the_noise_has_covariance_identity_from_twice_the_latents_on(particles, latents):
    """Also where the latents do not divide the number of pairs; with fewer pairs, these are orthogonal."""
    noise = _orthogonal_pairs(particles, latents)
    assert noise.shape == (particles, latents)
    assert close(noise.mean(0), 0.0)
    assert close(noise.square().sum(-1), float(latents)), "all of length √d"
    pairs = particles // 2
    if pairs >= latents:
        assert close(noise.T @ noise / particles, torch.eye(latents).double())
    else:
        assert close(noise[:pairs] @ noise[:pairs].T, latents * torch.eye(pairs).double())


@pytest.mark.parametrize("particles", [8, 10, 14])
def test_the_default_noise_reaches_the_best_diagonal_too(particles):
    """The noise has covariance I, so the estimate is exact for a linear decoder, whatever d is."""
    model, vae, _, x = refined_linear(steps=300, particles=particles)
    q, best = vae.encoder(x), model.best_diagonal(x)
    assert close(model.elbo(x, best) - model.elbo(x, q), 0.0, 1e-8)
    assert close(q.stddev, best.stddev, 1e-4)
    assert vae.encoder._noise.shape == (particles, 3)


def test_refined_rows_are_their_own_and_the_same_under_no_grad_and_at_every_call():
    _, vae, _, x = refined_linear()
    q, state = vae.encoder(x), torch.get_rng_state()
    with torch.no_grad():
        again = vae.encoder(x)
    assert torch.equal(q.mean, again.mean)
    assert torch.equal(q.stddev, again.stddev)
    assert torch.equal(torch.get_rng_state(), state), "no global random numbers"
    assert not again.mean.requires_grad
    for i in (0, 7):
        assert close(vae.encoder(x[i]).mean, q.mean[i])
        assert close(vae.encoder(x[i]).stddev, q.stddev[i])
    assert close(vae.encoder(x.unflatten(0, (4, 5))).mean.flatten(0, 1), q.mean)


def test_the_gradient_passes_straight_through_the_refinement():
    """The gradient by φ of any f(μ, log σ) is that through the encoder, with f's slope at the refined place."""
    _, vae, amortized, x = refined_linear()
    q, start = vae.encoder(x), amortized(x)
    slope = torch.randn(2, 20, 3).double()
    refined = (slope[0] * q.mean + slope[1] * q.stddev.log()).sum()
    plain = (slope[0] * start.mean + slope[1] * start.stddev.log()).sum()
    phi = list(vae.guide.parameters())
    assert len(phi) == 2, "the decoder is no submodule"
    for a, b in zip(torch.autograd.grad(refined, phi), torch.autograd.grad(plain, phi), strict=True):
        assert close(a, b, 1e-10)
    assert all(p.grad is None for p in vae.parameters())


def test_refined_follows_its_vae_through_copies_and_changes_of_parts():
    _, vae, _, x = refined_linear()
    twin = copy.deepcopy(vae)
    assert twin.encoder._model[0] is twin.model
    assert vae.encoder._model[0] is vae.model
    assert torch.equal(twin.encoder(x).mean, vae.encoder(x).mean)
    before = twin.encoder(x).mean
    with torch.no_grad():
        vae.decoder.net.bias.add_(1.0)
    assert torch.equal(twin.encoder(x).mean, before), "the copy looks at its own decoder"
    assert not torch.equal(vae.encoder(x).mean, before)
    vae.decoder = twin.decoder
    assert torch.equal(vae.encoder(x).mean, before)


def test_refined_leaves_a_decoder_in_training_mode_and_its_running_means_alone():
    _, vae, _, x = refined_linear()
    vae.decoder = pv.likelihoods.Normal(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 6))).double()
    vae.train()
    assert torch.equal(vae.encoder(x).mean, vae.encoder(x).mean), "no dropout while refining"
    assert vae.decoder.net[0].training


def test_refined_works_with_every_estimator_and_trains():
    model, vae, _, x = refined_linear()
    for loss in (Trace_ELBO(3), Trace_ELBO(3, vectorize_particles=True), AnalyticKL(2), HandDerivedELBO(2)):
        assert loss.differentiable_loss(vae.model, vae.guide, x).isfinite()
    assert log_weights(vae.model, vae.guide, x, num_particles=7).shape == (7, 20)
    before = model.elbo(x, vae.encoder(x)).mean()
    vae.model.requires_grad_(False)
    pv.fit(vae, x, epochs=100, optimizer=lambda p: torch.optim.Adam(p, lr=0.02), device="cpu", progress=False)
    assert model.elbo(x, vae.encoder(x)).mean() > before
    assert close(vae.decoder.net.weight, model.weight, 0.0), "the decoder was only looked at"


def test_refined_without_a_vae_is_refused_and_a_vamp_prior_is_of_its_start():
    encoder = Refined(nn.Linear(6, 6))
    with pytest.raises(ModelError, match="build a VAE with it"):
        encoder(torch.zeros(2, 6))
    decoder = pv.likelihoods.Normal(pv.nn.mlp(3, [], 6))
    vae = pv.VAE(prior=pv.priors.VampPrior(torch.randn(9, 6), components=2), decoder=decoder, encoder=encoder)
    z = torch.randn(5, 3)
    of_the_start = encoder.net(vae.prior.pseudo_inputs).log_prob(z.unsqueeze(1)).logsumexp(1) - math.log(2)
    assert torch.allclose(vae.prior().log_prob(z), of_the_start, atol=1e-5)
    assert vae.encoder(torch.zeros(2, 6)).mean.shape == (2, 3)

    class AsksBack(pv.priors.VampPrior):
        def bind(self, vae):
            self._encoder = (vae.encoder,)

    vae.prior = AsksBack(torch.randn(9, 6), components=2)
    with pytest.raises(ModelError, match="the prior calls the encoder"):
        vae.encoder(torch.zeros(2, 6))


def test_refined_passes_the_context_to_decoder_and_prior():
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.ContextNormal(nn.Linear(2, 6)),
        decoder=pv.likelihoods.Normal(nn.Linear(3 + 2, 6)),
        encoder=Refined(nn.Linear(6 + 2, 6)),
    ).double()
    x, context = rows(4), rows(4)[:, :2]
    q = vae.encoder(x, context)
    with torch.no_grad():
        start = vae.encoder.net(x, context)
        weights = [
            log_weights(vae.model, guide, x, None, context, num_particles=2000).mean(0)
            for guide in (vae.guide, lambda *given: start_guide(start, x))
        ]
    assert q.batch_shape == (4,)
    assert (weights[0] > weights[1]).all()
    assert close(vae.encoder(x[1], context[1]).mean, q.mean[1])


def start_guide(q, x):
    import pyro

    with pyro.plate("data", len(x)):
        return pyro.sample("z", q)


def test_a_vae_with_a_refined_encoder_is_collected():
    """The encoder holds the model, the model not the encoder: no cycle keeps a VAE alive."""
    import weakref

    vae = refined_linear()[1]
    alive = weakref.ref(vae)
    gc.disable()
    try:
        del vae
        assert alive() is None
    finally:
        gc.enable()


def test_a_deterministic_refined_answer_is_a_normal_of_the_base():
    q = refined_linear()[1].encoder(rows(4))
    assert isinstance(q.base_dist, dist.Normal)
    assert q.event_dim == 1
