"""The notebooks run as they are, in an empty folder, and are stored without outputs."""

from __future__ import annotations

import json
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from igrpo_lite.cli.app import build
from igrpo_lite.cli.recipes import find
from igrpo_lite.config.resolve import load_file, resolve

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


TINY = {
    "RECIPE": "tiny-igrpo",
    "INSTALL": False,
    "GPU": "--gpu t4",
    "FLAGS": "--prompts-per-step 4 --num-generations 8 --max-steps 2 --eval-steps 2 --eval-size 20",
}


def executed(name: str, parameters: dict[str, object], kernel: str, work: Path) -> dict[str, str]:
    """What each cell printed, with other values of its parameters; a cell that raises fails the test."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"(?m)^(\w+) =", cell.source)
    assert parameters.keys() <= set(names)
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    work.mkdir()
    client = NotebookClient(notebook, kernel_name=kernel, timeout=300, resources={"metadata": {"path": str(work)}})
    client.execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return {cell.id: "".join(output.get("text", "") for output in cell.outputs) for cell in cells}


def test_gsm8k_runs_with_the_bundled_model(kernel, tmp_path):
    work = tmp_path / "work"
    printed = executed("gsm8k.ipynb", {**TINY, "EVALUATION": "--eval-size 20"}, kernel, work)
    assert "torch for the CPU" in printed["install"] or "set " in printed["install"]
    assert "no problems found" in printed["check"]
    assert re.search(r"fits: .* of 14.74 GiB", printed["plan"])
    assert "2 of 2 steps" in printed["train"]
    assert "\x1b" not in printed["train"], "plain lines, no cursor moves"
    assert "McNemar" in printed["eval"]
    assert "95 % intervals" in printed["eval"]
    assert "refinement, reward" in printed["samples"]
    assert (work / "runs/gsm8k/export/adapter_config.json").exists()


def test_own_data_and_reward_runs_with_the_bundled_model(kernel, tmp_path):
    work = tmp_path / "work"
    printed = executed("own_data_and_reward.ipynb", TINY, kernel, work)
    assert "question from column task, answer from column result" in printed["show"]
    assert re.search(r"right answer: .*brief 0\.\d\d", printed["check"])
    assert "fits: " in printed["plan"]
    assert "2 of 2 steps" in printed["train"]
    assert "'brief': " in printed["verdicts"]
    assert "correct, found '" in printed["verdicts"]
    config = (work / "runs/own/config.yaml").read_text(encoding="utf-8")
    assert "data: problems.jsonl" in config
    assert "my_reward.py:brief" in config


@pytest.mark.parametrize("name", ["gsm8k.ipynb", "own_data_and_reward.ipynb"])
def test_notebooks_for_gpus_name_what_is_there(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    sources = {cell.id: cell.source for cell in notebook.cells}
    values: dict[str, object] = {}
    exec(sources["parameters"], values)
    recipe = resolve(load_file(find(str(values["RECIPE"]))) | {"data": "gsm8k"})
    assert recipe.model == "qwen2-1.5b"
    assert "igrpo_lite.environment.pins" in sources["install"]
    assert "nobody has run them on a GPU yet" in sources["install-text"]
    verbs = {verb for source in sources.values() for verb in re.findall(r"^!\{run\} ([\w-]+)", source, re.MULTILINE)}
    assert verbs <= set(build())
    # Each command is followed by a look at its exit code, so that "run all" does not go on after a failure.
    for source in sources.values():
        assert len(re.findall(r"^!", source, re.MULTILINE)) == source.count("assert _exit_code == 0")
    commands = [line for source in sources.values() for line in source.splitlines() if line.startswith("!{run} ")]
    given = {key: str(value) for key, value in values.items()} | {"own": ""}
    for command in commands:
        words = shlex.split(re.sub(r"\{(\w+)\}", lambda match: given.get(match[1], ""), command[len("!{run} ") :]))
        _, _, unused, _ = build().parse_known_args(words)
        assert unused == []


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
