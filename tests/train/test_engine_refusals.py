"""What the engine refuses, in one sentence; and planted bugs, each of which is seen."""

import random

import numpy as np
import pyro
import pytest
import torch
from helpers.engine_checks import ROWS, X, adam, apart, pair_of, two_latents, vae_of
from helpers.members import FEATURES
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import CompileError, ModelError
from pyro_vae.train.compiled import graph, graph_cache, optimizers, replay


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
        (looks_at_a_value, r"at test_engine_\w+.py:\d+: Python reads the value of a tensor"),
        (draws_in_python, "two traces differ"),
        (draws_in_numpy, "two traces differ"),
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


def test_enumeration_by_pyro_is_refused_with_its_place_and_the_estimators_that_compile():
    svi = pv.CompiledSVI(
        *two_latents(), adam, TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False), backend="eager"
    )
    svi.step(X)
    says = r"TraceEnum_ELBO.*cannot be compiled .*at util.py:\d+: Python reads the value.*use ELBO, IWAE"
    with pytest.raises(CompileError, match=says):
        svi.step(X)


def test_arguments_that_are_new_at_every_step_are_refused(monkeypatch):
    vae = vae_of()
    svi = pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), backend="eager")

    def steps_of_growing_size():
        for size in range(ROWS, ROWS + 30):
            svi.step(X, size)

    monkeypatch.setattr(graph_cache, "MOST_GRAPHS", 3)
    with pytest.raises(CompileError, match="pass changing values as tensors"):
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
    with pytest.raises(CompileError, match="give different numbers"):
        svi.step(X)


def test_a_backend_that_fails_is_told_in_a_sentence():
    def broken(module, examples):
        raise OSError("no compiler here")

    vae = vae_of()
    svi = pv.CompiledSVI(vae.model, vae.guide, adam(vae.parameters()), Trace_ELBO(), backend=broken)
    svi.step(X)
    with pytest.raises(CompileError, match="cannot compile the step: no compiler here"):
        svi.step(X)


def stale(monkeypatch):
    """Parameters and state are baked in as they were when traced."""
    original = graph._lift_captures

    def lifted(module, real):
        made = original(module, real)
        return graph.Graph(made.module, [t.detach().clone() for t in made.captured])

    monkeypatch.setattr(graph, "_lift_captures", lifted)


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


@pytest.mark.parametrize("plant", [stale, wrong_correction, constant_noise])
def test_a_planted_bug_is_seen(plant, monkeypatch):
    plant(monkeypatch)
    eager, compiled = pair_of(vae_of, X, steps=30)
    assert apart(eager[1], compiled[1]) > 1e-3
