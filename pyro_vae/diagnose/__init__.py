"""How good is q(z|x)? Each diagnostic gives labelled data, and a finding in words."""

from pyro_vae.diagnose.convergence import Iterates, converged, judge_converged
from pyro_vae.diagnose.finding import Finding
from pyro_vae.diagnose.gaps import inference_gaps, judge_gaps
from pyro_vae.diagnose.gold_standard import judge_nuts, nuts
from pyro_vae.diagnose.weights import psis

__all__ = [
    "Finding",
    "Iterates",
    "converged",
    "inference_gaps",
    "judge_converged",
    "judge_gaps",
    "judge_nuts",
    "nuts",
    "psis",
]
