"""Networks that take ``(*batch, features)``, with any number of batch dimensions."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.core.standardize import Standardize
from pyro_vae.core.validation import takes_settings, whole
from pyro_vae.errors import ModelError, SettingsError


@takes_settings
def mlp(
    in_features: int,
    hidden: Sequence[int],
    out_features: int,
    *,
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
) -> nn.Sequential:
    """Build a multilayer perceptron; without hidden layers, a linear map.

    .. math:: f(v) = W_L\\, a(\\dots a(W_1 v + b_1) \\dots) + b_L

    Args:
        in_features: numbers per input, at least 1.
        hidden: the width of each hidden layer; empty for a linear map.
        out_features: numbers per output, at least 1.
        activation: a class or function that builds the activation a.
        norm: a class or function that builds, given the width of a hidden layer, a normalization layer for the
            last dimension, applied before the activation, such as ``torch.nn.LayerNorm``; None for no normalization.

    Returns:
        A network from ``(*batch, in_features)`` to ``(*batch, out_features)``.

    Raises:
        SettingsError: if ``hidden`` is not a list, or a size is not a whole number of at least 1.

    References:
        | Learning representations by back-propagating errors (Rumelhart, Hinton & Williams, 1986),
          https://doi.org/10.1038/323533a0
        | Layer Normalization (Ba, Kiros & Hinton, 2016), https://arxiv.org/abs/1607.06450

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> mlp(8, [128], 64, norm=nn.LayerNorm)(torch.zeros(7, 5, 8)).shape
        torch.Size([7, 5, 64])
    """
    _validate_sizes(hidden, in_features, out_features)
    widths = [in_features, *hidden, out_features]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths[:-1]):
        layers += [nn.Linear(before, after), *([] if norm is None else [norm(after)]), activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], out_features))


@takes_settings
def conv_encoder(
    image_shape: tuple[int, int, int],
    hidden: Sequence[int],
    out_features: int,
    *,
    context: int = 0,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """Build a convolutional network from flat images to features; layers halve the size.

    .. math:: h_l = a(K_l * h_{l-1} + b_l) \\text{ at every second pixel}, \\qquad f = W \\, \\mathrm{vec}(h_L) + b

    Args:
        image_shape: ``(channels, height, width)``, each at least 1; it need not be a power of two.
        hidden: the channels of each convolution (3 × 3, stride 2), in order; empty for a linear map.
        out_features: numbers per output, at least 1.
        context: the size of the context that follows each image; each of its numbers becomes a constant channel.
        activation: a class or function that builds the activation a.

    Returns:
        A network from ``(*batch, channels · height · width + context)`` to ``(*batch, out_features)``.

    Raises:
        SettingsError: if ``hidden`` is not a list, or a size is not a whole number of at least 1.
        ModelError: when called, if the size of the rows does not match ``image_shape`` and ``context``.

    References:
        | Gradient-Based Learning Applied to Document Recognition (LeCun et al., 1998), https://doi.org/10.1109/5.726791

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> conv_encoder((1, 7, 5), [8, 16], 4)(torch.zeros(3, 2, 35)).shape
        torch.Size([3, 2, 4])
    """
    _validate_sizes(hidden, *image_shape, out_features)
    layers: list[nn.Module] = []
    channels = [image_shape[0] + whole("context", context, 0), *hidden]
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), activation()]
    height, width = _halvings(image_shape, len(hidden))[-1]
    layers += [nn.Flatten(), nn.Linear(channels[-1] * height * width, out_features)]
    return _FlattenBatch(nn.Sequential(*layers), image_shape, context)


@takes_settings
def conv_decoder(
    in_features: int,
    hidden: Sequence[int],
    image_shape: tuple[int, int, int],
    *,
    outputs_per_feature: int = 1,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """Build a convolutional network from features to flat images; layers double the size.

    .. math:: h_0 = a(W v + b), \\qquad h_l = a(K_l *^\\top h_{l-1} + b_l), \\qquad f = \\mathrm{vec}(h_L)

    Args:
        in_features: numbers per input, at least 1.
        hidden: the input channels of each transposed convolution (3 × 3, stride 2), in order from the
            smallest image; empty for a linear map.
        image_shape: ``(channels, height, width)``, each at least 1; it need not be a power of two.
        outputs_per_feature: numbers per pixel and channel, at least 1, for likelihoods with several parameters.
            ``output.chunk(outputs_per_feature, -1)`` splits the output into one flat image per parameter.
        activation: a class or function that builds the activation a.

    Returns:
        A network from ``(*batch, in_features)`` to
        ``(*batch, outputs_per_feature · channels · height · width)``.

    Raises:
        SettingsError: if ``hidden`` is not a list, or a size is not a whole number of at least 1.
        ModelError: when called, if a row does not have ``in_features`` numbers.

    References:
        | Deep Convolutional Generative Adversarial Networks (Radford, Metz & Chintala, 2015),
          https://arxiv.org/abs/1511.06434

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = conv_decoder(4, [16, 8], (1, 7, 5), outputs_per_feature=2)
        >>> net(torch.zeros(3, 2, 4)).shape
        torch.Size([3, 2, 70])
    """
    _validate_sizes(hidden, in_features, *image_shape, outputs_per_feature)
    channels = [*hidden, outputs_per_feature * image_shape[0]]
    sizes = _halvings(image_shape, len(hidden))[::-1]
    layers: list[nn.Module] = [nn.Linear(in_features, channels[0] * math.prod(sizes[0]))]
    layers.append(nn.Unflatten(1, (channels[0], *sizes[0])))
    for (before, after), (small, large) in zip(pairwise(channels), pairwise(sizes), strict=True):
        odd_or_even = (large[0] - 2 * small[0] + 1, large[1] - 2 * small[1] + 1)
        layers.append(activation())
        layers.append(nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=odd_or_even))
    return _FlattenBatch(nn.Sequential(*layers, nn.Flatten()), (in_features,))


class WithoutContext(nn.Module):
    """A network that ignores the context: it takes the first numbers of a row only.

    .. math:: f(v, c) = f(v)

    Args:
        net: a network that takes ``(*batch, features)``.
        features: the number of features before the context, at least 1.

    Raises:
        SettingsError: if ``features`` is not a whole number of at least 1.

    Example:
        >>> import torch
        >>> WithoutContext(nn.Identity(), 2)(torch.tensor([[1.0, 2.0, 7.0]]))
        tensor([[1., 2.]])
    """

    def __init__(self, net: nn.Module, features: int) -> None:
        super().__init__()
        self.net, self.features = net, whole("features", features, 1)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.net(rows[..., : self.features])
        return out


class OnSimplex(nn.Module):
    """A network that takes the shares of categories in place of the log-ratios at the start of a row.

    .. math:: f(z, c) = \\mathrm{net}(\\mathrm{softmax}(z_1, \\dots, z_{K-1}, 0), c)

    Args:
        net: a network that takes ``(*batch, K · variables + context)``.
        latents: the number of log-ratios, a multiple of K - 1.
        categories: the number of categories K, at least 2.

    Raises:
        SettingsError: if a setting is out of range.

    References:
        | The Concrete Distribution (Maddison, Mnih & Teh, 2017), https://arxiv.org/abs/1611.00712

    Example:
        >>> import torch
        >>> OnSimplex(nn.Identity(), 2, 3)(torch.tensor([[0.0, 0.0, 7.0]]))  # with the context 7
        tensor([[0.3333, 0.3333, 0.3333, 7.0000]])
    """

    def __init__(self, net: nn.Module, latents: int, categories: int) -> None:
        super().__init__()
        self.net, self.latents, self.categories = net, whole("latents", latents, 1), whole("categories", categories, 2)
        if latents % (categories - 1):
            raise SettingsError(f"latents is {latents}; it must be a multiple of categories - 1, {categories - 1}")

    def forward(self, rows: Tensor) -> Tensor:
        ratios, context = rows[..., : self.latents], rows[..., self.latents :]
        shares = nn.functional.pad(ratios.unflatten(-1, (-1, self.categories - 1)), (0, 1)).softmax(-1)
        out: Tensor = self.net(torch.cat([shares.flatten(-2), context], -1))
        return out


class StandardizedContext(nn.Module):
    """A network that standardizes the context, the last numbers of a row.

    .. math:: f(v, c) = \\mathrm{net}(v, (c - m) / s)

    Args:
        net: a network that takes ``(*batch, features + context)``.
        features: the number of features before the context, at least 0.
        standardize: m and s of each number of the context, such as ``pv.data.mean_and_sd(context)``; it is copied.

    Raises:
        SettingsError: if ``features`` is not a whole number of at least 0.
        ModelError: when called, if a row does not consist of ``features`` numbers and a context.

    Example:
        >>> import torch
        >>> income = Standardize(torch.tensor([60_000.0]), torch.tensor([20_000.0]))
        >>> StandardizedContext(nn.Identity(), 2, income)(torch.tensor([[1.0, 2.0, 70_000.0]]))
        tensor([[1.0000, 2.0000, 0.5000]])
    """

    def __init__(self, net: nn.Module, features: int, standardize: Standardize) -> None:
        super().__init__()
        self.net, self.features = net, whole("features", features, 0)
        self.standardize = copy.deepcopy(standardize)

    def forward(self, rows: Tensor) -> Tensor:
        size = len(self.standardize.center)
        if rows.shape[-1] != self.features + size:
            built = f"{self.features} and " * (self.features > 0) + f"a context of {size}"
            raise ModelError(
                f"the network was given rows of {rows.shape[-1]} numbers and was built for {built}; pass context= of "
                "this size"
            )
        features, context = rows[..., : self.features], rows[..., self.features :]
        out: Tensor = self.net(torch.cat([features, self.standardize(context)], -1))
        return out


class _FlattenBatch(nn.Module):
    """Applies ``body``, which takes ``(batch, *shape)``, to flat rows with any number of batch dimensions.

    Each of the last ``context`` numbers of a row becomes a constant channel of the image.
    """

    def __init__(self, body: nn.Sequential, shape: tuple[int, ...], context: int = 0) -> None:
        super().__init__()
        self.body, self.shape, self.context = body, tuple(shape), context

    def forward(self, rows: Tensor) -> Tensor:
        batch = rows.shape[:-1]
        if rows.shape[-1] != math.prod(self.shape) + self.context:
            built = " × ".join(map(str, self.shape)) + f" + {self.context}" * (self.context > 0)
            raise ModelError(f"the network was given rows of {rows.shape[-1]} numbers and was built for {built}")
        out = self.body(self._to_images(rows.reshape(batch.numel(), rows.shape[-1])))
        return out.unflatten(0, batch) if batch else out.squeeze(0)

    def _to_images(self, rows: Tensor) -> Tensor:
        image = rows[:, : math.prod(self.shape)].unflatten(1, self.shape)
        if not self.context:
            return image
        context = rows[:, -self.context :, None, None].expand(-1, -1, *self.shape[1:])
        return torch.cat([image, context], 1)


def _halvings(image_shape: tuple[int, int, int], times: int) -> list[tuple[int, int]]:
    """The height and width of an image, and after each of ``times`` halvings, rounded up."""
    sizes = [(image_shape[1], image_shape[2])]
    for _ in range(times):
        height, width = sizes[-1]
        sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def _validate_sizes(hidden: Any, *others: int) -> None:
    if not isinstance(hidden, Iterable):
        raise SettingsError(f"hidden is {hidden!r}; it must be a list of sizes, such as [{hidden!r}]")
    for size in (every := [*hidden, *others]):
        whole(f"one of the sizes {every}", size, 1)
