"""Commands that are killed or hung up on can be begun again, and text from files is shown as it is."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pyro_vae.__main__ import run
from pyro_vae.cli import main
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.core.signals import ending_signals
from pyro_vae.errors import DataError, OutputError, SettingsError
from pyro_vae.train.checkpoint.rotation import locked

FAST = ["--epochs", "1", "--latent_dim", "2", "--hidden", "[4]", "--engine", "eager", "--device", "cpu"]


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Figures take longer than the trainings here."""
    monkeypatch.setattr("pyro_vae.cli.fit_command.save_fit", lambda *_: None)
    monkeypatch.setattr("pyro_vae.cli.fit_command.show_baseline", lambda *_, **__: None)


@pytest.fixture
def data(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))
    return "x.npy"


@pytest.mark.parametrize("left", [[".lock"], [".lock", "run.json", "SHA256SUMS"], [".config.yaml.part-7", ".lock"]])
def test_a_run_that_was_killed_as_it_began_is_begun_again(left, data, undrawn):
    Path("run").mkdir()
    for name in left:
        Path("run", name).write_text('{"data_hash": "of other data"}' if name == "run.json" else "")
    assert main(["fit", "--data", data, "--out", "run", *FAST]) == 0
    assert not list(Path("run").glob(".*"))


def test_a_run_that_begins_just_now_is_left_alone(tmp_path):
    with locked(tmp_path), pytest.raises(OutputError, match="another run is writing to this folder"):
        RunFolder(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "notes.txt", "checkpoints"])
def test_what_a_run_can_go_on_from_is_never_removed(name, tmp_path):
    for file in (".lock", "run.json", name):
        (tmp_path / file).write_text("")
    with pytest.raises(OutputError, match="already holds"):
        RunFolder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "run.json", name}


def test_a_hang_up_ends_as_sigterm_does(data, monkeypatch, capsys):
    figure = RunFolder.figure

    def hung_up(run, name, drawn):
        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, "figure", figure)
            os.kill(os.getpid(), signal.SIGHUP)
            figure(run, name, drawn)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has set to be ignored
    try:
        with monkeypatch.context() as patched:
            patched.setattr(RunFolder, "figure", hung_up)
            assert main(["fit", "--data", data, "--out", "run", *FAST]) == 130
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "resume with pyro-vae fit --resume run\npyro-vae: interrupted" in capsys.readouterr().err
    assert main(["fit", "--resume", "run"]) == 0


def test_a_hang_up_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ending_signals() == [signal.SIGINT, signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_brackets_and_control_characters_of_paths_are_shown_as_they_are(data, undrawn, capsys):
    name = "a[red]\x1b[2J\nb.npy"
    shutil.copy(data, name)
    assert main(["fit", "--data", name, "--out", "out[red]/\x1b[2Jrun", *FAST]) == 0
    shown = capsys.readouterr()
    assert "Written to out[red]/\\x1b[2Jrun: " in shown.out
    assert "a[red]\\x1b[2J" in shown.out
    assert "\x1b" not in shown.out + shown.err
    assert main(["fit", "--data", f"{name}.npy", "--out", "other", *FAST]) == 2
    assert "pyro-vae: a[red]\\x1b[2J\\nb.npy.npy: no such file" in capsys.readouterr().err


def test_control_characters_of_columns_are_shown_as_they_are(data, capsys):
    rows = "".join(f"{i % 2},{i * 0.37 % 1}\n" for i in range(50))
    Path("x.csv").write_text('"a\x1b[2Jb",c\n' + rows)
    assert main(["fit", "--data", "x.csv", "--out", "run", "--likelihood", "auto", *FAST]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert "a\\x1b[2Jb" in shown.out


@pytest.mark.parametrize("kind", [DataError, OutputError, SettingsError])
def test_an_error_is_one_line_whatever_it_names(kind):
    assert str(kind("a\r\x1b]0;b\x07\nc\u202e\ud800; d")) == r"a\r\x1b]0;b\x07\nc\u202e\ud800; d"


@pytest.mark.slow
def test_a_run_killed_at_any_moment_of_its_beginning_goes_on(data):
    for i in range(10):
        arguments = [sys.executable, "-m", "pyro_vae", "fit", "--data", data, "--out", "run", *FAST]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not Path("run").exists():
            time.sleep(0.001)
        time.sleep(0.015 * i)
        process.kill()
        process.wait()
        again = ["--resume", "run"] if Path("run/config.yaml").exists() else ["--data", data, "--out", "run", *FAST]
        assert main(["fit", *again]) == 0
        shutil.rmtree("run")


def test_a_stream_that_cannot_hold_a_character_writes_its_code(monkeypatch):
    """As in the C locale."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["fit"]) == 2
    print("─ ELBO")
    sys.stdout.flush()
    assert written.getvalue().endswith(b"\\u2500 ELBO\n")


def test_ctrl_c_while_the_command_is_imported_is_one_line(monkeypatch, capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyro_vae.cli.main", interrupted)
    assert run() == 130
    assert capsys.readouterr().err == "pyro-vae: interrupted\n"


def test_a_schedule_that_no_checkpoint_can_hold_is_refused(data, capsys):
    schedule = ["--scheduler", "MultiplicativeLR", "--scheduler.lr_lambda", "builtins.abs"]
    assert main(["fit", "--data", data, "--out", "run", *FAST, *schedule]) == 2
    assert "pyro-vae: the scheduler cannot be used (" in capsys.readouterr().err
