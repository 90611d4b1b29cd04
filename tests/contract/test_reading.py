"""What is printed can be read: tables, no digits beyond the error, and each error says over what."""

import ast
import copy
import io
import re
from html import unescape
from pathlib import Path

import pandas as pd
import pytest
import torch
import xarray as xr
from jsonargparse import Namespace
from rich.console import Console

import pyro_vae as pv
from pyro_vae.cli.check import _head
from pyro_vae.core import progress
from pyro_vae.core.format import format_estimate
from pyro_vae.plots.html_report import as_html

PACKAGE = Path(pv.__file__).parent
FORMAT = PACKAGE / "core" / "format.py"


def raw_numbers(source):
    """Numbers beside ± or after "p =" that an f-string formats itself, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        parts = node.values
        for before, part in zip([None, *parts], parts, strict=False):
            if isinstance(part, ast.FormattedValue) and isinstance(before, ast.Constant):
                found += [node.lineno] * bool(re.search(r"(±|\bp [=<>]) ?$", before.value))
            if isinstance(part, ast.Constant) and isinstance(before, ast.FormattedValue):
                found += [node.lineno] * part.value.lstrip().startswith("±")
    return found


def test_the_search_sees_numbers_that_are_formatted_in_place():
    assert raw_numbers('f"{a:.3f} ± {b:.3f}"') == [1, 1]
    assert raw_numbers('f"so p = {p:.3f}"') == [1]
    assert not raw_numbers('f"{format_estimate(a, b, over=c)}, bars: ± 2 s.e., over {d}"')


@pytest.mark.parametrize("path", sorted(set(PACKAGE.rglob("*.py")) - {FORMAT}), ids=lambda p: p.name)
def test_one_function_formats_each_number_with_an_error(path):
    assert not raw_numbers(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((PACKAGE / "plots").glob("*.py")), ids=lambda p: p.name)
def test_every_bar_of_a_figure_says_over_what(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"± 2 s", node.value):
            lines = path.read_text(encoding="utf-8").splitlines()[node.lineno - 1 : node.end_lineno]
            assert "over" in " ".join(lines) or "Returns" in node.value, node.value


def linear():
    torch.manual_seed(0)
    model = pv.exact.LinearGaussian(torch.randn(4, 2), torch.zeros(4), 0.5)
    return model.as_vae(diagonal=True), model.sample(12)


@pytest.fixture(scope="module")
def comparison():
    vae, x = linear()
    return pv.compare_elbos(vae, x, {"STL": pv.elbo.STL(), "ELBO": pv.elbo.ELBO()}, particles=(1, 2), draws=4)


def test_a_comparison_prints_as_a_table_and_is_a_dataset(comparison, tmp_path):
    shown = str(comparison)
    assert isinstance(comparison, xr.Dataset)
    rows = [line.split() for line in shown.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("STL", "ELBO")] == ["STL", "ELBO"]
    assert sum(row[:2] in (["STL", "1"], ["ELBO", "1"]) or row[:1] == ["2"] for row in rows) == 4
    assert "over 4 draws" in " ".join(shown.split())
    assert re.search(r"-?\d+\.\d+±\d+\.\d+", shown)
    assert "Dimensions" in repr(comparison), "xarray's own, for what the table leaves out"
    assert "Dimensions" in str(comparison[["elbo", "elbo_se"]])
    assert "Dimensions" in str(comparison.sel(estimator="STL"))
    comparison.to_netcdf(tmp_path / "saved.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "saved.nc", engine="h5netcdf") as saved:
        assert saved.identical(comparison)


def test_comparisons_of_moments_and_of_seeds_print_as_tables(comparison):
    moments = xr.concat([comparison, comparison], xr.Variable("moment", ["start", "end"]), combine_attrs="override")
    assert re.findall(r"At the (\w+) of training", str(moments)) == ["start", "end"]
    other = comparison.assign_attrs(seed=1)
    assert "4 draws of each of 2 seeds" in " ".join(str(pv.over_seeds([comparison, other])).split())


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    right, wrong = (pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), scale) for scale in (0.5, 0.9))
    named = {"wrong": wrong.as_vae(), "the right model, which has a long name": right.as_vae()}
    return named, right.sample(150)


def test_a_comparison_of_models_prints_as_a_table_and_is_a_frame(models, tmp_path):
    named, x = models
    table = pv.compare_models(named, x)
    shown = str(table)
    assert isinstance(table, pd.DataFrame)
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(shown.split())
    for told in ("150 held-out data, in nats", "by the importance-weighted bound", "standard error over data"):
        assert told in text, told
    best, worst = table.iloc[0], table.iloc[1]
    beside = format_estimate(worst.elpd_diff, worst.dse, over="")
    row = next(line for line in shown.splitlines() if line.startswith("wrong"))
    assert row.split()[1:] == [
        *format_estimate(worst.elpd, worst.se, over="").split(),
        *beside.split(),
        "0",
        f"{worst.weight:.2f}",
    ]
    first = next(line for line in shown.splitlines() if line.startswith("the right"))
    assert format_estimate(best.elpd, best.se, over="") in first
    assert beside not in first
    assert "rank" in repr(table), "pandas' own, for what the table leaves out"
    assert "elpd_diff" in str(table[["elpd", "elpd_diff"]])
    assert str(table.elpd) == str(pd.DataFrame(table).elpd)
    assert str(copy.deepcopy(table)) == str(table.head(9)) == shown
    table.to_csv(tmp_path / "saved.csv")
    assert pd.read_csv(tmp_path / "saved.csv", index_col=0).elpd.tolist() == table.elpd.tolist()


def test_the_table_of_models_says_what_is_not_comparable(models):
    named, x = models
    flat = x.clone()
    flat[:, 0] = 0
    with pytest.warns(pv.errors.AtomsWarning), pytest.warns(pv.errors.DuplicateRowsWarning):
        table = pv.compare_models(named, torch.cat([flat, flat[:3]]))
    text = " ".join(str(table).split())
    assert "153 held-out data (150 distinct rows)" in text
    assert "Not comparable: 1 of 4 features have a value that more than 20 % of the rows share exactly" in text
    few = pv.compare_models({"a": named["wrong"], "b": named["wrong"]}, x[:20])
    assert "tied; N < 100" in " ".join(str(few).split())


def test_a_fit_prints_what_it_came_to_and_a_table():
    vae, x = linear()
    fitted = pv.fit(vae, x, validation_data=x + 0.1, epochs=40, batch_size=6, progress=False)
    first, *table = str(fitted).splitlines()
    assert re.match(r"Trained for 40 epochs on CPU .*: ELBO per datum .* ± .* \(over data\)$", first)
    epochs = [int(line.split()[0]) for line in table if line.split() and line.split()[0].isdigit()]
    assert len(epochs) == 10
    assert (epochs[0], epochs[-1]) == (1, 40)
    last = fitted.history.isel(epoch=-1)
    error = f"± {last.validation_elbo_se.item():.2g}"
    assert error in first
    assert "over data" in table[0]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_time_left_is_not_cut(width, monkeypatch):
    """Of an epoch count and an ELBO as long as they get."""
    written = io.StringIO()

    def console(**_):
        return Console(file=written, width=width, force_terminal=True, color_system=None, legacy_windows=False)

    monkeypatch.setattr(progress, "Console", console)
    with progress.display("here", 10_000, 100_000, show=True) as bar:
        row = {
            "objective": -123456.7,
            "train_elbo_se": 0.0123,
            "validation_elbo": -123456.7,
            "validation_elbo_se": 0.01,
        }
        for step in range(1, 31):
            bar.step(-123456.7)
            if step % 10 == 0:
                bar.epoch(9_000 + step, row)
        bar.progress.tasks[0].total = 10**6
        bar.progress.refresh()
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", written.getvalue()).split("\n")
    lines = [line for line in last if line.startswith("epoch 90")]
    assert lines
    assert all(re.search(r"(\d+:\d\d:\d\d|-:--:--)", line) for line in lines), lines[-1]


def test_the_head_of_a_report_says_model_data_rows_seed_and_commands(capsys):
    vae, x = linear()
    tree = pv.check(vae, x, gold=0, draws=4, budget=1e-9, seed=7)
    capsys.readouterr()
    settings = Namespace(run="runs/my first", data=None, rows=12, budget=5.0, seed=7)
    held_out = pv.data.Data(torch.zeros(40, 4), source="wine.csv")
    page = as_html(tree, "Mine", head=_head(settings, held_out, 12))
    head = unescape(page[page.index("<h1>") : page.index("Verdict:")])
    for told in (
        "prior StandardNormal, likelihood Normal, posterior DiagNormal; ",
        "wine.csv",
        "the first 12 of 40 held-out rows",
        "<td>seed</td><td>7</td>",
        "pyro-vae fit --config 'runs/my first/config.yaml'",
        "pyro-vae check 'runs/my first' --rows 12 --budget 5.0 --seed 7",
    ):
        assert told in head, told
