"""What a benchmark leaves: JSON with the machine and all repeats, a table, and a figure."""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

BASE = "ours, compiled"
PACKAGES = ("pyro-vae", "torch", "pyro-ppl", "numpyro", "jax", "pythae", "numpy")


def machine() -> dict[str, Any]:
    """The processor, the versions and the date; no name of a host."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": _processor(),
        "cores": _cores(),
        "gpu": _gpu(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _processor() -> str:
    """As Linux tells it: vendor and model name with its family and model numbers, which say the generation."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
    facts = {key.strip(): value.strip() for key, value in reversed(lines)}
    return f"{facts.get('model name', 'unknown')} (family {facts.get('cpu family')}, model {facts.get('model')})"


def _cores() -> int:
    import os

    return os.cpu_count() or 1


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(race: dict[str, Any]) -> str:
    """The medians of one race, the ratios to ours, and the objectives after the last pass."""
    floor = race["floor"]
    lines = [
        f"{race['case']['name']}, {race['threads']} thread(s)",
        f"  floor: {floor['products']} matrix products of {floor['flops_per_step'] / 1e6:.0f} MFLOP, "
        f"{floor['milliseconds_floor']:.3f} ms, each timed alone",
    ]
    if "bytes_per_step" in floor:
        lines.append(
            f"  a launch in a CUDA graph: {1e3 * floor['milliseconds_per_launch']:.1f} µs; "
            f"bytes of Adam and the batch: {floor['bytes_per_step'] / 1e6:.1f} MB, "
            f"{1e3 * floor['milliseconds_of_bytes']:.1f} µs"
        )
    for name, result in race["contestants"].items():
        if "left_out" in result:
            lines.append(f"  {name:32s} left out: {result['left_out']}")
            continue
        low, high = min(result["all_milliseconds"]), max(result["all_milliseconds"])
        lines.append(
            f"  {name:32s} {result['milliseconds_per_step']:9.3f} ms/step ({low:.3f} to {high:.3f})  "
            f"{result.get('times_ours', float('nan')):6.2f} × ours  "
            f"{result['times_floor']:6.2f} × floor  ELBO {result['elbo'][-1]:9.3f} nats/datum  "
            f"first pass after {result['seconds_to_first_pass']:.1f} s"
        )
    return "\n".join(lines)


def figure(races: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds per step of every contestant, one panel per race."""
    from matplotlib.figure import Figure

    columns = min(2, len(races))
    rows = -(-len(races) // columns)
    drawing = Figure(figsize=(6.5 * columns, 2.8 * rows + 0.3), layout="constrained")
    panels = list(drawing.subplots(rows, columns, squeeze=False).flat)
    for axes, race in zip(panels, races, strict=False):
        _race(axes, race)
    for axes in panels[len(races) :]:
        axes.set_axis_off()
    drawing.legend(*drawing.axes[0].get_legend_handles_labels(), loc="outside lower center", fontsize=8)
    drawing.savefig(path, dpi=110)


def _race(axes: Any, race: dict[str, Any]) -> None:
    named = {n: r for n, r in race["contestants"].items() if "left_out" not in r}
    times = [result["milliseconds_per_step"] for result in named.values()]
    colours = ["#D55E00" if name == BASE else "#0072B2" for name in named]
    bars = axes.barh(list(named), times, color=colours)
    ratios = [f"{r['milliseconds_per_step']:.3g} ms, {r.get('times_ours', 1):.2f} × ours" for r in named.values()]
    axes.bar_label(bars, ratios, padding=3, fontsize=8, bbox={"facecolor": "#FFFFFF", "edgecolor": "none", "pad": 0.5})
    floor = race["floor"]["milliseconds_floor"]
    label = "the step's matrix products alone"
    axes.axvline(floor, color="#000000", linestyle=":", label=label)
    cores = f"{race['threads']} core{'s' * (race['threads'] > 1)}" if "bytes_per_step" not in race["floor"] else _gpu()
    axes.set(xlabel="ms per step, median", xlim=(0, 1.4 * max(times)))
    axes.set_title(f"{race['case']['name']}, {cores}", fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)


def growth_figure(results: dict[str, Any], path: Path) -> None:
    """Time and memory against rows, particles and latents."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    drawing = Figure(figsize=(12, 5.5), layout="constrained")
    panels = drawing.subplots(2, 3, sharex="col")
    for column, name in enumerate(("rows", "particles", "latents")):
        found = [result for result in results[name] if "failed" not in result]
        at = [result[name] for result in found]
        panels[0, column].loglog(at, [r["milliseconds_per_step"] for r in found], "o-", color="#D55E00")
        panels[0, column].set(title=f"with {name}", ylabel="ms per step" if column == 0 else "")
        panels[1, column].loglog(at, [r["mebibytes_at_most"] for r in found], "o-", color="#0072B2", label="at most")
        panels[1, column].loglog(at, [r["mebibytes_with_data"] for r in found], "--", color="#777777", label="the data")
        panels[1, column].set(xlabel=name, ylabel="MiB" if column == 0 else "")
        for row in (0, 1):
            panels[row, column].grid(alpha=0.3)
            panels[row, column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panels[row, column].yaxis.set_major_formatter("{x:g}")
            panels[row, column].yaxis.set_minor_formatter(NullFormatter())
    panels[1, 0].legend(fontsize=8)
    drawing.savefig(path, dpi=130)


def stream_figure(races: list[dict[str, Any]], path: Path, *, bar: float, memory_bar: float) -> None:
    """What streaming keeps of the speed in memory, and the memory that it takes, each with its bar."""
    from matplotlib.figure import Figure

    raced = [r for r in races if "ratio" in r]
    drawing = Figure(figsize=(12, 0.45 * len(raced) + 2.2), layout="constrained")
    speed, memory = drawing.subplots(1, 2, sharey=True)
    names = [f"{r['case']}, {r['gigabytes']:g} GB {r['file']}, {_cores_named(r['threads'])}" for r in raced]
    speed.barh(names, [r["ratio"] for r in raced], color="#D55E00")
    spread = [(min(r["all_ratios"]), max(r["all_ratios"])) for r in raced]
    for i, (low, high) in enumerate(spread):
        speed.plot([low, high], [i, i], color="#000000", linewidth=1)
    rates = [r["steps_per_second"] for r in raced]
    for i, rate in enumerate(rates):
        label = f"{rate['stream']:.0f} of {rate['memory']:.0f} steps/s"
        speed.text(0.02, i, label, color="#FFFFFF", fontsize=8, verticalalignment="center")
    speed.axvline(bar, color="#000000", linestyle=":", label=f"asked: {bar:g}")
    speed.set(xlabel="steps/s streamed over steps/s in memory; line: least to greatest repeat")
    reading = {(r["case"], r["file"]): r for r in races if "mebibytes_reading" in r}
    alone = [reading.get((r["case"], r["file"]), {}) for r in raced]
    memory.barh(names, [r["mebibytes_training"] for r in raced], color="#0072B2", label="training, at most")
    memory.barh(names, [r.get("mebibytes_reading", 0) for r in alone], color="#56B4E9", label="only reading")
    memory.barh(names, [r.get("mebibytes_imported", 0) for r in alone], color="#777777", label="the libraries")
    memory.axvline(memory_bar, color="#000000", linestyle=":", label="asked: 2 GB")
    memory.set(xlabel="MiB of resident memory")
    speed.invert_yaxis()
    for axes in (speed, memory):
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    drawing.savefig(path, dpi=110)


def _cores_named(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"
