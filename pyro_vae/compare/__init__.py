"""Compare estimators of the evidence, models and training runs."""

from pyro_vae.compare.elbos import compare_elbos
from pyro_vae.compare.models import compare_models
from pyro_vae.compare.recommend import recommend
from pyro_vae.compare.seeds import over_seeds
from pyro_vae.core.pair import Pair

__all__ = ["Pair", "compare_elbos", "compare_models", "over_seeds", "recommend"]
