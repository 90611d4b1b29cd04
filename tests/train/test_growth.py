"""Nothing grows with the number of fits, compiled shapes and streams of one process."""

import gc
import json
import os
import subprocess
import sys

import numpy as np
import pyro
import pytest
import torch
from helpers.checks import small_vae
from torch._subclasses.fake_tensor import FakeTensorMode

import pyro_vae as pv

SCRIPT = """
import gc, json, os, sys, tempfile
from pathlib import Path

import pyro
import torch

import pyro_vae as pv

kind, number = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
x = torch.randn(200, 6)


def held():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "threads": len(os.listdir("/proc/self/task")),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "parameters": len(pyro.get_param_store()),
        "files": sum(len(files) for _, _, files in os.walk(tempfile.gettempdir())),
        "tensors": sum(type(one) in (torch.Tensor, torch.nn.Parameter) for one in gc.get_objects()),
    }


def vae():
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [8], 6)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(6, [8], 4)),
    )


def fits(i):
    pv.fit(vae(), x, epochs=2, batch_size=64, progress=False, device="cpu", engine="eager", seed=i)


def shapes(i):
    made = vae()
    svi = pv.CompiledSVI(
        made.model, made.guide, torch.optim.Adam(made.parameters()), pv.elbo.Trace_ELBO(), backend="eager"
    )
    for _ in range(2):
        svi.step(x[: 10 + i])


def streams(i):
    rows = pv.data.stream("x.npy")
    pv.fit(vae(), rows, epochs=1, batch_size=64, progress=False, device="cpu", engine="eager", seed=i)


found = []
for i in range(number):
    {"fits": fits, "shapes": shapes, "streams": streams}[kind](i)
    if i in (number // 10, number - 1):
        found.append(held())
print(json.dumps(found))
"""


def test_runs_with_checkpoints_leave_the_parameter_store_without_a_garbage_collection(tmp_path):
    sizes = []
    gc.collect()
    gc.disable()
    try:
        for i in range(4):
            settings = {"epochs": 1, "progress": False, "device": "cpu", "engine": "eager"}
            pv.fit(small_vae(), torch.randn(16, 6), checkpoints=tmp_path / str(i), **settings)
            sizes.append(len(pyro.get_param_store()))
    finally:
        gc.enable()
    assert sizes[1:] == [sizes[1]] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("fits", 200), ("shapes", 100), ("streams", 50)])
def test_a_process_is_as_large_after_many_as_after_few(kind, number, tmp_path):
    """Memory may grow by 5 MiB and 0.05 MiB each, for the fragmentation of the heap.

    The shapes use the backend "eager", which traces as all backends do. Each graph of "inductor" keeps 1.2 MiB until
    the process ends, in its library, which Python never unloads, and in torch's caches of its code. A loop of
    ``torch.compile`` alone, on a smaller network and with ``torch._dynamo.reset()``, keeps 1.0 MiB per shape.
    """
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(500, 6)).astype("f4"))
    (tmp_path / "temporary").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, kind, str(number)],
        capture_output=True, text=True, cwd=tmp_path, check=False, timeout=1500,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    few, many = json.loads(done.stdout.splitlines()[-1])
    assert many.pop("MiB") - few.pop("MiB") < 5 + 0.05 * number
    assert many == few


def test_torch_keeps_neither_source_nor_fake_results_of_a_compiled_graph():
    vae = small_vae()
    caches = torch.fx.graph_module._loader.eval_cache, FakeTensorMode.cache
    before = [*map(len, caches)]
    svi = pv.CompiledSVI(
        vae.model, vae.guide, torch.optim.Adam(vae.parameters()), pv.elbo.Trace_ELBO(), backend="eager"
    )
    for _ in range(2):
        svi.step(torch.zeros(9, 6, dtype=torch.float64))
    assert [*map(len, caches)] == before
