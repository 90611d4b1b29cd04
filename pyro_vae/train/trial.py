"""Try the loss before training, and warn of clamped values and narrow likelihoods after it."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import pyro
import torch
from pyro.infer import ELBO

from pyro_vae.core.compatibility import in_a_line
from pyro_vae.core.component import at_least_single, evaluating, join
from pyro_vae.core.pair import Amortized
from pyro_vae.core.rows import Rows
from pyro_vae.core.traces import Loss, loss_name
from pyro_vae.core.vae import VAE
from pyro_vae.data.columns import list_names
from pyro_vae.data.spread import moments
from pyro_vae.errors import ModelError, PyroVAEError, SettingsError, UnboundedDensityWarning
from pyro_vae.likelihoods import Likelihood

LARGEST = 128
"""The largest default batch size."""

MOST_DECODED = 256
"""The most rows that are decoded to search for clamped values and narrow likelihoods."""

NARROW = 1e-3
"""A likelihood is narrow if its sd is below this fraction of its column's sd."""


def default_batch_size(n: int) -> int:
    """Return 128, or n if smaller; slightly less if a last batch of one row would remain.

    Example:
        >>> [default_batch_size(n) for n in (20, 128, 129, 1000)]
        [20, 128, 127, 128]
    """
    return _without_single_rows(n, min(LARGEST, n)) or n


def validate_batch_size(vae: Amortized, loss: Loss, rows: Rows, *, batch_size: int, size: int) -> None:
    """Raise if a training step would fail with this batch size or these components.

    Computes the loss in training mode on two rows and, if some batch has one row, on one row. Buffers and random
    states are restored.

    Args:
        vae: the VAE to train.
        loss: an ELBO; other functions are not tried, since they may count their calls.
        rows: at least the first two data, on the device and in the precision of the VAE.
        batch_size: data per step.
        size: the number of training data.

    Raises:
        SettingsError: if a batch of one row fails; the message names batch sizes without one.
        ModelError: if a batch of two rows fails.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> validate_batch_size(vae, pv.elbo.InfoVAE(pv.elbo.ELBO()), Rows(torch.zeros(2, 4)), batch_size=4, size=9)
        Traceback (most recent call last):
        pyro_vae.errors.SettingsError: batch_size is 4, which leaves a last batch of one of the 9 rows, ...
    """
    if not isinstance(loss, ELBO):
        return
    if batch_size > 1 and (error := _failure(vae, loss, rows.take(slice(2)), size)):
        if isinstance(error, PyroVAEError):
            raise error
        raise ModelError(
            f"{loss_name(loss)} cannot be computed on a batch of 2 rows in training mode ({in_a_line(error)}); "
            "make the components accept tensors of shape (*batch, features)"
        ) from error
    single = batch_size == 1 or size % batch_size == 1
    if single and (error := _failure(vae, loss, rows.take(slice(1)), size)):
        reason = str(error) if isinstance(error, PyroVAEError) else in_a_line(error)
        raise SettingsError(_describe_single_rows(batch_size, size, reason)) from error


@torch.no_grad()
def warn_of_limits(vae: Amortized, rows: Rows) -> None:
    """Warn if the likelihood clamps outputs of the decoder's network for these rows.

    Args:
        vae: the trained VAE.
        rows: data, on the device and in the precision of the VAE.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> warn_of_limits(vae, Rows(torch.zeros(2, 4)))  # a Normal clamps nothing
    """
    decoder, rows = getattr(vae, "decoder", None), rows.take(slice(MOST_DECODED))
    if not isinstance(vae, VAE) or not isinstance(decoder, Likelihood) or type(decoder).beyond is Likelihood.beyond:
        return
    with torch.random.fork_rng(devices=[rows.x.device] if rows.x.is_cuda else []), evaluating(vae):
        z = vae.posterior(rows).sample()
        found = decoder.beyond(at_least_single(decoder.net(join(z, rows.context))))
    for limit, over in found.items():
        if number := int(over.flatten(1).any(1).sum()):
            warnings.warn(
                f"{type(decoder).__name__}: for {number} of {len(rows)} training rows the network outputs {limit}, "
                "where they are clamped and have no gradient; scale the data down, or lower the learning rate",
                stacklevel=3,
            )


@torch.no_grad()
def warn_of_narrow_likelihoods(vae: Amortized, rows: Rows, columns: Sequence[str] | None = None) -> None:
    """Warn if the likelihood of a column has become far narrower than the column itself.

    If a scale is learned, and the column is constant or the network reproduces it exactly, the density has no upper
    bound, and a rising ELBO says nothing about the model.

    Args:
        vae: the trained VAE.
        rows: data, on the device and in the precision of the VAE.
        columns: the names of the columns.

    Warns:
        UnboundedDensityWarning: naming the columns.

    Example:
        >>> import pyro_vae as pv
        >>> vae = pv.exact.LinearGaussian(torch.ones(4, 1), torch.zeros(4), 0.5).as_vae()
        >>> warn_of_narrow_likelihoods(vae, Rows(torch.randn(20, 4)))  # its scale is 0.5 in each column
    """
    decoder, rows = getattr(vae, "decoder", None), rows.take(slice(MOST_DECODED))
    if not isinstance(vae, VAE) or not isinstance(decoder, Likelihood) or rows.x.dim() != 2:
        return
    real = decoder.real_columns(rows.x.shape[1:]).to(rows.x.device)
    if not bool(real.any()):
        return
    with torch.random.fork_rng(devices=[rows.x.device] if rows.x.is_cuda else []), evaluating(vae, len(rows)):
        try:
            widths = vae.likelihood(vae.posterior(rows).sample(), Rows(rows.x, rows.context)).variance.sqrt()
        except (AttributeError, NotImplementedError):  # a user's distribution may have no variance
            return
    center, sd = moments(rows)
    given = center.abs().clamp(min=1.0) if decoder.standardize is None else decoder.standardize.unit
    narrow = real & (widths.amin(0) < NARROW * sd.where(sd > 0, given.double()))
    if places := narrow.nonzero().flatten().tolist():
        names = list_names([columns[i] for i in places]) if columns is not None else ", ".join(map(str, places))
        warnings.warn(
            f"the likelihood of {len(places)} of {narrow.numel()} columns ({names}) has an sd below {NARROW:g} times "
            "that of the column: the density is unbounded, so a rising ELBO is not progress; "
            "drop the columns, or bound their scale (min_scale= of HeteroscedasticNormal, or a fixed scale)",
            UnboundedDensityWarning,
            stacklevel=3,
        )


def _describe_single_rows(batch_size: int, n: int, reason: str) -> str:
    """Say what is wrong with batches of one row, and which sizes avoid them."""
    if n == 1:
        return f"the data have one row, on which the VAE cannot be trained ({reason}); pass at least two"
    what = "makes batches of one row" if batch_size == 1 else f"leaves a last batch of one of the {n} rows"
    below, above = _without_single_rows(n, batch_size), next(b for b in range(batch_size + 1, n + 1) if n % b != 1)
    sizes = " or ".join(str(b) for b in (below, above) if b)
    return f"batch_size is {batch_size}, which {what}, on which training fails ({reason}); pass batch_size={sizes}"


def _without_single_rows(n: int, most: int) -> int | None:
    """Find the largest batch size from 2 to ``most`` that leaves no batch of one of n rows."""
    return next((b for b in range(most, 1, -1) if n % b != 1), None)


def _failure(vae: Amortized, loss: ELBO, rows: Rows, size: int) -> Exception | None:
    """Return the exception that computing the loss raises, if any."""
    try:
        with _restored_state(vae, rows), torch.no_grad():
            loss.loss(vae.model, vae.guide, *rows.arguments(size))
    except Exception as error:  # a user's component may raise anything
        return error
    return None


@contextlib.contextmanager
def _restored_state(vae: Amortized, rows: Rows) -> Iterator[None]:
    """Compute in training mode inside; restore buffers and random states afterwards."""
    before = [(buffer, buffer.detach().clone()) for buffer in vae.buffers()]
    devices = [rows.x.device] if rows.x.is_cuda else []
    try:
        with torch.random.fork_rng(devices=devices), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # training gives the same warnings
            yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if buffer.layout is not torch.strided or not torch.equal(buffer, value):
                    buffer.copy_(value)
