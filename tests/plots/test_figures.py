"""Figures say what is there: no slopes in K where there is one K, and legends lie inside."""

import io

import pytest
import torch

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.compare.swap import rank, ranking_figure


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(0)
    return pv.exact.LinearGaussian(torch.randn(5, 2), torch.zeros(5), 0.5)


pytestmark = pytest.mark.renders


def texts(figure):
    """All that stands in a figure."""
    figure.savefig(io.BytesIO(), format="png")
    shown = [axes.get_title() for axes in figure.axes] + [axes.get_xlabel() for axes in figure.axes]
    return shown + [text.get_text() for axes in figure.axes for text in axes.texts]


def test_with_one_number_of_particles_no_panel_speaks_of_slopes(linear):
    vae, x = linear.as_vae(diagonal=True), linear.sample(6)
    one, two = (
        texts(pv.plots.compare(pv.compare_elbos(vae, x, particles=particles, draws=4))) for particles in ((1,), (1, 4))
    )
    assert not [text for text in one if "slope" in text or "grows" in text]
    assert "estimators, K = 1" in one
    assert [text for text in two if "slope" in text]
    assert "particles K" in two


def test_the_legend_of_the_bounds_lies_inside_the_figure(linear):
    found = pv.log_evidence(
        linear.as_vae(diagonal=True), linear.sample(8), method="bdmc", num_particles=4, temperatures=3, leapfrog=3
    )
    figure = pv.plots.bdmc(found)
    figure.savefig(io.BytesIO(), format="png")
    boxes = [
        legend.get_window_extent() for legend in figure.legends + [axes.get_legend() for axes in figure.axes] if legend
    ]
    assert boxes
    for box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        for axes in figure.axes:
            assert not box.overlaps(axes.get_window_extent()), "it covers no panel"


def test_differences_have_the_digits_that_they_need(linear):
    table = pv.compare_elbos(linear.as_vae(diagonal=True), linear.sample(6), draws=4)
    shown = [text for text in texts(pv.plots.elbos_by_datum(table)) if "at most" in text]
    assert shown
    assert not [text for text in shown if "e-01" in text or "e+00" in text]


NAMES = ["price $50% or 60%$", "US$ per R$^", "$x^$", "$\\frac{"]


def test_names_with_dollar_signs_are_no_formulas(tmp_path, monkeypatch):
    """They are the columns, the categories, the labels and the file of a run, whose figures `fit` writes."""
    monkeypatch.chdir(tmp_path)
    labels = ["$<50^$", "$>50^$"]
    rows = [f"{i * 0.73 % 1:.3f},{i * 0.37 % 1:.3f},{labels[i % 2]},{labels[i % 3 == 0]}" for i in range(60)]
    (tmp_path / "so$^$me.csv").write_text("\n".join([",".join(NAMES), *rows]))
    flags = ["--data", "so$^$me.csv", "--out", "m$^$r", "--label", NAMES[3], "--epochs", "1", "--engine", "eager"]
    assert main(["fit", *flags, "--device", "cpu", "--hidden", "[4]"]) == 0
    assert len([*(tmp_path / "m$^$r").glob("*.png")]) == 4


def test_formulas_of_axes_are_drawn_and_names_are_not(linear):
    models = {"$a^$": linear.as_vae(), "b": linear.as_vae()}
    figure = ranking_figure(rank(models, linear.sample(5)))
    figure.axes[0].set_xscale("symlog", linthresh=1e-9)
    figure.savefig(io.BytesIO(), format="png")
    ticks = [text for text in figure.axes[0].get_xticklabels() if "mathdefault" in text.get_text()]
    assert ticks
    assert all(text.get_parse_math() for text in ticks)
    assert not figure.axes[0].get_yticklabels()[0].get_parse_math()
