"""Data in memory as a source: each row once, in an order that the seed alone decides."""

import pytest
import torch
from helpers.checks import small_vae
from hypothesis import given, settings
from hypothesis import strategies as st

import pyro_vae as pv
from pyro_vae.core.rows import Rows
from pyro_vae.data.sources import InMemory, Source, hashes_of, source_of
from pyro_vae.data.values import Data
from pyro_vae.errors import DataError, ModelError, SettingsError


def source(n=7, features=2):
    return InMemory(Rows(torch.arange(float(n * features)).reshape(n, features)))


@given(n=st.integers(1, 50), seed=st.integers(-(2**62), 2**62), skip=st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_every_row_once_and_skip_is_the_tail(n, seed, skip):
    [window] = source(n).windows(seed=seed, batch_size=3)
    assert sorted(window.order.tolist()) == list(range(n))
    rest = [w.order for w in source(n).windows(seed=seed, batch_size=3, skip=skip)]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *rest]), window.order[skip:])


def test_the_order_is_of_the_seed_alone_and_draws_no_global_number():
    before = torch.get_rng_state()
    orders = [next(iter(source(50).windows(seed=s, batch_size=m))).order for s, m in [(1, 2), (1, 5), (2, 2)]]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2]), "power: another seed is another order"
    assert torch.equal(before, torch.get_rng_state())


def test_nothing_is_copied_where_it_is_as_the_vae_needs_it():
    vae, x = small_vae(), torch.zeros(4, 6, dtype=torch.float64)
    rows = source_of(x, vae).like(vae).rows
    assert rows.x.data_ptr() == x.data_ptr()


def test_what_fit_takes_becomes_a_source():
    vae = small_vae()
    named = Data(torch.zeros(4, 6), columns=list("abcdef"), image_shape=(2, 3), source="a.csv")
    for data in (torch.zeros(4, 6), [[0.0] * 6] * 4, Rows(torch.zeros(4, 6)), named):
        made = source_of(data, vae)
        assert isinstance(made, Source)
        assert (len(made), made.features) == (4, (6,))
    assert (made.source, made.columns, made.image_shape) == ("a.csv", list("abcdef"), (2, 3))
    assert source_of(made, vae) is made


def test_what_does_not_fit_is_refused():
    vae = small_vae()
    with pytest.raises(DataError, match="row 1, column 0"):
        source_of([[0.0] * 6, [float("nan")] * 6], vae)
    with pytest.raises(ModelError):
        source_of(torch.zeros(4, 5), vae)
    with pytest.raises(SettingsError, match="a source contains its context and mask"):
        source_of(InMemory(Rows(torch.zeros(4, 6))), vae, context=torch.zeros(4, 1))
    bits = pv.VAE(
        prior=pv.priors.StandardNormal(2), decoder=pv.likelihoods.Bernoulli(pv.nn.mlp(2, [], 3)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(3, [], 4)),
    )  # fmt: skip
    with pytest.raises(DataError, match="row 0, column 2 is 7"):
        source_of(InMemory(Rows(torch.tensor([[0.0, 1.0, 7.0]]))), bits)


def test_a_sample_is_evenly_spaced_and_hashes_tell_other_data():
    assert source(10, 1).sample(5).x[:, 0].tolist() == [0, 2, 4, 6, 8]
    assert len(source(3).sample(5)) == 3
    assert source(5).head(2).x.tolist() == source(5).rows.x[:2].tolist()
    other = source(5)
    assert hashes_of(other).tolist() == hashes_of(source(5)).tolist()
    other.rows.x[3, 1] += 1
    assert (hashes_of(other) != hashes_of(source(5))).tolist() == [False, False, False, True, False]
