"""The updates of a compiled step are those of torch's own optimizers, with every setting."""

from types import SimpleNamespace

import pytest
import torch
from pyro.optim import PyroOptim
from torch.optim import SGD, Adam, AdamW

from pyro_vae.train.compiled import optimizers
from pyro_vae.train.compiled.backends import compiled
from pyro_vae.train.compiled.graph import trace
from pyro_vae.train.compiled.optimizers import Updates, _clipped

DECAY = {"weight_decay": 3.0}
"""At the rate of 0.1 a weight loses 0.3 of itself in a step, so that it counts what decays, when, and by how much."""

SETTINGS = {
    SGD: [
        {},
        DECAY,
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"dampening": 0.3},
        {**DECAY, "momentum": 0.9, "dampening": 0.3},
        {**DECAY, "momentum": 0.9, "nesterov": True},
        {**DECAY, "momentum": 0.9, "maximize": True},
    ],
    Adam: [
        {},
        DECAY,
        {"betas": (0.5, 0.7), "eps": 0.1},
        {**DECAY, "amsgrad": True},
        {**DECAY, "maximize": True},
        {**DECAY, "decoupled_weight_decay": True, "amsgrad": True, "maximize": True},
    ],
    AdamW: [{"weight_decay": 0.0}, DECAY, {**DECAY, "amsgrad": True}, {**DECAY, "maximize": True}],
}
EACH = [(kind, settings) for kind, every in SETTINGS.items() for settings in every]
DAMPENED = SGD, {"momentum": 0.9, "dampening": 0.3}
STEPS, ROWS = 6, 5


class OneForEach(PyroOptim):
    """An optimizer of its own for each parameter, as Pyro's optimizers hold them."""

    def __init__(self, parameters, each):
        super().__init__(SGD, {})
        made = [kind([p], lr=0.1, **settings) for p, (kind, settings) in zip(parameters, each, strict=True)]
        self.optim_objs = dict(zip(parameters, made, strict=True))

    def step(self, gradients):
        for (parameter, optimizer), gradient in zip(self.optim_objs.items(), gradients, strict=True):
            parameter.grad = gradient
            optimizer.step()


def products(a, b):
    """Gradients as those of linear layers are: products of matrices, which a compiler merges with what follows."""
    return [left.T @ right for left, right in zip(a, b, strict=True)]


@pytest.mark.parametrize(
    ("backend", "each"),
    [("eager", EACH), ("inductor", [DAMPENED]), pytest.param("inductor", EACH, marks=pytest.mark.slow)],
    ids=["traced", "compiled, SGD with dampening", "compiled"],
)
def test_every_setting_of_every_optimizer_is_that_of_torch(backend, each):
    """In double precision, after six steps; every setting in one graph, as compiling takes seconds.

    Power: AdamW that decays after its update is seen traced. SGD whose dampening is the alpha of ``add_`` is seen
    compiled: inductor drops alpha where the gradient is a product of matrices.
    """
    assert {*SETTINGS} == {*optimizers.COMPILED}
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in each]
    a, b = (torch.randn(STEPS, len(each), ROWS, n, generator=draw, dtype=torch.float64) for n in (6, 4))
    theirs, own = (OneForEach([p.clone().requires_grad_() for p in start], each) for _ in range(2))
    for optim in (theirs, own):
        optim.step(products(a[0], b[0]))
    updates = Updates(own, list(own.optim_objs))

    def update(numbers, a, b):
        updates.apply(products(a, b), numbers)
        return numbers.sum()

    with torch.no_grad():
        graph = trace(update, [updates.numbers(1)[0], a[1], b[1]])
        run = compiled(graph, [updates.numbers(1)[0], a[1], b[1]], backend)
        for step in range(1, STEPS):
            theirs.step(products(a[step], b[step]))
            run([*graph.captured, updates.numbers(1)[0], a[step], b[step]])
            updates.advance(1)
    for (kind, settings), expected, found in zip(each, theirs.optim_objs, own.optim_objs, strict=True):
        assert (expected - found).abs().max() < 1e-12, (kind.__name__, settings)


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_a_gradient_is_clipped_by_its_norm_and_then_by_value_as_torch_does(size):
    parameter = torch.nn.Parameter(torch.zeros(4).double())
    parameter.grad = size * torch.tensor([3.0, -1.0, 0.5, 0.0]).double()
    ours = _clipped(SimpleNamespace(clip={"clip_norm": 2.0, "clip_value": 1.5}), parameter.grad.clone())
    torch.nn.utils.clip_grad_norm_(parameter, 2.0)
    torch.nn.utils.clip_grad_value_(parameter, 1.5)
    torch.testing.assert_close(ours, parameter.grad, rtol=1e-12, atol=0)
    assert (ours.abs().max() == 1.5) == (size > 1), "power: both limits are met"
