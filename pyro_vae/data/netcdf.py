"""Validate the attributes of the netCDF conventions, which give stored numbers another meaning."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyro_vae.errors import DataError

NAN = ("nan", "NaN", "AAAAAAAA+H8=", "AADAfw==")
"""NaN as text, in JSON, and in base 64 in double and single precision, as xarray writes it."""


def validate_decoded(array: Any, dtype: np.dtype, source: str) -> None:
    """Validate that attributes of the netCDF conventions do not give the numbers of an array another meaning.

    Args:
        array: an array, whose ``attrs`` are read if it has any.
        dtype: its type.
        source: the name of the data, for messages.

    Raises:
        DataError: if it has a scale, an offset, a fill value or another sign.

    Example:
        >>> class Packed(np.ndarray):
        ...     attrs = {"scale_factor": 0.1}
        >>> validate_decoded(np.zeros((2, 2)).view(Packed), np.dtype(float), "data")
        Traceback (most recent call last):
        pyro_vae.errors.DataError: data: the attribute scale_factor is 0.1, so the stored numbers are not the ...
    """
    attributes = getattr(array, "attrs", None)
    attributes = attributes if isinstance(attributes, Mapping) else {}
    absent = NAN if dtype.kind == "f" else ()
    stored = {"i": ("false",), "u": ("true",)}.get(dtype.kind, ("true", "false"))  # the sign of integers as they are
    neutral = {
        "scale_factor": ("1", "1.0"), "add_offset": ("0", "0.0"), "_FillValue": absent, "missing_value": absent,
        "_Unsigned": stored,
    }  # fmt: skip
    for key, harmless in neutral.items():
        value = attributes.get(key)
        if value is None or str(value).strip("[] ") in harmless:
            continue
        shown = " ".join(str(value).split())[:40]
        raise DataError(
            f"{source}: the attribute {key} is {shown}, so the stored numbers are not the values; open it with xarray, "
            "and save the decoded values without encoding"
        )
