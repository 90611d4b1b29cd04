"""A sweep that is killed keeps what is done, and goes on with it to the same numbers."""

import csv
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from jsonargparse import Namespace

from pyro_vae.cli import check as cli_check
from pyro_vae.cli import compare as cli_compare
from pyro_vae.cli import main
from pyro_vae.cli import swap as cli_swap
from pyro_vae.cli.checksums import compute_checksum, read_checksums, record_checksum
from pyro_vae.cli.kept_jobs import KeptJobs, is_sweep, places_of, stopped_sweep
from pyro_vae.cli.load_data import load_data
from pyro_vae.cli.load_run import trained_run
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.cli.settings import command, swap_settings
from pyro_vae.diagnose import DIAGNOSTICS
from pyro_vae.diagnose import check as diagnose_check
from pyro_vae.errors import DataError, OutputError
from pyro_vae.train.distributed.group import available_cores

FAST = ["--data", "data.npy", "--epochs", "2", "--hidden", "[4]", "--latent_dim", "2", "--batch_size", "16"]
FAST += ["--engine", "eager", "--device", "cpu"]
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
    assert "cut was started with other data; resume with the same data" in capsys.readouterr().err
    assert main(["swap", "nowhere"]) == 2
    assert "nowhere: holds no sweep.json; give the folder of an interrupted pyro-vae swap" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["swap", "cut"], ["swap", "--config", "cut/config.yaml"]])
def test_a_folder_names_no_cluster_and_no_more_workers_than_cores(flags, folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        counted(patch, cli_swap, dies_at=2)
        with pytest.raises(SystemExit):
            main([*SWAP, "--workers", "1", "--out", "cut"])
    config, connected = Path("cut/config.yaml"), []
    assert "cluster:" not in config.read_text()
    monkeypatch.setattr("pyro_vae.cli.sweep._cluster", connected.append)
    for wrong in ("cluster: ray://evil.example:10001", "workers: 1000000"):
        changed = [line for line in config.read_text().splitlines() if line.split(":")[0] not in ("workers", "cluster")]
        config.write_text("\n".join([*changed, wrong, ""]))
        record_checksum(Path("cut"), "config.yaml", compute_checksum(config))
        if "cluster" in wrong:
            assert main(flags) == 2
            assert "config.yaml: 'cluster' is not a setting of a run" in capsys.readouterr().err
        else:
            assert stopped_sweep("swap", "cut", Namespace(trust=None)).workers == available_cores()
    assert not connected


def test_the_best_is_named_with_those_that_are_not_told_apart_from_it():
    ranked = xr.Dataset(
        {"difference": ("model", [0.0, -1.0, -1.0, np.nan]), "difference_se": ("model", [0.0, 0.6, 0.4, np.nan])},
        {"model": ["a", "near", "far", "diverged"]},
    )
    assert cli_swap._best_of(ranked) == "Best: a (within 2 standard errors of near)"
    assert cli_swap._best_of(ranked.isel(model=[0, 2])) == "Best: a"


def test_a_finished_job_is_taken_as_it_was_written_only(tmp_path):
    run = RunFolder(tmp_path / "sweep")
    kept = KeptJobs(run, "swap", Namespace(data="data.npy"), {})
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


@pytest.fixture
def run(folder):
    assert main(["fit", *FAST, "--out", "run"]) == 0
    return folder / "run"


CHECK = ["--rows", "8", "--budget", "30"]


@pytest.fixture
def cheap(monkeypatch):
    """Check by what takes no time, all of it within the budget."""
    names = {"khat", "predictive_check", "collapse"}
    monkeypatch.setattr("pyro_vae.plots.html_report.as_html", lambda *_, **__: "its figures take seconds")
    monkeypatch.setattr(diagnose_check, "DIAGNOSTICS", [one for one in DIAGNOSTICS if one.name in names])
    monkeypatch.setattr(diagnose_check, "_measure_evaluation", lambda *_: 1e-9)


def test_a_killed_check_goes_on_to_the_results_of_one_that_was_not(run, cheap, monkeypatch, capsys):
    assert main(["check", str(run), "--out", "whole", *CHECK]) == 0
    put = cli_check._KeptDiagnostics.__setitem__
    with monkeypatch.context() as patch:
        patch.setattr(
            cli_check._KeptDiagnostics, "__setitem__", lambda *given: dies() if len(given[0]) == 2 else put(*given)
        )
        with pytest.raises(SystemExit):
            main(["check", str(run), "--out", "cut", *CHECK])
    assert len([*Path("cut/diagnostics").glob("*.nc")]) == 2
    capsys.readouterr()
    assert main(["check", "cut"]) == 0
    told = capsys.readouterr().err
    assert "done already: Importance weights of q" in told
    assert "Posterior predictive check (about" in told
    assert "Importance weights of q (about" not in told
    with xr.open_datatree("cut/check.nc") as cut, xr.open_datatree("whole/check.nc") as whole:
        for node in (*cut.subtree, *whole.subtree):
            node.attrs.pop("created_at", None)
        assert cut.identical(whole)
    assert {path.name for path in Path("cut").iterdir()} == {"check.nc", "report.html", "SHA256SUMS"}
    assert [name for name, _ in read_checksums(Path("cut"))] == ["check.nc", "report.html"]


def test_a_stopped_check_goes_on_with_its_own_run_and_settings_only(run, monkeypatch, capsys):
    stopped = ["check", "run", "--budget", "1e-9", "--rows", "4"]
    with monkeypatch.context() as patch:
        patch.setattr("pyro_vae.plots.html_report.as_html", interrupt)
        assert main(stopped) == 130
    assert "resume with pyro-vae check run/check" in capsys.readouterr().err
    assert main(["check", "run/check", "--rows", "5"]) == 2
    assert "run/check is an interrupted check with its own rows; leave --rows out" in capsys.readouterr().err
    assert main(["fit", "run", "--epochs", "3"]) == 0
    assert main(["check", "run/check"]) == 2
    assert (
        "run/check was started with other weights; resume with the same weights, or start anew"
        in capsys.readouterr().err
    )
    assert main(stopped) == 0
    assert "run/check holds an interrupted check; resume it with pyro-vae check run/check" in (capsys.readouterr().err)
    assert Path("run/check-2/check.nc").exists()


def interrupt(*_, **__):
    raise KeyboardInterrupt


def dies(*_, **__):
    raise SystemExit


SINGLE = ["compare", *FAST, "--elbos", "[STL]", "--particles", "[1]", "--draws", "3"]
TRAINED = ["compare", "run", "--elbos", "[STL]", "--particles", "[1]", "--draws", "3", "--rows", "4"]
BUSY = {
    "swap": (SWAP, "pyro_vae.cli.swap.train"),
    "compare over seeds": (COMPARE, "pyro_vae.cli.compare.train"),
    "compare": (SINGLE, "pyro_vae.cli.compare.train"),
    "compare RUN": (TRAINED, "pyro_vae.cli.compare._compare_moments"),
    "check": (["check", "run", *CHECK], "pyro_vae.cli.check.check"),
}


def during(moment, second, monkeypatch):
    """Run a second command at the first call of a function of the first command; return its exit codes."""
    whole, codes = pkgutil.resolve_name(moment), []

    def busy(*given, **more):
        monkeypatch.setattr(moment, whole)
        codes.append(main(second))
        return whole(*given, **more)

    monkeypatch.setattr(moment, busy)
    return codes


@pytest.mark.parametrize(("arguments", "moment"), BUSY.values(), ids=BUSY.keys())
def test_two_commands_do_not_write_to_one_folder_at_once(arguments, moment, run, cheap, monkeypatch, capsys):
    codes = during(moment, [*arguments, "--out", "out"], monkeypatch)
    assert main([*arguments, "--out", "out"]) == 0
    assert codes == [2]
    assert "out: another run is writing to this folder" in capsys.readouterr().err
    assert not Path("out/.lock").exists()


def test_a_sweep_is_not_resumed_twice_at_once(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        counted(patch, cli_compare, dies_at=2)
        with pytest.raises(SystemExit):
            main([*COMPARE, "--out", "cut"])
    codes = during("pyro_vae.cli.compare.train", ["compare", "cut"], monkeypatch)
    assert main(["compare", "cut"]) == 0
    assert codes == [2]
    assert "cut: another run is writing to this folder" in capsys.readouterr().err


def test_a_folder_that_another_run_filled_before_it_was_locked_is_refused(tmp_path):
    late, first = RunFolder(tmp_path), RunFolder(tmp_path)
    with first.locked():
        first.text("note.txt", "the first run")
    with pytest.raises(OutputError, match=r"already holds (note\.txt|SHA256SUMS); nothing"), late.locked():
        pass


MOMENTS = {
    "before its first training is done": "pyro_vae.cli.{}.train",
    "before its settings are written": "pyro_vae.cli.kept_jobs.KeptJobs.write_settings",
    "before its first result is written": "pyro_vae.cli.run_folder.RunFolder.within",
}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS.keys())
def test_a_sweep_killed_before_its_first_result_is_not_stuck(moment, folder, monkeypatch):
    arguments = [*SWAP, "--seeds", "[0]"]
    with monkeypatch.context() as patch:
        patch.setattr(moment.format(arguments[0]), dies)
        with pytest.raises(SystemExit):
            main([*arguments, "--out", "cut"])
    assert is_sweep("cut") == ("within" in moment)
    assert main([arguments[0], "cut"] if is_sweep("cut") else [*arguments, "--out", "cut"]) == 0


@pytest.mark.parametrize("moment", [*MOMENTS.values()][1:], ids=[*MOMENTS.keys()][1:])
def test_a_check_killed_before_its_first_result_is_not_stuck(moment, run, monkeypatch):
    arguments = ["check", "run", "--out", "cut", "--rows", "4", "--budget", "1e-9"]
    with monkeypatch.context() as patch:
        patch.setattr(moment, dies)
        with pytest.raises(SystemExit):
            main(arguments)
    assert main(["check", "cut"] if is_sweep("cut") else arguments) == 0


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [SWAP, COMPARE, ["check", "run", *CHECK]], ids=["swap", "compare", "check"])
def test_one_that_is_killed_at_any_moment_goes_on(arguments, run):
    """By the clock of this machine, from its first file on."""
    called = [sys.executable, "-m", "pyro_vae", *arguments, "--out", "cut"]
    for i in range(6):
        process = subprocess.Popen(called, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not Path("cut").exists():
            time.sleep(0.001)
        time.sleep(0.5 * i)
        process.kill()
        process.wait()
        if is_sweep("cut") or not list(Path("cut").glob("*.nc")):  # else it was finished
            assert main([arguments[0], "cut"] if is_sweep("cut") else [*arguments, "--out", "cut"]) == 0
        shutil.rmtree("cut")
