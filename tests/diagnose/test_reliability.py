"""Confidence against accuracy, of classifiers whose calibration is known."""

import numpy as np
import pytest

import pyro_vae as pv
from pyro_vae.diagnose import judge_reliability, reliability
from pyro_vae.errors import DataError, SettingsError


def simulated(seed: int, n: int = 300, sharpen: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of three classes and labels drawn from them; then the probabilities are sharpened."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet([0.7, 0.7, 0.7], n)
    labels = (rng.random((n, 1)) > share.cumsum(1)).sum(1)
    share = share**sharpen
    return share / share.sum(1, keepdims=True), labels


def test_the_numbers_are_those_by_hand():
    share = [[0.95, 0.05], [0.92, 0.08], [0.45, 0.55], [0.42, 0.58]]
    found = reliability(share, [0, 1, 1, 1], bins=10)
    assert found["count"].values.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
    np.testing.assert_allclose(found.accuracy.values[[5, 9]], [1.0, 0.5])
    np.testing.assert_allclose(found.confidence.values[[5, 9]], [0.565, 0.935])
    assert float(found.ece) == pytest.approx(0.5 * 0.435 + 0.5 * 0.435)
    assert float(found.accuracy_of_all) == 0.75
    assert np.isnan(found.accuracy.values[0])


def test_p_is_uniform_for_a_calibrated_classifier_and_small_for_one_too_sure():
    p = np.array([float(reliability(*simulated(seed)).p_value) for seed in range(60)])
    assert abs(p.mean() - 0.5) < 5 / (12 * 60) ** 0.5
    assert (p < 0.05).mean() < 0.2
    sure = reliability(*simulated(0, sharpen=3.0))
    assert float(sure.p_value) < 0.005
    assert judge_reliability(sure).level != "fine"
    assert float(sure.ece) > 3 * float(sure.ece_calibrated)
    assert (sure.accuracy < sure.confidence + 2 * sure.accuracy_se)[5:].all()


def test_the_errors_are_those_of_repeated_data():
    many = [reliability(*simulated(seed, sharpen=2.0)) for seed in range(60)]
    for name in ("ece", "accuracy_of_all"):
        spread = np.std([float(found[name]) for found in many])
        claimed = np.mean([float(found[f"{name}_se"]) for found in many])
        assert 0.7 < claimed / spread < 1.4


def test_a_reliability_diagram_shows_the_bins():
    figure = pv.plots.reliability(reliability(*simulated(1)))
    upper, lower = figure.axes
    assert "ECE 0.0" in figure.get_suptitle()
    assert upper.get_ylabel() == "share of predictions that are right"
    assert sum(bar.get_height() for bar in lower.patches) == 300


def test_what_are_no_probabilities_or_labels_is_refused():
    with pytest.raises(DataError, match="is not a table of class probabilities; pass shape"):
        reliability([[0.9, 0.3]], [0])
    with pytest.raises(DataError, match=r"labels have shape \(2,\) for 1 data; pass one label for each datum"):
        reliability([[0.9, 0.1]], [0, 1])
    with pytest.raises(DataError, match="labels must be integers from 0 to 1; leave out rows whose class is unknown"):
        reliability([[0.9, 0.1]], [-1])
    with pytest.raises(SettingsError, match="bins is 1"):
        reliability([[0.9, 0.1]], [0], bins=1)
