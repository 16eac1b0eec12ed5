"""The README fits on a few screens, its commands and its Python run, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from doc_pages import ROOT, run_commands, run_python

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_the_readme_has_at_most_160_lines() -> None:
    assert len(TEXT.splitlines()) <= 160


def test_every_link_and_picture_of_the_readme_is_a_file_of_the_repository() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT) + re.findall(r'src="([^"]+)"', TEXT)
    assert len(targets) >= 20
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert missing == []


@pytest.mark.slow
def test_the_commands_of_the_readme_run_in_an_empty_folder_and_then_its_python(tmp_path: Path) -> None:
    printed = run_commands(README, tmp_path)
    assert len(printed) >= 7
    for made in ("runs/mamba_moe-smoke-*/report.html", "my_model/model.safetensors", "graph.svg"):
        assert len(list(tmp_path.glob(made))) == 1
    found = re.search(r"^(\S+) Cost\(.*active_params=(\d+)", run_python(README, tmp_path), re.MULTILINE)
    pattern, active = found.groups()
    assert pattern == "(ME)x4A"
    assert abs(int(active) - 250_000) < 2_000
