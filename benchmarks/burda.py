"""Burda et al.'s one-layer MNIST model by their protocol: ``python -m benchmarks.burda``.

784-200-200-50, tanh, dynamic binarisation, batches of 20, Adam with ε = 1e-4 at a learning rate of 1e-3 · 10^(-i/7)
for 3^i passes, i = 0 … 7: 3280 in all. Their test NLL by the bound of 5000 samples: 86.76 for a VAE (k = 1)
and 84.78 for the IWAE with k = 50.

With ``--passes n m`` the eight stages are shortened alike, to n passes for the VAE and m for the IWAE in all, so that
the learning rate still goes the whole way. By default that is what fits 20 minutes of a CPU, for both models together.

References:
    | Importance Weighted Autoencoders (Burda, Grosse & Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pyro_vae as pv
from benchmarks.cases import mnist
from benchmarks.report import machine, write

PUBLISHED = {1: 86.76, 50: 84.78}
BATCH, STAGES = 20, 8
WHOLE = sum(3**i for i in range(STAGES))


def model() -> pv.VAE:
    """Theirs: two tanh layers of 200 either way, 50 latents."""
    return pv.VAE(
        prior=pv.priors.StandardNormal(50),
        decoder=pv.likelihoods.Bernoulli(pv.nn.mlp(50, [200, 200], 784, activation=nn.Tanh)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(784, [200, 200], 2 * 50, activation=nn.Tanh)),
    )


def binarised(grey: Tensor) -> Tensor:
    """Each pixel is 1 with the probability that its grey level says."""
    return torch.bernoulli(grey)


def rate(stage: int) -> float:
    return 1e-3 * 10 ** (-stage / 7)


def train(k: int, grey: Tensor, passes: float, backend: str) -> tuple[pv.VAE, dict[str, float]]:
    """A model by the protocol, shortened to so many passes; and how long it took."""
    torch.manual_seed(k)
    vae = model()
    optimizer = torch.optim.Adam(vae.parameters(), lr=rate(0), eps=1e-4)
    svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, pv.elbo.IWAE(k) if k > 1 else pv.elbo.ELBO(), backend=backend)
    started, worked = time.perf_counter(), time.process_time()
    steps_per_pass, taken = len(grey) // BATCH, 0
    for stage in range(STAGES):
        optimizer.param_groups[0]["lr"] = rate(stage)
        steps = math.ceil(passes * 3**stage / WHOLE * steps_per_pass)
        taken += steps
        loss = math.nan
        while steps > 0:
            # New bits at every pass, as dynamic binarisation is done with data at rest.
            now = min(steps, steps_per_pass)
            loss = svi.run(binarised(grey), steps=now, batch_size=BATCH).mean().item() / BATCH
            steps -= now
        print(
            f"  k = {k}, stage {stage + 1} of {STAGES}: bound {-loss:.2f}, {time.perf_counter() - started:.0f} s",
            flush=True,
        )
    seconds = time.perf_counter() - started
    return vae, {
        "steps": taken,
        "train_seconds": seconds,
        "train_processor_seconds": time.process_time() - worked,
        "milliseconds_per_step": 1e3 * seconds / taken,
    }


def nll(vae: pv.VAE, grey: Tensor, samples: int) -> dict[str, float]:
    """The mean of -log p(x) over test images, by the bound of so many samples, and its standard error over images."""
    torch.manual_seed(0)
    found = pv.log_evidence(vae, binarised(grey), num_particles=samples).log_evidence
    return {"nll": -float(found.mean()), "se": float(found.std() / math.sqrt(len(grey))), "images": len(grey)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--passes", type=float, nargs=2, default=(6.0, 1.5), metavar=("VAE", "IWAE"))
    parser.add_argument("--whole", action="store_true", help=f"all {WHOLE} passes, for each model")
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
    results: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "whole_schedule": WHOLE}
    for k, passes in zip(PUBLISHED, chosen.passes, strict=True):
        passes = WHOLE if chosen.whole else passes
        vae, took = train(k, train_x, passes, chosen.backend)
        started = time.perf_counter()
        found = nll(vae, test_x[: chosen.images], chosen.samples) | {"passes": passes, "published": PUBLISHED[k]} | took
        results[f"k = {k}"] = found | {"evaluation_seconds": time.perf_counter() - started}
        print(f"k = {k}: {results[f'k = {k}']}", flush=True)
        write(chosen.out, results)


if __name__ == "__main__":
    main()
