"""Context columns on the command line: which networks see them, and how new data are matched to a run."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.cli.fit import trained_run
from pyro_vae.data import rows_of
from pyro_vae.errors import DataError

QUICK = ("--epochs", "1", "--hidden", "[4]", "--latent_dim", "2", "--engine", "eager", "--device", "cpu")
CONTEXT = ("--index", "id", "--context", "age,sex")
N = 24


def table() -> pd.DataFrame:
    random = np.random.default_rng(0)
    numbers = random.normal(size=(N, 3)).round(3)
    return pd.DataFrame({
        "id": [f"r{i}" for i in range(N)], "a": numbers[:, 0], "age": numbers[:, 1],
        "sex": random.choice(["f", "m", "x"], N), "b": numbers[:, 2],
    })  # fmt: skip


def fit(folder, out, *flags: str) -> int:
    return main(["fit", "--data", f"{folder}/a.csv", "--out", f"{out}", *CONTEXT, *QUICK, *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table, a run on it, and the same table with its columns in another order, as new data."""
    folder = tmp_path_factory.mktemp("context")
    table().to_csv(folder / "a.csv", index=False)
    assert fit(folder, folder / "run") == 0
    table()[["sex", "b", "id", "age", "a"]].to_csv(folder / "b.csv", index=False, sep=";")
    table().drop(columns="age").to_csv(folder / "lacks.csv", index=False)
    return folder


def first_width(net: torch.nn.Module) -> int:
    return next(layer.in_features for layer in net.modules() if isinstance(layer, torch.nn.Linear))


def test_both_networks_see_the_context_of_their_rows(folder):
    _, vae, held_out, train = trained_run(str(folder / "run"), None)
    assert (first_width(vae.encoder), first_width(vae.decoder)) == (2 + 4, 2 + 4)
    for data in (held_out, train):
        rows = table().set_index("id").loc[list(data.row_labels)]
        expected = np.c_[rows.age, rows.sex == "f", rows.sex == "m", rows.sex == "x"]
        np.testing.assert_array_equal(data.context.numpy(), expected.astype(np.float32))
        np.testing.assert_array_equal(data.x.numpy(), rows[["a", "b"]].to_numpy(np.float32))


def test_new_data_are_matched_by_name(folder):
    _, vae, held_out, _ = trained_run(str(folder / "run"), None)
    _, again, found, _ = trained_run(str(folder / "run"), str(folder / "b.csv"))
    place = [list(found.row_labels).index(label) for label in held_out.row_labels]
    some = found.rows(torch.tensor(place))
    assert torch.equal(some.context, held_out.context)
    assert torch.equal(vae.posterior(rows_of(held_out)).mean, again.posterior(rows_of(some)).mean)
    with pytest.raises(DataError, match=r"lacks.csv: context column 'age' of .*a.csv is missing"):
        trained_run(str(folder / "run"), str(folder / "lacks.csv"))


@pytest.mark.slow
def test_check_and_compare_give_what_they_gave_when_the_columns_are_permuted(folder, tmp_path):
    found = {}
    for name in ("a", "b"):
        flags = ["--run", f"{folder}/run", "--data", f"{folder}/{name}.csv"]
        assert main(["check", *flags, "--out", f"{tmp_path}/check-{name}", "--rows", "4", "--budget", "2"]) == 0
        few = ["--elbos", "[STL]", "--particles", "[1]", "--draws", "2", "--rows", "4"]
        assert main(["compare", *flags, "--out", f"{tmp_path}/compare-{name}", *few]) == 0
        with xr.open_datatree(tmp_path / f"check-{name}" / "check.nc", engine="h5netcdf") as tree:
            khat = tree["khat"].khat.values
        with xr.open_dataset(tmp_path / f"compare-{name}" / "comparison.nc", engine="h5netcdf") as comparison:
            found[name] = khat, comparison.elbo.values
    np.testing.assert_array_equal(found["a"][0], found["b"][0])
    np.testing.assert_array_equal(found["a"][1], found["b"][1])


@pytest.mark.parametrize("seen", ["encoder", "decoder"])
def test_a_network_that_is_not_named_does_not_see_the_context(folder, tmp_path, seen):
    assert fit(folder, tmp_path / "run", "--context_to", seen) == 0
    _, vae, held_out, _ = trained_run(str(tmp_path / "run"), None)
    rows, other = rows_of(held_out), held_out.context.roll(1, 0) + 1
    z = torch.zeros(len(rows), 2)
    parts = {
        "encoder": [vae.encoder(rows.x, context).mean for context in (rows.context, other)],
        "decoder": [vae.decoder(z, context).mean for context in (rows.context, other)],
    }
    assert {name: not torch.equal(*means) for name, means in parts.items()} == {
        "encoder": seen == "encoder", "decoder": seen == "decoder",
    }  # fmt: skip
    assert torch.equal(pv.load(tmp_path / "run").encoder(rows.x, rows.context).mean, parts["encoder"][0])


def test_the_prior_may_depend_on_the_context(folder, tmp_path, capsys):
    assert fit(folder, tmp_path / "run", "--prior", "ContextNormal") == 0
    _, vae, held_out, _ = trained_run(str(tmp_path / "run"), None)
    assert isinstance(vae.prior, pv.priors.ContextNormal)
    assert vae.prior(held_out.context).batch_shape == (len(held_out.x),)
    flags = ["--data", f"{folder}/a.csv", "--drop", "age,sex,id", *QUICK, "--prior", "ContextNormal"]
    assert main(["fit", *flags, "--out", f"{tmp_path}/none"]) == 2
    assert "ContextNormal depends on a context; name its columns with --context" in capsys.readouterr().err


def test_swap_takes_a_context(folder, tmp_path):
    flags = ["--priors", "[StandardNormal, ContextNormal]", "--particles", "5", *CONTEXT, *QUICK]
    assert main(["swap", "--data", f"{folder}/a.csv", "--out", f"{tmp_path}/swap", *flags]) == 0
    with xr.open_dataset(tmp_path / "swap" / "ranking.nc", engine="h5netcdf") as ranking:
        assert {*ranking.model.values} == {"StandardNormal", "ContextNormal"}
        folders = dict(zip(ranking.model.values, ranking.folder.values, strict=True))
    _, vae, _, _ = trained_run(str(tmp_path / "swap" / folders["ContextNormal"]), None)
    assert isinstance(vae.prior, pv.priors.ContextNormal)


def test_a_vamp_prior_sees_the_context_through_the_encoder(folder, tmp_path):
    assert fit(folder, tmp_path / "run", "--prior", "VampPrior", "--prior.components", "5") == 0
    _, vae, held_out, _ = trained_run(str(tmp_path / "run"), None)
    assert vae.prior.pseudo_inputs.shape == (5, 2)
    assert vae.prior(held_out.context).batch_shape == (len(held_out.x),)


@pytest.mark.parametrize("asked", ["prior", "encoder,flow", ""])
def test_other_networks_are_refused(folder, tmp_path, capsys, asked):
    assert fit(folder, tmp_path / "run", "--context_to", asked) == 2
    assert f"context_to is {asked!r}; name encoder, decoder or both" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
