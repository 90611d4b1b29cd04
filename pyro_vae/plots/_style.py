"""Colours, markers and limits that figures share, and a function to draw an image."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

# Okabe & Ito's colours, which are safe for colour-blind readers, and Tol's ten muted colours for classes.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
CLASSES = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933"]
CLASSES += ["#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777"]
MARKERS = "os^vD*PX<>"

P = ParamSpec("P")
Limits = tuple[float, float]

ESTIMATORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#777777"]


def literal_text(make: Callable[P, Figure]) -> Callable[P, Figure]:
    """Make a function draw texts as they are; matplotlib would parse the column ``$50% or 60%$`` as a formula.

    The labels of logarithmic axes, which are formulas, are written later, when the figure is drawn.
    """

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Figure:
        figure = make(*args, **kwargs)
        for text in figure.findobj(Text):
            if isinstance(text, Text) and "$" in text.get_text():
                text.set_parse_math(False)
        return figure

    return made


def draw_image(axes: Any, row: np.ndarray, image_shape: tuple[int, ...], limits: Limits) -> None:
    """Draw a flat row as a grey image, or as a colour image with channels first."""
    if is_grey(image_shape):
        axes.imshow(row.reshape(image_shape[-2:]), cmap="gray_r", vmin=limits[0], vmax=limits[1])
    else:
        low, high = limits
        image = row.reshape(image_shape)
        axes.imshow(np.clip((image - low) / ((high - low) or 1.0), 0, 1).transpose(1, 2, 0))


def is_grey(image_shape: tuple[int, ...]) -> bool:
    """Return whether an image is grey."""
    return len(image_shape) == 2 or image_shape[0] == 1


def describe_limits(image_shape: tuple[int, ...], limits: Limits) -> str:
    """Describe the colour scale of an image."""
    low, high = f"{limits[0]:.3g}", f"{limits[1]:.3g}"
    if is_grey(image_shape):
        return f"grey level from {low} (white) to {high} (black)"
    return f"colours from {low} (dark) to {high} (light)"
