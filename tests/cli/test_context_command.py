"""Context columns on the command line: which networks see them, and how new data are matched to a run."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.cli.load_run import trained_run
from pyro_vae.data import rows_of
from pyro_vae.errors import DataError, ModelError

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


@pytest.fixture(scope="module")
def in_pounds(folder, tmp_path_factory):
    """A run on the same table, its numeric context in other units and far from 0, where only the prior sees it."""
    there = tmp_path_factory.mktemp("pounds")
    table().assign(age=lambda rows: 20_000 * rows.age + 60_000).to_csv(there / "a.csv", index=False)
    assert fit(there, there / "run", "--prior", "ContextNormal") == 0
    return there


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


def test_a_run_does_not_depend_on_the_units_of_its_context(folder, in_pounds, tmp_path):
    assert fit(folder, tmp_path / "run", "--prior", "ContextNormal") == 0
    found = []
    for place in (tmp_path / "run", in_pounds / "run"):
        _, _, data, _ = trained_run(str(place), None)
        vae, rows = pv.load(place), rows_of(data)  # of the file alone
        q, p = vae.posterior(rows), vae.prior(rows.context)
        parts = [q.mean, q.stddev, p.mean, p.stddev, vae.decoder(torch.ones(len(rows), 2), rows.context).mean]
        found.append([part.detach() for part in parts])
    for mine, theirs in zip(*found, strict=True):
        assert mine.std(0).min() > 1e-4
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_a_context_is_standardized_by_the_training_data_and_one_hot_columns_are_not(in_pounds):
    _, vae, _, train = trained_run(str(in_pounds / "run"), None)
    age = table().set_index("id").age.loc[list(train.row_labels)] * 20_000 + 60_000
    for net in (vae.encoder.net, vae.decoder.net, vae.prior.net):
        units = net.standardize
        np.testing.assert_allclose(units.center.numpy(), [age.mean(), 0, 0, 0], rtol=1e-6)
        np.testing.assert_allclose(units.unit.numpy(), [age.std(ddof=0), 1, 1, 1], rtol=1e-6)


def test_a_context_stays_as_it_is_where_nothing_is_standardized(folder, tmp_path):
    assert fit(folder, tmp_path / "run", "--standardize", "false") == 0
    vae = pv.load(tmp_path / "run")
    assert not any(isinstance(part, pv.nn.StandardizedContext) for part in vae.modules())


def test_samples_are_drawn_in_the_contexts_of_a_table(folder, tmp_path):
    """Columns besides the context need not be there, and codes of categories are those of the run."""
    some = table()[["id", "sex", "age"]].iloc[[3, 0, 7, 5]][lambda rows: rows.sex != "x"]
    some.assign(note="unread").to_csv(tmp_path / "some.csv", index=False)
    out = tmp_path / "drawn.csv"
    assert main(["sample", f"{folder}/run", "--data", f"{tmp_path}/some.csv", "--out", f"{out}", "--seed", "3"]) == 0
    found = pd.read_csv(out, index_col=0)
    context = np.c_[some.age, some.sex == "f", some.sex == "m", some.sex == "x"].astype(float)
    expected = pv.sample(pv.load(folder / "run"), len(some), context=context, seed=3)
    assert found.index.tolist() == some.id.tolist()
    assert found.columns.tolist() == ["a", "b"]
    np.testing.assert_allclose(found, expected.x, rtol=1e-6)


def test_one_context_is_that_of_all_samples(folder, tmp_path):
    table()[["sex", "age"]].iloc[:1].assign(sex="m").to_csv(tmp_path / "one.csv", index=False)
    flags = ["--data", f"{tmp_path}/one.csv", "--n", "5", "--out", f"{tmp_path}/drawn.csv"]
    assert main(["sample", f"{folder}/run", *flags]) == 0
    assert len(pd.read_csv(tmp_path / "drawn.csv")) == 5


def test_samples_without_a_context_are_refused_in_one_sentence(folder, in_pounds, tmp_path, capsys):
    for run in (folder / "run", in_pounds / "run"):
        assert main(["sample", f"{run}", "--out", f"{tmp_path}/drawn.csv"]) == 2
        told = capsys.readouterr().err
        assert "needs a context of 4 numbers (age, sex=f, sex=m, sex=x) and got none" in told
        assert "name a table of contexts with --data" in told
        with pytest.raises(ModelError, match=r"needs a context of 4 numbers .* and got one of 3"):
            pv.sample(pv.load(run), 3, context=[1.0, 2.0, 3.0])
    assert not (tmp_path / "drawn.csv").exists()


def test_contexts_of_a_table_must_be_those_of_the_run(folder, tmp_path, capsys):
    flags = ["--out", f"{tmp_path}/drawn.csv"]
    assert main(["sample", f"{folder}/run", "--data", f"{folder}/lacks.csv", *flags]) == 2
    assert "column 'age' of " in capsys.readouterr().err
    table().assign(sex=1.5).to_csv(tmp_path / "numbers.csv", index=False)
    assert main(["sample", f"{folder}/run", "--data", f"{tmp_path}/numbers.csv", *flags]) == 2
    assert "column 'sex' is 1.5, not one of its categories 'f', 'm', 'x'" in capsys.readouterr().err
    assert main(["encode", f"{folder}/run", "--data", f"{tmp_path}/numbers.csv", *flags]) == 2
    assert "column 'sex' is 1.5, not one of its categories 'f', 'm', 'x'" in capsys.readouterr().err
    assert main(["fit", "--data", f"{folder}/a.csv", "--out", f"{tmp_path}/none", "--drop", "id,age,sex", *QUICK]) == 0
    capsys.readouterr()
    assert main(["sample", f"{tmp_path}/none", "--data", f"{folder}/a.csv", *flags]) == 2
    assert "has no context; leave --data out" in capsys.readouterr().err


@pytest.mark.filterwarnings("always::pyro_vae.errors.ConstantColumnsWarning")
def test_constant_counts_and_categories_are_not_warned_of(tmp_path, capsys):
    counts = pd.DataFrame({"a": [0, 1, 2, 3] * 5, "none": 0, "kind": "k"})
    counts.to_csv(tmp_path / "a.csv", index=False)
    flags = ["--likelihood", "auto", "--data", f"{tmp_path}/a.csv", *QUICK]
    assert main(["fit", *flags, "--out", f"{tmp_path}/run"]) == 0
    assert "have at most one distinct value" not in capsys.readouterr().err
    counts.assign(b=np.linspace(-1, 1, 20) ** 3, dull=0.5).to_csv(tmp_path / "a.csv", index=False)
    assert main(["fit", *flags, "--out", f"{tmp_path}/more"]) == 0
    assert "1 of 2 columns have at most one distinct value ('dull')" in capsys.readouterr().err
