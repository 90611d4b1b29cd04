"""Annealing is unbiased, bounds from both sides hold the truth, and planted bugs are seen."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from helpers import members
from helpers.checks import linear_gaussian, z_score
from test_digits_exactly import trained

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.data import Rows
from pyro_vae.evidence import annealed, bidirectional, judge_evidence
from pyro_vae.evidence.annealed import PILOT_CHAINS, Path, even_positions, frozen, move, temperature, traverse, tune
from pyro_vae.evidence.exact import quadrature_log_marginal
from pyro_vae.evidence.weights import Plan

MODEL = linear_gaussian()
PLAN = Plan(num_particles=1, temperatures=8, leapfrog=3, tick=lambda: None)


def broken():
    """A guide that is moved and too narrow."""
    vae = MODEL.as_vae(diagonal=True)
    with torch.no_grad():
        vae.encoder.net.bias[:2] += torch.tensor([0.6, -0.4])
        vae.encoder.net.bias[2:] -= 0.2
    return vae


def ratios(vae, *, chains=1000, data=100, seed=0):
    """w / p(x) of each chain, averaged over the chains of each datum: independent, with mean 1."""
    torch.manual_seed(seed)
    x = MODEL.sample(data)
    with frozen(vae), torch.no_grad():
        path = Path.from_guide(vae, Rows(x))
        tuning = tune(path, PLAN)
        start = path.at(path.q.sample((chains,)))
        log_weights, acceptance = traverse(path, start, even_positions(PLAN.temperatures), tuning, PLAN)
    return (log_weights - MODEL.log_marginal(x)).exp().mean(0), acceptance


@pytest.mark.parametrize("make", [MODEL.as_vae, broken])
def test_weights_from_the_prior_are_unbiased_whatever_the_guide(make):
    """E[w / p] = 1 by 100,000 chains."""
    torch.manual_seed(0)
    vae, x, plan = make(), MODEL.sample(100), Plan(1000, 40, 3, lambda: None)
    with frozen(vae), torch.no_grad():
        path = Path.from_prior(vae, Rows(x))
        log_weights, acceptance = traverse(path, path.at(path.draw(1000)), even_positions(40), tune(path, plan), plan)
    ratio = (log_weights - MODEL.log_marginal(x)).exp().mean(0)
    assert unbiased(ratio)
    assert acceptance.min() > 0.6


def unbiased(ratio):
    """Whether the mean is 1, and known to two hundredths."""
    return abs(z_score(ratio, 1.0)) < 5 and (ratio.std() / len(ratio) ** 0.5).item() < 0.02


@pytest.mark.parametrize("make", [partial(MODEL.as_vae, diagonal=True), broken])
def test_weights_are_unbiased(make):
    """E[w / p] = 1, by 100,000 chains; bugs that pass it are looked for below."""
    ratio, acceptance = ratios(make())
    assert unbiased(ratio)
    assert acceptance.min() > 0.6
    assert acceptance.max() < 0.95


# --- Planted bugs ---


def no_metropolis(monkeypatch):
    """In the run; the pilot has it."""
    right = annealed.accept
    all_of_them = partial(torch.ones_like, dtype=torch.bool)
    monkeypatch.setattr(annealed, "accept", lambda r: right(r) if len(r) == PILOT_CHAINS else all_of_them(r))


def with_other_temperatures(monkeypatch, change):
    right = annealed.move
    monkeypatch.setattr(annealed, "move", lambda path, state, beta, *rest: right(path, state, change(beta), *rest))


def the_other_way_round(monkeypatch):
    with_other_temperatures(monkeypatch, lambda beta: 1 - beta)


def one_temperature_late(monkeypatch):
    betas = [temperature(place) for place in even_positions(PLAN.temperatures)]
    after = dict(itertools.pairwise(betas))
    with_other_temperatures(monkeypatch, lambda beta: after.get(beta, beta))


def wrong_sign(monkeypatch):
    right = annealed.State.log_ratio
    monkeypatch.setattr(annealed.State, "log_ratio", lambda state: -right(state))


def adapted_in_the_run(monkeypatch):
    """Each chain's step grows where its move was likely and shrinks where it was not."""
    right, memory = annealed.move, {}

    def adapting(path, state, beta, step, *rest):
        factor = memory.setdefault(state.log_q.shape, torch.ones_like(state.log_q))
        new, chance = right(path, state, beta, step * factor, *rest)
        memory[state.log_q.shape] = factor * torch.where(chance > 0.75, 1.6, 0.5)
        return new, chance

    monkeypatch.setattr(annealed, "move", adapting)


def wrong_slope(monkeypatch):
    """No bug but a bad proposal: Metropolis' rule makes up for it."""
    right = annealed.State.slope
    monkeypatch.setattr(annealed.State, "slope", lambda state, beta: -right(state, beta))


BUGS = (no_metropolis, the_other_way_round, one_temperature_late, wrong_sign, adapted_in_the_run)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_seen(bug, monkeypatch):
    bug(monkeypatch)
    ratio, _ = ratios(broken())
    assert not unbiased(ratio)


def test_slopes_that_are_wrong_bias_nothing(monkeypatch):
    wrong_slope(monkeypatch)
    assert abs(z_score(ratios(broken())[0], 1.0)) < 5


# --- From both sides ---


def far():
    """A guide that is far off and much too narrow, so that few temperatures are not enough."""
    vae = MODEL.as_vae(diagonal=True)
    with torch.no_grad():
        vae.encoder.net.bias[:2] += torch.tensor([1.5, -1.0])
        vae.encoder.net.bias[2:] -= 0.5
    return vae


def bounds(vae, temperatures, *, data=100, exact=None, **settings):
    """Both bounds minus log p(x) of the simulated data."""
    x = torch.zeros(data, len(vae.decoder(torch.zeros(2).double()).mean)).double()
    found = pv.log_evidence(vae, x, method="bdmc", temperatures=temperatures, **settings)
    truth = (exact or MODEL.log_marginal)(torch.as_tensor(found.x.values))
    return [torch.as_tensor(found[name].values) - truth for name in ("lower", "upper")], found


def test_bounds_hold_the_truth_and_draw_together():
    """With 10, 50 and 200 temperatures; few chains, so that there is a gap to be seen."""
    gaps = []
    for temperatures in (10, 50, 200):
        (lower, upper), found = bounds(far(), temperatures, num_particles=2, leapfrog=3)
        assert z_score(lower, 0.0) < 2
        assert z_score(upper, 0.0) > -2
        if temperatures == 10:
            assert z_score(lower, 0.0) < -5, "power"
            assert z_score(upper, 0.0) > 5, "power"
            assert judge_evidence(found).level == "bad"
        gaps.append((upper - lower).mean())
    assert gaps[1] < gaps[0] / 2
    assert gaps[2] < gaps[1] / 2
    assert abs(gaps[2]) < 0.1
    assert judge_evidence(found).level == "fine"


def test_the_exact_draw_is_what_makes_the_upper_bound(monkeypatch):
    """Planted: chains from above that start at the guide's draws."""
    guess = lambda path, z, tuning, plan: path.at(path.q.sample((plan.num_particles,)))  # noqa: E731
    monkeypatch.setattr(bidirectional, "spread_exact_draws", guess)
    (_, upper), _ = bounds(far(), 10, num_particles=2, leapfrog=3)
    assert z_score(upper, 0.0) < -5


def test_chains_from_above_come_apart():
    """So that their spread tells the error of the upper bound."""
    (lower, upper), found = bounds(MODEL.as_vae(diagonal=True), 20, num_particles=10, leapfrog=4)
    for off, name in (lower, "lower_mcse"), (upper, "upper_mcse_given_z"):
        relative = off / torch.as_tensor(found[name].values)
        assert 0.7 < relative.std() < 1.5


def test_the_chains_of_an_upper_bound_spread_over_the_posterior():
    """All start at one exact draw; after all spreading moves their variance is the posterior's, after one it is not."""

    def variance():
        torch.manual_seed(0)
        vae = MODEL.as_vae(diagonal=True)
        with frozen(vae), torch.no_grad():
            z, rows = bidirectional.simulate(vae, Rows(torch.zeros(400, 5).double()))
            path = Path.from_guide(vae, rows)
            plan = Plan(30, 8, 5, lambda: None)
            return bidirectional.spread_exact_draws(path, z, tune(path, plan), plan).z.var(0)

    expected = torch.linalg.inv(MODEL.precision).diagonal()
    found = variance()
    for i in range(2):
        assert found[:, i].mean().item() == pytest.approx(expected[i].item(), rel=0.06)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bidirectional, "SPREADING_MOVES", 1)
        assert (variance().mean(0) < 0.9 * expected).all(), "power"


def test_the_figure_shows_both_bounds_of_each_datum():
    _, found = bounds(far(), 5, data=9, num_particles=4, leapfrog=3)
    left, right = plots.bdmc(found).axes
    order = np.argsort(found.log_evidence.values)
    for drawn, name in zip(left.containers, ("upper", "lower"), strict=True):
        expected = (found[name] - found.log_evidence).values[order]
        assert drawn.lines[0].get_ydata() == pytest.approx(expected)
    assert sum(bar.get_height() for bar in right.patches) == 9
    assert "nats" in left.get_ylabel()
    assert "nats" in right.get_xlabel()


def test_inverse_weights_from_above_are_unbiased():
    """E[p / w] = 1 for chains that start at the exact draw."""
    torch.manual_seed(0)
    vae = broken()
    with frozen(vae), torch.no_grad():
        z, rows = bidirectional.simulate(vae, Rows(torch.zeros(200, 5).double()))
        path = Path.from_guide(vae, rows)
        tuning, plan = tune(path, PLAN), Plan(100, 8, 3, lambda: None)
        start = bidirectional.spread_exact_draws(path, z, tuning, plan)
        log_weights, _ = traverse(path, start, even_positions(8)[::-1], tuning, plan)
    ratio = (MODEL.log_marginal(rows.x) - log_weights).exp().mean(0)
    assert unbiased(ratio)
    assert abs(z_score(ratio, 1.1)) > 5, "power"


def test_simulated_data_are_the_models():
    """Their moments are those of the marginal."""
    vae = MODEL.as_vae()
    torch.manual_seed(0)
    _, rows = bidirectional.simulate(vae, Rows(torch.zeros(20_000, 5).double()))
    variance = (MODEL.weight @ MODEL.weight.T).diagonal() + MODEL.scale**2
    for i in range(5):
        assert abs(z_score(rows.x[:, i], MODEL.bias[i])) < 5
        assert abs(z_score((rows.x[:, i] - MODEL.bias[i]) ** 2, variance[i])) < 5
        assert abs(z_score((rows.x[:, i] - MODEL.bias[i]) ** 2, variance[i] - MODEL.scale**2)) > 5, "power"


# --- Moves ---


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_moves_leave_their_distribution_as_it_is(beta):
    """Started from f_β itself, which is normal: its moments stay; from elsewhere they are reached."""
    vae, x = broken(), MODEL.sample(1)
    torch.manual_seed(0)
    with frozen(vae), torch.no_grad():
        path = Path.from_guide(vae, Rows(x))
        q, p = path.q.base_dist, MODEL.posterior(x)
        precision = (1 - beta) * torch.diag(q.scale[0] ** -2) + beta * MODEL.precision
        shift = (1 - beta) * q.loc[0] * q.scale[0] ** -2 + beta * MODEL.precision @ p.mean[0]
        exact = torch.distributions.MultivariateNormal(torch.linalg.solve(precision, shift), precision_matrix=precision)
        for start, steps in ((exact.sample((20_000, 1)), 3), (exact.sample((20_000, 1)) * 0.5 + 0.3, 40)):
            state = path.at(start)
            for _ in range(steps):
                state, _ = move(path, state, beta, torch.tensor([0.8]), exact.stddev.unsqueeze(0), 4)
            apart = state.z[:, 0] - exact.mean
            assert abs(z_score(apart[:, 0], 0.0)) < 5
            assert abs(z_score(apart[:, 0] ** 2, exact.variance[0])) < 5
            assert abs(z_score(apart[:, 0] * apart[:, 1], exact.covariance_matrix[0, 1])) < 5
    other = 1.1 * exact.variance[0]
    assert abs(z_score(apart[:, 0] ** 2, other)) > 5, "power"


def test_a_move_to_where_the_decoder_is_not_finite_is_not_taken():
    class Overflows(torch.nn.Module):
        def forward(self, z):
            return pv.likelihoods.Poisson(torch.nn.Identity())(torch.exp(40 * z))

    prior = pv.priors.StandardNormal(2).double()
    vae = pv.VAE(prior=prior, decoder=Overflows(), encoder=pv.posteriors.DiagNormal(pv.nn.mlp(2, [], 4)).double())
    x = torch.ones(4, 2).double()
    found = pv.log_evidence(vae, x, method="ais", temperatures=5, num_particles=8)
    assert not found.log_evidence.isnull().any()
    with frozen(vae), torch.no_grad():
        path = Path.from_guide(vae, Rows(x))
        start = path.at(-torch.rand(8, 4, 2).double())
        wild, chance = move(path, start, 1.0, torch.full((4,), 1e200, dtype=torch.float64), torch.ones(4, 2), 3)
    assert torch.equal(wild.z, start.z)
    assert (chance == 0).all()


PARTS = {
    "prior": {name: make for name, make in members.PRIORS.items() if name != "ContextNormal"},
    "decoder": members.LIKELIHOODS,
    "encoder": members.POSTERIORS,
}


@pytest.mark.parametrize(("role", "name"), [(role, name) for role, table in PARTS.items() for name in table])
def test_every_member_is_annealed(role, name):
    """Its evidence is that of many importance weights."""
    torch.manual_seed(0)
    parts = {
        "prior": pv.priors.StandardNormal(3),
        "decoder": pv.likelihoods.Normal(pv.nn.mlp(3, [8], 6)),
        "encoder": pv.posteriors.DiagNormal(pv.nn.mlp(6, [8], 6)),
    }
    vae = pv.VAE(**parts).double()
    setattr(vae, role, members.make(PARTS[role][name]))
    x = vae.decoder(vae.prior().sample((8,))).sample()
    found = pv.log_evidence(vae, x, method="ais", temperatures=8, num_particles=20, leapfrog=3)
    many = pv.log_evidence(vae, x, num_particles=20_000)
    apart = (found.log_evidence - many.log_evidence) / np.hypot(found.mcse, many.mcse)
    assert abs(apart).max() < 6
    assert found.mcse.mean() < 0.5, "power"
    assert found.acceptance.min() > 0.4


# --- Digits ---


@pytest.mark.slow
def test_on_digits_the_bounds_hold_the_quadratures_truth_and_draw_together():
    """And given data have the quadrature's log p(x) by every method, within the errors."""
    train, test = pv.data.split(pv.data.digits())
    vae = trained(train.x)
    exact = partial(quadrature_log_marginal, vae, points=321, tolerance=0.05)
    truth, gaps = exact(test.x[:100]).numpy(), []
    for method in ("iw", "psis", "ais"):
        found = pv.log_evidence(vae, test.x[:100], method=method)
        off = (found.log_evidence - truth).values
        print(method, off.mean(), off.std() / 10, (off / found.mcse).std().item())
        assert abs(off.mean()) < 0.03
        assert 0.7 < (off / found.mcse).std() < 1.5
    for temperatures in (10, 50, 200):
        x = test.x[:100]
        found = pv.log_evidence(vae, x, method="bdmc", temperatures=temperatures, num_particles=2)
        of = exact(torch.as_tensor(found.x.values)).double()
        lower, upper = (torch.as_tensor(found[name].values) - of for name in ("lower", "upper"))
        print(temperatures, lower.mean(), z_score(lower, 0.0), upper.mean(), z_score(upper, 0.0))
        assert z_score(lower, 0.0) < 3
        assert z_score(upper, 0.0) > -3
        gaps.append((upper - lower).mean())
    assert gaps[2] < gaps[1] < gaps[0]
    assert gaps[0] > 0.1, "power: there is a gap to close"
    assert abs(gaps[2]) < 0.05


@pytest.mark.cuda
def test_on_cuda_the_bounds_hold_the_truth_too(cuda):
    model, vae = MODEL, far().to(cuda)
    x = torch.zeros(100, 5).double()
    found = pv.log_evidence(vae, x, method="bdmc", temperatures=50, num_particles=8)
    truth = model.log_marginal(torch.as_tensor(found.x.values)).numpy()
    assert float((found.lower - truth).mean()) < 0.05
    assert float((found.upper - truth).mean()) > -0.05
    exact = pv.log_evidence(MODEL.as_vae().to(cuda), MODEL.sample(5), method="ais", temperatures=3)
    assert exact.mcse.max() < 1e-9
