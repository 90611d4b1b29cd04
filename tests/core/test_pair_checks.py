"""``check`` and the inference gaps for a Pair, and why a diagnostic that its model does not allow is left out."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_global_sites import of as shared_mean
from test_pair import oracle, pair
from test_pair_draws import broken, classes
from torch import nn

import pyro_vae as pv
from pyro_vae.core.rows import Rows
from pyro_vae.diagnose import DIAGNOSTICS
from pyro_vae.diagnose import check as diagnose_check
from pyro_vae.diagnose.check import conclusion, findings
from pyro_vae.errors import ModelError

MODEL = pv.exact.LinearGaussian(
    torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.4], [0.6, 0.3, 0.8], [-0.5, 0.1, 0.2]]).double(),
    torch.zeros(4).double(),
    0.6,
)


class TwoParts(nn.Module):
    """x = W [a, b] + ε with two independent sites; the guide is the best diagonal normal, or off by a shift."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter((torch.linalg.inv(MODEL.precision) @ MODEL.weight.T / MODEL.scale**2).clone())
        self.shift, self.scale = shift, MODEL.precision.diagonal() ** -0.5

    def model(self, x, size=None):
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            a = pyro.sample("a", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(x.new_zeros(()), 1.0))
            z = torch.cat([a, b.unsqueeze(-1)], -1)
            pyro.sample("x", dist.Normal(z @ MODEL.weight.T, MODEL.scale).to_event(1), obs=x)

    def guide(self, x, size=None):
        mean = x @ self.gain.T + self.shift
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            pyro.sample("b", dist.Normal(mean[:, 2], self.scale[2]))  # in another order than the model
            pyro.sample("a", dist.Normal(mean[:, :2], self.scale[:2]).to_event(1))


def two_parts(shift: float = 0.0) -> pv.Pair:
    both = TwoParts(shift)
    return pv.Pair(both.model, both.guide)


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(0)
    return MODEL.sample(6)


def test_independent_sites_are_joined_to_one_normal(x):
    q = two_parts(0.3).closed_form_posterior(Rows(x))
    mean = x @ (torch.linalg.inv(MODEL.precision) @ MODEL.weight.T / MODEL.scale**2).T + 0.3
    torch.testing.assert_close(q.mean, mean.detach())
    torch.testing.assert_close(q.stddev, (MODEL.precision.diagonal() ** -0.5).expand(6, 3))
    z = q.sample((4,))
    torch.testing.assert_close(two_parts(0.3).posterior(Rows(x)).log_prob(z), q.log_prob(z))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_gaps_of_independent_sites_are_those_of_the_closed_form(shift, x):
    """The family loses ½ (Σ log A_jj - log det A), a shift of all means half its square in the norm of A."""
    gaps = pv.inference_gaps(two_parts(shift), x, steps=200, num_particles=400)
    precision = MODEL.precision
    of_family = float(0.5 * (precision.diagonal().log().sum() - precision.logdet()))
    of_shift = float(0.5 * shift**2 * precision.sum())
    assert (abs(gaps.approximation_gap - of_family) < 5 * gaps.approximation_gap_se + 2e-3).all()
    assert (abs(gaps.amortization_gap - of_shift) < 5 * gaps.amortization_gap_se + 2e-3).all()
    assert (abs(gaps.richer_gap) < 5 * gaps.richer_gap_se + 2e-3).all(), "a full covariance is exact"
    assert of_family > 0.05, "power"
    assert shift == 0.0 or of_shift > 0.5, "power"
    assert gaps.attrs["family"] == "DiagNormal"


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_pair_around_a_vae_has_its_gaps(diagonal, x):
    vae, settings = MODEL.as_vae(diagonal=True), {"steps": 20, "num_particles": 50}
    if not diagonal:
        torch.manual_seed(0)
        vae.encoder = pv.posteriors.FullNormal(nn.Linear(4, pv.posteriors.FullNormal.outputs(3))).double()
    truth = MODEL.log_marginal(x)
    both = pv.Pair(vae.model, vae.guide)
    mine, its = (pv.inference_gaps(of, x, log_evidence=truth, **settings) for of in (both, vae))
    assert mine.attrs["family"] == its.attrs["family"] == ("DiagNormal" if diagonal else "FullNormal")
    for name in its.data_vars:
        np.testing.assert_allclose(mine[name], its[name], atol=1e-9)


def one_of_two(x, size=None):
    with pyro.plate("data", len(x) if size is None else size, subsample=x):
        pyro.sample("a", dist.MultivariateNormal(x.new_zeros(len(x), 2), torch.eye(2).double()))
        pyro.sample("b", dist.Normal(x[:, 0], 1.0))


def test_a_guide_of_unknown_family_is_refused(x):
    with pytest.raises(ModelError, match="site z1 of the guide depends on other sites, so the family of q over the"):
        pv.inference_gaps(pair(), oracle().sample(2), steps=2)
    with pytest.raises(ModelError, match="site y of the guide is a Categorical and not normal, so the family"):
        pv.inference_gaps(classes(), x[:, :2], steps=2)
    with pytest.raises(ModelError, match="the guide has several sites, one of them multivariate normal, so the family"):
        pv.inference_gaps(pv.Pair(TwoParts().model, one_of_two), x, steps=2)


def only(monkeypatch, *names):
    chosen = tuple(one for one in DIAGNOSTICS if one.name in names)
    monkeypatch.setattr(diagnose_check, "DIAGNOSTICS", chosen)


def test_what_a_model_lacks_is_left_out_with_the_reason(monkeypatch, capsys):
    only(monkeypatch, "khat", "collapse", "gaps", "nuts")
    x = torch.as_tensor(pv.sample(classes(), 20).x.values)
    tree = pv.check(classes(), x, gold=1, draws=20, budget=600)
    assert {"khat", "collapse"} <= set(tree.children)
    assert not {"gaps", "nuts"} & set(tree.children)
    assert all(finding.level == "fine" for finding in findings(tree))
    says = conclusion(tree)
    assert "Inference gaps (site y of the guide is a Categorical and not normal, so the family of q" in says
    assert "NUTS as a gold standard (site y has discrete latents" in says
    assert tree["findings"].attrs["model"] == "model Classes.model, guide Classes.guide; 3 parameters"
    assert tree["posterior"].y.dims == tree["posterior"].z.dims == ("chain", "draw", "datum")
    assert tree["posterior"].y.dtype == np.int64
    capsys.readouterr()


def test_a_model_that_reads_x_lacks_draws_of_data(monkeypatch, capsys):
    only(monkeypatch, "khat", "prior_check", "sbc")
    tree = pv.check(broken("reads x"), torch.randn(20, 2), gold=0, draws=20, budget=600)
    says = conclusion(tree)
    for about in ("Prior predictive check", "Calibration by simulation"):
        assert f"{about} (the model computes site z from the values of x" in says
    capsys.readouterr()


def test_a_global_site_is_refused_before_anything_is_run():
    x = torch.randn(6, 2).double()
    with pytest.raises(ModelError, match="site mean lies in no plate over data, so it has no log-weight per datum"):
        pv.check(shared_mean(x), x)


@pytest.mark.slow
def test_every_diagnostic_runs_on_an_exact_pair_and_those_of_q_see_a_narrow_one(monkeypatch, capsys):
    x = oracle().sample(30)
    tree = pv.check(pair(), x, gold=0, draws=60, budget=900)
    levels = dict(zip(tree["findings"].group.values, (one.level for one in findings(tree)), strict=True))
    assert len(levels) == 8
    assert "bad" not in levels.values()
    assert all(levels[name] == "fine" for name in ("khat", "baseline", "reconstructions", "collapse", "sbc"))
    assert conclusion(tree).count("(needs") == 2
    only(monkeypatch, "khat", "reconstructions", "sbc")
    narrow = pv.check(pair(0.25), x, gold=0, draws=60, budget=900)
    levels = dict(zip(narrow["findings"].group.values, (one.level for one in findings(narrow)), strict=True))
    assert levels["reconstructions"] == levels["sbc"] == "bad"
    capsys.readouterr()


def test_the_figure_of_collapse_shows_the_kl_of_each_site():
    found = pv.diagnose.collapse(pair(), oracle().sample(12))
    (axes,) = pv.plots.collapse(found).axes
    assert [bar.get_height() for bar in axes.patches] == found.kl.values.tolist()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["z2", "z1"]
    assert axes.get_title() == "2 of 2 sites are used"
