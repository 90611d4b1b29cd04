"""Estimators with discrete guides, hierarchies of latents and further plates."""

import contextlib
import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import linear_gaussian, loss_and_gradients
from pyro.infer import Trace_ELBO

import pyro_vae as pv
from pyro_vae.elbo import ELBO, IWAE, PIWAE, STL, VIMCO, DReG, ScoreFunction, Thermodynamic, log_weights
from pyro_vae.elbo.estimator import log_mean_exp
from pyro_vae.elbo.log_weights import weigh
from pyro_vae.errors import ModelError

OUTCOMES = torch.tensor([0.0, 1.0], dtype=torch.float64)


class Forced(dist.Bernoulli):
    """A Bernoulli that draws what it is told: each row of the batch another outcome of all particles."""

    outcome: torch.Tensor

    def expand(self, batch_shape, _instance=None):
        new = Forced(logits=self.logits.expand(batch_shape))
        return new

    def sample(self, sample_shape=()):
        return Forced.outcome


def discrete(particles: int):
    """A Bernoulli latent, and every outcome of K particles as a datum of its own; its exact tables of log p and q."""
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=particles)), dtype=torch.float64).T
    Forced.outcome = outcomes
    theta = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
    phi = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=theta[0]))
            pyro.sample("x", dist.Normal(theta[1] * z, 1.0), obs=torch.ones(len(x)).double())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Forced(logits=phi))

    log_q = dist.Bernoulli(logits=phi).log_prob(OUTCOMES)
    log_p = dist.Bernoulli(logits=theta[0]).log_prob(OUTCOMES) + dist.Normal(theta[1] * OUTCOMES, 1.0).log_prob(
        torch.ones(2).double()
    )
    return model, guide, outcomes, (theta, phi), log_p, log_q


@pytest.mark.parametrize(("loss", "target"), [(ScoreFunction(3), "ELBO"), (VIMCO(3), "IWAE")], ids=repr)
def test_score_function_gradients_are_exact_over_all_outcomes(loss, target):
    """The expectation over all 2³ draws of a discrete guide equals the gradient of the expected bound to 1e-12."""
    model, guide, outcomes, leaves, log_p, log_q = discrete(3)
    index = outcomes.long()
    probability = log_q[index].sum(0).exp()
    log_w = (log_p - log_q)[index]
    bound = log_w.mean(0) if target == "ELBO" else log_mean_exp(log_w)
    exact = torch.autograd.grad((probability * bound).sum(), leaves)
    found = loss.bound(loss.weigh(model, guide, torch.zeros(8, 1)))
    assert (found.detach() - bound.detach()).abs().max() < 1e-13
    mine = torch.autograd.grad((probability.detach() * found).sum(), leaves)
    for ours, theirs in zip(mine, exact, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
        assert theirs.abs().max() > 1e-2, "power"


def test_the_thermodynamic_gradient_is_that_of_its_integral():
    """With very many particles of a discrete latent, whose path from q to p is summed exactly."""
    loss = Thermodynamic(200_000, partitions=4, first=0.1)
    model, guide, _, leaves, log_p, log_q = discrete(1)
    torch.manual_seed(0)
    probability = log_q.exp()[1].detach()
    Forced.outcome = torch.bernoulli(probability.expand(200_000, 1))
    bound = loss.bound(loss.weigh(model, guide, torch.zeros(1, 1))).sum()
    log_w = log_p - log_q
    exact = sum(
        (later - beta) * ((log_q + beta * log_w).softmax(0) * log_w).sum()
        for beta, later in itertools.pairwise(loss.betas)
    )
    assert bound.item() == pytest.approx(exact.item(), abs=0.005)
    mine, theirs = (torch.cat([g.flatten() for g in torch.autograd.grad(v, leaves)]) for v in (bound, exact))
    assert (mine - theirs).abs().max() < 0.01
    assert theirs.abs().min() > 0.02, "power"


def test_thermodynamic_is_the_elbo_with_one_partition_and_nears_the_evidence_with_many():
    model = linear_gaussian()
    vae, x = model.as_vae(diagonal=True), model.sample(3)
    one, elbo = (loss_and_gradients(e, vae, x)[0] for e in (Thermodynamic(5, partitions=1), ELBO(5)))
    assert abs(one - elbo) < 1e-11
    few, many = (-loss_and_gradients(Thermodynamic(20_000, partitions=t, first=0.001), vae, x)[0] for t in (3, 200))
    evidence = model.log_marginal(x).sum()
    assert few < many < evidence
    assert evidence - many < 0.02 < 0.05 < evidence - few


def two_latents():
    """A hierarchy z₁ → z₂ → x and a guide z₁, then z₂ given z₁, in plain Pyro."""
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 6).double()
    to_second = torch.nn.Linear(6, 4).double()
    decode = torch.nn.Linear(2, 4).double()

    def model(x, size=None):
        pyro.module("decode", decode)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            first = pyro.sample("first", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            second = pyro.sample("second", dist.Normal(first, 0.7).to_event(1))
            pyro.sample("x", dist.Normal(decode(second), 0.6).to_event(1), obs=x)

    def guide(x, size=None):
        pyro.module("net", net)
        pyro.module("to_second", to_second)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            out = net(x)
            first = pyro.sample("first", dist.Normal(out[..., :2], out[..., 2:4].exp()).to_event(1))
            given = torch.cat([out.expand(*first.shape[:-1], 6)[..., 2:], first], -1)
            loc, log_scale = to_second(given).chunk(2, -1)
            pyro.sample("second", dist.Normal(loc, (0.3 * log_scale).exp()).to_event(1))

    return model, guide, [*net.parameters(), *to_second.parameters(), *decode.parameters()]


def test_two_latents_give_pyros_gradient_and_unbiased_path_gradients():
    """In a hierarchical guide the path goes through z₁ into q(z₂ | z₁) too."""
    model, guide, parameters = two_latents()
    x = torch.randn(3, 4).double()

    def gradient(loss, seed, batch=x):
        torch.manual_seed(seed)
        total = loss.differentiable_loss(model, guide, batch)
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, parameters)])

    assert (gradient(ELBO(), 1) - gradient(Trace_ELBO(), 1)).abs().max() < 1e-11
    many = x.repeat(400, 1)
    for path, naive in ((STL(4), ELBO(4)), (DReG(4), IWAE(4))):
        mine, theirs = (
            torch.stack([gradient(e, s + d, many) for s in range(60)]) for e, d in ((path, 0), (naive, 100))
        )
        error = ((mine.var(0) + theirs.var(0)) / 60).sqrt()
        z = (mine.mean(0) - theirs.mean(0)) / error.clamp(min=1e-12)
        assert z.abs().max() < 5
        assert (theirs.mean(0).abs() / error.clamp(min=1e-12)).max() > 20, "power: the gradient itself stands out"


def test_the_analytic_kl_and_penalties_of_one_latent_refuse_two():
    model, guide, _ = two_latents()
    for loss, name in ((pv.elbo.AnalyticKL(), "AnalyticKL"), (pv.elbo.TCVAE(ELBO()), "TCVAE")):
        with pytest.raises(ModelError, match=f"{name} takes one latent site"):
            loss.loss(model, guide, torch.randn(3, 4).double())


def test_path_gradients_of_two_latents_vanish_at_the_exact_posterior():
    """z₁ ~ N(0,1), z₂ ~ N(z₁,1), x ~ N(z₂,1): q(z₁|x) = N(x/3, 2/3), q(z₂|z₁,x) = N((z₁+x)/2, 1/2)."""
    scales = torch.tensor([1 / 3, 0.5], dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            second = pyro.sample("second", dist.Normal(first, 1.0))
            pyro.sample("x", dist.Normal(second, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(scales[0] * x, (2 / 3) ** 0.5))
            pyro.sample("second", dist.Normal(scales[1] * (first + x), 0.5**0.5))

    x = torch.randn(5).double()
    for loss in STL(3), DReG(3):
        (gradient,) = torch.autograd.grad(loss.differentiable_loss(model, guide, x), scales)
        assert gradient.abs().max() < 1e-12
    (noisy,) = torch.autograd.grad(ELBO(3).differentiable_loss(model, guide, x), scales)
    assert noisy.abs().max() > 0.1
    assert (log_weights(model, guide, x, num_particles=4) - dist.Normal(0 * x, 3**0.5).log_prob(x)).abs().max() < 1e-12


def test_further_plates_inside_the_data_are_summed_over():
    """Two latents per datum in a plate of their own, whichever dimension Pyro gives it."""

    def model(x):
        with pyro.plate("data", len(x)):
            with pyro.plate("inner", 2):
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            pyro.sample("x", dist.Normal(z.sum(0), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), pyro.plate("inner", 2):
            pyro.sample("z", dist.Normal((x / 3).expand(2, 1, -1), (2 / 3) ** 0.5))

    x = torch.randn(5).double()
    w = pv.elbo.IWAE(3).weigh(model, guide, x)
    assert w.log.shape == (3, 5)
    by_hand = torch.stack([site["fn"].log_prob(site["value"]).sum(0) for site in [w.guide_trace.nodes["z"]]]).sum(0)
    assert (w.posterior - by_hand).abs().max() < 1e-12


@pytest.mark.parametrize("loss", [ScoreFunction(3), VIMCO(3)], ids=repr)
def test_score_function_gradients_stay_exact_with_the_kl_weighted(loss):
    """The score is that of q as it is, whatever β."""
    model, guide, outcomes, leaves, log_p, log_q = discrete(3)
    index = outcomes.long()
    theta = leaves[0]
    log_prior = dist.Bernoulli(logits=theta[0]).log_prob(OUTCOMES)
    log_w = ((log_p - log_prior) + 0.5 * (log_prior - log_q))[index]
    bound = log_w.mean(0) if isinstance(loss, ScoreFunction) else log_mean_exp(log_w)
    exact = torch.autograd.grad((log_q[index].sum(0).exp() * bound).sum(), leaves, retain_graph=True)
    weighted = pv.elbo.Beta(loss, 0.5)
    found = weighted.bound(weighted.weigh(model, guide, torch.zeros(8, 1)))
    mine = torch.autograd.grad((log_q[index].sum(0).exp().detach() * found).sum(), leaves)
    for ours, theirs in zip(mine, exact, strict=True):
        assert (ours - theirs).abs().max() < 1e-12
        assert theirs.abs().max() > 1e-2, "power"


def pixels(data_dim, inner_dim):
    """Data in one explicit plate and further draws in another, whichever of them is to the left."""

    def model(x):
        with pyro.plate("data", len(x), dim=data_dim):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            with pyro.plate("inner", 3, dim=inner_dim):
                pyro.sample("x", dist.Normal(z, 0.5), obs=x if data_dim == -2 else x.T)

    def guide(x):
        mean = 4 * x.sum(1) / 13
        with pyro.plate("data", len(x), dim=data_dim):
            pyro.sample("z", dist.Normal(mean if data_dim == -1 else mean.unsqueeze(-1), 0.5))

    return model, guide


@pytest.mark.parametrize(("data_dim", "inner_dim"), [(-1, -2), (-2, -1)])
@pytest.mark.parametrize("loss", [ELBO(4), IWAE(4), DReG(4), PIWAE(4, groups=2)], ids=repr)
def test_plates_with_dimensions_of_their_own(loss, data_dim, inner_dim):
    model, guide = pixels(data_dim, inner_dim)
    x = torch.randn(5, 3).double()
    w = loss.weigh(model, guide, x)
    assert w.log.shape == (4, 5)
    z = w.guide_trace.nodes["z"]["value"].reshape(4, 5)
    by_hand = dist.Normal(z.unsqueeze(-1), 0.5).log_prob(x).sum(-1)
    assert (w.likelihood - by_hand).abs().max() < 1e-12
    loss.differentiable_loss(model, guide, x)


def test_what_stays_outside_the_bound_is_what_all_data_sites_have_in_common():
    """The order of observed sites of different scales is of no account."""
    x = torch.randn(5, 2).double()

    def model(first):
        def run(x):
            with pyro.plate("data", 50, subsample=x):
                z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
                for name in (first, "y" if first == "x" else "x"):
                    with pyro.poutine.scale(scale=0.1 if name == "y" else 1.0):
                        pyro.sample(name, dist.Normal(z, 1.0), obs=x[:, int(name == "y")])

        return run

    def guide(x):
        with pyro.plate("data", 50, subsample=x):
            pyro.sample("z", dist.Normal(x.sum(1) / 3, 0.7))

    def value(loss, first):
        torch.manual_seed(0)
        return loss.loss(model(first), guide, x)

    for loss in ELBO(4), IWAE(4):
        assert abs(value(loss, "x") - value(loss, "y")) < 1e-10
    assert abs(value(ELBO(), "x") - value(Trace_ELBO(), "x")) < 1e-10


@pytest.mark.parametrize("inner", [0, 1, 2, 3])
def test_plates_within_the_data_are_summed_over_however_many_there_are(inner):
    x = torch.randn(*[2] * inner, 5, generator=torch.Generator().manual_seed(1)).double()

    def model(x):
        with pyro.plate("data", x.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            with contextlib.ExitStack() as within:
                for i in range(inner):
                    within.enter_context(pyro.plate(f"within {i}", 2, dim=-2 - i))
                pyro.sample("x", dist.Normal(z, 0.7), obs=x)

    def guide(x):
        with pyro.plate("data", x.shape[-1], dim=-1):
            pyro.sample("z", dist.Normal(x.flatten(0, -2).sum(0) if inner else x, 0.5))

    number = 2**inner
    weights = weigh(model, guide, x, num_particles=3)
    z = weights.guide_trace.nodes["z"]["value"].reshape(3, 5)
    each = x.reshape(number, 5)
    centre = each.sum(0) if inner else each[0]
    said = dist.Normal(z, 0.7).log_prob(each.unsqueeze(1)).sum(0) + dist.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(weights.log, said - dist.Normal(centre, 0.5).log_prob(z))


def test_a_temperature_of_each_datum_is_its_own_wherever_the_data_lie():
    x, temperature = torch.linspace(-1, 1, 5).double(), torch.linspace(0.5, 2, 5).double()

    def parts(dim):
        def along(values):
            return values.reshape(-1, *[1] * (-1 - dim))

        def latent(loc, scale):
            with pyro.poutine.scale(scale=along(temperature)):
                return pyro.sample("z", dist.Normal(loc, scale))

        def model(x):
            with pyro.plate("data", 5, dim=dim):
                z = latent(torch.zeros(()).double(), 1.0)
                pyro.sample("x", dist.Normal(z, 0.7), obs=along(x))

        def guide(x):
            with pyro.plate("data", 5, dim=dim):
                latent(along(x), 0.5)

        return model, guide

    found = []
    for dim in (-1, -2):
        torch.manual_seed(0)
        found.append(weigh(*parts(dim), x, num_particles=3).log)
    torch.testing.assert_close(*found)
