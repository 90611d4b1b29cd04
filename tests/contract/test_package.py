"""The package as a whole: its names, its docstrings, its weight."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pyro_vae as pv
from pyro_vae.cli import commands, settings

ROOT = Path(__file__).resolve().parents[2]
PARTS = [
    pv.callbacks,
    pv.data,
    pv.diagnose,
    pv.elbo,
    pv.errors,
    pv.exact,
    pv.likelihoods,
    pv.nn,
    pv.posteriors,
    pv.priors,
    pv.sklearn,
]


def public(module):
    """Functions and classes that the module defines and does not hide."""
    inside = f"{module.__name__}."
    own = {name: v for name, v in vars(module).items() if f"{getattr(v, '__module__', '')}.".startswith(inside)}
    return {name: value for name, value in own.items() if not name.startswith("_") and callable(value)}


def everything():
    named = {f"pv.{name}": getattr(pv, name) for name in pv.__all__ if callable(getattr(pv, name))}
    return named | {f"{part.__name__}.{name}": value for part in PARTS for name, value in public(part).items()}


@pytest.mark.parametrize("name", pv.__all__)
def test_what_is_exported_is_there(name):
    assert hasattr(pv, name)


@pytest.mark.parametrize("name", everything())
def test_public_names_are_documented_with_an_example(name):
    text = inspect.getdoc(everything()[name]) or ""
    assert ">>>" in text, "a doctest"
    assert text.splitlines()[0].endswith((".", "?")), "one sentence first"


def test_signatures_of_the_contract():
    signature = inspect.signature(pv.fit)
    assert list(signature.parameters) == [
        "vae", "data", "elbo", "optimizer", "epochs", "batch_size", "validation_data", "device", "seed", "progress",
        "context", "mask", "engine", "clip_norm", "precision", "callbacks", "checkpoints", "resume",
        "devices",
    ]  # fmt: skip
    assert signature.parameters["device"].default == "auto"
    assert list(inspect.signature(pv.compare_elbos).parameters) == [
        "vae", "x", "elbos", "particles", "draws", "size", "log_evidence", "seed", "progress",
    ]  # fmt: skip
    assert list(inspect.signature(pv.compare_models).parameters) == [
        "models", "x_test", "method", "num_particles", "temperatures", "leapfrog", "seed", "progress",
    ]  # fmt: skip
    assert list(inspect.signature(pv.log_evidence).parameters) == [
        "vae", "x", "method", "num_particles", "temperatures", "leapfrog", "chunk", "seed", "progress",
    ]  # fmt: skip
    keyword_only = [p.kind is p.KEYWORD_ONLY for p in signature.parameters.values()]
    assert keyword_only == [False] * 2 + [True] * 17
    assert pv.elbo.Trace_ELBO.__module__.startswith("pyro."), "Pyro's own stand in the same namespace"


def test_importing_brings_neither_figures_nor_tests_nor_the_command_line():
    code = (
        "import sys, pyro_vae; heavy = {'matplotlib', 'sklearn', 'arviz', 'jsonargparse', 'pytest', 'tensorboard'}; "
        "print(sorted(heavy & set(sys.modules)), pyro_vae.plots.gaps.__name__)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[] gaps", result.stderr


def test_tab_completion_shows_public_names_alone():
    assert dir(pv) == sorted(pv.__all__)
    assert {"plots", "fit", "VAE"} <= {*dir(pv)}


def test_measuring_memory_does_not_import_the_compiler():
    code = (
        "import sys, torch\nfrom pyro_vae.core.allocation import AllocationLimit\n"
        "with AllocationLimit(2**20):\n    torch.ones(2)\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_importing_it_costs_nothing_beside_pyro():
    """No other package comes with it, so that it takes no half second more than Pyro does."""
    code = (
        "import sys, time, pyro; before, began = set(sys.modules), time.process_time(); import pyro_vae; "
        "took = time.process_time() - began; new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - sys.stdlib_module_names), took < 0.5, 'matplotlib' in sys.modules); "
        "print(pyro_vae.plots.khat.__name__, 'matplotlib' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines() == ["['pyro_vae'] True False", "khat True"], result.stderr


ANSWERS = ["--help"], ["demo", "--help"], ["check", "--help"], [], ["train"], ["check", "run", "--rows", "many"]
HEAVY = {"torch", "pyro", "numpy", "xarray", "pandas", "matplotlib", "sklearn", "arviz", "h5netcdf"}


@pytest.mark.parametrize(
    ("answers", "needed"), [(ANSWERS, set()), ([["fit", "--help"]], {"torch", "pyro", "numpy", "xarray", "pandas"})]
)
def test_the_command_line_answers_without_what_only_a_run_needs(answers, needed):
    code = (
        "import sys\nfrom pyro_vae.cli import main\n"
        f"for flags in {answers}:\n    try:\n        main(flags)\n    except SystemExit:\n        pass\n"
        f"print('imported', sorted({HEAVY} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.splitlines()[-1] == f"imported {sorted(needed)}", result.stderr


def test_help_says_of_each_command_what_its_settings_say():
    functions = {name: getattr(settings, f"{name}_settings") for name in ("fit", "compare", "swap")}
    functions |= {"demo": commands.demo_settings, "check": commands.check_settings}
    functions |= {"explore": commands.explore_settings, **commands.TABLES}
    assert {name: f.__doc__.splitlines()[0] for name, f in functions.items()} == commands.COMMANDS


def test_every_dependency_has_a_range_and_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tested = (ROOT / "constraints.txt").read_text().lower()
    extras = [need for needs in project["optional-dependencies"].values() for need in needs]
    for need in project["dependencies"] + extras:
        name = need.split(">=")[0].split("[")[0]
        assert ">=" in need, need
        if name == "anndata":  # which takes no pandas 3: tests read a stand-in, and the real one where it is installed
            continue
        assert f"\n{name.lower()}==" in tested, name
