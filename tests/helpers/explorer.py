"""What tests of the explorer share: a table with hostile names, a VAE of it, and a reader of the page's numbers."""

import base64
import gzip
import html
import json
import re
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import torch

import pyro_vae as pv
from pyro_vae.data.rows import data_of

HOSTILE = "</script><script>window.taken = 1</script>"
QUOTED = 'a,"b"'


def mixed_table(rows: int = 60) -> pd.DataFrame:
    """Numbers, counts, bits and categories, some of them missing, under names that a page must escape."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(rows, 2))
    table = pd.DataFrame(
        {
            HOSTILE: 3 * z[:, 0] + rng.normal(size=rows),
            QUOTED: 1000 + 50 * z[:, 1] + rng.normal(size=rows),
            "visits": rng.poisson(np.exp(1 + 0.5 * z[:, 0])),
            "smokes": (z[:, 1] > 0).astype(int),
            "colour": np.array(["red", "green", "blue"])[np.clip(np.round(z[:, 0] + 1), 0, 2).astype(int)],
            "site": [f"<b>place {i % 15}</b>" for i in range(rows)],
        },
        index=[f"r{i}" for i in range(rows)],
    )
    table.iloc[::7, 1] = table.iloc[3, 0] = table.iloc[5, 4] = np.nan
    return table


def mixed_data(rows: int = 60) -> pv.data.Data:
    return data_of(mixed_table(rows), label="site", missing=[])


def mixed_vae(data: pv.data.Data, latents: int = 3, seed: int = 0) -> pv.VAE:
    """An untrained VAE with a block of columns for each kind."""
    kinds = pv.likelihoods
    blocks = [(kinds.Normal, 2), (kinds.Poisson, 1), (kinds.Bernoulli, 1), (partial(kinds.Categorical, levels=3), 1)]
    torch.manual_seed(seed)
    return pv.VAE(
        prior=pv.priors.StandardNormal(latents),
        decoder=kinds.Blocks(pv.nn.mlp(latents, [8], kinds.Blocks.outputs(5, blocks=blocks)), blocks),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(5, [8], 2 * latents)),
        standardize=pv.data.mean_and_sd(data),
    )


class Scripts(HTMLParser):
    """The scripts and the visible title of a page, as a browser tells them apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.title = self.inside = ""
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag
        self.sources += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        if self.inside == "title":
            self.title += data


def document_of(page: str) -> Any:
    """Bokeh's document, as JSON."""
    text = next(script for script in Scripts(page).scripts if script.lstrip().startswith("{"))
    (document,) = json.loads(html.unescape(text)).values()
    return document


def given_to(page: str) -> dict[str, Any]:
    """The numbers and words that a page hands its script, and what stands for the models of Bokeh."""
    starts = lambda model: str(model.get("code")).startswith("explorer.start")  # noqa: E731
    found: dict[str, Any] = plain(attributes_where(document_of(page), starts)["args"])
    return found


def menu(page: str, title: str) -> dict[str, Any]:
    """The menu of this title."""
    return attributes_where(document_of(page), lambda model: model.get("title") == title and "options" in model)


def attributes_where(node: Any, holds: Callable[[dict[str, Any]], bool]) -> Any:
    """The attributes of the first model for which something holds, wherever it stands in the document."""
    if isinstance(node, dict):
        attributes = node.get("attributes")
        if isinstance(attributes, dict) and holds(attributes):
            return attributes
        node = list(node.values())
    found = (attributes_where(part, holds) for part in node) if isinstance(node, list) else ()
    return next((part for part in found if part is not None), None)


def plain(node: Any) -> Any:
    """Bokeh's JSON as dicts, lists and arrays."""
    if isinstance(node, list):
        return [plain(part) for part in node]
    if not isinstance(node, dict):
        return node
    kind = node.get("type")
    if kind == "map":
        return {key: plain(value) for key, value in node.get("entries", [])}
    if kind == "ndarray":
        raw = gzip.decompress(base64.b64decode(node["array"]["data"]))
        return np.frombuffer(raw, np.dtype(node["dtype"])).reshape(node["shape"])
    if kind == "number":
        return float(re.sub("^([+-]?)inf$", r"\1inf", node["value"]))
    return {name: plain(value) for name, value in node.items()}
