"""Fits in threads take turns and are right; inside Pyro's handlers everything is refused in one sentence."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyro
import pytest
import torch
from helpers.checks import small_vae
from pyro import poutine
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import ModelError

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
quiet_fit = partial(pv.fit, epochs=6, batch_size=8, progress=False, device="cpu", engine="eager")


def weights(vae):
    return torch.cat([value.flatten() for value in vae.state_dict().values()])


class Meeting(nn.Module):
    """A network within whose call a thread lets another one go on."""

    def __init__(self, net, met):
        super().__init__()
        self.net, self.met = net, met

    def forward(self, x):
        self.met.wait(timeout=0.01)
        return self.net(x)


def untrained(seed, met=None):
    vae = small_vae(seed=seed)
    if met is not None:
        vae.encoder.net = Meeting(vae.encoder.net, met)
    return vae


def fitted(vae, seed):
    found = quiet_fit(vae, X, seed=seed)
    return weights(vae), found.history.train_elbo.values


def test_two_fits_in_threads_are_those_of_one_after_the_other():
    alone = [fitted(untrained(seed), seed) for seed in range(3)]
    met = threading.Event()  # never set: a wait that gives way to other threads
    vaes = [untrained(seed, met) for seed in range(3)]
    state = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(fitted, vaes, range(3)))
    for (one, history), (other, again) in zip(alone, together, strict=True):
        assert torch.equal(one, other)
        assert (history == again).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_an_evaluation_beside_a_fit_is_what_it_is_alone():
    vae, trained = small_vae(seed=5), untrained(0, threading.Event())
    alone = pv.log_evidence(vae, X, num_particles=20, progress=False)
    with ThreadPoolExecutor(2) as pool:
        fit = pool.submit(fitted, trained, 0)
        found = pool.submit(pv.log_evidence, vae, X, num_particles=20, progress=False)
        assert found.result().identical(alone)
        assert torch.equal(fit.result()[0], fitted(untrained(0), 0)[0])


CALLS = {
    "fit": lambda vae: quiet_fit(vae, X),
    "log_evidence": lambda vae: pv.log_evidence(vae, X, num_particles=20, progress=False),
    "compare_elbos": lambda vae: pv.compare_elbos(vae, X, {"a": pv.elbo.ELBO()}, draws=2, progress=False),
    "khat": lambda vae: pv.diagnose.khat(vae, X, num_particles=50),
    "sbc": lambda vae: pv.diagnose.sbc(vae, simulations=20, draws=9),
}
HANDLERS = {
    "trace": poutine.trace,
    "scale": partial(poutine.scale, scale=0.5),
    "block": poutine.block,
    "plate": partial(pyro.plate, "outer", 3),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("call", CALLS)
def test_inside_a_handler_it_is_refused(call, handler):
    vae = small_vae()
    before = weights(vae)
    with (
        HANDLERS[handler](),
        pytest.raises(ModelError, match=r"inside a handler of Pyro \(\w+\), .*; call this function outside"),
    ):
        CALLS[call](vae)
    assert torch.equal(weights(vae), before)


def test_a_callback_may_fit_another_vae():
    inner = small_vae(seed=1)
    outer = small_vae(seed=0)
    look = pv.callbacks.Callback()
    look.epoch = lambda run: quiet_fit(inner, X, epochs=1)
    quiet_fit(outer, X, seed=0, callbacks=[look])
    assert torch.equal(weights(outer), fitted(untrained(0), 0)[0])
