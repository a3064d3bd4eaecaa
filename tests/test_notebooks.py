"""The notebooks run as they are, in an empty folder, and are stored without outputs."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A kernel of this very interpreter: none needs to be installed, and another environment's cannot step in."""
    specification = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(specification))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return "python3"


def test_there_are_notebooks():
    assert FOLDER / "quickstart.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    # Every cell is introduced: nobody meets code without having read what it is for.
    kinds = [cell.cell_type for cell in notebook.cells]
    assert all(before == "markdown" for before, kind in pairwise(kinds) if kind == "code")


def test_the_quickstart_runs_from_an_empty_folder(kernel, tmp_path):
    notebook = nbformat.read(FOLDER / "quickstart.ipynb", as_version=4)
    work = tmp_path / "work"
    work.mkdir()
    client = NotebookClient(notebook, kernel_name=kernel, timeout=300, resources={"metadata": {"path": str(work)}})
    client.execute()
    printed = {
        cell.id: "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    }
    raised = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert raised == []

    summary = json.loads((work / "runs" / "quickstart" / "summary.json").read_text())
    head, single, refined = printed["summary"].splitlines()[:3]
    assert head.split() == ["accuracy", "before", "after"]
    for line, measure in ((single, "single"), (refined, "refined")):
        for when in ("before", "after"):
            assert f"{summary[when][measure]['accuracy']:.0%} (" in line, (when, measure)
    assert printed["curve"].count("step") == 12 + len(range(0, 13, 4))
    assert "refinement" in printed["samples"]
    assert printed["ask"].strip()
    assert "shows_steps" in printed["own"]
    assert (work / "runs" / "own" / "summary.json").exists()
