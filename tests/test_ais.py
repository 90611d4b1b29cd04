"""Annealing is unbiased, bounds from both sides hold the truth, and planted bugs are seen."""

import itertools
from functools import partial

import pytest
import torch
from checks import linear_gaussian, z_score

from pyro_vae.data import Rows
from pyro_vae.evidence import annealed
from pyro_vae.evidence.annealed import PILOT_CHAINS, Path, along, places, still, temperature, tuned
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


def ratios(vae, *, chains=2000, data=100, seed=0):
    """w / p(x) of each chain, averaged over the chains of each datum: independent, with mean 1."""
    torch.manual_seed(seed)
    x = MODEL.sample(data)
    with still(vae), torch.no_grad():
        path = Path.of(vae, Rows(x))
        tuning = tuned(path, PLAN)
        start = path.at(path.q.sample((chains,)))
        log_weights, acceptance = along(path, start, places(PLAN.temperatures), tuning, PLAN)
    return (log_weights - MODEL.log_marginal(x)).exp().mean(0), acceptance


def unbiased(ratio):
    """Whether the mean is 1, and known to two hundredths."""
    return abs(z_score(ratio, 1.0)) < 5 and (ratio.std() / len(ratio) ** 0.5).item() < 0.02


@pytest.mark.parametrize("make", [partial(MODEL.as_vae, diagonal=True), broken])
def test_weights_are_unbiased(make):
    """E[w / p] = 1, by 200,000 chains; bugs that pass it are looked for below."""
    ratio, acceptance = ratios(make())
    assert unbiased(ratio)
    assert acceptance.min() > 0.6
    assert acceptance.max() < 0.95


# --- Planted bugs ---


def no_metropolis(monkeypatch):
    """In the run; the pilot has it."""
    right = annealed.accepted
    all_of_them = partial(torch.ones_like, dtype=torch.bool)
    monkeypatch.setattr(annealed, "accepted", lambda r: right(r) if len(r) == PILOT_CHAINS else all_of_them(r))


def with_other_temperatures(monkeypatch, change):
    right = annealed.moved
    monkeypatch.setattr(annealed, "moved", lambda path, state, beta, *rest: right(path, state, change(beta), *rest))


def the_other_way_round(monkeypatch):
    with_other_temperatures(monkeypatch, lambda beta: 1 - beta)


def one_temperature_late(monkeypatch):
    betas = [temperature(place) for place in places(PLAN.temperatures)]
    after = dict(itertools.pairwise(betas))
    with_other_temperatures(monkeypatch, lambda beta: after.get(beta, beta))


def wrong_sign(monkeypatch):
    right = annealed.State.log_ratio
    monkeypatch.setattr(annealed.State, "log_ratio", lambda state: -right(state))


def adapted_in_the_run(monkeypatch):
    """Each chain's step grows where its move was likely and shrinks where it was not."""
    right, memory = annealed.moved, {}

    def adapting(path, state, beta, step, *rest):
        factor = memory.setdefault(state.log_q.shape, torch.ones_like(state.log_q))
        new, chance = right(path, state, beta, step * factor, *rest)
        memory[state.log_q.shape] = factor * torch.where(chance > 0.75, 1.6, 0.5)
        return new, chance

    monkeypatch.setattr(annealed, "moved", adapting)


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
