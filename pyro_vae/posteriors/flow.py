"""Normalizing flows of zuko as posteriors."""

from torch import Tensor, nn

from pyro_vae.core.component import Distribution
from pyro_vae.errors import ModelError, type_of
from pyro_vae.posteriors.base import Posterior


class Flow(Posterior):
    """A posterior from any conditional normalizing flow of zuko.

    .. math:: q(z | x) = p_0(f(z; c)) \\, |\\det \\partial f(z; c) / \\partial z|, \\qquad c = \\mathrm{net}(x)

    A flow has no mean in closed form: ``.mean`` is the mean of a fixed number of draws, for figures. Each training
    step samples the flow, so choose a flow that samples fast (a coupling or inverse autoregressive flow).

    Args:
        flow: a zuko flow over d latents, such as ``zuko.flows.NICE(d, context=c)``; ``pip install pyro-vae[flows]``.
        net: the encoder network, from ``(*batch, *features)`` to the flow's c context numbers; by default the
            identity.

    Raises:
        ModelError: if ``flow`` is not a module, or when called, if it returns no distribution over all real numbers.

    References:
        | Variational Inference with Normalizing Flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770
        | Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
          https://arxiv.org/abs/1606.04934
        | zuko (Rozet et al., 2022), https://zuko.readthedocs.io

    Example:
        >>> import torch, zuko
        >>> _ = torch.manual_seed(0)
        >>> q = Flow(zuko.flows.NICE(2, context=8, transforms=2), net=nn.Linear(3, 8))(torch.zeros(4, 3))
        >>> q.batch_shape, q.event_shape
        (torch.Size([4]), torch.Size([2]))
    """

    def __init__(self, flow: nn.Module, *, net: nn.Module | None = None) -> None:
        super().__init__(nn.Identity() if net is None else net)
        if not isinstance(flow, nn.Module):
            raise ModelError(
                f"flow is {type_of(flow)}; pass a zuko flow (pip install pyro-vae[flows]), "
                "such as zuko.flows.NICE(latents, context=features)"
            )
        self.flow = flow

    def distribution(self, out: Tensor) -> Distribution:
        from pyro_vae.core.zuko import as_pyro

        return as_pyro(self.flow(out), type(self.flow).__name__)
