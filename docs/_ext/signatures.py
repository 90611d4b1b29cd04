"""Show the arguments of a class's constructor; autodoc would show those of a base class's ``__new__``."""

from typing import Any

from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature


def of_constructor(app: Sphinx, what: str, name: str, of: Any, options: Any, shown: str | None, _: Any) -> Any:
    """Return the signature of ``__init__`` in place of ``(*args, **kwargs)``."""
    if what != "class" or shown is None or not shown.startswith("(*args"):
        return None
    return stringify_signature(signature(of.__init__, bound_method=True), show_return_annotation=False), None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-signature", of_constructor)
    return {"parallel_read_safe": True}
