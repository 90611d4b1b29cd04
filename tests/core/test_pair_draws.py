"""Data drawn from the model of a Pair: samples, calibration, predictive checks, reconstructions, bounds."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import z_score
from helpers.conditional import conditional_vae
from scipy.stats import norm
from test_pair import MIDDLE, NOISE, exact_moments, oracle, pair, weight
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.core.joined import validate_generative
from pyro_vae.core.rows import Rows
from pyro_vae.diagnose.calibration import LIKELIHOOD, level_of_latents
from pyro_vae.errors import ModelError


def seen(both: pv.Pair, x: Tensor) -> pv.Pair:
    both.check(x)
    return both


@pytest.fixture
def x():
    return oracle().sample(12)


def covariance() -> Tensor:
    """Of x in the two-layer model."""
    return oracle().weight @ oracle().weight.T + NOISE**2 * torch.eye(5).double()


def farthest_moment(rows: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> float:
    """The largest |z| of the mean and covariance of normal rows."""
    n, off = len(rows), rows - mean
    of_mean = off.mean(0) / np.sqrt(cov.diagonal() / n)
    variance = (cov**2 + np.outer(cov.diagonal(), cov.diagonal())) / n
    of_cov = (off.T @ off / n - cov) / np.sqrt(variance)
    return float(max(abs(of_mean).max(), abs(of_cov).max()))


def test_samples_have_the_moments_of_the_model(x):
    two = seen(pair(), x)
    truth = np.zeros(5), covariance().numpy()
    found = pv.sample(two, 20_000, seed=1)
    assert dict(found.sizes) == {"datum": 20_000, "feature": 5}
    assert farthest_moment(found.x.values, *truth) < 5
    assert farthest_moment(pv.sample(two, 20_000, chunk=5000).x.values, *truth) < 5, "in blocks"
    without_top = (weight() @ weight().T * MIDDLE**2 + NOISE**2 * torch.eye(5).double()).numpy()
    assert farthest_moment(found.x.values, np.zeros(5), without_top) > 20, "power: z1 is drawn"
    at = two.condition({})
    np.testing.assert_array_equal(pv.sample(at, 3).x, pv.sample(two, 3).x)


SAME = {
    "sample": lambda vae, x: pv.sample(vae, 7).x,
    "sbc": lambda vae, x: pv.diagnose.sbc(vae, simulations=40)["rank"],
    "sbc around": lambda vae, x: pv.diagnose.sbc(vae, simulations=40, around=x)["rank"],
    "reconstruct": lambda vae, x: pv.reconstruct(vae, x, draws=5).to_array(),
    "predictive_check": lambda vae, x: pv.diagnose.predictive_check(vae, x, draws=20).replicated,
    "prior_check": lambda vae, x: pv.diagnose.prior_check(vae, x, draws=20).replicated,
    "bdmc": lambda vae, x: pv.log_evidence(vae, x, method="bdmc", num_particles=3, temperatures=3).lower,
    "score": lambda vae, x: pv.score(vae, x, draws=5, num_particles=30).to_array(),
}


@pytest.mark.parametrize("name", SAME)
def test_a_pair_around_a_vae_gives_its_numbers(name, x):
    """No second code path: the same random numbers, bit for bit."""
    vae = oracle().as_vae(diagonal=True)
    mine, its = (SAME[name](of, x) for of in (seen(pv.Pair(vae.model, vae.guide), x), vae))
    np.testing.assert_array_equal(mine, its)


def test_contexts_and_masks_go_to_the_model():
    vae, rng = conditional_vae().double(), torch.Generator().manual_seed(1)
    context = torch.randn(9, 2, generator=rng, dtype=torch.float64)
    mask = torch.rand(9, 6, generator=rng) < 0.7
    both = pv.Pair(vae.model, vae.guide)
    both.check(torch.zeros(9, 6).double(), context)
    given = pv.data.Data(torch.zeros(9, 6).double(), context=context, mask=mask)
    for ask in (
        lambda of: pv.sample(of, 9, context=context).x,
        lambda of: pv.diagnose.sbc(of, simulations=40, context=context, mask=mask)["rank"],
        lambda of: pv.diagnose.predictive_check(of, given, draws=20).replicated,
        lambda of: pv.reconstruct(of, given).x,
    ):
        np.testing.assert_array_equal(ask(both), ask(vae))
    with pytest.raises(ModelError, match="this prior needs a context; pass context="):
        pv.sample(both, 3)


def test_ranks_are_uniform_for_the_exact_guide_and_coverage_is_that_of_the_closed_form(x):
    exact = pv.diagnose.sbc(seen(pair(), x), simulations=1000)
    assert exact.quantity.values.tolist() == ["z1[0]", "z1[1]", "z2[0]", "z2[1]", "z2[2]", LIKELIHOOD]
    assert float(exact.joint_p_value) > 1e-3
    assert pv.diagnose.judge_sbc(exact).level == "fine"
    found = pv.diagnose.sbc(seen(pair(0.5), x), simulations=1000, draws=399)
    assert level_of_latents(found) < 1e-6
    assert pv.diagnose.judge_sbc(found).level == "bad"
    truth = 2 * norm.cdf(0.5**0.5 * norm.ppf((1 + found.level.values) / 2)) - 1
    for name in found.quantity.values[:-1]:
        one = found.sel(quantity=name)
        assert (abs(one.coverage - truth) < 5 * one.coverage_se).all(), name
    near = pv.diagnose.sbc(pair(), simulations=300, around=x)
    assert pv.diagnose.judge_reconstructions(near).level == "fine"


def test_reconstructions_have_the_moments_of_the_predictive_distribution(x):
    found = pv.reconstruct(pair(), x, draws=4000)
    mean, of_z = exact_moments(x)["z2"]
    expected, spread = (mean @ weight().T).numpy(), (weight() @ of_z @ weight().T).diagonal().numpy()
    assert (abs(found.x - expected) < 5 * found.x_mcse).all()
    np.testing.assert_allclose(found.x_mcse, np.broadcast_to((spread / 4000) ** 0.5, (12, 5)), rtol=0.1)
    np.testing.assert_allclose(found.x_sd, np.broadcast_to((spread + NOISE**2) ** 0.5, (12, 5)), rtol=0.05)
    assert abs(expected - x.numpy()).max() > 0.1, "power: not the data"


@pytest.mark.parametrize("check", [pv.diagnose.predictive_check, pv.diagnose.prior_check])
def test_replicates_are_from_the_predictive_distributions(check, x):
    statistics = {"first": lambda rows: rows[0, 0], "last": lambda rows: rows[-1, -1]}
    found = check(pair(), x, statistics=statistics, draws=4000)
    mean, of_z = exact_moments(x)["z2"]
    prior = check is pv.diagnose.prior_check
    variance = covariance() if prior else weight() @ of_z @ weight().T + NOISE**2 * torch.eye(5).double()
    center = torch.zeros(12, 5).double() if prior else mean @ weight().T
    for name, (i, j) in {"first": (0, 0), "last": (-1, -1)}.items():
        made, spread = found.replicated.sel(statistic=name).values, float(variance[j, j])
        assert abs(made.mean() - float(center[i, j])) < 5 * (spread / 4000) ** 0.5
        assert abs(made.var() / spread - 1) < 5 * (2 / 4000) ** 0.5
    broad = check(pair(), 3 * x, draws=100)
    assert pv.diagnose.judge_predictive_check(broad).level != "fine"
    assert pv.diagnose.judge_predictive_check(check(pair(), oracle().sample(200), draws=300)).level == "fine"


def test_bidirectional_bounds_hold_the_evidence_of_the_simulated_data(x):
    exact = pv.log_evidence(pair(), x, method="bdmc", num_particles=3, temperatures=3)
    truth = oracle().log_marginal(torch.as_tensor(exact.x.values)).numpy()
    np.testing.assert_allclose(exact.lower, truth, atol=1e-9)
    np.testing.assert_allclose(exact.upper, truth, atol=1e-9)
    found = pv.log_evidence(pair(4.0), torch.zeros(90, 5).double(), method="bdmc", num_particles=2, temperatures=2)
    truth = oracle().log_marginal(torch.as_tensor(found.x.values))
    lower, upper = (torch.as_tensor(found[name].values) - truth for name in ("lower", "upper"))
    assert z_score(lower, 0.0) < -5, "power"
    assert z_score(upper, 0.0) > 5, "power"
    assert dict(found.sizes) == {"datum": 90, "feature": 5, "latent": 5}


CENTERS, SHARES = torch.tensor([-2.0, 0.5, 3.0]).double(), torch.tensor([0.5, 0.3, 0.2]).double()


class Classes(nn.Module):
    """y ~ Categorical, z ~ N(c_y, 1), x ~ N(z, 1) twice; the guide is exact, or ignores x."""

    def __init__(self, deaf: bool = False) -> None:
        super().__init__()
        self.centers, self.deaf = nn.Parameter(CENTERS.clone()), deaf

    def model(self, x, size=None):
        pyro.module("classes", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            y = pyro.sample("y", dist.Categorical(SHARES))
            z = pyro.sample("z", dist.Normal(self.centers[y], 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        pyro.module("classes", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            logits = SHARES.log().expand(len(x), 3) if self.deaf else log_joint(x)
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal((self.centers[y] + x.sum(-1)) / 3, 3**-0.5))


def log_joint(x: Tensor) -> Tensor:
    """log p(x, y), z integrated out, shape ``(datum, class)``."""
    cov = torch.ones(2, 2).double() + torch.eye(2).double()
    centers = CENTERS.unsqueeze(-1).expand(3, 2)
    return torch.distributions.MultivariateNormal(centers, cov).log_prob(x.unsqueeze(-2)) + SHARES.log()


def classes(**settings) -> pv.Pair:
    pyro.clear_param_store()
    both = Classes(**settings)
    return seen(pv.Pair(both.model, both.guide), torch.zeros(3, 2).double())


def test_a_model_with_a_class_is_drawn_from():
    rows = pv.sample(classes(), 40_000).x.values
    mean = float(SHARES @ CENTERS)
    variance = float(SHARES @ CENTERS**2) - mean**2
    expected = np.array([[variance + 2, variance + 1], [variance + 1, variance + 2]])
    products = np.stack([rows[:, 0], *[(rows[:, i] - mean) * (rows[:, j] - mean) for i, j in ((0, 0), (0, 1))]])
    z = (products.mean(1) - [mean, expected[0, 0], expected[0, 1]]) / (products.std(1) / len(rows) ** 0.5)
    assert abs(z).max() < 5


def test_a_class_is_calibrated_and_reconstructed():
    exact, deaf = (pv.diagnose.sbc(classes(deaf=deaf), simulations=1000) for deaf in (False, True))
    assert exact.quantity.values.tolist() == ["y", "z", LIKELIHOOD]
    assert pv.diagnose.judge_sbc(exact).level == "fine"
    assert level_of_latents(exact) > 1e-3
    assert level_of_latents(deaf) > 1e-3 or float(deaf.joint_p_value) < 1e-6
    assert pv.diagnose.judge_sbc(deaf).level == "bad"
    x = torch.tensor([[-2.0, -1.5], [1.5, 1.0], [3.0, 4.0]]).double()
    found = pv.reconstruct(classes(), x, draws=4000)
    of_class = (CENTERS + x.sum(-1, keepdim=True)) / 3
    expected = (log_joint(x).softmax(-1) * of_class).sum(-1, keepdim=True).expand(3, 2).numpy()
    assert (abs(found.x - expected) < 5 * found.x_mcse).all()
    for method in ("bdmc", "ais"):
        with pytest.raises(ModelError, match="site y has discrete latents"):
            pv.log_evidence(classes(), x, method=method)


def broken(how: str) -> pv.Pair:
    def model(x, size=None, label=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0)) if how == "global" else 0.0
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            center = x.mean(0) if how == "reads x" else x.new_zeros(2)
            z = pyro.sample("z", dist.Normal(center + mean, 1.0).to_event(1))
            if how == "label":
                pyro.sample("label", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])
            if how == "halves":
                pyro.sample("first", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])
                pyro.sample("second", dist.Normal(z[..., 1], 1.0), obs=x[:, 1])
            elif how == "no event":
                pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])
            else:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, size=None, label=None):
        if how == "global":
            pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            if how == "auxiliary":
                pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    return pv.Pair(model, guide)


DRAWING = {
    "sample": lambda both, x: pv.sample(both, 3),
    "sbc": lambda both, x: pv.diagnose.sbc(both, simulations=20),
    "prior_check": lambda both, x: pv.diagnose.prior_check(both, x, draws=20),
    "bdmc": lambda both, x: pv.log_evidence(both, x, method="bdmc", num_particles=2, temperatures=2),
}
GIVEN = {"reconstruct": pv.reconstruct, "predictive_check": lambda both, x: pv.diagnose.predictive_check(both, x)}


@pytest.mark.parametrize(
    ("how", "names", "says"),
    [
        ("reads x", DRAWING, "the model computes site z from the values of x, so it cannot draw x; use x as obs=x"),
        ("label", DRAWING, "the model observes the sites label, x, so draws of x would have to be conditioned on the"),
        ("global", DRAWING | GIVEN, "site mean lies in no plate over data; condition the pair on a draw of this site"),
        ("halves", GIVEN, "no site of the model observes x, so .* observe all of x in one site"),
        ("no event", GIVEN, r"site x describes data of shape \(\), a row of the data has shape \(2,\); make"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_drawn_from_are_refused(how, names, says):
    both, x = broken(how), torch.tensor([[0.5, -1.0], [2.0, 1.0], [0.1, 0.2]])
    both.check(x)
    for ask in names.values():
        with pytest.raises(ModelError, match=says):
            ask(both, x)


def test_a_pair_that_saw_no_data_has_rows_of_unknown_shape(x):
    with pytest.raises(ModelError, match=r"the shape of a row is unknown; train the pair, or call pair.check\(x\)"):
        pv.sample(pair(), 3)
    given = broken("global")
    given.check(torch.zeros(3, 2))
    assert pv.sample(given.condition({"mean": torch.tensor(50.0)}), 4).x.values.min() > 30


def test_a_guide_with_a_site_of_its_own_has_no_density():
    with pytest.raises(ModelError, match="the guide samples site a, which the model lacks"):
        pv.log_evidence(broken("auxiliary"), torch.zeros(3, 2), method="ais", num_particles=2)


def test_values_of_x_are_replaced_by_stand_ins_and_the_random_state_is_kept(x):
    two = pair()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    validate_generative(two.model, Rows(x))
    assert torch.equal(torch.rand(2), expected)
