"""Every snippet of the README runs as it stands, in one process, from top to bottom; what takes long, for less long."""

import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import pyro_vae as pv
from pyro_vae.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEMBERS = (ROOT / "docs" / "members.md").read_text(encoding="utf-8")


LESS = {"fit": ["--epochs", "5"], "compare": ["--draws", "5"], "check": ["--budget", "2"], "swap": ["--epochs", "2"]}
LESS |= {"encode": [], "score": ["--num_particles", "50"], "explore": ["--draws", "5"]}
"""Said after what the README says, whose flags are then all read, and stand where nothing is said here."""


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def write_table():
    """Two hundred flowers, which have names and a species."""
    generator = np.random.default_rng(0)
    table = pd.DataFrame(generator.normal(size=(200, 6)) * [1, 10, 1e3, 1e-2, 5, 2], columns=list("abcdef"))
    table = table.assign(species=generator.choice(["setosa", "virginica"], 200))
    table.set_index(pd.Index([f"flower {i}" for i in range(200)])).to_csv("table.csv")


def test_the_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_table()
    names = {}
    for snippet in snippets("python"):
        less = snippet.replace("budget=10", "budget=2").replace("test.x))", "test.x[:100], draws=10))")
        exec(compile(less, "README.md", "exec"), names)
    assert "nats per datum" in capsys.readouterr().out
    assert names["fit"].history.sizes["epoch"] == 20
    assert names["loss"] > 0
    assert type(pv.load("flowers.safetensors").decoder) is pv.likelihoods.Normal
    assert (tmp_path / "runs/flowers/checkpoints").is_dir()
    latents = pd.read_csv("latents.csv", index_col=0)
    assert latents.index[3] == "flower 3"
    np.testing.assert_allclose(latents["z0"], names["flowers"].encoder(names["table"].x).mean[:, 0].detach(), rtol=1e-5)


def test_it_is_short():
    assert len(README.splitlines()) <= 120


def test_code_stands_within_the_first_forty_lines():
    assert "import pyro_vae as pv" in "\n".join(README.splitlines()[:40])


@pytest.mark.renders
def test_the_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table()
    commands = [line for block in snippets("bash") for line in block.splitlines() if line.startswith("pyro-vae")]
    assert len(commands) == 7
    for command in commands:
        words = shlex.split(command)[1:]
        assert main([*words, *LESS[words[0]]]) == 0, command
    assert (tmp_path / "runs/first/compare/comparison.nc").exists()
    assert (tmp_path / "runs/first/check/report.html").exists()


def test_the_make_targets_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in {*re.findall(r"\bmake ([a-z0-9-]+)", README)} - {"the"}:
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_links_within_the_project_lead_somewhere(link):
    path, _, anchor = link.partition("#")
    assert (ROOT / path).exists()
    assert f"\n## {anchor.capitalize()}" in (ROOT / path).read_text(encoding="utf-8") if anchor else True


BASES = {"Prior", "Likelihood", "Posterior", "Estimator", "Schedule", "Weights", "kl_provenance", "taking"}
BASES |= {"Finding", "STATISTICS", "DIAGNOSTICS", "Diagnostic", "CheckInput", "Callback"}


@pytest.mark.parametrize("module", ["priors", "likelihoods", "posteriors", "nn", "elbo", "diagnose", "callbacks"])
def test_the_table_names_every_member(module):
    part = getattr(pv, module)
    own = {name for name, value in vars(part).items() if getattr(value, "__module__", None) == part.__name__}
    names = getattr(part, "__all__", None) or {name for name in own if not name.startswith("_")}
    for name in {name for name in names if not name.startswith("judge_")} - BASES:
        assert f"{module}.{name}`" in MEMBERS or f"`{name}`" in MEMBERS, name
