"""``pyro-vae encode | reconstruct | impute | sample | score``: files with labels and names, whole or not at all."""

import numpy as np
import pandas as pd
import pytest

import pyro_vae as pv
from pyro_vae.cli import main, tables
from pyro_vae.cli.commands import TABLES
from pyro_vae.cli.load_run import trained_run

QUICK = ("--epochs", "2", "--hidden", "[4]", "--latent_dim", "2", "--engine", "eager", "--device", "cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on a table with row labels and a category, and new rows of it in another order, some of them with gaps."""
    folder = tmp_path_factory.mktemp("tables")
    z = np.random.default_rng(0).normal(size=(60, 2))
    table = pd.DataFrame(
        z @ [[1.0, 0.5, -1.0], [0.3, -0.8, 0.2]], columns=list("abc"), index=[f"r{i}" for i in range(60)]
    )
    table["kind"] = np.where(z[:, 0] > 0, "up", "down")
    table.to_csv(folder / "a.csv")
    assert main(["fit", "--data", str(folder / "a.csv"), "--out", str(folder / "run"), *QUICK]) == 0
    new = table.iloc[:12][["kind", "c", "a", "b"]]
    new.to_csv(folder / "new.csv")
    new.rename(columns={"b": "d"}).to_csv(folder / "wrong.csv")
    new.loc["r3", "b"] = new.loc["r5", "kind"] = np.nan
    new.to_csv(folder / "gaps.csv", na_rep="?")
    return folder


def call(folder, command, *flags):
    return main([command, str(folder / "run"), *flags])


def test_every_command_that_writes_tables_is_a_public_function():
    assert set(TABLES) <= set(pv.__all__)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_latents_are_read_back_with_the_labels_of_the_rows(folder, tmp_path, ending):
    out = tmp_path / f"z.{ending}"
    assert call(folder, "encode", "--data", str(folder / "new.csv"), "--out", str(out)) == 0
    found = pd.read_csv(out, index_col=0) if ending == "csv" else pd.read_parquet(out)
    _, vae, data, _ = trained_run(str(folder / "run"), str(folder / "new.csv"))
    expected = pv.as_table(pv.encode(vae, data))
    assert found.index.tolist() == [f"r{i}" for i in range(12)]
    assert found.columns.tolist() == ["z0", "z1", "z0_sd", "z1_sd"]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == [out.name], "no part of a file is left"


@pytest.mark.parametrize("header", ["id", ""], ids=["index", "unnamed"])
def test_row_labels_of_digits_come_out_as_they_were_written(header, tmp_path):
    ids = [f"{i:04d}" for i in range(20)]
    table = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 2)), ids, ["a", "b"])
    table.to_csv(tmp_path / "a.csv", index_label=header)
    flags = ["--index", header] if header else []
    data = ["--data", str(tmp_path / "a.csv")]
    assert main(["fit", *data, *flags, "--missing", "9,0003", "--out", str(tmp_path / "run"), *QUICK]) == 0
    assert call(tmp_path, "encode", *data, "--out", str(tmp_path / "z.csv")) == 0
    assert [line.split(",")[0] for line in (tmp_path / "z.csv").read_text().splitlines()[1:]] == ids


def test_gaps_are_filled_and_the_rest_is_as_it_was(folder, tmp_path):
    out = tmp_path / "filled.csv"
    assert call(folder, "impute", "--data", str(folder / "gaps.csv"), "--missing", "?", "--out", str(out)) == 0
    found, gaps = pd.read_csv(out, index_col=0), pd.read_csv(folder / "gaps.csv", index_col=0, na_values="?")
    assert found.columns[:4].tolist() == ["a", "b", "c", "kind"]
    known = gaps.notna()
    for name in "abc":
        np.testing.assert_array_equal(found.loc[known[name], name], gaps.loc[known[name], name])
    assert (found.kind[known.kind] == gaps.kind[known.kind]).all()
    assert found.kind["r5"] in ("up", "down")
    assert np.isfinite(found.loc["r3", ["b", "b_sd", "b_mcse", "khat", "ess"]].astype(float)).all()
    assert found.khat.notna().sum() == 2
    assert "a_sd" not in found


def test_of_npy_only_the_numbers(folder, tmp_path):
    for command, columns in (("encode", 2), ("reconstruct", 4)):
        out = tmp_path / f"{command}.npy"
        assert call(folder, command, "--data", str(folder / "new.csv"), "--out", str(out)) == 0
        assert np.load(out).shape == (12, columns)


def test_without_data_it_is_of_the_held_out_rows_and_without_out_goes_to_the_run(folder):
    head, *held_out = (folder / "run/held_out_rows.txt").read_text().splitlines()
    assert head.endswith("that were held out, by their row labels")
    for name in ("reconstruct.csv", "reconstruct-2.csv"):
        assert call(folder, "reconstruct", "--draws", "5") == 0
        found = pd.read_csv(folder / "run" / name, index_col=0)
        assert {*found.index} == {*held_out}
    assert main(["check", str(folder / "run"), "--budget", "1e-9", "--rows", "4"]) == 0, "the run is still whole"


def test_samples_are_seeded_and_named(folder, tmp_path):
    tables = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = tmp_path / f"{name}.parquet"
        assert call(folder, "sample", "--n", "7", "--seed", str(seed), "--out", str(out)) == 0
        tables.append(pd.read_parquet(out))
    assert tables[0].columns.tolist() == ["a", "b", "c", "kind"]
    assert len(tables[0]) == 7
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0].equals(tables[2])


def test_nothing_is_overwritten(folder, tmp_path, capsys):
    out = tmp_path / "z.csv"
    out.write_text("mine")
    assert call(folder, "encode", "--out", str(out)) == 2
    assert "z.csv: already exists, and nothing is overwritten" in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_a_file_that_comes_while_it_computes_is_left_too(folder, tmp_path, monkeypatch):
    out = tmp_path / "z.csv"

    def write(dataset, path):
        path.write_text("ours")
        out.write_text("mine")

    monkeypatch.setitem(tables.WRITERS, ".csv", write)
    assert call(folder, "sample", "--out", str(out)) == 2
    assert out.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["z.csv"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data", "wrong.csv"], "wrong.csv: column 'b' of"),
        (["--data", "gaps.csv"], "row 3, column 'b' is '?', not a number"),
        (["--out", "z.xlsx"], "use the extension .csv, .parquet or .npy"),
        (["--out", "nowhere/z.csv"], "the folder nowhere does not exist"),
        (["--missing", "?"], "--missing applies to --data, which is not given"),
        (["--draws", "1"], "draws is 1; it must be a whole number of at least 2"),
        (["--rows", "3"], "unrecognized arguments: --rows 3"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(folder, monkeypatch, capsys, flags, told):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(["encode", "run", *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("pyro-vae: ")
    assert told in said
    assert sorted(folder.rglob("*")) == before


def test_the_data_of_the_run_are_not_needed_for_new_data(folder, tmp_path):
    hidden = folder / "hidden.csv"
    (folder / "a.csv").rename(hidden)
    try:
        assert call(folder, "encode", "--data", str(folder / "new.csv"), "--out", str(tmp_path / "z.csv")) == 0
    finally:
        hidden.rename(folder / "a.csv")


def test_large_data_are_streamed(folder, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    table = pd.read_csv(folder / "new.csv", index_col=0)
    table["kind"] = (table.kind == "up").astype(float)
    table.iloc[:5].to_parquet(parts / "1.parquet", index=False)
    table.iloc[5:].to_parquet(parts / "2.parquet", index=False)
    assert call(folder, "encode", "--data", str(parts), "--out", str(tmp_path / "streamed.csv")) == 0
    assert call(folder, "encode", "--data", str(folder / "new.csv"), "--out", str(tmp_path / "whole.csv")) == 0
    streamed, whole = (pd.read_csv(tmp_path / name, index_col=0) for name in ("streamed.csv", "whole.csv"))
    np.testing.assert_allclose(streamed, whole, rtol=1e-5)


def test_score_names_rows_that_are_unlike_the_held_out_ones(folder, tmp_path, capsys):
    """The run's twelve held-out rows leave no p-value below 1 / 13; what is far off gets that one."""
    rows = pd.DataFrame({"a": [0.1, 90.0], "b": [0.2, -90.0], "c": [0.0, 90.0], "kind": ["up", "up"]}, ["usual", "odd"])
    rows.to_csv(tmp_path / "new.csv")
    out = tmp_path / "score.csv"
    assert call(folder, "score", "--data", str(tmp_path / "new.csv"), "--out", str(out), "--num_particles", "50") == 0
    found = pd.read_csv(out, index_col=0)
    assert found.index.tolist() == ["usual", "odd"]
    assert found.p_value["odd"] == pytest.approx(1 / 13)
    assert found.p_value["usual"] > 0.1
    assert found.log_px["odd"] < found.log_px["usual"] - 100
    assert "none below 0.077" in capsys.readouterr().out


def test_score_of_rows_that_were_trained_on_has_no_p_values(folder, tmp_path, capsys):
    out = tmp_path / "score.csv"
    assert call(folder, "score", "--data", str(folder / "a.csv"), "--out", str(out), "--num_particles", "50") == 0
    assert "No p-values: 48 of its 60 rows" in capsys.readouterr().out
    assert "p_value" not in pd.read_csv(out)
