"""Where a loss that is no finite number came from: which datum, which site, which number."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor
from torch.distributions.utils import lazy_property

from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import Loss, differentiable, samples, traces

if TYPE_CHECKING:
    from pyro_vae.core.pair import Amortised

DRAWS = 16
"""So often the sites are drawn, where the first draw shows nothing: an estimator may have drawn more than one."""
ALONE = 512
"""At most so many rows are tried alone."""
NOT_AGAIN = "it did not come again at the same data and weights, with other noise"
"""Where nothing was found."""
FAR = 10.0
"""A row is told to be large if its largest number is so many times that of a typical one."""


def origin(
    vae: "Amortised", loss: Loss, rows: Rows, *, size: int | None = None, numbers: Sequence[int] | None = None
) -> str:
    """Where a loss or a gradient that is not finite came from, as a clause of a sentence.

    The weights are looked at first, then what the parts return: the parameters of q(z|x), the sample, the
    log-densities, in the order in which they are computed, and at last the loss and its gradient, also
    row by row. The noise is that of torch's generators as they stand, which are left as they are.

    Args:
        vae: with the weights before the step that failed; it is left as it is.
        loss: what was minimised.
        rows: the batch of that step, on the device of the VAE.
        size: the n of n/m.
        numbers: of the rows in the data; in the batch if not given.

    Returns:
        Which datum, which site and which number, as far as they can be told.

    Example:
        >>> import pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5)
        >>> x = torch.zeros(3, 4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1e30))
        >>> origin(linear.as_vae(), pv.elbo.Trace_ELBO(), Rows(x), numbers=[7, 8, 9])
        'log p(z) is -inf for row 8, latent 0 (z is 2.35e+29, loc 0, scale 1); its largest number is 1e+30, ...'
    """
    look = _Look(vae, loss, rows, len(rows) if size is None else size, numbers)
    if weights := broken_weights(vae):
        return weights
    buffers = [(buffer, buffer.clone()) for buffer in vae.buffers()]
    try:
        with pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = look.sites() or look.step()
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    return found or NOT_AGAIN


def broken_weights(vae: "Amortised") -> str:
    """Which weight is not a finite number, or nothing.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> broken_weights(vae)
        ''
    """
    places = [(name, weight, ~weight.isfinite()) for name, weight in vae.named_parameters()]
    # A buffer may hold an infinity on purpose.
    bad = [place for place in [*places, *((n, b, b.isnan()) for n, b in vae.named_buffers())] if place[2].any()]
    if not bad:
        return ""
    name, weight, which = bad[0]
    more = f", and {len(bad) - 1} more of the weights' tensors" if len(bad) > 1 else ""
    return f"the weights were not finite before it: {int(which.sum())} of {weight.numel()} in {name}{more}"


@dataclass(frozen=True)
class _Look:
    """One look at a batch."""

    vae: "Amortised"
    loss: Loss
    rows: Rows
    size: int
    numbers: Sequence[int] | None

    @torch.no_grad()
    def sites(self) -> str:
        """The first site at which something is not finite, over some draws of the noise."""
        x = self.rows.x
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            for _ in range(DRAWS):
                try:
                    model, guide = traces(self.vae.model, self.vae.guide, *self.rows.arguments(self.size))
                except Exception:  # a part may raise anything; the step itself then tells
                    return ""
                q = [(f"q({name}|x)", site) for name, site in samples(guide)]
                p = [(f"p({name})", site) for name, site in samples(model) if not site["is_observed"]]
                p += [(f"p({name}|z)", site) for name, site in samples(model) if site["is_observed"]]
                for name, site in q + p:
                    if found := self.site(name, site):
                        return found
        return ""

    def site(self, name: str, site: dict[str, Any]) -> str:
        """What is not finite at a site, or nothing."""
        fn, value, kind = site["fn"], site["value"], "feature" if site["is_observed"] else "latent"
        for what, number, bad in _wrong_parameters(fn):
            if bad.any():
                first = bad.nonzero()[0]
                return f"the {what} of {name} is {number[tuple(first)].item() + 0.0:.4g}{self.place(bad, fn, kind)}"
        if not value.isfinite().all():
            bad = ~value.isfinite()
            shown = value[tuple(bad.nonzero()[0])].item()
            return f"the sample of {name} is {shown:.4g}{self.place(bad, fn, kind)}"
        log = _by_feature(fn, value)
        if not (bad := ~log.isfinite()).any():
            return ""
        at = bad.nonzero()[0]
        shown = _shown(site["name"], fn, value, at)
        return f"log {name} is {log[tuple(at)].item():.4g}{self.place(bad, fn, kind, shown)}"

    def place(self, bad: Tensor, fn: Any, kind: str, shown: str = "") -> str:
        """For which row and feature, and what is odd about them."""
        dim, first = len(fn.batch_shape) - 1, bad.nonzero()[0].tolist()
        if bad.dim() <= dim or bad.shape[dim] != len(self.rows):
            return f", for every row{self.largest_weight()}"
        rows = bad.movedim(dim, 0).flatten(1).any(1)
        if rows.all() and len(rows) > 1:
            return f", for every row{self.largest_weight()}"
        row, *rest = first[dim:]
        which = "" if not rest else f", {kind} {rest[0] if len(rest) == 1 else tuple(rest)}"
        others = f", and for {int(rows.sum()) - 1} more" if rows.sum() > 1 else ""
        return f" for row {self.number(row)}{which}{shown}{others}{self.size_of(row)}"

    def number(self, row: int) -> str:
        """What a row is called."""
        return f"{row} of the batch" if self.numbers is None else str(int(self.numbers[row]))

    def size_of(self, row: int) -> str:
        """That a row is far larger than others, if it is."""
        largest = self.rows.x.flatten(1).abs().amax(1)
        typical = largest.median().item()
        if largest[row].item() <= FAR * typical:
            return ""
        return f"; its largest number is {largest[row].item():.3g}, that of a typical row {typical:.3g}"

    def largest_weight(self) -> str:
        """The largest of the weights, which tells whether they have run away."""
        name, weight = max(self.vae.named_parameters(), key=lambda named: named[1].abs().max().item())
        return f"; the largest weight is {weight.abs().max().item():.3g}, in {name}"

    def step(self) -> str:
        """Whether the loss or a gradient is not finite, and by which rows."""
        loss, gradients = self.loss_and_gradients(self.rows)
        if not math.isfinite(loss):
            return f"the loss is {loss:.4g}{self.by_rows(lambda rows: self.loss_and_gradients(rows)[0])}"
        broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        if not broken:
            return ""
        more = f" (and of {len(broken) - 1} more)" if len(broken) > 1 else ""

        def total(rows: Rows) -> float:
            gradients = self.loss_and_gradients(rows)[1]
            return sum(gradients[name].sum().item() for name in broken)

        by = self.by_rows(total)
        return f"the gradient of {broken[0]}{more} is not finite while the loss is{by}"

    def loss_and_gradients(self, rows: Rows) -> tuple[float, dict[str, Tensor]]:
        """With the noise of the generators as they stand."""
        if not callable(getattr(self.loss, "differentiable_loss", None)) and hasattr(self.loss, "loss"):
            return 0.0, {}
        trained = {name: p for name, p in self.vae.named_parameters() if p.requires_grad}
        with torch.random.fork_rng(devices=[rows.x.device] if rows.x.is_cuda else []), torch.enable_grad():
            value = differentiable(self.loss)(self.vae.model, self.vae.guide, *rows.arguments(self.size))
            gradients = torch.autograd.grad(value, list(trained.values()), materialize_grads=True)
        return float(value), dict(zip(trained, gradients, strict=True))

    def by_rows(self, number: Callable[[Rows], float]) -> str:
        """Which rows alone make a number not finite."""
        every = torch.arange(len(self.rows), device=self.rows.x.device)
        parts = every.split(math.isqrt(len(every) - 1) + 1)
        suspects = [row for part in parts if self.fails(number, part) for row in part.tolist()][:ALONE]
        alone = [row for row in suspects if self.fails(number, every[row : row + 1])]
        if not alone or len(alone) == len(every) or len(alone) == ALONE:
            return f", by no datum: {'each row' if alone else 'no row'} alone does it{self.largest_weight()}"
        more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
        return f", by row {self.number(alone[0])}{more} alone{self.size_of(alone[0])}"

    def fails(self, number: Callable[[Rows], float], index: Tensor) -> bool:
        """Whether it is not finite for some of the rows."""
        try:
            return not math.isfinite(number(self.rows.take(index)))
        except Exception:  # as above; batch norm, say, takes no single row
            return False


def _unwrapped(fn: Any) -> Any:
    """A distribution without what only reshapes, masks or transforms it."""
    while (inner := getattr(fn, "base_dist", None)) is not None:
        fn = inner
    return fn


def _wrong_parameters(fn: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The parameters of a distribution, and where each is not finite or outside of its support."""
    fn = _unwrapped(fn)
    for name, constraint in fn.arg_constraints.items():
        if name not in vars(fn) and isinstance(getattr(type(fn), name, None), lazy_property):
            continue
        value = getattr(fn, name, None)
        if not isinstance(value, Tensor):
            continue
        # A logit of minus infinity is a probability of 0.
        bad = value.isnan() | (value == math.inf) if name == "logits" else ~value.isfinite()
        kept = constraint.check(value)
        outside = ~kept.reshape(kept.shape + (1,) * (value.dim() - kept.dim())).expand(value.shape)
        yield name, value, bad | outside


def _by_feature(fn: Any, value: Tensor) -> Tensor:
    """Log-densities, of each feature where these are independent, by datum first."""
    own = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    log: Tensor = own.log_prob(value)
    return log


def _shown(name: str, fn: Any, value: Tensor, at: Tensor) -> str:
    """The numbers of which a log-density was made."""
    if len(at) != value.dim():
        return ""
    base, index = _unwrapped(fn), tuple(at)
    known = {name: vars(base).get(name) for name in base.arg_constraints}
    parts = [f"{n} {p[index].item():.3g}" for n, p in known.items() if isinstance(p, Tensor) and p.shape == value.shape]
    return f" ({', '.join([f'{name} is {value[index].item():.3g}', *parts])})"
