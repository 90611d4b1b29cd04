"""How good is q(z|x)? Each diagnostic gives labelled data, and a finding in words."""

from pyro_vae.core.finding import Finding
from pyro_vae.diagnose.calibration import judge_sbc, sbc
from pyro_vae.diagnose.convergence import Iterates, converged, judge_converged
from pyro_vae.diagnose.gaps import inference_gaps, judge_gaps
from pyro_vae.diagnose.gold_standard import judge_nuts, nuts
from pyro_vae.diagnose.importance import judge_khat, khat
from pyro_vae.diagnose.latents import collapse, judge_collapse
from pyro_vae.diagnose.predictive import STATISTICS, judge_predictive_check, predictive_check, prior_check
from pyro_vae.evidence.psis import psis

__all__ = [
    "STATISTICS",
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
    "judge_predictive_check",
    "judge_sbc",
    "khat",
    "nuts",
    "predictive_check",
    "prior_check",
    "psis",
    "sbc",
]
