"""Settings stored in double precision, so that converting a module rounds them only once."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class GivenNumbers(nn.Module):
    """A module whose parameters or buffers are initialized with numbers from the user.

    ``module.double()`` of torch converts numbers that were rounded to single precision: a scale of 0.37 becomes
    0.370000004768. Here a tensor that still equals the user's number is rounded from that number again, so the scale
    is 0.37 after ``.double()``. A tensor that was trained, loaded or changed is converted as in torch.

    Example:
        >>> class Scaled(GivenNumbers):
        ...     def __init__(self, scale):
        ...         super().__init__()
        ...         self.register_buffer("scale", self.keep("scale", torch.tensor(scale, dtype=torch.float64)))
        >>> Scaled(0.37).scale.dtype, Scaled(0.37).double().scale.item()
        (torch.float32, 0.37)
    """

    def keep(self, name: str, number: Tensor) -> Tensor:
        """Store the number that initializes a tensor.

        Args:
            name: the name of the parameter or buffer.
            number: the number in double precision.

        Returns:
            The number in torch's default precision.
        """
        vars(self).setdefault("_given", {})[name] = number
        return number.to(torch.get_default_dtype(), copy=True)

    def given(self, name: str) -> Tensor:
        """Return the stored number in double precision, or the tensor itself if it was changed since."""
        tensor: Tensor = getattr(self, name).detach()
        kept = vars(self).get("_given", {}).get(name)
        return tensor if kept is None or not _holds(tensor, kept) else kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Convert parameters and buffers; torch calls this for each change of precision or device."""
        given: dict[str, Tensor] = vars(self).get("_given", {})
        before = {name: getattr(self, name).dtype for name in given}
        untouched = [name for name, number in given.items() if _holds(getattr(self, name), number)]
        super()._apply(fn, recurse)
        with torch.no_grad():
            for name in untouched:
                if (tensor := getattr(self, name)).dtype != before[name]:
                    tensor.copy_(given[name])
        return self


def _holds(tensor: Any, number: Tensor) -> bool:
    """Return whether a tensor equals a number rounded to the tensor's precision."""
    if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.shape != number.shape:
        return False
    return torch.equal(tensor.detach().cpu(), number.to(tensor.dtype))
