"""The page of the explorer: its numbers are those of the library, names are harmless, and it stays below 5 MB."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers.explorer import HOSTILE, QUOTED, Scripts, given_to, menu, mixed_data, mixed_table, mixed_vae

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.errors import DataError, SettingsError
from pyro_vae.plots import explorer, explorer_page

QUICK = {"num_particles": 25, "draws": 5}


@pytest.fixture(scope="module")
def mixed():
    """Data, a VAE, its page, and what the page holds."""
    data = mixed_data()
    vae = mixed_vae(data)
    page = pv.plots.explore(vae, data, title=HOSTILE, **QUICK)
    return data, vae, page, given_to(page)


def test_the_page_holds_what_the_library_computes(mixed):
    data, vae, _, given = mixed
    built = pv.reconstruct(vae, data, draws=5)
    np.testing.assert_allclose(given["mean"], built.x, rtol=1e-6)
    np.testing.assert_allclose(given["sd"], built.x_sd, rtol=1e-6)
    np.testing.assert_allclose(given["probability"], built.x_probability, rtol=1e-6)
    z = pv.encode(vae, data).z.values
    np.testing.assert_allclose(given["middle"], z.mean(0), rtol=1e-6)
    by_name = {choice["name"]: choice for choice in given["choices"]}
    for i in range(3):
        np.testing.assert_allclose(by_name[f"z{i}"]["values"], z[:, i], rtol=1e-6)
    score, khat = pv.score(vae, data, **QUICK), pv.diagnose.khat(vae, data, num_particles=25)
    np.testing.assert_allclose(by_name["log p(x)"]["values"], score.log_px, rtol=1e-6)
    np.testing.assert_allclose(by_name["gap"]["values"], score.log_px - score.elbo, rtol=1e-4)
    np.testing.assert_allclose(by_name["k̂"]["values"], khat.khat, rtol=1e-6)
    np.testing.assert_allclose(by_name["ESS"]["values"], khat.ess, rtol=1e-6)


def test_components_are_coordinates_that_lead_back_to_z(mixed):
    _, _, _, given = mixed
    by_name = {choice["name"]: choice for choice in given["choices"]}
    z = np.stack([by_name[f"z{i}"]["values"] for i in range(3)], 1)
    for name in ("component 1", "component 2", "z2"):
        line = by_name[name]
        np.testing.assert_allclose(z @ line["direction"] - line["offset"], line["values"], atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(line["direction"]), 1, rtol=1e-12)
    first, second = (by_name[f"component {i}"]["values"].var() for i in (1, 2))
    assert first >= second > 0


def test_what_is_missing_is_missing_in_the_page(mixed):
    given = mixed[3]
    table = mixed_table().drop(columns="site")
    np.testing.assert_array_equal(np.isnan(given["x"]), table.isna())
    np.testing.assert_array_equal(given["x"][:, 2], table["visits"])
    assert [column["classes"] for column in given["columns"]] == [None] * 4 + [["blue", "green", "red"]]
    seen = table[QUOTED].dropna()
    np.testing.assert_allclose(given["spread"]["center"][1], seen.mean(), rtol=1e-6)
    np.testing.assert_allclose(given["spread"]["unit"][1], seen.std(ddof=0), rtol=1e-4)


def test_a_mask_says_what_is_missing_whatever_stands_there():
    data = pv.data.Data(torch.ones(9, 3), mask=torch.arange(27).reshape(9, 3) % 4 > 0)
    given = given_to(pv.plots.explore(linear(3), data, **QUICK))
    np.testing.assert_array_equal(np.isnan(given["x"]), ~data.mask)


def test_each_row_is_told_with_its_errors(mixed):
    data, vae, _, given = mixed
    score = pv.score(vae, data, **QUICK)
    assert len(given["words"]) == 60
    head, evidence, weights, over, *_ = given["words"][17].splitlines()
    assert head == "Row r17, label <b>place 2</b>"
    shown = pv.core.format.format_estimate(score.log_px.values[17], score.log_px_mcse.values[17], over="")
    assert evidence.startswith(f"log p(x): {shown} nats. Gap log p(x) − ELBO: ")
    assert "± " in weights
    assert "of 25 draws" in weights
    assert "over draws" in over


def test_names_cannot_leave_their_place(mixed):
    _, _, page, _ = mixed
    found = Scripts(page)
    plain_names = mixed_data()
    plain_names = dataclasses.replace(plain_names, columns=list("abcde"), categories={"e": ["x", "y", "z"]})
    benign = Scripts(pv.plots.explore(mixed_vae(plain_names), plain_names, **QUICK))
    assert len(found.scripts) == len(benign.scripts)
    assert found.title == HOSTILE
    assert not any(script.startswith("window.taken") for script in found.scripts)


def test_the_page_needs_no_network(mixed):
    assert not [source for source in Scripts(mixed[2]).sources if source]


def test_images_are_shown_as_pictures():
    data = pv.data.digits()
    test = data.rows(torch.arange(40))
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [8], 64)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [8], 4)),
    )
    given = given_to(pv.plots.explore(vae, test, **QUICK))
    assert given["image_shape"] == [1, 8, 8]
    np.testing.assert_allclose(given["x"] / 255, test.x, atol=0.5 / 255 + 1e-6)
    assert given["x"].dtype == np.uint8
    assert not [choice for choice in given["choices"] if choice["name"].startswith("f")], "pixels are no columns"
    assert given["choices"][[one["name"] for one in given["choices"]].index("label")]["classes"] == [*"0123456789"]


def test_a_decoder_that_the_page_cannot_run_is_decoded_on_a_grid():
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        decoder=pv.likelihoods.ContinuousBernoulli(pv.nn.conv_decoder(3, [4], (1, 8, 8))),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [8], 6)),
    )
    page = pv.plots.explore(vae, torch.rand(30, 64), **QUICK)
    given = given_to(page)
    assert given["decoder"] is None
    assert "it contains a convolutional network" in page
    grid, by_name = given["grid"], {choice["name"]: choice for choice in given["choices"]}
    lines = [given["choices"][i] for i in grid["axes"]]
    assert [line["name"] for line in lines] == ["component 1", "component 2"]
    z = given["middle"] + grid["places"] @ np.stack([line["direction"] for line in lines])
    with torch.no_grad():
        expected = vae.decoder(torch.as_tensor(z, dtype=torch.float32)).mean
    np.testing.assert_allclose(grid["decoded"], expected, atol=1e-5)
    assert grid["places"][:, 0].min() < by_name["component 1"]["values"].min()
    assert grid["places"][:, 1].max() > by_name["component 2"]["values"].max()


def test_one_latent_is_drawn_against_a_column():
    data = mixed_data()
    page = pv.plots.explore(mixed_vae(data, latents=1), data, **QUICK)
    names = [choice["name"] for choice in given_to(page)["choices"]]
    assert names[:2] == ["z0", "k̂"]
    assert menu(page, "horizontal axis")["value"] == "0"
    assert names[int(menu(page, "vertical axis")["value"])] == HOSTILE
    assert menu(page, "colour")["value"] == str(names.index("label"))
    shown = [name for _, name in menu(page, "vertical axis")["options"]]
    assert not {"label", "colour"} & {*shown}, "codes of classes are no axis"


def test_more_rows_than_asked_for_are_sampled_by_the_seed():
    data = mixed_data(200)
    vae = mixed_vae(data)
    first, again, other = (pv.plots.explore(vae, data, rows=50, seed=seed, **QUICK) for seed in (1, 1, 2))
    told = [[words.splitlines()[0] for words in given_to(page)["words"]] for page in (first, again, other)]
    assert told[0] == told[1] != told[2]
    assert len(told[0]) == 50
    assert "The page shows a random sample of 50 of 200 rows (seed 1)" in first


def test_a_page_of_long_rows_stays_below_its_limit_and_says_how_many_it_shows():
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [], 3000)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(3000, [], 4)),
    )
    x = torch.randn(400, 3000)
    page = pv.plots.explore(vae, x, **QUICK)
    shown = len(given_to(page)["words"])
    assert 20 <= shown < 100
    assert f"a random sample of {shown} of 400 rows" in page
    assert 3_000_000 < len(page.encode()) <= 5_000_000


def test_rows_that_are_too_long_for_any_page_are_refused():
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(1),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(1, [], 20_000)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(20_000, [], 2)),
    )
    with pytest.raises(DataError, match="a row has 20000 numbers, so fewer than 20 rows fit into a page of 5 MB"):
        pv.plots.explore(vae, torch.randn(30, 20_000), **QUICK)


def test_weights_that_are_too_large_for_a_page_are_left_out(monkeypatch):
    monkeypatch.setattr(explorer, "WEIGHTS_BYTES", 100)
    data = mixed_data()
    page = pv.plots.explore(mixed_vae(data), data, **QUICK)
    assert given_to(page)["decoder"] is None
    assert "weights take 0.0 MB, too much for the page" in page


def test_a_context_is_a_colour_and_is_handed_to_the_decoder():
    torch.manual_seed(0)
    data = dataclasses.replace(pv.data.Data(torch.randn(30, 4)), context=torch.eye(2)[torch.arange(30) % 2])
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2 + 2, [8], 4)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(4 + 2, [8], 4)),
    )
    given = given_to(pv.plots.explore(vae, data, **QUICK))
    np.testing.assert_array_equal(given["context"], data.context)
    assert [choice["name"] for choice in given["choices"]][-2:] == ["c0", "c1"]
    assert "The context is that of the row shown last." in given["sentences"]["decoded"]


def test_no_name_occurs_twice_in_the_downloaded_table():
    data = dataclasses.replace(pv.data.Data(torch.randn(9, 3)), columns=["z0", "row", "khat"])
    given = given_to(pv.plots.explore(linear(3), data, **QUICK))
    names = [column["name"] for column in given["download_columns"]]
    assert names[:3] == ["z0", "row_", "khat"]
    assert len(set(names) | {"row"}) == len(names) + 1
    assert {"z0_", "khat_", "khat_se", "log_px", "log_px_se", "gap", "ess"} <= set(names)


def linear(features):
    return pv.exact.LinearGaussian(torch.ones(features, 2), torch.zeros(features), 0.5).as_vae()


def test_one_row_and_a_missing_bokeh_are_told_in_one_sentence(monkeypatch):
    with pytest.raises(DataError, match="there is only one row, but the explorer needs at least 2"):
        pv.plots.explore(linear(3), torch.zeros(1, 3), **QUICK)
    monkeypatch.setattr(explorer_page, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'pyro-vae\[explore\]'"):
        pv.plots.explore(linear(3), torch.zeros(9, 3), **QUICK)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explore")
    mixed_table().to_csv(folder / "a.csv")
    flags = ["--label", "site", "--missing", "nan", "--epochs", "2", "--hidden", "[4]", "--latent_dim", "2"]
    flags += ["--engine", "eager", "--device", "cpu", "--out", f"{folder}/run"]
    assert main(["fit", "--data", f"{folder}/a.csv", *flags]) == 0
    return folder / "run"


def test_the_command_writes_the_held_out_rows_of_a_run(run, capsys):
    for name in ("explore.html", "explore-2.html"):
        assert main(["explore", str(run), "--num_particles", "25", "--draws", "5"]) == 0
        assert f"Written to {run / name} (" in capsys.readouterr().out
    page = (run / "explore.html").read_text(encoding="utf-8")
    held_out = (run / "held_out_rows.txt").read_text().splitlines()[1:]
    assert [words.split(",")[0] for words in given_to(page)["words"]] == [f"Row {name}" for name in held_out]
    assert main(["check", str(run), "--budget", "1e-9", "--rows", "4"]) == 0, "the run is still whole"


def test_the_command_takes_other_rows_and_never_overwrites(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    flags = ["--data", str(run.parent / "a.csv"), "--rows", "7", "--num_particles", "25", "--draws", "5"]
    assert main(["explore", str(run), *flags, "--out", str(out)]) == 0
    assert len(given_to(out.read_text(encoding="utf-8"))["words"]) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"], "no part of a file is left"
    before = out.read_bytes()
    capsys.readouterr()
    assert main(["explore", str(run), *flags, "--out", str(out)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main(["explore", str(run), "--out", str(tmp_path / "page.csv")]) == 2
    assert "use the extension .html" in capsys.readouterr().err
    assert main(["explore", str(run), "--rows", "1"]) == 2
    assert "rows is 1" in capsys.readouterr().err
