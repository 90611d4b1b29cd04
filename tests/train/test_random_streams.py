"""Seeds, epochs, processes and purposes have different streams of random numbers, each of which can be had again."""

from functools import partial

import pytest
import torch
from helpers.checks import small_vae
from pyro.infer import Trace_ELBO
from test_callbacks import StandIn
from torch.utils.data import DataLoader

import pyro_vae as pv
from pyro_vae.core.device import derive_seed, make_generator, seeded
from pyro_vae.core.rows import Rows
from pyro_vae.data.sources import InMemory, permutation
from pyro_vae.train import run as train_run
from pyro_vae.train.callbacks import RollBack
from pyro_vae.train.distributed.group import Group

CPU = torch.device("cpu")
SEEDS = 0, 1, 2, 12345, 2**32, 2**40, -1
"""Among them such that torch's generator on a CPU, which keeps 32 bits, does not tell from 0."""

N, BATCH, EPOCHS = 40, 8, 3
X = torch.cat([torch.arange(N).unsqueeze(1), torch.zeros(N, 5)], 1).double()
"""Rows whose first column is their number."""

frozen = partial(torch.optim.SGD, lr=0.0)
quiet_fit = partial(pv.fit, progress=False, device="cpu")


def stream():
    """Where the generator stands, as something that can be compared."""
    return bytes(torch.get_rng_state().numpy())


class Seen:
    """A loss that notes the rows of each step, and where the generator stands before it."""

    def __init__(self):
        self.rows, self.streams = [], []

    def __call__(self, model, guide, x, *rest):
        self.rows += x[:, 0].long().tolist()
        self.streams.append(stream())
        return Trace_ELBO().differentiable_loss(model, guide, x, *rest)


def watched(seed, data=X, **settings):
    """What a training of a few epochs sees: the orders of its epochs, and the stream of its noise."""
    seen = Seen()
    settings = {"optimizer": frozen, "batch_size": BATCH, "epochs": EPOCHS, **settings}
    quiet_fit(small_vae(), data, elbo=seen, seed=seed, engine="eager", **settings)
    return [tuple(epoch) for epoch in torch.tensor(seen.rows).view(-1, N).tolist()], seen.streams[0]


LOADED = {
    "in memory": lambda: X,
    "streamed": lambda: pv.data.stream(lambda: iter(X.split(10)), size=N),
    "loaded": lambda: pv.data.stream(DataLoader(X, batch_size=10, shuffle=True), window_bytes=1),
}


@pytest.mark.parametrize("kind", LOADED)
def test_each_seed_and_epoch_has_an_order_of_its_own(kind):
    """Power: by ``seed * 2**32 + epoch`` the CPU had one order for all of these seeds."""
    orders = [watched(seed, LOADED[kind]())[0] for seed in SEEDS]
    flat = [order for epochs in orders for order in epochs]
    assert all(sorted(order) == list(range(N)) for order in flat)
    assert len(set(flat)) == len(SEEDS) * EPOCHS
    assert watched(12345, LOADED[kind]())[0] == orders[3], "and the same seed has the same again"


def test_each_seed_has_noise_of_its_own():
    streams = [watched(seed, epochs=1)[1] for seed in SEEDS]
    assert len(set(streams)) == len(SEEDS)
    assert watched(2**40, epochs=1)[1] == streams[5]


def test_purposes_share_no_stream(monkeypatch):
    """Of thirty seeds of training: noise, orders and evaluation, and what a user draws with the same seeds.

    Power: the noise of the evaluation was that of the next seed's training, the order of epoch e that of noise seed e.
    """
    evaluated, orders, windows = [], [], InMemory.windows

    def evaluate(vae, rows, **settings):
        evaluated.append(stream())
        return per_datum_elbo(vae, rows, **settings)

    def ordered(self, **settings):
        with seeded(settings["seed"], CPU):
            orders.append(stream())
        return windows(self, **settings)

    per_datum_elbo = train_run.per_datum_elbo
    monkeypatch.setattr(train_run, "per_datum_elbo", evaluate)
    monkeypatch.setattr(InMemory, "windows", ordered)
    noise = [watched(seed, epochs=2, batch_size=N)[1] for seed in range(30)]
    users = [bytes(torch.Generator().manual_seed(seed).get_state().numpy()) for seed in range(30)]
    every = [set(streams) for streams in (noise, orders, evaluated, users)]
    assert [len(one) for one in every] == [30, 60, 30, 30]
    assert len(set.union(*every)) == 150


def test_each_epoch_is_evaluated_with_the_same_noise():
    """Weights that stand still have the same ELBO, to the bit; with other noise they would not."""
    x = torch.randn(30, 6)
    fit = partial(quiet_fit, data=x, validation_data=x[:9], optimizer=frozen, epochs=3, batch_size=10)
    first, other = (fit(small_vae(), seed=seed).history for seed in (0, 1))
    for name in ("train_elbo", "validation_elbo"):
        assert len(set(first[name].values)) == 1, name
        assert first[name][0] != other[name][0], "power: other noise gives another number"


def test_each_process_and_step_has_noise_of_its_own():
    """In the 32 bits that a CPU keeps."""
    seeds = [Group(rank, 4).seed(seed, step) for rank in range(4) for step in (0, 1, 2**32) for seed in SEEDS]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)


def test_each_divergence_has_noise_of_its_own():
    found = []
    for seed in SEEDS:
        for rank in (0, 1):
            back = RollBack(times=2)
            run = StandIn(back)
            run.seed, run.rank = seed, rank
            for _ in range(2):
                torch.manual_seed(0)
                assert back.diverged(run, ValueError("it diverged"))
                found.append(stream())
    assert len(set(found)) == 4 * len(SEEDS)


def test_a_seed_counts_with_all_its_bits():
    def draws(seed):
        with seeded(seed, CPU):
            return tuple(torch.rand(3).tolist())

    for drawn in (draws, lambda seed: tuple(torch.rand(3, generator=make_generator(seed)).tolist())):
        assert len({drawn(seed) for seed in SEEDS}) == len(SEEDS)
        assert drawn(12345) == tuple(torch.rand(3, generator=torch.Generator().manual_seed(12345)).tolist())
    assert len({tuple(permutation(30, seed).tolist()) for seed in SEEDS}) == len(SEEDS)


def test_derived_seeds_stay_as_they_are():
    """A run that is resumed by a later version goes on as it was begun."""
    assert derive_seed(0, "order of the data", 1) == 2295678014469973076
    assert derive_seed(-(2**61), "noise of training", 3, 2**33) == 2055272267611067966


@pytest.mark.cuda
def test_on_a_gpu_too(cuda):
    rows = InMemory(Rows(torch.zeros(50, 2, device=cuda)))
    seeds = [derive_seed(seed, "order of the data", epoch) for seed in SEEDS for epoch in (1, 2)]
    orders = [next(iter(rows.windows(seed=seed, batch_size=5))).order for seed in seeds]
    assert {order.device.type for order in orders} == {"cuda"}
    assert len({tuple(order.tolist()) for order in orders}) == len(seeds)

    def draws(seed):
        with seeded(seed, cuda):
            return tuple(torch.rand(3, device=cuda).tolist())

    assert len({draws(seed) for seed in SEEDS}) == len(SEEDS)
