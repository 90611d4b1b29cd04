"""fit and log_evidence give the same numbers in a thread, in a forked pool after torch used threads, and in loky."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_vae as pv  # noqa: F401  (sets what a forked process does first)

ROOT = Path(__file__).resolve().parents[2]

MODULE = """
import torch
import pyro_vae as pv


def evidence(seed):
    torch.manual_seed(seed)
    x = torch.randn(600, 64)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(8),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(8, [512], 64)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [512], 16)),
    )
    pv.fit(vae, x, epochs=2, batch_size=200, progress=False, device="cpu", engine="eager", seed=seed)
    return float(pv.log_evidence(vae, x[:50], num_particles=200)["log_evidence"].mean())
"""

SCRIPT = """
import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import joblib
import torch
from fitted import evidence

torch.set_num_threads(2)
found = [evidence(1)]
torch.randn(1500, 1500) @ torch.randn(1500, 1500)
with ThreadPoolExecutor(1) as pool:
    found.append(pool.submit(evidence, 1).result())
with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
    found.append(pool.submit(evidence, 1).result())
found += joblib.Parallel(2, backend="loky")(joblib.delayed(evidence)(1) for _ in range(2))
print(json.dumps(found))
"""


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # since Python 3.12
def test_a_forked_process_uses_one_thread_since_others_stay_behind():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        if not (child := os.fork()):
            os._exit(torch.get_num_threads())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_they_are_the_same_in_a_thread_a_forked_process_and_loky(tmp_path):
    """A forked process would wait forever for the threads of its parent, so the script has a timeout."""
    (tmp_path / "fitted.py").write_text(MODULE)
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *others = json.loads(done.stdout.splitlines()[-1])
    assert others == pytest.approx([first] * 4, rel=1e-5), "threads sum in another order"


def test_a_program_that_computes_in_threads_pauses_before_it_forks():
    """A thread's end releases MKL's memory under a lock, which a child would wait for; 18 of 60 forks hung so."""
    script = (
        "import os, threading, types\n"
        "from pyro_vae.core import threads\n"
        "pauses = []\n"
        "threads.time = types.SimpleNamespace(sleep=pauses.append)\n"
        "def compute():\n"
        "    with threads.threads(1): pass\n"
        "def fork():\n"
        "    if not (child := os.fork()): os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "compute(); fork()\n"
        "assert not pauses\n"
        "for _ in range(2):\n"
        "    thread = threading.Thread(target=compute); thread.start(); thread.join()\n"
        "fork()\n"
        "assert pauses == [threads.ENDING]\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert not done.returncode, done.stderr
