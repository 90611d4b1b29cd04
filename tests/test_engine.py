"""The compiled step is the eager one: parts, estimators, optimizers, users' own models; and what is refused."""

import copy
import random
from functools import partial
from itertools import cycle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from checks import small_vae
from members import ESTIMATORS, FEATURES, LATENTS, LIKELIHOODS, OBJECTIVES, POSTERIORS, PRIORS
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.messenger import Messenger
from torch import nn

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.engine import graph, optimizers, replay, steps
from pyro_vae.engine.optimizers import WholeOptimizer
from pyro_vae.engine.watch import Watch
from pyro_vae.errors import CompileError, DataError, DivergenceError, ModelError, SettingsError

BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-10}
"""How far parameters may be apart, relative to their size."""

ROWS, BATCH = 40, 16


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


def estimators():
    """Every estimator of the library and Pyro's two; a note's objective is a function."""
    pyros = {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": pv.elbo.TraceMeanField_ELBO}
    own = {"HandDerivedELBO": pv.elbo.HandDerivedELBO, "note_objective": lambda: pv.elbo.note_objective}
    return {**pyros, **own, **ESTIMATORS, **OBJECTIVES}


def vae_of(prior="StandardNormal", likelihood="Normal", posterior="DiagNormal", dtype=torch.float64):
    torch.manual_seed(0)
    parts = PRIORS[prior](), LIKELIHOODS[likelihood](), POSTERIORS[posterior]()
    return pv.VAE(prior=parts[0], decoder=parts[1], encoder=parts[2]).to(dtype)


def data_of(likelihood="Normal", dtype=torch.float64):
    torch.manual_seed(5)
    return LIKELIHOODS[likelihood]().double()(torch.randn(ROWS, LATENTS).double()).sample().to(dtype)


def batch_of(x, step):
    """Now and then a smaller one."""
    return x[BATCH : 2 * BATCH - 4] if step % 10 == 9 else x.roll(step, 0)[:BATCH]


def trained(make, svi_of, give, steps=100, between=None, evaluate=False):
    """Losses and parameters after some steps of ``make() -> (model, guide)``."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = make()
    svi, losses = svi_of(model, guide), []
    torch.manual_seed(1)
    for step in range(steps):
        losses.append(svi.step(*give(step)))
        if between is not None:
            between(svi, step)
        if evaluate and step % 20 == 10:
            losses.append(svi.evaluate_loss(*give(step)))
    parameters = {name: value.detach() for name, value in pyro.get_param_store().named_parameters()}
    return torch.tensor(losses, dtype=torch.float64), {n: p.clone() for n, p in parameters.items()}, svi


def apart(first, second):
    """How far two sets of parameters are apart, relative to each tensor's size."""
    pairs = zip(first.values(), second.values(), strict=True)
    return max(((a - b).norm() / a.norm().clamp(min=1e-2)).item() for a, b in pairs)


def both(make, give, optim=adam, loss=Trace_ELBO, backend="eager", clip_norm=None, **kwargs):
    """The same training by Pyro's SVI and compiled."""

    def eager(model, guide):
        made = optim() if getattr(optim, "pyros", False) else WholeOptimizer(optim, clip_norm)
        return SVI(model, guide, made, loss())

    def compiled(model, guide):
        made = optim() if getattr(optim, "pyros", False) else optim
        return pv.CompiledSVI(model, guide, made, loss(), backend=backend, clip_norm=clip_norm)

    return trained(make, eager, give, **kwargs), trained(make, compiled, give, **kwargs)


def assert_same(pair, bound=1e-10):
    (losses, parameters, _), (own_losses, own, svi) = pair
    assert svi._replays._made, "it was compiled"
    assert losses.tolist() == pytest.approx(own_losses.tolist(), rel=bound, abs=bound * losses.abs().max().item())
    assert apart(parameters, own) < bound


def pair_of(vae, x, **kwargs):
    def make():
        chosen = vae()
        make.vae = chosen
        return chosen.model, chosen.guide

    return both(make, lambda step: (batch_of(x, step), ROWS), **kwargs)


# -- every part, every estimator

TRIPLES = list(zip(cycle(PRIORS), LIKELIHOODS, cycle(POSTERIORS), strict=False))


def test_the_table_holds_every_part():
    for column, table in enumerate((PRIORS, LIKELIHOODS, POSTERIORS)):
        assert {row[column] for row in TRIPLES} == set(table)


@pytest.mark.parametrize(("prior", "likelihood", "posterior"), TRIPLES)
def test_every_part_trains_the_same(prior, likelihood, posterior):
    assert_same(pair_of(lambda: vae_of(prior, likelihood, posterior), data_of(likelihood)))


@pytest.mark.parametrize("name", estimators())
def test_every_estimator_trains_the_same(name):
    assert_same(pair_of(vae_of, data_of(), loss=estimators()[name]))


@pytest.mark.parametrize("vectorized", [True, False])
def test_several_particles_train_the_same(vectorized):
    loss = partial(Trace_ELBO, num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1 + vectorized)
    assert_same(pair_of(vae_of, data_of(), loss=loss))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_compiled_by_inductor_it_trains_the_same(dtype):
    vae = partial(vae_of, "Flow", "Normal, a scale per feature", "DiagNormal", dtype)
    assert_same(pair_of(vae, data_of(dtype=dtype), backend="inductor", evaluate=True), BOUNDS[dtype])
    assert not torch._inductor.config.fallback_random, "what the engine sets is set for its own compiling only"


ONE_BY_ONE = (
    [("prior", name) for name in PRIORS]
    + [("likelihood", name) for name in LIKELIHOODS]
    + [("posterior", name) for name in POSTERIORS]
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("kind", "name"), ONE_BY_ONE)
def test_every_part_compiled_by_inductor(kind, name, dtype):
    x = data_of(name if kind == "likelihood" else "Normal", dtype)
    assert_same_parameters(pair_of(partial(vae_of, **{kind: name}, dtype=dtype), x, backend="inductor"), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", estimators())
def test_every_estimator_compiled_by_inductor(name, dtype):
    pair = pair_of(partial(vae_of, dtype=dtype), data_of(dtype=dtype), backend="inductor", loss=estimators()[name])
    assert_same_parameters(pair, dtype)


def assert_same_parameters(pair, dtype):
    """Where a loss passes through zero, its relative difference says nothing in single precision."""
    assert apart(pair[0][1], pair[1][1]) < BOUNDS[dtype]


# -- optimizers

X = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def two_latents():
    """A user's own model: a global and a local latent, parameters with constraints, nothing of this library."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(FEATURES), 1.0).to_event(1))
        scale = pyro.param("scale", x.new_tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            own = pyro.sample("own", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(own, scale).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", x.new_zeros(FEATURES))
        spread = pyro.param("spread", x.new_ones(FEATURES), constraint=constraints.positive)
        slope = pyro.param("slope", x.new_zeros(FEATURES))
        pyro.sample("mean", dist.Normal(loc, spread).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("own", dist.Normal(slope * x, 0.5).to_event(1))

    return model, guide


def pyros(make):
    make.pyros = True
    return make


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_the_same(name):
    assert_same(both(two_latents, lambda step: (X,), optim=OPTIMIZERS[name], steps=30))


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
    pair = both(two_latents, lambda step: (X,), optim=optim, between=between, steps=30)
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
        (lambda ps: torch.optim.RMSprop(ps), SettingsError, "the optimizer is RMSprop; Adam, AdamW and SGD"),
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
    with pytest.raises(SettingsError, match="clip_args of their own"):
        pv.CompiledSVI(vae.model, vae.guide, pyro.optim.Adam({}), Trace_ELBO(), clip_norm=1.0)
    with pytest.raises(SettingsError, match="clip_norm is -1"):
        pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), clip_norm=-1)
    with pytest.raises(SettingsError, match="precision is double"):
        pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), precision="double")


# -- users' models, layers that change, estimators that change


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


@pytest.mark.parametrize("backend", ["eager", "inductor"])
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
    assert len(pair[1][2]._replays._made) == 3, "two shapes of the step and one of the loss; none for a new β"


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


# -- how it runs


def test_no_message_passes_pyros_handlers_after_the_first_step(monkeypatch):
    passed = []
    original = Messenger._process_message
    monkeypatch.setattr(Messenger, "_process_message", lambda self, msg: passed.append(msg) or original(self, msg))
    vae, x = vae_of(), data_of()
    svi = pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), backend="eager")
    svi.step(x[:BATCH], ROWS)
    assert passed, "power: the first step is Pyro's own"
    svi.step(x[:BATCH], ROWS)  # traced here
    passed.clear()
    for step in range(9):
        svi.step(batch_of(x, step), ROWS)
    assert not passed


def test_a_handler_around_a_step_is_seen():
    vae, x = vae_of(), data_of()
    svi = pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), backend="eager")
    losses = []
    for scale in (1.0, 1.0, 10.0):
        torch.manual_seed(0)
        with poutine.scale(scale=scale):
            losses.append(svi.step(x))
    assert losses[2] / losses[1] > 5


@pytest.mark.parametrize("batch_size", [16, 40, 7])
def test_run_is_steps_in_a_new_order_at_each_pass(batch_size):
    """Over two data sets side by side; the last batch of a pass is smaller."""

    def paired():
        model, guide = two_latents()
        return (lambda x, y, size: model(x + y)), (lambda x, y, size: guide(x + y))

    def by_steps(model, guide):
        svi, losses = SVI(model, guide, WholeOptimizer(adam), Trace_ELBO()), []
        while len(losses) < 25:
            for index in torch.randperm(ROWS).split(batch_size):
                losses.append(svi.step(X[index], 2 * X[index], ROWS))
        return losses[:25]

    results = []
    for compiled in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(3)
        model, guide = paired()
        if compiled:
            svi = pv.CompiledSVI(model, guide, adam, Trace_ELBO(), backend="eager")
            results.append(svi.run((X, 2 * X), steps=25, batch_size=batch_size, size=ROWS).tolist())
        else:
            results.append(by_steps(model, guide))
    assert results[0] == pytest.approx(results[1], rel=1e-10)


@pytest.mark.parametrize(
    ("data", "steps", "batch_size", "error", "message"),
    [
        ((X, X[1:]), 5, 2, DataError, r"\[39, 40\] rows"),
        (X[:0], 5, 2, DataError, "at least 1"),
        (X, 0, 2, SettingsError, "steps is 0"),
        (X, 5, 41, SettingsError, "batch_size is 41; it must be from 1 to the number of data, 40"),
    ],
)
def test_run_refuses_what_it_cannot_run_on(data, steps, batch_size, error, message):
    vae = small_vae()
    svi = pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO())
    with pytest.raises(error, match=message):
        svi.run(data, steps=steps, batch_size=batch_size)


def test_bfloat16_is_coarser_and_only_on_request():
    losses = {}
    for precision in ("float32", "bf16"):
        vae = vae_of(dtype=torch.float32)
        sgd = torch.optim.SGD(vae.parameters(), lr=1e-4)
        svi = pv.CompiledSVI(vae.model, vae.guide, sgd, Trace_ELBO(), backend="eager", precision=precision)
        torch.manual_seed(0)
        losses[precision] = [svi.step(X.float()) for _ in range(3)]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bf16"] != losses["float32"]


# -- what is refused, with one sentence


def looks_at_a_value(x):
    if x.mean() > 0:
        x = 2 * x
    return two_latents()[0](x)


def draws_in_python(x):
    return two_latents()[0](x * random.random())


def draws_in_numpy(x):
    return two_latents()[0](x + torch.as_tensor(np.random.default_rng().normal(size=FEATURES)))


class Replaces(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(FEATURES, dtype=torch.float64))

    def forward(self, x):
        self.average = 0.9 * self.average + 0.1 * x.mean(0)
        return two_latents()[0](x - self.average)


class Counts(nn.Module):
    calls = 0

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return two_latents()[0](x * (1 + self.calls % 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (looks_at_a_value, r"at test_engine.py:\d+: Python reads a value of a tensor"),
        (draws_in_python, "does something else each time it runs"),
        (draws_in_numpy, "does something else each time it runs"),
        (Replaces(), "Replaces.average gets a new value at every step"),
        (Counts(), "Counts.calls gets a new value at every step"),
    ],
    ids=["value", "random", "numpy", "buffer", "counter"],
)
def test_what_is_not_static_is_refused_and_nothing_has_changed(model, message):
    pyro.clear_param_store()
    svi = pv.CompiledSVI(model, two_latents()[1], adam, Trace_ELBO(), backend="eager")
    svi.step(X)
    before = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    random_state = torch.get_rng_state()
    with pytest.raises(CompileError, match=message):
        svi.step(X)
    assert all(torch.equal(p, before[name]) for name, p in pyro.get_param_store().named_parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(isinstance(b, torch._subclasses.FakeTensor) for b in getattr(model, "buffers", tuple)())


@pytest.mark.parametrize("loss", [RenyiELBO, TraceGraph_ELBO])
def test_estimators_without_a_differentiable_loss_are_refused_by_name(loss):
    with pytest.raises(ModelError, match=f"{loss.__name__} has no differentiable_loss"):
        pv.CompiledSVI(*two_latents(), adam, loss())


def test_enumeration_is_refused_with_its_place():
    svi = pv.CompiledSVI(
        *two_latents(), adam, TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False), backend="eager"
    )
    svi.step(X)
    with pytest.raises(CompileError, match=r"at util.py:\d+: Python reads a value"):
        svi.step(X)


def test_arguments_that_are_new_at_every_step_are_refused(monkeypatch):
    vae = vae_of()
    svi = pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), backend="eager")

    def steps_of_growing_size():
        for size in range(ROWS, ROWS + 30):
            svi.step(X, size)

    monkeypatch.setattr(replay, "MOST_GRAPHS", 3)
    with pytest.raises(CompileError, match="hand over what changes as a tensor"):
        steps_of_growing_size()


def test_a_backend_that_computes_something_else_is_found_out():
    def wrong(module, examples):
        def run(*inputs):
            torch.randn(3)  # noise taken from the same stream
            return module(*inputs)

        return run

    vae = vae_of()
    svi = pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), backend=wrong)
    svi.step(X)
    with pytest.raises(CompileError, match="gives other numbers than the traced one"):
        svi.step(X)


def test_a_backend_that_fails_is_told_in_a_sentence():
    def broken(module, examples):
        raise OSError("no compiler here")

    vae = vae_of()
    svi = pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), backend=broken)
    svi.step(X)
    with pytest.raises(CompileError, match="cannot compile the step: no compiler here"):
        svi.step(X)


# -- planted bugs: each is seen


def stale(monkeypatch):
    """Parameters and state are baked in as they were when traced."""
    original = graph._lifted

    def lifted(module, real):
        made = original(module, real)
        return graph.Graph(made.module, [t.detach().clone() for t in made.captured])

    monkeypatch.setattr(graph, "_lifted", lifted)


def wrong_correction(monkeypatch):
    """Adam's bias correction is one step behind."""
    original = optimizers.Clock.numbers
    monkeypatch.setattr(optimizers.Clock, "numbers", lambda self, ahead: original(self, ahead + 1))


def constant_noise(monkeypatch):
    """The noise of the first step is that of all."""
    original = replay.Replay.__call__

    def again(self, changing, fixed):
        torch.manual_seed(0)
        return original(self, changing, fixed)

    monkeypatch.setattr(replay.Replay, "__call__", again)


def unseen_change(monkeypatch):
    """Changes of what was baked in are not looked for."""
    monkeypatch.setattr(Watch, "changed", lambda self: "")


@pytest.mark.parametrize("plant", [stale, wrong_correction, constant_noise])
def test_a_planted_bug_is_seen(plant, monkeypatch):
    plant(monkeypatch)
    eager, compiled = pair_of(vae_of, X, steps=30)
    assert apart(eager[1], compiled[1]) > 1e-3


def test_a_watch_that_sleeps_is_seen(monkeypatch):
    unseen_change(monkeypatch)
    with pytest.raises(AssertionError):
        test_changed_settings_are_traced_anew()


# -- fit


def quiet_fit(vae, x, **kwargs):
    return pv.fit(vae, x, progress=False, **{"batch_size": BATCH, "epochs": 3, **kwargs})


@pytest.fixture
def traced_only(monkeypatch):
    """``fit`` replays the trace without compiling it, which takes no time."""
    monkeypatch.setattr(steps, "CompiledSVI", partial(pv.CompiledSVI, backend="eager"))


SETTINGS = {
    "plain": {},
    "clipped": {"clip_norm": 1.0},
    "a schedule": {"optimizer": lambda ps: torch.optim.lr_scheduler.ExponentialLR(adam(ps), 0.5)},
    "analytic KL": {"elbo": pv.elbo.AnalyticKL()},
    "context and mask": {"context": X[:, :2], "mask": X > -1},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_fit_gives_the_same_by_both_engines(name, traced_only):
    results = {}
    for engine in ("eager", "compiled"):
        context = 2 if name == "context and mask" else 0
        torch.manual_seed(0)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(LATENTS),
            decoder=pv.likelihoods.Normal(pv.nn.mlp(LATENTS + context, [8], FEATURES), learn_scale=True),
            encoder=pv.posteriors.DiagNormal(pv.nn.mlp(FEATURES + context, [8], 2 * LATENTS)),
        ).double()
        result = quiet_fit(vae, X, engine=engine, **SETTINGS[name])
        assert result.history.attrs["engine"] == engine
        results[engine] = result.history, dict(vae.named_parameters())
    (eager, parameters), (compiled, own) = results["eager"], results["compiled"]
    for column in ("objective", "train_elbo"):
        assert eager[column].values == pytest.approx(compiled[column].values, rel=1e-10)
    assert apart({n: p.detach() for n, p in parameters.items()}, {n: p.detach() for n, p in own.items()}) < 1e-10


def test_a_last_batch_that_is_scaled_wrong_is_seen(traced_only, monkeypatch):
    original = steps.RowArguments.__call__

    def wrong(self, *batch):
        args, kwargs = original(self, *batch)
        return (args[0], args[1] if len(args[0]) == BATCH else BATCH, *args[2:]), kwargs

    monkeypatch.setattr(steps.RowArguments, "__call__", wrong)
    with pytest.raises(AssertionError):
        test_fit_gives_the_same_by_both_engines("plain", None)


def test_fit_compiled_by_inductor_gives_the_same():
    histories = [quiet_fit(vae_of(), X, engine=engine, epochs=2).history for engine in ("eager", "compiled")]
    assert histories[0].train_elbo.values == pytest.approx(histories[1].train_elbo.values, rel=1e-10)


def test_auto_compiles_where_enough_steps_are_left(traced_only, monkeypatch, capsys):
    assert 8000 < steps.steps_that_pay(2e-3) < 20_000
    short = pv.fit(vae_of(), X, epochs=30, batch_size=BATCH)
    assert short.history.attrs["engine"] == "eager"
    assert short.history.attrs["engine_reason"] == "too few steps for compiling to pay"
    assert "ompil" not in capsys.readouterr().err
    monkeypatch.setattr(steps, "COMPILE_SECONDS", 1e-3)
    long = pv.fit(vae_of(), X, epochs=30, batch_size=BATCH)
    assert long.history.attrs["engine"] == "compiled"
    assert "steps of" in long.history.attrs["engine_reason"]
    assert "Compiling the training step" in capsys.readouterr().err
    assert short.history.train_elbo.values == pytest.approx(long.history.train_elbo.values, rel=1e-10)


class Looking(nn.Module):
    """A layer that looks at a value."""

    def forward(self, x):
        return x if x.sum() > -1e9 else 0 * x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": lambda ps: torch.optim.RMSprop(ps, lr=1e-3)}, "the optimizer is RMSprop"),
        ({}, r"at test_engine.py:\d+: Python reads a value"),
    ],
    ids=["optimizer", "model"],
)
def test_fit_goes_on_uncompiled_and_says_why(change, message, traced_only, monkeypatch, capsys):
    def vae():
        made = vae_of()
        if not change:
            made.encoder.net = nn.Sequential(Looking(), made.encoder.net)
        return made

    eager = quiet_fit(vae(), X, epochs=30, engine="eager", **change).history
    monkeypatch.setattr(steps, "COMPILE_SECONDS", 1e-3)
    result = pv.fit(vae(), X, epochs=30, batch_size=BATCH, **change)
    said = " ".join(capsys.readouterr().err.split())
    assert "Training goes on without compiling: the " in said
    with pytest.raises((CompileError, SettingsError), match=message):
        quiet_fit(vae(), X, engine="compiled", **change)
    assert result.history.attrs["engine"] == "eager"
    assert result.history.train_elbo.values.tolist() == eager.train_elbo.values.tolist(), "exactly: it is the same code"


def test_a_divergence_is_found_at_its_step(traced_only):
    def explodes(parameters):
        return torch.optim.SGD(parameters, lr=1e3)

    messages = []
    for engine in ("eager", "compiled"):
        with pytest.raises(DivergenceError) as caught:
            quiet_fit(vae_of(), X, engine=engine, optimizer=explodes, epochs=20)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize(("kwargs", "message"), [({"engine": "fast"}, "engine is 'fast'"), ({"clip_norm": 0}, "clip_")])
def test_fit_refuses_settings_of_the_engine(kwargs, message):
    with pytest.raises(SettingsError, match=message):
        quiet_fit(vae_of(), X, **kwargs)


def test_the_command_line_takes_an_engine(tmp_path, monkeypatch, traced_only):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", X.numpy())
    flags = ["fit", "--data", "data.npy", "--out", "run", "--epochs", "2", "--latent_dim", "2", "--hidden", "[4]"]
    assert main([*flags, "--engine", "compiled"]) == 0
    assert "engine: compiled" in (tmp_path / "run" / "config.yaml").read_text()


# -- on a GPU


@pytest.mark.cuda
def test_on_cuda_it_trains_as_eager_does(cuda):
    results = []
    for compiled in (False, True):
        pyro.clear_param_store()
        vae = vae_of(dtype=torch.float32).to(cuda)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
        x = data_of(dtype=torch.float32).to(cuda)
        torch.manual_seed(1)
        if compiled:
            svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, Trace_ELBO())
            losses = svi.run(x, steps=100, batch_size=BATCH, size=ROWS).tolist()
        else:
            svi, losses = SVI(vae.model, vae.guide, WholeOptimizer(optimizer), Trace_ELBO()), []
            while len(losses) < 100:
                losses += [svi.step(x[index], ROWS) for index in torch.randperm(ROWS, device=cuda).split(BATCH)]
        results.append((losses[:100], {n: p.detach() for n, p in vae.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)


@pytest.mark.cuda
def test_on_cuda_nothing_waits_for_the_gpu_inside_the_loop(cuda):
    vae = vae_of(dtype=torch.float32).to(cuda)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
    svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, Trace_ELBO())
    x = torch.randn(512, FEATURES, device=cuda)
    svi.run(x, steps=200, batch_size=BATCH, size=512)
    torch.cuda.set_sync_debug_mode("error")
    try:
        svi.run(x, steps=320, batch_size=BATCH, size=512)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_on_cuda_streamed_data_give_the_same(cuda, monkeypatch):
    from pyro_vae.engine import feed

    losses = []
    for fits in (True, False):
        monkeypatch.setattr("pyro_vae.engine.cuda.fits", lambda *_, fits=fits: fits)
        vae = vae_of(dtype=torch.float32).to(cuda)
        optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
        torch.manual_seed(1)
        svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, Trace_ELBO())
        losses.append(svi.run(data_of(dtype=torch.float32), steps=60, batch_size=BATCH, size=ROWS).tolist())
    assert feed.Feed is not None
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
