"""What the tests of many processes run in each of them; a module of its own, as processes import it by name."""

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.engine.optimizers import WholeOptimizer
from pyro_vae.engine.steps import Steps
from pyro_vae.parallel.group import joined
from pyro_vae.parallel.reduce import refuse_spread
from pyro_vae.rows import Rows

FEATURES, LATENTS, ROWS, BATCH = 6, 2, 23, 8


class Unseeded(dist.Normal):
    """A normal whose noise is a function of where it is: the same whoever draws it, on however many processes."""

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(Unseeded, _instance))

    def rsample(self, sample_shape=torch.Size()):
        shape = self._extended_shape(sample_shape)
        particle = torch.arange(shape[0] if len(shape) > 2 else 1, dtype=self.loc.dtype)
        particle = particle.view(-1, *[1] * (len(shape) - 1)) if len(shape) > 2 else particle
        noise = torch.sin(1e3 * self.loc.detach() + 7.0 * particle)
        return self.loc + self.scale * noise

    def sample(self, sample_shape=torch.Size()):
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


def vae(dtype=torch.float64):
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENTS),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [5], FEATURES), scale=0.5, learn_scale=True),
        encoder=Posterior(pv.nn.mlp(FEATURES, [5], 2 * LATENTS)),
    ).to(dtype)


def data(rows=ROWS, dtype=torch.float64):
    return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def stepping(group, made, loss, x, *, batch_size=BATCH, engine="eager", clip_norm=None, lr=0.01, kind=torch.optim.Adam):
    """Steps of training, and the optimizer."""
    refuse_spread(made, loss, batch_size, group)
    optim = WholeOptimizer(kind([p for p in made.parameters() if p.requires_grad], lr=lr), clip_norm)
    steps = Steps(
        made, loss, optim, Rows(x), batch_size=batch_size, engine=engine, steps=10**6, say=lambda _: None, group=group
    )
    return steps, optim


ESTIMATORS = {
    "Trace_ELBO": pv.elbo.Trace_ELBO,
    "AnalyticKL": pv.elbo.AnalyticKL,
    "IWAE": lambda: pv.elbo.IWAE(5),
    "DReG": lambda: pv.elbo.DReG(5),
    "Beta": lambda: pv.elbo.Beta(pv.elbo.ELBO(), pv.elbo.Linear(100)),
}


def gradients(group, *, clip_norm=None, batch_size=BATCH, rows=ROWS):
    """Of each estimator: losses of an epoch, and what each step moved each parameter by, at a rate of 1 by SGD."""
    pyro.enable_validation(False)
    found = {}
    for name, make in ESTIMATORS.items():
        made, x, loss = vae(), data(rows), make()
        steps, _ = stepping(
            group, made, loss, x, batch_size=batch_size, clip_norm=clip_norm, lr=1e-3, kind=torch.optim.SGD
        )
        before, losses, moved = flat(made), [], []
        for loss_values in steps.along(torch.arange(rows).flip(0)):
            losses += loss_values
            moved.append(flat(made) - before)
            before = flat(made)
        counted = getattr(loss, "step", torch.zeros(()))
        found[name] = losses, torch.stack(moved) / 1e-3, int(counted)
    return found


def along(group, *, engine="eager", epochs=1, rows=ROWS, dtype=torch.float64, batch_size=BATCH):
    """Losses and parameters after some epochs."""
    pyro.enable_validation(False)
    made, losses = vae(dtype), []
    steps, _ = stepping(
        group,
        made,
        pv.elbo.Beta(pv.elbo.IWAE(5), pv.elbo.Linear(100)),
        data(rows, dtype),
        engine=engine,
        batch_size=batch_size,
    )
    for epoch in range(epochs):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(epoch))
        losses += [loss for some in steps.along(order) for loss in some]
    group.refuse_apart(made.state_dict())
    return losses, flat(made)


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def in_processes(call, processes, **arguments):
    """What ``call`` gives in each process of a group, which the environment names as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).resolve().parent
    started = []
    for rank in range(processes):
        own = {
            "RANK": rank,
            "WORLD_SIZE": processes,
            "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        env = {**os.environ, **{k: str(v) for k, v in own.items()}, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), env.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "parallel_checks"]
        started.append(subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
    for process in started:
        process.stdin.write(pickle.dumps((call, arguments)))
        process.stdin.close()
    found = [process.stdout.read() for process in started]
    assert [process.wait() for process in started] == [0] * processes
    return [pickle.loads(one) for one in found]


def main():
    call, arguments = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # gloo prints
    with joined(torch.device("cpu")) as group:
        result = globals()[call](group, **arguments)
    out.write(pickle.dumps(result))
    out.close()


if __name__ == "__main__":
    main()
