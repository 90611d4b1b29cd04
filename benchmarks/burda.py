"""Burda et al.'s one-layer MNIST model: ``python -m benchmarks.burda``, their table 1 beside ours.

784-200-200-50, tanh, dynamic binarisation, Adam with ε = 1e-4; the test NLL by the bound of 5000 samples.

Their schedule (``--theirs``) takes batches of 20 and 3280 passes at learning rates of 1e-3 · 10^(-i/7) for 3^i passes,
i = 0 … 7. Ours takes larger batches and fewer passes, the learning rate falling along half a cosine.

References:
    | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks.cases import mnist
from benchmarks.report import machine, write

PUBLISHED = {1: 86.76, 5: 85.54, 50: 84.78}
STAGES = 8
ACTIVE_IMAGES = 2_000
EVERY_SECONDS = 20
ESTIMATORS: dict[str, Callable[[int], Any]] = {
    "IWAE": lambda k: pv.elbo.IWAE(k) if k > 1 else pv.elbo.ELBO(),
    "DReG": pv.elbo.DReG,
    "STL": lambda k: pv.elbo.IWAESTL(k) if k > 1 else pv.elbo.STL(),
}
"""The bound of k samples, and its gradient: theirs, doubly reparameterised, or that which sticks the landing."""
THEIR_PASSES = sum(3**i for i in range(STAGES))


def model() -> pv.VAE:
    """Theirs: two tanh layers of 200 either way, 50 latents."""
    return pv.VAE(
        prior=pv.priors.StandardNormal(50),
        decoder=pv.likelihoods.Bernoulli(pv.nn.mlp(50, [200, 200], 784, activation=nn.Tanh)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(784, [200, 200], 2 * 50, activation=nn.Tanh)),
    )


def their_rates() -> Iterator[float]:
    """The learning rate of each pass of theirs."""
    for stage in range(STAGES):
        yield from [1e-3 * 10 ** (-stage / 7)] * 3**stage


def our_rates(passes: int, first: float) -> Iterator[float]:
    """Half a cosine, from ``first`` to nothing."""
    for i in range(passes):
        yield first * 0.5 * (1 + math.cos(math.pi * i / passes))


def timed_rates(seconds: float, first: float) -> Iterator[float]:
    """Half a cosine of the time that has gone by, from ``first`` to nothing; it fits a lent machine."""
    started = time.perf_counter()
    while (share := (time.perf_counter() - started) / seconds) < 1:
        yield first * 0.5 * (1 + math.cos(math.pi * share))


def train(
    objective: Any, grey: Tensor, rates: Iterable[float], batch: int, *, backend: str, precision: str, seed: int
) -> tuple[pv.VAE, dict[str, float]]:
    """A model trained for one pass at each rate; and how long it took."""
    torch.manual_seed(seed)
    vae = model().to(grey.device)
    optimizer = torch.optim.Adam(vae.parameters(), eps=1e-4)
    svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, objective, backend=backend, precision=precision)
    started, worked = time.perf_counter(), time.process_time()
    steps, bits = math.ceil(len(grey) / batch), torch.empty_like(grey)
    passes, told = 0, -math.inf
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        # New bits at every pass, where the last were: a CUDA graph reads them there.
        losses = svi.run(torch.bernoulli(grey, out=bits), steps=steps, batch_size=batch)
        bound, passes, seconds = -losses.sum().item() / len(grey), passes + 1, time.perf_counter() - started
        if seconds > told + EVERY_SECONDS:
            told = seconds
            print(f"  pass {passes}: bound {bound:.2f}, {seconds:.0f} s", flush=True)
    return vae, {
        "passes": passes,
        "train_bound": bound,
        "steps": steps * passes,
        "train_seconds": seconds,
        "train_processor_seconds": time.process_time() - worked,
        "milliseconds_per_step": 1e3 * seconds / (steps * passes),
    }


def nll(vae: pv.VAE, grey: Tensor, samples: int) -> dict[str, float]:
    """The mean of -log p(x) over test images, by the bound of so many samples, and its standard error over images."""
    torch.manual_seed(0)
    found = pv.log_evidence(vae, torch.bernoulli(grey), num_particles=samples).log_evidence
    return {"nll": -float(found.mean()), "se": float(found.std() / math.sqrt(len(grey))), "images": len(grey)}


def active(vae: pv.VAE, grey: Tensor) -> int:
    """How many latents' posterior means vary over images by more than 0.01."""
    torch.manual_seed(0)
    return int(pv.diagnose.collapse(vae, torch.bernoulli(grey))["active"].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5], choices=PUBLISHED)
    parser.add_argument("--passes", type=int, nargs="+", default=[6], help="for each k, or one number for all")
    parser.add_argument("--seconds", type=float, help="train for so long instead of so many passes")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3, help="the first learning rate")
    parser.add_argument("--theirs", action="store_true", help=f"batches of 20, {THEIR_PASSES} passes, their rates")
    parser.add_argument("--estimator", default="IWAE", choices=ESTIMATORS, help="of the gradient")
    parser.add_argument("--precision", default="float32", help="of training; NLLs are float32")
    parser.add_argument("--images", type=int, default=500, help="test images of the 10,000 whose NLL is estimated")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "burda.json")
    chosen = parser.parse_args()
    images = {part: mnist(part) for part in ("train", "t10k")}
    if images["train"] is None or images["t10k"] is None:
        raise SystemExit("MNIST is not beside this checkout, in ../shared/data/mnist")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_x, test_x = (torch.from_numpy(images[part].copy()).to(device) / 255 for part in ("train", "t10k"))
    results: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads()}
    results |= {"estimator": chosen.estimator, "precision": chosen.precision}
    passes = chosen.passes * (len(chosen.k) if len(chosen.passes) == 1 else 1)
    for k, own in zip(chosen.k, passes, strict=True):
        rates = timed_rates(chosen.seconds, chosen.rate) if chosen.seconds else our_rates(own, chosen.rate)
        rates = their_rates() if chosen.theirs else rates
        batch = 20 if chosen.theirs else chosen.batch
        objective = ESTIMATORS[chosen.estimator](k)
        vae, took = train(objective, train_x, rates, batch, backend=chosen.backend, precision=chosen.precision, seed=k)
        started = time.perf_counter()
        found = nll(vae, test_x[: chosen.images], chosen.samples) | took
        found["active_units"] = active(vae, test_x[:ACTIVE_IMAGES])
        found |= {"batch": batch, "first_rate": chosen.rate, "published": PUBLISHED[k]}
        results[f"k = {k}"] = found | {"evaluation_seconds": time.perf_counter() - started}
        print(f"k = {k}: {results[f'k = {k}']}", flush=True)
        write(chosen.out, results)


if __name__ == "__main__":
    main()
