"""A VAE that was used can be pickled, copied, saved by torch and sent to a process; so can a ``Fit``."""

import copy
import gc
import io
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import joblib
import pyro
import pytest
import torch
from helpers.checks import small_vae
from helpers.members import LIKELIHOODS, POSTERIORS, PRIORS, make
from torch import nn

import pyro_vae as pv


def by_pickle(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def by_torch(value):
    torch.save(value, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_joblib(value):
    joblib.dump(value, file := io.BytesIO())
    file.seek(0)
    return joblib.load(file)


def by_process(value):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(copy.copy, value).result()


COPIES = [by_pickle, copy.deepcopy, by_torch, by_joblib]


def after_fit(vae, x):
    pv.fit(vae, x, epochs=2, batch_size=16, progress=False, device="cpu")


def after_svi(vae, x):
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pv.elbo.Trace_ELBO())
    svi.step(x)


def after_predictive(vae, x):
    pyro.infer.Predictive(vae.model, guide=vae.guide, num_samples=2)(x)


def after_the_store_was_read(vae, x):
    after_svi(vae, x)
    dict(pyro.get_param_store().items())


USES = [after_fit, after_svi, after_predictive, after_the_store_was_read]


def trains_as(one, other, x):
    """Whether a step of SVI moves both to the same weights, and neither by the other."""
    for vae in (one, other):
        torch.manual_seed(3)
        before = copy.deepcopy(vae.state_dict())
        after_svi(vae, x)
        assert any(not torch.equal(before[name], value) for name, value in vae.state_dict().items())
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("copied", COPIES)
def test_a_used_vae_is_copied_and_the_copy_trains_alike(copied, use):
    vae, x = small_vae(), torch.randn(40, 6, dtype=torch.float64)
    use(vae, x)
    again = copied(vae)
    assert trains_as(vae, again, x)


@pytest.mark.parametrize("copied", COPIES)
def test_a_fit_is_copied_with_its_history(copied):
    x = torch.randn(40, 6, dtype=torch.float64)
    fitted = pv.fit(small_vae(), x, epochs=2, progress=False, device="cpu")
    again = copied(fitted)
    assert again.history.identical(fitted.history)
    assert again.vae.trained_on.as_text() == fitted.vae.trained_on.as_text()
    assert trains_as(fitted.vae, again.vae, x)


def test_a_used_vae_goes_to_a_process_and_comes_back():
    vae, x = small_vae(), torch.randn(40, 6, dtype=torch.float64)
    after_svi(vae, x)
    assert trains_as(vae, by_process(vae), x)


def test_what_a_used_vae_is_made_of_is_copied_too():
    vae, x = small_vae(), torch.randn(40, 6, dtype=torch.float64)
    after_svi(vae, x)
    vae.decoder.net = pv.nn.mlp(3, [4], 6).double()  # the component still knows the network that it was made of
    optimizer = torch.optim.Adam(vae.parameters())
    for value in (vae, vae.model, vae.guide, vae.decoder, vae.encoder.net, list(vae.parameters()), optimizer):
        again = by_pickle(value)
        if isinstance(value, nn.Module):
            assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in value.state_dict().items())


def part(table, name):
    return make(table[name])


MEMBERS = [(table, name) for table in (PRIORS, LIKELIHOODS, POSTERIORS) for name in table]


@pytest.mark.parametrize(("table", "name"), MEMBERS, ids=[name for _, name in MEMBERS])
def test_every_member_is_pickled_after_a_step(table, name):
    member = make(table[name])
    model = nn.ModuleList([member])
    pv.core.param_store.register(model)
    again = by_pickle(member)
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in member.state_dict().items()
    }


def test_a_parameter_of_the_store_does_not_keep_itself_alive():
    vae = small_vae()
    after_svi(vae, torch.randn(8, 6, dtype=torch.float64))
    parameter = next(vae.parameters())
    reference = parameter.unconstrained
    assert reference() is parameter
    pyro.clear_param_store()
    del vae, parameter
    gc.collect()
    assert reference() is None
