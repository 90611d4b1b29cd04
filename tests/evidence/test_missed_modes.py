"""A guide on one of two modes looks perfect from within; nothing calls its evidence fine."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import nn

import pyro_vae as pv
from pyro_vae.evidence import check_where_possible, cross_check, judge_evidence
from pyro_vae.evidence.exact import quadrature_log_marginal

SCALE = 0.3


class Square(nn.Module):
    def forward(self, z):
        return z**2


class Modes(nn.Module):
    """Normals near the posterior's two modes ±√x, with these shares."""

    def __init__(self, *shares):
        super().__init__()
        self.shares = torch.tensor(shares).double()

    def forward(self, x):
        place = x.clamp(min=0.3).sqrt()
        width = 1.3 / (1 + (2 * place / SCALE) ** 2).sqrt()
        loc = torch.stack([place, -place][: len(self.shares)], -2)
        normals = dist.Normal(loc, width.unsqueeze(-2).expand_as(loc)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(self.shares.expand(loc.shape[:-1])), normals)


def squared(*shares):
    """x = z² and noise: z and -z explain x equally well, so each mode holds half of the evidence."""
    prior = pv.priors.StandardNormal(1).double()
    return pv.VAE(prior=prior, decoder=pv.likelihoods.Normal(Square(), scale=SCALE).double(), encoder=Modes(*shares))


def data(n=24):
    torch.manual_seed(0)
    return 1.2 + 2 * torch.rand(n, 1).double()


def exact(x):
    return quadrature_log_marginal(squared(1.0), x, points=2001).numpy()


@pytest.mark.parametrize("method", ["iw", "psis", "ais"])
def test_a_missed_mode_is_not_fine(method):
    vae, x = squared(1.0), data()
    found = pv.log_evidence(vae, x, method=method, temperatures=30)
    off = (found.log_evidence.values - exact(x)).mean()
    assert off == pytest.approx(-math.log(2), abs=0.03), "half of the evidence is missed"
    assert float((found.log_evidence - found.bias).mean() - exact(x).mean()) < -0.6, "the measured bias knows nothing"
    assert float((found.khat > 0.7).mean()) <= 0.1, "nor does k̂"
    assert found.mcse.max() < 0.1, "nor does the standard error"
    alone = judge_evidence(found)
    assert alone.level == "doubtful"
    assert "no check for missed modes was run" in alone.why
    assert "cross_check(vae, x, found)" in alone.next
    checked = cross_check(vae, x, found)
    assert float(checked.difference.mean()) == pytest.approx(off, abs=0.1)
    verdict = judge_evidence(checked)
    assert verdict.level != "fine"
    assert "which the first estimate missed" in verdict.why


@pytest.mark.parametrize("method", ["iw", "psis", "ais", "ais_prior"])
def test_with_both_modes_it_is_fine(method):
    vae, x = squared(0.5, 0.5), data()
    found = pv.log_evidence(vae, x, method=method, temperatures=30 if method == "ais" else 100)
    assert abs((found.log_evidence.values - exact(x)).mean()) < 0.06
    assert judge_evidence(found).level == "doubtful", "until it is checked"
    verdict = judge_evidence(cross_check(vae, x, found))
    assert verdict.level == "fine", verdict
    assert "which agrees" in verdict.why


def test_a_check_that_has_not_converged_is_no_check():
    vae, x = squared(0.5, 0.5), data()
    checked = cross_check(vae, x, pv.log_evidence(vae, x), temperatures=1, num_particles=2)
    verdict = judge_evidence(checked)
    assert verdict.level == "doubtful"
    assert "for a check" in verdict.why
    assert "more temperatures" in verdict.next


def test_bounds_from_both_sides_show_a_missed_mode():
    both = {name: pv.log_evidence(squared(*shares), data(), method="bdmc", temperatures=30) for name, shares in CASES}
    assert judge_evidence(both["one"]).level == "bad"
    assert judge_evidence(both["two"]).level == "fine"


CASES = (("one", (1.0,)), ("two", (0.5, 0.5)))


def test_the_error_of_an_upper_bound_is_of_one_exact_draw():
    """Draws from the missed mode give a bound far above, others one that is log 2 too low; no error says so."""
    found = pv.log_evidence(squared(1.0), data(60), method="bdmc", temperatures=30)
    off = found.upper.values - exact(torch.as_tensor(found.x.values))
    z, error = found.z.values[:, 0], found.upper_mcse_given_z.values
    assert off.std() > 10 * np.median(error)
    assert np.median(off[z < -0.7]) > 1, "of the missed mode"
    assert off[z > 0.7].mean() == pytest.approx(-math.log(2), abs=0.1)
    assert "upper_mcse" not in found, "whose name would claim more"


def test_the_check_of_everything_runs_the_second_start():
    vae = squared(1.0)
    found = check_where_possible(vae, data(), pv.log_evidence(vae, data()))
    assert found.attrs["second"] == "ais_prior"
    assert found.attrs["method"] == "iw", "the least biased of those from the guide"
    assert judge_evidence(found).level != "fine"


class Coin(nn.Module):
    def forward(self, *given):
        return dist.Bernoulli(torch.full((1,) if not given else (len(given[0]), 1), 0.5).double()).to_event(1)


def test_latents_that_cannot_be_moved_are_judged_without_a_second_start():
    vae = squared(1.0)
    vae.prior, vae.encoder = Coin(), Coin()
    verdict = judge_evidence(check_where_possible(vae, data(), pv.log_evidence(vae, data())))
    assert verdict.level == "doubtful"
    assert "no check for missed modes was run" in verdict.why


@pytest.mark.parametrize(
    ("gap", "level"),
    [([0.01] * 20, "fine"), ([-3.0] * 20, "bad"), ([-2.0, 2.1] * 10, "doubtful"), ([0.01], "doubtful")],
)
def test_bounds_are_fine_only_if_their_gap_is_near_0_and_known_to_be(gap, level):
    lower = np.zeros(len(gap))
    found = xr.Dataset({"lower": ("datum", lower), "upper": ("datum", lower + gap)}, attrs={"method": "bdmc"})
    assert judge_evidence(found).level == level
