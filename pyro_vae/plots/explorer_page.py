"""Draw the explorer page with Bokeh: figures, tables, menus and buttons."""

from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_vae.core.format import format_estimate
from pyro_vae.data.context import context_names
from pyro_vae.errors import SettingsError
from pyro_vae.evidence.psis import BAD
from pyro_vae.plots._style import BLUE, CLASSES, GREY, ORANGE, describe_limits

if TYPE_CHECKING:
    from pyro_vae.plots.explorer import Explored

SCRIPT = Path(__file__).with_name("explorer.js")

MARKERS = {
    "circle": "●", "square": "■", "triangle": "▲", "inverted_triangle": "▼", "diamond": "◆", "star": "★", "hex": "⬢",
    "plus": "✚", "square_pin": "✦", "triangle_pin": "△",
}  # fmt: skip
"""Bokeh's markers for classes, and the characters that represent them in the legend."""

TITLES = {"khat": "k̂", "ess": "effective sample size", "log_px": "log p(x) (nats)", "gap": "gap log p(x) − ELBO (nats)"}
SHORT = {"khat": "k̂", "ess": "ESS", "log_px": "log p(x)", "gap": "gap"}

HELP = (
    "Click a row to compare it with the model. Click an empty place to decode it. Drag to select rows; scroll to zoom."
)

GAP = (
    "The gap log p(x) − ELBO is the KL divergence from q(z|x) to the posterior. The page does not split it into "
    "approximation and amortization gaps, which takes minutes (pv.inference_gaps)"
)

STYLE = "body { font: 15px/1.45 system-ui, sans-serif; margin: 1rem 1.5rem; color: #1a1a1a; background: #fff; }"
TABLE_STYLE = """
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: 3px 8px; border-bottom: 1px solid #ddd; } th { border-bottom: 2px solid #888; }
"""

Choice = dict[str, Any]
"""An axis or colour: ``name``, ``title``, ``values`` (or ``array`` and ``column``), and ``classes`` of codes."""


def validate_bokeh() -> None:
    """Raise a SettingsError if Bokeh is not installed."""
    if find_spec("bokeh") is None:
        raise SettingsError("the explorer needs Bokeh; run: pip install 'pyro-vae[explore]'")


def draw_page(explored: "Explored", title: str) -> str:
    """Draw the page as the text of an HTML file.

    Args:
        explored: the contents of the page.
        title: title of the page.
    """
    from bokeh.document import Document
    from bokeh.embed import file_html
    from bokeh.models import CustomJS
    from bokeh.resources import INLINE

    choices = list_choices(explored)
    models, root = _lay_out(explored, choices, title)
    document = Document()
    document.add_root(root)
    arguments = {**models, **_arrays(explored, choices)}
    document.js_on_event("document_ready", CustomJS(args=arguments, code=f"explorer.start({{{', '.join(arguments)}}})"))
    script = f"<style>{STYLE}</style>\n<script>\n{SCRIPT.read_text(encoding='utf-8')}</script>"
    page: str = file_html(document, INLINE, title=title, template=f"{{% block postamble %}}{script}{{% endblock %}}")
    return page


def list_choices(explored: "Explored") -> list[Choice]:
    """List the choices of axes and colours: directions, scores, label, columns and context.

    Args:
        explored: the contents of the page.
    """
    directions: list[Choice] = [
        {
            "name": line.name, "title": line.title, "values": np.float32(line.of(explored.latents)),
            "direction": line.direction, "offset": line.offset,
        }
        for line in explored.directions
    ]  # fmt: skip
    scores = [
        {"name": SHORT[name], "title": title, "values": np.float32(explored.scores[name].values)}
        for name, title in TITLES.items()
    ]
    return [*directions, *scores, *_input_choices(explored)]


def _input_choices(explored: "Explored") -> list[Choice]:
    """List the inputs of each row: label, columns (unless they are pixels) and context."""
    data, categories = explored.data, explored.names.categories
    found = [] if data.labels is None else [_label(data.labels.cpu().numpy(), data.label_names)]
    if data.image_shape is None:
        found += [
            {"name": name, "title": name, "array": "x", "column": i, "classes": _as_strings(categories.get(name))}
            for i, name in enumerate(explored.columns)
        ]
    return found + [
        {"name": name, "title": f"{name} (context)", "array": "context", "column": i}
        for i, name in enumerate(_context_columns(explored))
    ]


def _label(labels: np.ndarray, names: Any) -> Choice:
    known, codes = np.unique(labels, return_inverse=True)
    classes = [str(one) if names is None else str(names[int(one)]) for one in known]
    return {"name": "label", "title": "label", "values": np.float32(codes), "classes": classes}


def _labels(explored: "Explored") -> list[str]:
    """Return the label of each row; empty strings if there are no labels."""
    data = explored.data
    if data.labels is None:
        return [""] * len(data.x)
    label = _label(data.labels.cpu().numpy(), data.label_names)
    return [label["classes"][int(code)] for code in label["values"]]


def _as_strings(names: Any) -> list[str] | None:
    return None if names is None else [*map(str, names)]


def _context_columns(explored: "Explored") -> list[str]:
    data = explored.data
    width = 0 if data.context is None else data.context.shape[1]
    named = context_names(data.context_columns or [], data.categories)
    return named if len(named) == width else [f"c{i}" for i in range(width)]


def _arrays(explored: "Explored", choices: list[Choice]) -> dict[str, Any]:
    """Return the arrays and texts of the page, all but Bokeh's models."""
    data, built = explored.data, explored.rebuilt
    own = (data.x if data.exact is None else data.exact).flatten(1).cpu().numpy()
    if data.mask is not None:
        own = np.where(data.mask.flatten(1).cpu().numpy(), own, np.nan)
    mean, shape = built.x.values, data.image_shape
    limits = (float(np.nanmin(own)), float(np.nanmax(own)))
    own, mean = (own, mean.astype(np.float32)) if shape is None else (_as_bytes(own, limits), _as_bytes(mean, limits))
    probability = built.x_probability.values.astype(np.float32) if "x_probability" in built else None
    grid = explored.grid
    stored = grid and {
        "axes": grid.axes, "places": grid.places,
        "decoded": np.float32(grid.decoded) if shape is None else _as_bytes(grid.decoded, limits),
    }  # fmt: skip
    return {
        "choices": choices,
        "download_columns": _download(explored),
        "words": _words(explored),
        "sentences": _sentences(explored),
        "x": own,
        "mean": mean,
        "sd": None if shape else built.x_sd.values.astype(np.float32),
        "probability": None if shape else probability,
        "context": None if data.context is None else data.context.cpu().numpy(),
        "columns": [
            {"name": name, "classes": _as_strings(explored.names.categories.get(name))} for name in explored.columns
        ] if shape is None else [],
        "spread": None if shape else _spread(own),
        "middle": explored.latents.mean(0),
        "decoder": explored.decoder,
        "grid": stored,
        "image_shape": shape and [*((1, *shape) if len(shape) == 2 else shape)],
        "limits": limits,
        "palette": CLASSES,
        "markers": [*MARKERS],
        "signs": [*MARKERS.values()],
        "scale": _scale(),
        "missing": "#cccccc",
    }  # fmt: skip


def _as_bytes(values: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Quantize values to 256 levels between the limits."""
    low, high = limits
    steps = 255 * (np.nan_to_num(values, nan=low) - low) / ((high - low) or 1.0)
    levels: np.ndarray = steps.round().clip(0, 255).astype(np.uint8)
    return levels


def _spread(own: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean and standard deviation of the observed values of each column; 0 and 0 if there are none."""
    seen = ~np.isnan(own)
    count = np.maximum(seen.sum(0), 1)
    center = np.where(seen, own, 0.0).sum(0, dtype=float) / count
    unit = np.sqrt((np.where(seen, own - center, 0.0) ** 2).sum(0) / count)
    return {"center": center, "unit": unit}


def _scale() -> list[str]:
    from bokeh.palettes import Cividis256

    return [*Cividis256]


def _words(explored: "Explored") -> list[str]:
    """Describe each row: its name, label and scores with standard errors."""
    scores, words = explored.scores, []
    for i, (name, label) in enumerate(zip(scores.datum.values, _labels(explored), strict=True)):
        head = f"Row {name}" + f", label {label}" * bool(label)
        texts = {n: format_estimate(scores[n].values[i], scores[f"{n}_se"].values[i], over="") for n in SHORT}
        lines = [
            head,
            f"log p(x): {texts['log_px']} nats. Gap log p(x) − ELBO: {texts['gap']} nats.",
            f"k̂: {texts['khat']}. Effective sample size: {texts['ess']} of {scores.attrs['num_particles']} draws.",
            "(± one standard error, over draws of z)",
        ]
        if scores.khat.values[i] > BAD:
            lines.append(f"k̂ is above {BAD}: log p(x) is underestimated, and its standard error is unreliable.")
        words.append("\n".join(lines))
    return words


def _sentences(explored: "Explored") -> dict[str, str]:
    has_context = explored.data.context is not None
    grid = explored.grid
    spanned = "" if grid is None else " and ".join(explored.directions[i].name for i in grid.axes)
    decoded = "In all other directions, z is the mean over the rows." if explored.latents.shape[1] > 1 else ""
    if grid is not None:
        decoded += f" The page shows the nearest of {len(grid.places)} points that were decoded in advance."
    if has_context:
        decoded += " The context is that of the " + ("row shown last." if grid is None else "first row.")
    return {
        "decoded": decoded,
        "no_latent": "Cannot decode here, since neither axis is a latent. Choose a component or a latent as an axis.",
        "no_grid": f"Only points along {spanned} were decoded; choose these axes.",
    }


def _download(explored: "Explored") -> list[Choice]:
    """Return the columns of the CSV file, with unique names: inputs, latents and scores."""
    latents = [{"name": f"z{i}", "values": np.float32(values)} for i, values in enumerate(explored.latents.T)]
    scores = [
        {"name": name, "values": np.float32(explored.scores[name].values)}
        for own in SHORT
        for name in (own, f"{own}_se")
    ]
    taken, found = {"row"}, []
    for choice in [*_input_choices(explored), *latents, *scores]:
        name = choice["name"]
        while name in taken:
            name += "_"
        taken.add(name)
        found.append({**choice, "name": name})
    return found


def _lay_out(explored: "Explored", choices: list[Choice], title: str) -> tuple[dict[str, Any], Any]:
    """Return the models that the script updates, by name, and the layout that contains them."""
    from bokeh.layouts import column, row
    from bokeh.models import Button, CustomJS, Div, Select

    models, figure = _latent_space(explored, choices)
    every = [(str(i), choice["name"]) for i, choice in enumerate(choices)]
    axes = [option for option, choice in zip(every, choices, strict=True) if not choice.get("classes")]
    first = len(explored.directions)
    other = "1" if first > 1 else next((value for value, _ in axes if int(value) >= first + len(SHORT)), str(first + 2))
    colour = str(first + len(SHORT)) if explored.data.labels is not None else str(first)
    menus = {
        "x_axis": Select(title="horizontal axis", options=axes, value="0", width=200),
        "y_axis": Select(title="vertical axis", options=axes, value=other, width=200),
        "colour": Select(title="colour", options=every, value=colour, width=200),
    }
    for name, action in {"x_axis": "place", "y_axis": "place", "colour": "colour"}.items():
        menus[name].js_on_change("value", CustomJS(code=f"explorer.{action}()"))
    download = Button(label="Download rows (CSV)", width=300)
    download.js_on_event("button_click", CustomJS(code="explorer.download()"))
    legend = Div(text="", width=640, styles={"font-size": "14px"})
    about = Div(
        text="", width=550, min_height=110, render_as_text=True, styles={"white-space": "pre-wrap", "font-size": "14px"}
    )  # fmt: skip
    beside, shown = _pictures(explored) if explored.data.image_shape else _columns(explored)
    root = column(
        Div(text=_head(explored, title), width=1190, styles={"font-size": "14px"}),
        row(
            column(row(*menus.values()), figure, legend, download),
            column(about, shown, width=560),
        ),
    )  # fmt: skip
    return {**models, **menus, **beside, "legend": legend, "about": about, "download": download}, root


def _head(explored: "Explored", title: str) -> str:
    data = explored.data
    notes = [
        f"{len(data.x)} rows of {data.source}" if not explored.notes else f"Rows of {data.source}",
        *explored.notes,
    ]
    sentences = [*(f"{note[0].upper()}{note[1:]}." for note in notes), HELP, f"{GAP}."]
    return f"<h1 style='margin:0;font-size:24px'>{escape(title)}</h1><p>{escape(' '.join(sentences))}</p>"


def _latent_space(explored: "Explored", choices: list[Choice]) -> tuple[dict[str, Any], Any]:
    """Draw the latent space."""
    from bokeh.models import BasicTicker, ColorBar, ColumnDataSource, CustomJS, HoverTool, LinearColorMapper
    from bokeh.plotting import figure

    number = len(explored.data.x)
    rows = ColumnDataSource(
        {
            "x": np.zeros(number), "y": np.zeros(number), "fill": ["#777777"] * number, "marker": ["circle"] * number,
            "row": [*map(str, explored.scores.datum.values)], "label": _labels(explored),
        }
    )  # fmt: skip
    view = figure(width=640, height=560, tools="box_select,lasso_select,pan,wheel_zoom,reset,save")
    points = view.scatter(
        "x", "y", source=rows, marker={"field": "marker"}, fill_color={"field": "fill"}, line_color="#333333",
        line_width=0.5, size=9, fill_alpha=0.85, nonselection_fill_alpha=0.2, nonselection_line_alpha=0.2,
    )  # fmt: skip
    mark = ColumnDataSource({"x": [], "y": []})
    spot = view.scatter("x", "y", source=mark, size=20, fill_alpha=0, line_color="black", line_width=3)
    view.x_range.renderers = view.y_range.renderers = [points]
    view.add_tools(HoverTool(renderers=[points], tooltips=[("row", "@row"), ("label", "@label")]))
    view.toolbar.logo = None
    view.toolbar.active_drag = view.toolbar.tools[0]
    view.axis.axis_label_text_font_size = "14px"
    bar = ColorBar(color_mapper=LinearColorMapper(_scale(), low=0, high=1), ticker=BasicTicker(), visible=False)
    view.add_layout(bar, "right")
    view.js_on_event("tap", CustomJS(code="explorer.click(cb_obj.x, cb_obj.y)"))
    rows.selected.js_on_change("indices", CustomJS(code="explorer.count()"))
    return {"rows": rows, "figure": view, "mark": mark, "mark_glyph": spot.glyph, "bar": bar}, view


def _pictures(explored: "Explored") -> tuple[dict[str, Any], Any]:
    """Draw two images side by side: a row and the output of the decoder."""
    from bokeh.layouts import column, row
    from bokeh.models import ColumnDataSource, Div
    from bokeh.plotting import figure

    shape = explored.data.image_shape or ()
    height, width = shape[-2:]
    models: dict[str, Any] = {}
    views = []
    for name in ("left", "right"):
        source = ColumnDataSource({"image": [np.zeros((height, width), np.uint32)]})
        view = figure(
            width=270, height=round(240 * height / width) + 50, title=" ", toolbar_location=None, tools="",
            x_range=(0, width), y_range=(0, height),
        )  # fmt: skip
        view.image_rgba("image", x=0, y=0, dw=width, dh=height, source=source)
        view.grid.visible = view.axis.visible = False
        models |= {name: view, f"{name}_source": source}
        views.append(view)
    values = explored.data.x
    caption = describe_limits(shape, (values.min().item(), values.max().item()))
    return models, column(row(*views), Div(text=escape(f"{caption[0].upper()}{caption[1:]}.")))


def _columns(explored: "Explored") -> tuple[dict[str, Any], Any]:
    """Compare the columns of a row with the model: a plot in standardized units and a table in units of the data."""
    from bokeh.layouts import column
    from bokeh.models import ColumnDataSource, Div, FactorRange
    from bokeh.plotting import figure

    beside = ColumnDataSource({name: [] for name in ("column", "own", "mean", "low", "high")})
    numbers = sum(name not in explored.names.categories for name in explored.columns)
    view = figure(
        width=550, height=110 + 22 * max(3, min(numbers, 40)), y_range=FactorRange(), toolbar_location=None, tools="",
        x_axis_label="standardized value (mean 0, sd 1 over the rows)",
    )  # fmt: skip
    view.segment("low", "column", "high", "column", source=beside, color=BLUE, line_width=5, alpha=0.4,
                 legend_label="model: mean ± sd of x")  # fmt: skip
    view.scatter("mean", "column", source=beside, color=BLUE, size=8, legend_label="model: mean ± sd of x")
    view.scatter("own", "column", source=beside, color=ORANGE, marker="diamond", size=13, legend_label="the row")
    view.add_layout(view.legend[0], "above")
    view.legend.orientation = "horizontal"
    view.ygrid.grid_line_color = GREY
    view.ygrid.grid_line_alpha = 0.2
    table = Div(
        text="", width=550, max_height=420, styles={"overflow-y": "auto"}, stylesheets=[TABLE_STYLE],
    )  # fmt: skip
    parts = [view, table] if numbers else [table]
    return {"beside": beside, "beside_figure": view, "table": table}, column(*parts)
