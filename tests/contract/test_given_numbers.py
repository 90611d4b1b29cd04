"""Numbers that a user gives are exact in double precision, whatever the precision in which a part was made."""

import copy

import pytest
import torch
from test_members import MEMBERS, given, is_prior

import pyro_vae as pv

NET = torch.nn.Identity()


def made(name, seed, dtype):
    """A member made in a precision and converted to double, as a user does it."""
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype)
        return MEMBERS[name]().double()
    finally:
        torch.set_default_dtype(before)


def tensors(part):
    """Those of a member, and of the parts of a VAE that it holds on to."""
    every = {"": part, **{f"{i}.": other for i, other in enumerate([*_held(part, "_model"), *_held(part, "_encoder")])}}
    return {
        f"{where}{name}": tensor
        for where, module in every.items()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }


def _held(part, name):
    return getattr(part, name, ())


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_in_double_precision_has_the_numbers_that_were_given(name):
    """Made in single and converted it is as made in double: tensors that no seed changes, and the density.

    Power: a scale of 0.7 made in single precision is off by 1e-8.
    """
    single, other, exact = made(name, 0, torch.float32), made(name, 1, torch.float32), made(name, 0, torch.float64)
    theirs, elsewhere = tensors(other), tensors(exact)
    for where, tensor in tensors(single).items():
        if torch.equal(tensor, theirs[where]) and ".net." not in where:
            assert torch.equal(tensor, elsewhere[where]), where
        else:  # drawn at random; networks of the parts that a member holds on to have a seed of their own
            tensor.data.copy_(elsewhere[where])
    inputs = given(name, (4,))
    value = exact(*inputs).sample((4,) if is_prior(name) else ())
    assert torch.equal(single(*inputs).log_prob(value), exact(*inputs).log_prob(value))


SCALED = {
    "fixed": lambda: pv.likelihoods.Normal(NET, scale=0.37),
    "learned": lambda: pv.likelihoods.Laplace(NET, scale=0.37, learn_scale=True),
    "a feature's own": lambda: pv.likelihoods.StudentT(NET, scale=0.37, per_feature=3),
}


@pytest.mark.parametrize("there", ["double", "half", "bfloat16"])
def test_a_scale_goes_to_double_from_every_precision(there):
    likelihood = SCALED["fixed"]()
    assert getattr(likelihood, there)().double().scale.item() == 0.37
    assert likelihood.float().to(torch.float64).scale.item() == 0.37
    for kind in ("learned", "a feature's own"):
        likelihood = getattr(SCALED[kind](), there)().double()
        assert (likelihood.scale - 0.37).abs().max() < 1e-16


@pytest.mark.parametrize("kind", ["fixed", "learned", "a feature's own"])
def test_a_scale_that_was_changed_stays_so(kind):
    """Trained, loaded or set by hand, it is converted as torch converts it."""
    likelihood = SCALED[kind]()
    (tensor,) = likelihood.state_dict().values()
    with torch.no_grad():
        tensor.add_(0.25)
    changed = tensor.double().clone()
    loaded = SCALED[kind]()
    loaded.load_state_dict(likelihood.state_dict())
    for each in (likelihood, loaded, copy.deepcopy(likelihood)):
        assert torch.equal(next(iter(each.double().state_dict().values())), changed)


def test_a_scale_trained_in_double_is_not_reset():
    """Where torch makes tensors in double, the number that is kept is another tensor than the parameter."""
    torch.set_default_dtype(torch.float64)
    try:
        likelihood = SCALED["learned"]()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        likelihood.log_scale.add_(0.25)
    trained = likelihood.log_scale.item()
    assert likelihood.float().log_scale.item() == pytest.approx(trained, rel=1e-6)


def test_the_pseudo_inputs_of_a_vamp_prior_are_rows_of_the_data():
    x = torch.randn(20, 4, dtype=torch.float64)
    prior = pv.priors.VampPrior(x, components=5)
    assert prior.pseudo_inputs.dtype == torch.float32
    assert all(any(torch.equal(row, datum) for datum in x) for row in prior.double().pseudo_inputs)


def test_a_saved_vae_has_its_numbers(tmp_path):
    """Saved in single precision it is exact in double; saved with a rounded scale, as before, it is as saved."""
    encoder = pv.posteriors.DiagNormal(pv.nn.mlp(3, [], 4))
    decoder = pv.likelihoods.Normal(pv.nn.mlp(2, [], 3), scale=0.37)
    vae = pv.VAE(prior=pv.priors.StandardNormal(2), decoder=decoder, encoder=encoder)
    pv.save(vae, tmp_path / "single.safetensors")
    assert pv.load(tmp_path / "single.safetensors").double().decoder.scale.item() == 0.37
    vae.double().decoder.fixed_scale.copy_(torch.tensor(0.37))
    pv.save(vae, tmp_path / "rounded.safetensors")
    again = pv.load(tmp_path / "rounded.safetensors").double()
    assert again.decoder.scale.item() == torch.tensor(0.37).item() != 0.37


def test_the_oracles_vae_has_its_scale():
    model = pv.exact.LinearGaussian(torch.ones(4, 1).double(), torch.zeros(4).double(), 0.37)
    assert model.as_vae().decoder.scale.item() == model.scale.item() == 0.37
