"""Resolve references to the package's own names by their last part; leave names of other libraries without a link."""

import importlib
import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

OUTSIDE = re.compile(
    r"(torch|pyro|numpy|np|xr|xarray|pandas|pd|matplotlib|rich|sklearn|scipy|arviz|joblib|pathlib|collections|typing|abc|"
    r"nn|dist|Figure|Module|Trained|Amortized|tuple\[int)\b"
)
"""Names of other libraries that are in no inventory, and of types without a page."""


SHORT = {
    "torch.fx.graph_module.GraphModule": "torch.fx.GraphModule",
    "torch.nn.modules.container.Sequential": "torch.nn.Sequential",
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
    "pyro.infer.tracegraph_elbo.Trace_ELBO": "pyro.infer.trace_elbo.Trace_ELBO",
    "pyro.poutine.trace_struct.Trace": "pyro.poutine.Trace",
    "numpy.random.mtrand.RandomState": "numpy.random.RandomState",
    "pd.DataFrame": "pandas.DataFrame",
    "xarray.core.dataset.Dataset": "xarray.Dataset",
    "xarray.core.datatree.DataTree": "xarray.DataTree",
    "Figure": "matplotlib.figure.Figure",
    "Module": "torch.nn.Module",
    "Tensor": "torch.Tensor",
}
"""Names of other libraries as annotations give them, and as their sites list them."""


def use_public_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement) -> None:
    """Change a reference to another library to the name that intersphinx finds."""
    if node.get("refdomain") == "py":
        node["reftarget"] = SHORT.get(node["reftarget"], node["reftarget"])


def is_importable(target: str) -> bool:
    """Whether a dotted name leads to an object of the package."""
    for cut in range(target.count("."), 0, -1):
        parts = target.split(".")
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def documented_as(target: str, kind: str, objects: Any, current: str) -> str | None:
    """The documented name that ends like the reference, in the current module where there are several."""
    last, dots = target.rpartition(".")[2], 3 if kind in ("meth", "attr") else 2
    found = [name for name in objects if name.rpartition(".")[2] == last and name.count(".") <= dots]
    return min(found, key=lambda name: (not name.startswith(f"{current}."), name), default=None)


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.TextElement) -> Any:
    """Find the page of a name; show a name of another library, or an internal one that exists, without a link."""
    if node.get("refdomain") != "py":
        return None
    target, kind = node["reftarget"], node["reftype"]
    if kind == "mod":
        page, place = f"api/{target.removeprefix('pyro_vae.').replace('callbacks', 'train')}", ""
        name = target if page in env.found_docs else None
    else:
        objects = env.domains["py"].objects
        ours = target.startswith("pyro_vae.") or "." not in target
        name = documented_as(target, kind, objects, node.get("py:module") or "") if ours else None
        page, place = (objects[name].docname, f"#{objects[name].node_id}") if name else ("", "")
    if name:
        uri = app.builder.get_relative_uri(node["refdoc"], page) + place
        return nodes.reference("", "", text, internal=True, refuri=uri, reftitle=name)
    exists = is_importable(target) if target.startswith("pyro_vae.") else OUTSIDE.match(target)
    return text if exists else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", use_public_name, priority=400)  # intersphinx comes at 500
    app.connect("missing-reference", resolve, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
