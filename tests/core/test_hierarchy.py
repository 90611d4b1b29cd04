"""Two and three layers of latents, with guides that go up or down a ladder, against the linear-Gaussian chain."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.elbo import CIWAE, ELBO, IWAE, MIWAE, PIWAE, STL, VIMCO, DReG, Renyi, ScoreFunction, Thermodynamic
from pyro_vae.train import per_datum_elbo

NOISE = 0.7
COLUMNS = torch.tensor([[1.0, 1.0, 0.5, 0.0], [1.0, -1.0, 0.0, 0.8]]).double().T
"""The orthogonal columns of W, so that all posteriors of z1 are diagonal."""


class Layers(pyro.nn.PyroModule):
    """z_L ~ N(0, I), z_l ~ N(a_l z_(l+1), s_l²), x ~ N(W z1, s² I); the guide is exact, or wider by a factor."""

    def __init__(self, layers: int, factor: float = 1.0) -> None:
        super().__init__()
        self.layers, self.factor = layers, factor
        steps = torch.arange(1.0, layers).double().unsqueeze(1)
        self.slope = nn.Parameter(torch.tensor([0.9, -0.6]).double() / steps)
        self.scale = 0.5 + 0.2 * steps.expand(-1, 2)
        self.weight = nn.Parameter(COLUMNS.clone())
        up, variance, upward = (COLUMNS / COLUMNS.square().sum(0)).T, NOISE**2 / COLUMNS.square().sum(0), []
        for a, s in zip(self.slope.detach(), self.scale, strict=True):
            upward.append((up, variance))  # what x says of this layer: N(up x, variance)
            up, variance = up / a.unsqueeze(1), (variance + s**2) / a**2
        top = 1 / (1 + 1 / variance)
        upward.append((top.unsqueeze(1) / variance.unsqueeze(1) * up, top))
        self.ups = nn.Parameter(torch.stack([of for of, _ in upward]))
        self.variances = torch.stack([v for _, v in upward])

    def model(self, x, size=None):
        pyro.module("layers", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            z = pyro.sample(f"z{self.layers}", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            for i in reversed(range(self.layers - 1)):
                z = pyro.sample(f"z{i + 1}", dist.Normal(self.slope[i] * z, self.scale[i]).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, NOISE).to_event(1), obs=x)

    def ladder(self, x, size=None):
        """Down from the top, by the precision-weighted mean of what x says of a layer and what the model does."""
        pyro.module("layers", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            at, width = x @ self.ups[-1].T, self.variances[-1]
            z = self.draw(self.layers, at, width)
            for i in reversed(range(self.layers - 1)):
                own, below = 1 / self.scale[i] ** 2, 1 / self.variances[i]
                at = (below * (x @ self.ups[i].T) + own * self.slope[i] * z) / (own + below)
                z = self.draw(i + 1, at, 1 / (own + below))

    def upwards(self, x, size=None):
        """Up from the data: q(z1|x), q(z2|z1), …."""
        pyro.module("layers", self)
        of_prior = [torch.ones(2).double()]  # variances of each layer, from the top
        for a, s in reversed(list(zip(self.slope.detach(), self.scale, strict=True))):
            of_prior.insert(0, a**2 * of_prior[0] + s**2)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            below = 1 / self.variances[0] if self.layers > 1 else None
            at, precision = below * (x @ self.ups[0].T), below + 1 / of_prior[0]
            z = self.draw(1, at / precision, 1 / precision)
            for i in range(self.layers - 1):
                a, s = self.slope[i].detach(), self.scale[i]
                precision = a**2 / s**2 + 1 / of_prior[i + 1]
                z = self.draw(i + 2, a / s**2 * z / precision, 1 / precision)

    def draw(self, layer, at, variance):
        return pyro.sample(f"z{layer}", dist.Normal(at, (self.factor * variance).sqrt()).to_event(1))

    def oracle(self) -> pv.exact.LinearGaussian:
        variance = torch.ones(2).double()
        for a, s in reversed(list(zip(self.slope.detach(), self.scale, strict=True))):
            variance = a**2 * variance + s**2
        return pv.exact.LinearGaussian(COLUMNS * variance.sqrt(), torch.zeros(4).double(), NOISE)


def pair(layers: int, guide: str, factor: float = 1.0) -> pv.Pair:
    pyro.clear_param_store()
    every = Layers(layers, factor)
    return pv.Pair(every.model, getattr(every, guide))


KINDS = [(2, "ladder"), (2, "upwards"), (3, "ladder"), (3, "upwards")]
ESTIMATORS = [
    ELBO(2), STL(2), Trace_ELBO(), IWAE(4), DReG(4), MIWAE(4, groups=2), CIWAE(4), PIWAE(4), Renyi(4), ScoreFunction(4),
    VIMCO(4), Thermodynamic(4),
]  # fmt: skip


@pytest.fixture
def x():
    return Layers(3).oracle().sample(10)


@pytest.mark.parametrize(("layers", "guide"), KINDS)
def test_where_the_guide_is_exact_every_estimator_is_the_evidence(layers, guide, x):
    exact, truth = pair(layers, guide), Layers(layers).oracle().log_marginal(x)
    for loss in ESTIMATORS:
        value = float(loss.loss(exact.model, exact.guide, x[:5], 20))
        assert value == pytest.approx(-4 * float(truth[:5].sum()), abs=1e-9), loss
    for method in ("iw", "psis"):
        found = pv.log_evidence(exact, x, method=method, num_particles=30)
        np.testing.assert_allclose(found.log_evidence, truth, atol=1e-10)
    assert (pv.diagnose.khat(exact, x).khat == 0).all()
    for loss in (STL(2), DReG(3)):
        exact.zero_grad()
        loss.differentiable_loss(exact.model, exact.guide, x).backward()
        assert exact.guide.owner.ups.grad.abs().max() < 1e-9, "no noise at the posterior"


@pytest.mark.parametrize(("layers", "guide"), KINDS)
def test_a_wider_guide_loses_its_kl_from_the_posterior(layers, guide, x):
    wide, truth, factor = pair(layers, guide, 1.5), Layers(layers).oracle().log_marginal(x), 1.5
    lost = layers * (factor - 1 - math.log(factor))  # of two latents a layer, half of this each
    torch.manual_seed(0)
    found = per_datum_elbo(wide, x, num_particles=20_000)
    assert (abs(found - truth + lost) < 5 * (2 * layers * (factor - 1) ** 2 / 2 / 20_000) ** 0.5).all()
    evidence = pv.log_evidence(wide, x, num_particles=4000)
    assert (abs(evidence.log_evidence - truth.numpy()) < 5 * evidence.mcse).all()
    assert lost > 0.15, "power"


def kl(mean: Tensor, variance: Tensor, of: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, of)) of both latents, shape ``(datum,)``; mean holds E mean²."""
    return 0.5 * ((variance + mean) / of - 1 + (of / variance).log()).sum(-1)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("factor", [1.0, 1.6])
@torch.no_grad()
def test_each_layer_has_its_kl(layers, factor, x):
    """Of a ladder, whose parts are KLs of their own, in closed form."""
    every = Layers(layers, factor)
    at, spread = x @ every.ups[-1].T, (factor * every.variances[-1]).expand(len(x), 2)
    expected = {f"z{layers}": kl(at**2, spread, torch.ones(2).double())}
    for i in reversed(range(layers - 1)):
        own, below, a = 1 / every.scale[i] ** 2, 1 / every.variances[i], every.slope[i]
        said, share = x @ every.ups[i].T, below / (own + below)
        apart = share**2 * ((said - a * at) ** 2 + a**2 * spread)
        expected[f"z{i + 1}"] = kl(apart, factor / (own + below), 1 / own)
        at = share * said + (1 - share) * a * at
        spread = factor / (own + below) + ((1 - share) * a) ** 2 * spread
    found = pv.diagnose.collapse(pair(layers, "ladder", factor), x, draws=8000)
    assert found.site.values.tolist() == list(expected)
    for site, truth in expected.items():
        one = found.sel(site=site)
        assert abs(float(one.kl) - float(truth.mean())) < 5 * float(one.kl_se)
        assert float(one.kl_sd) == pytest.approx(float(truth.std().detach()), rel=0.15)
    assert float(found.kl.sum()) == pytest.approx(float(found.mean_kl))
    total = float(torch.stack(list(expected.values())).sum(0).mean().detach())
    assert abs(float(found.mean_kl) - total) < 5 * float(found.mean_kl_se)
    assert float(found.kl.min()) > 0.01
    assert pv.diagnose.judge_collapse(found).level == "fine"


def test_a_layer_that_says_nothing_is_seen(x):
    every = Layers(2)
    with torch.no_grad():
        every.slope.zero_()
        every.ups[-1].zero_()
    every.variances[-1] = 1.0
    pyro.clear_param_store()
    found = pv.diagnose.judge_collapse(pv.diagnose.collapse(pv.Pair(every.model, every.ladder), x, draws=200))
    assert found.level == "doubtful"
    assert "z2 0 ± 0" in found.why
