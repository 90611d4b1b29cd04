"""Ranking swapped parts by held-out evidence, from Python and from the command line."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian, small_vae, z_score

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.compare.swap import rank, ranking_table
from pyro_vae.errors import SettingsError
from pyro_vae.evidence.exact import LinearGaussian, quadrature_log_marginal


def test_evidence_is_exact_for_the_exact_guide_and_covers_the_truth_for_another():
    model, x = linear_gaussian(), linear_gaussian().sample(50)
    exact = model.log_marginal(x).numpy()
    assert abs(pv.log_evidence(model.as_vae(), x, num_particles=5).log_evidence - exact).max() < 1e-11
    found = pv.log_evidence(model.as_vae(diagonal=True), x, num_particles=4000)
    z = (found.log_evidence - exact) / found.mcse
    assert abs(z).max() < 5
    assert 0.7 < z.std() < 1.4, "the errors are of the right size"
    few = pv.log_evidence(model.as_vae(diagonal=True), x, num_particles=4)
    assert few.log_evidence.mean() < exact.mean(), "a bound from below"


def test_evidence_of_a_network_is_the_quadratures():
    vae, x = small_vae(latents=2), torch.randn(5, 6).double()
    exact = quadrature_log_marginal(vae, x).numpy()
    found = pv.log_evidence(vae, x, num_particles=20_000, chunk=2**18)
    assert abs((found.log_evidence - exact) / found.mcse).max() < 5
    assert abs((found.log_evidence - exact - 0.2) / found.mcse).max() > 5, "power"


def test_ranking_gives_paired_differences():
    right = linear_gaussian()
    wrong = LinearGaussian(right.weight, right.bias, right.scale * 1.2)
    x = right.sample(400)
    ranked = rank({"wrong": wrong.as_vae(), "right": right.as_vae()}, x)
    assert ranked.model.values.tolist() == ["right", "wrong"]
    apart = wrong.log_marginal(x) - right.log_marginal(x)
    assert ranked.difference.values == pytest.approx([0, apart.mean().item()], abs=1e-10)
    assert ranked.difference_se.values[1] == pytest.approx(apart.std().item() / 20, rel=1e-9)
    assert ranked.difference_se[1] < ranked.se[1] / 2, "pairing is what makes it sharp"
    assert abs(z_score(apart, ranked.difference.values[1])) < 1e-6
    with pytest.raises(SettingsError, match="vaes is empty"):
        rank({}, x)
    with pytest.raises(SettingsError, match="num_particles is 1"):
        pv.log_evidence(right.as_vae(), x, num_particles=1)


def test_the_command_trains_a_grid_and_ranks_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", linear_gaussian(features=6).sample(300).numpy())
    (tmp_path / "swap.yaml").write_text(
        """
data: data.npy
epochs: 3
latent_dim: 2
hidden: [8]
particles: 50
priors:
- pyro_vae.priors.StandardNormal
- class_path: pyro_vae.priors.GaussianMixture
  init_args: {components: 3}
- class_path: pyro_vae.priors.VampPrior
  init_args: {components: 5}
likelihoods:
- class_path: pyro_vae.likelihoods.Normal
  init_args: {scale: 0.3, learn_scale: true}
- pyro_vae.likelihoods.Normal
"""
    )
    assert main(["swap", "--config", "swap.yaml", "--out", "run"]) == 0
    shown = capsys.readouterr().out
    assert "difference from best" in shown
    with xr.open_dataset("run/ranking.nc", engine="h5netcdf") as ranked:
        assert ranked.sizes == {"model": 6, "datum": 60}
        assert (np.diff(ranked.log_evidence) <= 0).all()
        names = set(ranked.model.values)
    assert "GaussianMixture(components=3) · Normal(scale=0.3, learn_scale=True)" in names
    assert "StandardNormal · Normal" in names
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "models",
        "ranking.csv",
        "ranking.nc",
        "ranking.png",
        "sweep.json",
        "SHA256SUMS",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--priors", "[Nope]"], "Nope"),
        (["--priors", "[]"], "priors is empty"),
        (["--priors", "[{class_path: VampPrior, init_args: {components: 5000}}]"], "components is 5000"),
        (["--particles", "1"], "num_particles is 1"),
    ],
)
def test_a_grid_that_cannot_be_made_is_refused(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.zeros((50, 3)))
    assert main(["swap", "--data", "data.npy", "--out", "run", "--epochs", "1", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_ranking_shows_where_importance_weights_are_poor_and_takes_annealing():
    x = 1.5 * torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).double()
    exact = -0.25 * x[:, 0] ** 2 - 0.5 * math.log(4 * math.pi)  # z ~ N(0, 1), x|z ~ N(z, 1), so x ~ N(0, 2)
    guided = {"narrow": unit_pair(0.15), "exact": unit_pair(0.5**0.5)}
    ranked = rank(guided, x, num_particles=400)
    assert ranked.model.values.tolist() == ["exact", "narrow"]
    assert ranked.bad_khat.values[0] == 0
    assert ranked.bad_khat.values[1] > 0.5
    table = ranking_table(ranked)
    assert table.columns[-1].header == "k̂ > 0.7"
    assert 'take more particles, or method="ais"' in table.caption
    assert 'method="ais"' not in ranking_table(rank({"exact": guided["exact"]}, x)).caption

    annealed = rank(guided, x, method="ais")
    assert "32 chains, ais" in ranking_table(annealed).title
    narrow = annealed.sel(model="narrow")
    assert abs(narrow.log_evidence - exact.mean().item()) < abs(ranked.log_evidence[1] - exact.mean().item()) / 3
    with pytest.raises(SettingsError, match="bdmc"):
        rank(guided, x, method="bdmc")
    for wrong in ([3], 3):
        with pytest.raises(SettingsError, match=r"vaes\['no'\] is an int; pass a VAE or a Pair"):
            rank({"no": wrong}, x)
    with pytest.raises(SettingsError, match=r"vaes is a Pair; pass \{name: vae"):
        rank(guided["exact"], x)
    with pytest.raises(SettingsError, match="is a Dataset"):
        rank({"no": pv.log_evidence(guided["exact"], x)}, x)


def unit_pair(scale):
    def model(x, size=None):
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, size=None):
        with pyro.plate("data", len(x) if size is None else size, subsample=x):
            pyro.sample("z", dist.Normal(x / 2, scale).to_event(1))

    return pv.Pair(model, guide)
