"""The command line does what the README says: demo, fit, compare; its help; its run folder."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from safetensors.torch import load_file

import pyro_vae as pv
from pyro_vae.cli import demo, main

COMPARED = {"comparison.nc", "comparison.png", "elbos_by_datum.png"}
FIGURES = {"training.png", "reconstructions.png", "prior_samples.png", "latent.png"}
FAST = ["--epochs", "3", "--batch_size", "50", "--hidden", "[16]", "--latent_dim", "3"]
FEW = ["--elbos", "[HandDerivedELBO, TraceMeanField_ELBO]", "--particles", "[1]", "--draws", "5"]


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).normal(size=(300, 6)))
    return "data.npy"


WRITTEN = {
    "history.nc",
    "config.yaml",
    "run.json",
    "weights.safetensors",
    "checkpoints",
    "SHA256SUMS",
    "held_out_rows.txt",
}


def names(folder):
    return {path.name for path in folder.iterdir()}


def is_a_picture(path):
    """It opens, and is neither one colour nor tiny."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return min(pixels.shape) > 300 and (pixels < 128).mean() > 0.002 and (pixels > 200).mean() > 0.2


@pytest.mark.renders
def test_demo_ends_in_a_table_a_verdict_a_check_and_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "linear_check", partial(demo.linear_check, epochs=1))  # test_train has it whole
    assert main(["demo", "--epochs", "10"]) == 0
    shown = capsys.readouterr().out
    for estimator in ("Trace_ELBO", "TraceMeanField_ELBO", "HandDerivedELBO"):
        assert estimator in shown
    assert "Pyro's analytic-KL ELBO and the hand-derived ELBO agree to" in shown
    assert shown.index("agree to") < shown.index("SNR of"), "the verdict comes before the table"
    assert "probabilistic PCA, is 0.0057" in shown
    assert "…" not in shown, "nothing is cut in 80 columns"
    run = tmp_path / "runs/demo"
    assert names(run) == FIGURES | COMPARED | {"history.nc", "weights.safetensors", "SHA256SUMS"}
    assert all(is_a_picture(run / name) for name in names(run) if name.endswith(".png"))
    with xr.open_dataset(run / "history.nc", engine="h5netcdf") as history:
        assert history.sizes["epoch"] == 10
        assert history.validation_elbo[-1] > history.validation_elbo[0]
    with xr.open_dataset(run / "comparison.nc", engine="h5netcdf") as comparison:
        assert comparison.sel(estimator="TraceMeanField_ELBO").difference < 1e-12
    assert main(["demo", "--epochs", "1", "--out", "runs/demo"]) == 2, "it does not write over a run"


def test_fit_writes_a_run_that_compare_reads(table, tmp_path, capsys):
    assert main(["fit", "--data", table, "--out", "run", *FAST]) == 0
    run = tmp_path / "run"
    assert names(run) == FIGURES | WRITTEN
    assert "Trained for 3 epochs on" in capsys.readouterr().out
    assert load_file(run / "weights.safetensors")["guide.encoder.net.0.weight"].shape == (16, 6)
    (tmp_path / "elsewhere").mkdir()
    assert main(["compare", "--run", "run", "--out", "compared", *FEW]) == 0
    assert names(tmp_path / "compared") == COMPARED | {"SHA256SUMS", "config.yaml"}
    with xr.open_dataset(tmp_path / "compared/comparison.nc", engine="h5netcdf") as comparison:
        assert comparison.sizes["datum"] == 60, "the run's own held-out data"
        assert comparison.attrs["dtype"] == "torch.float64"
        trained = comparison.elbo.values
    assert main(["compare", "--run", "run", "--out", "single", *FEW, "--precision", "float32"]) == 0
    with xr.open_dataset(tmp_path / "single/comparison.nc", engine="h5netcdf") as comparison:
        assert comparison.attrs["dtype"] == "torch.float32"
        assert comparison.elbo.values == pytest.approx(trained, abs=1, nan_ok=True), "the same trained weights"


def test_compare_refuses_settings_that_a_run_has_already(table, tmp_path, capsys):
    assert main(["fit", "--data", table, "--out", "run", *FAST]) == 0
    assert main(["compare", "--run", "run", "--out", "compared", "--epochs", "5"]) == 2
    assert "RUN already sets epochs; leave --epochs out" in capsys.readouterr().err
    assert not (tmp_path / "compared").exists()


@pytest.mark.slow
def test_compare_without_a_run_trains_first(table, tmp_path):
    assert main(["compare", "--data", table, "--out", "compared", "--draws", "5", *FAST]) == 0
    assert names(tmp_path / "compared") >= COMPARED


def test_settings_come_from_yaml_and_flags_and_are_kept(table, tmp_path):
    (tmp_path / "fit.yaml").write_text(
        """
data: data.npy
out: run
epochs: 2
batch_size: 40
latent_dim: 2
hidden: [8]
likelihood:
  class_path: pyro_vae.likelihoods.Normal
  init_args: {scale: 0.3}
elbo: {class_path: pyro_vae.elbo.HandDerivedELBO, init_args: {num_particles: 2}}
optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1.0e-5}}
"""
    )
    assert main(["fit", "--config", "fit.yaml", "--epochs", "1"]) == 0
    with xr.open_dataset(tmp_path / "run/history.nc", engine="h5netcdf") as history:
        assert history.sizes["epoch"] == 1, "a flag after --config overrides it"
        assert history.attrs["estimator"] == "HandDerivedELBO"
        assert history.attrs["optimizer"] == "SGD"
    weights = load_file(tmp_path / "run/weights.safetensors")
    assert weights["model.decoder.fixed_scale"] == pytest.approx(0.3)
    assert weights["guide.encoder.net.2.bias"].shape == (4,)
    kept = (tmp_path / "run/config.yaml").read_text()
    again = kept.replace("out: run", "out: again")
    (tmp_path / "again.yaml").write_text(again)
    assert main(["fit", "--config", "again.yaml"]) == 0
    repeated = load_file(tmp_path / "again/weights.safetensors")
    assert all(torch.equal(repeated[name], value) for name, value in weights.items()), "the same run again"


def test_flags_may_be_written_with_dashes(table, tmp_path):
    arguments = ["fit", "--data", table, "--out", "run", "--epochs=1", "--batch-size", "50", "--latent-dim=2"]
    assert main([*arguments, "--optimizer.lr", "1e-4", "--held-out", "0.5"]) == 0


def test_a_part_of_the_users_own_by_its_dotted_path(table, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import pyro.distributions as dist\n"
        "import pyro_vae as pv\n"
        "class Wide(pv.priors.StandardNormal):\n"
        "    def __init__(self, latent_dim: int, width: float = 2.0):\n"
        "        super().__init__(latent_dim)\n"
        "        self.scale.fill_(width)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["fit", "--data", table, "--out", "run", "--prior", "mine.Wide", "--prior.width", "3", *FAST]) == 0
    assert "width: 3.0" in (tmp_path / "run/config.yaml").read_text()


def test_the_users_class_in_the_current_folder_is_found_by_the_installed_command(table, tmp_path):
    (tmp_path / "beside.py").write_text("import pyro_vae as pv\n\n\nclass Mine(pv.priors.Laplace):\n    pass\n")
    script = shutil.which("pyro-vae", path=str(Path(sys.executable).parent))
    assert script, "the package is installed"
    fit = [script, "fit", "--data", table, "--out", "run", "--prior", "beside.Mine", *FAST]
    ended = subprocess.run(fit, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "beside.Mine" in (tmp_path / "run/config.yaml").read_text()


def test_main_leaves_the_places_of_modules_as_they_were(table):
    before = list(sys.path)
    assert main(["fit", "--data", "nowhere.csv", "--out", "run"]) == 2
    assert sys.path == before


@pytest.mark.parametrize(
    ("flags", "net", "width"),
    [
        (["--likelihood", "Categorical", "--likelihood.levels", "20"], "model.decoder.net.2.weight", 20 * 6),
        (["--posterior", "LowRankNormal", "--posterior.rank", "2"], "guide.encoder.net.2.weight", 4 * 3),
        (
            ["--likelihood", "DiscretizedLogisticMixture", "--likelihood.components", "2", "--likelihood.levels", "20"],
            "model.decoder.net.2.weight", 3 * 2 * 6,
        ),
    ],
)  # fmt: skip
def test_networks_are_as_wide_as_the_settings_of_a_part_ask(flags, net, width, table, tmp_path):
    levels = np.random.default_rng(0).integers(0, 20, (100, 6))
    np.save("levels.npy", levels / 19 if "DiscretizedLogisticMixture" in flags else levels)
    assert main(["fit", "--data", "levels.npy", "--out", "run", *FAST, *flags]) == 0
    assert len(load_file(tmp_path / "run/weights.safetensors")[net]) == width


def test_flows_and_refinement_from_the_command_line(table, tmp_path, monkeypatch):
    (tmp_path / "flows.py").write_text(
        "import zuko\n"
        "import pyro_vae as pv\n"
        "class Spline(pv.priors.Flow):\n"
        "    def __init__(self, latent_dim: int, *, transforms: int = 3):\n"
        "        super().__init__(zuko.flows.NSF(latent_dim, transforms=transforms, hidden_features=(8,)))\n"
        "class Coupling(pv.posteriors.Flow):\n"
        "    def __init__(self, net, *, latents: int):\n"
        "        super().__init__(zuko.flows.NICE(latents, context=8, transforms=1), net=net)\n"
        "    @classmethod\n"
        "    def outputs(cls, size):\n"
        "        return 8\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flows = ["--prior", "flows.Spline", "--prior.transforms", "1", "--posterior", "flows.Coupling"]
    latents = FAST[FAST.index("--latent_dim") + 1]
    assert main(["fit", "--data", table, "--out", "flow", *flows, "--posterior.latents", latents, *FAST]) == 0
    assert "transforms: 1" in (tmp_path / "flow/config.yaml").read_text()
    refined = ["--posterior", "Refined", "--posterior.steps", "2"]
    assert main(["fit", "--data", table, "--out", "refined", *refined, *FAST]) == 0
    assert "steps: 2" in (tmp_path / "refined/config.yaml").read_text()


@pytest.mark.parametrize("command", [[], ["demo"], ["fit"], ["compare"]], ids=str)
def test_help_is_worth_reading(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    expected = {"fit": "MNIST's folder", "compare": "--draws", "demo": "runs/demo"}
    assert (expected[command[0]] if command else "pyro-vae fit --data table.csv") in shown


def test_the_module_is_the_same_program(table):
    command = [sys.executable, "-m", "pyro_vae", "fit", "--data", "nowhere.csv", "--out", "run"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.strip() == "pyro-vae: nowhere.csv: no such file; give the path of a data file"


@pytest.mark.slow
@pytest.mark.renders
def test_mnist_trains_from_its_folder(mnist, tmp_path):
    command = ["fit", "--data", str(mnist), "--out", str(tmp_path / "run"), "--epochs", "1", "--batch_size", "2000"]
    assert main(command) == 0
    with xr.open_dataset(tmp_path / "run/history.nc", engine="h5netcdf") as history:
        assert history.attrs["data"] == 60000
    assert json.dumps(sorted(names(tmp_path / "run")))
    assert is_a_picture(tmp_path / "run/reconstructions.png")
    assert pv.data.load_held_out(mnist).x.shape == (10000, 784)
