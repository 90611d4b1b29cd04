"""What looks after a training, from the command line."""

import sys

import numpy as np
import pytest
import torch
import xarray as xr

from pyro_vae.cli import main

FLAGS = ["fit", "--data", "data.npy", "--out", "run", "--latent_dim", "2", "--hidden", "[4]", "--engine", "eager"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", torch.randn(60, 5, generator=torch.Generator().manual_seed(0)).numpy())
    return tmp_path


def test_callbacks_schedules_clipping_and_precision_are_flags(folder):
    pytest.importorskip("tensorboard")
    from helpers.callback_checks import scalars, single

    callbacks = ["--callbacks+=EarlyStopping", "--callbacks.patience=3", "--callbacks+=TensorBoard"]
    schedule = ["--scheduler", "ExponentialLR", "--scheduler.gamma", "0.5"]
    optimizer = ["--optimizer", "SGD", "--optimizer.lr", "1e-30", "--clip_norm", "0.5", "--precision", "bf16"]
    assert main([*FLAGS, *callbacks, *schedule, *optimizer, "--epochs", "20"]) == 0
    history = xr.load_dataset(folder / "run" / "history.nc")
    assert "EarlyStopping: by epoch 4" in history.attrs["stopped"]
    assert history.attrs["precision"] == "bf16"
    assert [rate for _, rate in scalars(folder / "run" / "tensorboard")["lr"]] == [
        single(1e-30 * 0.5**epoch) for epoch in range(4)
    ]
    config = (folder / "run" / "config.yaml").read_text()
    for line in ("patience: 3", "gamma: 0.5", "clip_norm: 0.5", "precision: bf16"):
        assert line in config
    assert main(["fit", "--resume", "run"]) == 0


def test_a_schedule_of_one_step_lasts_one_epoch(folder):
    schedule = ["--scheduler", "OneCycleLR", "--scheduler.max_lr", "0.1", "--scheduler.total_steps", "1"]
    assert main([*FLAGS, "--epochs", "1", *schedule]) == 0


def test_a_log_without_tensorboard_is_refused_before_anything_is_done(folder, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main([*FLAGS, "--callbacks+=TensorBoard"]) == 2
    error = capsys.readouterr().err
    assert "TensorBoard needs the tensorboard package, which is not installed; pip install 'pyro-vae[logs]'" in error
    assert "Traceback" not in error
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--callbacks+=EarlyStopping", "--callbacks.patience=0"], "patience is 0; it must be a whole number"),
        (["--callbacks", "[EarlyStopping, EMA]"], "pass restore=False to all but one of them"),
        (["--callbacks+=Early"], "there is no class Early"),
        (["--scheduler", "ReduceLROnPlateau"], "set threshold_mode='abs'"),
        (["--scheduler", "OneCycleLR", "--scheduler.max_lr", "0.1"], "the scheduler cannot be used"),
        (["--clip_norm", "0"], "clip_norm is 0"),
        (["--precision", "bf8"], "bf8"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(flags, sentence, folder, capsys):
    assert main([*FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert sentence in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (folder / "run").exists()
