"""The compiled step is the eager one, for every optimizer, users' own models and layers that change."""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from helpers.checks import mostly_slow, small_vae
from helpers.engine_checks import (
    BOUNDS,
    X,
    adam,
    apart,
    assert_same,
    both,
    pair_of,
    pyros,
    two_latents,
    vae_of,
)
from helpers.members import FEATURES, LATENTS
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import SettingsError
from pyro_vae.train.compiled.watch import Watch

OPTIMIZERS = {
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01, betas=(0.8, 0.99), eps=1e-4),
    "Adam, fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "Adam, a tensor for lr": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.01, dtype=torch.float64)),
    "Adam, everything": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1, amsgrad=True, maximize=True),
    "Adam, groups": lambda ps: torch.optim.Adam([{"params": ps[:1], "lr": 0.1}, {"params": ps[1:]}], lr=0.01),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-4),
    "SGD, momentum": lambda ps: torch.optim.SGD(ps, lr=1e-4, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "SGD, Nesterov": lambda ps: torch.optim.SGD(ps, lr=1e-4, momentum=0.9, nesterov=True),
    "Pyro's Adam": pyros(lambda: pyro.optim.Adam({"lr": 0.01})),
    "Pyro's Adam, clipped": pyros(lambda: pyro.optim.Adam({"lr": 0.01}, {"clip_norm": 0.5, "clip_value": 0.2})),
    "Pyro's SGD by name": pyros(lambda: pyro.optim.SGD(lambda name: {"lr": 1e-3 if name == "loc" else 1e-4})),
}


@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS))
def test_every_optimizer_trains_the_same(name):
    assert_same(both(two_latents, lambda step: (X,), optim=OPTIMIZERS[name], steps=12))


SCHEDULES = {
    "of torch": (
        lambda ps: torch.optim.lr_scheduler.OneCycleLR(torch.optim.AdamW(ps, lr=0.01), max_lr=0.1, total_steps=50),
        lambda svi, step: svi.optim.made.step(),
    ),
    "of Pyro": (
        pyros(
            lambda: pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8})
        ),
        lambda svi, step: svi.optim.step() if step % 5 == 4 else None,
    ),
    "by hand": (adam, lambda svi, step: svi.optim.optimizer.param_groups[0].update(lr=0.01 / (1 + step))),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_changing_learning_rate(name):
    optim, between = SCHEDULES[name]
    pair = both(two_latents, lambda step: (X,), optim=optim, between=between, steps=15)
    assert_same(pair)
    assert len(pair[1][2]._replays._made) == 1, "and nothing was traced anew"
    constant = both(two_latents, lambda step: (X,), optim=optim, steps=30)
    assert apart(pair[0][1], constant[0][1]) > 1e-3, "power"


def test_gradients_are_clipped_by_their_global_norm():
    sgd = partial(torch.optim.SGD, lr=1e-2)
    pair = both(two_latents, lambda step: (X,), optim=sgd, clip_norm=2.0, steps=30)
    assert_same(pair)
    assert pair[0][0].max() < both(two_latents, lambda step: (X,), optim=sgd, steps=30)[0][0].max(), "it does clip"


def test_the_state_is_torchs_own_and_training_goes_on_from_it():
    """Saved in the middle, it is that of eager training, and loading it goes on as eager training does."""

    def restart(svi, step):
        if step == 9:
            svi.saved = copy.deepcopy(svi.optim.optimizer.state_dict())
        if step == 19:
            svi.optim.optimizer.load_state_dict(svi.saved)

    pair = both(two_latents, lambda step: (X,), between=restart, steps=30)
    assert_same(pair)
    eager, compiled = (svi.optim.optimizer.state_dict()["state"] for _, _, svi in pair)
    for number, state in eager.items():
        for key, value in state.items():
            assert torch.allclose(value, compiled[number][key], rtol=1e-10, atol=1e-12), key
    assert eager[0]["step"] == 20


class Odd(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    ("optim", "error", "message"),
    [
        (lambda ps: torch.optim.RMSprop(ps), SettingsError, "the optimizer is RMSprop; only Adam, AdamW and SGD"),
        (lambda ps: Odd(ps), SettingsError, "the optimizer is Odd;"),
        (lambda ps: torch.optim.LBFGS(ps), SettingsError, "the optimizer is LBFGS;"),
        (lambda ps: torch.optim.SGD(ps, lr=0.1, differentiable=True), SettingsError, "SGD, is differentiable=True"),
    ],
)
def test_another_optimizer_is_refused_by_name(optim, error, message):
    vae = small_vae()
    with pytest.raises(error, match=message):
        pv.CompiledSVI(vae.model, vae.guide, optim(vae.parameters()), Trace_ELBO())


def test_pyros_other_optimizers_and_hooks_are_refused_by_name():
    vae = small_vae()
    with pytest.raises(SettingsError, match="the optimizer is ClippedAdam;"):
        pv.CompiledSVI(vae.model, vae.guide, pyro.optim.ClippedAdam({"lr": 0.1}), Trace_ELBO())
    hooked = adam(vae.parameters())
    hooked.register_step_post_hook(lambda *_: None)
    with pytest.raises(SettingsError, match="Adam, has hooks"):
        pv.CompiledSVI(vae.model, vae.guide, hooked, Trace_ELBO())
    with pytest.raises(SettingsError, match="clip_args of the Pyro optimizer"):
        pv.CompiledSVI(vae.model, vae.guide, pyro.optim.Adam({}), Trace_ELBO(), clip_norm=1.0)
    with pytest.raises(SettingsError, match="clip_norm is -1"):
        pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), clip_norm=-1)
    with pytest.raises(SettingsError, match="precision is 'double'"):
        pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), precision="double")


def auto(kind):
    def make():
        model, _ = two_latents()
        return model, kind(model)

    return make


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(AutoNormal, torch.float64), (AutoMultivariateNormal, torch.float64), (AutoIAFNormal, torch.float32)],
)
def test_autoguides_train_the_same(kind, dtype):
    assert_same(both(auto(kind), lambda step: (X.to(dtype),), steps=40, evaluate=True), BOUNDS[dtype])


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](FEATURES - 1, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, FEATURES - 1]).to_event(2))
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        mean = self.linear(x[:, 1:]).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=x[:, 0])


def test_a_pyro_module_trains_the_same():
    def make():
        model = Regression()
        return model, AutoNormal(model)

    assert_same(both(make, lambda step: (X.float(),), steps=40), 1e-5)


def test_subsampling_inside_the_model_and_a_score_function_train_the_same():
    def model(x):
        rate = pyro.sample("rate", dist.Poisson(3.0))
        with pyro.plate("data", len(x), subsample_size=10) as index:
            pyro.sample("x", dist.Normal(rate * x.new_ones(FEATURES), 1.0).to_event(1), obs=x[index])

    def guide(x):
        pyro.sample("rate", dist.Poisson(pyro.param("rate_q", x.new_tensor(2.0), constraint=constraints.positive)))

    assert_same(both(lambda: (model, guide), lambda step: (X,), steps=40))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dropout_and_batch_norm(backend):
    """Two kinds of noise in each step, and buffers that each step changes; then both in evaluation mode."""

    def vae():
        torch.manual_seed(0)
        encoder = pv.nn.mlp(FEATURES, [8], 2 * LATENTS, norm=partial(nn.BatchNorm1d))
        decoder = pv.nn.mlp(LATENTS, [8], FEATURES, norm=lambda width: nn.Dropout(0.3))
        return pv.VAE(
            prior=pv.priors.StandardNormal(LATENTS),
            decoder=pv.likelihoods.Normal(decoder),
            encoder=pv.posteriors.DiagNormal(encoder),
        ).double()

    def between(svi, step):
        svi.model.train(step < 20)
        svi.guide.train(step < 20)

    sgd = partial(torch.optim.SGD, lr=1e-4, momentum=0.5)
    pair = pair_of(vae, X, optim=sgd, between=between, steps=30, backend=backend)
    assert_same(pair)
    eager, compiled = (dict(svi.guide.named_buffers()) for _, _, svi in pair)
    assert apart({n: b.double() for n, b in eager.items()}, {n: b.double() for n, b in compiled.items()}) < 1e-10
    assert compiled["encoder.net.1.num_batches_tracked"] == 21


class Annealed(Trace_ELBO):
    """A β that grows with the steps, as the schedules of the library count them."""

    def __init__(self, elbo=None):
        super().__init__()
        self.step, self.elbo = torch.zeros(()), elbo

    def differentiable_loss(self, model, guide, *args, **kwargs):
        beta = 0.1 + (self.step / 30).clamp(max=1.0)
        model, guide = (poutine.scale(program, scale=beta) for program in (model, guide))
        if self.elbo is not None:
            return self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        return super().differentiable_loss(model, guide, *args, **kwargs)

    def loss_and_grads(self, model, guide, *args, **kwargs):
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        self.step += 1
        if self.elbo is not None:
            self.elbo.step += 1
        return loss.detach()


@pytest.mark.parametrize("loss", [Annealed, lambda: Annealed(Annealed())], ids=["one", "nested"])
def test_an_estimator_that_changes_with_the_steps(loss):
    pair = pair_of(vae_of, X, loss=loss, steps=50, evaluate=True)
    assert_same(pair)
    counts = [svi.estimator.step for *_, svi in pair if isinstance(svi, pv.CompiledSVI)]
    assert counts == [50]
    assert len(pair[1][2]._replays._made) == 2, "the step and the loss; none for a new β"


def test_changed_settings_are_traced_anew():
    """The structure of a module, a setting of the loss, a frozen parameter: each step is as they are then."""

    def between(svi, step):
        if step == 10:
            svi.guide.encoder.net = nn.Sequential(*svi.guide.encoder.net, nn.Identity())
        if step == 20:
            (getattr(svi, "estimator", None) or svi.loss.__self__).num_particles = 2

    assert_same(pair_of(vae_of, X, between=between, steps=30))


def test_a_parameter_store_that_was_cleared():
    def between(svi, step):
        if step == 10:
            pyro.clear_param_store()

    def make():
        return two_latents()

    eager, compiled = both(make, lambda step: (X,), optim=OPTIMIZERS["Pyro's Adam"], between=between, steps=20)
    assert apart(eager[1], compiled[1]) < 1e-10


def test_a_watch_that_sleeps_is_seen(monkeypatch):
    """A planted bug: changes of what was baked in are not looked for."""
    monkeypatch.setattr(Watch, "changed", lambda self: "")
    with pytest.raises(AssertionError):
        test_changed_settings_are_traced_anew()
