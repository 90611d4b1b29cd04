"""Take an estimator as users give it: an instance, a class or a function."""

import inspect
from typing import Any

from pyro.infer import ELBO

from pyro_vae import elbo as estimators
from pyro_vae.core.traces import Loss
from pyro_vae.errors import SettingsError, did_you_mean


def as_estimator(given: Any, name: str = "elbo") -> Loss:
    """Return the estimator that is given, made with its defaults where that is a class.

    Args:
        given: an estimator, the class of one, or a function of (model, guide, ...).
        name: of the setting, for messages.

    Raises:
        SettingsError: if it is none of these, or a class whose settings have no defaults.

    Example:
        >>> import pyro_vae as pv
        >>> as_estimator(pv.elbo.IWAE), as_estimator(pv.elbo.IWAE(8))
        (IWAE(1), IWAE(8))
    """
    if isinstance(given, type) and issubclass(given, ELBO):
        try:
            made: ELBO = given()
        except TypeError as error:
            raise SettingsError(f"{name} is a class that needs settings ({error}); give an instance of it") from error
        return made
    if callable(given) and not isinstance(given, type):
        return given
    names = [each for each in estimators.__all__ if _is_made(getattr(estimators, each))]
    meant = did_you_mean(given, names) if isinstance(given, str) else ""
    asked = f"did you mean {name}=pyro_vae.elbo.{meant}()?" if meant else f"give one, as {name}=pyro_vae.elbo.ELBO();"
    raise SettingsError(f"{name} is {given!r}; {asked} pyro_vae.elbo has {', '.join(names)}")


def _is_made(member: Any) -> bool:
    """Whether a member of the package is a class of estimators, and no base of them."""
    return isinstance(member, type) and issubclass(member, ELBO) and not inspect.isabstract(member)
