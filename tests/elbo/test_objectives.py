"""Objectives around estimators: each term against its formula, schedules, and what training logs."""

import math
from functools import partial

import pyro
import pytest
import torch
from helpers.checks import linear_gaussian, loss_and_gradients, small_vae
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae.elbo import ELBO, IWAE, TCVAE, AnalyticKL, Beta, Cyclical, FreeBits, InfoVAE, Linear
from pyro_vae.elbo.aggregate import squared_mmd, total_correlation
from pyro_vae.errors import ModelError, SettingsError

quiet_fit = partial(pv.fit, progress=False, device="cpu")


def scaled_latent(vae, beta):
    """β by Pyro's own means: the latent site scaled in model and guide."""

    def model(x, size=None):
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            with pyro.poutine.scale(scale=beta):
                z = pyro.sample("z", vae.prior())
            pyro.sample("x", vae.decoder(z), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", len(x) if size is None else size, subsample=x), pyro.poutine.scale(scale=beta):
            pyro.sample("z", vae.encoder(x))

    return model, guide


@pytest.mark.parametrize("beta", [0.3, 4.0])
@pytest.mark.parametrize(("ours", "pyros"), [(ELBO, Trace_ELBO), (AnalyticKL, TraceMeanField_ELBO)])
def test_beta_is_pyros_scale_on_both_sites(ours, pyros, beta):
    vae, x = small_vae(), torch.randn(5, 6).double()
    value, gradients = loss_and_gradients(Beta(ours(), beta), vae, x, 65)
    model, guide = scaled_latent(vae, beta)
    torch.manual_seed(1)
    theirs = pyros().differentiable_loss(model, guide, x, 65)
    their_gradients = torch.autograd.grad(theirs, list(vae.parameters()))
    assert abs(value - theirs) < 1e-10
    assert max((a - b).abs().max() for a, b in zip(gradients.values(), their_gradients, strict=True)) < 1e-10
    plain, _ = loss_and_gradients(ours(), vae, x, 65)
    assert abs(value - plain) > 1, "power"


def test_pyros_scale_on_both_sites_is_beta_for_our_estimators_too():
    vae, x = small_vae(), torch.randn(5, 6).double()
    model, guide = scaled_latent(vae, 0.3)
    for elbo in ELBO(3), IWAE(3), AnalyticKL(3):
        torch.manual_seed(1)
        by_scale = elbo.differentiable_loss(model, guide, x, 65)
        torch.manual_seed(1)
        assert abs(by_scale - Beta(elbo, 0.3).differentiable_loss(vae.model, vae.guide, x, 65)) < 1e-10


def test_a_scale_around_the_whole_model_stays_outside_the_bound():
    vae, x = small_vae(), torch.randn(5, 6).double()
    model, guide = (pyro.poutine.scale(program, scale=0.01) for program in (vae.model, vae.guide))
    torch.manual_seed(1)
    scaled = IWAE(4).differentiable_loss(model, guide, x)
    torch.manual_seed(1)
    assert abs(100 * scaled - IWAE(4).differentiable_loss(vae.model, vae.guide, x)) < 1e-9


def test_free_bits_floor_each_latents_mean_kl_and_stop_its_gradient():
    vae, x = small_vae(), torch.randn(7, 6).double()
    q, p = vae.encoder(x), vae.prior()
    per_latent = kl_divergence(q.base_dist, p.base_dist).mean(0).detach()
    nats = per_latent.sort().values[1].item() + 1e-6  # two latents below, one above
    by_hand = 7 * (per_latent.clamp(min=nats) - per_latent).sum()
    plain, _ = loss_and_gradients(AnalyticKL(), vae, x)
    value, _ = loss_and_gradients(FreeBits(AnalyticKL(), nats), vae, x)
    assert abs(value - plain - by_hand) < 1e-10
    assert by_hand > 0.01, "power"
    weighted, _ = loss_and_gradients(Beta(FreeBits(AnalyticKL(), nats), 0.5), vae, x)
    half, _ = loss_and_gradients(Beta(AnalyticKL(), 0.5), vae, x)
    assert abs(weighted - half - 0.5 * by_hand) < 1e-10
    # With everything free, the KL's gradient is gone: only the likelihood's is left.
    _, free = loss_and_gradients(Beta(FreeBits(AnalyticKL(), 100.0), 1.0), vae, x)
    _, likelihood = loss_and_gradients(Beta(AnalyticKL(), 0.0), vae, x)
    assert max((free[n] - likelihood[n]).abs().max() for n in free) < 1e-10


def test_total_correlation_is_its_formula_datum_by_datum():
    vae, x, n = small_vae(), torch.randn(4, 6).double(), 40
    torch.manual_seed(1)
    w = ELBO().weigh(vae.model, vae.guide, x, n)
    z, q = w.latents["z"][0], vae.encoder(x)
    loc, scale = q.base_dist.loc, q.base_dist.scale
    for i in range(4):
        log_q = [
            [torch.distributions.Normal(loc[m, j], scale[m, j]).log_prob(z[i, j]) for j in range(3)] for m in range(4)
        ]
        joint = torch.stack([sum(row) for row in log_q]).logsumexp(0) - math.log(n * 4)
        single = sum(torch.stack([log_q[m][j] for m in range(4)]).logsumexp(0) - math.log(n * 4) for j in range(3))
        assert abs(total_correlation(w)[i] - (joint - single)) < 1e-11
    plain, _ = loss_and_gradients(ELBO(), vae, x, n)
    value, _ = loss_and_gradients(TCVAE(ELBO(), 3.0), vae, x, n)
    assert abs(value - plain - 2 * n / 4 * total_correlation(w).sum()) < 1e-9
    same, _ = loss_and_gradients(TCVAE(ELBO(), 1.0), vae, x, n)
    assert abs(same - plain) < 1e-11


def test_mmd_is_its_formula_and_zero_in_expectation_for_one_distribution():
    torch.manual_seed(0)
    a, b = torch.randn(4, 2).double(), torch.randn(4, 2).double() + 1

    def kernel(u, v):
        return math.exp(-((u - v) ** 2).sum() / 2)

    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    within = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs) / 12
    between = sum(kernel(u, v) for u in a for v in b) / 16
    assert abs(squared_mmd(a, b) - (within - 2 * between)) < 1e-12
    same = torch.stack([squared_mmd(*torch.randn(2, 50, 2)) for _ in range(2000)])
    apart = torch.stack([squared_mmd(torch.randn(50, 2), torch.randn(50, 2) + 0.3) for _ in range(2000)])
    assert abs(same.mean() / (same.std() / 2000**0.5)) < 5
    assert apart.mean() / (apart.std() / 2000**0.5) > 10, "power"


def test_infovae_is_its_terms():
    vae, x = small_vae(), torch.randn(5, 6).double()
    torch.manual_seed(1)
    w = ELBO().weigh(vae.model, vae.guide, x, 65)
    distance = squared_mmd(w.latents["z"][0], w.model_trace.nodes["z"]["fn"].sample()[0])
    value, _ = loss_and_gradients(InfoVAE(ELBO(), alpha=0.4, weight=7.0), vae, x, 65)
    tempered, _ = loss_and_gradients(Beta(ELBO(), 0.6), vae, x, 65)
    assert abs(value - tempered - 65 * (0.4 + 7.0 - 1) * distance) < 1e-9
    same, _ = loss_and_gradients(InfoVAE(ELBO(), alpha=0.0, weight=1.0), vae, x, 65)
    assert abs(same - loss_and_gradients(ELBO(), vae, x, 65)[0]) < 1e-10


def test_schedules_are_their_formulas():
    cyclical = Cyclical(40, cycles=4, ramp=0.5, start=0.1, end=0.9)
    for step in range(60):
        t = torch.tensor(float(step))
        assert Linear(20, start=0.2, end=1.4).at(t) == pytest.approx(0.2 + 1.2 * min(step / 20, 1), abs=1e-6)
        within = (step % 10) / 10 if step < 40 else 1.0
        assert cyclical.at(t) == pytest.approx(0.1 + 0.8 * min(within / 0.5, 1), abs=1e-6)


def test_a_schedule_follows_the_steps_of_svi_and_no_others():
    vae, x = small_vae(), torch.randn(40, 6).double()
    loss = Beta(FreeBits(Beta(ELBO(), Linear(4, start=1.0, end=3.0)), 0.0), Linear(8))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    for step in range(1, 4):
        svi.step(x)
        svi.evaluate_loss(x)
        assert loss.step == loss.elbo.elbo.step == step
    assert loss.temperature(x.device) == 3 / 8
    assert loss.elbo.elbo.temperature(x.device) == 1 + 2 * 3 / 4
    loss.restart()
    assert loss.step == loss.elbo.elbo.step == 0
    assert [s.steps for s in loss.schedules()] == [4, 8]


def test_fit_logs_the_true_elbo_beside_the_annealed_objective_and_refuses_a_longer_warm_up():
    x = linear_gaussian(features=6, latents=3).sample(100)
    annealed = Beta(ELBO(), Linear(20))
    for _ in range(2):
        history = quiet_fit(small_vae(), x, elbo=annealed, epochs=10, batch_size=50).history
        assert history.objective[0] > history.train_elbo[0] + 0.5, "β is small at first: each fit starts anew"
        assert abs(history.objective[-1] - history.train_elbo[-1]) < 1
    assert history.attrs["estimator"] == "Beta(ELBO(1), beta=Linear(steps=20, start=0, end=1))"
    with pytest.raises(SettingsError, match="ends after 21 steps, but training has only 20"):
        quiet_fit(small_vae(), x, elbo=Beta(ELBO(), Linear(21)), epochs=10, batch_size=50)


def test_what_an_objective_cannot_go_around_is_refused():
    vae, x = linear_gaussian().as_vae(), torch.randn(5, 5).double()
    with pytest.raises(ModelError, match=r"Beta wraps an estimator of pyro_vae\.elbo, not HandDerivedELBO"):
        Beta(pv.elbo.HandDerivedELBO(), 2.0)
    for loss in FreeBits(ELBO()), TCVAE(ELBO()):
        with pytest.raises(ModelError, match="latents at site z are not independent in MultivariateNormal"):
            loss.loss(vae.model, vae.guide, x)
    vae.encoder, vae.prior = small_vae(features=5, latents=2).encoder, pv.priors.StudentT(2).double()
    with pytest.raises(ModelError, match="the KL of Normal from StudentT has no closed form"):
        FreeBits(ELBO()).loss(vae.model, vae.guide, x)
    with pytest.raises(ModelError, match="at least two data"):
        InfoVAE(ELBO()).loss(vae.model, vae.guide, x[:1])


def test_free_bits_take_the_mean_of_temperatures_of_single_data():
    """A temperature of each datum that is the same for all is that temperature."""
    vae, x = small_vae(), torch.randn(7, 6).double()
    values = []
    for beta in (2.0, torch.full((7,), 2.0).double()):
        torch.manual_seed(0)
        values.append(FreeBits(ELBO(), 5.0).differentiable_loss(*scaled_latent(vae, beta), x).item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)
