"""What ends a training from outside: Ctrl-C returns, SIGTERM ends the process, either after a last checkpoint."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.engine_checks import data_of

import pyro_vae as pv

ROOT = Path(__file__).parents[2]

SCRIPT = """
import signal, sys, torch, pyro_vae as pv
from test_stopping import Signals, vae_of, X
if sys.argv[2] == "handled":
    signal.signal(signal.SIGTERM, lambda *_: print("asked to end"))
fit = pv.fit(vae_of(), X, batch_size=8, epochs=9, progress=False, device="cpu", engine="eager", checkpoints=sys.argv[3],
             callbacks=[Signals(getattr(signal, sys.argv[1]))])
print("goes on", fit.interrupted)
"""

X = data_of(dtype=torch.float32)  # 40 rows, 5 steps an epoch


class Signals(pv.callbacks.Callback):
    """Sends this process a signal after step 7."""

    def __init__(self, kind):
        self.every, self.kind = 1, kind

    def step(self, run):
        if run.step == 7:
            signal.raise_signal(self.kind)


def vae_of():
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [4], X.shape[1]), learn_scale=True),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(X.shape[1], [4], 4)),
    )


@pytest.mark.parametrize(
    ("kind", "handled", "code", "says"),
    [
        ("SIGINT", "default", 0, "goes on True\n"),
        ("SIGTERM", "handled", 0, "asked to end\ngoes on True\n"),
        ("SIGTERM", "default", -signal.SIGTERM, ""),
        ("SIGHUP", "default", -signal.SIGHUP, ""),
    ],
)
def test_a_signal_ends_the_training_after_a_checkpoint_and_sigterm_the_script_too(kind, handled, code, says, tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    came = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, handled, "run"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (came.returncode, came.stdout, came.stderr) == (code, says, "")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*7*")], "a checkpoint after step 7"
    resumed = pv.fit(
        vae_of(), X, batch_size=8, epochs=9, progress=False, device="cpu", engine="eager", resume=tmp_path / "run"
    )
    whole = pv.fit(vae_of(), X, batch_size=8, epochs=9, progress=False, device="cpu", engine="eager")
    for one, other in zip(resumed.vae.parameters(), whole.vae.parameters(), strict=True):
        assert torch.equal(one, other)
