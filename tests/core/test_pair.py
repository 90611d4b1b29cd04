"""A Pyro model and guide with two sites, used as a VAE is, against a two-layer linear-Gaussian model."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import small_vae
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.errors import CompileError, ModelError, SettingsError, WeightsOnlyWarning
from pyro_vae.train import per_datum_elbo

A = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]]).double()
MIDDLE, NOISE = 0.6, 0.5
"""The sds of z2 given z1 and of x given z2."""

quiet = {"progress": False, "device": "cpu"}


def oracle() -> pv.exact.LinearGaussian:
    """x = W u + b + ε with W = W₂ (A Aᵀ + s₂² I)^½, u ~ N(0, I): z1 and z2 integrated out."""
    root = torch.linalg.cholesky(A @ A.T + MIDDLE**2 * torch.eye(3).double())
    return pv.exact.LinearGaussian(weight() @ root, torch.zeros(5).double(), NOISE)


def weight() -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class TwoLayers(pyro.nn.PyroModule):
    """z1 ~ N(0, I), z2 ~ N(A z1, s₂² I), x ~ N(W z2, s² I); the guide goes up, and is exact, or of another scale."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor, self.decoder = factor, nn.Linear(3, 5, bias=False).double()
        self.decoder.weight.data = weight()
        of_middle = torch.linalg.inv(A @ A.T + MIDDLE**2 * torch.eye(3).double())
        self.covariance = torch.linalg.inv(of_middle + weight().T @ weight() / NOISE**2)
        self.encoder = nn.Linear(5, 3, bias=False).double()
        self.encoder.weight.data = self.covariance @ weight().T / NOISE**2
        self.top = torch.linalg.inv(torch.eye(2).double() + A.T @ A / MIDDLE**2)

    def model(self, x, size=None):
        pyro.module("two", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            z1 = pyro.sample("z1", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            z2 = pyro.sample("z2", dist.Normal(z1 @ A.T, MIDDLE).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z2), NOISE).to_event(1), obs=x)

    def guide(self, x, size=None):
        pyro.module("two", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            z2 = pyro.sample("z2", dist.MultivariateNormal(self.encoder(x), self.factor * self.covariance))
            pyro.sample("z1", dist.MultivariateNormal(z2 @ A @ self.top / MIDDLE**2, self.factor * self.top))


def pair(factor: float = 1.0) -> pv.Pair:
    pyro.clear_param_store()
    both = TwoLayers(factor)
    return pv.Pair(both.model, both.guide)


@pytest.fixture
def x():
    return oracle().sample(12)


@pytest.mark.parametrize("method", ["iw", "psis"])
def test_the_evidence_of_two_sites_is_exact_and_covered(method, x):
    truth = oracle().log_marginal(x).numpy()
    found = pv.log_evidence(pair(), x, method=method, num_particles=30)
    np.testing.assert_allclose(found.log_evidence, truth, atol=1e-10)
    np.testing.assert_allclose(per_datum_elbo(pair(), x), truth, atol=1e-10)
    wide = pv.log_evidence(pair(1.7), x, method=method, num_particles=4000)
    assert (abs(wide.log_evidence - truth) < 5 * wide.mcse).all()
    assert (per_datum_elbo(pair(1.7), x, num_particles=200).numpy() < truth - 5 * wide.mcse.values).all(), "power"
    assert (wide.attrs["kind"], wide.attrs["countable"]) == ("density", "density:5")
    assert "generative" not in wide.attrs


def test_khat_sees_a_guide_that_is_too_narrow(x):
    exact, narrow = (pv.diagnose.khat(pair(factor), x, num_particles=1000) for factor in (1.0, 0.2))
    assert (exact.khat == 0).all()
    np.testing.assert_allclose(exact.ess, 1000)
    assert (narrow.khat > 0.5).all()
    assert abs(narrow.khat.mean() - 0.8) < 0.15, "1 - 0.2, the tail index of a covariance of a fifth"


def test_models_of_several_sites_are_compared_with_vaes(x):
    other = pv.exact.LinearGaussian(0.3 * oracle().weight, torch.zeros(5).double(), NOISE)
    table = pv.compare_models({"pair": pair(), "same": oracle().as_vae(), "other": other.as_vae()}, x)
    assert table.elpd["pair"] == pytest.approx(table.elpd["same"], abs=1e-8)
    truth = float((other.log_marginal(x) - oracle().log_marginal(x)).sum())
    assert table.elpd_diff["other"] == pytest.approx(truth, abs=1e-8)


@pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_vae_is_trained_as_a_pair_to_the_same_weights(engine):
    """No second code path: the same steps, bit for bit, in minibatches that stand for more data."""
    data = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = {"epochs": 2, "batch_size": 8, "engine": engine, "clip_norm": 1.0, **quiet}
    one, other = small_vae(), small_vae()
    mine = pv.fit(one, data, validation_data=data[:9], **settings)
    theirs = pv.fit(pv.Pair(other.model, other.guide), data, validation_data=data[:9], **settings)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert not torch.equal(one.state_dict()["guide.encoder.net.0.weight"], small_vae().encoder.net[0].weight)
    for name in ("objective", "train_elbo", "validation_elbo"):
        np.testing.assert_array_equal(mine.history[name], theirs.history[name])


def disturbed() -> TwoLayers:
    pyro.clear_param_store()
    both = TwoLayers()
    with torch.no_grad():
        both.encoder.weight += 0.3
        both.decoder.weight -= 0.3
    return both


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_sites_take_pyros_own_steps(compiled, x):
    """100 steps of pyro.infer.SVI with the same noise, by CompiledSVI too: the same losses."""
    losses, both = [], disturbed()
    torch.manual_seed(0)
    svi = SVI(both.model, both.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses.append([float(svi.step(x, 60)) for _ in range(100)])
    both = disturbed()
    two = pv.Pair(both.model, both.guide)
    torch.manual_seed(0)
    if compiled:
        svi = pv.CompiledSVI(two.model, two.guide, lambda p: torch.optim.Adam(p, lr=0.01), Trace_ELBO())
    else:
        svi = SVI(two.model, two.guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses.append([float(svi.step(x, 60)) for _ in range(100)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-8)


def test_a_trained_pair_reaches_the_evidence_from_below():
    both, data = disturbed(), oracle().sample(200)
    trained = pv.Pair(both.model, both.guide)
    before = per_datum_elbo(trained, data, num_particles=20).mean()
    fitted = pv.fit(trained, data, epochs=60, batch_size=50, engine="eager",
                    optimizer=lambda p: torch.optim.Adam(p, 0.01), **quiet)  # fmt: skip
    after, truth = float(fitted.history.train_elbo[-1]), float(oracle().log_marginal(data).mean())
    assert after > before + 1
    assert truth - 0.3 < after < truth + 0.1
    assert trained.trained_on is not None
    with pytest.raises(Exception, match="training data of model 'a'"):
        pv.compare_models({"a": trained, "b": oracle().as_vae()}, data)


def exact_moments(x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and covariance of each latent given x: (z1, z2, x) is jointly normal."""
    noise = MIDDLE**2 * torch.eye(3).double()
    cov2 = A @ A.T + noise
    of_x = weight() @ cov2 @ weight().T + NOISE**2 * torch.eye(5).double()
    found = {}
    for name, prior, cross in (("z1", torch.eye(2).double(), A.T @ weight().T), ("z2", cov2, cov2 @ weight().T)):
        gain = cross @ torch.linalg.inv(of_x)
        found[name] = x @ gain.T, prior - gain @ cross.T
    return found


@pytest.mark.parametrize(("factor", "posterior"), [(1.0, "guide"), (1.5, "psis")])
def test_a_datatree_has_a_variable_for_each_site(factor, posterior, x):
    """The exact posterior, or draws of a wide guide by their weights; the guide's own would be seen (power)."""
    settings = {"draws": 2000, "prior_draws": 5000, "coords": {"z1_dim": ["a", "b"]}}
    tree = pv.to_datatree(pair(factor), x, posterior=posterior, proposals=20_000, **settings)
    for name, (mean, covariance) in exact_moments(x).items():
        draws = tree["posterior"][name]
        assert draws.dims == ("chain", "draw", "datum", f"{name}_dim")
        variance = covariance.diagonal().numpy()
        error = np.sqrt(variance / 2000)
        assert (abs(draws.mean(("chain", "draw")) - mean.numpy()) < 6 * error).all()
        spread = draws.var(("chain", "draw")).mean("datum").values / variance
        assert (abs(spread - 1) < 0.1).all(), "power: 1.5 of the guide"
    assert tree["posterior"].z1.z1_dim.values.tolist() == ["a", "b"]
    predictive = tree["posterior_predictive"].x
    expected = (exact_moments(x)["z2"][0] @ weight().T).numpy()
    error = predictive.std(("chain", "draw")) / 2000**0.5
    assert (abs(predictive.mean(("chain", "draw")) - expected) < 6 * error).all()
    assert (predictive.var(("chain", "draw")) > NOISE**2).all(), "data drawn anew, and not those given"
    of_prior = tree["prior"].z2.var(("chain", "draw")).values / ((A @ A.T).diagonal() + MIDDLE**2).numpy()
    assert (abs(of_prior - 1) < 0.1).all()
    assert dict(tree["prior_predictive"].sizes) == {"chain": 1, "draw": 5000, "feature": 5}
    np.testing.assert_allclose(tree["observed_data"].x, x)
    stats = tree["sample_stats"]
    truth = oracle().log_marginal(x).numpy()
    assert (abs(stats.log_weight - truth) < 1e-9).all() == (factor == 1.0)
    with pytest.raises(SettingsError, match=r"labels of 'latent'; it may label datum, feature, z1_dim and z2"):
        pv.to_datatree(pair(), x, coords={"latent": [1]})


def test_a_pair_is_saved_and_put_into_another(tmp_path, x):
    both = disturbed()
    trained = pv.Pair(both.model, both.guide)
    with pytest.warns(WeightsOnlyWarning, match=r"contains only the weights.* load them with into="):
        pv.save(trained, tmp_path / "pair.safetensors")
    other = TwoLayers()
    pv.load(tmp_path / "pair.safetensors", into=(again := pv.Pair(other.model, other.guide)))
    assert torch.equal(other.encoder.weight, both.encoder.weight)
    found = [pv.log_evidence(one, x, num_particles=10).log_evidence for one in (trained, again)]
    np.testing.assert_array_equal(*found)


def test_a_pair_is_scored(x):
    truth, found = oracle().log_marginal(x).numpy(), pv.score(pair(), x)
    np.testing.assert_allclose(found.log_px, truth)
    np.testing.assert_allclose(found.elbo, truth)


def without_modules():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        scale = pyro.param("s", torch.ones(()).double())
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale).to_event(1))

    pyro.clear_param_store()
    return pv.Pair(model, guide)


def only_the_middle(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z2", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))


class HalfRegistered(nn.Module):
    """Its guide forgets to show its network to Pyro."""

    def __init__(self):
        super().__init__()
        self.dec, self.enc = nn.Linear(1, 5).double(), nn.Linear(5, 1).double()

    def model(self, x, size=None):
        pyro.module("half", self.dec)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.dec(z), 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            pyro.sample("z", dist.Normal(self.enc(x), 1.0).to_event(1))


def test_what_a_pair_cannot_have_is_said_in_a_sentence(x):
    two = pair()
    for ask in (lambda: pv.evidence.enumerated_log_marginal(two, x), lambda: pv.describe(two)):
        with pytest.raises(
            ModelError, match=r"this function needs the .* of a VAE, which a Pair does not have; pass a"
        ):
            ask()
    with pytest.raises(SettingsError, match="parameter 's' is in Pyro's parameter store but in no module"):
        pv.fit(without_modules(), torch.zeros(4, 2).double(), epochs=1, **quiet)
    pyro.clear_param_store()
    half = HalfRegistered()
    with pytest.raises(SettingsError, match=r"neither model nor guide registers parameter 'enc\.weight'"):
        pv.fit(pv.Pair(half.model, half.guide), x, epochs=1, **quiet)
    half.enc.requires_grad_(False)
    pv.fit(pv.Pair(half.model, half.guide), x, epochs=1, **quiet)
    half.dec.requires_grad_(False)
    with pytest.raises(CompileError, match="register no parameter with Pyro"):
        pv.CompiledSVI(half.guide, half.guide, torch.optim.SGD, Trace_ELBO()).step(x)
    own = TwoLayers()
    alone = pv.Pair(lambda x: own.model(x), own.guide)
    with pytest.raises(ModelError, match="the model takes 1 argument and no size, so minibatches cannot be scaled"):
        alone.model(x, 60)
    with pytest.raises(ModelError, match="the guide takes 2 arguments and no context, so the context would be ignored"):
        pv.log_evidence(two, pv.data.Data(x, context=torch.zeros(12, 1).double()))
    with pytest.raises(ModelError, match="the guide has no site z1, a latent of the model"):
        pv.log_evidence(pv.Pair(own.model, only_the_middle), x)
    with pytest.raises(ModelError, match="model or guide fails on two rows"):
        pv.log_evidence(two, torch.zeros(3, 4).double())
    with pytest.raises(ModelError, match="Iterates needs a VAE, since it records the mean of q"):
        pv.fit(pair(), x, epochs=1, callbacks=[pv.diagnose.Iterates(x)], **quiet)
    with pytest.raises(ModelError, match="the guide has type int and is not callable"):
        pv.Pair(own.model, 3)
