"""Trainings side by side: the same numbers, and what is told of one that dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
import xarray as xr
from helpers import sweep_checks
from helpers.checks import linear_gaussian, untimed
from jsonargparse import Namespace

from pyro_vae.cli import main
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.sweep import run_jobs
from pyro_vae.compare.swap import rank, ranking_table
from pyro_vae.errors import ProcessError, SettingsError
from pyro_vae.evidence.exact import LinearGaussian

HERE = Path(__file__).resolve().parents[1]
FAST = ["--epochs", "2", "--hidden", "[4]", "--latent_dim", "2", "--particles", "10", "--batch_size", "16"]
GRID = ["--priors", "[StandardNormal, Laplace]", "--seeds", "[0, 1]"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).normal(size=(60, 3)))
    return tmp_path


def swap(out, *flags):
    assert main(["swap", "--data", "data.npy", "--out", out, *FAST, *flags]) == 0
    with xr.open_dataset(f"{out}/ranking.nc", engine="h5netcdf") as ranked:
        return ranked.load()


def test_side_by_side_comes_to_the_same_bits(folder, capsys):
    alone = swap("alone", *GRID)
    capsys.readouterr()
    both = swap("both", *GRID, "--workers", "2")
    assert alone.equals(both)
    assert alone.seed_log_evidence.shape == (2, 2)
    told = capsys.readouterr().err
    assert "4 trainings, side by side" in told
    assert all(f"{prior} (seed {seed})" in told for prior in ("StandardNormal", "Laplace") for seed in (0, 1))


def test_seeds_are_compared_side_by_side(folder, capsys, monkeypatch):
    monkeypatch.setattr(RunFolder, "figure", lambda *_: None)
    flags = [*FAST[:6], "--draws", "3", "--elbos", "[HandDerivedELBO]", "--particles", "[2]", "--seeds", "[0, 1]"]
    told = []
    for out, workers in (("alone", "1"), ("both", "2")):
        assert main(["compare", "--data", "data.npy", "--out", out, *flags, "--workers", workers]) == 0
        with xr.open_dataset(f"{out}/comparison.nc", engine="h5netcdf") as table:
            told.append(untimed(table.load()))
    alone, both = told
    assert alone.drop_vars("peak_memory").equals(both.drop_vars("peak_memory"))
    shown = capsys.readouterr()
    assert "2 trainings, side by side" in shown.err
    assert "with other seeds running in parallel" in shown.out.replace("\n", " ").replace("  ", " ")


def test_one_that_diverges_is_carried_past_there_too(folder, capsys):
    flags = ["--priors", "[StandardNormal, Laplace]", "--optimizer", "SGD", "--optimizer.lr", "1e12", "--workers", "2"]
    assert main(["swap", "--data", "data.npy", "--out", "run", *FAST, *flags]) == 2
    assert "every combination diverged" in capsys.readouterr().err


def run(function, *arguments, workers=2, cluster=None):
    jobs = {f"job {i}": (i, *arguments) for i in range(3)}
    return run_jobs(Namespace(workers=workers, cluster=cluster), function, jobs, "data")


def test_results_and_errors_of_workers_come_back(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    far, here = run(sweep_checks.double).results, run(sweep_checks.double, workers=1).results
    assert {job: result[0] for job, result in far.items()} == {"job 0": 0, "job 1": 2, "job 2": 4}
    assert [result[0] for result in here.values()] == [0, 2, 4]
    assert os.getpid() not in {result[1] for result in far.values()}
    assert {result[2] for result in far.values()} == {max(1, joblib.cpu_count() // 2)}, "the cores are shared out"
    assert {result[1:2] + result[3:] for result in here.values()} == {(os.getpid(), "data")}
    with pytest.raises(ValueError, match=r"number [0-2]"):
        run(sweep_checks.fails)


def test_a_worker_that_dies_ends_the_others():
    started = time.monotonic()
    with pytest.raises(ProcessError, match=r"a worker died .*SIGKILL.*; start again, with fewer workers"):
        run(sweep_checks.one_dies)
    assert time.monotonic() - started < 25, "the other is not waited for"


def test_ctrl_c_keeps_what_is_done_and_ends_the_workers(tmp_path):
    sweep = run(sweep_checks.interrupts, tmp_path)
    assert sweep.interrupted
    assert sweep.results == {"job 0": 0}
    (worker,) = [int(path.name) for path in tmp_path.iterdir()]
    assert not alive([worker])


def alive(pids):
    """Those that are still there after 10 s."""
    deadline = time.monotonic() + 10
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


@pytest.mark.slow
@pytest.mark.parametrize("end", [lambda process: process.send_signal(signal.SIGINT), lambda process: process.kill()])
def test_workers_end_with_the_command(end, folder):
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    flags = ["swap", "--data", "data.npy", "--out", "run", *FAST, *GRID, "--workers", "2", "--epochs", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_vae", *flags], text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    while "side by side" not in process.stderr.readline():
        pass
    time.sleep(8)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 2
    end(process)
    _, err = process.communicate(timeout=60)
    assert not alive(children)
    assert "Traceback" not in err
    assert process.returncode == -signal.SIGKILL or "interrupted: 0 of 2 combinations" in err
    assert process.returncode in (130, -signal.SIGKILL)


WAITING = """
from helpers import sweep_checks
from jsonargparse import Namespace
from pyro_vae.cli.sweep import run_jobs
run_jobs(Namespace(workers=2, cluster=None), sweep_checks.waits, {"a": (), "b": (), "c": ()}, "data")
"""


def test_workers_that_are_starting_end_with_the_command_when_it_is_killed():
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    main_process = subprocess.Popen([sys.executable, "-c", WAITING], env={**os.environ, "PYTHONPATH": path})
    while len(workers := loky_workers(main_process.pid)) < 2:
        time.sleep(0.01)
    main_process.kill()
    main_process.wait()
    left = alive(workers)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def loky_workers(process):
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if "popen_loky" in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "0"], "workers is 0; it must be a whole number of at least 1"),
        (["--seeds", "[]"], "seeds is []; name at least one, and each once"),
        (["--seeds", "[1, 1]"], "seeds is [1, 1]; name at least one, and each once"),
    ],
)
def test_what_cannot_be_is_refused(flags, message, folder, capsys):
    assert main(["swap", "--data", "data.npy", "--out", "run", *FAST, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not Path("run").exists()


# --- The error over seeds ---


def test_the_error_of_a_ranking_holds_how_much_trainings_differ():
    """Against its formula; of one seed it is that of the data, and of equal trainings too."""
    right = linear_gaussian()
    x = right.sample(100)
    models = {
        name: [LinearGaussian(right.weight, right.bias, right.scale * wrong).as_vae() for wrong in wrongs]
        for name, wrongs in {"a": (1.0, 1.1, 1.3), "b": (1.5, 1.5, 1.5)}.items()
    }
    ranked = rank(models, x)
    every = np.stack([[rank({"": vae}, x).datum_log_evidence.values[0] for vae in own] for own in models.values()])
    apart = every[1] - every[0]
    expected = (apart.mean(0).var(ddof=1) / 100 + apart.mean(1).var(ddof=1) / 3) ** 0.5
    assert ranked.difference_se.sel(model="b").item() == pytest.approx(expected, rel=1e-9)
    assert ranked.difference.sel(model="b").item() == pytest.approx(apart.mean(), rel=1e-9)
    single = rank({name: own[0] for name, own in models.items()}, x)
    assert single.se.sel(model="b").item() == pytest.approx(ranked.se.sel(model="b").item(), rel=1e-9)
    assert expected > 1.4 * apart.mean(0).std(ddof=1) / 10, "the trainings do differ"
    assert "3 seeds" in ranking_table(ranked).title
    with pytest.raises(SettingsError, match="the models have \\[1, 3\\] seeds; pass equally many for each"):
        rank({"a": models["a"], "b": models["b"][0]}, x)


# --- Over a cluster ---


@pytest.mark.slow  # starting Ray takes some 15 s
@pytest.mark.filterwarnings("ignore")
def test_a_grid_over_a_cluster_comes_to_the_same_bits(folder):
    pytest.importorskip("ray")
    alone = swap("alone", "--priors", "[StandardNormal, Laplace]")
    assert torch.get_num_threads() == 1
    assert alone.equals(swap("far", "--priors", "[StandardNormal, Laplace]", "--cluster", "local"))


@pytest.mark.slow  # starting Ray takes some 15 s
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_tells_of_errors_and_of_a_worker_that_dies():
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"number [0-2]"):
        run(sweep_checks.fails, cluster="local")
    with pytest.raises(ProcessError, match=r"a worker died \(ActorDiedError\)"):
        run(sweep_checks.one_dies, cluster="local")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"pip install pyro-vae\[cluster\]"):
        run(sweep_checks.double, cluster="auto")
