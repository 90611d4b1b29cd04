"""A class that is known for some data and summed out for the others, against mixtures of linear-Gaussian models."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.elbo import CIWAE, ELBO, IWAE, M2, MIWAE, STL, Beta, DReG, Renyi, ScoreFunction
from pyro_vae.errors import ModelError, SettingsError

CLASSES, NOISE = 3, 0.7


def components() -> list[pv.exact.LinearGaussian]:
    generator = torch.Generator().manual_seed(6)
    weights, biases = (torch.randn(CLASSES, 4, k, generator=generator, dtype=torch.float64) for k in (2, 1))
    return [pv.exact.LinearGaussian(w, b.squeeze(-1), NOISE) for w, b in zip(weights, biases, strict=True)]


SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def log_joint(x: Tensor) -> Tensor:
    """log p(x, y) of each class, z integrated out, shape ``(class, datum)``."""
    return torch.stack([part.log_marginal(x) for part in components()]) + SHARES.log().unsqueeze(1)


class Mixture(pyro.nn.PyroModule):
    """y ~ Categorical, z ~ N(0, I), x ~ N(W_y z + b_y, s² I); q(z|x, y) is exact, or wider by a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        parts = components()
        self.weight = nn.Parameter(torch.stack([part.weight for part in parts]))
        self.bias = nn.Parameter(torch.stack([part.bias for part in parts]))
        precision = self.weight.mT @ self.weight / NOISE**2 + torch.eye(2).double()
        self.covariance = torch.linalg.inv(precision).detach()
        self.gain = nn.Parameter((self.covariance @ self.weight.mT / NOISE**2).detach())
        self.center = self.bias.detach().clone()
        self.factor = nn.Parameter(torch.tensor(factor).double())
        self.classifier = nn.Linear(4, CLASSES).double()

    def model(self, x, size=None, labels=None):
        pyro.module("mixture", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            y = pyro.sample("y", dist.Categorical(SHARES))
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            mean = (self.weight[y] @ z.unsqueeze(-1)).squeeze(-1) + self.bias[y]
            pyro.sample("x", dist.Normal(mean, NOISE).to_event(1), obs=x)
            if labels is not None:
                known = nn.functional.one_hot(y, CLASSES).double().log()
                label = dist.Categorical(logits=known).mask(labels[:, 0] >= 0)
                pyro.sample("label", label, obs=labels[:, 0].clamp(min=0))

    def guide(self, x, size=None, labels=None):
        pyro.module("mixture", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            y = pyro.sample("y", dist.Categorical(logits=self.classifier(x)), infer={"enumerate": "parallel"})
            at = (self.gain[y] @ (x - self.center[y]).unsqueeze(-1)).squeeze(-1)
            pyro.sample("z", dist.MultivariateNormal(at, self.factor * self.covariance[y]))


def pair(factor: float = 1.0) -> pv.Pair:
    pyro.clear_param_store()
    torch.manual_seed(0)
    both = Mixture(factor)
    return pv.Pair(both.model, both.guide)


@pytest.fixture
def x():
    return torch.cat([part.sample(4) for part in components()])


@pytest.fixture
def labels():
    return torch.tensor([0, -1, -1, 0, 1, -1, -1, -1, 2, 2, -1, -1]).double().unsqueeze(1)


def evidence(x: Tensor, labels: Tensor | None = None) -> Tensor:
    log = log_joint(x)
    if labels is None:
        return log.logsumexp(0)
    known = labels[:, 0].long()
    return torch.where(known >= 0, log.gather(0, known.clamp(min=0).unsqueeze(0))[0], log.logsumexp(0))


@pytest.mark.parametrize("method", ["iw", "psis"])
def test_the_evidence_sums_the_class_out_or_takes_the_label(method, x, labels):
    truth, data = evidence(x, labels).numpy(), pv.data.Data(x, context=labels)
    found = pv.log_evidence(pair(), data, method=method, num_particles=30)
    np.testing.assert_allclose(found.log_evidence, truth, atol=1e-10)
    assert (pv.diagnose.khat(pair(), data).khat == 0).all()
    wide = pv.log_evidence(pair(1.5), data, method=method, num_particles=4000)
    assert (abs(wide.log_evidence - truth) < 5 * wide.mcse).all()
    assert (wide.mcse > 1e-3).all(), "power"
    np.testing.assert_allclose(pv.log_evidence(pair(), x, num_particles=2).log_evidence, evidence(x), atol=1e-10)


@pytest.mark.parametrize("loss", [ELBO(2), IWAE(4), MIWAE(4, groups=2), CIWAE(4), Renyi(4)], ids=str)
def test_where_the_guide_is_exact_every_bound_is_the_evidence(loss, x, labels):
    """And the gradient by the model that of log p(x), in a minibatch that stands for 60."""
    both, rows = pair(), slice(1, 6)
    value = loss.differentiable_loss(both.model, both.guide, x[rows], 60, labels[rows])
    assert float(value.detach()) == pytest.approx(-12 * float(evidence(x, labels)[rows].sum()), abs=1e-9)


def q_of(both: pv.Pair, x: Tensor) -> Tensor:
    return both.guide.owner.classifier(x).log_softmax(-1).T


def test_m2_is_its_formula(x, labels):
    both = pair()
    log_q, known = q_of(both, x), labels[:, 0].long()
    unlabelled = (log_q.exp() * (log_joint(x) - log_q)).sum(0)
    row = torch.arange(len(x))
    labelled = log_joint(x)[known.clamp(min=0), row] + 7 * log_q[known.clamp(min=0), row]
    truth = torch.where(known >= 0, labelled, unlabelled)
    value = M2(3, weight=7.0).differentiable_loss(both.model, both.guide, x, 36, labels)
    torch.testing.assert_close(value, -3 * truth.sum())
    by = list(both.guide.owner.classifier.parameters())
    torch.testing.assert_close(torch.autograd.grad(value, by), torch.autograd.grad(-3 * truth.sum(), by))
    assert (unlabelled < evidence(x) - 0.01).all(), "power: q(y|x) is not the posterior"


def test_m2_without_labels_is_pyros_enumerated_elbo(x):
    """The same noise, the same loss and gradient, in minibatches, of a guide that is not exact."""
    found = []
    for loss in (M2(), TraceEnum_ELBO(max_plate_nesting=1)):
        both = pair(1.4)
        torch.manual_seed(0)
        value = loss.differentiable_loss(both.model, both.guide, x, 60)
        found.append([value.detach(), *torch.autograd.grad(value, list(both.parameters()))])
    torch.testing.assert_close(found[0], found[1])


def test_classes_are_those_of_bayes_rule(x, labels):
    truth = log_joint(x).softmax(0).T
    found = pv.classify(pair(), x)
    np.testing.assert_allclose(found.probability, truth, atol=1e-10)
    np.testing.assert_allclose(found.guide_probability, q_of(pair(), x).exp().T.detach())
    assert found.predicted.values.tolist() == truth.argmax(1).tolist()
    wide = pv.classify(pair(1.6), x, num_particles=2000)
    assert (abs(wide.probability - truth.numpy()) < 5 * wide.probability_se + 1e-9).all()
    repeats = np.stack([pv.classify(pair(1.6), x, num_particles=50, seed=s).probability for s in range(100)])
    claimed = pv.classify(pair(1.6), x, num_particles=50).probability_se
    ratio = repeats.std(0) / claimed.values
    assert 0.8 < float(np.median(ratio)) < 1.25
    known = pv.classify(pair(), pv.data.Data(x, context=labels))
    given = known.probability.values[labels[:, 0] >= 0]
    np.testing.assert_allclose(given.max(1), 1)


def test_a_datatree_draws_the_class(x):
    """By psis they are those of the posterior; the guide's own differ (power)."""
    tree, truth = pv.to_datatree(pair(), x, draws=4000, posterior="psis", proposals=20_000), log_joint(x).softmax(0)
    assert tree["posterior"].y.dims == ("chain", "draw", "datum")
    for name, expected in (("psis", truth.numpy()), ("guide", q_of(pair(), x).exp().detach().numpy())):
        tree = pv.to_datatree(pair(), x, draws=4000, posterior=name, proposals=20_000)
        shares = np.stack([(tree["posterior"].y[0] == c).mean("draw") for c in range(CLASSES)])
        assert abs(shares - expected).max() < 0.06
    assert abs(q_of(pair(), x).exp() - truth).max() > 0.3


def test_estimators_of_the_class_summed_out_are_compared(x):
    table = pv.compare_elbos(pair(), x, {"ELBO": ELBO, "M2": M2}, draws=20)
    values = {name: float(table.elbo.sel(estimator=name).values.squeeze()) for name in ("ELBO", "M2")}
    log_q = q_of(pair(), x).detach()
    assert values["ELBO"] == pytest.approx(float(evidence(x).mean()), abs=1e-9)
    assert values["M2"] == pytest.approx(float((log_q.exp() * (log_joint(x) - log_q)).sum(0).mean()), abs=1e-9)


def test_a_score_has_the_elbo_of_drawn_classes(x):
    found, log_q = pv.score(pair(), x, draws=4000), q_of(pair(), x).detach()
    expected = (log_q.exp() * (log_joint(x) - log_q)).sum(0)
    assert (abs(found.elbo - expected.numpy()) < 5 * found.elbo_mcse + 1e-9).all()


def test_fit_trains_half_labelled_data(x, labels):
    both = pair(1.4)
    data = pv.data.Data(x, context=labels)
    before = pv.train.per_datum_elbo(both, data, num_particles=50).mean()
    fitted = pv.fit(both, data, elbo=M2(weight=2.0), epochs=60, batch_size=5, engine="eager", progress=False,
                    optimizer=lambda p: torch.optim.Adam(p, 0.02), device="cpu")  # fmt: skip
    assert float(fitted.history.train_elbo[-5:].mean()) > float(before) + 0.5
    q = q_of(both, x).argmax(0)
    assert (q == labels[:, 0])[labels[:, 0] >= 0].all()


def test_what_has_no_sum_over_classes_is_refused(x):
    both = pair()
    said = "site y is enumerated, "
    for loss in (STL(), DReG(2), Beta(ELBO(), 2.0), ScoreFunction(2)):
        with pytest.raises(ModelError, match=said):
            loss.loss(both.model, both.guide, x)
    vae = components()[0].as_vae()
    with pytest.raises(ModelError, match="M2 needs an enumerated class; set infer="):
        M2().loss(vae.model, vae.guide, x)
    with pytest.raises(ModelError, match="the guide enumerates no site, but classify needs exactly one"):
        pv.classify(pv.Pair(vae.model, vae.guide), x)
    with pytest.raises(SettingsError, match="M2: weight is -1"):
        M2(weight=-1.0)


def wide(*parts: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)


class Digits(nn.Module):
    """M2 with networks: a class of ten, three latents, grey levels as a Bernoulli's."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = pv.nn.mlp(3 + 10, [64], 64), pv.nn.mlp(64 + 10, [64], 6)
        self.classifier = pv.nn.mlp(64, [64], 10)

    def model(self, x, size=None, label=None):
        pyro.module("digits", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(10)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            of_x = dist.Bernoulli(logits=self.decoder(wide(z, y)), validate_args=False)
            pyro.sample("x", of_x.to_event(1), obs=x)
            if label is not None:
                known = dist.Categorical(logits=y.log()).mask(label[:, 0] >= 0)
                pyro.sample("label", known, obs=label[:, 0].clamp(min=0))

    def guide(self, x, size=None, label=None):
        pyro.module("digits", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            y = pyro.sample("y", dist.OneHotCategorical(logits=self.classifier(x)), infer={"enumerate": "parallel"})
            mean, log_scale = self.encoder(wide(x, y)).chunk(2, -1)
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


@pytest.mark.slow
def test_ten_labels_a_class_and_the_other_digits_beat_these_labels_alone():
    """By more than two standard errors over held-out data, of the paired difference; and q(y|x) is calibrated."""
    from sklearn.linear_model import LogisticRegression

    train, test = pv.data.split(pv.data.digits(), 0.3)
    labels, rng = train.labels.numpy(), np.random.default_rng(0)
    known = np.concatenate([rng.choice(np.flatnonzero(labels == c), 10, replace=False) for c in range(10)])
    context = torch.full((len(labels), 1), -1.0)
    context[known, 0] = train.labels[known].float()
    alone = LogisticRegression(max_iter=2000).fit(train.x[known], labels[known]).predict(test.x)
    pyro.clear_param_store()
    torch.manual_seed(0)
    digits = Digits()
    both = pv.Pair(digits.model, digits.guide)
    pv.fit(both, pv.data.Data(train.x, context=context), elbo=M2(weight=30.0), epochs=60, batch_size=64,
           engine="eager", progress=False, device="cpu", optimizer=lambda p: torch.optim.Adam(p, 3e-3))  # fmt: skip
    found, truth = pv.classify(both, test.x, num_particles=20), test.labels.numpy()
    right = found.guide_probability.values.argmax(1) == truth
    gain = right.astype(float) - (alone == truth)
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5
    assert right.mean() > 0.9
    table = pv.diagnose.reliability(found.guide_probability, truth)
    assert float(table.ece) < 0.06
    assert float(table.ece_se) < 0.02
