"""A sweep that is killed keeps what is done, and goes on with it to the same numbers."""

import csv
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from jsonargparse import Namespace

from pyro_vae.cli import compare as cli_compare
from pyro_vae.cli import main
from pyro_vae.cli import swap as cli_swap
from pyro_vae.cli.fit import load_data, trained_run
from pyro_vae.cli.kept_jobs import KeptJobs, places_of
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.settings import command, swap_settings
from pyro_vae.errors import DataError

FAST = ["--data", "data.npy", "--epochs", "2", "--hidden", "[4]", "--latent_dim", "2", "--batch_size", "16"]
SWAP = ["swap", *FAST, "--priors", "[StandardNormal, Laplace]", "--seeds", "[0, 1]", "--particles", "5"]
COMPARE = ["compare", *FAST, "--seeds", "[0, 1]", "--elbos", "[STL]", "--particles", "[1]", "--draws", "3"]

KILLED = """
import os, signal, sys
from pyro_vae.cli import main, swap
begun, whole = [], swap.train
def train(*given, **more):
    begun.append(1)
    if len(begun) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*given, **more)
swap.train = train
main(sys.argv[1:])
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).normal(size=(60, 3)))
    return tmp_path


def counted(monkeypatch, module, *, dies_at=None):
    """The trainings that a module begins; at one of them the process dies, as far as Python can tell."""
    begun, whole = [], module.train

    def train(*given, **more):
        begun.append(given)
        if len(begun) == dies_at:
            raise SystemExit
        return whole(*given, **more)

    monkeypatch.setattr(module, "train", train)
    return begun


def read(path):
    with xr.open_dataset(path, engine="h5netcdf") as found:
        return found.load()


def test_a_killed_swap_goes_on_to_the_ranking_of_one_that_was_not(folder, monkeypatch, capsys):
    assert main([*SWAP, "--out", "whole"]) == 0
    said = capsys.readouterr().out
    ended = subprocess.run([sys.executable, "-c", KILLED, *SWAP, "--out", "cut"], timeout=300, check=False)
    assert ended.returncode == -signal.SIGKILL
    kept = sorted(path.parent.name for path in Path("cut").glob("models/*/weights.safetensors"))
    assert kept == ["00-StandardNormal-seed-0", "01-StandardNormal-seed-1"]
    assert not Path("cut/ranking.nc").exists()
    begun = counted(monkeypatch, cli_swap)
    assert main(["swap", "cut"]) == 0
    assert len(begun) == 2, "the others are done"
    assert "2 of 4 trainings are done already" in capsys.readouterr().err
    assert read("cut/ranking.nc").identical(read("whole/ranking.nc"))
    assert main(["swap", "cut"]) == 0
    assert len(begun) == 2, "a finished one trains nothing"
    best = str(read("whole/ranking.nc").model.values[0])
    assert f"Best: {best}" in said
    assert ", saved in whole/models/" in said


def test_each_trained_model_is_a_run_that_check_and_compare_take(folder):
    assert main([*SWAP, "--out", "whole"]) == 0
    held_out = load_data(command("swap", swap_settings).parse_path("whole/config.yaml")).held_out
    with open("whole/ranking.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2"]
    ranked = read("whole/ranking.nc")
    for row in rows:
        assert float(row["log_evidence"]) == pytest.approx(
            float(ranked.log_evidence.sel(model=row["model"])), rel=1e-12
        )
        assert len(row["folder"].split(", ")) == 2, "one of each seed"
        for place in row["folder"].split(", "):
            first, vae, own, *_ = trained_run(f"whole/{place}", None)
            assert type(vae.prior).__name__ == row["model"]
            assert torch.equal(own.x, held_out.x), "held out for one seed is held out for all"
            assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), vae.parameters(), strict=True))
    assert main(["compare", f"whole/{place}", "--draws", "2", "--rows", "4", "--elbos", "[STL]"]) == 0


def test_a_comparison_over_seeds_that_dies_goes_on_with_those_done(folder, monkeypatch):
    assert main([*COMPARE, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        counted(patch, cli_compare, dies_at=2)
        with pytest.raises(SystemExit):
            main([*COMPARE, "--out", "cut"])
    assert Path("cut/seeds/00-seed-0/comparison.nc").exists()
    assert not Path("cut/comparison.nc").exists()
    begun = counted(monkeypatch, cli_compare)
    assert main(["compare", "cut"]) == 0
    assert len(begun) == 1
    one, other = read("cut/comparison.nc"), read("whole/comparison.nc")
    for name in ("elbo", "elbo_se", "bias", "gradient_norm"):
        assert one[name].identical(other[name]), name


def test_a_sweep_goes_on_with_its_own_data_and_command_only(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        counted(patch, cli_compare, dies_at=2)
        with pytest.raises(SystemExit):
            main([*COMPARE, "--out", "cut"])
    assert main(["swap", "cut"]) == 2
    assert "cut: was written by pyro-vae compare; resume with pyro-vae compare cut" in capsys.readouterr().err
    np.save("data.npy", np.random.default_rng(1).normal(size=(60, 3)))
    assert main(["compare", "cut"]) == 2
    assert "cut was started with other data than" in capsys.readouterr().err
    assert main(["swap", "nowhere"]) == 2
    assert "nowhere: holds no sweep.json; give the folder of an interrupted pyro-vae swap" in capsys.readouterr().err


def test_the_best_is_named_with_those_that_are_not_told_apart_from_it():
    ranked = xr.Dataset(
        {"difference": ("model", [0.0, -1.0, -1.0, np.nan]), "difference_se": ("model", [0.0, 0.6, 0.4, np.nan])},
        {"model": ["a", "near", "far", "diverged"]},
    )
    assert cli_swap._best_of(ranked) == "Best: a (within 2 standard errors of near)"
    assert cli_swap._best_of(ranked.isel(model=[0, 2])) == "Best: a"


def test_a_finished_job_is_taken_as_it_was_written_only(tmp_path):
    run = RunFolder(tmp_path / "sweep")
    kept = KeptJobs(run, "swap", swap_settings, Namespace(data="data.npy"), None)
    run.within("models/00-a").text("weights.txt", "1")
    assert kept.path("models/00-a", "weights.txt") == run.path / "models/00-a" / "weights.txt"
    assert kept.path("models/00-a", "other.txt") is None
    assert kept.path("models/01-b", "weights.txt") is None
    (run.path / "models/00-a" / "weights.txt").write_text("2")
    with pytest.raises(DataError, match=r"weights\.txt: has changed since it was written; copy the run again"):
        kept.path("models/00-a", "weights.txt")


def test_places_are_short_and_different_whatever_jobs_are_called():
    places = places_of("models", ["a b", "a-b", "x" * 200, "·"])
    assert [*places.values()] == ["models/00-a-b", "models/01-a-b", "models/02-" + "x" * 80, "models/03-"]


@pytest.mark.parametrize("command", ["swap", "compare"])
def test_a_sweep_whose_mark_is_damaged_is_refused_in_a_sentence(command, folder, capsys):
    (folder / "out").mkdir()
    for name in ("sweep.json", "config.yaml"):
        (folder / "out" / name).write_text("{")
    (folder / "out" / "SHA256SUMS").write_text(f"{'0' * 64}  sweep.json\n")
    assert main([command, "out"]) == 2
    assert "sweep.json: has changed since it was written; copy the run again" in capsys.readouterr().err
