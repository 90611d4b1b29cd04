"""The command line is the same from command to command: RUN, --out, --version and help."""

import importlib
import warnings
from pathlib import Path

import numpy as np
import pytest

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.cli.commands import COMMANDS, RUN_FLAGS, TABLES, parser, with_named_run
from pyro_vae.cli.run_folder import folder_for

FAST = ["--epochs", "2", "--hidden", "[4]", "--latent_dim", "2", "--batch_size", "16"]


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert pv.__version__ in capsys.readouterr().out


def test_without_arguments_the_help_is_printed(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert "Examples:" in shown


@pytest.mark.parametrize("command", RUN_FLAGS)
def test_a_run_is_given_right_after_every_command_or_by_its_flag(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    flag = RUN_FLAGS[command]
    name = flag.removeprefix("--")
    for flags in ([command, "mine"], [command, flag, "mine"], [command, f"{flag}=mine"]):
        flags = with_named_run(flags)
        assert parser(flags).parse_args(flags)[command][name] == "mine"
    last = with_named_run([command, "--seed", "3", "mine"])
    assert last == [command, flag, "mine", "--seed", "3"]


def test_values_of_settings_are_no_run():
    for flags in (["fit", "--data", "x.npy"], ["demo", "--out", "here"], ["check"], ["fit", "--hidden", "4", "8"], []):
        assert with_named_run(flags) == flags


@pytest.mark.parametrize("command", COMMANDS)
def test_out_is_never_required_and_its_help_states_one_rule(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    told = shown[shown.rindex("--out OUT") :]
    assert f"a new {'file' if command in (*TABLES, 'explore') else 'folder'}" in told[:120]
    assert "with a number added if that name is taken" in told[:300]
    assert "(required" not in told[:40]


def test_the_folder_is_of_the_command_or_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_for("swap", None) == "runs/swap"
    Path("runs/swap").mkdir(parents=True)
    assert folder_for("swap", None) == "runs/swap-2"
    assert folder_for("compare", None, "runs/fit") == "runs/fit/compare"
    assert folder_for("compare", "mine", "runs/fit") == "mine"


def test_all_commands_work_with_the_run_and_no_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).normal(size=(40, 3)))
    assert main(["fit", "--data", "data.npy", *FAST]) == 0
    assert main(["fit", "runs/fit", "--epochs", "3"]) == 0
    assert main(["compare", "runs/fit", "--draws", "2", "--rows", "4", "--elbos", "[STL]"]) == 0
    assert Path("runs/fit/compare/comparison.nc").exists()


@pytest.mark.filterwarnings("always")
def test_a_warning_of_the_library_is_one_sentence_and_one_of_others_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(60, 3)))

    def of_ours_and_others(*_):
        warnings.warn("the network gives k outside its range", stacklevel=2)
        warnings.warn("of another", stacklevel=1)

    monkeypatch.setattr(importlib.import_module("pyro_vae.train.fit"), "warn_of_limits", of_ours_and_others)
    with pytest.warns(UserWarning, match="of another") as left:
        assert main(["fit", "--data", "x.npy", "--out", "run", *FAST]) == 0
    assert len(left) == 1
    said = capsys.readouterr().err
    assert "pyro-vae: the network gives k outside its range\n" in said
    assert "of another" not in said
