"""A mean shared by all data, outside their plate, and a latent of each datum: against the conjugate normal model."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.elbo import ELBO, STL
from pyro_vae.errors import ModelError
from pyro_vae.train import per_datum_elbo

S0, S1, S2 = 0.8, 0.6, 0.5
"""The sds of the shared mean, of z given it, and of x given z."""

quiet = {"progress": False, "device": "cpu"}


class Tied(dist.Normal):
    """A normal whose draws have the noise that it is given, so that a loss is a function of its data."""

    def __init__(self, loc, scale, noise, validate_args=None):
        self.noise = noise
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return Tied(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * self.noise


class SharedMean(pyro.nn.PyroModule):
    """g ~ N(0, S0² I), z_i ~ N(g, S1² I), x_i ~ N(z_i, S2² I); the guide is exact for these data, or disturbed."""

    def __init__(self, x: Tensor, *, off: float = 0.0) -> None:
        super().__init__()
        variance = S1**2 + S2**2
        self.precision = 1 / S0**2 + len(x) / variance
        own = 1 / S1**2 + 1 / S2**2
        values = {
            "center": x.sum(0) / variance / self.precision,
            "log_sd": torch.full((2,), -0.5 * math.log(self.precision), dtype=torch.float64),
            "slopes": torch.tensor([1 / S2**2 / own, 1 / S1**2 / own], dtype=torch.float64),
            "log_width": torch.tensor(-0.5 * math.log(own), dtype=torch.float64),
            "spread": torch.tensor(math.log(S2), dtype=torch.float64),
        }
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value + off))

    def model(self, x, size=None, context=None):
        pyro.module("shared", self)
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2).double(), S0).to_event(1))
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            z = pyro.sample("z", dist.Normal(mean, S1).to_event(1))
            pyro.sample("x", dist.Normal(z, self.spread.exp()).to_event(1), obs=x)

    def guide(self, x, size=None, context=None):
        """With a context, its columns are the noise of z, and that of the mean is fixed."""
        pyro.module("shared", self)
        mean = pyro.sample("mean", self.normal(self.center, self.log_sd, None if context is None else NOISE))
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            at = self.slopes[0] * x + self.slopes[1] * mean
            pyro.sample("z", self.normal(at, self.log_width, context))

    @staticmethod
    def normal(loc, log_scale, noise):
        scale = log_scale.exp().expand(loc.shape)
        return (dist.Normal(loc, scale) if noise is None else Tied(loc, scale, noise)).to_event(1)


NOISE = torch.tensor([0.7, -1.1]).double()


def joint(x: Tensor) -> Tensor:
    """log p(x_1, …, x_n), the mean integrated out."""
    n, variance = len(x), S1**2 + S2**2
    covariance = variance * torch.eye(n).double() + S0**2
    return torch.distributions.MultivariateNormal(torch.zeros(n).double(), covariance).log_prob(x.T).sum()


def given(x: Tensor, mean: Tensor) -> Tensor:
    """log p(x_i | mean) of each datum."""
    return torch.distributions.Normal(mean, (S1**2 + S2**2) ** 0.5).log_prob(x).sum(-1)


def of(x: Tensor, **settings) -> pv.Pair:
    pyro.clear_param_store()
    both = SharedMean(x, **settings)
    return pv.Pair(both.model, both.guide)


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(3)
    return 0.5 + torch.randn(6, 2, generator=generator, dtype=torch.float64)


def name_of(loss):
    return f"{type(loss).__name__}({loss.num_particles})"


@pytest.mark.parametrize("loss", [ELBO(), ELBO(4), STL(3), Trace_ELBO()], ids=name_of)
def test_where_the_guide_is_exact_every_bound_is_the_joint_evidence(loss, x):
    pair = of(x)
    value = loss.differentiable_loss(pair.model, pair.guide, x)
    assert float(value.detach()) == pytest.approx(-float(joint(x).detach()), abs=1e-10)
    if isinstance(loss, STL):
        value.backward()
        guide = {name: p.grad for name, p in pair.named_parameters() if "spread" not in name}
        assert len(guide) == 4
        assert max(g.abs().max() for g in guide.values()) < 1e-10, "no noise at the posterior"


def loss_and_gradient(loss, pair, x, noise, size, rows):
    pair.zero_grad()
    total = loss.differentiable_loss(pair.model, pair.guide, x[rows], size, noise[rows])
    total.backward()
    return torch.cat([total.detach().reshape(1), *(p.grad.flatten() for p in pair.parameters())])


@pytest.mark.parametrize("loss", [ELBO(), STL(2), Trace_ELBO(), TraceMeanField_ELBO()], ids=name_of)
def test_minibatches_are_unbiased_by_enumeration(loss, x):
    """The mean over all minibatches of two is the loss of all six data, and so is the gradient: exactly."""
    pair, noise = of(x, off=0.2), torch.randn(6, 2, generator=torch.Generator().manual_seed(4)).double()
    every = loss_and_gradient(loss, pair, x, noise, 6, list(range(6)))
    parts = [loss_and_gradient(loss, pair, x, noise, 6, list(rows)) for rows in itertools.combinations(range(6), 2)]
    torch.testing.assert_close(torch.stack(parts).mean(0), every, rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", [ELBO(), STL()], ids=str)
@pytest.mark.parametrize("rows", [list(range(6)), [1, 4]], ids=["all", "two"])
def test_value_and_gradient_are_those_written_out(loss, rows, x):
    """The global KL once, the local terms n/m times; for STL the parameters of q in its density stand still."""
    pair, noise = of(x, off=0.2), torch.randn(6, 2, generator=torch.Generator().manual_seed(4)).double()
    found = loss_and_gradient(loss, pair, x, noise, 6, rows)
    both = pair.model.owner
    normal = torch.distributions.Normal
    params = dict(both.named_parameters())
    frozen = {name: p.detach() if isinstance(loss, STL) else p for name, p in params.items()}
    mean = both.center + both.log_sd.exp() * NOISE
    z = both.slopes[0] * x[rows] + both.slopes[1] * mean + both.log_width.exp() * noise[rows]
    at = frozen["slopes"][0] * x[rows] + frozen["slopes"][1] * mean
    local = normal(z, both.spread.exp()).log_prob(x[rows]) + normal(mean, S1).log_prob(z)
    local = local - normal(at, frozen["log_width"].exp()).log_prob(z)
    shared = normal(0.0, S0).log_prob(mean) - normal(frozen["center"], frozen["log_sd"].exp()).log_prob(mean)
    total = -(6 / len(rows)) * local.sum() - shared.sum()
    gradients = torch.autograd.grad(total, list(pair.parameters()))
    torch.testing.assert_close(found, torch.cat([total.detach().reshape(1), *(g.flatten() for g in gradients)]))


@pytest.mark.parametrize(
    ("loss", "engine"), [(STL, "eager"), (Trace_ELBO, "eager"), pytest.param(STL, "compiled", marks=pytest.mark.slow)]
)
def test_fit_finds_the_posterior_of_the_shared_mean(loss, engine):
    data = 0.5 + torch.randn(60, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    pair = of(data, off=0.3)
    del pair.model.owner.spread  # which is known here
    pair.model.owner.spread = torch.tensor(math.log(S2), dtype=torch.float64)
    fitted = pv.fit(pair, data, elbo=loss(), epochs=150, batch_size=20, engine=engine, validation_data=data[:7],
                    optimizer=lambda p: torch.optim.Adam(p, 0.02), **quiet)  # fmt: skip
    exact, both = SharedMean(data), pair.model.owner
    tolerance = 0.02 if loss is STL else 0.1
    assert (both.center - exact.center).abs().max() < tolerance
    assert (both.log_sd - exact.log_sd).abs().max() < 4 * tolerance
    per_datum = float(joint(data).detach()) / 60
    assert float(fitted.history.train_elbo[-1]) == pytest.approx(per_datum, abs=0.02)
    assert float(fitted.history.objective[-1]) == pytest.approx(per_datum, abs=0.05)


def test_the_elbo_per_datum_has_its_share_of_the_global_part(x):
    pair = of(x)
    assert float(per_datum_elbo(pair, x).sum()) == pytest.approx(float(joint(x).detach()), abs=1e-10)
    both, new = pair.model.owner, torch.linspace(-1, 2, 10).double().reshape(5, 2)
    sd = both.log_sd.exp()[0]
    kl = float(torch.distributions.kl_divergence(dist.Normal(both.center, sd), dist.Normal(0.0, S0)).sum().detach())
    expected = given(new, both.center) - sd**2 / (S1**2 + S2**2) - kl / 6  # of held-out data, of 6 that were trained on
    torch.manual_seed(0)
    found = per_datum_elbo(pair, new, num_particles=40_000, size=6).detach()
    np.testing.assert_allclose(found, expected.detach(), atol=5 * 1.5 / 40_000**0.5)


def test_given_a_draw_all_that_needs_log_weights_is_exact(x):
    pair = of(x)
    draws = pair.draw_globals(x, draws=3000, seed=1)
    assert draws["mean"].shape == (3000, 2)
    both = pair.model.owner
    assert ((draws["mean"].mean(0) - both.center).abs() < 5 * both.log_sd.exp() / 3000**0.5).all()
    assert abs(float(draws["mean"].std() / both.log_sd.detach().exp()[0]) - 1) < 0.1
    at = pair.condition({"mean": draws["mean"][0]})
    truth = given(x, draws["mean"][0])
    for method in ("iw", "psis"):
        found = pv.log_evidence(at, x, method=method, num_particles=30)
        np.testing.assert_allclose(found.log_evidence, truth, atol=1e-10)
    assert (pv.diagnose.khat(at, x).khat == 0).all()
    np.testing.assert_allclose(pv.score(at, x).elbo, truth)
    loss = pv.elbo.IWAE(4).loss(at.model, at.guide, x[:2], 6)
    assert float(loss) == pytest.approx(-3 * float(truth[:2].sum())), "no part of the global site"
    assert {id(p) for p in at.parameters()} == {id(p) for p in pair.parameters()}


def test_what_has_no_value_per_datum_is_refused(x):
    pair = of(x)
    said = r"site mean lies in no plate over data, so it has no log-weight per datum; use Trace_ELBO.*condition"
    for loss in (pv.elbo.IWAE(4), pv.elbo.DReG(4), pv.elbo.AnalyticKL(), pv.elbo.ScoreFunction(4)):
        with pytest.raises(ModelError, match=said):
            loss.loss(pair.model, pair.guide, x)
    for ask in (pv.log_evidence, pv.diagnose.khat, pv.score, pv.diagnose.collapse):
        with pytest.raises(ModelError, match=said):
            ask(pair, x)
    for ask in (pv.encode, pv.diagnose.nuts, lambda p, x: pv.log_evidence(p, x, method="ais")):
        with pytest.raises(
            ModelError, match="site mean lies in no plate over data; condition the pair on a draw of this site"
        ):
            ask(pair, x)
    with pytest.raises(
        ModelError, match=r"Beta\(ELBO\(1\), beta=2\) changes the bound of each datum, of which site mean"
    ):
        pv.elbo.Beta(ELBO(), 2.0).loss(pair.model, pair.guide, x)
    with pytest.raises(ModelError, match="site mean lies in no plate over data: STL"):
        pv.compare_elbos(pair, x, {"STL": STL()}, draws=2)
    with pytest.raises(ModelError, match="site mean has one draw for all data; use posterior='guide'"):
        pv.to_datatree(pair, x, posterior="psis")


def test_a_datatree_has_the_global_site_without_data(x):
    tree = pv.to_datatree(of(x), x, draws=4000, prior_draws=4000)
    posterior, both = tree["posterior"], SharedMean(x)
    assert posterior["mean"].dims == ("chain", "draw", "mean_dim")
    assert posterior.z.dims == ("chain", "draw", "datum", "z_dim")
    assert (abs(posterior["mean"].mean("draw")[0] - both.center.detach().numpy()) < 0.05).all()
    at = both.slopes.detach() @ torch.stack([x[0], both.center.detach()])
    assert (abs(posterior.z.sel(datum=0).mean("draw")[0] - at.numpy()) < 0.05).all()
    together = np.corrcoef(posterior["mean"][0, :, 0], posterior.z[0, :, 0, 0])[0, 1]
    assert together > 0.1, "z goes with its own draw of the mean"
    assert tree["prior"]["mean"].dims == ("chain", "draw", "mean_dim")
    assert abs(float(tree["prior"]["mean"].std()) / S0 - 1) < 0.05
    assert abs(float(tree["prior"].z.std()) / math.hypot(S0, S1) - 1) < 0.05
    assert "khat" not in tree["sample_stats"]


def test_a_shared_mean_and_an_enumerated_class_go_together(x):
    """One draw of the mean for all data, the class of each summed out: as written out at that draw."""
    centers = torch.tensor([[-1.0, 0.5], [1.0, 0.0]]).double()
    at = torch.tensor([0.2, 0.1]).double()

    def model(x, size=None):
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7]).double()))
            pyro.sample("x", dist.Normal(centers[y] + mean, 1.0).to_event(1), obs=x)

    def guide(x, size=None):
        pyro.sample("mean", Tied(at, torch.full((2,), 0.5).double(), NOISE).to_event(1))
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            pyro.sample("y", dist.Categorical(torch.ones(2).double()), infer={"enumerate": "parallel"})

    normal, mean = torch.distributions.Normal, at + 0.5 * NOISE
    of_class = torch.stack([normal(center + mean, 1.0).log_prob(x[:3]).sum(-1) for center in centers])
    local = (of_class + torch.tensor([[0.3], [0.7]]).double().log()).logsumexp(0)
    shared = normal(0.0, 1.0).log_prob(mean) - normal(at, 0.5).log_prob(mean)
    found = ELBO(2).loss(model, guide, x[:3], 6)
    assert float(found) == pytest.approx(-float(2 * local.sum() + shared.sum()))
