"""What users wait for after training: ``python -m benchmarks.workflow``, with the share of the networks' products.

The bound, k̂, SBC and a comparison of estimators, of a VAE of 64-128-8 on scikit-learn's digits and one of 784-400-20 on
MNIST (random bits of that shape where it is not beside the checkout). Each repeat calls them in turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

import pyro_vae as pv
from benchmarks.cases import SIZES, bits
from benchmarks.report import machine, write
from pyro_vae.core.allocation import EagerMode

ROWS = 1000
DRAWS = 20
"""Of a comparison, fewer than its default of 100: its time is proportional to them."""

Call = Callable[[pv.VAE, torch.Tensor], Any]
CALLS: dict[str, Call] = {
    "log_evidence, 500 particles": lambda vae, x: pv.log_evidence(vae, x, num_particles=500),
    "log_evidence, PSIS, 500 particles": lambda vae, x: pv.log_evidence(vae, x, num_particles=500, method="psis"),
    "diagnose.khat": lambda vae, x: pv.diagnose.khat(vae, x),
    "diagnose.sbc": lambda vae, x: pv.diagnose.sbc(vae),
    f"compare_elbos, {DRAWS} draws": lambda vae, x: pv.compare_elbos(vae, x, draws=DRAWS),
}


class _TimedProducts(EagerMode):
    """Add up the time of products of matrices and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.seconds += time.perf_counter() - started
        return made


def trained(name: str) -> tuple[pv.VAE, torch.Tensor]:
    """A VAE after 10 passes, and the rows to call the functions with."""
    case = SIZES[name]
    x = torch.from_numpy(bits(case))
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(case.latent),
        decoder=pv.likelihoods.Bernoulli(pv.nn.mlp(case.latent, [*case.hidden], case.features)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(case.features, [*case.hidden], 2 * case.latent)),
    )
    pv.fit(vae, x, epochs=10, batch_size=case.batch, progress=False, engine="eager")
    return vae, x[:ROWS]


def measure(name: str, repeats: int) -> dict[str, Any]:
    """The median seconds of each function, and the share of its products, measured in a repeat of its own."""
    vae, x = trained(name)
    seconds: dict[str, list[float]] = {each: [] for each in CALLS}
    for _ in range(repeats + 1):  # the first is a warm-up
        for each, call in CALLS.items():
            torch.manual_seed(0)
            started = time.perf_counter()
            call(vae, x)
            seconds[each].append(time.perf_counter() - started)
    found = {}
    for each, call in CALLS.items():
        with _TimedProducts() as products:
            started = time.perf_counter()
            call(vae, x)
            whole = time.perf_counter() - started
        found[each] = {
            "seconds": statistics.median(seconds[each][1:]),
            "all_seconds": seconds[each][1:],
            "share_of_products": products.seconds / whole,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=["64-128-8", "784-400-20"], choices=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "workflow.json")
    chosen = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "rows": ROWS}
    for name in chosen.cases:
        results[name] = measure(name, chosen.repeats)
        for each, found in results[name].items():
            print(
                f"{name:12} {each:36} {found['seconds']:7.2f} s, products {found['share_of_products']:.0%}", flush=True
            )
        write(chosen.out, results)


if __name__ == "__main__":
    main()
