"""Categorical VAEs, discrete and relaxed, against sums over all categories written out in plain torch."""

import itertools

import pytest
import torch
from helpers.checks import linear_gaussian, z_score
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn

import pyro_vae as pv
from pyro_vae.core.categories import GumbelSoftmax, OneHots
from pyro_vae.elbo.log_weights import at_particles
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.evidence import discrete, enumerated_log_marginal

V, K, D = 2, 3, 4
X = torch.tensor(list(itertools.product((0.0, 1.0), repeat=D))).double()
STATES = torch.stack([torch.cat(pair) for pair in itertools.product(torch.eye(K).double(), repeat=V)])


def relaxed_vae(temperature: float = 0.5, variables: int = V, categories: int = K) -> pv.VAE:
    """Linear networks with large weights, so that categories matter and the guide is not exact."""
    torch.manual_seed(0)
    latents, shares = variables * (categories - 1), variables * categories
    vae = pv.VAE(
        prior=pv.priors.GumbelSoftmax(latents, categories=categories, temperature=temperature),
        decoder=pv.likelihoods.Bernoulli(pv.nn.OnSimplex(nn.Linear(shares, D), latents, categories)),
        encoder=pv.posteriors.GumbelSoftmax(nn.Linear(D, shares), categories, temperature=temperature),
    ).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(1.5 * torch.randn_like(parameter))
    return vae


def parameters(vae: pv.VAE) -> list[torch.Tensor]:
    return [*vae.prior.parameters(), *vae.decoder.parameters(), *vae.encoder.parameters()]


def log_joint_and_q(vae: pv.VAE) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(x, z) and log q(z|x) of all categories, shape (state, datum), from the parameters alone."""
    logits, weight, bias, encoder_weight, encoder_bias = parameters(vae)
    prior = (STATES.unflatten(1, (V, K)) * logits.log_softmax(-1)).sum((1, 2))
    out = STATES @ weight.T + bias
    likelihood = (X * out.sigmoid().log()[:, None] + (1 - X) * (-out).sigmoid().log()[:, None]).sum(-1)
    log_q = (X @ encoder_weight.T + encoder_bias).unflatten(1, (V, K)).log_softmax(-1)
    return prior[:, None] + likelihood, (STATES.unflatten(1, (V, K))[:, None] * log_q).sum((2, 3))


def exact(vae: pv.VAE) -> tuple[torch.Tensor, torch.Tensor]:
    """The discrete bound of all data, and its gradient."""
    joint, log_q = log_joint_and_q(vae)
    bound = (log_q.exp() * (joint - log_q)).sum()
    return bound.detach(), flat(torch.autograd.grad(bound, parameters(vae)))


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


def drawn(loss, vae: pv.VAE, times: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of all data and their gradients, of so many draws."""
    values, gradients = [], []
    for seed in range(times):
        torch.manual_seed(seed)
        bound = -getattr(loss, "differentiable_loss", loss)(vae.model, vae.guide, X)
        values.append(bound.detach())
        gradients.append(flat(torch.autograd.grad(bound, parameters(vae))))
    return torch.stack(values), torch.stack(gradients)


def test_the_evidence_is_the_sum_over_all_categories():
    vae = discrete(relaxed_vae())
    joint, _ = log_joint_and_q(vae)
    found = enumerated_log_marginal(vae, X)
    assert (found - joint.logsumexp(0)).abs().max() < 1e-12
    assert abs(found.exp().sum() - 1) < 1e-12
    assert torch.equal(enumerated_log_marginal(vae, X, chunk=1).round(decimals=10), found.round(decimals=10))
    drawn = pv.log_evidence(vae, X, num_particles=4000, progress=False)
    assert (abs(drawn.log_evidence - found.numpy()) < 5 * drawn.mcse).all()
    assert (abs(drawn.log_evidence - exact(vae)[0].item() / len(X)) > 5 * drawn.mcse).any(), "power"


def test_pyros_enumeration_is_the_exact_discrete_bound():
    vae = discrete(relaxed_vae())
    value, gradient = exact(vae)
    loss, guide = TraceEnum_ELBO(max_plate_nesting=1), config_enumerate(vae.guide, "parallel", expand=True)
    bound = -loss.differentiable_loss(vae.model, guide, X)
    assert abs(bound - value) < 1e-10
    assert (flat(torch.autograd.grad(bound, parameters(vae))) - gradient).abs().max() < 1e-10


VECTORIZED = pv.elbo.Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)


@pytest.mark.parametrize("loss", [pv.elbo.ScoreFunction(20), VECTORIZED], ids=["ScoreFunction", "Trace_ELBO"])
def test_the_score_functions_gradient_is_that_of_the_exact_discrete_bound(loss):
    vae = discrete(relaxed_vae())
    value, gradient = exact(vae)
    values, gradients = drawn(loss, vae, 200)
    assert abs(z_score(values, value)) < 5
    for i in range(gradients.shape[1]):
        assert abs(z_score(gradients[:, i], gradient[i])) < 5
    assert abs(z_score(gradients @ gradient, 1.1 * gradient @ gradient)) > 5, "power: a gradient 10 % longer is seen"


def categorical_kl(model, guide, x, num_particles=100):
    """Jang et al. (2017), equation (1) with the KL between categories: no bound, but the discrete one as τ → 0."""
    guide_trace = poutine.trace(at_particles(guide, num_particles)).get_trace(x)
    at = at_particles(model, num_particles)
    model_trace = poutine.trace(poutine.replay(at, trace=guide_trace)).get_trace(x)
    q, p = (trace.nodes["z"]["fn"].logits.log_softmax(-1) for trace in (guide_trace, model_trace))
    observed = model_trace.nodes["x"]
    kl = (q.exp() * (q - p)).sum((-1, -2))
    return -(observed["fn"].log_prob(observed["value"]) - kl).mean(0).sum()


def biases(loss) -> list[float]:
    """Of the gradient, relative to the exact one's length, less two errors, at falling temperatures."""
    found = []
    for temperature in (1.0, 0.3, 0.1):
        vae = relaxed_vae(temperature)
        _, gradient = exact(vae)
        _, gradients = drawn(loss, vae, 60)
        bias = gradients.mean(0) - gradient
        error = gradients.std(0).norm() / 60**0.5
        found.append(((bias.norm() - 2 * error) / gradient.norm()).item())
    return found


def test_the_relaxed_bounds_gradient_is_biased_for_the_discrete_one_at_every_temperature():
    assert min(biases(pv.elbo.ELBO(100))) > 1, "more than its length: the KL of log-ratios is another"


def test_with_the_kl_of_the_categories_the_bias_falls_with_the_temperature():
    one, third, tenth = biases(categorical_kl)
    assert one > 2 * third > 3 * tenth
    assert tenth < 0.1


def test_the_relaxed_bound_is_one_of_the_relaxed_evidence_which_goes_to_the_discrete():
    """One variable of two categories, so that both are known: by quadrature, and by the sum of two."""
    truth = enumerated_log_marginal(discrete(relaxed_vae(1.0, 1, 2)), X)
    apart = []
    for temperature in (2.0, 0.5, 0.05):
        vae = relaxed_vae(temperature, 1, 2)
        evidence = pv.exact.quadrature_log_marginal(vae, X, points=4001, limit=40 / temperature)
        apart.append((evidence - truth).abs().max().item())
        weights = pv.elbo.log_weights(vae.model, vae.guide, X, num_particles=4000).detach()
        above = (weights.mean(0) - evidence) / (weights.std(0) / 4000**0.5)
        assert (above < 5).all(), "a bound"
        assert (above < -5).any(), "power: not tight"
    assert apart[0] > apart[1] > 10 * apart[2]
    assert apart[2] < 0.05
    assert apart[1] > 0.1, "another model at a usual temperature"


def test_the_kl_of_log_ratios_is_above_that_of_the_categories():
    """Of two categories they are logistic, whose KL does not depend on τ; by quadrature."""
    q, p = torch.tensor([1.5, 0.0]).double(), torch.zeros(2).double()
    of_categories = (q.softmax(0) * (q.log_softmax(0) - p.log_softmax(0))).sum()
    grid = torch.linspace(-4000, 4000, 800_001).double().unsqueeze(-1)
    found = []
    for temperature in (1.0, 0.1, 0.01):
        log_q, log_p = (GumbelSoftmax(logits.unsqueeze(0), temperature).log_prob(grid) for logits in (q, p))
        found.append((log_q.exp() * (log_q - log_p)).sum().item() * 0.01)
    assert max(found) - min(found) < 1e-3
    assert min(found) > 1.5 * of_categories


def test_shares_are_concrete_and_a_low_temperature_makes_them_one_hot():
    """P(category k wins) = softmax(l)_k at any temperature (Maddison et al., 2017, proposition 1b)."""
    logits = torch.tensor([[0.5, -1.0, 1.2]]).double()
    for temperature, sharp in ((1.0, 0.5), (0.02, 0.95)):
        z = GumbelSoftmax(logits, temperature).sample((40_000,))
        shares = pv.nn.OnSimplex(nn.Identity(), 2, 3)(z)
        won = nn.functional.one_hot(shares.argmax(-1), 3).double()
        for k in range(3):
            assert abs(z_score(won[:, k], logits.softmax(-1)[0, k])) < 5
        assert ((shares.amax(-1) > 0.99).double().mean() > sharp) == (temperature < 0.1)


def test_one_hot_draws_have_their_probabilities():
    d = OneHots(torch.tensor([[0.5, -1.0, 1.2], [0.0, 0.0, -2.0]]).double())
    x = d.sample((40_000,))
    assert (x.unflatten(-1, (2, 3)).sum(-1) == 1).all()
    for i in range(6):
        assert abs(z_score(x[:, i], d.mean[i])) < 5
        assert abs(x[:, i].var() - d.variance[i]) < 0.01
    assert abs(d.log_prob(d.enumerate_support()).exp().sum() - 1) < 1e-12
    assert d.expand((5,)).log_prob(x[:5]).shape == (5,)


def test_both_are_saved_and_share_their_parameters(tmp_path):
    relaxed = relaxed_vae()
    vae = discrete(relaxed)
    for name, one in {"relaxed": relaxed, "discrete": vae}.items():
        pv.save(one, tmp_path / name)
        again = pv.load(tmp_path / name)
        z = one.encoder(X).sample()
        rows = pv.data.Rows(X)
        assert torch.equal(one.log_joint(z, rows), again.log_joint(z, rows))
        assert torch.equal(one.posterior(rows).log_prob(z), again.posterior(rows).log_prob(z))
    before = enumerated_log_marginal(vae, X)
    pv.fit(relaxed, X, epochs=2, batch_size=8, progress=False, device="cpu")
    assert not torch.equal(enumerated_log_marginal(vae, X), before)
    assert isinstance(relaxed.decoder.net, pv.nn.OnSimplex), "the relaxed VAE keeps its network"


def test_training_by_the_score_function_nears_the_evidence():
    vae = discrete(relaxed_vae())
    before = enumerated_log_marginal(vae, X).mean()
    pv.fit(
        vae, X, elbo=pv.elbo.ScoreFunction(8), epochs=200, progress=False, device="cpu",
        optimizer=lambda p: torch.optim.Adam(p, 0.03),
    )  # fmt: skip
    after, bound = enumerated_log_marginal(vae, X).mean(), exact(vae)[0] / len(X)
    assert after > before + 0.1
    assert after >= bound > after - 0.3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: discrete(linear_gaussian().as_vae()), ModelError, "the prior is a StandardNormal; it must be"),
        (lambda: enumerated_log_marginal(linear_gaussian().as_vae(), torch.zeros(2, 5)), ModelError, "is not discrete"),
        (lambda: pv.priors.GumbelSoftmax(3, categories=3), SettingsError, "a multiple of 2"),
        (lambda: pv.nn.OnSimplex(nn.Identity(), 3, 3), SettingsError, "categories - 1, 2"),
        (lambda: pv.posteriors.GumbelSoftmax.outputs(4), SettingsError, "pass categories="),
        (lambda: pv.posteriors.GumbelSoftmax(nn.Identity(), 3)(torch.zeros(2, 4)), ModelError, "a multiple of 3"),
        (lambda: pv.posteriors.GumbelSoftmax(nn.Identity(), 3, temperature=0.0), SettingsError, "temperature is 0"),
        (lambda: enumerated_log_marginal(discrete(relaxed_vae(0.5, 12, 3)), X), ModelError, "12 variables of 3 cat"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_estimators_that_need_a_gradient_of_draws_refuse_the_discrete_guide():
    vae = discrete(relaxed_vae())
    with pytest.raises(ModelError, match="site z has a OneHots, which has no reparameterized"):
        pv.elbo.ELBO().differentiable_loss(vae.model, vae.guide, X)
    with pytest.raises(ModelError, match="discrete latents"):
        pv.log_evidence(vae, X, method="ais", num_particles=4, progress=False)
    bare = relaxed_vae()
    bare.decoder = pv.likelihoods.Bernoulli(nn.Linear(4, D)).double()
    with pytest.raises(ModelError, match=r"network is a Linear; wrap it in pyro_vae\.nn\.OnSimplex"):
        discrete(bare)
