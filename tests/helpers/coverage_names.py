"""Which standard errors the public functions return, and which of them are not in the table, each with the reason."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pyro_vae as pv
from helpers.checks import linear_gaussian, small_vae
from pyro_vae.compare import swap

ERROR = re.compile(r"(^|.*_)(se|mcse|dse)(_given_z)?$|.*dse$")

ALIKE = "made like elbo_se, by one formula for all variables"
PAIRED = "a mean over draws of paired differences, made like gap_se by the same function"
GRADIENT = ["norm", "variance", "snr", "bias"]

EXCEPTIONS: dict[tuple[str, str], str] = {
    **{("over_seeds", f"gradient_{name}_se"): ALIKE for name in GRADIENT},
    **{("over_seeds", f"{name}_se"): ALIKE for name in ("bias", "seconds", "efficiency", "speedup")},
    ("over_seeds", "seed_efficiency_se"): "efficiency_se of each seed, unchanged",
    ("swap.rank", "mcse"): "the root mean square of log_evidence's mcse, no error of the ranking",
    ("score", "log_px_mcse"): "mcse of log_evidence, unchanged",
    **{("score", f"{name}_mcse"): "of a mean of draws; tests/use/test_score.py" for name in ("elbo", "reconstruction")},
    ("diagnose.prior_check", "p_value_se"): "made like predictive_check's, by the same function",
    ("over_seeds", "elbo_alignment_se"): ALIKE,
    ("log_evidence", "bias_se"): "judged with the interval it is part of, by k̂, in docs/evidence.md",
    ("diagnose.converged", "rise_se"): "slope_se times a constant",
    ("diagnose.converged", "fall_se"): "that of diagnose.overfitting",
    ("diagnose.overfitting", "fall_se"): "at least the error of a mean of dependent differences, each as below_best_se",
    **{
        (function, name): "a mean over data of paired differences, made like dse of compare_models"
        for function, names in {
            "fit": ["validation_below_best_se"],
            "diagnose.overfitting": ["below_best_se", "kept_fall_se"],
            "evidence.baseline": ["difference_se", "elbo_difference_se"],
        }.items()
        for name in names
    },
    **{
        ("inference_gaps", f"{name}_se"): PAIRED
        for name in ("richer_elbo", "richer_gap", "optimization_error", "richer_optimization_error")
    },
}


METHODS = ("iw", "psis", "ais", "bdmc")


def calls() -> dict[str, Callable[[], Any]]:
    """Each public function that returns errors, on a small VAE, by the name that the table gives it."""
    model = linear_gaussian(3, 1)
    vae, x, torch_vae = model.as_vae(diagonal=True), model.sample(4), small_vae(3, 1)
    compared = partial(pv.compare_elbos, vae, x, draws=6)
    evidence = [partial(pv.log_evidence, vae, x, method=m, temperatures=2, num_particles=30) for m in METHODS]
    settings = {"epochs": 20, "progress": False, "device": "cpu", "engine": "eager"}
    fitted = pv.fit(torch_vae, x, validation_data=x, **settings)
    found: dict[str, Callable[[], Any]] = {
        "compare_elbos": compared,
        "over_seeds": lambda: pv.over_seeds([compared(seed=seed) for seed in (0, 1)]),
        "compare_models": lambda: pv.compare_models({"a": vae, "b": model.as_vae()}, x, num_particles=5),
        "swap.rank": lambda: swap.rank({"a": vae, "b": model.as_vae()}, x, num_particles=5),
        "fit": lambda: fitted.history,
        "score": lambda: pv.score(vae, x, num_particles=5, draws=5),
        "diagnose.converged": lambda: pv.diagnose.converged(fitted),
        "diagnose.overfitting": lambda: pv.diagnose.overfitting(fitted.history),
        "evidence.baseline": lambda: pv.evidence.baseline(vae, x, num_particles=5),
        "diagnose.sbc": lambda: pv.diagnose.sbc(vae, simulations=20, draws=9),
        "diagnose.predictive_check": lambda: pv.diagnose.predictive_check(vae, x, draws=20),
        "diagnose.prior_check": lambda: pv.diagnose.prior_check(vae, x, draws=20),
        "diagnose.khat": lambda: pv.diagnose.khat(vae, x, num_particles=30),
        "diagnose.collapse": lambda: pv.diagnose.collapse(vae, x),
        "diagnose.nuts": lambda: pv.diagnose.nuts(vae, x, data=1, chains=2, warmup=20, draws=20),
        "inference_gaps": lambda: pv.inference_gaps(vae, x, steps=2, num_particles=50),
    }
    return found | {f"log_evidence {m}": one for m, one in zip(METHODS, evidence, strict=True)}


def returned() -> set[tuple[str, str]]:
    """The names of errors that each function returns."""
    found = {name.split()[0]: set() for name in calls()}
    for name, call in calls().items():
        found[name.split()[0]] |= {str(one) for one in call() if ERROR.match(str(one))}
    return {(function, name) for function, names in found.items() for name in names}


def tabled(keys: Iterable[tuple[str, str, str]]) -> set[tuple[str, str]]:
    """Functions and names of the table; a quantity may begin with the estimator that it is of."""
    return {(function, quantity.rpartition(": ")[2]) for function, quantity, _ in keys}
