"""The commands are right, or end in one sentence, wherever and however they are called."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import joblib
import numpy as np
import pytest

from pyro_vae.__main__ import run as run_process
from pyro_vae.cli import main

ROOT = Path(__file__).resolve().parents[2]
FIT = ["fit", "--data", "x.npy", "--epochs", "1", "--latent_dim", "2", "--hidden", "[4]", "--engine", "eager"]
SCORE = ["score", "run", "--draws", "5", "--num_particles", "5"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(60, 3)).astype("f4"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*FIT, "--out", "run", "--device", "cpu"]) == 0
        assert main([*SCORE, "--out", "scores.csv"]) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scored(out):
    """The exit code, and the table that score has written, to be compared with that of an undisturbed call."""
    return main([*SCORE, "--out", out]), Path(out).read_text()


def test_from_a_thread_and_a_forked_pool(folder):
    whole = 0, Path("scores.csv").read_text()
    found = []
    thread = threading.Thread(target=lambda: found.append(scored("thread.csv")))
    thread.start()
    thread.join()
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        found.append(pool.submit(scored, "forked.csv").result(timeout=100))
    assert found == [whole, whole]


@pytest.mark.slow
def test_from_loky(folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cli")]))
    found = joblib.Parallel(2, backend="loky")(joblib.delayed(scored)(f"{i}.csv") for i in range(2))
    assert found == [(0, Path("scores.csv").read_text())] * 2


PYTHON = [sys.executable]
CALLS = {
    "warnings are errors": ([*PYTHON, "-W", "error", "-m", "pyro_vae"], {}),
    "no assertions": ([*PYTHON, "-O", "-m", "pyro_vae"], {}),
    "isolated": (
        [*PYTHON, "-I", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
         "from pyro_vae.__main__ import run; sys.exit(run())"], {},
    ),
    "the C locale": (
        [*PYTHON, "-m", "pyro_vae"], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("call", "variables"), CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("arguments", [FIT, SCORE, ["check", "run", "--rows", "4", "--budget", "0.001"], ["--help"]])
def test_however_python_is_called(arguments, call, variables, folder):
    out = [] if arguments == ["--help"] else ["--out", "out.csv" if arguments == SCORE else "out"]
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*call, *arguments, *out], env=environment, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    if arguments == SCORE:
        assert Path("out.csv").read_text() == Path("scores.csv").read_text()


NOWHERE = dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"), "/proc/none")
VARIABLES = {
    "no HOME": {"HOME": None},
    "no place for caches and temporary files": NOWHERE,
    "20 columns": {"COLUMNS": "20"},
    "a dumb terminal": {"TERM": "dumb"},
}


@pytest.mark.parametrize("variables", VARIABLES.values(), ids=VARIABLES.keys())
def test_whatever_the_environment(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    if variables is NOWHERE:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    assert scored("again.csv") == (0, Path("scores.csv").read_text())


def test_training_needs_a_temporary_folder(folder, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc/none"])
    assert main([*FIT, "--out", "new"]) == 2
    sentence = "pyro-vae: no folder for temporary files can be written (No usable temporary directory found in "
    assert capsys.readouterr().err == sentence + "['/proc/none']); set TMPDIR to one that can\n"
    assert not Path("new").exists()


@pytest.mark.slow
def test_training_needs_a_cache_folder_for_torch(folder):
    """In a process of its own, where torch's compiler is not imported yet."""
    done = subprocess.run(
        [*PYTHON, "-m", "pyro_vae", *FIT, "--out", "new"], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": "/proc/none", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("pyro-vae: torch cannot create its cache folder (")
    assert done.stderr.endswith("; set TMPDIR or TORCHINDUCTOR_CACHE_DIR to a folder that can be written\n")
    assert not Path("new").exists()


@pytest.mark.parametrize("name", ["with a space", "\u6f22\u5b57\u00e9"])
def test_whatever_the_names(name, folder):
    Path(name).mkdir()
    shutil.copytree("run", Path(name, "run"))
    shutil.copy("x.npy", Path(name, "x.npy"))
    arguments = ["score", f"{name}/run", *SCORE[2:], "--data", f"{name}/x.npy", "--out", f"{name}/out.csv"]
    assert main(arguments) == 0
    assert Path(name, "out.csv").read_text().count("\n") == 61


@pytest.mark.parametrize("command", ["fit", "score", "check", "here"])
def test_names_that_are_not_utf_8_are_refused_before_anything_is_written(command, folder, monkeypatch, capsys):
    name = os.fsdecode(b"b\xffad")
    Path(name).mkdir()
    if command == "here":
        monkeypatch.chdir(name)
    arguments = {
        "fit": [*FIT, "--out", f"{name}/run"], "score": ["score", f"{name}/run"], "check": ["check", f"{name}/run"],
        "here": ["fit", "--data", "../x.npy"],
    }  # fmt: skip
    assert main(arguments[command]) == 2
    assert capsys.readouterr().err.endswith(
        r"ad" + {"here": ""}.get(command, "/run") + ": this name is not valid UTF-8, which the settings of a run need; "
        "rename it\n"
    )
    assert not list((folder / name).iterdir())


def test_a_folder_that_is_gone_is_no_place_to_call_from(folder, monkeypatch, capsys):
    Path("gone").mkdir()
    monkeypatch.chdir("gone")
    (folder / "gone").rmdir()
    assert main(["fit", "--data", "/x.npy"]) == 2
    assert "the current folder was deleted; change to another" in capsys.readouterr().err
    monkeypatch.chdir(folder)


def in_a_child(arguments, prepare):
    """Run the command in a fork whose standard output ``prepare`` has changed; return its exit code."""
    if not (child := os.fork()):
        code = 99
        try:
            prepare()
            sys.argv = ["pyro-vae", *arguments]
            code = run_process()
            if sys.stdout is not None:
                sys.stdout.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def writing_to(number):
    os.dup2(number, 1)
    sys.stdout = open(1, "w")  # noqa: SIM115


def test_where_nobody_reads_the_work_is_done_all_the_same(folder):
    """As behind ``| head -1``."""
    reading, writing = os.pipe()
    os.close(reading)
    assert in_a_child([*SCORE, "--out", "piped.csv"], lambda: writing_to(writing)) == 0
    os.close(writing)
    assert Path("piped.csv").read_text() == Path("scores.csv").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_where_output_cannot_be_written_the_work_is_done_all_the_same(folder, capfd):
    full = os.open("/dev/full", os.O_WRONLY)
    assert in_a_child([*SCORE, "--out", "full.csv"], lambda: writing_to(full)) == 0
    os.close(full)
    assert Path("full.csv").read_text() == Path("scores.csv").read_text()
    assert capfd.readouterr().err.count("pyro-vae: the output cannot be written (No space left on device); cont") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_where_errors_cannot_be_written_either_the_work_is_done_all_the_same(folder):
    """As behind ``> log 2>&1`` on a full disk."""

    def prepare():
        writing_to(full)
        sys.stderr = sys.stdout

    full = os.open("/dev/full", os.O_WRONLY)
    assert in_a_child([*SCORE, "--out", "both.csv"], prepare) == 0
    os.close(full)
    assert Path("both.csv").read_text() == Path("scores.csv").read_text()


def test_without_standard_output_the_work_is_done_all_the_same(folder):
    """As Python starts after ``>&-``."""
    assert in_a_child([*SCORE, "--out", "closed.csv"], lambda: setattr(sys, "stdout", None)) == 0
    assert Path("closed.csv").read_text() == Path("scores.csv").read_text()
