"""Inspect the classes and partials that make components: their class, and the width of the network they need."""

from functools import partial
from inspect import signature
from typing import Any

from pyro_vae.likelihoods import Normal

learned_normal = partial(Normal, scale=0.5, learn_scale=True)
"""The default likelihood; the units of the data are unknown, so its scale is learned."""


def class_of(maker: Any) -> Any:
    """Return the class that a maker calls.

    Example:
        >>> class_of(learned_normal).__name__
        'Normal'
    """
    return maker.func if isinstance(maker, partial) else maker


def count_outputs(maker: Any, size: int, *, cls: Any = None) -> int:
    """Count the outputs that a component needs from its network.

    Args:
        maker: a class of priors, likelihoods or posteriors, or a partial of one, whose arguments may change the number.
        size: the number of features or latents that the component describes.
        cls: the class that the maker calls, if the maker is neither a class nor a partial.

    Example:
        >>> from pyro_vae.likelihoods import Categorical
        >>> count_outputs(learned_normal, 3), count_outputs(partial(Categorical, levels=4), 3)
        (3, 12)
    """
    outputs = (cls or class_of(maker)).outputs
    given = maker.keywords if isinstance(maker, partial) else {}
    known = signature(outputs).parameters
    number: int = outputs(size, **{name: value for name, value in given.items() if name in known})
    return number
