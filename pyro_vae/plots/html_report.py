"""Write a report as a self-contained HTML file, without scripts or network access."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import xarray as xr
from matplotlib.figure import Figure

from pyro_vae import plots
from pyro_vae.core.finding import Finding
from pyro_vae.diagnose import DIAGNOSTICS
from pyro_vae.diagnose.check import conclusion, findings

REPLICATED = {"Each statistic of the data (line) and of replicated data sets.": plots.predictive_check}
FIGURES: dict[str, dict[str, Callable[..., Figure]]] = {
    "khat": {"Pareto k̂ and effective sample size of each datum; the worst data are labelled.": plots.khat},
    "evidence": {},
    "overfitting": {},
    "baseline": {"Differences of log p(x) and the ELBO from each baseline.": plots.estimates},
    "reconstructions": {"Coverage of the latents of reconstructions by the central intervals of q.": plots.coverage},
    "sbc": {
        "ECDF of the ranks minus uniform, with the band of an exact q.": plots.sbc,
        "Coverage of the true latents by the central intervals of q.": plots.coverage,
    },
    "predictive_check": REPLICATED,
    "prior_check": REPLICATED,
    "collapse": {"KL of each latent, and decomposition of the mean KL.": plots.collapse},
    "converged": {"ELBO during training, and its trend at the end.": plots.converged},
    "gaps": {"Inference gaps: the means, and those of each datum.": plots.gaps},
    "nuts": {"Marginals of q and of NUTS.": plots.nuts},
}
"""The figures of each diagnostic, by caption; other diagnostics get the figure of `plots.estimates`."""

SIGNS = {"fine": "✓ fine", "doubtful": "? doubtful", "bad": "✗ bad"}

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; vertical-align: top; padding: .4rem .7rem;
  border-bottom: 1px solid #ddd; } th { border-bottom: 2px solid #888; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #444; }
.fine { color: #00664b; } .doubtful { color: #8a5a00; } .bad { color: #a33b00; }
.level { font-weight: 600; white-space: nowrap; } .about { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        title: its heading.
        finding: the finding, or None for a section of figures alone.
        figures: the figures, by caption.
    """

    title: str
    finding: Finding | None
    figures: Mapping[str, Figure]


def report(
    title: str,
    verdict: str,
    sections: Sequence[Section],
    about: Mapping[str, object],
    head: Mapping[str, object] | None = None,
) -> str:
    """Write the whole report as HTML.

    Args:
        title: the title of the report.
        verdict: the conclusion, a sentence or two.
        sections: the sections, in order.
        about: versions and sizes, shown at the end.
        head: the model, data, rows, seed and commands, shown at the top.

    Example:
        >>> page = report("a < b", "All is fine.", [Section("One", Finding("one", "fine", "x"), {})], {"seed": 0})
        >>> "a &lt; b" in page, "<script" in page
        (True, False)
    """
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            _about(head or {}),
            f"<p>{escape(verdict)}</p>",
            _summary([section.finding for section in sections if section.finding]),
            *map(_section, sections),
            "<h2>Settings and versions</h2>",
            _about(about),
            "</body>\n</html>\n",
        ]
    )


def _summary(findings: Iterable[Finding]) -> str:
    rows = "\n".join(
        f'<tr><td class="level {f.level}">{SIGNS[f.level]}</td><td>{escape(f.about)}</td>'
        f"<td>{escape(f.why)}</td><td>{escape(f.next)}</td></tr>"
        for f in findings
    )
    return f"<table>\n<tr><th>level</th><th>diagnostic</th><th>finding</th><th>next step</th></tr>\n{rows}\n</table>"


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.finding:
        level, why = section.finding.level, section.finding.why
        parts.append(f'<p><span class="level {level}">{SIGNS[level]}</span>: {escape(why)}.</p>')
        parts += [f"<p>Next: {escape(section.finding.next)}</p>"] if section.finding.next else []
    for caption, figure in section.figures.items():
        picture = f'<img alt="{escape(caption)}" src="data:image/png;base64,{_png(figure)}">'
        parts.append(f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>")
    return "\n".join(parts)


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _about(about: Mapping[str, object]) -> str:
    rows = "\n".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in about.items())
    return f'<table class="about">\n{rows}\n</table>'


def as_html(
    tree: xr.DataTree,
    title: str,
    *,
    image_shape: tuple[int, ...] | None = None,
    head: Mapping[str, object] | None = None,
) -> str:
    """Write the report of a check as HTML, with the findings, the figures and the settings.

    Args:
        tree: from :func:`check`.
        title: the title of the report.
        image_shape: ``(height, width)`` if a row is an image, ``(3, height, width)`` for colours.
        head: further entries at the top, after the model, the number of data and the seed, such as the file of the
            data, its rows and the commands.

    Returns:
        The text of the file, which has no script and needs no network.

    Example:
        >>> import torch, pyro_vae as pv
        >>> linear = pv.exact.LinearGaussian(torch.ones(5, 2), torch.zeros(5), 0.5)
        >>> tree = pv.check(linear.as_vae(), linear.sample(9), gold=0, draws=4, budget=1e-9)
        Verdict: ...
        >>> as_html(tree, "Mine")[:15]
        '<!doctype html>'
    """
    attributes = {str(name): value for name, value in tree["findings"].attrs.items()}
    first = {name: attributes[name] for name in ("model", "data", "seed") if name in attributes} | dict(head or {})
    about = {name: value for name, value in attributes.items() if name not in ("left_out", "trained_on", *first)}
    return report(title, conclusion(tree), _sections(tree, image_shape), about, first)


def _sections(tree: xr.DataTree, image_shape: tuple[int, ...] | None) -> list[Section]:
    titles = {diagnostic.name: diagnostic.about for diagnostic in DIAGNOSTICS}
    groups = tree["findings"].group.values.tolist()
    return [
        Section(titles[name], finding, _figures(name, tree[name].to_dataset(), tree, image_shape))
        for name, finding in zip(groups, findings(tree), strict=True)
        if name in tree.children
    ]


def _figures(name: str, found: xr.Dataset, tree: xr.DataTree, image_shape: tuple[int, ...] | None) -> dict[str, Figure]:
    """Draw the figures of a diagnostic, by caption."""
    if name not in FIGURES:
        return {"Each estimate with two standard errors.": plots.estimates(found)} if plots.with_errors(found) else {}
    images: dict[str, Any] = {}
    if name == "khat" and image_shape:
        images = {"x": tree["observed_data"].x.values, "image_shape": image_shape}
    return {caption: draw(found, **images) for caption, draw in FIGURES[name].items()}
