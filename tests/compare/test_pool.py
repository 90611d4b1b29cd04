"""Trainings side by side: the same numbers, and what is told of one that dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from helpers import pool_checks
from helpers.checks import linear_gaussian, untimed

from pyro_vae.cli import main
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.compare.pool import Cluster, Workers, as_they_come
from pyro_vae.compare.swap import rank, ranking_table
from pyro_vae.errors import ProcessError, SettingsError
from pyro_vae.exact import LinearGaussian

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


@pytest.fixture(scope="module")
def pool():
    """Two processes, begun once."""
    with Workers(2) as workers:
        yield workers


@pytest.fixture
def shared(pool, monkeypatch):
    """The command takes those, and leaves them as they are."""
    monkeypatch.setattr("pyro_vae.cli.sweep.Workers", lambda number: pool)
    monkeypatch.setattr(Workers, "__exit__", lambda *_: None)
    return pool


def test_side_by_side_comes_to_the_same_bits(folder, capsys, shared):
    alone = swap("alone", *GRID)
    capsys.readouterr()
    both = swap("both", *GRID, "--workers", "2")
    assert alone.equals(both)
    assert alone.seed_log_evidence.shape == (2, 2)
    told = capsys.readouterr().err
    assert "4 trainings, side by side" in told
    assert all(f"{prior} (seed {seed})" in told for prior in ("StandardNormal", "Laplace") for seed in (0, 1))


def test_seeds_are_compared_side_by_side(folder, capsys, shared, monkeypatch):
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
    assert "with other seeds beside it" in shown.out.replace("\n", " ").replace("  ", " ")


def test_one_that_diverges_is_carried_past_there_too(folder, capsys, shared):
    flags = ["--priors", "[StandardNormal, Laplace]", "--optimizer", "SGD", "--optimizer.lr", "1e12", "--workers", "2"]
    assert main(["swap", "--data", "data.npy", "--out", "run", *FAST, *flags]) == 2
    assert "every combination diverged" in capsys.readouterr().err


def test_a_pool_names_what_it_was_at_when_a_process_died():
    jobs = {"none": (0,), "first": (1,), "second": (2,)}
    coming = as_they_come(Workers(2), pool_checks.one_dies, jobs)
    assert next(coming) == ("none", 0)
    started = time.monotonic()
    with pytest.raises(ProcessError, match="the process that trained first was ended by SIGKILL; start again"):
        list(coming)
    assert time.monotonic() - started < 25, "the other is not waited for"


def test_threads_are_shared_out_and_errors_come_back(pool):
    found = dict(as_they_come(pool, pool_checks.double, {str(i): (i,) for i in range(4)}))
    assert {name: value[0] for name, value in found.items()} == {str(i): 2 * i for i in range(4)}
    assert os.getpid() not in {value[1] for value in found.values()}
    assert {value[2] for value in found.values()} == {1}
    with pytest.raises(ValueError, match="number 3"):
        pool.submit(pool_checks.fails, 3).result()


@pytest.mark.slow
def test_ctrl_c_ends_all_of_them(folder):
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
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "interrupted: 0 of 2 combinations" in err
    assert "Traceback" not in err
    deadline = time.monotonic() + 10
    while any(alive := [pid for pid in children if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive


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
    with pytest.raises(SettingsError, match="the VAEs have \\[1, 3\\] seeds; give as many of each"):
        rank({"a": models["a"], "b": models["b"][0]}, x)


# --- Over a cluster ---


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    with Cluster(None, num_cpus=2) as here:
        yield here


@pytest.mark.slow  # starting Ray takes some 15 s
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_is_an_executor_like_another(cluster):
    found = dict(as_they_come(cluster, pool_checks.double, {str(i): (i,) for i in range(3)}))
    assert {name: value[0] for name, value in found.items()} == {str(i): 2 * i for i in range(3)}
    with pytest.raises(ValueError, match="number 3"):
        cluster.submit(pool_checks.fails, 3).result()


@pytest.mark.slow  # starting Ray takes some 15 s
@pytest.mark.filterwarnings("ignore")
def test_a_grid_over_a_cluster_comes_to_the_same_bits(cluster, folder, monkeypatch):
    from pyro_vae.cli import sweep

    monkeypatch.setattr(sweep, "Cluster", lambda address: cluster)
    monkeypatch.setattr(type(cluster), "shutdown", lambda *_, **__: None)
    alone = swap("alone", "--priors", "[StandardNormal, Laplace]")
    assert torch.get_num_threads() == 1
    assert alone.equals(swap("far", "--priors", "[StandardNormal, Laplace]", "--cluster", "auto"))


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SettingsError, match=r"pip install pyro-vae\[cluster\]"):
        Cluster()
