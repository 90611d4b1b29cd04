"""The estimators against each other with the same noise, and against exact answers."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import StudentPrior, beta_on_the_model, linear_gaussian, loss_and_gradients, small_vae, z_score
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

import pyro_vae as pv
from pyro_vae.elbo import AnalyticKL, HandDerivedELBO, kl_provenance, log_weights, note_objective
from pyro_vae.errors import ModelError

SIZES = [5, 13 * 5]


def largest(first, second):
    return max((first[name] - second[name]).abs().max() for name in first)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("particles", [1, 7])
@pytest.mark.parametrize("learn_scale", [False, True])
def test_by_hand_equals_pyros_analytic_elbo_with_the_same_noise(learn_scale, particles, vectorize, size):
    vae, x = small_vae(learn_scale=learn_scale), torch.randn(5, 6).double()
    by_hand = HandDerivedELBO(particles, vectorize_particles=vectorize)
    pyros = TraceMeanField_ELBO(num_particles=particles, vectorize_particles=vectorize)
    value, gradients = loss_and_gradients(by_hand, vae, x, size)
    pyro_value, pyro_gradients = loss_and_gradients(pyros, vae, x, size)
    assert abs(value - pyro_value) / size < 1e-12
    assert largest(gradients, pyro_gradients) / size < 1e-12
    other, _ = loss_and_gradients(by_hand, vae, x, size, seed=2)
    assert abs(value - other) / size > 1e-3, "power: other noise is another value"


def test_by_hand_sums_over_every_dimension_of_an_event_before_it_weighs_the_data():
    """Data of three rows and two columns are one event, of two dimensions; each datum has a weight."""
    x, weight, values = torch.randn(4, 3, 2).double(), torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), []

    def model(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=weight):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.unsqueeze(-2).expand(-1, 3, -1), 0.5).to_event(2), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=weight):
            pyro.sample("z", dist.Normal(x.mean(-2), 0.3).to_event(1))

    for loss in HandDerivedELBO(), TraceMeanField_ELBO():
        torch.manual_seed(0)
        values.append(float(loss.loss(model, guide, x)))
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def per_datum(loss, vae, x, size):
    values = pv.compare_elbos(vae, x, {"a": loss}, draws=2, size=size)
    return torch.tensor(values.datum_elbo.values[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("particles", [1, 7])
def test_by_hand_equals_pyros_datum_by_datum(particles, size):
    vae, x = small_vae(), torch.randn(5, 6).double()
    by_hand = per_datum(HandDerivedELBO(particles), vae, x, size)
    assert (by_hand - per_datum(TraceMeanField_ELBO(particles), vae, x, size)).abs().max() < 1e-12
    assert by_hand.std() > 0.1, "the data differ"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("particles", [1, 7])
def test_trace_elbo_is_the_same_with_the_sampled_kl(particles, size):
    vae, x = small_vae(), torch.randn(5, 6).double()

    def sampled_kl(model, guide, x, size):
        by_hand = HandDerivedELBO(particles).differentiable_loss(model, guide, x, size)
        torch.manual_seed(1)
        q, p, swap = vae.encoder(x), vae.prior(), 0.0
        for _ in range(particles):
            z = q.rsample()
            swap = swap + (q.log_prob(z) - p.log_prob(z)).sum() / particles
        return by_hand + (swap - torch.distributions.kl_divergence(q, p).sum()) * size / len(x)

    value, gradients = loss_and_gradients(Trace_ELBO(num_particles=particles), vae, x, size)
    mine, my_gradients = loss_and_gradients(sampled_kl, vae, x, size)
    assert abs(value - mine) / size < 1e-12
    assert largest(gradients, my_gradients) / size < 1e-12


def test_all_three_are_unbiased_for_the_exact_elbo():
    """Of 50 copies of three data at once, so that each of 40 values is the mean of 50 draws: 2,000 in all."""
    model = linear_gaussian()
    vae, x = model.as_vae(diagonal=True), model.sample(3)
    vae.guide.encoder.net.bias.data += 0.3  # away from the best guide, where all of them are noisy
    exact = model.elbo(x, vae.encoder(x)).sum().detach()
    many = x.repeat(50, 1)
    for loss in HandDerivedELBO(), TraceMeanField_ELBO(), Trace_ELBO():
        values = torch.stack([-loss_and_gradients(loss, vae, many, seed=s)[0] for s in range(40)]) / 50
        assert abs(z_score(values, exact)) < 5
        assert abs(z_score(values * 1.02, exact)) > 5, "power: 2 % off is seen"


def test_which_is_less_noisy_depends_on_where_q_is():
    """At the exact posterior Trace_ELBO's value has no variance; far from it the analytic KL wins."""
    weight = torch.linalg.qr(torch.randn(5, 2).double()).Q * torch.tensor([2.0, 1.0])
    model = pv.exact.LinearGaussian(weight, torch.zeros(5).double(), 0.5)
    vae, x = model.as_vae(diagonal=True), model.sample(3)

    def spread(loss):
        return torch.stack([loss_and_gradients(loss, vae, x, seed=s)[0] for s in range(100)]).std()

    assert spread(Trace_ELBO()) < 1e-12 < 0.1 < spread(TraceMeanField_ELBO())
    vae.encoder.net.bias.data[:2] += 3.0
    vae.encoder.net.bias.data[2:] += 1.5
    assert spread(Trace_ELBO()) > 1.02 * spread(TraceMeanField_ELBO())


def test_log_weights_at_the_exact_posterior_are_the_evidence():
    model = linear_gaussian()
    vae, x = model.as_vae(), model.sample(4)
    weights = log_weights(vae.model, vae.guide, x, 400, num_particles=9)
    assert weights.shape == (9, 4)
    assert (weights - model.log_marginal(x)).abs().max() < 1e-11, "and n/m has not entered"


def test_the_mean_of_log_weights_is_trace_elbo():
    vae, x = small_vae(), torch.randn(5, 6).double()
    loss = lambda model, guide, x, size: -log_weights(model, guide, x, num_particles=1).sum() * size / len(x)  # noqa: E731
    value, gradients = loss_and_gradients(loss, vae, x, 65)
    pyro_value, pyro_gradients = loss_and_gradients(Trace_ELBO(), vae, x, 65)
    assert abs(value - pyro_value) / 65 < 1e-12
    assert largest(gradients, pyro_gradients) / 65 < 1e-12


@pytest.mark.parametrize("loss", [HandDerivedELBO(), HandDerivedELBO(3), AnalyticKL(), note_objective, Trace_ELBO()])
def test_svi_takes_each_of_them(loss):
    vae, x = small_vae(), torch.randn(40, 6).double()
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), loss)
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert svi.evaluate_loss(x) == pytest.approx(losses[-1], rel=0.5)


def test_an_elbo_module_has_the_parameters_of_both():
    vae = small_vae(learn_scale=True)
    for loss in HandDerivedELBO(), Trace_ELBO():
        module = loss(vae.model, vae.guide)
        assert {id(p) for p in module.parameters()} == {id(p) for p in vae.parameters()}
        module(torch.randn(5, 6).double()).backward()
        assert all(p.grad is not None for p in vae.parameters())
        vae.zero_grad()


def test_loss_builds_no_graph():
    vae, x = small_vae(), torch.randn(5, 6).double()
    assert not HandDerivedELBO().loss(vae.model, vae.guide, x).requires_grad


class LearnedPrior(pv.priors.StandardNormal):
    def __init__(self, latent_dim):
        super().__init__(latent_dim)
        self.shift = torch.nn.Parameter(torch.zeros(latent_dim))

    def forward(self):
        return dist.Normal(self.loc + self.shift, self.scale).to_event(1)


class ShiftedPrior(pv.priors.StandardNormal):
    def forward(self):
        return dist.Normal(self.loc + 0.1, self.scale).to_event(1)


@pytest.mark.parametrize("prior", [LearnedPrior, ShiftedPrior, StudentPrior])
def test_by_hand_refuses_other_priors(prior):
    vae, elbo, x = small_vae(), HandDerivedELBO(), torch.randn(5, 6).double()
    vae.prior = prior(3).double()
    for _ in range(2):  # the second call must not rest on the first
        with pytest.raises(ModelError, match=r"prior"):
            elbo.differentiable_loss(vae.model, vae.guide, x)


def test_by_hand_sees_a_learned_prior_that_has_moved_even_without_gradients():
    vae, elbo, x = small_vae(), HandDerivedELBO(), torch.randn(5, 6).double()
    vae.prior = LearnedPrior(3).double()
    elbo.loss(vae.model, vae.guide, x)  # it is N(0, I) at this moment
    vae.prior.shift.data += 1
    with pytest.raises(ModelError, match="prior"):
        elbo.loss(vae.model, vae.guide, x)


def test_by_hand_refuses_a_prior_that_learning_may_move_after_it_was_seen():
    vae, elbo, x = small_vae(), HandDerivedELBO(), torch.randn(5, 6).double()
    elbo.loss(vae.model, vae.guide, x)
    vae.prior = LearnedPrior(3).double()
    with pytest.raises(ModelError, match="N\\(0, I\\)"):
        elbo.differentiable_loss(vae.model, vae.guide, x)


def test_by_hand_looks_again_when_a_fixed_prior_changes():
    vae, elbo, x = small_vae(), HandDerivedELBO(), torch.randn(5, 6).double()
    right = elbo.differentiable_loss(vae.model, vae.guide, x)
    seen = elbo._standard
    elbo.differentiable_loss(vae.model, vae.guide, x)
    assert elbo._standard is seen, "an unchanged prior is not looked at twice"
    vae.prior.loc += 3
    with pytest.raises(ModelError, match="but this is not"):
        elbo.differentiable_loss(vae.model, vae.guide, x)
    vae.prior = pv.priors.StandardNormal(3).double()
    torch.manual_seed(0)
    assert elbo.differentiable_loss(vae.model, vae.guide, x) != right
    vae.prior = ShiftedPrior(3).double()
    with pytest.raises(ModelError, match="but this is not"):
        elbo.differentiable_loss(vae.model, vae.guide, x)
    copy.deepcopy(elbo)


def test_log_weights_refuse_masks_and_models_without_a_plate():
    vae, x = small_vae(), torch.randn(5, 6).double()
    masked = pyro.poutine.mask(vae.model, mask=torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ModelError, match="masked by a handler"):
        log_weights(masked, vae.guide, x)

    def model(x):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[0, 0])

    with pytest.raises(ModelError, match="no plate over data"):
        log_weights(model, lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), x)


def test_by_hand_refuses_what_it_was_not_derived_for():
    vae, x = small_vae(), torch.randn(5, 6).double()
    exact = linear_gaussian(features=6, latents=3).as_vae()
    with pytest.raises(ModelError, match="MultivariateNormal"):
        HandDerivedELBO().loss(exact.model, exact.guide, x)
    with pytest.raises(ModelError, match=r"scaled by 0\.1 in the model and by 1\.0 in the guide"):
        HandDerivedELBO().loss(beta_on_the_model(vae, 0.1), vae.guide, x)
    masked = pyro.poutine.mask(vae.model, mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ModelError, match="mask"):
        HandDerivedELBO().loss(masked, vae.guide, x)

    def two_latents(x, size=None):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        return vae.model(x, size)

    def guide(x, size=None):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        return vae.guide(x, size)

    with pytest.raises(ModelError, match=r"\['w', 'x', 'z'\]"):
        HandDerivedELBO().loss(two_latents, guide, x)
    with pytest.raises(ModelError, match="site w lies in no plate over data"):
        AnalyticKL().loss(two_latents, guide, x)


def test_float32_agrees_to_its_rounding():
    vae, x = copy.deepcopy(small_vae()).float(), torch.randn(50, 6)
    value, gradients = loss_and_gradients(HandDerivedELBO(), vae, x)
    pyro_value, pyro_gradients = loss_and_gradients(TraceMeanField_ELBO(), vae, x)
    assert value.dtype == torch.float32
    assert abs(value - pyro_value) / abs(value) < 1e-6
    assert largest(gradients, pyro_gradients) / max(g.abs().max() for g in gradients.values()) < 1e-5


def test_provenance_is_said_per_site():
    vae, x = small_vae(), torch.randn(5, 6).double()
    assert kl_provenance(vae.model, vae.guide, x) == {"z": "analytic"}
    vae.prior = StudentPrior(3).double()
    assert kl_provenance(vae.model, vae.guide, x) == {"z": "Monte Carlo"}
