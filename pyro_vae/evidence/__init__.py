"""Estimates of log p(x) of held-out data, and baselines to compare them with."""

from pyro_vae.evidence.baseline import baseline, judge_baseline
from pyro_vae.evidence.cross_check import check_where_possible, cross_check
from pyro_vae.evidence.enumerated import discrete, enumerated_log_marginal
from pyro_vae.evidence.estimate import log_evidence, validate_particles
from pyro_vae.evidence.interval import interval
from pyro_vae.evidence.judge import judge_evidence
from pyro_vae.evidence.known import known_evidence

__all__ = [
    "baseline",
    "check_where_possible",
    "cross_check",
    "discrete",
    "enumerated_log_marginal",
    "interval",
    "judge_baseline",
    "judge_evidence",
    "known_evidence",
    "log_evidence",
    "validate_particles",
]
