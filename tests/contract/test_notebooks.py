"""The notebooks as they are committed; nbmake runs them, in the same test run."""

import base64
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def outputs(path):
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def pictures(path):
    return [data for output in outputs(path) if (data := output.get("data", {}).get("image/png"))]


def test_they_are_there():
    assert len(NOTEBOOKS) >= 4
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i:02d}" for i in range(1, len(NOTEBOOKS) + 1)]


def test_every_one_is_run_by_the_plain_test_command():
    """It looks into this folder, and finds each of them there."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert "notebooks" in settings["testpaths"]
    options = ["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "not slow", "notebooks"]
    command = [sys.executable, "-m", "pytest", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout[-2000:]
    assert {path.name for path in NOTEBOOKS} <= set(re.findall(r"[\w.]+\.ipynb", result.stdout))


PLANTED = {
    "fine": "import os; assert os.environ['PYRO_VAE_QUICK']",
    "wrong": "assert 1 + 1 == 3",
    "warns": "import warnings; warnings.warn('this is planted')",
}


def test_planted_an_error_and_a_warning_fail_the_test_run(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "notebooks" / "conftest.py").read_text(encoding="utf-8"))
    for name, source in PLANTED.items():
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-rA"]
    told = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=120).stdout
    outcomes = {name: outcome for outcome, name in re.findall(r"^([A-Z]+) (?:.*/)?(\w+)\.ipynb", told, re.MULTILINE)}
    assert outcomes == {"fine": "PASSED", "wrong": "FAILED", "warns": "FAILED"}, told


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestEach:
    def test_it_was_run_from_top_to_bottom(self, path):
        nbformat.validate(nbformat.read(path, nbformat.NO_CONVERT))
        counts = [cell["execution_count"] for cell in cells(path, "code")]
        assert counts == list(range(1, len(counts) + 1))
        assert len(pictures(path)) >= 3

    def test_nothing_went_wrong(self, path):
        assert not [o for o in outputs(path) if o["output_type"] == "error"]
        assert not [o for o in outputs(path) if o.get("name") == "stderr"], "a warning"

    def test_nothing_of_a_machine_is_in_it(self, path):
        text = "\n".join(
            json.dumps(o, ensure_ascii=False) for o in outputs(path) if "image/png" not in o.get("data", ())
        )
        text += "\n".join("".join(cell["source"]) for kind in ("code", "markdown") for cell in cells(path, kind))
        assert not re.findall(r"/(?:home|root|tmp|work|usr|Users|opt)/|[A-Z]:\\\\|0x[0-9a-f]{6,}|Warning:", text)
        assert set(json.loads(path.read_text(encoding="utf-8"))["metadata"]) == {"kernelspec", "language_info"}

    def test_it_says_what_will_be_seen_what_is_learnt_and_ends_with_an_exercise(self, path):
        first, *_, last = ("".join(cell["source"]) for cell in cells(path, "markdown"))
        assert first.startswith("# ")
        assert "**What you will see**" in first
        assert "**The lesson:**" in first
        assert "## Exercise" in last

    def test_every_figure_has_a_caption(self, path):
        every = json.loads(path.read_text(encoding="utf-8"))["cells"]
        drawn = [
            i for i, cell in enumerate(every) if any("image/png" in o.get("data", ()) for o in cell.get("outputs", ()))
        ]
        for i in drawn:
            following = next("".join(cell["source"]) for cell in every[i:] if cell["cell_type"] == "markdown")
            assert following.startswith("*Figure"), f"cell {i}"

    def test_it_is_small_enough_to_be_read_online(self, path):
        assert path.stat().st_size < 600_000
        assert all(len(base64.b64decode(data)) < 200_000 for data in pictures(path))
