"""How time and memory grow: ``python -m benchmarks.growth`` (with the data, the particles, the latents), and the demo.

Each measurement is a process of its own, so that its memory is its own.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = (10_000, 100_000, 1_000_000, 10_000_000)
PARTICLES = (1, 5, 50, 500)
LATENTS = (2, 8, 32, 128, 512)
BASE = {"rows": 100_000, "particles": 1, "latents": 8}


def measure(rows: int, particles: int, latents: int) -> dict[str, Any]:
    """Milliseconds per step of the compiled engine, and the most memory that its process took."""
    import torch

    import pyro_vae as pv

    torch.manual_seed(0)
    # Columns of noise on two factors, in float32, made in place: 10 M rows of 64 are 2.5 GB.
    x = torch.randn(rows, 64)
    data = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(latents),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(latents, [128], 64), learn_scale=True),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [128], 2 * latents)),
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    elbo = pv.elbo.ELBO(particles)
    svi = pv.CompiledSVI(vae.model, vae.guide, optimizer, elbo)
    started = time.perf_counter()
    svi.run(x, steps=2, batch_size=128, size=rows)
    compiled = time.perf_counter() - started
    steps, times = max(400 // particles, 16), []
    for _ in range(7):
        started = time.perf_counter()
        svi.run(x, steps=steps, batch_size=128, size=rows)
        times.append(1e3 * (time.perf_counter() - started) / steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "milliseconds_per_step": statistics.median(times), "all_milliseconds": times, "compile_seconds": compiled,
        "mebibytes_with_data": data, "mebibytes_at_most": peak,
    }  # fmt: skip


def apart(settings: dict[str, int]) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.growth", "--one", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it ended"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def demo_seconds() -> dict[str, float]:
    """The demo, once all is installed: until its first words, and until its results are written."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, "-m", "pyro_vae", "demo", "--out", f"{folder}/demo"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - started
        process.communicate()
        return {"first_words": first, "results": time.perf_counter() - started, "exit_code": process.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--particles", type=int, nargs="+", default=PARTICLES)
    parser.add_argument("--latents", type=int, nargs="+", default=LATENTS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "growth.json")
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measure(**json.loads(chosen.one))))
        return
    from benchmarks.report import growth_figure, machine, write

    results: dict[str, Any] = {"machine": machine(), "demo_seconds": demo_seconds()}
    print("demo:", results["demo_seconds"], flush=True)
    for name in BASE:
        results[name] = []
        for value in getattr(chosen, name):
            found = apart(BASE | {name: value})
            results[name].append({name: value} | found)
            print(f"{name} {value}: {found}", flush=True)
            write(chosen.out, results)
    growth_figure(results, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
