"""The code of ``docs/adding_a_diagnostic.md`` runs as it stands, and ``check`` and the report take what it adds."""

import sys
import types

import pytest
import test_check
import torch
from helpers.pages import blocks, run

import pyro_vae as pv
from pyro_vae.diagnose import check as diagnose_check
from pyro_vae.plots import html_report


@pytest.fixture
def diagnostic(monkeypatch):
    """The file of the diagnostic, and the table with its row alone, for the time of a test."""
    of_file, of_row = blocks("adding_a_diagnostic")
    module = types.ModuleType("pyro_vae.diagnose.aggregate")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(run("adding_a_diagnostic", of_file, vars(module)))
    (row,) = eval("(" + of_row + ")", {**vars(pv.diagnose), **vars(module)})
    for place in (diagnose_check, html_report):
        monkeypatch.setattr(place, "DIAGNOSTICS", (row,))
    return module


def test_the_new_diagnostic_is_exact(diagnostic):
    """Given the data, the mean over draws is known; over data it is 0, and the mean square is 1."""
    model = test_check.linear()
    x, vae = model.sample(400), model.as_vae()
    found, posterior = diagnostic.aggregate(vae, x, draws=50), model.posterior(x)
    error = (posterior.variance.mean(0) / (50 * 400)).sqrt()
    off = torch.as_tensor(found["mean"].values) - posterior.mean.mean(0)
    assert (off.abs() < 5 * error).all()
    assert (abs(found["mean"]) < 5 * found.mean_se).all()
    assert (abs(found.square - 1) < 5 * found.square_se).all()
    vae.encoder.net.bias.data += 1.0
    moved = diagnostic.aggregate(vae, x, draws=50)
    assert torch.allclose(torch.as_tensor((moved["mean"] - found["mean"]).values), torch.ones(2).double(), atol=1e-9)
    assert (abs(moved["mean"]) > 5 * moved.mean_se).all(), "power"


@pytest.mark.parametrize(("kind", "level"), [("not at all", "fine"), ("shifted", "bad"), ("prior", "fine")])
def test_check_and_the_report_have_the_new_diagnostic(diagnostic, kind, level):
    """A guide that is the prior is fine here, as the page says."""
    tree = pv.check(*test_check.broken(kind), gold=0, draws=4)
    assert test_check.by_group(tree) == {"aggregate": level}
    page = html_report.as_html(tree, "Mine")
    assert "<h2>Aggregate posterior</h2>" in page
    assert "Each estimate with two standard errors." in page


def test_a_small_shift_that_many_data_show_is_not_bad(diagnostic):
    """0.15 prior standard deviations are 20 standard errors here; the verdict is by the size of the shift."""
    model = test_check.linear()
    x, vae = model.sample(20_000), model.as_vae()
    vae.encoder.net.bias.data[0] += 0.15
    found = diagnostic.aggregate(vae, x, draws=2)
    finding = diagnostic.judge_aggregate(found)
    assert float(abs(found["mean"][0]) / found.mean_se[0]) > 15
    assert finding.level == "doubtful", finding
    assert "train longer" not in str(finding)
    assert "the mean of z[0] differs from the prior by 0.1" in finding.why


@pytest.mark.parametrize("bad", [{"draws": 0}, {"seed": 2**63}])
def test_the_new_diagnostic_refuses_bad_settings(diagnostic, bad):
    with pytest.raises(pv.errors.SettingsError):
        diagnostic.aggregate(*test_check.broken("not at all"), **bad)
