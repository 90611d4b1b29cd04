"""Which tests must see the bugs of which module, and which survivors are no bugs."""

from pathlib import Path

_ELBO = (
    "test_oracle_elbos test_estimators test_objectives test_elbo test_nesting test_gradients test_other_guides "
    "test_given test_random_networks"
)
_EVIDENCE = (
    "test_evidence test_missed_modes test_ais test_khat test_compare_models test_evidence_coverage test_coverage"
)
_LIKELIHOODS = (
    "test_oracle_likelihoods test_likelihoods test_members test_missing_and_context test_limits test_standardize"
)
_COMPARE = "test_compare test_recommend test_seeds test_coverage"

GROUPS: dict[str, str] = {
    "pyro_vae.elbo": _ELBO,
    "pyro_vae.elbo.bounds": f"{_ELBO} test_recommend",
    "pyro_vae.elbo.estimator": f"{_ELBO} test_recommend",
    "pyro_vae.elbo.importance_weighted": f"{_ELBO} test_recommend",
    "pyro_vae.elbo.hand_derived": "test_oracle_elbos test_elbo test_note",
    "pyro_vae.elbo.kl": "test_oracle_densities test_kl test_elbo",
    "pyro_vae.evidence": _EVIDENCE,
    "pyro_vae.diagnose.convergence": "test_converged test_coverage",
    "pyro_vae.diagnose.iterates": "test_converged test_coverage",
    "pyro_vae.diagnose.gaps": "test_gaps test_coverage",
    "pyro_vae.diagnose.free": "test_gaps test_coverage",
    "pyro_vae.diagnose.latents": "test_collapse test_coverage",
    "pyro_vae.diagnose.importance": "test_khat",
    "pyro_vae.evidence.psis": "test_khat test_evidence",
    "pyro_vae.evidence.baseline": "test_baseline",
    "pyro_vae.evidence.atoms": "test_atoms",
    "pyro_vae.evidence.estimate": f"test_row_names {_EVIDENCE}",
    "pyro_vae.evidence.exact": "test_exact test_standardize",
    "pyro_vae.diagnose.datatree": "test_predict",
    "pyro_vae.diagnose.describe": "test_fitting_parts",
    "pyro_vae.core.format": "test_format",
    "pyro_vae.core.threads": "test_threads",
    "pyro_vae.diagnose.predictive": "test_predictive_check",
    "pyro_vae.compare.models_table": "test_reading",
    "pyro_vae.elbo.given": "test_fit_arguments",
    "pyro_vae.train.overfitting": "test_overfitting",
    "pyro_vae.train.callbacks.stopping": "test_overfitting test_callbacks",
    "pyro_vae.cli.kept_jobs": "test_kept_jobs",
    "pyro_vae.train.trial": "test_single_rows test_limits",
    "pyro_vae.diagnose.calibration": "test_sbc test_coverage",
    "pyro_vae.diagnose.gold_standard": "test_nuts",
    "pyro_vae.diagnose": "test_sbc test_predictive_check test_check test_khat",
    "pyro_vae.compare": _COMPARE,
    "pyro_vae.compare.held_out": "test_compare_models test_swap test_atoms",
    "pyro_vae.compare.models": "test_compare_models",
    "pyro_vae.compare.swap": "test_swap test_swap_command",
    "pyro_vae.compare.pair": "test_compare test_seeds",
    "pyro_vae.data.repeats": "test_compare_models",
    "pyro_vae.likelihoods": _LIKELIHOODS,
    "pyro_vae.train.compiled.optimizers": "test_engine_optimizers test_engine_programs test_engine",
}
"""Modules (or packages, for all modules within that have no row of their own) and the test files that look at them."""

REASONS: dict[tuple[str, str, str], str] = {
    ("pyro_vae.elbo.per_datum", "4096", "8193"): "a number of rows at a time changes memory and no result",
    (
        "pyro_vae.elbo.per_datum",
        "num_particles * min(chunk, len(every))",
        "num_particles / min(chunk, len(every))",
    ): "by how many threads it is computed changes the time and no result",
    ("pyro_vae.evidence.baseline", "True", "False"): "zip's own check of numbers that come from one table",
    ("pyro_vae.train.callbacks.stopping", "0.0", "1.0"): "the first epoch's growth is infinite, above any error",
    ("pyro_vae.core.threads", "32000000", "64000001"): "from which size on a step is large changes time and no result",
    ("pyro_vae.train.trial", "2", "3"): "so many rows are tried as are more than one",
    ("pyro_vae.core.format", "False", "True"): "without colours a terminal is written to as a file is",
    ("pyro_vae.compare.models_table", "0", "1"): "how much room the columns of a printed table have",
    ("pyro_vae.compare.models_table", "True", "False"): "how the columns of a printed table wrap",
    ("pyro_vae.evidence.generative", "16", "33"): "a longer hash tells the same models apart",
    ("pyro_vae.evidence.kinds", "0", "1"): "which seed it is does not matter: the kind of a distribution is read",
    ("pyro_vae.compare.table", "False", "True"): "how much room the columns of a printed table have",
    (
        "pyro_vae.evidence.generative",
        "found[name].log_evidence.sum()",
        "found[name].log_evidence.mean()",
    ): "sums and means over the same data rank alike",
    ("pyro_vae.compare.pair", "1", "2"): "for how many particles threads are chosen changes the time and no result",
    ("pyro_vae.compare.measure", "0", "1"): "which seed it is does not matter: only what is refused is read",
    ("pyro_vae.diagnose.describe", "1", "2"): "so many rows and contexts are shown to the parts as are at least one",
    ("pyro_vae.diagnose", "given.each_datum * PARTICLES", "given.each_datum / PARTICLES"): "an estimate of a time",
    ("pyro_vae.diagnose", "5", "6"): "an estimate of a time",
    ("pyro_vae.diagnose.datatree", "1", "2"): "how many rows at a time changes memory and no result",
    ("pyro_vae.diagnose._ecdf", "1", "2"): "from where on the union bound stands in for a simulation: both are valid",
    ("pyro_vae.diagnose.convergence", "True", "False"): "zip's own check of lists that are made side by side",
    ("pyro_vae.evidence.kinds", "True", "False"): "zip's own check of lengths that compare_models has compared before",
    (
        "pyro_vae.evidence.psis",
        "CHUNK // (50 * tail_length(values.shape[1]))",
        "CHUNK * (50 * tail_length(values.shape[1]))",
    ): "how many rows at a time changes memory and no result",
    (
        "pyro_vae.diagnose.datatree",
        "chunk // (proposals * rows.x[0].numel())",
        "chunk * (proposals * rows.x[0].numel())",
    ): "how many rows at a time changes memory and no result",
    ("pyro_vae.evidence.known", "values.detach()", "values"): "nobody gives an evidence that needs a gradient",
    ("pyro_vae.diagnose.check", "False", "True"): "how a line is coloured on a terminal",
    (
        "pyro_vae.diagnose.check",
        "log_weights(vae.model, vae.guide, *part.arguments(), num_particles=PILOT).sum()",
        "log_weights(vae.model, vae.guide, *part.arguments(), num_particles=PILOT).mean()",
    ): "the result is not used, only its time is measured",
    ("pyro_vae.diagnose", "50000", "100001"): "an estimate of a time",
    ("pyro_vae.diagnose", "given.each_datum * 5", "given.each_datum / 5"): "an estimate of a time",
    ("pyro_vae.diagnose.gaps", "2 ** 32", "2 * 32"): "which seed it is does not matter, as long as all members have it",
    ("pyro_vae.diagnose.gold_standard", "1", "2"): "of the draws asked for to try a gradient, one is used",
    (
        "pyro_vae.diagnose.gold_standard",
        "(q[chain, torch.randint(len(q[chain]), ()), datum] - loc) / scale",
        "(q[chain, torch.randint(len(q[chain]), ()), datum] - loc) * scale",
    ): "where a chain starts, which its warmup leaves",
    ("pyro_vae.diagnose.free", "-1", "1"): "parameters have two dimensions: the last is number 1",
    ("pyro_vae.diagnose.latents", "True", "False"): "zip's own check of lists that are made side by side",
    (
        "pyro_vae.diagnose.calibration",
        "(torch.rand(equal.shape, device=equal.device) * (equal + 1)).long().clamp(max=draws)",
        "(torch.rand(equal.shape, device=equal.device) * (equal + 1)).long()",
    ): "float32 rounds one draw in some ten million up to the next whole number",
    ("pyro_vae.elbo.schedules", "self.step.device != device", "self.step.device == device"): (
        "on a CPU there is one device; test_devices sees it on a GPU"
    ),
}
"""Survivors that no test can see, or need not: (module, before, after) and the reason."""


def tests(root: Path, module: str) -> list[str]:
    """The test files of a module, in the order in which they are run."""
    row = max((name for name in GROUPS if f"{module}.".startswith(f"{name}.")), key=len)
    found = {path.stem: str(path) for path in sorted((root / "tests").rglob("test_*.py"))}
    return [found[stem] for stem in ("test_defaults", *GROUPS[row].split())]


def sources(root: Path) -> dict[str, Path]:
    """Every module that bugs are planted into, by its dotted name."""
    found: dict[str, Path] = {}
    for name in GROUPS:
        path = root / name.replace(".", "/")
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
        for file in files:
            module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            found[module] = file
    return found
