"""Every objective around every estimator, in value and gradient, against tests/helpers/reference_bounds.py."""

import copy
import itertools
import math
import re
from pathlib import Path

import pyro
import pytest
import torch
from helpers import reference_bounds as reference
from helpers.members import ESTIMATORS, FEATURES, LATENTS, OBJECTIVES
from test_other_guides import two_latents

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


def vae_with_learned_prior() -> pv.VAE:
    """All of Θ and φ learn, and the prior is not where it began."""
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.Normal(LATENTS),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES), scale=0.7),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES, [8], 2 * LATENTS)),
    ).double()
    with torch.no_grad():
        vae.prior.loc += torch.tensor([0.3, -0.2, 0.5])
        vae.prior.log_scale += torch.tensor([0.2, -0.3, 0.1])
    return vae


class WrittenOut:
    """That VAE in plain torch, with its parameters by name."""

    def __init__(self, x):
        self.x = x

    def net(self, values, parameters, name):
        hidden = torch.relu(values @ parameters[f"{name}.0.weight"].T + parameters[f"{name}.0.bias"])
        return hidden @ parameters[f"{name}.2.weight"].T + parameters[f"{name}.2.bias"]

    def q(self, phi):
        out = self.net(self.x, phi, "guide.encoder.net")
        return out[..., :LATENTS], out[..., LATENTS:].exp()

    def p(self, theta):
        return theta["model.prior.loc"], theta["model.prior.log_scale"].exp()

    def log_likelihood(self, latents, theta):
        mean = self.net(latents[0], theta, "model.decoder.net")
        return reference.normal_log_prob(self.x, mean, torch.tensor(0.7, dtype=torch.float64)).sum(-1)

    def log_prior(self, latents, theta):
        return reference.normal_log_prob(latents[0], *self.p(theta)).sum(-1)

    def log_q(self, latents, phi):
        return reference.normal_log_prob(latents[0], *self.q(phi)).sum(-1)

    def kl(self, theta, phi):
        return reference.normal_kl(self.q(phi), self.p(theta)).sum(-1)


def settings_of(loss):
    """β or 1, and what the objective takes away from the bound of each datum."""
    if isinstance(loss, Beta):
        return (loss.beta.at(loss.step).item() if isinstance(loss.beta, pv.elbo.Schedule) else loss.beta), ""
    if isinstance(loss, InfoVAE):
        return 1 - loss.alpha, "mmd"
    return 1.0, {FreeBits: "free", TCVAE: "tc"}.get(type(loss), "")


def by_reference(formula, loss, vae, x, size, seed):
    """The loss and its gradients by the reference, with the noise that the package draws at that seed."""
    named = {name: p.detach().clone().requires_grad_() for name, p in vae.named_parameters()}
    theta, phi = ({n: p for n, p in named.items() if n.startswith(part)} for part in ("model", "guide"))
    program, k, m = WrittenOut(x), loss.num_particles, len(x)
    t, penalty = settings_of(loss)
    torch.manual_seed(seed)
    noise, of_prior = (torch.randn(k, m, LATENTS, dtype=torch.float64) for _ in range(2))
    loc, scale = program.q(phi)
    z = loc + scale * noise
    bound = reference.surrogate(formula, program, [z], theta, phi, t)
    if penalty == "free":
        bound = bound - reference.free_bits([reference.normal_kl((loc, scale), program.p(theta))], loss.nats)
    if penalty == "tc":
        bound = bound - (loss.beta - 1) * reference.total_correlation(z[0], loc, scale, size)
    if penalty == "mmd":
        prior_loc, prior_scale = program.p(theta)
        distance = reference.squared_mmd(z[0], (prior_loc + prior_scale * of_prior)[0])
        bound = bound - (loss.alpha + loss.weight - 1) * distance
    total = -size / m * bound.sum()
    gradients = torch.autograd.grad(total, list(named.values()), materialize_grads=True)
    return total.detach(), dict(zip(named, gradients, strict=True))


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
    right, right_gradients = by_reference(reference.ESTIMATORS[estimator], loss, vae, x, size, seed=3)
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
    named = {name for names in columns for name in names}
    columns[0] = sorted({name.split(",")[0] for name in ESTIMATORS} - named)  # any other estimator
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
    assert set(said) == set(itertools.product(*kinds)), "a row for each objective, and no class that is not there"
    vae, several, binary = vae_with_learned_prior(), two_latents()[:2], Binary(latents=2)
    OUTCOMES.update(guide=torch.ones(2, 2).double(), prior=torch.zeros(2, 2).double())
    for (objective, estimator), cell in said.items():
        loss = around(kinds[0][objective], kinds[1][estimator])
        assert accepts(loss, vae.model, vae.guide, torch.randn(3, FEATURES).double())
        assert accepts(loss, *several, torch.randn(3, 4).double()) == cell.startswith("any number"), (loss, "several")
        assert accepts(loss, binary.model, binary.guide, binary.x) == cell.endswith("discrete too"), (loss, "discrete")
