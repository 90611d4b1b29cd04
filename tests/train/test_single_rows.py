"""A last batch of one row: trained on, avoided or refused before the first step, with batch sizes that work."""

import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.train.trial import default_batch_size

FEATURES, LATENTS = 5, 2


def vae_of(*, encoder=None, decoder=None):
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENTS),
        decoder=pv.likelihoods.Normal(decoder or pv.nn.mlp(LATENTS, [4], FEATURES)),
        encoder=pv.posteriors.DiagNormal(encoder or pv.nn.mlp(FEATURES, [4], 2 * LATENTS)),
    )


def normalized():
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2 * LATENTS))


def fit(vae, n, batch_size, elbo=None, **settings):
    x = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(0))
    settings = {"epochs": 1, "engine": "eager", "progress": False, "device": "cpu"} | settings
    return pv.fit(vae, x, elbo=elbo, batch_size=batch_size, **settings)


BATCH_NORM = {"batch norm": (normalized, None), "3 particles": (normalized, pv.elbo.ELBO(3))}
COUPLED = {"InfoVAE": (lambda: None, pv.elbo.InfoVAE(pv.elbo.ELBO()))}
PYROS = {"Pyro's own": (normalized, pv.elbo.Trace_ELBO(num_particles=3, vectorize_particles=True))}
FAILING = BATCH_NORM | COUPLED | PYROS


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize(("encoder", "elbo"), FAILING.values(), ids=FAILING)
def test_a_last_batch_of_one_row_is_refused_before_the_first_step(encoder, elbo, engine):
    vae = vae_of(encoder=encoder())
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    with pytest.raises(SettingsError, match=r"last batch of one of the 17 rows, .* pass batch_size=7 or 9$"):
        fit(vae, 17, 8, elbo, engine=engine)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("batch_size", [7, 9, None])
@pytest.mark.parametrize(("encoder", "elbo"), FAILING.values(), ids=FAILING)
def test_the_sizes_that_are_named_are_trained_with(encoder, elbo, batch_size):
    fit(vae_of(encoder=encoder()), 17, batch_size, elbo)


def test_by_default_no_batch_has_one_row():
    assert all(default_batch_size(n) == 1 or n % default_batch_size(n) != 1 for n in range(2, 2000))
    assert all(default_batch_size(n) == min(n, 128) for n in range(1, 2000) if n % 128 != 1 or n < 128)
    result = fit(vae_of(encoder=normalized()), 129, None)
    assert result.history.attrs["batch_size"] == 127


def test_every_batch_of_one_row_is_refused():
    with pytest.raises(SettingsError, match=r"batch_size is 1, which makes batches of one row, .* pass batch_size=3$"):
        fit(vae_of(encoder=normalized()), 3, 1)
    with pytest.raises(SettingsError, match=r"the data have one row, .* pass at least two"):
        fit(vae_of(encoder=normalized()), 1, 1)


def test_other_parts_are_trained_on_one_row():
    assert fit(vae_of(), 9, 4).history.step == 3


def test_parts_are_tried_in_training_mode():
    """A decoder that takes particles in evaluation mode alone, as one with batch normalization of its own does."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(LATENTS, FEATURES)

        def forward(self, z):
            if self.training and z.dim() > 2:
                raise ValueError("expected 2D input")
            return self.layer(z)

    with pytest.raises(
        ModelError, match=r"2 rows in training mode \(ValueError: expected 2D input\); make the components"
    ):
        fit(vae_of(decoder=Decoder()), 16, 8, pv.elbo.ELBO(3))


def test_trying_changes_neither_numbers_nor_statistics():
    vae = vae_of(encoder=normalized())
    state = torch.get_rng_state()
    source = torch.randn(17, FEATURES)
    torch.set_rng_state(state)
    with pytest.raises(SettingsError, match="a last batch of one of the"):
        pv.fit(vae, source, batch_size=8, epochs=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.encoder.net[1].num_batches_tracked == 0


@pytest.mark.parametrize("elbo", [pv.elbo.ELBO(), pv.elbo.InfoVAE(pv.elbo.ELBO())], ids=str)
def test_run_names_the_batch_of_one_row(elbo):
    vae = vae_of(encoder=normalized())
    svi = pv.CompiledSVI(vae.model, vae.guide, torch.optim.Adam(vae.parameters()), elbo)
    with pytest.raises(SettingsError, match=r"last batch of a pass, which has one row \(.*\); choose a batch_size"):
        svi.run(torch.randn(5, FEATURES), steps=2, batch_size=4, size=5)


def test_a_stream_is_tried_too(tmp_path):
    import numpy as np

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(17, FEATURES)).astype(np.float32))
    stream = pv.data.stream(tmp_path / "x.npy")
    with pytest.raises(SettingsError, match="pass batch_size=7 or 9"):
        pv.fit(vae_of(encoder=normalized()), stream, batch_size=8, epochs=1, progress=False, device="cpu")
