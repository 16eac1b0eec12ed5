"""The README is run: every command of its tour in an empty folder, its Python, and its tree against the files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = README.split("## Five minutes")[1].split("## Further")[0]
FURTHER = README.split("## Further")[1].split("## Patterns")[0]


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tour")


def run(command: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["/bin/sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_every_command_of_the_tour_runs_in_an_empty_folder(folder: Path) -> None:
    commands = [line for block in blocks("bash", TOUR) for line in block.splitlines() if line.strip()]
    assert len(commands) >= 9
    printed = {command: run(command, folder) for command in commands}
    searched = next(text for command, text in printed.items() if "hybridnas.search" in command)
    assert "winner: trial" in searched
    assert "tokens/s" in searched
    replayed = next(text for command, text in printed.items() if "hybridnas.replay" in command)
    assert "the same to the bit" in replayed
    described = printed["python -m hybridnas.describe"]
    assert "416,358,400" in described
    for made in ("runs/mamba_moe-smoke/report.html", "my_model/model.safetensors", "graph.svg"):
        assert (folder / made).is_file()


def test_the_python_of_the_tour_runs_and_matches_what_it_asks_for(folder: Path) -> None:
    (code,) = blocks("python", TOUR)
    (folder / "tour.py").write_text(code)
    pattern, cost, _ = re.match(r"(\S+) (Cost\(.*\)) (\w{12})\n", run(f"{sys.executable} tour.py", folder)).groups()
    active = int(re.search(r"active_params=(\d+)", cost).group(1))
    assert pattern == "(ME)x4A"
    assert abs(active - 250_000) < 2_000


@pytest.mark.parametrize("line", [line for block in blocks("bash", FURTHER) for line in block.splitlines() if line])
def test_every_further_command_has_the_settings_it_names(line: str) -> None:
    from hybridnas.cli.compose import compose

    python, dash, command, *settings = shlex.split(line)
    assert (python, dash, command.split(".")[0]) == ("python", "-m", "hybridnas")
    composed = compose(command.split(".")[1], settings)
    for setting in settings:
        key, _, value = setting.rpartition("=")
        assert not key or key.split(".")[0] in composed, f"{key}={value}"


def test_the_integers_of_the_presets_table_are_those_of_the_presets() -> None:
    from hybridnas.arch.presets import list_presets, preset

    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \| ([\d,]+) \| ([\d,]+) \|$", README, re.MULTILINE)
    assert sorted(row[0] for row in rows) == list_presets()
    for name, pattern, params, active in rows:
        cost = preset(name).cost()
        assert (pattern, params, active) == (str(preset(name).pattern), f"{cost.params:,}", f"{cost.active_params:,}")


def test_the_letters_of_the_patterns_table_are_the_registered_blocks() -> None:
    from hybridnas.registry import BLOCKS

    assert sorted(re.findall(r"^\| `([A-Z])` \|", README, re.MULTILINE)) == list(BLOCKS)


def test_the_space_in_the_readme_is_a_space(tmp_path: Path) -> None:
    import yaml

    from hybridnas.search_spaces.space import Space

    (text,) = [block for block in blocks("yaml", README) if "motif_length" in block]
    space = Space.from_mapping({"name": "mine", **yaml.safe_load(text)})
    assert (len(space.letters), space.motif_length) == (5, (2, 4))
