"""What the tests of many processes run in each of them; a module of its own, as processes import it by name."""

import os
import signal
import time

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.core.rows import Rows
from pyro_vae.errors import CompileError, DataError, ProcessError
from pyro_vae.train.compiled.optimizers import WholeOptimizer
from pyro_vae.train.compiled.steps import Steps
from pyro_vae.train.distributed.group import joined, launched
from pyro_vae.train.distributed.reduce import validate_distributable

FEATURES, LATENTS, ROWS, BATCH, SIZE = 6, 2, 23, 8, 90
"""The last batch of an epoch has 7 rows: 4 for one of two processes and 3 for the other."""


class Unseeded(dist.Normal):
    """A normal whose noise is a function of where it is: the same whoever draws it, on however many processes."""

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Unseeded, _instance))

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        noise = torch.sin(1e3 * self.loc.detach())
        if len(shape) > 2:
            noise = noise + torch.sin(torch.arange(shape[0], dtype=self.loc.dtype)).view(-1, *[1] * (len(shape) - 1))
        return self.loc + self.scale * noise

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.rsample(sample_shape)


class Posterior(pv.Conditional):
    """q(z|x) with that noise."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, *_):
        loc, scale = self.net(x).chunk(2, -1)
        return Unseeded(loc, nn.functional.softplus(scale) + 0.1).to_event(1)


def vae(dtype=torch.float64, posterior=Posterior):
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENTS),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [5], FEATURES), scale=0.5, learn_scale=True),
        encoder=posterior(pv.nn.mlp(FEATURES, [5], 2 * LATENTS)),
    ).to(dtype)


def data(rows=ROWS, dtype=torch.float64):
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def stepping(group, made, loss, *, engine="eager", clip_norm=None, lr=0.01, kind=torch.optim.Adam, wishes=None):
    """Steps of training on ``SIZE`` data, of which the batches are some."""
    validate_distributable(made, loss, BATCH, group)
    optim = WholeOptimizer(kind([p for p in made.parameters() if p.requires_grad], lr=lr), clip_norm)
    given = {} if wishes is None else {"wishes": wishes}
    return Steps(
        made, loss, optim, size=SIZE, batch_size=BATCH, engine=engine, precision="float32", steps=10**6,
        say=lambda _: None, group=group, **given,
    )  # fmt: skip


ESTIMATORS = {
    "Trace_ELBO": pv.elbo.Trace_ELBO,
    "AnalyticKL": pv.elbo.AnalyticKL,
    "IWAE": lambda: pv.elbo.IWAE(5),
    "DReG": lambda: pv.elbo.DReG(5),
    "Beta": lambda: pv.elbo.Beta(pv.elbo.ELBO(), pv.elbo.Linear(100)),
}


def gradients(group, clip_norm, rows=ROWS):
    """Of each estimator: the losses of an epoch, its gradients, taken of how SGD moves, and the steps counted."""
    found = {}
    for name, make in ESTIMATORS.items():
        made, loss = vae(), make()
        steps = stepping(group, made, loss, clip_norm=clip_norm, lr=1e-2 / SIZE, kind=torch.optim.SGD)
        fed, before, losses, moved = steps.feed(Rows(data(rows))), flat(made), [], []
        for some in steps.steps_over(fed, torch.arange(rows).flip(0)):
            losses += some
            moved.append((before - flat(made)) * SIZE / 1e-2)
            before = flat(made)
        found[name] = losses, torch.stack(moved), int(getattr(loss, "step", torch.zeros(())))
    return found


def along(group, engine, epochs, rows=ROWS):
    """Losses and parameters after some epochs; they are seen to be the same on all processes."""
    made, losses = vae(), []
    steps = stepping(group, made, pv.elbo.Beta(pv.elbo.IWAE(5), pv.elbo.Linear(100)), engine=engine)
    fed = steps.feed(Rows(data(rows)))
    for epoch in range(epochs):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))
        losses += [loss for some in steps.steps_over(fed, order) for loss in some]
    group.validate_equal(made.state_dict())
    return losses, flat(made), steps.used


def wishing(group):
    """What is known of wishes after each step, where the second process wants to stop before the third."""
    made, told, asked = vae(), [], []
    steps = stepping(group, made, pv.elbo.ELBO(), wishes=lambda: (group.rank == 1 and len(asked) == 2, group.first))
    for _ in steps.steps_over(steps.feed(Rows(data())), torch.arange(ROWS)):
        asked.append(1)
        told.append((steps.stopped, steps.wanted))
    return told


def noise(group):
    """How far apart processes' parameters are after 50 steps with noise of their own, and their noise."""
    torch.manual_seed(group.seed(4))
    drawn, state = torch.randn(3), torch.get_rng_state()
    made = vae(torch.float32, pv.posteriors.DiagNormal)
    torch.set_rng_state(state)
    steps = stepping(group, made, pv.elbo.ELBO())
    fed = steps.feed(Rows(data(dtype=torch.float32)))
    for epoch in range(17):
        for _ in steps.steps_over(fed, torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))):
            pass
    return group.all_gather((drawn, flat(made)))


def drifting(group):
    """What is said of weights that are not the same, and of an error of one process."""
    said = []
    for call in (
        lambda: group.validate_equal({"same": torch.zeros(2), "other": torch.full((2,), float(group.rank))}),
        lambda: _failing(group),
    ):
        try:
            call()
        except (ProcessError, CompileError) as error:
            said.append(str(error))
    tensor = torch.full((2, 2), float(group.rank)).T
    group.broadcast_tensors([tensor])
    return said, tensor.tolist(), group.broadcast(group.rank)


def _failing(group):
    with group.raise_together(CompileError):
        if group.rank == 1:
            raise CompileError("no compiler here")


def rolling(group):
    """Where two processes are after the weights of the second alone were broken once, and both rolled back."""
    made, roll_back = vae(torch.float32, pv.posteriors.DiagNormal), pv.callbacks.RollBack(0.5)
    came = pv.fit(
        made, data(60, torch.float32), batch_size=8, epochs=3, seed=4, progress=False, device="cpu", engine="eager",
        callbacks=[roll_back, breaks := BreaksOne(11)],
    )  # fmt: skip
    return group.all_gather((flat(made), roll_back.divergences, came.history.sizes["epoch"], breaks.noise))


def every(group, weights, table):
    """All of the above that need the same two processes: starting them takes longest."""
    eager = along(group, "eager", 3), along(group, "eager", 3, 17)
    clipped = {norm: gradients(group, norm) for norm in (None, 30.0)}
    others = eager, wishing(group), noise(group), drifting(group), who(weights, table), rolling(group)
    return clipped, gradients(group, None, 17), *others


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def of_all(call, *args, **shared):
    """What ``call(group, ...)`` gives on each process of the group."""
    with joined(torch.device("cpu")) as group, pyro.validation_enabled(False):
        return group.all_gather(call(group, *args, **shared))


def misbehaving(how):
    """The second process does what it should not, while the first goes on."""
    with joined(torch.device("cpu")) as group:
        if how == "waits":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        group.all_gather(None)
        if group.rank == 1:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "refuses":
                raise DataError("there is no row 3")
            if how == "waits":
                time.sleep(600)
            raise KeyError("a bug")
        if how == "waits":
            print("waiting", flush=True)
        for _ in range(600):
            group.all_gather(None)
            time.sleep(0.1)


def who(weights, table):
    """What a process knows of itself, and whether what it was given is in memory that others share."""
    shared = weights.is_shared(), table.is_shared()
    return launched(), torch.get_num_threads(), os.environ["RANK"], os.environ["WORLD_SIZE"], shared


class FallingApart(pv.Conditional):
    """q(z|x) with a buffer of its own on each process."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, *_):
        if self.training:
            self.seen += x.sum()
        loc, scale = self.net(x).chunk(2, -1)
        return dist.Normal(loc, nn.functional.softplus(scale) + 0.1).to_event(1)


class BreaksOne(pv.callbacks.Callback):
    """Breaks a weight of the second process alone, while the rate is what it was at first."""

    every = 1

    def __init__(self, step=3):
        self.at, self.noise = step, None

    def end(self, run):
        self.noise = torch.get_rng_state()

    def step(self, run):
        if run.rank == 1 and run.step == self.at and run.optimizer.param_groups[0]["lr"] == 1e-3:
            with torch.no_grad():
                next(run.vae.parameters()).fill_(float("nan"))
