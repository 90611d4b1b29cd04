"""Diagnostics of a trained VAE; each returns a labelled data set, and a finding in words."""

from pyro_vae.core.finding import Finding
from pyro_vae.diagnose.calibration import judge_reconstructions, judge_sbc, sbc
from pyro_vae.diagnose.convergence import converged, judge_converged
from pyro_vae.diagnose.diagnostic import EPOCHS, PARTICLES, CheckInput, Diagnostic
from pyro_vae.diagnose.gaps import inference_gaps, judge_gaps
from pyro_vae.diagnose.gold_standard import judge_nuts, nuts
from pyro_vae.diagnose.importance import judge_khat, khat
from pyro_vae.diagnose.iterates import Iterates
from pyro_vae.diagnose.latents import collapse, judge_collapse
from pyro_vae.diagnose.predictive import STATISTICS, judge_predictive_check, predictive_check, prior_check
from pyro_vae.diagnose.reliability import judge_reliability, reliability
from pyro_vae.evidence import baseline, check_where_possible, judge_baseline, judge_evidence
from pyro_vae.evidence.psis import psis
from pyro_vae.train.overfitting import judge_overfitting, overfitting

__all__ = [
    "DIAGNOSTICS",
    "STATISTICS",
    "CheckInput",
    "Diagnostic",
    "Finding",
    "Iterates",
    "collapse",
    "converged",
    "inference_gaps",
    "judge_collapse",
    "judge_converged",
    "judge_gaps",
    "judge_khat",
    "judge_nuts",
    "judge_overfitting",
    "judge_predictive_check",
    "judge_reconstructions",
    "judge_reliability",
    "judge_sbc",
    "khat",
    "nuts",
    "overfitting",
    "predictive_check",
    "prior_check",
    "psis",
    "reliability",
    "sbc",
]

SIMULATIONS = 500
"""The number of simulations for calibration."""
CHAINS, WARMUP, DRAWS = 4, 200, 250
"""The number of chains of NUTS for each datum, and the transitions of each."""
LEAPFROGS, GRADIENT = 8, 3e-3
"""The approximate number of gradients per transition of NUTS, and the seconds per gradient, mostly overhead."""
SECOND_CHAINS, SECOND_GRADIENTS = 16 * 32, 480
"""The number of chains of the second estimate of the evidence, and the gradients of each."""
FEWEST_FITTED = 20
"""The fewest held-out data that baselines can be fitted to, if the training data are not given."""
GAPS = 50_000
"""The evaluations to optimize q for each datum, where a gradient counts as three."""

Q_IS_OFF = "q(z|x) differs from p(z|x)"
DATA_DIFFER = "the model generates data that differ from these"
"""Faults that several diagnostics detect."""

# In the order of importance for the time they take: diagnostics on the user's data before those on simulated data.
DIAGNOSTICS = (
    Diagnostic(
        name="khat",
        about="Importance weights of q",
        run=lambda given: khat(given.vae, given.x, num_particles=PARTICLES, seed=given.seed),
        judge=judge_khat,
        seconds=lambda given: given.each_datum * PARTICLES,
        fault=Q_IS_OFF,
    ),
    Diagnostic(
        name="evidence",
        about="The evidence of held-out data",
        run=lambda given: check_where_possible(given.vae, given.x, given.log_evidence, seed=given.seed),
        judge=judge_evidence,
        seconds=lambda given: (
            given.each_datum * PARTICLES + SECOND_GRADIENTS * max(GRADIENT / 2, SECOND_CHAINS * given.evaluation)
        ),
    ),
    Diagnostic(
        name="baseline",
        about="Comparison with simple models",
        run=lambda given: baseline(given.vae, given.x, train=given.train, evidence=given.log_evidence, seed=given.seed),
        judge=judge_baseline,
        seconds=lambda given: given.each_datum * PARTICLES,
        applies=lambda given: given.train is not None or len(given.rows) >= FEWEST_FITTED,
        needs=f"the training data (train=) or {FEWEST_FITTED} held-out data",
    ),
    Diagnostic(
        name="reconstructions",
        about="Coverage on reconstructions",
        run=lambda given: sbc(given.vae, simulations=SIMULATIONS, around=given.x, seed=given.seed),
        judge=judge_reconstructions,
        seconds=lambda given: given.evaluation * SIMULATIONS * 200,
        fault=Q_IS_OFF,
    ),
    Diagnostic(
        name="predictive_check",
        about="Posterior predictive check",
        run=lambda given: predictive_check(given.vae, given.x, draws=5 * given.draws, seed=given.seed),
        judge=judge_predictive_check,
        seconds=lambda given: given.each_datum * 5 * given.draws,
        fault=DATA_DIFFER,
    ),
    Diagnostic(
        name="prior_check",
        about="Prior predictive check",
        run=lambda given: prior_check(given.vae, given.x, draws=5 * given.draws, seed=given.seed),
        judge=judge_predictive_check,
        seconds=lambda given: given.each_datum * 5 * given.draws,
        fault=DATA_DIFFER,
    ),
    Diagnostic(
        name="collapse",
        about="Use of the latents",
        run=lambda given: collapse(given.vae, given.x, seed=given.seed),
        judge=judge_collapse,
        seconds=lambda given: given.each_datum * len(given.rows) / 4,
    ),
    Diagnostic(
        name="overfitting",
        about="Overfitting",
        run=lambda given: overfitting(given.history),
        judge=judge_overfitting,
        seconds=lambda given: 0.0,
        applies=lambda given: given.validated,
        needs="the history of a fit with validation data",
    ),
    Diagnostic(
        name="converged",
        about="Convergence of the training",
        run=lambda given: converged(given.history),
        judge=judge_converged,
        seconds=lambda given: 1.0,
        applies=lambda given: given.long_history,
        needs=f"the history of {EPOCHS} epochs",
    ),
    Diagnostic(
        name="gaps",
        about="Inference gaps",
        run=lambda given: inference_gaps(given.vae, given.x, seed=given.seed),
        judge=judge_gaps,
        seconds=lambda given: given.each_datum * GAPS,
        fault=Q_IS_OFF,
    ),
    Diagnostic(
        name="sbc",
        about="Calibration by simulation",
        run=lambda given: sbc(
            given.vae, simulations=SIMULATIONS, context=given.rows.context, mask=given.rows.mask, seed=given.seed
        ),
        judge=judge_sbc,
        seconds=lambda given: given.evaluation * SIMULATIONS * 200,
        fault=Q_IS_OFF,
    ),
    Diagnostic(
        name="nuts",
        about="NUTS as a gold standard",
        run=lambda given: nuts(
            given.vae, given.x, data=given.gold, chains=CHAINS, warmup=WARMUP, draws=DRAWS, seed=given.seed
        ),
        judge=judge_nuts,
        seconds=lambda given: given.gold * CHAINS * (WARMUP + DRAWS) * LEAPFROGS * GRADIENT,
        applies=lambda given: given.gold > 0,
        fault=Q_IS_OFF,
    ),
)
