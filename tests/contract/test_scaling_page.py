"""The numbers of docs/scaling.md are those of its own arithmetic, and of the library."""

import re
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.run import get_args_parser

import pyro_vae as pv
from pyro_vae.cli.commands import parser
from pyro_vae.data.streams.base import WINDOW_BYTES
from pyro_vae.data.streams.layout import BLOCKS, Layout, window_rows

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
IB = "InfiniBand 400 Gb/s"


@pytest.fixture(scope="module")
def page():
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], "docs/scaling.md", "exec"), names)
    return names


def cells(start):
    """The numbers of a row of a table."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {start}"))
    return [float(cell.replace(",", "").split()[0]) for cell in row.strip("|").split("|")[1:] if cell.strip()]


def test_the_parameters_are_the_models(page):
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(20),
        decoder=pv.likelihoods.Bernoulli(pv.nn.mlp(20, [400], 784)),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(784, [400], 40)),
    )
    assert sum(p.numel() for p in vae.parameters()) == page["parameters"]


def test_bytes(page):
    sizes = [page["row_bytes"][name] for name in ("float32", "uint8")]
    assert cells("a row") == pytest.approx([size / 1e3 for size in sizes], abs=0.05)
    assert cells("10⁹ rows") == pytest.approx([size * page["rows"] / 1e12 for size in sizes], abs=0.05)
    assert cells("an epoch") == pytest.approx([size * page["rows"] / 5e9 / 60 for size in sizes], abs=0.05)
    seconds = page["step"](4096, 1, IB)
    assert cells("read for") == pytest.approx([4096 * size / seconds / 1e9 for size in sizes], abs=0.5)
    assert f"{1e3 * seconds:.2f} ms" in PAGE


def test_blocks(page):
    rows = window_rows(page["rows"], page["row_bytes"]["float32"], WINDOW_BYTES, 4096) // BLOCKS
    blocks = page["rows"] / rows
    assert f"{blocks / 1e6:.1f} million blocks of {rows} rows" in PAGE
    few = Layout.of(np.arange(0, 1001, 10), seed=0, window=100)
    each = (few.starts.nbytes + few.ends.nbytes) / 100
    assert f"{each:g} bytes for each block" in PAGE
    assert f"{blocks * each / 1e9:.1f} GB in each process" in PAGE


def test_adding_up(page):
    for link in page["links"]:
        found = cells(link)
        expected = [1e3 * page["all_reduce"](page["gradient_bytes"], n, link) for n in (2, 8, 64, 512)]
        assert found == pytest.approx(expected[: len(found)], abs=0.0051)


def test_where_it_stops(page):
    for start, growth in (("0.65 M", 1), ("65 M", 100)):
        one = page["step"](4096, 1, IB, growth)
        assert cells(start) == pytest.approx(
            [one / page["step"](4096, n, IB, growth) for n in (2, 8, 64, 512)], abs=0.05
        )
    weak = [512 * page["step"](4096, 1, IB, g) / page["step"](512 * 4096, 512, IB, g) for g in (1, 100)]
    assert "{:.0f} for the small model, {:.0f} for the large".format(*weak) in PAGE
    balance = [2 * 4 / speed / (6 / page["flops"]) for speed, _ in page["links"].values()]
    assert balance == pytest.approx([300, 2700, 43000], rel=0.02)


def test_failures(page):
    hours = 54 * 24 * 16384 / 419
    assert hours == pytest.approx(51_000, rel=0.01)
    for gpus, growth, start in ((8, 1, "8 GPUs"), (256, 1, "256 GPUs, small"), (256, 100, "256 GPUs, 100")):
        size, seconds, apart, interval = cells(start)
        assert size == pytest.approx(12e-6 * page["parameters"] * growth * (1e-3 if size < 1 else 1), rel=0.03)
        assert apart == pytest.approx(hours / gpus, rel=0.01)
        assert interval == pytest.approx(page["checkpoint_interval"](seconds, 3600 * hours / gpus) / 60, rel=0.02)


def test_the_commands_are_ones():
    commands = re.findall(r"^(torchrun .* -m pyro_vae|pyro-vae) (fit .*)$", PAGE, re.MULTILINE)
    asked = [parser(one.split()).parse_args(one.split()).fit for _, one in commands]
    assert [one.devices for one in asked] == [1, 1, 1, 4]
    started = [get_args_parser().parse_args(one.split()[1:]) for one, _ in commands[:3]]
    assert [(one.nproc_per_node, one.nnodes) for one in started] == [("8", "1:1"), ("8", "4"), ("4", "1:1")]
    assert all(one.module and one.training_script == "pyro_vae" for one in started)
