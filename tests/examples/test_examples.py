"""The examples run as they stand, at small sizes, from a folder that is not the repository."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hybridnas

ROOT = Path(hybridnas.__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SETTINGS = {
    "search_and_load.py": ["--trials", "6"],
    "own_block.py": ["--tokens", "20000", "--trials", "3"],
    "own_data.py": ["--text", str(ROOT / "README.md"), "--tokens", "10000", "--pattern", "ME"],
    "mqar_own_module.py": ["--tokens", "20000", "--width", "32"],
}
SEEN = {  # what each prints besides
    "search_and_load.py": r"best: \S+, validation loss \d\.\d{4} nats per byte",
    "own_block.py": r"declared (\S+) parameters, counted \1; state",
    "own_data.py": r"validation loss \d\.\d{4} nats per byte",
    "mqar_own_module.py": r"Mamba +\S+ parameters  loss \d\.\d+  accuracy",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="installed without the repository"),
]


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SETTINGS)


@pytest.mark.long
@pytest.mark.parametrize("name", SETTINGS)
def test_an_example_runs(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / name), *SETTINGS[name]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(SEEN[name], done.stdout), done.stdout


@pytest.mark.long
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(EXAMPLES / "search.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("n_trials=8", "n_trials=5")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "runs/notebook/report.html").is_file()
    assert (tmp_path / "runs/notebook-best/model.safetensors").is_file()


def test_the_notebook_is_stored_without_output():
    nbformat = pytest.importorskip("nbformat")
    cells = nbformat.read(EXAMPLES / "search.ipynb", as_version=4).cells
    assert [cell for cell in cells if cell.get("outputs")] == []
