"""Burda et al.'s one-layer MNIST model: ``python -m benchmarks.burda``, their table 1 beside ours.

784-200-200-50, tanh, dynamic binarisation, Adam with ε = 1e-4; the test NLL by the bound of 5000 samples.

Their schedule (``--theirs``) takes batches of 20 and 3280 passes at learning rates of 1e-3 · 10^(-i/7) for 3^i passes,
i = 0 … 7. Ours takes larger batches and fewer passes, the learning rate falling along half a cosine. Training keeps
checkpoints in ``--folder``: the same command goes on from them.

References:
    | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import pyro_vae as pv
from benchmarks.cases import mnist
from benchmarks.report import machine, write
from pyro_vae.train.callbacks.base import Callback, Run, Tree
from pyro_vae.train.compiled.steps import Engine

PUBLISHED = {1: 86.76, 5: 85.54, 50: 84.78}
STAGES = 8
ACTIVE_IMAGES = 2_000
ESTIMATORS: dict[str, Callable[[int], Any]] = {
    "IWAE": lambda k: pv.elbo.IWAE(k) if k > 1 else pv.elbo.ELBO(),
    "DReG": pv.elbo.DReG,
    "STL": lambda k: pv.elbo.IWAESTL(k) if k > 1 else pv.elbo.STL(),
}
"""The bound of k samples, and its gradient: theirs, doubly reparameterized, or that which sticks the landing."""
THEIR_PASSES = sum(3**i for i in range(STAGES))


def model(grey: Tensor) -> pv.VAE:
    """Theirs: two tanh layers of 200 either way, 50 latents; Glorot's weights, and the pixels' means as biases."""
    decoder = pv.nn.mlp(50, [200, 200], 784, activation=nn.Tanh)
    encoder = pv.nn.mlp(784, [200, 200], 2 * 50, activation=nn.Tanh)
    layers = [layer for net in (encoder, decoder) for layer in net.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layers[-1].bias.copy_(torch.logit(grey.mean(0), eps=1e-3))
    return pv.VAE(
        prior=pv.priors.StandardNormal(50),
        decoder=pv.likelihoods.Bernoulli(decoder),
        encoder=pv.posteriors.DiagNormal(encoder),
    )


def their_rate(done: int) -> float:
    """Return the learning rate after ``done`` passes of their eight stages."""
    stage = next(i for i in range(STAGES + 1) if done < (3 ** (i + 1) - 1) // 2)
    return 1e-3 * 10 ** (-min(stage, STAGES - 1) / 7)


def our_rate(done: int, passes: int, first: float) -> float:
    """Return the learning rate after ``done`` passes: half a cosine from ``first`` to 0."""
    return first * 0.5 * (1 + math.cos(math.pi * done / passes))


class NewBits(Callback):
    """Draw new bits for each pass, in place, with the grey levels as probabilities; the seed and the pass decide which.

    Args:
        grey: shape ``(datum, pixel)``, from 0 to 1.
        seed: of all passes.
    """

    def __init__(self, grey: Tensor, seed: int) -> None:
        self.grey, self.seed, self.bits = grey, seed, torch.empty_like(grey)
        self.load({"passes": 0})

    def start(self, run: Run) -> None:
        self.load({"passes": 0})

    def epoch(self, run: Run) -> None:
        self.load({"passes": self.passes + 1})

    def state(self) -> Tree:
        return {"passes": self.passes}

    def load(self, state: Tree) -> None:
        self.passes = int(state["passes"])
        generator = torch.Generator(self.grey.device).manual_seed(1_000_003 * self.seed + self.passes)
        torch.bernoulli(self.grey, generator=generator, out=self.bits)


def train(
    objective: Any,
    grey: Tensor,
    rate: Callable[[int], float],
    *,
    passes: int,
    batch: int,
    precision: str,
    seed: int,
    folder: Path,
    engine: Engine = "compiled",
) -> tuple[pv.VAE, dict[str, float]]:
    """Train a model, from its newest checkpoint if there is one; return it with its ELBO and times."""
    torch.manual_seed(seed)
    vae, bits = model(grey).to(grey.device), NewBits(grey, seed)
    kept = pv.Checkpoints(folder, minutes=2)
    started, worked = time.perf_counter(), time.process_time()
    fitted = pv.fit(
        vae, bits.bits, elbo=objective, epochs=passes, batch_size=batch, seed=seed, precision=precision,
        device=grey.device, engine=engine, callbacks=[bits], checkpoints=kept,
        optimizer=lambda parameters: LambdaLR(torch.optim.Adam(parameters, lr=1.0, eps=1e-4, fused=True), rate),
        resume=folder if kept.files() else None,
    )  # fmt: skip
    seconds = float(fitted.history.seconds.sum())
    steps = math.ceil(len(grey) / batch) * passes
    return vae, {
        "passes": passes,
        "train_elbo": float(fitted.history.train_elbo[-1]),
        "steps": steps,
        "train_seconds": seconds,
        "milliseconds_per_step": 1e3 * seconds / steps,
        "seconds_of_last_call": time.perf_counter() - started,
        "processor_seconds_of_last_call": time.process_time() - worked,
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
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-3, help="the first learning rate")
    parser.add_argument("--theirs", action="store_true", help=f"batches of 20, {THEIR_PASSES} passes, their rates")
    parser.add_argument("--estimator", default="IWAE", choices=ESTIMATORS, help="of the gradient")
    parser.add_argument("--precision", default="float32", help="of training; NLLs are float32")
    parser.add_argument("--images", type=int, default=500, help="test images of the 10,000 whose NLL is estimated")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--folder", type=Path, default=Path("runs/burda"), help="of the checkpoints")
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
        rate = their_rate if chosen.theirs else partial(our_rate, passes=own, first=chosen.rate)
        own, batch = (THEIR_PASSES, 20) if chosen.theirs else (own, chosen.batch)
        vae, took = train(
            ESTIMATORS[chosen.estimator](k), train_x, rate, passes=own, batch=batch, precision=chosen.precision, seed=k,
            folder=chosen.folder / f"{chosen.estimator} {k}, batch {batch}, {own} passes from {chosen.rate:g}",
        )  # fmt: skip
        started = time.perf_counter()
        found = nll(vae, test_x[: chosen.images], chosen.samples) | took
        found["active_units"] = active(vae, test_x[:ACTIVE_IMAGES])
        found |= {"batch": batch, "first_rate": chosen.rate, "published": PUBLISHED[k]}
        results[f"k = {k}"] = found | {"evaluation_seconds": time.perf_counter() - started}
        print(f"k = {k}: {results[f'k = {k}']}", flush=True)
        write(chosen.out, results)


if __name__ == "__main__":
    main()
