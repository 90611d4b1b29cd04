"""The base class of estimators, which compute a bound from log-weights."""

import copy
import math
from abc import abstractmethod
from typing import Any

from torch import Tensor

from pyro_vae.core.traces import Program, TensorELBO, samples
from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.log_weights import weigh
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import ModelError, SettingsError, type_of


class Estimator(TensorELBO):
    """Base class of estimators: a subclass computes its bound from the log-weights.

    .. math:: \\mathrm{loss} = - \\frac nm \\sum_{i \\in \\mathrm{batch}} \\hat{\\mathcal L}_i(\\log w_{1i}, \\ldots,
        \\log w_{Ki})

    The bound is computed from unscaled log-weights and then multiplied by n/m, so minibatches are unbiased. All
    particles are drawn at once, and losses are returned as tensors, which avoids a GPU synchronization. Each estimator
    is a ``pyro.infer.ELBO``: use it in ``SVI(..., loss=)`` or :func:`pyro_vae.fit`.

    Args:
        num_particles: the number of particles K, at least ``least_particles`` of the class.

    Raises:
        SettingsError: if there are too few particles.
        ModelError: when called, if the guide is not reparameterizable, or a site has no log-weight per datum.

    Example:
        >>> import torch
        >>> class Largest(Estimator):
        ...     def bound(self, w):
        ...         return w.log.amax(0)
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> Largest(3).loss(vae.model, vae.guide, torch.ones(4, 5)).shape
        torch.Size([])
    """

    least_particles = 1
    path_gradient = False
    known_bias = ""
    reweights_latents = False
    """Whether it stops or weights the gradient from the model to the latents, which would be wrong for a penalty."""
    couples_data = False
    """Whether the bound of a datum depends on the other data of its batch, which then must stay in one process."""
    takes_globals = False
    """Whether it is linear in the log-weights, so that sites outside the plate over data add their part once."""

    @takes_settings
    def __init__(self, num_particles: int = 1) -> None:
        self._validate_particles(num_particles)
        super().__init__(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)

    def _validate_particles(self, num_particles: int) -> None:
        if not isinstance(num_particles, int) or num_particles < self.least_particles:
            raise SettingsError(
                f"{type(self).__name__}: num_particles is {num_particles}; "
                f"it must be a whole number of at least {self.least_particles}"
            )

    @abstractmethod
    def bound(self, w: Weights) -> Tensor:
        """Return the bound of each datum, shape ``(batch,)``; its gradient is the gradient of the estimator."""

    def reference(self) -> "Estimator":
        """Return an estimator of the same bound with an unbiased gradient, a different estimator if possible."""
        return self

    @takes_settings
    def with_particles(self, num_particles: int) -> "Estimator":
        """Return a copy with a different number of particles."""
        self._validate_particles(num_particles)
        other = copy.copy(self)
        other.num_particles = num_particles
        return other

    def advance(self) -> None:
        """Advance the schedules by one training step."""

    def restart(self) -> None:
        """Reset the schedules to the first training step."""

    def schedules(self) -> list[Any]:
        """Return the schedules of its settings."""
        return []

    def weigh(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Weights:
        """Run model and guide once and return the log-weights."""
        w = weigh(
            model, guide, *args, num_particles=self.num_particles, path_gradient=self.path_gradient,
            given_globals=self.takes_globals, **kwargs,
        )  # fmt: skip
        w.refuse()
        for name, site in samples(w.guide_trace):
            if not site["fn"].has_rsample and name not in w.enumerated:
                raise ModelError(
                    f"site {name} has {type_of(site['fn'])}, which has no reparameterized gradient; "
                    "use ScoreFunction or VIMCO"
                )
        return w

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return minus the bound, summed over data and scaled by n/m; a tensor of shape ``()``."""
        w = self.weigh(model, guide, *args, **kwargs)
        return -w.total(self.bound(w))

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss, add its gradient to ``.grad`` of all parameters, and advance the schedules by one step."""
        loss = super().loss_and_grads(model, guide, *args, **kwargs)
        self.advance()
        return loss

    def settings(self) -> dict[str, Any]:
        """Return the settings of the estimator, except for the number of particles."""
        return {}

    def called(self) -> str:
        """Return a label: the class and the settings, without the number of particles."""
        settings = format_settings(self.settings())
        return type(self).__name__ + (f"({', '.join(settings)})" if settings else "")

    def target(self) -> str:
        """Return the name of the bound that it estimates, with K if the bound depends on K.

        Several estimators may share a bound.
        """
        return repr(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join([str(self.num_particles), *format_settings(self.settings())])})"


def format_settings(settings: dict[str, Any]) -> list[str]:
    """Format settings as keyword arguments.

    Example:
        >>> format_settings({"alpha": 0.5, "groups": 2})
        ['alpha=0.5', 'groups=2']
    """
    return [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items()]


def log_mean_exp(log: Tensor) -> Tensor:
    """Compute ``log 1/K Σ exp`` over the first dimension.

    Example:
        >>> import torch
        >>> log_mean_exp(torch.tensor([[0.0], [0.0]]))
        tensor([0.])
    """
    return log.logsumexp(0) - math.log(len(log))
