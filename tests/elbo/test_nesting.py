"""Every objective around every estimator, in value and gradient, against tests/helpers/reference_elbos.py."""

import copy
import itertools
import math
import re
from functools import partial
from pathlib import Path

import pyro
import pytest
import torch
from helpers import reference_elbos as reference
from helpers import reference_models
from helpers.members import ESTIMATORS, FEATURES, LATENTS, OBJECTIVES
from test_other_guides import two_latents
from torch import nn

import pyro_vae as pv
from pyro_vae.elbo import TCVAE, Beta, FreeBits, InfoVAE
from pyro_vae.errors import ModelError

PAIRS = [(objective, estimator) for objective in ("none", *OBJECTIVES) for estimator in ESTIMATORS]


def around(objective: str, estimator: str) -> pv.elbo.Estimator:
    """The objective of that row of the table, around the estimator of the other row; a schedule is half-way."""
    inner = ESTIMATORS[estimator]()
    if objective == "none":
        return inner
    outer = copy.copy(OBJECTIVES[objective]())
    outer.elbo, outer.num_particles = inner, inner.num_particles
    for _ in range(2):
        outer.advance()
    return outer


def net(given: int, outputs: int) -> nn.Module:
    return pv.nn.mlp(given, [8], outputs, activation=nn.Tanh)


def vae_with_learned_prior() -> pv.VAE:
    """All of Θ and φ learn, and the prior is not where it began."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.Normal(LATENTS),
        decoder=pv.likelihoods.Normal(net(LATENTS, FEATURES), scale=0.7, learn_scale=True),
        encoder=pv.posteriors.DiagNormal(net(FEATURES, 2 * LATENTS)),
    ).double()
    with torch.no_grad():
        vae.prior.loc += torch.tensor([0.3, -0.2, 0.5])
        vae.prior.log_scale += torch.tensor([0.2, -0.3, 0.1])
    return vae


def papers(loss, of_prior):
    """The reference of an estimator, or of an objective around one."""
    if not hasattr(loss, "elbo"):
        return reference.formula(loss)
    around = partial(OBJECTIVE[type(loss)], inside=reference.formula(loss.elbo))
    if isinstance(loss, Beta):
        return partial(
            around, beta=loss.beta.at(loss.step).item() if isinstance(loss.beta, pv.elbo.Schedule) else loss.beta
        )
    if isinstance(loss, InfoVAE):
        return partial(around, alpha=loss.alpha, weight=loss.weight, of_prior=of_prior)
    return partial(around, nats=loss.nats) if isinstance(loss, FreeBits) else partial(around, beta=loss.beta)


OBJECTIVE = {
    Beta: reference.weighted, FreeBits: reference.free_bits, TCVAE: reference.total_correlation,
    InfoVAE: reference.info_vae,
}  # fmt: skip


def by_reference(loss, vae, x, size, seed):
    """The loss and its gradients by the reference, with the noise that the package draws at that seed."""
    theta, phi = (
        {name: p.detach().clone().requires_grad_() for name, p in part.named_parameters()}
        for part in (vae.model, vae.guide)
    )
    torch.manual_seed(seed)
    noise, of_prior = (torch.randn(loss.num_particles, len(x), LATENTS, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        loc, scale = reference_models.vae(theta, phi, x, (noise,)).encoded(phi)
    model = reference_models.vae(theta, phi, x, (loc + scale * noise,), scale=size / len(x))
    of_prior = (theta["prior.loc"] + theta["prior.log_scale"].exp() * of_prior)[0]
    total, by_theta, by_phi = reference.loss_and_gradients(papers(loss, of_prior), model)
    named = {f"model.{name}": g for name, g in by_theta.items()} | {f"guide.{name}": g for name, g in by_phi.items()}
    return total, named


def by_package(loss, vae, x, size, seed):
    torch.manual_seed(seed)
    value = loss.differentiable_loss(vae.model, vae.guide, x, size)
    named = dict(vae.named_parameters())
    gradients = torch.autograd.grad(value, list(named.values()), materialize_grads=True, allow_unused=True)
    return value.detach(), dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize(("objective", "estimator"), PAIRS)
def test_every_pair_is_the_reference_in_value_and_gradient(objective, estimator):
    vae, x, size = vae_with_learned_prior(), torch.randn(4, FEATURES).double(), 20
    loss = around(objective, estimator)
    value, gradients = by_package(loss, vae, x, size, seed=3)
    right, right_gradients = by_reference(loss, vae, x, size, seed=3)
    assert abs(value - right) < 1e-10 * right.abs()
    for name, gradient in gradients.items():
        assert (gradient - right_gradients[name]).abs().max() < 1e-10 * right_gradients[name].abs().max(), name
    if objective != "none":
        _, plain = by_package(loss.elbo, vae, x, size, seed=3)
        for part in "guide.encoder", "model.prior" if objective != "TCVAE" else "guide.encoder":
            assert max((g - plain[n]).abs().max() for n, g in gradients.items() if n.startswith(part)) > 1e-2, "power"


OUTCOMES: dict[str, torch.Tensor] = {}
"""What guide and prior draw, in tests that go through all that they may draw."""


class Forced(pyro.distributions.Bernoulli):
    """A Bernoulli that draws what it is told."""

    def __init__(self, logits, key):
        self.key = key
        super().__init__(logits=logits)

    def expand(self, batch_shape, _instance=None):
        return Forced(self.logits.expand(batch_shape), self.key)

    def sample(self, sample_shape=()):
        return OUTCOMES[self.key].expand(self.batch_shape)


class Binary:
    """Binary latents of two data: all that prior, decoder and guide need, and sums over every outcome."""

    def __init__(self, latents):
        generator = torch.Generator().manual_seed(4)

        def leaf(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.latents, self.x = latents, torch.randn(2, 1, generator=generator, dtype=torch.float64)
        self.prior, self.slope, self.logits = leaf(latents), leaf(latents, 1), leaf(2, latents)
        self.leaves = [self.prior, self.slope, self.logits]

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Forced(self.prior, "prior").to_event(1))
            pyro.sample("x", pyro.distributions.Normal(z @ self.slope, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Forced(self.logits, "guide").to_event(1))

    def every(self, *shape):
        """All arrays of zeros and ones of this shape."""
        bits = list(itertools.product([0.0, 1.0], repeat=math.prod(shape)))
        return torch.tensor(bits, dtype=torch.float64).reshape(-1, *shape)

    def log_q(self, z):
        return torch.nn.functional.logsigmoid((2 * z - 1) * self.logits)

    def log_p(self, z):
        return torch.nn.functional.logsigmoid((2 * z - 1) * self.prior)

    def expected_gradient(self, loss, prior_draws):
        """Of minus the objective less its estimator, over all draws of two particles of each datum and of the prior."""
        total = [torch.zeros_like(leaf) for leaf in self.leaves]
        inner = Beta(loss.elbo, 1 - loss.alpha) if isinstance(loss, InfoVAE) else loss.elbo
        draws = itertools.product(self.every(2, 2, self.latents), prior_draws)
        for OUTCOMES["guide"], OUTCOMES["prior"] in draws:
            weight = self.log_q(OUTCOMES["guide"]).sum() + self.log_p(OUTCOMES["prior"]).sum()
            w = loss.weigh(self.model, self.guide, self.x)
            penalty = (loss.bound(w) - inner.bound(w)).sum()
            for leaf, gradient in zip(total, self.gradients(penalty), strict=True):
                leaf += weight.exp().detach() * gradient
        return total

    def gradients(self, value):
        return torch.autograd.grad(value, self.leaves, materialize_grads=True, allow_unused=True)


def assert_same_and_there(mine, right, alive):
    for number, (ours, theirs) in enumerate(zip(mine, right, strict=True)):
        assert (ours - theirs).abs().max() < 1e-12
        assert (theirs.abs().max() > 1e-3) == (number in alive), "power"


SCORED = [
    name for name in ESTIMATORS if ESTIMATORS[name]().reweights_latents and ESTIMATORS[name]().least_particles > 1
]


@pytest.mark.parametrize("estimator", SCORED)
def test_the_total_correlation_of_a_discrete_guide_has_the_right_gradient_in_expectation(estimator):
    case, loss = Binary(latents=2), TCVAE(ESTIMATORS[estimator]().with_particles(2), beta=3.0)
    z = case.every(2, 2)
    log_q = torch.stack([case.log_q(z[:, i : i + 1]) for i in range(2)])  # datum, outcome, under datum, latent
    joint = log_q.sum(-1).logsumexp(-1) - math.log(4)
    single = (log_q.logsumexp(2) - math.log(4)).sum(-1)
    mean = sum((log_q[i, :, i].sum(-1).exp() * (joint - single)[i]).sum() for i in range(2)) / 4  # each outcome 4 times
    mine = case.expected_gradient(loss, [torch.zeros(2, 2, 2).double()])
    share = case.log_p(torch.zeros(2, 2, 2).double()).sum().exp().detach()
    assert_same_and_there([g / share for g in mine], case.gradients(-2 * mean), alive={2})


@pytest.mark.parametrize("estimator", SCORED)
def test_the_distance_of_a_discrete_guide_from_its_prior_has_the_right_gradient_in_expectation(estimator):
    case, loss = Binary(latents=1), InfoVAE(ESTIMATORS[estimator]().with_particles(2), alpha=0.4, weight=7.0)
    outcomes = case.every(2, 1)
    mean = sum(
        (case.log_q(z).sum() + case.log_p(of_prior).sum()).exp() * reference.squared_mmd(z, of_prior)
        for z in outcomes
        for of_prior in outcomes
    )
    prior_draws = [torch.stack([draw, torch.zeros_like(draw)]) for draw in outcomes]
    mine = case.expected_gradient(loss, prior_draws)
    unused = case.log_p(torch.zeros(2, 1).double()).sum().exp().detach()  # the prior's second particle is not used
    assert_same_and_there([g / unused for g in mine], case.gradients(-2 * 6.4 * mean), alive={0, 2})


@pytest.mark.parametrize("estimator", SCORED)
def test_free_bits_of_a_discrete_guide_floor_its_closed_kl(estimator):
    case = Binary(latents=2)
    OUTCOMES["guide"] = torch.ones(2, 2, 2).double()
    q, p = case.logits.sigmoid(), case.prior.sigmoid()
    kl = (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean(0)
    loss = FreeBits(ESTIMATORS[estimator]().with_particles(2), nats=kl.mean().item())
    w = loss.weigh(case.model, case.guide, case.x)
    mine = case.gradients((loss.bound(w) - loss.elbo.bound(w)).sum())
    assert_same_and_there(mine, case.gradients(-2 * (kl.mean().detach() - kl).clamp(min=0).sum()), alive={0, 2})


PAGE = (Path(__file__).resolve().parents[2] / "docs" / "comparing_estimators.md").read_text(encoding="utf-8")


def table_of_pairs():
    """What the docs say of each objective and estimator, by their classes."""
    heading, _, *rows = re.search(r"(\| objective \|.*?)\n\n", PAGE, re.DOTALL)[1].splitlines()
    columns = [cell.strip().split(", ") for cell in heading.strip("|").split("|")[1:]]
    for row in rows:
        objective, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        yield from ((objective, name, said) for names, said in zip(columns, cells, strict=True) for name in names)


def accepts(loss, model, guide, x):
    """Whether a pair is taken; if not, it is refused in a sentence."""
    try:
        return bool(loss.differentiable_loss(model, guide, x).isfinite())
    except ModelError:
        return False


def test_the_docs_say_which_pairs_nest():
    kinds = {name.split(",")[0]: name for name in OBJECTIVES}, {name.split(",")[0]: name for name in ESTIMATORS}
    said = {(objective, estimator): cell for objective, estimator, cell in table_of_pairs()}
    assert set(said) == set(itertools.product(*kinds)), "a row and a column for each class"
    vae, several, binary = vae_with_learned_prior(), two_latents()[:2], Binary(latents=2)
    OUTCOMES.update(guide=torch.ones(2, 2).double(), prior=torch.zeros(2, 2).double())
    for (objective, estimator), cell in said.items():
        loss = around(kinds[0][objective], kinds[1][estimator])
        assert accepts(loss, vae.model, vae.guide, torch.randn(3, FEATURES).double())
        assert accepts(loss, *several, torch.randn(3, 4).double()) == cell.startswith("any number"), (loss, "several")
        assert accepts(loss, binary.model, binary.guide, binary.x) == cell.endswith("discrete too"), (loss, "discrete")
