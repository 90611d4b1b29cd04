"""Models as in Pyro's examples and tests, trained by fit and CompiledSVI: the losses of pyro.infer.SVI."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_vae as pv
from pyro_vae.core.device import seeded
from pyro_vae.train.distributed.group import ALONE

N, BATCH, EPOCHS = 50, 10, 20
RATE = 0.01


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return (torch.rand(N, 6, generator=generator) < torch.linspace(0.1, 0.9, 6)).double()


def wide(*parts: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)


def normal(numbers: Tensor) -> dist.Distribution:
    mean, scale = numbers.chunk(2, -1)
    return dist.Normal(mean, scale.exp()).to_event(1)


class Recorded(nn.Module):
    """A model that keeps the batches of the steps, which have a gradient, so that others can take the same."""

    def __init__(self):
        super().__init__()
        self.batches: list[tuple] = []

    def over(self, x, size, *given):
        if torch.is_grad_enabled() and x.dim() == 2 and not isinstance(x, torch._subclasses.FakeTensor):
            self.batches.append((x, size, *given))
        return pyro.plate("data", len(x) if size is None else size, subsample=x)


class Digits(Recorded):
    """As examples/vae/vae.py: a Bernoulli decoder and a normal encoder, each with a softplus layer."""

    def __init__(self):
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 6)).double()
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Softplus(), nn.Linear(5, 4)).double()

    def model(self, x, size=None):
        pyro.module("decoder", self.decoder)
        with self.over(x, size):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(len(x), 2), x.new_ones(len(x), 2)).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x, size=None):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            pyro.sample("latent", normal(self.encoder(x)))


class HalfLabelled(Recorded):
    """As examples/vae/ss_vae_M2.py: the class is observed, where it is given, or a site of both model and guide."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2 + 3, 6).double(), nn.Linear(6 + 3, 4).double()
        self.classifier = nn.Linear(6, 3).double()

    def model(self, x, size=None, label=None):
        pyro.module("all", self)
        with self.over(x, size, *(() if label is None else (label,))):
            y = pyro.sample("y", dist.OneHotCategorical(x.new_ones(3) / 3), obs=label)
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(wide(z, y))).to_event(1), obs=x)

    def guide(self, x, size=None, label=None):
        pyro.module("all", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            y = label
            if label is None:
                q = dist.OneHotCategorical(logits=self.classifier(x))
                y = pyro.sample("y", q, infer={"enumerate": "parallel"})
            pyro.sample("z", normal(self.encoder(wide(x, y))))


class TwoSites(Recorded):
    """As the models of tests/infer/test_gradient.py: scalars, one latent after another, in a plate with subsamples."""

    def __init__(self):
        super().__init__()
        self.loc, self.encoder = nn.Parameter(torch.zeros(6).double()), nn.Linear(6, 4).double()

    def model(self, x, size=None):
        pyro.module("sites", self)
        with self.over(x, size):
            first = pyro.sample("first", dist.Normal(x.new_zeros(()), 1.0))
            second = pyro.sample("second", dist.Normal(first, 1.0))
            pyro.sample("x", dist.Normal(second.unsqueeze(-1) + self.loc, 1.0).to_event(1), obs=x)

    def guide(self, x, size=None):
        pyro.module("sites", self)
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            a, s, b, t = self.encoder(x).unbind(-1)
            pyro.sample("first", dist.Normal(a, s.exp()))
            pyro.sample("second", dist.Normal(b, t.exp()))


LABELS = nn.functional.one_hot(torch.arange(N) % 3, 3).double()
CASES = {
    "vae": (Digits, Trace_ELBO, None),
    "vae, mean field": (Digits, TraceMeanField_ELBO, None),
    "M2, unlabelled": (HalfLabelled, partial(TraceEnum_ELBO, max_plate_nesting=1), None),
    "M2, own estimator": (HalfLabelled, pv.elbo.M2, None),
    "M2, labelled": (HalfLabelled, Trace_ELBO, LABELS),
    "two sites": (TwoSites, Trace_ELBO, None),
    "two sites, own ELBO": (TwoSites, pv.elbo.ELBO, None),
}


COMPILED = {"M2, unlabelled": pv.elbo.M2}
"""What is compiled in the place of an estimator whose step reads numbers in Python, with the same losses."""


def made(kind: type) -> nn.Module:
    pyro.clear_param_store()
    torch.manual_seed(0)
    return kind()


def by_svi(kind: type, loss, batches, seed: int) -> np.ndarray:
    both = made(kind)
    svi = SVI(both.model, both.guide, pyro.optim.Adam({"lr": RATE}), loss())
    with seeded(ALONE.seed(seed), torch.device("cpu")):
        return np.array([float(svi.step(*batch)) for batch in batches])


@pytest.mark.parametrize("case", CASES)
def test_fit_takes_the_steps_of_pyros_svi(case):
    kind, loss, labels = CASES[case]
    both = made(kind)
    data = rows() if labels is None else pv.data.Data(rows(), context=labels)
    settings = {"epochs": EPOCHS, "batch_size": BATCH, "engine": "eager", "progress": False, "device": "cpu"}
    adam = partial(torch.optim.Adam, lr=RATE)
    fitted = pv.fit(pv.Pair(both.model, both.guide), data, elbo=loss(), optimizer=adam, seed=3, **settings)
    assert len(both.batches) == EPOCHS * N // BATCH
    losses = by_svi(kind, loss, both.batches, 3)
    np.testing.assert_allclose(fitted.history.objective, -losses.reshape(EPOCHS, -1).mean(1) / N, rtol=1e-8)
    assert losses[-10:].mean() < losses[:10].mean() - 5, "power"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiled_svi_takes_the_steps_of_pyros_svi(case):
    kind, loss, labels = CASES[case]
    x, both = rows(), made(kind)
    given = [x] if labels is None else [x, labels]
    every = [[value[i : i + BATCH] for value in given] for i in range(0, N, BATCH)] * EPOCHS
    batches = [(first, N, *rest) for first, *rest in every]
    compiled = COMPILED.get(case, loss)()
    svi = pv.CompiledSVI(both.model, both.guide, partial(torch.optim.Adam, lr=RATE), compiled)
    with seeded(ALONE.seed(3), torch.device("cpu")):
        losses = np.array([float(svi.step(*batch)) for batch in batches])
    np.testing.assert_allclose(losses, by_svi(kind, loss, batches, 3), rtol=1e-7)
