"""``--likelihood auto`` takes what the columns suggest, says so, and leaves settings that need no second look."""

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from pyro_vae.cli import main
from pyro_vae.cli.load_run import trained_run

QUICK = ("--epochs", "2", "--hidden", "[4]", "--latent_dim", "2", "--engine", "eager", "--device", "cpu")
N = 80


def mixed() -> pd.DataFrame:
    """Numbers, counts, a category and bits."""
    random = np.random.default_rng(0)
    numbers = random.normal(size=(N, 2)).round(3)
    return pd.DataFrame({
        "height": numbers[:, 0], "weight": numbers[:, 1], "visits": np.tile([0, 1, 1, 2, 2, 3, 3, 4], N // 8),
        "colour": random.choice(["red", "green", "blue"], N), "ill": np.arange(N) % 2,
    })  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    mixed().to_csv(folder / "a.csv", index=False)
    assert main(["fit", "--data", f"{folder}/a.csv", "--out", f"{folder}/run", "--likelihood", "auto", *QUICK]) == 0
    return folder


def test_the_settings_of_a_run_name_the_likelihoods(folder):
    likelihood = yaml.safe_load((folder / "run" / "config.yaml").read_text())["likelihood"]
    assert likelihood["class_path"] == "pyro_vae.likelihoods.Blocks"
    blocks = likelihood["init_args"]["blocks"]
    assert [(block["class_path"].split(".")[-1], n) for block, n in blocks] == [
        ("Normal", 2), ("Poisson", 1), ("Categorical", 1), ("Bernoulli", 1),
    ]  # fmt: skip
    assert blocks[0][0]["init_args"] == {"scale": 0.5, "learn_scale": True, "per_feature": 2}
    assert blocks[2][0]["init_args"] == {"levels": 3}


def test_the_run_is_made_again_from_its_settings(folder):
    _, vae, held_out, _ = trained_run(str(folder / "run"), None)
    assert [type(block).__name__ for block in vae.decoder.blocks] == ["Normal", "Poisson", "Categorical", "Bernoulli"]
    z = torch.zeros(len(held_out.x), 2)
    parts = [vae.decoder(z).base_dist.parts[i].log_prob(held_out.x[:, [2 + i - 1]]) for i in (1, 2, 3)]
    normal = vae.decoder(z).base_dist.parts[0].log_prob(held_out.x[:, :2]).sum(-1)
    torch.testing.assert_close(vae.decoder(z).log_prob(held_out.x), normal + sum(parts).squeeze(-1))


def test_a_line_says_which_columns_got_which_likelihood(folder, tmp_path, capsys):
    assert main(["fit", "--data", f"{folder}/a.csv", "--out", f"{tmp_path}/run", "--likelihood", "auto", *QUICK]) == 0
    lines = [line.partition("likelihood of ")[2] for line in capsys.readouterr().out.splitlines()]
    found = [line for line in lines if line]
    assert found[0] == "'height', 'weight': Normal"
    assert found[1:] == [
        "'visits': Poisson (variance 0.76 times the mean)",
        "'colour': Categorical(levels=3) (3 names)",
        "'ill': Bernoulli (only 0 and 1)",
    ]


def test_new_data_are_judged_by_the_likelihoods_of_the_run(folder):
    """Of the new data alone the counts would be levels, and the bits a constant."""
    new = mixed()[["ill", "colour", "visits", "weight", "height"]].iloc[:12].assign(visits=1, ill=1)
    new.to_csv(folder / "b.csv", index=False)
    first, _, found, _ = trained_run(str(folder / "run"), str(folder / "b.csv"))
    assert [type(block).__name__ for block in first.decoder.blocks] == ["Normal", "Poisson", "Categorical", "Bernoulli"]
    assert found.columns == ["height", "weight", "visits", "colour", "ill"]


def test_compare_takes_it_too_and_a_stopped_run_goes_on(folder, tmp_path):
    flags = ("--elbos", "[STL]", "--particles", "[1]", "--draws", "2", *QUICK)
    out = f"{tmp_path}/compared"
    assert main(["compare", "--data", f"{folder}/a.csv", "--out", out, "--likelihood", "auto", *flags]) == 0
    saved = yaml.safe_load((tmp_path / "compared" / "config.yaml").read_text())
    assert saved["likelihood"]["class_path"] == "pyro_vae.likelihoods.Blocks"
    assert main(["fit", f"{folder}/run", "--epochs", "3"]) == 0


def test_one_kind_of_columns_needs_no_blocks(tmp_path):
    mixed()[["ill"]].assign(well=lambda table: 1 - table.ill).to_csv(tmp_path / "a.csv", index=False)
    assert main(["fit", "--data", f"{tmp_path}/a.csv", "--out", f"{tmp_path}/run", "--likelihood", "auto", *QUICK]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["likelihood"]["class_path"] == "pyro_vae.likelihoods.Bernoulli"


def test_a_word_that_is_no_class_is_refused(tmp_path, capsys):
    assert main(["fit", "--data", "a.csv", "--likelihood", "automatic"]) == 2
    assert "there is no class automatic" in capsys.readouterr().err
