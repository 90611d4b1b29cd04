"""``check`` finds nothing wrong with an exact guide, and the right thing wrong with each guide broken on purpose."""

import base64
import itertools
import struct
from dataclasses import replace
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import pyro_vae as pv
from pyro_vae.cli import check, main
from pyro_vae.cli.check import _history
from pyro_vae.cli.run_folder import RunFolder
from pyro_vae.data import Rows
from pyro_vae.data.fingerprint import Trained, row_hashes
from pyro_vae.diagnose import DIAGNOSTICS
from pyro_vae.diagnose import check as diagnose_check
from pyro_vae.diagnose.check import Checked, _as_dataset, conclusion, findings
from pyro_vae.plots.html_report import as_html

SETTINGS = {"gold": 0, "draws": 60, "budget": 300}


def linear(seed=0):
    torch.manual_seed(seed)
    return pv.exact.LinearGaussian(torch.randn(6, 2).double(), torch.zeros(6).double(), 0.5)


def levels(tree):
    return {finding.about: finding.level for finding in findings(tree)}


def by_group(tree):
    return dict(zip(tree["findings"].group.values, [finding.level for finding in findings(tree)], strict=True))


@torch.no_grad()
def broken(kind):
    """A VAE of the exact guide, spoilt, and data of the unspoilt model."""
    exact = linear()
    vae, x = exact.as_vae(), exact.sample(60)
    if kind == "narrow":
        vae.encoder.scale_tril.mul_(0.5)
    if kind == "shifted":
        vae.encoder.net.bias.add_(1.0)
    if kind == "prior":
        vae.encoder.net.weight.zero_()
        vae.encoder.net.bias.zero_()
        vae.encoder.scale_tril.copy_(torch.eye(2))
    if kind == "noise":
        vae.decoder.fixed_scale.mul_(4)
    return vae, x


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    vae, x = broken("not at all")
    tree = pv.check(vae, x, gold=1, draws=60, budget=300)
    return vae, x, tree


def test_an_exact_guide_is_fine_in_every_respect(exact, capsys):
    _, _, tree = exact
    assert set(levels(tree).values()) == {"fine"}, conclusion(tree)
    assert {diagnostic.name for diagnostic in DIAGNOSTICS} - {"converged", "overfitting"} <= set(tree.children)


@cache
def checked(kind):
    """The check of a broken VAE."""
    torch.manual_seed(0)
    return pv.check(*broken(kind), **SETTINGS)


@pytest.mark.parametrize(
    ("kind", "seen_by"),
    [("narrow", ("khat", "sbc", "gaps")), ("shifted", ("sbc", "gaps")), ("prior", ("sbc", "collapse", "gaps"))],
)
def test_a_broken_guide_is_seen_by_what_is_meant_to_see_it(kind, seen_by):
    found = by_group(checked(kind))
    assert {found[name] for name in seen_by} == {"bad"}, found
    assert all(finding.next for finding in findings(checked(kind)) if finding.level != "fine"), "what to try next"


def test_a_wrong_likelihood_is_seen_by_its_predictions():
    assert by_group(checked("noise"))["predictive_check"] == "bad"


SEEN_ELSEWHERE = {
    "converged": "a matter of training: test_converged",
    "overfitting": "a matter of training: test_overfitting",
    "nuts": "a matter of minutes: test_nuts",
}


@pytest.mark.parametrize(
    "name", [diagnostic.name for diagnostic in DIAGNOSTICS if diagnostic.name not in SEEN_ELSEWHERE]
)
def test_every_diagnostic_sees_one_of_the_broken_vaes(name):
    levels = {kind: by_group(checked(kind))[name] for kind in ("narrow", "shifted", "prior", "noise")}
    assert set(levels.values()) - {"fine"}, levels


def test_the_verdict_is_printed_and_says_what_it_rests_on(capsys):
    tree = pv.check(*broken("narrow"), gold=0, budget=3)
    printed = capsys.readouterr().out
    assert printed.startswith("Verdict: ")
    assert "on 60 data" in printed
    assert all(finding.why in printed for finding in findings(tree))


def test_what_the_budget_does_not_hold_is_left_out_by_name(capsys):
    vae, x = broken("not at all")
    tree = pv.check(vae, x, gold=2, budget=8)
    assert "nuts" not in tree.children
    assert "NUTS as a gold standard (about " in conclusion(tree)
    assert "Left out" in capsys.readouterr().out


def test_one_tree_holds_all_goes_to_netcdf_and_back(exact, tmp_path):
    _, x, tree = exact
    assert {"posterior", "posterior_predictive", "prior", "log_likelihood", "observed_data", "findings"} <= set(
        tree.children
    )
    tree.to_netcdf(tmp_path / "check.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "check.nc", engine="h5netcdf") as back:
        assert findings(back) == findings(tree)
        for name in tree.children:
            xr.testing.assert_equal(back[name].to_dataset().load(), tree[name].to_dataset())
    assert np.array_equal(tree["observed_data"].x.values, x.numpy())


def test_the_same_seed_gives_the_same_findings():
    vae, x = broken("shifted")
    settings = {"gold": 0, "draws": 20, "budget": 300}  # seconds, or a slow machine would skip some
    first, second, other = (findings(pv.check(vae, x[:6], seed=seed, **settings)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


class Page(HTMLParser):
    """The tags and pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.pictures, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        given = dict(attrs)
        self.links += [given[name] for name in ("href", "src") if name in given]
        if tag == "img":
            assert given["alt"], "a picture says what it shows"
            self.pictures.append(base64.b64decode(given["src"].removeprefix("data:image/png;base64,")))


@pytest.mark.renders
def test_the_report_stands_alone(exact):
    _, _, tree = exact
    text = as_html(tree, "A <check>")
    page = Page(text)
    assert "script" not in page.tags
    assert all(link.startswith("data:image/png;base64,") for link in page.links), "nothing is fetched"
    assert len(page.pictures) >= 8
    for picture in page.pictures:
        width, height = struct.unpack(">II", picture[16:24])
        assert picture[:4] == b"\x89PNG"
        assert width > 400
        assert height > 200
    assert "A &lt;check&gt;" in text


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", linear().sample(80).float().numpy())
    fit = ["fit", "--data", "x.npy", "--out", "run", "--epochs", "2", "--latent_dim", "2", "--hidden", "[4]"]
    assert main([*fit, "--device", "cpu"]) == 0
    files = {path for path in (tmp_path / "run").rglob("*") if path.is_file()}
    before = {path: path.read_bytes() for path in files}
    for name, budget in {"check": "2", "check-2": "0.01"}.items():
        assert main(["check", "run", "--budget", budget, "--rows", "16"]) == 0
        assert {path.name for path in (tmp_path / "run" / name).iterdir()} == {"check.nc", "report.html", "SHA256SUMS"}
    assert {path: path.read_bytes() for path in files} == before, "the run is as it was"
    assert "Verdict: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"budget": 0}, "budget is 0; it must be a finite number above 0"),
        ({"draws": "many"}, "draws is 'many'; it must be a whole number of at least 4"),
        ({"history": xr.Dataset()}, "history holds no ELBO by epoch; pass the history of a fit, or None"),
        ({"history": "run/history.nc"}, "history holds no ELBO by epoch; pass the history of a fit, or None"),
        ({"gold": -1}, "gold is -1; it must be a whole number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, says):
    with pytest.raises(pv.errors.SettingsError, match=says):
        pv.check(*broken("not at all"), **setting)


def test_data_of_another_width_are_refused():
    vae, x = broken("not at all")
    with pytest.raises(pv.errors.PyroVAEError, match="5"):
        pv.check(vae, x[:, :5])


def test_one_datum_is_refused_before_anything_is_run():
    vae, x = broken("not at all")
    with pytest.raises(pv.errors.DataError, match="there is only one datum; pass at least 2"):
        pv.check(vae, x[:1])


def test_data_that_were_trained_on_are_said_to_be(capsys):
    vae, x = broken("not at all")
    assert "trained on" not in conclusion(pv.check(vae, x, gold=0, draws=4, budget=0.01))
    vae.trained_on = Trained.on(row_hashes(Rows(x)))
    tree = pv.check(vae, x, gold=0, draws=4, budget=0.01)
    assert "Training data are among them (60 of its 60 rows" in conclusion(tree)
    assert "Training data are among them" in capsys.readouterr().out
    assert "Training data are among them" in as_html(tree, "Mine")


def test_findings_name_the_rows_of_the_user(monkeypatch):
    """The worst datum and the first that was trained on by their labels, in words and as coordinates."""
    vae, x = broken("narrow")
    names = np.array([f"patient {i}" for i in range(60)])
    monkeypatch.setattr(diagnose_check, "DIAGNOSTICS", DIAGNOSTICS[:1])
    vae.trained_on = Trained.on(row_hashes(Rows(x[10:])))
    data = pv.data.Data(x, row_labels=names).rows(torch.arange(59, 4, -1))
    tree = pv.check(vae, data, gold=0, draws=25, budget=60)
    (finding,) = findings(tree)
    khat = tree["khat"].khat
    worst = khat.datum.values[khat.values.argmax()]
    assert worst.startswith("patient ")
    assert f"the worst is datum {worst} with" in finding.why
    assert khat.datum.values[0] == tree["posterior"].datum.values[0] == "patient 59"
    assert "the first is row patient 59" in conclusion(tree)
    numbered = pv.data.Data(x).rows(torch.tensor([7, 3])).rows(torch.tensor([1]))
    assert numbered.row_labels.tolist() == [3]


def test_another_file_for_the_history_is_refused_in_one_sentence(tmp_path):
    RunFolder.again(tmp_path).dataset("history.nc", xr.Dataset({"a": ("b", [1, 2])}))
    with pytest.raises(pv.errors.DataError, match=r"history\.nc: not the history of a run"):
        _history(tmp_path)


def test_the_time_that_has_passed_is_taken_from_the_budget(monkeypatch):
    """Each look at the clock is 2 seconds later, two looks for a diagnostic: of 10, there is a second left for two."""
    vae, x = broken("not at all")
    monkeypatch.setattr(diagnose_check, "_measure_evaluation", lambda *_: 1e-9)
    monkeypatch.setattr(diagnose_check.time, "perf_counter", partial(next, itertools.count(0, 2)))
    took = {"collapse": 0.1}
    fine = [
        replace(
            one, judge=lambda _: diagnose_check.Finding("x", "fine", ""),
            seconds=lambda _, name=one.name: took.get(name, 1.0),
        )
        for one in DIAGNOSTICS
    ]  # fmt: skip
    monkeypatch.setattr(diagnose_check, "DIAGNOSTICS", fine)
    found = set(pv.check(vae, x[:9], gold=0, draws=4, budget=10).children) & {one.name for one in DIAGNOSTICS}
    assert found == {"khat", "evidence", "collapse"}


def test_the_conclusion_names_what_is_bad_and_what_is_doubtful():
    levels = {"khat": "bad", "sbc": "doubtful", "gaps": "fine"}
    found = Checked(
        findings={name: diagnose_check.Finding(f"the {name}", level, "x") for name, level in levels.items()}
    )
    tree = xr.DataTree.from_dict({"findings": _as_dataset(found, 0, 9)})
    assert conclusion(tree) == (
        "Verdict: 1 of 3 diagnostics is fine, on 9 data; bad: the khat; doubtful: the sbc. "
        "The khat and the sbc point to one fault: q(z|x) differs from p(z|x)."
    )
    one = Checked(findings={"khat": found.findings["khat"]})
    assert "one fault" not in conclusion(xr.DataTree.from_dict({"findings": _as_dataset(one, 0, 9)}))


def test_the_conclusion_says_that_validation_data_chose_the_weights(capsys):
    vae, x = broken("not at all")
    history = xr.Dataset({"train_elbo": ("epoch", np.zeros(9))}, {"epoch": range(1, 10)})
    for kept, told in ((4, True), (9, False), (0, False)):
        tree = pv.check(vae, x, gold=0, budget=1e-9, draws=4, history=history.assign_attrs(weights_epoch=kept))
        assert ("chose the weights (epoch 4): if these are the same data" in conclusion(tree)) == told
    assert "chose the weights" in capsys.readouterr().out


def test_the_command_hands_on_what_it_is_given(tmp_path, monkeypatch):
    """Rows, seed and budget, and the run's own history."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", linear().sample(80).float().numpy())
    fit = ["fit", "--data", "x.npy", "--out", "run", "--epochs", "2", "--latent_dim", "2", "--hidden", "[4]"]
    assert main([*fit, "--device", "cpu"]) == 0
    given = {}

    def noted(vae, x, **settings):
        given.update(settings, rows=len(x.x), labels=x.row_labels.tolist())
        raise pv.errors.DataError("enough")

    monkeypatch.setattr(check, "check", noted)
    assert main(["check", "run", "--budget", "3", "--rows", "7", "--seed", "5"]) == 2
    assert {name: given[name] for name in ("rows", "seed", "budget")} == {"rows": 7, "seed": 5, "budget": 3.0}
    assert given["history"].sizes["epoch"] == 2
    assert Path("run/held_out_rows.txt").read_text().splitlines()[0].endswith(", counted from 0 after any header")
    held_out = np.loadtxt("run/held_out_rows.txt", dtype=int)
    assert given["labels"] == held_out[:7].tolist(), "rows are those of the file"
    assert len(given["train"].x) == 64
    every = np.concatenate([held_out, given["train"].row_labels])
    assert sorted(every) == list(range(80))
    for row in held_out[:3]:
        assert np.load("x.npy")[row].tolist() in pv.data.split(pv.data.load("x.npy"))[1].x.tolist()
    assert not (tmp_path / "run" / "check").exists(), "nothing is left of it"


def test_progress_is_shown_beside_the_results_and_not_among_them(capsys):
    exact = linear()
    pv.check(exact.as_vae(), exact.sample(20), **SETTINGS | {"budget": 3}, progress=True)
    printed, shown = capsys.readouterr()
    assert printed.startswith("Verdict")
    assert "Importance weights" in shown


def test_what_a_diagnostic_lacks_is_named():
    exact = linear()
    tree = pv.check(exact.as_vae(), exact.sample(19), **SETTINGS | {"budget": 0.5})
    lacking = "Comparison with simple models (needs the training data (train=) or 20 held-out data)"
    assert lacking in conclusion(tree)
    tree = pv.check(exact.as_vae(), exact.sample(20), **SETTINGS | {"budget": 0.5})
    assert lacking not in conclusion(tree)


def test_a_warning_names_the_line_that_called_check():
    exact = linear()
    twice = exact.sample(8).repeat(2, 1)
    with pytest.warns(UserWarning, match="distinct|same|twice|repeat|occur") as caught:
        pv.check(exact.as_vae(), twice, **SETTINGS | {"budget": 0.1})
    assert caught[0].filename == __file__


@pytest.mark.parametrize(("epochs", "judged"), [(19, False), (20, True)])
def test_convergence_is_judged_by_20_epochs_and_more(epochs, judged):
    vae, x = broken("not at all")
    history = xr.Dataset({"train_elbo": ("epoch", np.zeros(epochs))})
    given = diagnose_check.CheckInput(vae, x, Rows(x), evaluation=1.0, history=history)
    assert next(d for d in DIAGNOSTICS if d.about == "Convergence of the training").applies(given) is judged


def test_where_the_gaps_find_a_fault_they_alone_say_how_to_mend_q():
    """A richer posterior, by the coverage, beside a family that loses nothing, by the gaps, would contradict."""
    tree = checked("shifted")
    found = dict(zip(tree["findings"].group.values, findings(tree), strict=True))
    assert found["gaps"].level != "fine"
    for name in ("khat", "reconstructions", "sbc"):
        assert found[name].level == "fine" or found[name].next == diagnose_check.WHY
    assert any(found[name].level != "fine" for name in ("khat", "reconstructions", "sbc")), "power"
    assert found["gaps"].next != diagnose_check.WHY


def test_log_evidence_is_estimated_once_for_all_that_use_it(monkeypatch):
    from pyro_vae.diagnose import diagnostic

    calls = []

    def counted(*given, **settings):
        calls.append(settings["num_particles"])
        return pv.log_evidence(*given, **settings)

    monkeypatch.setattr(diagnostic, "log_evidence", counted)
    vae, x = broken("not at all")
    tree = pv.check(vae, x, gold=0, budget=60, draws=4)
    assert {"evidence", "baseline"} <= set(tree.children)
    assert calls == [1000]
    assert tree["baseline"].log_evidence.equals(tree["evidence"].log_evidence)
