"""What the docs say to do is done here, as it stands, and keeps the contract."""

import re
from pathlib import Path

import pyro.distributions as dist
import pytest
import test_members
import torch
from helpers import members

import pyro_vae as pv

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adding_a_prior.md").read_text(encoding="utf-8")
CODE, ROW = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
README_ROW = re.search(r"```markdown\n(.*?)```", PAGE, re.DOTALL)[1]


@pytest.fixture
def added(monkeypatch):
    """The class in ``pyro_vae.priors`` and its row in the table, for the time of a test."""
    names = vars(pv.priors).copy()
    exec(compile(CODE, "docs/adding_a_prior.md", "exec"), names)
    monkeypatch.setattr(pv.priors, "Logistic", names["Logistic"], raising=False)
    row = eval("{" + ROW + "}", {"pv": pv, "LATENTS": members.LATENTS})
    for name, constructor in row.items():
        monkeypatch.setitem(members.PRIORS, name, constructor)
        monkeypatch.setitem(test_members.MEMBERS, f"prior {name}", constructor)
    monkeypatch.setattr(test_members, "SMOOTH", [*test_members.SMOOTH, "prior Logistic"])
    return row


def test_without_its_row_the_new_member_is_missed(added, monkeypatch):
    monkeypatch.delitem(members.PRIORS, "Logistic")
    with pytest.raises(AssertionError):
        test_members.test_the_table_covers_every_exported_member(pv.priors, members.PRIORS)


def test_the_new_prior_keeps_the_contract(added):
    test_members.test_the_table_covers_every_exported_member(pv.priors, members.PRIORS)
    for batch in test_members.BATCHES:
        test_members.test_shapes("prior Logistic", batch)
    for contract in (
        test_members.test_the_density_integrates_to_one,
        test_members.test_samples_agree_with_the_density,
        test_members.test_a_gradient_reaches_every_parameter,
        test_members.test_saved_and_loaded_it_is_the_same,
        test_members.test_its_repr_names_it,
    ):
        torch.manual_seed(0)
        contract("prior Logistic")


def test_the_new_prior_trains_and_is_described(added, capsys):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.Logistic(2),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(2, [8], 5)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [8], 4)),
    )
    assert pv.describe(vae).attrs["kl"] == "Monte Carlo"
    assert "Logistic" in capsys.readouterr().out
    history = pv.fit(vae, torch.randn(100, 5), epochs=10, progress=False, device="cpu").history
    assert history.train_elbo[-1] > history.train_elbo[0]
    assert vae.prior().log_prob(torch.zeros(2)).isfinite()
    assert isinstance(vae.prior().base_dist, dist.Logistic)


def test_its_row_is_one_of_the_readmes_table():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    header = next(line for line in readme.splitlines() if line.startswith("| | member"))
    assert README_ROW.strip().replace("\\|", "").count("|") == header.count("|")


def test_the_page_on_comparing_estimators_runs(capsys):
    page = (Path(__file__).resolve().parents[2] / "docs" / "comparing_estimators.md").read_text(encoding="utf-8")
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "docs/comparing_estimators.md", "exec"), names)
    assert "Train with" in capsys.readouterr().out
    pair = names["pair"]
    assert pair.parameter_group.values.tolist() == ["all", "Θ", "φ", "decode", "encode"]
    assert (pair.elbo.sel(estimator="IWAE", particles=8) > pair.elbo.sel(estimator="ELBO", particles=8)).item()
    stated = set(re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE))
    assert {name for cell in stated for name in re.findall(r"`(\w+)`", cell)} <= set(pair.data_vars)
