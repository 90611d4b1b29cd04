"""A run that was killed and resumed ends with the weights of one that never was, to the bit."""

import copy
import math
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xarray as xr
from helpers.checks import mostly_slow
from helpers.engine_checks import data_of, estimators
from helpers.kills import Kill, Killed
from helpers.members import FEATURES, LATENTS
from pyro.infer import RenyiELBO
from safetensors.torch import load_file
from torch.optim import SGD, Adam, AdamW, lr_scheduler

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.cli.load_run import trained_run
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.data import sources
from pyro_vae.errors import DataError, DivergenceError, OutputError, SettingsError, UnfinishedRunWarning
from pyro_vae.train import run as train_run
from pyro_vae.train import run_state
from pyro_vae.train.callbacks.base import describe_arguments, describe_value
from pyro_vae.train.checkpoint.rotation import locked
from pyro_vae.train.compiled import steps
from pyro_vae.train.fit import adam
from pyro_vae.train.resume import _tell_other_versions

BATCH, EPOCHS = 8, 4  # 40 rows to train on, 5 steps an epoch
X = data_of(dtype=torch.float32)


def vae_of():
    """With running means, and noise besides that of z."""
    torch.manual_seed(0)
    encoder = [torch.nn.BatchNorm1d(FEATURES), torch.nn.Dropout(0.1), *pv.nn.mlp(FEATURES, [8], 2 * LATENTS)]
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENTS),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES), learn_scale=True),
        encoder=pv.posteriors.DiagNormal(torch.nn.Sequential(*encoder)),
    )


def trained(folder, *, killed_at=None, resume=False, elbo=pv.elbo.Trace_ELBO, data=X, epochs=EPOCHS, **settings):
    """One process; each is given objects of its own."""
    where = {"checkpoints": pv.Checkpoints(folder, steps=1, minutes=None)} if folder else {}
    if resume:
        where["resume"] = folder
    return pv.fit(
        vae_of(), data, elbo=elbo(), batch_size=BATCH, epochs=epochs, progress=False, device="cpu",
        callbacks=[] if killed_at is None else [Kill(killed_at)], **where, **{"engine": "eager", **settings},
    )  # fmt: skip


def killed(folder, step, **settings):
    with pytest.raises(Killed):
        trained(folder, killed_at=step, **settings)


def same(first, second):
    a, b = first.vae.state_dict(), second.vae.state_dict()
    numbers = [name for name in first.history.data_vars if name != "seconds"]
    return all(torch.equal(a[name], b[name]) for name in a) and first.history[numbers].equals(second.history[numbers])


def resumes_exactly(folder, step, **settings):
    whole = trained(None, **settings)
    killed(folder, step, **settings)
    assert same(whole, trained(folder, resume=True, **settings))


def only_traced(patch):
    patch.setattr(steps, "CompiledSVI", partial(pv.CompiledSVI, backend="eager"))


@pytest.fixture
def traced_only(monkeypatch):
    """Compiled steps are replayed without compiling them, which takes no time."""
    only_traced(monkeypatch)


@pytest.fixture(scope="module")
def wholes():
    """By engine, what comes of a run that was never killed."""
    with pytest.MonkeyPatch.context() as patch:
        only_traced(patch)
        return {engine: trained(None, engine=engine) for engine in ("eager", "compiled")}


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory):
    """A folder of a compiled run that was killed."""
    with pytest.MonkeyPatch.context() as patch:
        only_traced(patch)
        killed(folder := tmp_path_factory.mktemp("killed"), 8, engine="compiled")
    return folder


# Tracing takes seconds, and of each kind of state some members are resumed compiled elsewhere.
ENGINES = pytest.mark.parametrize("engine", ["eager", pytest.param("compiled", marks=pytest.mark.slow)])


@ENGINES
@pytest.mark.parametrize("step", [1, 5, 13])
def test_after_any_step(engine, step, tmp_path, traced_only, wholes):
    killed(tmp_path, step, engine=engine)
    assert same(wholes[engine], trained(tmp_path, engine=engine, resume=True))


@pytest.mark.slow
def test_compiled_by_inductor(tmp_path):
    resumes_exactly(tmp_path, 7, engine="compiled")


OPTIMIZERS = {
    "Adam": partial(Adam, lr=1e-2),
    "fused Adam": partial(Adam, lr=1e-2, fused=True),
    "AMSGrad": partial(Adam, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "AdamW": partial(AdamW, lr=1e-2),
    "SGD": partial(SGD, lr=1e-5),
    "momentum": partial(SGD, lr=1e-5, momentum=0.9),
    "Nesterov": partial(SGD, lr=1e-5, momentum=0.9, nesterov=True, weight_decay=0.1),
}


@ENGINES
@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, 2))
def test_every_compiled_optimizer(engine, name, tmp_path, traced_only):
    resumes_exactly(tmp_path, 8, engine=engine, optimizer=OPTIMIZERS[name], clip_norm=5.0)


OTHERS = [
    name
    for name in torch.optim.__all__
    if isinstance(getattr(torch.optim, name), type) and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
]
"""Those of torch that step alone, on dense parameters of any shape."""


@pytest.mark.parametrize("name", mostly_slow(OTHERS))
def test_every_optimizer_of_torch(name, tmp_path):
    kind = getattr(torch.optim, name)
    resumes_exactly(tmp_path, 8, optimizer=partial(kind, lr=1e-4))


SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=6),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, factor=0.5, patience=0, threshold=10.0, threshold_mode="abs"
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.5, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.5, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
}


@ENGINES
@pytest.mark.parametrize("name", mostly_slow(SCHEDULES))
def test_every_schedule_of_torch(engine, name, tmp_path, traced_only):
    make = SCHEDULES[name]
    resumes_exactly(tmp_path, 13, engine=engine, optimizer=lambda ps: make(Adam(ps, lr=1e-2)))


def test_the_schedules_are_all_of_torchs():
    known = {name for name in lr_scheduler.__all__ if name != "LRScheduler"}
    assert known == set(SCHEDULES)


@ENGINES
@pytest.mark.parametrize("name", mostly_slow(estimators()))
def test_every_estimator(engine, name, tmp_path, traced_only):
    resumes_exactly(tmp_path, 8, engine=engine, elbo=estimators()[name])


def test_an_estimator_that_has_looked_at_the_prior_goes_on_compiled(tmp_path, traced_only):
    """It looks again where a tensor was written to, which a step that is being compiled cannot."""
    resumes_exactly(tmp_path, 8, engine="compiled", elbo=pv.elbo.HandDerivedELBO)


def test_a_schedule_of_the_objective_goes_on(tmp_path):
    make = lambda: pv.elbo.Beta(pv.elbo.ELBO(), pv.elbo.Linear(18))  # noqa: E731
    resumes_exactly(tmp_path, 8, elbo=make)


def test_bfloat16(tmp_path):
    resumes_exactly(tmp_path, 8, precision="bf16")


def test_auto_that_compiles_on_its_way(tmp_path, traced_only, monkeypatch):
    monkeypatch.setattr(steps, "TIMED", 6)
    monkeypatch.setattr(steps, "steps_that_pay", lambda seconds: 2.0)
    for i, step in enumerate([3, 7]):
        resumes_exactly(tmp_path / str(i), step, engine="auto")


def test_one_that_was_stopped_early_is_given_with_its_best_weights(tmp_path):
    def once(**where):
        frozen = partial(SGD, lr=0.0)  # nothing grows, so it stops after `patience` epochs
        return pv.fit(
            vae_of(), X, validation_data=X, batch_size=BATCH, epochs=9, progress=False, device="cpu", optimizer=frozen,
            callbacks=[pv.callbacks.EarlyStopping(patience=2)], **where,
        )  # fmt: skip

    whole, again = once(checkpoints=tmp_path), once(resume=tmp_path)
    assert whole.history.sizes["epoch"] == 3
    assert again.history.attrs["stopped"] == whole.history.attrs["stopped"]
    assert same(whole, again)


@ENGINES
def test_with_a_smaller_last_batch(engine, tmp_path, traced_only):
    for i, step in enumerate([5, 6, 8]):
        resumes_exactly(tmp_path / str(i), step, engine=engine, data=X[:37])


class Counting(torch.nn.Linear):
    """A layer with a buffer that no ``state_dict`` holds, and that training changes."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.seen += 1
        return super().forward(x) / (1 + 0.1 * self.seen)


def test_buffers_that_no_state_dict_holds(tmp_path, monkeypatch):
    made = vae_of

    def counting():
        vae = made()
        vae.encoder.net.append(Counting(2 * LATENTS, 2 * LATENTS))
        return vae

    monkeypatch.setattr(sys.modules[__name__], "vae_of", counting)
    resumes_exactly(tmp_path, 8)


class Trip(pv.callbacks.Callback):
    """Breaks the weights after a step, the first time only that it gets there with the noise that it began with."""

    def __init__(self, step):
        self.every, self.at, self.done = 1, step, False

    def step(self, run):
        if run.step == self.at and not self.done:
            with torch.no_grad():
                next(run.vae.parameters()).fill_(torch.nan)

    def diverged(self, run, error):
        self.done = True
        return False

    def state(self):
        return {}


class Unstable(pv.callbacks.Callback):
    """Breaks the weights at a step, as long as the rate was lowered so often and no oftener; tells of each step."""

    every = 1

    def __init__(self, told, steps, killed_after=9):
        self.told, self.steps, self.killed_after = told, steps, killed_after

    def step(self, run):
        lowered = round(math.log(run.optimizer.param_groups[0]["lr"] / 1e-3, 0.6))
        self.told.append((run.step, lowered))
        if lowered == self.killed_after:
            raise Killed
        if lowered < len(self.steps) and run.step == self.steps[lowered]:
            with torch.no_grad():
                next(run.vae.parameters()).fill_(torch.nan)


@pytest.mark.parametrize("rolled", [True, False])
def test_a_divergence_after_a_resume_goes_back_as_far_as_without(rolled, tmp_path, monkeypatch):
    """To the end of the last epoch, and not to the checkpoint."""

    def ended(folder, callbacks, **settings):
        vae, where = vae_of(), {"checkpoints": pv.Checkpoints(folder, steps=1, minutes=None)} if folder else {}
        callbacks = [*callbacks, *([pv.callbacks.RollBack()] if rolled else [])]
        with nullcontext() if rolled else suppress(DivergenceError):
            pv.fit(
                vae, X, batch_size=BATCH, epochs=EPOCHS, progress=False, device="cpu", engine="eager",
                callbacks=callbacks, **where, **settings,
            )  # fmt: skip
        return vae.state_dict()

    whole = ended(None, [Trip(9)])
    with pytest.raises(Killed):
        ended(tmp_path, [Trip(9), Kill(8)])
    again = ended(tmp_path, [Trip(9)], resume=tmp_path)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize(("second", "times"), [(8, 1), (12, 2)])
def test_one_that_is_killed_after_a_roll_back_does_not_diverge_again(second, times, tmp_path):
    """To a state whose checkpoint was written already: it is written anew, and with what a second one goes back to."""

    def ended(told, killed_after=9, **where):
        vae, unstable = vae_of(), Unstable(told, [9, second], killed_after)
        pv.fit(
            vae, X, batch_size=BATCH, epochs=EPOCHS, progress=False, device="cpu", engine="eager",
            callbacks=[unstable, pv.callbacks.RollBack(0.6)], **where,
        )  # fmt: skip
        return vae.state_dict()

    whole, before, after = [], [], []
    expected = ended(whole)
    with pytest.raises(Killed):
        ended(before, times, checkpoints=pv.Checkpoints(tmp_path, steps=5, minutes=None))
    again = ended(after, resume=tmp_path)
    assert after[0] == before[-1] == ([6, 11][times - 1], times)
    assert after == whole[len(before) - 1 :]
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_longer_than_it_was_begun_with(tmp_path):
    trained(tmp_path, epochs=2)
    assert same(trained(None), trained(tmp_path, resume=True))


def test_one_that_had_ended_is_given_as_it_was(tmp_path):
    whole = trained(tmp_path)
    assert same(whole, trained(tmp_path, resume=True))


def test_a_folder_without_a_checkpoint_is_begun_anew(tmp_path):
    assert same(trained(None), trained(tmp_path, resume=True))


def memoryless(monkeypatch):
    monkeypatch.setattr(run_state, "load_optimizer", lambda optimizer, tree: None)


def other_noise(monkeypatch):
    monkeypatch.setattr(run_state, "set_random_state", lambda tree, device: None)


def other_order(monkeypatch):
    windows = sources.InMemory.windows
    monkeypatch.setattr(
        sources.InMemory, "windows", lambda self, **known: windows(self, **{**known, "seed": known["seed"] + 1})
    )


def first_step_of_pyros(monkeypatch):
    load = steps.Steps.load
    monkeypatch.setattr(steps.Steps, "load", lambda self, state, rows: load(self, {**state, "begun": False}, rows))


@pytest.mark.parametrize("plant", [memoryless, other_noise, other_order, first_step_of_pyros])
def test_what_is_forgotten_is_seen(plant, tmp_path, traced_only, monkeypatch, wholes, killed_once):
    """The power of these tests."""
    shutil.copytree(killed_once, tmp_path / "run")
    plant(monkeypatch)
    assert not same(wholes["compiled"], trained(tmp_path / "run", engine="compiled", resume=True))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"elbo": pv.elbo.AnalyticKL}, "was started with estimator Trace_ELBO, not AnalyticKL"),
        ({"optimizer": partial(SGD, lr=1e-4)}, "was started with optimizer Adam, not SGD"),
        ({"data": X + 1}, "was started with data_hash"),
        ({"data": X[:32]}, "was started with data 40, not 32"),
        ({"seed": 5}, "was started with seed 0, not 5"),
        ({"precision": "bf16"}, "was started with precision float32, not bf16"),
        ({"clip_norm": 0.1}, "was started with clip_norm None, not 0.1"),
        ({"elbo": partial(pv.elbo.Trace_ELBO, num_particles=2)}, "was started with particles 1, not 2"),
        ({"optimizer": partial(Adam, lr=0.1, fused=True)}, r"was started with settings of the optimizer\.lr 0\.001, "),
        ({"optimizer": lambda ps: lr_scheduler.StepLR(adam(ps), 2)}, "was started with schedule .* none, not S"),
        ({"validation_data": X}, "was started with validation data none, not"),
        (
            {"elbo": partial(pv.elbo.Trace_ELBO, vectorize_particles=True)},
            r"the estimator\.vectorize_particles False, n",
        ),
        (
            {"data": pv.data.stream(X)},
            "was started with order of the data in memory, not streamed, 40 rows to a window",
        ),
    ],
)
def test_other_settings_are_refused(other, message, tmp_path):
    killed(tmp_path, 8)
    with pytest.raises(SettingsError, match=message):
        trained(tmp_path, resume=True, **other)


def test_other_blocks_of_the_same_rows_are_refused(tmp_path):
    """They have the same hash, and are visited in another order; another kind of file of the same blocks goes on."""
    killed(tmp_path, 8, data=pv.data.stream(X, block_rows=4))
    with pytest.raises(SettingsError, match=r"order of the data .* of 10 blocks .*, not .* of 8 blocks"):
        trained(tmp_path, resume=True, data=pv.data.stream(X, block_rows=5))
    np.save(tmp_path / "x.npy", X)
    trained(tmp_path, resume=True, data=pv.data.stream(tmp_path / "x.npy", block_rows=4))


def weighted(model, guide, *args, weight, **kwargs):
    return weight * pv.elbo.Trace_ELBO().differentiable_loss(model, guide, *args, **kwargs)


@pytest.mark.parametrize(
    ("make", "name"),
    [(partial(RenyiELBO, num_particles=2), "alpha"), (lambda weight: partial(weighted, weight=weight), "weight")],
)
def test_an_estimator_whose_name_does_not_tell_its_settings_is_refused_with_others(make, name, tmp_path):
    train = partial(pv.fit, data=X, batch_size=len(X), progress=False, engine="eager")
    train(vae_of(), epochs=1, elbo=make(**{name: 0.5}), checkpoints=tmp_path)
    with pytest.raises(SettingsError, match=rf"settings of the estimator\.{name} 0\.5, not 0\.75"):
        train(vae_of(), epochs=2, elbo=make(**{name: 0.75}), resume=tmp_path)
    train(vae_of(), epochs=2, elbo=make(**{name: 0.5}), resume=tmp_path)


def test_another_number_of_threads_is_told_of():
    """The bits of sums depend on it."""
    now, told = {**pv.__about__.versions(), "device": "CPU (2 threads)"}, []
    for device in ("CPU (2 threads)", "CPU (1 thread)"):
        _tell_other_versions(SimpleNamespace(attributes=now), {**now, "device": device}, "run", told.append)
    assert told == [
        "run was started with device CPU (1 thread); with CPU (2 threads) the numbers may differ in the last bits"
    ]


class Own(pv.callbacks.Callback):
    """A user's, which keeps nothing under the names of its arguments, and one of them in no words."""

    def __init__(self, rates, judge=None):
        self.seen, self._all = 0, (rates, judge)

    def epoch(self, run):
        self.seen += 1

    def state(self):
        return {"seen": self.seen}

    def load(self, state):
        self.seen = state["seen"]


def cycle(top):
    return partial(lr_scheduler.OneCycleLR, max_lr=top, total_steps=20)


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (partial(pv.callbacks.RollBack, times=2), pv.callbacks.RollBack, r"callbacks\.RollBack\.times 2, not 3"),
        (partial(pv.callbacks.EMA, 0.9), partial(pv.callbacks.EMA, decay=0.99), r"EMA\.decay 0\.9, not 0\.99"),
        (partial(pv.callbacks.SWA, 1), partial(pv.callbacks.SWA, 2), r"SWA\.start 1, not 2"),
        (partial(Own, [0.1, 0.2]), partial(Own, [0.1, 0.3]), r"Own\.rates \[0\.1, 0\.2\], not \[0\.1, 0\.3\]"),
        (
            partial(pv.callbacks.Schedule, cycle(0.1)),
            partial(pv.callbacks.Schedule, cycle(0.2)),
            r"Schedule\.scheduler",
        ),
        (
            partial(pv.callbacks.Schedule, lambda o: cycle(0.1)(o)),
            partial(pv.callbacks.Schedule, lambda o: cycle(0.2)(o)),
            r"Schedule\.its schedule\.base_lrs \[0\.00",
        ),
        (pv.callbacks.RollBack, partial(Own, []), r"callbacks \['RollBack'\], not \['Own'\]"),
    ],
)
def test_callbacks_of_other_settings_are_refused(then, now, message, tmp_path):
    def train(make, *more, **where):
        return pv.fit(vae_of(), X, batch_size=BATCH, epochs=EPOCHS, progress=False, device="cpu", engine="eager",
                      callbacks=[make(), *more], **where)  # fmt: skip

    with pytest.raises(Killed):
        train(then, Kill(8), checkpoints=pv.Checkpoints(tmp_path, steps=1, minutes=None))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(SettingsError, match=message) as caught:
        train(now, resume=tmp_path)
    assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    assert train(then, resume=tmp_path).history.sizes["epoch"] == EPOCHS


def test_a_callback_of_what_has_no_words_goes_on(tmp_path):
    """An object is another in each process, and so is a function of no name; and one copied is as it was made."""
    own = copy.deepcopy(Own([1.0], judge=np.ones(3)))
    assert describe_arguments(own) == {"rates": "[1.0]", "judge": "ndarray"}
    assert describe_arguments(pickle.loads(pickle.dumps(own))) == describe_arguments(own)  # noqa: S301
    with pytest.raises(Killed):
        pv.fit(vae_of(), X, progress=False, callbacks=[own, Kill(2)], checkpoints=tmp_path, epochs=2, batch_size=8)
    again = Own([1.0], judge=np.zeros(9))
    pv.fit(vae_of(), X, progress=False, callbacks=[again], resume=tmp_path, epochs=2, batch_size=8)
    assert again.seen == 2


class Mode(Enum):
    LOW, HIGH = 1, 2


@pytest.mark.parametrize(
    ("then", "now"),
    [(Mode.LOW, Mode.HIGH), (np.int64(1), np.int64(2)), (np.float32(1), np.float32(2)), ({1}, {2}), (b"a", b"b")],
)
def test_settings_of_other_kinds_are_told_apart(then, now):
    assert describe_value(then) != describe_value(now)
    assert describe_value(copy.deepcopy(then)) == describe_value(then)


def test_equal_settings_are_told_alike():
    assert describe_value({"a": np.float64(0.1), "b": 2}) == describe_value({"b": np.int64(2), "a": 0.1})
    assert describe_value({"x", "y", "z"}) == describe_value(["x", "y", "z"]).replace("[", "{").replace("]", "}")


class Unmade(Own):
    """A user's, which takes another way to be made, and calls something of its own a scheduler."""

    scheduler = "cosine"

    def __new__(cls, *_):
        return object.__new__(cls)


def test_a_callback_of_an_odd_kind_goes_on(tmp_path):
    def train(**where):
        callbacks = [own := Unmade([1.0])]
        pv.fit(vae_of(), X, progress=False, callbacks=callbacks, epochs=2, batch_size=8, **where)
        return own

    train(checkpoints=tmp_path)
    assert train(resume=tmp_path).seen == 2


class NoMethod(pv.callbacks.Callback):
    state = property(lambda _: {})


def test_a_hook_that_is_no_method_is_refused():
    with pytest.raises(SettingsError, match=r"callbacks: NoMethod\.state is not a method; define it as one"):
        pv.fit(vae_of(), X, progress=False, callbacks=[NoMethod()], epochs=1)


def test_a_schedule_of_other_settings_is_refused(tmp_path):
    step = lambda gamma: {"optimizer": lambda ps: lr_scheduler.StepLR(adam(ps), 2, gamma)}  # noqa: E731
    killed(tmp_path, 8, **step(0.5))
    with pytest.raises(SettingsError, match=r"schedule of the learning rate\.gamma 0\.5, not 0\.1"):
        trained(tmp_path, resume=True, **step(0.1))
    trained(tmp_path, resume=True, **step(0.5))


def wider(vae):
    vae.decoder = pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [9], FEATURES), learn_scale=True)


def frozen(vae):
    vae.decoder.net[0].bias.requires_grad_(False)


def of_another_prior(vae):
    vae.prior = pv.priors.Laplace(LATENTS)


def of_another_activation(vae):
    vae.decoder.net[1] = torch.nn.Tanh()


def with_frozen_means(vae):
    vae.encoder.net[0].eval()


def with_other_dropout(vae):
    vae.encoder.net[1].p = 0.5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (wider, DataError, "the architecture differs"),
        (frozen, SettingsError, "was started with frozen parameters"),
        (
            with_frozen_means,
            SettingsError,
            r"was started with parts in evaluation mode \[\], not .*encoder\.net\.0'",
        ),
        (of_another_prior, DataError, "the architecture differs"),
        (of_another_activation, SettingsError, r"vae\.decoder.*net.* torch\.nn\..*, not torch\.nn\.Tanh"),
        (with_other_dropout, SettingsError, r"vae\.encoder.*p 0\.1, not 0\.5"),
    ],
)
def test_another_vae_is_refused(change, error, message, tmp_path, monkeypatch):
    """Also one whose weights have the same shapes."""
    killed(tmp_path, 8)
    vae, before = vae_of(), {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    change(vae)
    monkeypatch.setattr(sys.modules[__name__], "vae_of", lambda: vae)
    with pytest.raises(error, match=message) as caught:
        trained(tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}


def test_a_folder_that_is_not_there_is_refused_and_not_made(tmp_path):
    with pytest.raises(DataError, match="not a folder, so there is no run to resume; pass a run folder"):
        pv.fit(vae_of(), X, progress=False, resume=tmp_path / "tpyo")
    assert not list(tmp_path.iterdir())


class Odd:
    """A factor whose attributes no file holds."""

    def __init__(self):
        self.table = np.ones(3)

    def __call__(self, epoch):
        return self.table[0] * 0.9**epoch


def test_a_state_that_no_file_holds_is_refused_at_the_start_and_only_where_it_is_to_be_kept(tmp_path):
    settings = {"optimizer": lambda ps: lr_scheduler.LambdaLR(Adam(ps), Odd()), "epochs": 2}
    trained(None, **settings)
    with pytest.raises(SettingsError, match="of the state is an ndarray, which cannot be stored"):
        trained(tmp_path, killed_at=1, **settings)


def test_the_rows_of_a_long_history_are_not_copied_each_epoch(monkeypatch):
    kept, shared = train_run.Run.copy_state, []

    def keep(run):
        state = kept(run)
        rows = state["progress"]["epochs"]
        shared.append(rows is not run.epochs and all(a is b for a, b in zip(rows, run.epochs, strict=True)))
        return state

    monkeypatch.setattr(train_run.Run, "copy_state", keep)
    trained(None)
    assert shared == [True] * (1 + EPOCHS)


def test_a_new_run_writes_into_no_others_folder(tmp_path):
    killed(tmp_path, 8)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    with pytest.raises(OutputError, match="already holds checkpoints of a run; resume it with resume="):
        trained(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}


COMMAND = [sys.executable, "-m", "pyro_vae", "fit"]


def weights(folder):
    return load_file(f"{folder}/weights.safetensors")


@pytest.mark.slow
def test_the_command_stops_at_sigterm_and_goes_on(tmp_path, monkeypatch):
    """Seen from outside: two processes end with the weights of one."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X.numpy())
    settings = ["--data", "x.npy", "--hidden", "[4]", "--latent_dim", "2", "--batch_size", "2", "--engine", "eager"]
    assert main(["fit", *settings, "--out", "whole", "--epochs", "40"]) == 0
    process = subprocess.Popen(
        [*COMMAND, *settings, "--out", "stopped", "--epochs", "40", "--checkpoint_steps", "5"],
        stderr=subprocess.DEVNULL,
    )
    while not list(tmp_path.glob("stopped/checkpoints/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert main(["fit", "--resume", "stopped"]) == 0
    whole, stopped = weights("whole"), weights("stopped")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    with xr.open_dataset("stopped/history.nc", engine="h5netcdf") as history:
        assert history.sizes["epoch"] == 40


def test_what_the_command_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--resume", "nowhere"]) == 2
    assert "nowhere: holds no config.yaml; give a run folder" in capsys.readouterr().err
    assert main(["fit", "--resume", "nowhere", "--latent_dim", "3"]) == 2
    assert "unrecognized arguments: --latent_dim 3" in capsys.readouterr().err


def test_a_run_that_went_on_and_was_killed_is_loaded_as_it_had_ended_with_a_warning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X.numpy())
    settings = ["--data", "x.npy", "--hidden", "[4]", "--latent_dim", "2", "--batch_size", "8", "--out", "run"]
    assert main(["fit", *settings, "--epochs", "2"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = pv.load("run").state_dict()
    epoch = train_run.Run._close_epoch

    def close(run, whole):
        epoch(run, whole)
        if len(run.epochs) == 4:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(train_run.Run, "_close_epoch", close)
        with pytest.raises(Killed):
            main(["fit", "--resume", "run", "--epochs", "5", "--checkpoint_steps", "1"])
    message = r"run/weights.safetensors: has the weights of step 8, but the run was resumed, reached step 15 .* or load"
    with pytest.warns(UnfinishedRunWarning, match=message) as told:
        found = pv.load("run")
    assert all(torch.equal(ended[name], value) for name, value in found.state_dict().items())
    newest = pv.load(str(told[0].message).rpartition("or load ")[2]).state_dict()
    trained = {name: value for name, value in newest.items() if "standardize" not in name}
    assert not any(torch.equal(ended[name], value) for name, value in trained.items())
    capsys.readouterr()
    _, again, _, _ = trained_run("run", None)
    assert capsys.readouterr().err.startswith(
        "pyro-vae: run/weights.safetensors: has the weights of step 8, but the run was resumed"
    )
    assert all(torch.equal(ended[name], value) for name, value in again.state_dict().items())
    assert main(["fit", "--resume", "run"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.load("run")


def test_the_folder_is_locked_until_all_is_written(tmp_path, monkeypatch, capsys):
    """Another process that would go on with the run meanwhile is refused."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X.numpy())
    asked, write = [], RunFolder.file

    def file(run, name):
        with pytest.raises(OutputError, match="another run is writing to this folder"), locked(run.path):
            pytest.fail(f"{name} can be written by two")
        asked.append(name)
        return write(run, name)

    monkeypatch.setattr(RunFolder, "file", file)
    settings = ["--data", "x.npy", "--hidden", "[4]", "--latent_dim", "2", "--out", "run"]
    assert main(["fit", *settings, "--epochs", "2"]) == 0
    assert {"config.yaml", "history.nc", "weights.safetensors"} < set(asked)
    assert ".lock" not in capsys.readouterr().out
    assert not list(Path("run").glob(".*"))
    assert main(["fit", "--resume", "run", "--epochs", "3"]) == 0


def test_the_command_goes_on_with_data_that_were_moved(tmp_path, monkeypatch, capsys):
    """To the same rows, wherever they are; to no others, with a checkpoint and before the first."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X.numpy())
    np.save("held.npy", X.numpy()[:9] + 0.5)
    np.save("other.npy", X.numpy() + 1)
    settings = ["--data", "x.npy", "--validation_data", "held.npy", "--hidden", "[4]", "--latent_dim", "2"]
    assert main(["fit", *settings, "--out", "run", "--epochs", "2", "--batch_size", "8"]) == 0
    assert main(["fit", *settings, "--out", "whole", "--epochs", "4", "--batch_size", "8"]) == 0
    Path("elsewhere").mkdir()
    for name in ("x.npy", "held.npy"):
        Path(name).rename(f"elsewhere/{name}")
    again = ["fit", "--resume", "run", "--epochs", "4"]
    here = {"--data": "elsewhere/x.npy", "--validation_data": "elsewhere/held.npy"}
    flags = lambda where: [word for pair in where.items() for word in pair]  # noqa: E731
    shutil.copytree("run", "begun")
    shutil.rmtree("begun/checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for run in ("run", "begun"):
        for where, message in (
            ({}, "x.npy: no longer exists; give its new path with --data"),
            ({"--data": here["--data"]}, "held.npy: no longer exists; give its new path with --validation_data"),
            ({**here, "--data": "other.npy"}, "with data_hash"),
            ({**here, "--validation_data": "other.npy"}, "with validation"),
        ):
            assert main([*again, "--resume", run, *flags(where)]) == 2
            error = capsys.readouterr().err
            assert message in error.splitlines()[-1], (run, where)
            assert "Traceback" not in error
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main([*again, *flags(here)]) == 0
    whole, moved = weights("whole"), weights("run")
    assert all(torch.equal(whole[name], moved[name]) for name in whole)
    assert main([*again, "--epochs", "5"]) == 0, "it is kept where they are"


def test_the_command_streams_a_folder_of_parquet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table").mkdir()
    for i in range(2):
        columns = {f"c{j}": X[20 * i : 20 * i + 20, j].numpy() for j in range(X.shape[1])}
        pq.write_table(pa.table(columns), f"table/{i}.parquet")
    np.save("held.npy", X.numpy() + 1)
    settings = ["fit", "--data", "table", "--epochs", "2", "--batch_size", "8", "--latent_dim", "2"]
    assert main([*settings, "--out", "run"]) == 2
    assert "table: streamed data are not split; name held-out data" in capsys.readouterr().err
    assert main([*settings, "--out", "run", "--validation_data", "held.npy"]) == 0
    with xr.open_dataset("run/history.nc", engine="h5netcdf") as history:
        assert history.attrs["data"] == 40


def test_no_code_of_a_run_folder_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X.numpy())
    assert main(["fit", "--data", "x.npy", "--out", "run", "--epochs", "1", "--latent_dim", "2"]) == 0
    (tmp_path / "run" / "mine.py").write_text("raise SystemExit(99)")
    monkeypatch.chdir(tmp_path / "run")
    assert main(["fit", "--resume", ".", "--epochs", "2"]) == 2
    assert ".: holds code (mine.py), which is never run from a run folder; call the command" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--resume", "run", "--epochs", "2"]) == 0
