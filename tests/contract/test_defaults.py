"""Numbers that hold where a user gives none: to change one changes users' results, so it is done here too."""

import inspect

import pytest

import pyro_vae as pv
from pyro_vae.elbo.per_datum import per_datum_elbo

ROOMS = [pv, pv.elbo, pv.priors, pv.likelihoods, pv.posteriors, pv.diagnose, pv.evidence, pv.callbacks, pv.nn, pv.data]
ROOMS += [pv.sklearn]


def defaults() -> dict[str, dict[str, object]]:
    """The numbers and words in the signatures of all that is exported."""
    found, seen = {}, set()
    for room in ROOMS:
        own = [name for name in dir(room) if not name.startswith("_")]
        for name in getattr(room, "__all__", own):
            member = getattr(room, name)
            if not callable(member) or not member.__module__.startswith("pyro_vae") or name.endswith("Error"):
                continue
            if member in seen:  # exported by two rooms
                continue
            seen.add(member)
            given = inspect.signature(member).parameters.values()
            plain = {p.name: p.default for p in given if isinstance(p.default, (int, float, str))}
            if plain:
                found[f"{room.__name__.removeprefix('pyro_vae.')}.{name}"] = plain
    return found


DEFAULTS: dict[str, dict[str, object]] = {
    "pyro_vae.Checkpoints": {"minutes": 5.0, "keep": 3},
    "pyro_vae.CompiledSVI": {"backend": "inductor", "precision": "float32"},
    "pyro_vae.Fit": {"interrupted": False},
    "pyro_vae.check": {"gold": 2, "draws": 100, "budget": 180.0, "seed": 0, "progress": False},
    "pyro_vae.classify": {"num_particles": 100, "seed": 0, "chunk": 4194304},
    "pyro_vae.compare_elbos": {"draws": 100, "seed": 0, "progress": False},
    "pyro_vae.compare_models": {"method": "iw", "temperatures": 100, "leapfrog": 5, "seed": 0, "progress": False},
    "pyro_vae.encode": {"draws": 1000, "seed": 0, "chunk": 4194304, "progress": False},
    "pyro_vae.fit": {
        "epochs": 100,
        "device": "auto",
        "seed": 0,
        "progress": True,
        "engine": "auto",
        "precision": "float32",
        "devices": 1,
    },
    "pyro_vae.impute": {"draws": 1000, "imputations": 0, "seed": 0, "chunk": 4194304, "progress": False},
    "pyro_vae.inference_gaps": {
        "steps": 400,
        "rate": 0.2,
        "particles": 16,
        "num_particles": 1000,
        "chunk": 4194304,
        "seed": 0,
        "progress": False,
    },
    "pyro_vae.interpolate": {"steps": 11, "draws": 100, "seed": 0},
    "pyro_vae.log_evidence": {
        "method": "iw",
        "temperatures": 100,
        "leapfrog": 5,
        "chunk": 1048576,
        "seed": 0,
        "progress": False,
    },
    "pyro_vae.as_table": {"decode": True},
    "pyro_vae.predict": {"draws": 100, "seed": 0, "chunk": 4194304, "progress": False},
    "pyro_vae.reconstruct": {"draws": 100, "seed": 0, "chunk": 4194304, "progress": False},
    "pyro_vae.sample": {"seed": 0, "chunk": 4194304, "progress": False},
    "pyro_vae.score": {
        "method": "iw",
        "temperatures": 100,
        "leapfrog": 5,
        "draws": 100,
        "chunk": 1048576,
        "seed": 0,
        "progress": False,
    },
    "pyro_vae.to_datatree": {"draws": 100, "prior_draws": 100, "seed": 0, "posterior": "guide", "chunk": 4194304},
    "pyro_vae.traverse": {"steps": 11, "draws": 100, "seed": 0},
    "elbo.CIWAE": {"num_particles": 2, "mix": 0.5},
    "elbo.ELBO": {"num_particles": 1},
    "elbo.IWAE": {"num_particles": 1},
    "elbo.IWAESTL": {"num_particles": 1},
    "elbo.MIWAE": {"num_particles": 4, "groups": 2},
    "elbo.PIWAE": {"num_particles": 4, "groups": 2},
    "elbo.STL": {"num_particles": 1},
    "elbo.AnalyticKL": {"num_particles": 1, "strict": True},
    "elbo.DReG": {"num_particles": 1},
    "elbo.Estimator": {"num_particles": 1},
    "elbo.Renyi": {"num_particles": 2, "alpha": 0.5},
    "elbo.TCVAE": {"beta": 6.0},
    "elbo.Beta": {"beta": 1.0},
    "elbo.Cyclical": {"cycles": 4, "ramp": 0.5, "start": 0.0, "end": 1.0},
    "elbo.FreeBits": {"nats": 0.5},
    "elbo.InfoVAE": {"alpha": 0.0, "weight": 10.0},
    "elbo.Linear": {"start": 0.0, "end": 1.0},
    "elbo.VIMCO": {"num_particles": 2},
    "elbo.ScoreFunction": {"num_particles": 2},
    "elbo.Thermodynamic": {"num_particles": 8, "partitions": 5, "first": 0.03},
    "elbo.HandDerivedELBO": {"num_particles": 1, "vectorize_particles": False},
    "elbo.M2": {"num_particles": 1, "weight": 1.0},
    "elbo.Weights": {"temperature": 1.0, "given_globals": False},
    "elbo.log_weights": {"num_particles": 1, "path_gradient": False},
    "elbo.note_objective": {"num_particles": 1},
    "priors.GumbelSoftmax": {"temperature": 0.5},
    "priors.GaussianMixture": {"components": 10},
    "priors.StudentT": {"df": 5.0},
    "priors.VampPrior": {"components": 50},
    "priors.rows_of": {"source": "data"},
    "likelihoods.DiscretizedLogisticMixture": {"components": 5, "levels": 256},
    "likelihoods.HeteroscedasticNormal": {"min_scale": 0.0},
    "likelihoods.Laplace": {"scale": 1.0, "learn_scale": False},
    "likelihoods.Normal": {"scale": 1.0, "learn_scale": False},
    "likelihoods.StudentT": {"df": 4.0, "scale": 1.0, "learn_scale": False},
    "posteriors.GumbelSoftmax": {"temperature": 0.5},
    "posteriors.LowRankNormal": {"rank": 1},
    "posteriors.Refined": {"steps": 5, "rate": 0.5, "particles": 8},
    "diagnose.CheckInput": {"gold": 0, "draws": 100, "seed": 0},
    "diagnose.Diagnostic": {"needs": "", "fault": ""},
    "diagnose.Finding": {"next": ""},
    "diagnose.Iterates": {"data": 256, "num_particles": 16, "weights": 100, "seed": 0},
    "diagnose.collapse": {"draws": 4, "seed": 0, "chunk": 262144},
    "diagnose.converged": {"tail": 0.5, "nats": 0.1},
    "diagnose.overfitting": {"nats": 0.1},
    "diagnose.khat": {"num_particles": 1000, "seed": 0, "chunk": 1048576},
    "diagnose.nuts": {"chains": 4, "warmup": 200, "draws": 500, "seed": 0, "progress": False},
    "diagnose.predictive_check": {"draws": 500, "seed": 0, "chunk": 4194304},
    "diagnose.prior_check": {"draws": 500, "seed": 0, "chunk": 4194304},
    "diagnose.reliability": {"bins": 10, "seed": 0},
    "diagnose.sbc": {"simulations": 500, "draws": 99, "seed": 0, "chunk": 1048576},
    "evidence.cross_check": {
        "data": 16,
        "num_particles": 32,
        "temperatures": 100,
        "leapfrog": 5,
        "seed": 0,
        "progress": False,
    },
    "evidence.baseline": {"num_particles": 500, "seed": 0},
    "evidence.check_where_possible": {"seed": 0},
    "evidence.enumerated_log_marginal": {"chunk": 4194304},
    "train.callbacks.EMA": {"decay": 0.999, "every": 16, "restore": True},
    "train.callbacks.SWA": {"restore": True},
    "train.callbacks.EarlyStopping": {"patience": 10, "steps": 0, "errors": 1.0, "restore": True},
    "train.callbacks.Explosion": {"spreads": 3.0},
    "train.callbacks.RollBack": {"factor": 0.5, "times": 3},
    "train.callbacks.Schedule": {"every": 1},
    "nn.conv_decoder": {"outputs_per_feature": 1},
    "nn.conv_encoder": {"context": 0},
    "data.Data": {"source": "data", "summary": ""},
    "data.as_tensor": {"source": "data"},
    "data.mask_nan": {"source": "data"},
    "data.rows_for": {"source": "data"},
    "data.split": {"fraction": 0.2, "seed": 0},
    "data.stream": {"nan_is_missing": False, "window_bytes": 134217728},
    "use.sklearn.VAETransformer": {
        "n_components": 8,
        "learning_rate": 0.001,
        "standardize": True,
        "num_particles": 500,
        "device": "auto",
        "verbose": False,
    },
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_table(name):
    assert defaults()[name] == DEFAULTS[name]


def test_the_table_holds_all():
    assert set(defaults()) == set(DEFAULTS)


def test_the_elbo_of_each_datum_takes_one_draw():
    assert inspect.signature(per_datum_elbo).parameters["num_particles"].default == 1
