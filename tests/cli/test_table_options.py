"""The command line reads tables as they are written, says what it read, and finds the columns of new data by name."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.cli.checksums import compute_checksum
from pyro_vae.cli.load_run import trained_run
from pyro_vae.errors import DataError, PrecisionWarning

ROWS = np.random.default_rng(0).normal(size=(20, 2)).round(3)
QUICK = ("--epochs", "1", "--hidden", "[4]", "--latent_dim", "2", "--engine", "eager", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table with row labels, a label column, a column of no use and a gap; and a run on it."""
    folder = tmp_path_factory.mktemp("tables")
    table = pd.DataFrame(ROWS, columns=["height", "weight"]).assign(
        kind=["u", "v"] * 10, note=[*map(chr, range(65, 85))]
    )
    table.index = [f"r{i}" for i in range(20)]
    table.loc["r3", "weight"] = np.nan
    table.to_csv(folder / "a.csv", sep=";", decimal=",", na_rep="?", index_label="id")
    flags = ("--index", "id", "--label", "kind", "--drop", "note", "--missing", "?,-999")
    assert main(["fit", "--data", str(folder / "a.csv"), "--out", str(folder / "run"), *flags, *QUICK]) == 0
    table[["weight", "height"]].iloc[::-1].to_csv(folder / "b.csv")
    table[["height"]].to_csv(folder / "lacks.csv")
    return folder


def test_a_run_knows_how_its_table_is_read(folder):
    _, vae, held_out, _ = trained_run(str(folder / "run"), None)
    assert held_out.columns == ["height", "weight"]
    assert set(held_out.row_labels) <= {f"r{i}" for i in range(20)}
    row = int(held_out.row_labels[0][1:])
    assert held_out.labels[0] == row % 2
    assert held_out.label_names == ["u", "v"]
    assert held_out.x[0, 0].item() == np.float32(ROWS[row, 0])
    assert vae.trained_on.columns == ["height", "weight"]


def test_new_data_in_another_dialect_and_order_are_the_same_rows(folder, capsys):
    _, _, found, _ = trained_run(str(folder / "run"), str(folder / "b.csv"))
    assert "read 20 rows, 2 columns; columns in the order of" in capsys.readouterr().out
    assert found.row_labels.tolist() == [f"r{i}" for i in reversed(range(20))]
    np.testing.assert_array_equal(found.x[:16].numpy(), ROWS[:3:-1].astype(np.float32))
    assert found.mask.sum() == 39


def test_new_data_without_a_column_are_refused_by_its_name(folder):
    with pytest.raises(DataError, match=r"lacks.csv: column 'weight' of .*a.csv is missing \(there are 'height'"):
        trained_run(str(folder / "run"), str(folder / "lacks.csv"))


def test_a_command_says_what_it_read(folder, tmp_path, capsys):
    path = tmp_path / "c.csv"
    pd.DataFrame(ROWS).to_csv(path)
    out = str(tmp_path / "run")
    assert main(["fit", "--data", str(path), "--out", out, *QUICK]) == 0
    said = "read 20 rows, 2 columns; row labels from the unnamed first column"
    assert f"{path}: {said}\n" in capsys.readouterr().out


def test_a_column_that_single_precision_would_merge_is_warned_of():
    times = pd.DataFrame({"t": 1700000000 + np.arange(40), "a": np.arange(40) % 7})
    vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
    with pytest.warns(PrecisionWarning, match="column 't' has 40 distinct values, but only 1 in the VAE's float32;"):
        pv.data.rows_for(vae, times)
    assert len(pv.data.rows_for(vae.double(), times).x[:, 0].unique()) == 40


def test_a_vae_knows_its_columns_in_python():
    table = pd.DataFrame(ROWS, columns=["a", "b"], index=[f"r{i}" for i in range(20)])
    vae = pv.exact.LinearGaussian(torch.ones(2, 1), torch.zeros(2), 0.5).as_vae()
    pv.fit(vae, table, epochs=1, progress=False, engine="eager", device="cpu")
    swapped = table[["b", "a"]]
    assert torch.equal(pv.data.rows_for(vae, table).x, pv.data.rows_for(vae, swapped).x)
    tree = pv.to_datatree(vae, swapped, draws=2, prior_draws=2)
    assert tree["observed_data"].feature.values.tolist() == ["a", "b"]
    assert tree["observed_data"].x.sel(datum="r4", feature="b").item() == pytest.approx(ROWS[4, 1])
    with pytest.raises(DataError, match="column 'b' of the training data is missing"):
        pv.data.rows_for(vae, table[["a"]])


def of_a_run(folder, *flags):
    assert main(["fit", "--data", str(folder / "wide.csv"), "--out", str(folder / "run"), *flags, *QUICK]) == 0
    return trained_run(str(folder / "run"), None)


def test_columns_of_any_scale_are_standardized_by_those_that_are_trained_on(tmp_path):
    wide = pd.DataFrame(ROWS * [1.0, 1e6] + [5.0, 0.0], columns=["a", "b"])
    wide.to_csv(tmp_path / "wide.csv", index=False)
    _, vae, held_out, train = of_a_run(tmp_path)
    assert len(held_out.x) == 4
    np.testing.assert_allclose(vae.decoder.standardize.center, train.x.double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(vae.encoder.standardize.unit, train.x.double().std(0, correction=0), rtol=1e-6)
    again = pv.load(tmp_path / "run")
    assert torch.equal(again.standardize.center, vae.standardize.center)


@pytest.mark.parametrize("flags", [("--standardize", "false"), ("--likelihood", "Poisson")])
def test_nothing_is_standardized_where_it_is_not_asked_for_or_no_real_number(tmp_path, flags):
    pd.DataFrame(np.arange(40).reshape(20, 2) % 7, columns=["a", "b"]).to_csv(tmp_path / "wide.csv", index=False)
    assert of_a_run(tmp_path, *flags)[1].standardize is None


def test_a_run_of_a_version_that_did_not_standardize_is_read_as_it_was(tmp_path):
    pd.DataFrame(ROWS, columns=["a", "b"]).to_csv(tmp_path / "wide.csv", index=False)
    of_a_run(tmp_path, "--standardize", "false")
    config, sums = tmp_path / "run" / "config.yaml", tmp_path / "run" / "SHA256SUMS"
    before = compute_checksum(config)
    config.write_text(config.read_text().replace("standardize: false\n", ""))
    sums.write_text(sums.read_text().replace(before, compute_checksum(config)))
    assert trained_run(str(tmp_path / "run"), None)[1].standardize is None


def test_new_data_may_say_otherwise_what_is_missing(folder, tmp_path, capsys):
    run = str(folder / "run")
    text = (folder / "a.csv").read_text().replace("?", "none of it")
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(DataError, match=r"column .weight. is .*, not a number"):
        trained_run(run, str(tmp_path / "c.csv"))
    _, _, found, _ = trained_run(run, str(tmp_path / "c.csv"), "none of it")
    assert (~found.mask).nonzero().tolist() == [[3, 1]]
    capsys.readouterr()
    for command in ("check", "compare"):
        assert main([command, "--run", run, "--missing", "?", "--out", str(tmp_path / command)]) == 2
        assert "give --data, or leave --missing out" in capsys.readouterr().err
        assert not (tmp_path / command).exists()
        flags = ["--run", run, "--data", str(tmp_path / "c.csv"), "--missing", "-7"]
        assert main([command, *flags, "--out", str(tmp_path / command)]) == 2
        assert "column 'weight' is" in capsys.readouterr().err


def test_figures_of_rows_name_the_columns_and_show_them_in_one_unit(tmp_path):
    (pd.DataFrame(ROWS, columns=["a", "b"]) * [1.0, 1e6]).to_csv(tmp_path / "wide.csv", index=False)
    _, vae, held_out, _ = of_a_run(tmp_path)
    for figure in (pv.plots.reconstructions(vae, held_out), pv.plots.prior_samples(vae)):
        (axes,) = figure.axes
        assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
        assert axes.get_ylabel() == "value (units: sds of each column, from its mean)"
        assert max(abs(line.get_ydata()).max() for line in axes.lines) < 10


def test_a_gap_is_left_open_in_a_figure(folder):
    _, vae, found, _ = trained_run(str(folder / "run"), str(folder / "b.csv"))
    gap = int((~found.mask).any(1).nonzero())
    (axes,) = pv.plots.reconstructions(vae, found.rows(torch.tensor([gap]))).axes
    data, reconstruction = (line.get_ydata() for line in axes.lines)
    assert np.isnan(data).sum() == 1
    assert np.isfinite(reconstruction).all()


def test_a_flag_that_starts_like_a_comment_is_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(ROWS, columns=["height", "#n"]).to_csv("a.csv", index=False)
    assert main(["fit", "--data", "a.csv", "--drop", "#n", "--out", "#run", *QUICK]) == 0
    assert trained_run("#run", None)[1].trained_on.columns == ["height"]
    assert main(["fit", "--data", "a.csv", "--drop=#x", *QUICK]) == 2
