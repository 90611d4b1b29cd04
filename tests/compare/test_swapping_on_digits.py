"""Swapping parts on real data: what a likelihood made for counts gains, and what users get wrong."""

from functools import partial

import pytest
import torch
import zuko
from helpers.checks import small_vae

import pyro_vae as pv
from pyro_vae.errors import DataError, ModelError, SettingsError

quiet_fit = partial(pv.fit, progress=False, device="cpu")


def fitted(likelihood, data):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(8),
        decoder=likelihood(pv.nn.mlp(8, [128], 64)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [128], 16)),
    )
    quiet_fit(vae, data, epochs=100, optimizer=partial(torch.optim.Adam, lr=2e-3, fused=True))
    return vae


@pytest.mark.slow
def test_counts_are_better_described_by_a_binomial_than_by_a_normal():
    """On one scale: uniform noise of width 1 is added to the counts (dequantisation) where a density is trained.

    By Jensen's inequality E_u log p(c + u) ≤ log ∫ p(c + u) du = log P(c) (Theis et al., 2016), so the
    normal's evidence of dequantised counts is a bound on the log-probability it gives to counts.
    """
    digits = pv.data.digits()
    train, test = pv.data.split(pv.data.Data((16 * digits.x).round()))
    generator = torch.Generator().manual_seed(1)

    def dequantised(x):
        return x + torch.rand(x.shape, generator=generator) - 0.5

    binomial = fitted(partial(pv.likelihoods.Binomial, total_count=16), train.x)
    normal = fitted(partial(pv.likelihoods.Normal, scale=4.0, learn_scale=True), dequantised(train.x))
    counted = pv.log_evidence(binomial, test.x).log_evidence
    measured = pv.log_evidence(normal, dequantised(test.x)).log_evidence
    apart = counted - measured
    error = float(apart.std()) / len(test.x) ** 0.5
    assert float(apart.mean()) > 30, "some 48 nats per datum were seen"
    assert float(apart.mean()) > 5 * error


@pytest.mark.parametrize(
    ("likelihood", "data", "message"),
    [
        (pv.likelihoods.Bernoulli, [[0.0, 1.0, 3.0]], "row 0, column 2 is 3, but Bernoulli takes .*Poisson"),
        (pv.likelihoods.Poisson, [[0.0, -1.0, 3.0]], "row 0, column 1 is -1, but Poisson takes .*Normal"),
        (partial(pv.likelihoods.Binomial, total_count=5), [[0.0, 1.5, 3.0]], "column 1 is 1.5, but Binomial takes"),
        (partial(pv.likelihoods.Binomial, total_count=5), [[0.0, 1.0, 6.0]], "column 2 is 6, but Binomial takes"),
    ],
)
def test_data_outside_the_support_are_refused_before_training(likelihood, data, message):
    vae = small_vae(features=3)
    vae.decoder = likelihood(pv.nn.mlp(3, [], 3)).double()
    before = [p.detach().clone() for p in vae.parameters()]
    with pytest.raises(DataError, match=message):
        quiet_fit(vae, torch.tensor(data), epochs=1)
    with pytest.raises(DataError, match="validation data: row 0"):
        quiet_fit(vae, torch.zeros(1, 3), validation_data=torch.tensor(data), epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))


def test_parts_of_other_sizes_are_refused_naming_both():
    x = torch.randn(20, 6)
    vae = small_vae()
    vae.prior = pv.priors.Flow(zuko.flows.NICE(4, transforms=1)).double()
    with pytest.raises(ModelError, match=r"latents of shape \(3,\), the prior has shape \(4,\)"):
        quiet_fit(vae, x, epochs=1)
    vae = small_vae()
    vae.encoder = pv.posteriors.Flow(zuko.flows.NICE(5, context=6, transforms=1)).double()
    with pytest.raises(ModelError, match=r"latents of shape \(5,\), the prior has shape \(3,\)"):
        quiet_fit(vae, x, epochs=1)
    with pytest.raises(ModelError, match="the prior is a str"):
        pv.VAE(prior="standard", decoder=vae.decoder, encoder=vae.encoder)
    with pytest.raises(SettingsError, match="components is 30"):
        pv.priors.VampPrior(x, components=30)


def test_describe_says_how_the_kl_is_had(capsys):
    vae = small_vae()
    table = pv.describe(vae)
    shown = capsys.readouterr().out
    assert table["class"].values.tolist() == ["StandardNormal", "Normal", "DiagNormal"]
    assert table.event_shape.values.tolist() == ["3", "6", "3"]
    assert table.parameters.sum() == sum(p.numel() for p in vae.parameters())
    assert table.attrs["kl"] == "analytic"
    assert "analytic" in shown
    vae.prior = pv.priors.GaussianMixture(3).double()
    assert pv.describe(vae).attrs["kl"] == "Monte Carlo"
    conditional = pv.VAE(
        prior=pv.priors.ContextNormal(torch.nn.Linear(2, 6)),
        decoder=pv.likelihoods.Normal(torch.nn.Linear(5, 6)),
        encoder=pv.posteriors.DiagNormal(torch.nn.Linear(8, 6)),
    )
    assert pv.describe(conditional, context=torch.zeros(1, 2)).attrs["kl"] == "analytic"


def test_a_tables_file_and_column_are_named(tmp_path, capsys):
    from pyro_vae.cli import main

    (tmp_path / "counts.csv").write_text("visits,score\n" + "1,2\n3,-4\n" * 20)
    flags = ["--data", str(tmp_path / "counts.csv"), "--out", str(tmp_path / "run"), "--latent_dim", "1"]
    assert main(["fit", *flags, "--likelihood", "Poisson"]) == 2
    said = capsys.readouterr().err
    assert "counts.csv: row " in said
    assert "column 'score' is -4, but Poisson takes" in said
    assert not (tmp_path / "run").exists()
