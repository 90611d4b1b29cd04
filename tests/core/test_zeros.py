"""Zero-inflated and hurdle counts: what they become at their ends, rare counts drawn exactly, use and mistakes."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats
from torch import nn

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.cli.load_run import trained_run
from pyro_vae.errors import DataError, ModelError, SettingsError

L, ID = pv.likelihoods, nn.Identity()
BINOMIAL = partial(L.Binomial, total_count=6)

# The counts, their numbers at a feature of usual size and at a rare one, and scipy's distribution of these numbers.
COUNTS = {
    "Poisson": (L.Poisson, [[0.6], [-5.0]], lambda r: stats.poisson(np.exp(r))),
    "NegativeBinomial": (
        L.NegativeBinomial, [[0.4, 0.9], [1.5, -6.0]],
        lambda logit, k: stats.nbinom(np.exp(k), 1 / (1 + np.exp(logit))),
    ),
    "Binomial": (BINOMIAL, [[-0.3], [-6.0]], lambda logit: stats.binom(6, 1 / (1 + np.exp(-logit)))),
}  # fmt: skip
EACH = [(name, i) for name in COUNTS for i in (0, 1)]


def columns(logit: float, numbers: list[float]) -> torch.Tensor:
    """The network's output for one feature."""
    return torch.tensor([logit, *numbers], dtype=torch.float64)


@pytest.mark.parametrize(("name", "i"), EACH)
def test_without_zeros_of_their_own_they_are_the_counts(name, i):
    """At π = 0 the inflated counts, and at π = p(0) the hurdle's, whose π is then no more and no less than theirs."""
    counts, numbers, _ = COUNTS[name]
    plain, x = counts(ID)(columns(0.0, numbers[i])[1:]), torch.arange(7, dtype=torch.float64).unsqueeze(-1)
    p_zero = plain.log_prob(x[0]).exp()
    inflated = L.ZeroInflated(ID, counts)(columns(-60.0, numbers[i]))
    hurdle = L.Hurdle(ID, counts)(columns(torch.logit(p_zero).item(), numbers[i]))
    for same in (inflated, hurdle):
        assert torch.allclose(same.log_prob(x), plain.log_prob(x), rtol=1e-9, atol=1e-12)
        assert torch.allclose(same.mean, plain.mean, rtol=1e-9)
        assert torch.allclose(same.variance, plain.variance, rtol=1e-9)


@pytest.mark.parametrize(("name", "i"), EACH)
def test_counts_above_zero_are_drawn_with_their_probabilities(name, i):
    """Chi-square of a hurdle's draws, rare counts too; draws of the counts moved up by one are seen (power)."""
    counts, numbers, of_scipy = COUNTS[name]
    law, n = of_scipy(*numbers[i]), 40_000
    x = L.Hurdle(ID, counts)(columns(-60.0, numbers[i])).sample((n,)).flatten().numpy()
    values = np.arange(1, 60)
    expected = n * law.pmf(values) / law.sf(0)

    def z(drawn):
        common = expected >= 5
        seen = np.array([(drawn == v).sum() for v in values])
        rest = [(n - seen[common].sum(), n - expected[common].sum())] * int(n - expected[common].sum() >= 5)
        pairs = [*zip(seen[common], expected[common], strict=True), *rest]
        square, freedom = sum((s - e) ** 2 / e for s, e in pairs), max(len(pairs) - 1, 1)
        return (square - freedom) / np.sqrt(2 * freedom)

    assert x.min() >= 1
    assert z(x) < 5
    assert z(1 + law.rvs(n, random_state=0)) > 5, "power"


@pytest.mark.parametrize("member", [L.ZeroInflated, L.Hurdle])
@pytest.mark.parametrize("counts", [L.Poisson, L.NegativeBinomial, BINOMIAL])
def test_a_wild_network_gives_finite_numbers(member, counts):
    likelihood = member(ID, counts)
    for size in (3000.0, -3000.0):
        out = torch.full((4 * likelihood.numbers,), size, requires_grad=True)
        p = likelihood(out)
        log_prob = p.log_prob(torch.tensor([0.0, 1.0, 1.0, 0.0]))
        assert log_prob.isfinite()
        assert torch.autograd.grad(log_prob, out)[0].isfinite().all()
        assert p.mean.isfinite().all()
        assert p.variance.min() >= 0
    assert member is L.ZeroInflated or torch.equal(p.mean, torch.ones(4)), "a count above 0 of the least rate is 1"


def zero_inflated_vae(features: int) -> pv.VAE:
    torch.manual_seed(0)
    blocks = [(partial(L.ZeroInflated, counts=L.NegativeBinomial), features - 1), (L.Normal, 1)]
    return pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=L.Blocks(pv.nn.mlp(2, [4], L.Blocks.outputs(features, blocks=blocks)), blocks),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(features, [4], 4)),
        standardize=pv.data.mean_and_sd(torch.tensor([[0.0, 1.0, 2.0, 30.0], [3.0, 0.0, 1.0, 10.0]])),
    )


def test_in_blocks_a_vae_of_them_is_saved_with_missing_values(tmp_path):
    vae, x = zero_inflated_vae(4), torch.tensor([[0.0, 3.0, torch.nan, 20.0], [2.0, torch.nan, 0.0, 10.0]])
    pv.save(vae, tmp_path / "vae.safetensors")
    again = pv.load(tmp_path / "vae.safetensors")
    x = pv.data.load(x, missing="nan")
    each = [pv.log_evidence(one, x, num_particles=20, seed=0, progress=False) for one in (vae, again)]
    assert each[0].identical(each[1])
    assert vae.decoder.standardize.unit[:3].tolist() == [1.0] * 3, "counts stay as they are"


def test_the_command_line_makes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("counts.npy", np.random.default_rng(0).poisson(1.0, (40, 3)).astype(np.float32))
    quick = ["--epochs", "1", "--hidden", "[4]", "--latent_dim", "2", "--engine", "eager", "--device", "cpu"]
    command = ["fit", "--data", "counts.npy", "--out", "run", *quick]
    assert main([*command, "--likelihood", "ZeroInflated", "--likelihood.counts", "NegativeBinomial"]) == 0
    assert yaml.safe_load(Path("run/config.yaml").read_text())["likelihood"]["class_path"].endswith("ZeroInflated")
    vae = trained_run("run", None)[1]
    assert (type(vae.decoder).__name__, type(vae.decoder.counts).__name__) == ("ZeroInflated", "NegativeBinomial")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L.ZeroInflated(ID, L.Normal), "counts is a Normal; it must be Poisson, NegativeBinomial or Binomial"),
        (lambda: L.Hurdle(ID, L.Poisson(ID)), "counts is an instance of Poisson, which has its own network; pass"),
        (lambda: L.Hurdle(ID, L.Binomial), r"counts cannot be built from Binomial .*pass its settings with partial"),
        (lambda: L.Hurdle(ID, nn.ReLU), "counts is a ReLU; it must be a likelihood"),
        (lambda: L.Hurdle(ID, partial(L.Hurdle, counts=L.Poisson)), "counts is a Hurdle; it must be Poisson"),
        (lambda: L.Hurdle.outputs(3), "the outputs of Hurdle depend on its counts; pass counts="),
    ],
)
def test_other_counts_are_refused(make, message):
    with pytest.raises(SettingsError, match=message):
        make()


def test_data_and_outputs_that_do_not_fit_are_refused():
    likelihood = L.ZeroInflated(ID, L.NegativeBinomial)
    with pytest.raises(DataError, match=r"column 1 is 0\.5, but ZeroInflated takes whole numbers from 0"):
        likelihood.refuse(torch.tensor([[0.0, 0.5]]))
    with pytest.raises(ModelError, match="gives 5 outputs; it must give a multiple of 3, since ZeroInflated needs 3"):
        likelihood(torch.zeros(2, 5))
    assert L.ZeroInflated.outputs(4, counts=L.NegativeBinomial) == 12
    assert L.Hurdle.outputs(4, counts=BINOMIAL) == 8
    out = torch.tensor([0.0, 0.0, 25.0, 1.0, 1.0, 1.0])
    assert likelihood.beyond(out)["logits above 20"].tolist() == [True, False]
