"""Rows are the user's rows: every function that names data names them by the labels of a table's index."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data import Rows
from pyro_vae.data.fingerprint import Trained, row_hashes
from pyro_vae.diagnose import inference_gaps, judge_khat, judge_nuts, khat, nuts, predictive_check
from pyro_vae.evidence import baseline, check_where_possible


@pytest.fixture(scope="module")
def labelled():
    """A VAE whose guide is off, and the same rows as a table with an index, as data with labels, and without any."""
    torch.manual_seed(0)
    exact = pv.exact.LinearGaussian(torch.randn(6, 2).double(), torch.zeros(6).double(), 0.5)
    vae, x = exact.as_vae(), exact.sample(60).float().double()
    with torch.no_grad():
        vae.encoder.scale_tril.mul_(0.5)
    names = [f"patient {i}" for i in range(12, 0, -1)]
    table = pd.DataFrame(x[:12].numpy(), columns=[f"c{j}" for j in range(x.shape[1])], index=names)
    return vae, {"a table": table, "data": pv.data.Data(x[:12], row_labels=np.array(names))}, x[:12], np.array(names)


NAMED = {
    "khat": lambda vae, x: khat(vae, x, num_particles=50).khat,
    "log_evidence": lambda vae, x: pv.log_evidence(vae, x, num_particles=30).log_evidence,
    "cross_check": lambda vae, x: check_where_possible(vae, x, pv.log_evidence(vae, x, num_particles=30)).difference,
    "baseline": lambda vae, x: baseline(vae, x, num_particles=30).log_evidence,
    "gaps": lambda vae, x: inference_gaps(vae, x, steps=2, num_particles=50).gap,
    "nuts": lambda vae, x: nuts(vae, x, data=[7, 2], chains=2, warmup=20, draws=20).wasserstein[:, 0],
    "datatree": lambda vae, x: pv.to_datatree(vae, x, draws=2, prior_draws=2)["observed_data"].x[:, 0],
}


@pytest.mark.parametrize("name", NAMED)
def test_every_function_names_the_rows_as_the_user_does(name, labelled):
    vae, given, x, names = labelled
    plain = NAMED[name](vae, x)
    chosen = plain.coords[plain.dims[0]].values
    assert set(chosen) <= set(range(12)), "without labels rows are counted from 0"
    for how in given.values():
        found = NAMED[name](vae, how)
        assert found.coords[found.dims[0]].values.tolist() == names[chosen].tolist()
        assert np.array_equal(found.values, plain.values), "labels change no number"


def test_findings_and_errors_of_direct_calls_name_the_row(labelled):
    vae, given, x, names = labelled
    found = khat(vae, given["a table"], num_particles=50)
    assert f"the worst is datum {names[found.khat.values.argmax()]} with" in judge_khat(found).why
    far = nuts(vae, given["data"], data=[3], chains=2, warmup=20, draws=20)
    assert "of datum patient 9, by " in judge_nuts(far).why
    huge = given["a table"].copy()
    huge.loc["patient 5"] = 1e30
    with pytest.raises(pv.errors.ModelError, match="the importance weights of datum patient 5 are all 0"):
        khat(copy.deepcopy(vae).float(), huge, num_particles=50)
    vae = copy.deepcopy(vae)
    vae.trained_on = Trained.on(row_hashes(Rows(x[3:])))
    assert "the first is row patient 9" in pv.log_evidence(vae, given["data"], num_particles=30).trained_on
    with pytest.raises(pv.errors.DataError, match="the first is row patient 9"):
        pv.compare_models({"a": vae, "b": vae}, given["data"])


def test_figures_name_the_row(labelled):
    vae, given, _, names = labelled
    found = khat(vae, given["data"], num_particles=50)
    worst = names[np.argsort(-found.khat.values, kind="stable")]
    texts = [text.get_text() for axes in pv.plots.khat(found).axes for text in axes.get_legend().get_texts()]
    assert f"datum {worst[0]}, the worst" in texts
    assert f"the worst data: {', '.join(worst[:5])}, …" in texts


def test_labels_that_are_not_one_per_row_are_refused(labelled):
    vae, _, x, names = labelled
    with pytest.raises(pv.errors.DataError, match="there are 11 row labels for 12 rows; give one for each"):
        khat(vae, pv.data.Data(x, row_labels=names[:11]), num_particles=50)


def test_predictions_name_the_columns_of_a_table(labelled):
    vae, given, _, _ = labelled
    statistics = predictive_check(vae, {c: v.tolist() for c, v in given["a table"].items()}, draws=20).statistic.values
    assert {str(s).rpartition(" ")[2] for s in statistics if " of " in str(s)} <= set(given["a table"].columns)
