"""The evidence lower bound with a sampled or an analytic KL."""

from torch import Tensor

from pyro_vae.core.validation import takes_settings
from pyro_vae.elbo.estimator import Estimator
from pyro_vae.elbo.kl import closed_form
from pyro_vae.elbo.weights import Weights
from pyro_vae.errors import ModelError

__all__ = ["ELBO", "STL", "AnalyticKL"]


class ELBO(Estimator):
    """The evidence lower bound with a sampled KL; value and gradient equal those of Pyro's ``Trace_ELBO``.

    .. math:: \\mathcal L_i = \\frac1K \\sum_k \\log w_{ki}

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5)
        >>> vae, x = linear.as_vae(), torch.ones(3, 5).double()
        >>> bool((ELBO().loss(vae.model, vae.guide, x) + linear.log_marginal(x).sum()).abs() < 1e-12)
        True
    """

    takes_globals = True

    def bound(self, w: Weights) -> Tensor:
        return w.log.mean(0)

    def target(self) -> str:
        return "ELBO"

    def reference(self) -> Estimator:
        return STL(self.num_particles)


class STL(ELBO):
    """The ELBO with the path gradient only ("sticking the landing"), noise-free where q is the posterior.

    .. math:: \\nabla_\\phi \\mathcal L_i = \\frac1K \\sum_k \\frac{\\partial \\log w_{ki}}{\\partial z_{ki}}
        \\frac{\\partial z_{ki}}{\\partial \\phi}

    The omitted term, the score of q, has mean zero, so the gradient is unbiased. If q is far too narrow, the gradient
    is much noisier than that of :class:`ELBO`.

    References:
        | Sticking the Landing (Roeder, Wu & Duvenaud, 2017), https://arxiv.org/abs/1703.09194

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2).double(), torch.zeros(5).double(), 0.5).as_vae()
        >>> STL().differentiable_loss(vae.model, vae.guide, torch.ones(3, 5).double()).backward()
        >>> bool(max(p.grad.abs().max() for p in vae.guide.parameters()) < 1e-12)
        True
    """

    path_gradient = True

    def reference(self) -> Estimator:
        return ELBO(self.num_particles)


class AnalyticKL(ELBO):
    """The ELBO with a closed-form KL: a strict version of Pyro's ``TraceMeanField_ELBO``.

    .. math:: \\mathcal L_i = \\frac1K \\sum_k \\log p(x_i | z_{ki}) - KL(q(z | x_i) \\,\\|\\, p(z))

    It raises an error where Pyro's estimator silently deviates: for a KL without a closed form (Pyro samples it), for
    different scales of a latent site in model and guide (Pyro uses the scale of the guide), and for several latent
    sites (whose joint KL need not be the sum of the KLs).

    Args:
        num_particles: the number of particles K, at least 1.
        strict: whether to raise an error for a KL without a closed form; if not, the KL is sampled, as in Pyro.

    Raises:
        ModelError: when called on such a pair of model and guide.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> import torch, pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5).as_vae()
        >>> vae.prior = pv.priors.StudentT(2)
        >>> AnalyticKL().loss(vae.model, vae.guide, torch.zeros(3, 5))
        Traceback (most recent call last):
        pyro_vae.errors.ModelError: the KL of MultivariateNormal from StudentT at site z has no closed form ...
    """

    takes_globals = False

    @takes_settings
    def __init__(self, num_particles: int = 1, *, strict: bool = True) -> None:
        super().__init__(num_particles)
        self.strict = strict

    def bound(self, w: Weights) -> Tensor:
        pairs = list(w.kl_pairs())
        if len(pairs) != 1:
            raise ModelError(
                f"AnalyticKL takes one latent site, but the guide has {[name for name, *_ in pairs]}; use Trace_ELBO"
            )
        ((name, q, p, temperature),) = pairs
        kl = closed_form(name, q, p, strict=self.strict)
        return w.log.mean(0) if kl is None else (w.likelihood - temperature * w.by_datum(kl)).mean(0)

    def reference(self) -> Estimator:
        return ELBO(self.num_particles)
