"""The compiled step is the eager one, for every part and estimator; and how it runs."""

from functools import partial
from itertools import cycle

import pyro
import pytest
import torch
from helpers.checks import mostly_slow, small_vae
from helpers.engine_checks import (
    BATCH,
    BOUNDS,
    ROWS,
    X,
    adam,
    apart,
    assert_same,
    batch_of,
    both,
    data_of,
    estimators,
    pair_of,
    parts_of,
    two_latents,
    vae_of,
)
from helpers.members import LIKELIHOODS, POSTERIORS, PRIORS
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.poutine.messenger import Messenger

import pyro_vae as pv
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.train.compiled import backends, graph
from pyro_vae.train.compiled.optimizers import WholeOptimizer
from pyro_vae.train.compiled.rewrites import cheaper_products

TRIPLES = list(zip(cycle(PRIORS), LIKELIHOODS, cycle(POSTERIORS), strict=False))


def test_the_table_holds_every_part():
    for column, table in enumerate((PRIORS, LIKELIHOODS, POSTERIORS)):
        assert {row[column] for row in TRIPLES} == set(table)


@pytest.mark.parametrize(("prior", "likelihood", "posterior"), mostly_slow(TRIPLES))
def test_every_part_trains_the_same(prior, likelihood, posterior):
    assert_same(pair_of(partial(vae_of, prior, likelihood, posterior), data_of(likelihood)))


def test_a_smaller_batch_now_and_then():
    x = data_of()
    pair = both(lambda: parts_of(vae_of()), lambda step: (batch_of(x, step), ROWS))
    assert_same(pair)
    assert len(pair[1][2]._replays._made) == 2


@pytest.mark.parametrize("name", mostly_slow(estimators(), 2))
def test_every_estimator_trains_the_same(name):
    assert_same(pair_of(vae_of, data_of(), loss=estimators()[name]))


@pytest.mark.parametrize("vectorized", [True, False])
def test_several_particles_train_the_same(vectorized):
    loss = partial(Trace_ELBO, num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1 + vectorized)
    assert_same(pair_of(vae_of, data_of(), loss=loss, steps=30))


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
def test_compiled_by_inductor_it_trains_the_same(dtype):
    vae = partial(vae_of, "Flow", "Normal, a scale per feature", "DiagNormal", dtype)
    pair = pair_of(vae, data_of(dtype=dtype), backend="inductor")
    assert_same(pair, BOUNDS[dtype])
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


def test_products_are_rewritten_up_to_rounding():
    def linear(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias)

    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((128, 128), (8, 128), (8,))]
    traced = graph.trace(linear, inputs).module
    rewritten = cheaper_products(traced)
    operations = [str(node.target) for node in rewritten.graph.nodes]
    assert "aten.addmm.default" not in operations
    assert operations.count("aten.t.default") > [str(node.target) for node in traced.graph.nodes].count(
        "aten.t.default"
    )
    assert torch.allclose(rewritten(*inputs)[0], linear(*inputs), rtol=1e-12, atol=1e-12)


def test_a_product_that_is_rewritten_can_be_flattened():
    """As the gradient of a narrow layer is, before the processes of ``devices=n`` reduce it."""
    inputs = [torch.randn(128, 40), torch.randn(40, 8)]
    rewritten = cheaper_products(graph.trace(lambda a, b: 2 * torch.mm(a, b).flatten(), inputs).module)
    assert torch.allclose(rewritten(*inputs)[0], 2 * (inputs[0] @ inputs[1]).flatten(), atol=1e-4)


def test_small_steps_are_taken_by_one_thread():
    """A product of (n × n) matrices is 2 n³ operations."""
    traced = graph.trace(lambda a, b: torch.mm(a, b).exp().sum(), [torch.randn(50, 50), torch.randn(50, 50)])
    assert traced.flops() == 2 * 50**3
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert backends.threads_for(traced) == 1
        with backends.threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        large = graph.trace(torch.mm, [torch.randn(500, 500), torch.randn(500, 500)])
        assert backends.threads_for(large) == 2
    finally:
        torch.set_num_threads(before)
