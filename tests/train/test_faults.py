"""Damaged files, full disks, read-only folders, kills: the exact state or a sentence, never a silent wrong answer."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pyro_vae as pv
from faults import damage, fuzz, hostile
from faults.formats import FORMATS
from faults.kill import fit, kills
from pyro_vae.cli import main
from pyro_vae.cli.checksums import SUMS, validate_unchanged
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.errors import DataError, OutputError
from pyro_vae.train.checkpoint.rotation import Checkpoints, locked
from pyro_vae.train.checkpoint.tensor_file import read_tree, write_tree


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main(fit(folder, "eager", epochs=1)) == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def totals(counts) -> Counter:
    return sum((Counter(of_one) for of_one in counts.values()), Counter())


def test_a_damaged_file_is_refused_or_exact(run):
    counts = damage.trials(run, 200)
    assert damage.WRONG not in totals(counts), counts
    assert totals(counts)[damage.REFUSED] > 150
    assert totals(counts)[damage.FELL_BACK] > 3
    assert not list(run.rglob("*.part*"))


def test_the_trials_would_see_a_reader_that_does_not_look(run, monkeypatch):
    """Power: without the checksum, some damages are silent."""
    monkeypatch.setattr("pyro_vae.train.checkpoint.tensor_file._validate_checksum", lambda *_: None)
    monkeypatch.setattr(damage, "validate_unchanged", lambda _: None)
    assert totals(damage.trials(run, 100))[damage.WRONG] > 30


def test_hostile_folders_are_refused_and_run_nothing(finished, tmp_path):
    every = hostile.every()
    assert len(every) >= 200
    found = hostile.counts(tmp_path, finished, every[::20])
    assert {*found} == {"class paths", "callables", "links, FIFOs, devices, giants", "bombs"}
    for count in found.values():
        assert count["wrong"] == count["code run"] == 0, found
        assert count["peak memory, MiB"] < 1024


def test_the_hostile_folders_would_run_code_that_nobody_stops(finished, tmp_path, monkeypatch):
    """Power: without the validation of what settings name, a payload is run."""
    monkeypatch.setattr("pyro_vae.cli.trust.Trust.validate", lambda *_: None)
    payload = next(one for one in hostile.every() if one.name == "prior: runs.hostile.payload.Own")
    assert hostile.outcome(tmp_path, payload, finished)[:2] == (hostile.WRONG, True)


READ = [kind for kind in FORMATS if kind.name != "checkpoint, resumed"]  # which trains


@pytest.mark.parametrize("kind", READ, ids=[kind.name for kind in READ])
def test_the_files_that_are_fuzzed_are_read_before_they_are_changed(kind, tmp_path, capfd):
    assert [fuzz.read_once(kind, tmp_path, data)[0] for data in kind.seeds()] == [None] * len(kind.seeds())


def test_the_fuzzer_finds_what_is_not_refused_in_a_sentence(tmp_path, monkeypatch):
    """Power: an exception of another library, a process that ends, a number that is none."""
    idx = next(kind for kind in FORMATS if kind.name == "IDX")
    assert fuzz.fuzz(idx, tmp_path, 0.5)["found"] == []
    plants = {
        "KeyError at": lambda *_: {}["a"],
        r"ends the process \(-9\)": lambda *_: os.kill(os.getpid(), signal.SIGKILL),
        "not one sentence: 'one'": lambda *_: (_ for _ in ()).throw(DataError("one")),
    }
    for found, plant in plants.items():
        monkeypatch.setattr("pyro_vae.data.readers._read_idx", plant)
        assert re.match(found, fuzz.fuzz(idx, tmp_path, 0.1)["found"][0])
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr("pyro_vae.data.readers._read_idx", lambda *_: time.sleep(60))
    assert fuzz.fuzz(idx, tmp_path, 0.1)["found"] == ["takes more than 1 s"]


def test_a_whole_folder_is_what_sha256sum_says_too(finished):
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=finished, check=False).returncode == 0
    listed = {line.split("  ")[1] for line in (finished / "SHA256SUMS").read_text().splitlines()}
    files = {path.name for path in finished.iterdir() if path.is_file()}
    assert listed == files - {"SHA256SUMS"}


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_while_a_file_is_replaced_either_of_the_two_is_whole(replaced, tmp_path, monkeypatch):
    """A run that goes on to more epochs writes its settings anew; they must not be refused if it dies just then."""
    run, replace = RunFolder.again(tmp_path), os.replace
    run.text("config.yaml", "epochs: 1")

    def killed(source, target):
        if Path(target).name != "config.yaml":
            return replace(source, target)
        if replaced:
            replace(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run.text("config.yaml", "epochs: 2")
    validate_unchanged(tmp_path / "config.yaml")
    assert (tmp_path / "config.yaml").read_text() == f"epochs: {1 + replaced}"
    run.text("config.yaml", "epochs: 3")
    assert (tmp_path / SUMS).read_text().count("config.yaml") == 1
    (tmp_path / "config.yaml").write_text("epochs: 1")
    with pytest.raises(DataError, match="has changed since it was written"):
        validate_unchanged(tmp_path / "config.yaml")


def test_a_run_folder_without_weights_gives_those_of_its_checkpoint(run):
    whole = pv.load(run).state_dict()
    (run / "weights.safetensors").unlink()
    again = pv.load(run)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.items())


def mounted(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MB."""
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root mounts disks")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted(folder, "-t", "tmpfs", "-o", "size=4m", "tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def brim(folder: Path, spare: int) -> None:
    """Fill a disk but for so many bytes."""
    left = os.statvfs(folder)
    (folder / "full").write_bytes(bytes(left.f_bavail * left.f_bsize - spare))


def test_on_a_full_disk_the_last_checkpoint_is_whole(disk):
    checkpoints = Checkpoints(disk / "run")
    checkpoints.write(1, {"w": torch.ones(5000)}, {})
    brim(disk, 12_000)
    with pytest.raises(
        OutputError, match=r"step-000000002\.safetensors: cannot be written \(No space left on device\); free"
    ):
        checkpoints.write(2, {"w": torch.zeros(5000)}, {})
    step, tree, _, path = checkpoints.newest()
    assert step == 1
    assert torch.equal(tree["w"], torch.ones(5000))
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    (disk / "full").unlink()
    assert checkpoints.write(2, {"w": torch.zeros(5000)}, {}).exists()


@pytest.mark.parametrize("spare", [0, 4096, 20_000, 60_000])
def test_a_run_that_fills_the_disk_ends_in_a_sentence(disk, tmp_path, capsys, spare):
    arguments = fit(tmp_path, "eager", epochs=1)
    arguments[arguments.index("--out") + 1] = str(disk / "run")
    brim(disk, spare)
    assert main(arguments) == 2
    *_, said = capsys.readouterr().err.strip().splitlines()
    assert said.startswith(f"pyro-vae: {disk}")
    assert "No space left on device" in said
    assert not list(disk.rglob("*.part*"))
    if found := Checkpoints(disk / "run").newest():
        assert found[0] > 0
        (disk / "full").unlink()
        assert main(["fit", "--resume", str(disk / "run")]) == 0, "with space again, it goes on"


def test_a_read_only_folder_is_refused_in_a_sentence(disk, tmp_path, capsys):
    write_tree(disk / "a", {"w": torch.ones(2)})
    mounted(disk, "-o", "remount,ro")
    for write in (
        lambda: write_tree(disk / "a", {}),
        lambda: pv.save(pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae(), disk / "b"),
        lambda: Checkpoints(disk).write(1, {}, {}),
        lambda: locked(disk).__enter__(),
    ):
        with pytest.raises(OutputError, match=r"cannot be written \(Read-only file system\); choose another folder"):
            write()
    arguments = fit(tmp_path, "eager", epochs=1)
    arguments[arguments.index("--out") + 1] = str(disk / "run")
    assert main(arguments) == 2
    assert "Read-only file system" in capsys.readouterr().err
    assert read_tree(disk / "a")[0].keys() == {"w"}


def test_a_second_run_in_the_folder_is_refused_in_a_sentence(run, capsys):
    """And it leaves alone what the first is writing just now."""
    with locked(run):
        (run / ".history.nc.part-77").write_bytes(b"half")
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        assert main(["fit", "--resume", str(run)]) == 2
        assert "another run is writing to this folder; wait until it ends" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["fit", "--resume", str(run)]) == 0
    assert not list(run.glob(".*"))


def test_sigterm_while_results_are_written_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    arguments, figure = fit(tmp_path, "eager", epochs=1), RunFolder.figure

    def stopped(run, name, drawn):
        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, "figure", figure)
            os.kill(os.getpid(), signal.SIGTERM)
            figure(run, name, drawn)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, "figure", stopped)
            assert main(arguments) == 130
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    run = tmp_path / "run"
    assert f"resume with pyro-vae fit --resume {run}\npyro-vae: interrupted" in capsys.readouterr().err
    assert not list(run.glob("*.png"))
    assert not list(run.glob(".*"))
    assert main(["fit", "--resume", str(run)]) == 0
    assert len(list(run.glob("*.png"))) == 4


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path):
    told = kills(tmp_path, 10, engine="eager")
    assert told["ended"] == told["equal to the bit"]
