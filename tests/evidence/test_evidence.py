"""log p(x) by each method, against closed forms; what cannot be estimated is refused."""

from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian, small_vae
from helpers.conditional import MASK, conditional_vae, guided, seen_features
from torch import nn

import pyro_vae as pv
from pyro_vae.data import Data, Rows
from pyro_vae.data.fingerprint import data_hash, row_hashes
from pyro_vae.errors import DataError, ModelError, SettingsError
from pyro_vae.evidence import cross_check, judge_evidence, known_evidence
from pyro_vae.evidence.weights import bias_of_log_mean, log_mean, smoothed

MODEL = linear_gaussian()
METHODS = ("iw", "psis", "ais", "ais_prior", "bdmc")
FROM_GUIDE = ("iw", "psis", "ais", "bdmc")
quick = partial(pv.log_evidence, num_particles=30, temperatures=4, leapfrog=3)


def narrow(shift=0.0, factor=0.4):
    """The diagonal guide made too narrow, and moved."""
    vae = MODEL.as_vae(diagonal=True)
    with torch.no_grad():
        vae.encoder.net.bias[:2] += shift
        vae.encoder.net.bias[2:] += np.log(factor)
    return vae


def truth_of(found, x):
    """log p(x) of the data that an estimate is of."""
    return MODEL.log_marginal(torch.as_tensor(found.x.values) if "x" in found else x).numpy()


@pytest.mark.parametrize("method", FROM_GUIDE)
def test_with_the_exact_guide_every_method_gives_log_p_to_rounding(method):
    x = MODEL.sample(20)
    found = quick(MODEL.as_vae(), x, method=method)
    exact = truth_of(found, x)
    for name in {"log_evidence", "lower", "upper"} & set(found):
        assert abs(found[name] - exact).max() < 1e-10
    assert found.mcse.max() < 1e-10
    assert found.attrs["method"] == method
    assert found.log_evidence.attrs["units"] == found.mcse.attrs["units"] == "nats"
    assert (found.khat == 0).all(), "weights that are all alike have no tail"
    if method != "bdmc":
        assert abs(found.bias).max() < 1e-10
        assert judge_evidence(found).level == "doubtful", "nothing checked it"
        found = cross_check(MODEL.as_vae(), x, found)
    assert judge_evidence(found).level == "fine"


@pytest.mark.parametrize("method", ["iw", "psis", "ais", "ais_prior"])
def test_with_another_guide_the_error_is_that_which_is_stated(method):
    x = MODEL.sample(60)
    settings = {"num_particles": 2000} if "ais" not in method else {"num_particles": 100, "temperatures": 15}
    settings |= {"temperatures": 100} if method == "ais_prior" else {}
    found = pv.log_evidence(MODEL.as_vae(diagonal=True), x, method=method, leapfrog=4, **settings)
    apart = (found.log_evidence - MODEL.log_marginal(x).numpy()) / found.mcse
    assert abs(apart).max() < 5
    assert 0.7 < float(apart.std()) < 1.4, "the errors are of the right size"
    assert float(abs(apart + 0.5 / found.mcse).max()) > 5, "power: half a nat would be seen"


def test_smoothing_makes_a_bad_guides_answer_better():
    """Mean squared error over 200 data with a heavy tail; and k̂ says what sort of guide it is."""
    x = MODEL.sample(200)
    exact, vae = MODEL.log_marginal(x).numpy(), narrow(factor=0.55)
    plain, smooth = (pv.log_evidence(vae, x, method=m, num_particles=200) for m in ("iw", "psis"))
    error = {m: float(((f.log_evidence - exact) ** 2).mean()) for m, f in (("iw", plain), ("psis", smooth))}
    assert error["psis"] < error["iw"]
    assert float(smooth.khat.median()) > 0.6
    good = pv.log_evidence(MODEL.as_vae(diagonal=True), x, method="psis", num_particles=200)
    assert float(good.khat.median()) < 0.5
    assert smooth.khat.mean() > good.khat.mean() + 0.2, "power: a wrong sign of the weights would turn this round"


def test_smoothed_weights_are_not_normalized_and_keep_their_sum():
    """Of exponential weights, whose mean is 1: the smoothed mean is near, however they are scaled."""
    weights = torch.empty(4000, 3).double().exponential_()
    offset = torch.tensor([-500.0, 0.0, 700.0]).double()
    value, error = log_mean(smoothed(weights.log() + offset)[0])
    assert ((value - offset) / error).abs().max() < 5
    plain = weights.log().logsumexp(0) - np.log(4000)
    assert (value - offset - plain).abs().max() < 0.2 * error.max(), "much nearer to each other than to the truth"


def test_weights_that_are_alike_but_for_rounding_have_no_tail():
    weights = 1e-12 * torch.randn(100, 2).double()
    weights[:, 1] = torch.randn(100)
    same, khat = smoothed(weights)
    assert (same - weights)[:, 0].abs().max() < 1e-14
    assert khat[0] == 0
    assert not torch.equal(same[:, 1], weights[:, 1])
    constant = torch.zeros(100, 1)
    assert torch.equal(smoothed(constant)[0], constant)


def test_a_broken_guide_is_judged_so():
    """And the best diagonal one is not."""
    x = MODEL.sample(100)
    level = {}
    for name, vae in (("bad", narrow(1.0, 0.2)), ("fine", MODEL.as_vae(diagonal=True))):
        found = {m: quick(vae, x, method=m, num_particles=k) for m, k in (("iw", 200), ("psis", 200), ("ais", 30))}
        found = {m: cross_check(vae, x, one) for m, one in found.items()}
        found["bdmc"] = quick(vae, x, method="bdmc", num_particles=10)
        level[name] = {method: judge_evidence(one).level for method, one in found.items()}
        assert all(bool(judge_evidence(one).next) == (level[name][m] != "fine") for m, one in found.items())
    assert set(level["fine"].values()) == {"fine"}
    assert level["bad"] == dict.fromkeys(("iw", "psis", "ais", "bdmc"), "bad")


@pytest.mark.parametrize("method", FROM_GUIDE)
def test_what_is_missing_leaves_the_evidence(method):
    """With the exact posterior of what was seen, to rounding."""
    full, marginal = seen_features()
    own = marginal.as_vae().encoder
    vae, x = guided(full.as_vae(), lambda x, _: own(x[..., MASK[0]])), full.sample(10)
    found = quick(vae, Data(x, mask=MASK.expand(10, 5)), method=method)
    of = torch.as_tensor(found.x.values) if method == "bdmc" else x
    assert abs(found.log_evidence - marginal.log_marginal(of[:, MASK[0]]).numpy()).max() < 1e-10
    if method == "bdmc":
        assert found.x.isnull().values.tolist() == (~MASK).expand(10, 5).tolist()


@pytest.mark.parametrize("method", ["psis", "ais", "bdmc"])
def test_a_context_is_what_the_evidence_is_given(method):
    """A prior, a likelihood and a guide that are the context, with little noise: another's would be far off."""

    class OfContext(pv.Conditional):
        def forward(self, *given):
            *_, context = given
            loc = context.expand(*given[0].shape[:-1], -1) if len(given) > 1 else context
            return pv.likelihoods.Normal(nn.Identity(), scale=0.1)(loc.contiguous())

    vae = pv.VAE(prior=OfContext(), decoder=OfContext(), encoder=OfContext())
    context = torch.tensor([[1.0, 2.0], [-1.0, 5.0], [3.0, -7.0]])
    x = context + 0.1
    found = quick(vae, Data(x, context=context), method=method)
    of = torch.as_tensor(found.x.values) if method == "bdmc" else x
    assert np.allclose(found.log_evidence, dist.Normal(context, 0.1).to_event(1).log_prob(of), atol=1e-3)
    if method == "bdmc":
        assert abs(found.x - context.numpy()).max() < 0.6


def test_latents_of_any_shape_are_moved():
    class Square(nn.Module):
        def __init__(self, wide):
            super().__init__()
            self.wide = wide

        def forward(self, x=None):
            loc = torch.zeros(2, 2).double() if x is None else x.unflatten(-1, (2, 2)) / 2
            return dist.Normal(loc, self.wide if x is None else 0.6).to_event(2)

    class Flat(nn.Module):
        def forward(self, z):
            return dist.Normal(z.flatten(-2), 1.0).to_event(1)

    vae, x = pv.VAE(prior=Square(1.0), decoder=Flat(), encoder=Square(1.0)), torch.randn(40, 4).double()
    exact = dist.Normal(torch.zeros(4), 2**0.5).to_event(1).log_prob(x).numpy()
    found = pv.log_evidence(vae, x, method="ais", num_particles=50, temperatures=10, leapfrog=3)
    apart = (found.log_evidence - exact) / found.mcse
    assert abs(apart).max() < 5
    assert float(found.mcse.mean()) > 1e-4, "power: the guide is not exact"
    both = quick(vae, x, method="bdmc")
    assert both.z.shape == (40, 4)


def test_chunks_change_nothing_but_the_noise():
    x = MODEL.sample(30)
    for method in METHODS:
        found = quick(MODEL.as_vae(diagonal=True), x, method=method, chunk=30 * 5 * 4)
        apart = (found.log_evidence - truth_of(found, x)) / found.mcse
        assert found.sizes["datum"] == 30
        assert float(abs(apart).max()) < 8


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_moved_and_a_seed_gives_the_same(method):
    vae, x = small_vae(), torch.randn(5, 6).double()
    vae.decoder.net = nn.Sequential(nn.Dropout(0.5), vae.decoder.net)
    vae.encoder.net[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    asked = [p.requires_grad for p in vae.parameters()]
    state = torch.random.get_rng_state()
    first, again = (quick(vae, x, method=method) for _ in range(2))
    assert first.identical(again)
    assert not first.log_evidence.equals(quick(vae, x, method=method, seed=1).log_evidence)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())
    assert [p.requires_grad for p in vae.parameters()] == asked
    assert all(p.grad is None for p in vae.parameters())
    assert vae.training


def test_the_hash_is_of_the_data():
    x = MODEL.sample(5)
    found = quick(MODEL.as_vae(), x)
    assert found.attrs["data_hash"] == data_hash(row_hashes(Rows(x))) == quick(MODEL.as_vae(), x, seed=2).data_hash
    assert found.attrs["data_hash"] != quick(MODEL.as_vae(), x[:4]).data_hash
    both = quick(MODEL.as_vae(), x, method="bdmc")
    assert both.attrs["data_hash"] == data_hash(row_hashes(Rows(torch.as_tensor(both.x.values))))


def test_the_bar_counts_to_its_end(capsys):
    for method in METHODS:
        quick(MODEL.as_vae(), MODEL.sample(6), method=method, chunk=30 * 5 * 2, progress=True)
        said = capsys.readouterr().err
        assert "Estimating log p(x)" in said
        total = {"iw": 3, "psis": 3, "ais": 3 * 64, "ais_prior": 3 * 64, "bdmc": 3 * 78}[method]
        assert f"{total}/{total}" in said


# --- Refusals ---


class Coin(nn.Module):
    def forward(self, *given):
        return dist.Bernoulli(torch.full((3,) if not given else (len(given[0]), 3), 0.5).double()).to_event(1)


class Box(nn.Module):
    def forward(self, *given):
        return dist.Uniform(torch.zeros((3,) if not given else (len(given[0]), 3)).double(), 1.0).to_event(1)


def with_part(**parts):
    vae = small_vae()
    for role, part in parts.items():
        setattr(vae, role, part)
    return vae


X = torch.zeros(3, 6).double()
MISTAKES = {
    "no temperatures": (lambda: pv.log_evidence(small_vae(), X, method="ais", temperatures=0), "temperatures is 0"),
    "half a temperature": (lambda: pv.log_evidence(small_vae(), X, method="bdmc", temperatures=0.5), "must be a whole"),
    "no leapfrog": (lambda: pv.log_evidence(small_vae(), X, method="ais", leapfrog=0), "leapfrog is 0"),
    "one chain": (lambda: pv.log_evidence(small_vae(), X, method="ais", num_particles=1), "num_particles is 1"),
    "no chunk": (lambda: pv.log_evidence(small_vae(), X, chunk=0), "chunk is 0"),
    "no tail": (lambda: pv.log_evidence(small_vae(), X, method="psis", num_particles=24), "needs at least 25"),
    "no such method": (
        lambda: pv.log_evidence(small_vae(), X, method="loo"),
        "method is 'loo'; it must be iw, psis, ais, ais_prior or bdmc",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_settings_out_of_their_range_are_refused(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(SettingsError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("part", "kind"), [(Coin, "discrete"), (Box, "bounded")])
@pytest.mark.parametrize("method", ["ais", "ais_prior", "bdmc"])
def test_latents_that_cannot_be_moved_are_refused(part, kind, method):
    vae = with_part(encoder=part(), prior=part())
    with pytest.raises(ModelError, match=f"the (encoder|prior) has {kind} latents .*use .* iw or psis") as caught:
        pv.log_evidence(vae, X, method=method)
    assert "\n" not in str(caught.value)
    assert pv.log_evidence(vae, X, num_particles=5).log_evidence.notnull().all(), "which can"
    mixed = with_part(prior=part())
    with pytest.raises(ModelError, match=r"the prior (has|part of it)"):
        pv.log_evidence(mixed, X, method=method)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(SettingsError, match="inference mode is on"):
        pv.log_evidence(small_vae(), X, method="ais")


def test_data_of_another_width_are_refused():
    for method in METHODS:
        with pytest.raises(ModelError, match="5"):
            pv.log_evidence(small_vae(), X[:, :5], method=method)
        with pytest.raises(DataError, match="not finite"):
            pv.log_evidence(small_vae(), X + torch.nan, method=method)


def test_a_conditional_vae_is_asked_for_its_context():
    with pytest.raises(ModelError, match="was built for 8"):
        pv.log_evidence(conditional_vae(), X.float(), method="ais")


def judged(*, bias=0.0, mcse=0.0, khat=0.0, difference=0.0, difference_se=0.0):
    """The level of an evidence with these numbers for each of 20 data, 4 of which were checked."""
    values = {"bias": bias, "mcse": mcse, "khat": khat}
    arrays = {name: ("datum", np.broadcast_to(np.asarray(value, dtype=float), 20)) for name, value in values.items()}
    checked = {
        "difference": ("checked", np.full(4, difference)),
        "second_khat": ("checked", np.zeros(4)),
        "difference_se": ("checked", np.full(4, difference_se)),
    }
    about = {"method": "psis", "estimate": "smoothing", "num_particles": 100, "second_estimate": "annealing"}
    return judge_evidence(xr.Dataset(arrays | checked, attrs=about)).level


def some(share, value, else_):
    return np.where(np.arange(20) < share * 20, value, else_)


def test_the_verdict_turns_at_the_thresholds_that_are_stated():
    """The measured bias; then shares of the data with a large error or k̂."""
    assert judged(bias=-0.09) == "fine"
    assert judged(bias=-0.11) == "doubtful"
    assert judged(bias=-0.98) == "doubtful"
    assert judged(bias=-1.02) == "bad"
    assert judged(mcse=0.29) == "fine"
    assert judged(mcse=some(0.1, 0.6, 0.0)) == "fine"
    assert judged(mcse=some(0.15, 0.6, 0.0)) == "doubtful"
    assert judged(khat=some(0.1, 0.8, 0.0)) == "fine"
    assert judged(khat=some(0.15, 0.8, 0.0)) == "doubtful"
    assert judged(khat=some(0.5, 0.8, 0.0)) == "doubtful"
    assert judged(khat=some(0.55, 0.8, 0.0)) == "bad"
    assert judged(khat=0.69) == "fine"
    assert judged(khat=np.nan) == "doubtful", "it takes 25 particles"


def test_an_evidence_that_is_given_is_averaged_with_its_error():
    vae, rows = MODEL.as_vae(), pv.data.Rows(MODEL.sample(3))
    assert known_evidence(vae, rows, torch.tensor([1.0, 2.0, 6.0])) == (3.0, 0.0, "given")
    arrays = {"log_evidence": ("datum", np.array([1.0, 2.0, 6.0])), "mcse": ("datum", np.array([0.3, 0.4, 0.0]))}
    assert known_evidence(vae, rows, xr.Dataset(arrays)) == (3.0, pytest.approx(0.5 / 3), "given")


@pytest.mark.parametrize(("spread", "level"), [(0.15, "fine"), (0.26, "doubtful")])
def test_bounds_that_meet_are_fine_only_if_their_gap_is_known_well(spread, level):
    """Four data: twice the error of the mean gap is its standard deviation, 2 spread / √3."""
    gap = xr.DataArray([-spread, spread, -spread, spread], dims="datum")
    found = xr.Dataset({"lower": xr.zeros_like(gap), "upper": gap}, attrs={"method": "bdmc"})
    assert judge_evidence(found).level == level


def test_two_starts_agree_within_their_errors_or_the_lower_is_wrong():
    """Four data: the error of the mean difference is half of each."""
    assert judged(difference=-0.09) == judged(difference=0.09) == "fine"
    assert judged(difference=-0.11) == "doubtful", "so much was missed"
    assert judged(difference=-1.01) == "bad"
    assert judged(difference=0.11) == "doubtful", "the second lies low"
    assert judged(difference=-0.15, difference_se=0.19) == "fine", "within 0.1 nats and two errors"
    assert judged(difference=-0.2, difference_se=0.19) == "doubtful"
    assert judged(difference=0.0, difference_se=0.21) == "doubtful", "too imprecise to see half of the mass"


def test_an_estimate_is_checked_against_its_own_data():
    vae, x = MODEL.as_vae(), MODEL.sample(20)
    found = quick(vae, x)
    checked = cross_check(vae, x, found, data=5, temperatures=3, seed=1)
    assert checked.sizes["checked"] == 5
    chosen = checked.checked.values.tolist()
    again = pv.log_evidence(vae, x[chosen], method="ais_prior", num_particles=32, temperatures=3, seed=1)
    assert np.array_equal(checked.second_log_evidence, again.log_evidence)
    assert np.allclose(checked.difference, found.log_evidence[chosen] - again.log_evidence.values)
    assert np.allclose(checked.difference_se, np.hypot(found.mcse[chosen], again.mcse.values))
    assert checked.drop_dims("checked").drop_attrs().equals(found.drop_attrs()), "what was found stays"
    assert cross_check(vae, x, quick(vae, x, method="ais_prior"), temperatures=3).attrs["second"] == "ais"
    with pytest.raises(DataError, match="found belongs to other data than x"):
        cross_check(vae, x[:9], found)
    with pytest.raises(SettingsError, match="found has no check from another start"):
        cross_check(vae, x, quick(vae, x, method="bdmc"))
    with pytest.raises(SettingsError, match="data is 0"):
        cross_check(vae, x, found, data=0)


def test_below_25_particles_there_is_no_k_hat():
    x = MODEL.sample(3)
    for method in ("iw", "ais", "ais_prior", "bdmc"):
        found = quick(MODEL.as_vae(diagonal=True), x, method=method, num_particles=24)
        assert found.khat.isnull().all()
        found = quick(MODEL.as_vae(diagonal=True), x, method=method, num_particles=25)
        assert found.khat.notnull().all()


@pytest.mark.parametrize("method", ["iw", "psis"])
def test_k_hat_is_that_of_the_methods_own_weights(method):
    vae, x = narrow(), MODEL.sample(3)
    found = pv.log_evidence(vae, x, method=method, num_particles=100, seed=4)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        weights = pv.elbo.log_weights(vae.model, vae.guide, x, num_particles=100)
    assert np.allclose(found.khat, pv.diagnose.psis(weights)[1])


# --- Bias ---


def test_the_jackknife_is_that_by_hand():
    """Each weight left out in turn, with K - 1 as the factor; doubled where k̂ is ⅔ and a is ½."""
    torch.manual_seed(0)
    log_weights = torch.randn(7, 3).double() * 2
    without = [log_mean(torch.cat([log_weights[:k], log_weights[k + 1 :]]))[0] for k in range(7)]
    expected = 6 * (torch.stack(without).mean(0) - log_mean(log_weights)[0])
    for khat, factor in (np.nan, 1), (0.2, 1), (2 / 3, 2), (0.9, 7 / 3):
        bias, _ = bias_of_log_mean(log_weights, torch.full((3,), khat, dtype=torch.float64))
        assert torch.allclose(bias, factor * expected, rtol=1e-9)
    one = torch.tensor([[900.0], [0.0], [0.0]]).double()
    assert bias_of_log_mean(one, torch.zeros(1).double())[0].item() == pytest.approx(-600, rel=0.01), "no infinity"


def test_the_bias_that_is_measured_is_the_bias_and_so_is_its_error():
    """Of gamma weights, whose mean of 100 is gamma too: its log has expectation ψ(200) - log 200."""
    torch.manual_seed(0)
    log_weights = torch.distributions.Gamma(torch.tensor(2.0).double(), 2.0).sample((100, 20_000)).log()
    bias, error = bias_of_log_mean(log_weights, torch.zeros(20_000).double())
    truth = (torch.digamma(torch.tensor(200.0).double()) - np.log(200.0)).item()
    assert bias.mean().item() == pytest.approx(truth, rel=0.02)
    assert error.mean().item() == pytest.approx(bias.std().item(), rel=0.25)


def test_the_bias_of_smoothing_is_added():
    vae, x = narrow(), MODEL.sample(30)
    plain, smooth = (pv.log_evidence(vae, x, method=method, num_particles=200) for method in ("iw", "psis"))
    apart = smooth.log_evidence - plain.log_evidence
    assert np.allclose(smooth.bias - plain.bias, apart)
    assert np.allclose(smooth.bias_se, np.hypot(plain.bias_se, apart))
    assert float(smooth.bias.mean()) < float(plain.bias.mean()) < 0, "smoothing has more of it"


def test_of_one_datum_no_error_of_the_gap_is_stated():
    found = quick(narrow(), MODEL.sample(1), method="bdmc")
    assert "nan" not in judge_evidence(found).why
    assert "±" in judge_evidence(quick(narrow(), MODEL.sample(2), method="bdmc")).why


def test_the_standard_error_is_that_by_hand():
    """Of weights 1, 2 and 6: their standard deviation √7, over their mean 3 and √3."""
    value, error = log_mean(torch.tensor([[1.0], [2.0], [6.0]]).double().log())
    assert value.item() == pytest.approx(np.log(3))
    assert error.item() == pytest.approx(np.sqrt(7) / 3 / np.sqrt(3))


def test_the_error_of_what_is_given_is_that_of_the_mean():
    """Of three data with errors 1, 2 and 2: √9 / 3."""
    x = MODEL.sample(3)
    given = quick(MODEL.as_vae(), x)
    given = given.assign(mcse=given.mcse.copy(data=[1.0, 2.0, 2.0]))
    assert known_evidence(MODEL.as_vae(), Rows(x), given)[1] == pytest.approx(1.0)


def test_the_middle_of_the_bounds_and_its_error_are_those_by_hand():
    """The error joins half the gap and half of each bound's error."""
    found = quick(narrow(), MODEL.sample(3), method="bdmc")
    assert np.allclose(found.log_evidence, (found.lower + found.upper) / 2, atol=1e-12)
    parts = (found.upper - found.lower) ** 2 + found.lower_mcse**2 + found.upper_mcse_given_z**2
    assert np.allclose(found.mcse, np.sqrt(parts) / 2, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "number"), [("iw", 500), ("psis", 500), ("ais", 32), ("ais_prior", 32), ("bdmc", 32)]
)
def test_how_many_particles_there_are_where_none_are_asked_for(method, number):
    found = pv.log_evidence(MODEL.as_vae(), MODEL.sample(2), method=method, temperatures=1, leapfrog=1)
    assert found.num_particles == number
