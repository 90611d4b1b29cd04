"""What handlers, other plates and computed values in a Pair's model do: right, or a sentence."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import CompileError, ModelError, SettingsError

X = torch.tensor([[0.3], [-1.2], [0.8]]).double()
QUIET = {"progress": False}


def rows(x, size):
    return pyro.plate("data", len(x) if size is None else size, subsample=x)


def normal(x, loc=0.0, scale=1.0):
    return dist.Normal(torch.as_tensor(loc, dtype=x.dtype), torch.as_tensor(scale, dtype=x.dtype))


def guide(x, size=None):
    with rows(x, size):
        pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))


class Handled(nn.Module):
    """z ~ N(0, 1), x ~ N(z, 1), with a handler around one of them."""

    def __init__(self, of_z, of_x):
        super().__init__()
        self.of_z, self.of_x = of_z, of_x

    def model(self, x, size=None):
        with rows(x, size):
            with self.of_z(x):
                z = pyro.sample("z", normal(x).expand([1]).to_event(1))
            with self.of_x(x):
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def nothing(x):
    return poutine.scale(scale=1.0)


@pytest.mark.parametrize(
    ("of_z", "of_x", "says"),
    [
        (nothing, lambda x: poutine.mask(mask=x[:, 0] > 0), "site x is masked by a handler"),
        (lambda x: poutine.scale(scale=0.5), nothing, "site z is scaled by a handler"),
        (lambda x: poutine.scale(scale=x.new_tensor(0.5)), nothing, "site z is scaled by a handler"),
    ],
)
def test_handlers_that_change_a_density_are_refused(of_z, of_x, says):
    pair = pv.Pair(Handled(of_z, of_x).model, guide)
    with pytest.raises(ModelError, match=says):
        pv.log_evidence(pair, X, method="ais", num_particles=4, **QUIET)
    exact = pv.log_evidence(pv.Pair(Handled(nothing, nothing).model, guide), X, num_particles=4000, **QUIET)
    truth = dist.Normal(0.0, 2**0.5).log_prob(X[:, 0])
    assert (abs(exact.log_evidence - truth.numpy()) < 5 * exact.mcse).all()


def test_a_latent_of_another_plate_has_no_density_per_datum():
    """Also where that plate has as many members as there are data."""

    def model(x, size=None):
        with pyro.plate("topics", 3):
            topic = pyro.sample("t", normal(x))
        with rows(x, size):
            pyro.sample("x", dist.Normal(topic.sum(-1, keepdim=True).unsqueeze(-1), 1.0).to_event(1), obs=x)

    def of_topics(x, size=None):
        with pyro.plate("topics", 3):
            pyro.sample("t", normal(x))

    with pytest.raises(ModelError, match="site t lies in no plate over data"):
        pv.encode(pv.Pair(model, of_topics), X)


def recorded(x, size=None):
    pyro.deterministic("noise", torch.ones(()))
    with rows(x, size):
        z = pyro.sample("z", normal(x).expand([1]).to_event(1))
        mean = pyro.deterministic("mean", 2 * z, event_dim=1)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)


def test_a_value_that_the_model_records_is_no_data():
    pair = pv.Pair(recorded, guide)
    found = pv.log_evidence(pair, X, num_particles=4000, progress=False)
    truth = dist.Normal(0.0, 5**0.5).log_prob(X[:, 0])
    assert (abs(found.log_evidence - truth.numpy()) < 5 * found.mcse).all()
    assert {*pv.to_datatree(pair, X, draws=4)["observed_data"].data_vars} == {"x"}
    drawn = torch.as_tensor(pv.sample(pair, 4000, seed=1).x.values).flatten()
    assert abs(drawn.mean()) < 5 * (5 / 4000) ** 0.5
    assert abs(drawn.var() - 5) < 5 * 5 * (2 / 4000) ** 0.5
    assert pv.diagnose.sbc(pair, simulations=40, draws=19).sizes["simulation"] == 40


def test_a_model_that_reads_its_data_cannot_be_simulated_around_them_either():
    def reads(x, size=None):
        with rows(x, size):
            z = pyro.sample("z", normal(x).expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(z + x.sum(), 1.0).to_event(1), obs=x)

    with pytest.raises(ModelError, match="computes site x from the values of x"):
        pv.diagnose.sbc(pv.Pair(reads, guide), around=X, simulations=40, draws=19)


class OfModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1).double())

    def model(self, x, size=None):
        with rows(x, size):
            z = pyro.sample("z", normal(x).expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(z + self.bias, 1.0).to_event(1), obs=x)


class OfPyroModule(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1).double())

    def guide(self, x, size=None):
        with rows(x, size):
            pyro.sample("z", dist.Normal(self.slope * x, 0.8).to_event(1))


def test_a_parameter_that_pyro_does_not_see_is_named_beside_a_pyro_module():
    pair = pv.Pair(OfModule().model, OfPyroModule().guide)
    with pytest.raises(SettingsError, match="neither model nor guide registers parameter 'bias'"):
        pv.fit(pair, X, epochs=1, device="cpu", **QUIET)


def test_a_conditioned_pair_knows_what_it_was_trained_on():
    pair = pv.Pair(Handled(nothing, nothing).model, OfPyroModule().guide)
    pv.fit(pair, X, epochs=1, device="cpu", **QUIET)
    assert pair.trained_on is not None
    assert pair.condition({}).trained_on is pair.trained_on


def test_draws_from_the_prior_have_the_contexts_of_all_rows():
    def model(x, size=None, context=None):
        with rows(x, size):
            z = pyro.sample("z", dist.Normal(context, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def of_context(x, size=None, context=None):
        guide(x, size)

    contexts = torch.tensor([[0.0], [100.0], [100.0]]).double()
    tree = pv.to_datatree(pv.Pair(model, of_context), pv.data.Data(X, context=contexts), draws=4, prior_draws=3000)
    for group, name in (("prior", "z"), ("prior_predictive", "x")):
        values = tree[group][name].values.flatten()
        assert values.shape == (3000,)
        assert abs(values.mean() - 200 / 3) < 5 * 47.2 / 3000**0.5


def test_a_global_site_that_does_not_broadcast_over_particles_is_explained():
    def model(x, size=None):
        mean = pyro.sample("mean", normal(x))
        with rows(x, size):
            z = pyro.sample("z", dist.Normal(mean * x.new_ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def own_guide(x, size=None):
        mean = pyro.sample("mean", normal(x, 0.3, 0.1))
        with rows(x, size):
            pyro.sample("z", dist.Normal((x + mean) / 2, 0.5).to_event(1))

    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    with pytest.raises(ModelError, match=r"fails with particles.*mean\.unsqueeze\(-1\)"):
        pv.elbo.ELBO(3).loss(model, own_guide, x)
    assert pv.elbo.ELBO(1).loss(model, own_guide, x) > 0

    def indexes_from_the_left(x, size=None):
        with rows(x, size):
            z = pyro.sample("z", normal(x).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z[:, 0].unsqueeze(-1) * x.new_ones(2), 1.0).to_event(1), obs=x)

    def of_z(x, size=None):
        with rows(x, size):
            pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))

    for ask in (pv.log_evidence, pv.diagnose.khat):
        with pytest.raises(ModelError, match=r"fails with particles.*z\[\.\.\., 0\]"):
            ask(pv.Pair(indexes_from_the_left, of_z), x)


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("the file server is gone", RuntimeError),
        ("can't allocate memory", RuntimeError),
        ("the size of a must match the size of b, with or without particles", ValueError),
    ],
)
def test_other_failures_are_not_blamed_on_particles(reason, kind):
    def breaks(x, size=None):
        raise kind(reason)

    with pytest.raises(kind, match=reason):
        pv.elbo.ELBO(3).loss(breaks, guide, X)


def test_what_cannot_be_traced_is_not_blamed_on_particles():
    class Untraceable(nn.Linear):
        def forward(self, z):
            z.detach().numpy()
            return super().forward(z)

    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        decoder=pv.likelihoods.Normal(Untraceable(1, 1), scale=0.5),
        encoder=pv.posteriors.DiagNormal(nn.Linear(1, 2)),
    )
    with pytest.raises(CompileError, match=r"\.numpy\(\)"):
        pv.fit(vae, X.float(), elbo=pv.elbo.IWAE(3), epochs=3, engine="compiled", **QUIET)


def test_a_missing_context_is_named():
    def model(x, size=None, context=None):
        with rows(x, size):
            pyro.sample("z", dist.Normal(context, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(context, 1.0).to_event(1), obs=x)

    def own_guide(x, size=None, context=None):
        with rows(x, size):
            pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))

    pair = pv.Pair(model, own_guide)
    with pytest.raises(ModelError, match=r"fails on two rows .*; it was called without a context"):
        pv.encode(pair, X)
    pv.encode(pair, X, context=X)
