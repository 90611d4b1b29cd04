"""The contestants on torch: each makes, of a case and its data, a function that trains one pass and gives its ELBO."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn
from torch.nn import functional as F

import pyro_vae as pv
from benchmarks.cases import LEARNING_RATE, Case, LeftOut
from pyro_vae.train.compiled.optimizers import WholeOptimizer

Pass = Callable[[], float]
"""One pass over the data; the mean objective, nats per datum."""

PARTICLES = {"trace": 1, "analytic": 1, "iwae50": 50}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def networks(case: Case) -> tuple[nn.Module, nn.Module]:
    """The encoder's network, ``features → 2 latent``, and the decoder's, ``latent → features``; always the same."""
    torch.manual_seed(0)
    if case.convolutional:
        image, channels = (1, 28, 28), list(case.hidden)
        return (
            pv.nn.conv_encoder(image, channels, 2 * case.latent),
            pv.nn.conv_decoder(case.latent, channels[::-1], image),
        )
    widths = list(case.hidden)
    return (
        pv.nn.mlp(case.features, widths, 2 * case.latent),
        pv.nn.mlp(case.latent, widths[::-1], case.features),
    )


def our_vae(case: Case) -> pv.VAE:
    encoder, decoder = networks(case)
    return pv.VAE(
        prior=pv.priors.StandardNormal(case.latent),
        decoder=pv.likelihoods.Bernoulli(decoder),
        encoder=pv.posteriors.DiagNormal(encoder),
    ).to(device())


def our_elbo(case: Case) -> Any:
    return {"trace": Trace_ELBO, "analytic": TraceMeanField_ELBO, "iwae50": lambda: pv.elbo.IWAE(50)}[case.estimator]()


def ours_compiled(case: Case, x: np.ndarray) -> Pass:
    vae, data = our_vae(case), torch.from_numpy(x).to(device())
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)
    svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, our_elbo(case))
    return lambda: -svi.run(data, steps=case.steps, batch_size=case.batch).mean().item() / case.batch


def ours_eager(case: Case, x: np.ndarray) -> Pass:
    vae, data = our_vae(case), torch.from_numpy(x).to(device())
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE, fused=True)
    svi = SVI(vae.model, vae.guide, WholeOptimizer(optimizer), our_elbo(case))
    return _looped(lambda batch: svi.step(batch), data, case, validated=False)


def _looped(step: Callable[[Tensor], Any], data: Tensor, case: Case, validated: bool | None = None) -> Pass:
    def one_pass() -> float:
        losses = []
        with pyro.validation_enabled(bool(validated)):
            for index in torch.randperm(len(data), device=data.device).split(case.batch):
                losses.append(step(data[index]))
        return -float(sum(map(float, losses))) / len(losses) / case.batch

    return one_pass


class PyroExample(nn.Module):
    """As Pyro's own example is written: networks registered by name, distributions made in model and guide."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.encoder, self.decoder = networks(case)
        self.latent = case.latent

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = x.new_zeros(x.shape[0], self.latent), x.new_ones(x.shape[0], self.latent)
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, log_scale.exp()).to_event(1))


def pyro_svi(case: Case, x: np.ndarray, *, validated: bool = False) -> Pass:
    example, data = PyroExample(case).to(device()), torch.from_numpy(x).to(device())
    losses = {
        "trace": Trace_ELBO,
        "analytic": TraceMeanField_ELBO,
        "iwae50": lambda: RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True),
    }
    svi = SVI(example.model, example.guide, pyro.optim.Adam({"lr": LEARNING_RATE}), losses[case.estimator]())
    return _looped(lambda batch: svi.step(batch), data, case, validated=validated)


def pyro_svi_validated(case: Case, x: np.ndarray) -> Pass:
    return pyro_svi(case, x, validated=True)


def by_hand(encoder: nn.Module, decoder: nn.Module, case: Case) -> Callable[[Tensor], Tensor]:
    """The loss of a batch, written out in torch."""
    particles = PARTICLES[case.estimator]

    def loss(x: Tensor) -> Tensor:
        mu, log_sigma = encoder(x).chunk(2, -1)
        epsilon = torch.randn(particles, *mu.shape, device=x.device)
        z = mu + log_sigma.exp() * epsilon
        logits = decoder(z)
        likelihood = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        if case.estimator == "analytic":
            kl = 0.5 * (mu**2 + (2 * log_sigma).exp() - 1 - 2 * log_sigma).sum(-1)
            return -(likelihood - kl).sum()
        log_ratio = (-0.5 * z**2 + 0.5 * epsilon**2 + log_sigma).sum(-1)
        return -((likelihood + log_ratio).logsumexp(0) - math.log(particles)).sum()

    return loss


def torch_eager(case: Case, x: np.ndarray, *, compiled: bool = False) -> Pass:
    encoder, decoder = (net.to(device()) for net in networks(case))
    data = torch.from_numpy(x).to(device())
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=LEARNING_RATE, fused=True)
    loss_of = by_hand(encoder, decoder, case)
    if compiled:
        loss_of = torch.compile(loss_of, mode="reduce-overhead" if data.is_cuda else None)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        return loss.detach().clone()

    return _looped(step, data, case)


def torch_compiled(case: Case, x: np.ndarray) -> Pass:
    return torch_eager(case, x, compiled=True)


@dataclass(frozen=True)
class Captured:
    """A CUDA graph, and the call that it is of, which holds the tensors whose memory the graph uses."""

    call: Callable[[], Any]
    graph: torch.cuda.CUDAGraph

    def __call__(self) -> None:
        self.graph.replay()


def captured(call: Callable[[], Any], calls: int = 1) -> Captured:
    """Capture several calls as one CUDA graph, after a warm-up on another stream, as torch's documentation does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return Captured(call, graph)


def torch_graphed(case: Case, x: np.ndarray) -> Pass:
    """Forward, backward and update as one CUDA graph."""
    if device().type != "cuda":
        raise LeftOut("it needs a GPU")
    encoder, decoder = (net.to(device()) for net in networks(case))
    data, index = torch.from_numpy(x).to(device()), torch.arange(case.batch, device=device())
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True, capturable=True)
    loss_of, total = by_hand(encoder, decoder, case), torch.zeros((), device=device())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(data[index])
        loss.backward()
        optimizer.step()
        total.add_(loss.detach())

    replay = captured(step)

    def one_pass() -> float:
        total.zero_()
        for rows in torch.randperm(len(data), device=device()).split(case.batch):
            index.copy_(rows)
            replay()
        return -total.item() / case.steps / case.batch

    return one_pass


def pythae_trainer(case: Case, x: np.ndarray) -> Pass:
    """pythae's own trainer; for K = 1 its KL is in closed form always."""
    if case.convolutional:
        raise LeftOut("it has no such model")
    from benchmarks.pythae_peer import trainer

    return trainer(case, x)


def numpyro_epoch(case: Case, x: np.ndarray) -> Pass:
    """NumPyro's SVI, a whole pass jitted."""
    if case.convolutional:
        raise LeftOut("it has no such model")
    from benchmarks.numpyro_peer import epoch

    return epoch(case, x)


CONTESTANTS: dict[str, Callable[[Case, np.ndarray], Pass]] = {
    "ours, compiled": ours_compiled,
    "ours, eager": ours_eager,
    "pyro.infer.SVI": pyro_svi,
    "pyro.infer.SVI, validation on": pyro_svi_validated,
    "torch by hand": torch_eager,
    "torch by hand, torch.compile": torch_compiled,
    "torch by hand, CUDA graph": torch_graphed,
    "NumPyro, jitted epoch": numpyro_epoch,
    "pythae's trainer": pythae_trainer,
}
