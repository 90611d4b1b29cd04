"""Training on data beyond memory: as on data in memory, whatever ends it, and in no more memory the longer it goes."""

import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checks import linear_gaussian, small_vae
from helpers.stream_checks import KINDS, narrow, npy, ours

import pyro_vae as pv
from pyro_vae.core.rows import Rows
from pyro_vae.data.sources import InMemory, source_of
from pyro_vae.train.compiled.feed import Feed
from pyro_vae.train.compiled.steps import RowArguments

QUIET = {"device": "cpu", "progress": False, "engine": "eager"}


@pytest.mark.slow
def test_training_on_a_stream_reaches_the_exact_evidence(tmp_path):
    """Linear-Gaussian data in windows of an eighth of them: the ELBO comes to the evidence of the best such model."""
    torch.manual_seed(0)
    x = linear_gaussian(4, 1).sample(2048)
    path = npy(x.numpy(), tmp_path)
    reached = {}
    for name, data in {"memory": x, "stream": narrow(pv.data.stream(path), 256)}.items():
        torch.manual_seed(1)
        vae = pv.VAE(
            prior=pv.priors.StandardNormal(1), decoder=pv.likelihoods.Normal(pv.nn.mlp(1, [], 4), learn_scale=True),
            encoder=pv.posteriors.DiagNormal(pv.nn.mlp(4, [], 2)),
        ).double()  # fmt: skip
        reached[name] = trained_elbo(vae, source_of(data, vae).like(vae), x)
    evidence = pv.exact.LinearGaussian.fit(x, 1).log_marginal(x).mean().item()
    assert reached["stream"] == pytest.approx(reached["memory"], abs=0.01)
    assert evidence - 0.02 < reached["stream"] < evidence + 1e-3


def trained_elbo(vae, source, x, epochs=12, batch=128):
    adam = torch.optim.Adam(vae.parameters(), lr=0.05)
    svi = pv.CompiledSVI(vae.model, vae.guide, adam, pv.elbo.TraceMeanField_ELBO(), backend="eager")
    arguments = RowArguments(len(source), False, False)
    for epoch in range(epochs):
        for window in source.windows(seed=epoch, batch_size=batch):
            for _ in svi.steps_over(Feed([window.rows.x], window.rows.x.device), window.order, batch, arguments):
                pass
    assert isinstance(source, InMemory) or len(svi._replays._made) == 1, "one graph serves all windows"
    torch.manual_seed(2)
    return -pv.elbo.TraceMeanField_ELBO(num_particles=64).loss(vae.model, vae.guide, *Rows(x).arguments()) / len(x)


@pytest.mark.parametrize("kind", ["npy", "generator function"])
def test_fit_takes_a_stream_and_goes_on_within_a_window(kind, tmp_path):
    """n/m is of all rows, and from a checkpoint in the middle of a window the weights are the same to the bit."""
    x = linear_gaussian(6, 2).sample(300).numpy().astype(np.float32)
    settings = {"epochs": 2, "batch_size": 16, "device": "cpu", "progress": False}
    source = narrow(KINDS[kind](x, tmp_path), 64)
    kept = pv.Checkpoints(tmp_path / "run", steps=10, keep=9)
    whole, again = small_vae(), small_vae()
    history = pv.fit(whole, source, checkpoints=kept, **settings).history
    for path in sorted(kept.folder.iterdir())[1:]:
        path.unlink()
    pv.fit(again, source, resume=tmp_path / "run", **settings)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    memory = pv.fit(small_vae(), x, **settings).history
    assert history.attrs["data"] == 300
    assert history.objective.values == pytest.approx(memory.objective.values, rel=0.05)


def test_each_batch_of_a_stream_stands_for_all_data(tmp_path):
    """With the exact guide the loss has no noise: n/m log p(x) of each batch adds up to the mean over all data."""
    model = linear_gaussian()
    x = model.sample(103).float()
    np.save(tmp_path / "x.npy", x.numpy())
    rows = pv.data.stream(tmp_path / "x.npy", window_bytes=4 * x.shape[1] * 30)
    assert len(list(rows.windows(seed=0, batch_size=10))) > 3
    frozen = partial(torch.optim.SGD, lr=0.0)
    fit = pv.fit(model.as_vae(), rows, batch_size=10, epochs=2, optimizer=frozen, progress=False, device="cpu")
    assert fit.history.objective.values == pytest.approx(model.log_marginal(x.double()).mean().item(), abs=1e-10)


def flat(vae):
    return torch.cat([p.detach().clone().flatten() for p in vae.parameters()])


class Along(pv.callbacks.Callback):
    """The weights after each step."""

    every = 1

    def __init__(self, path):
        self.path = path

    def step(self, run):
        self.path.append(flat(run.vae))


class Interrupt(pv.callbacks.Callback):
    """Ctrl-C, after a step."""

    def __init__(self, step):
        self.every, self.at = 1, step

    def step(self, run):
        if run.step == self.at:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("kind", ["memory", "npy", "generator function"])
def test_ctrl_c_keeps_what_was_done_and_it_goes_on_from_there(kind, tmp_path):
    """Within a window and within an epoch: the steps taken are in the history, and no thread is left behind."""
    x = linear_gaussian(6, 2).sample(300).numpy().astype(np.float32)
    data = x if kind == "memory" else narrow(KINDS[kind](x, tmp_path), 64)
    fit = partial(pv.fit, batch_size=16, epochs=3, **QUIET)
    path, whole, stopped, again = [], small_vae(), small_vae(), small_vae()
    fit(whole, data)
    came = fit(stopped, data, checkpoints=tmp_path / "run", callbacks=[Along(path), Interrupt(24)])
    assert came.interrupted
    assert came.history.step.values.tolist() == [19, 24]
    assert torch.equal(flat(stopped), path[23])
    assert not ours()
    fit(again, data, resume=tmp_path / "run")
    assert torch.equal(flat(again), flat(whole))


def test_a_vamp_prior_of_a_sample_of_the_stream_goes_on_to_the_bit(tmp_path):
    """Its pseudo-inputs begin as rows of the data, are trained, and it reaches what it reaches in memory."""
    x = linear_gaussian(6, 2).sample(300).numpy().astype(np.float32)
    source = narrow(pv.data.stream(npy(x, tmp_path), block_rows=4), 64)
    kept = pv.Checkpoints(tmp_path / "run", steps=10)

    def made():
        torch.manual_seed(0)
        prior, parts = pv.priors.VampPrior(source.sample(100), components=5), small_vae()
        return pv.VAE(prior=prior, decoder=parts.decoder, encoder=parts.encoder).float()

    begun, whole, again, memory = made().prior.pseudo_inputs.detach(), made(), made(), made()
    assert all((torch.from_numpy(x) == row).all(1).any() for row in begun)
    fit = partial(pv.fit, batch_size=16, epochs=4, optimizer=partial(torch.optim.Adam, lr=1e-2), **QUIET)
    reached = fit(whole, source, checkpoints=kept).history.train_elbo
    for path in sorted(kept.folder.iterdir())[1:]:
        path.unlink()
    fit(again, source, resume=tmp_path / "run")
    assert torch.equal(flat(again), flat(whole))
    assert not torch.equal(whole.prior.pseudo_inputs, begun)
    assert reached[-1] == pytest.approx(fit(memory, x).history.train_elbo.values[-1], rel=0.02)
    assert reached[-1] > reached[0] + 1


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by Linux's /proc")
@pytest.mark.parametrize("kind", ["npy", pytest.param("generator function", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_epochs(kind, tmp_path):
    """Of 24 epochs in windows of 1 MB: one that were kept of each epoch would be seen, and is three times the bar."""
    x = np.random.default_rng(0).normal(size=(2**15, 64)).astype(np.float32)
    kinds = {
        "npy": lambda: pv.data.stream(npy(x, tmp_path), block_rows=256),
        "generator function": lambda: pv.data.stream(lambda: iter(np.split(x, 32)), size=len(x)),
    }
    after, look = [], pv.callbacks.Callback()
    look.epoch = lambda run: after.append(resident())
    pv.fit(
        small_vae(64), narrow(kinds[kind](), 4096), batch_size=2048, epochs=24,
        callbacks=[look], **QUIET,
    )  # fmt: skip
    assert after[-1] - after[3] < 6 * 2**20  # the allocator gives and takes some 2 MB
