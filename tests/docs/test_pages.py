"""Code on the documentation's pages runs, and the commands on them have the settings that they name."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from doc_pages import ROOT, commands, fences, hybridnas_commands, pages, run, run_commands, run_python, write_files

OWN_MIXER = ROOT / "docs" / "own-mixer.md"
WITH_PYTHON = [page for page in pages() if any(not f.title for f in fences(page, "python"))]
GRAFTING = ROOT / "docs" / "guides" / "grafting.md"
TUTORIAL = ROOT / "docs" / "tutorial.md"  # its Python reads what its commands made
COMMANDS = [(page, line, command) for page in pages() for line, command in hybridnas_commands(page)]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in WITH_PYTHON if p not in (TUTORIAL, ROOT / "README.md")], ids=name)
def test_the_python_of_a_page_runs_in_an_empty_folder(page: Path, tmp_path: Path) -> None:
    run_python(page, tmp_path)


@pytest.mark.long
@pytest.mark.slow
def test_the_tutorial_ends_with_an_exported_winner(tmp_path: Path) -> None:
    run_commands(TUTORIAL, tmp_path)
    run_python(TUTORIAL, tmp_path)
    assert len(list(tmp_path.glob("runs/mamba_moe-smoke-*/report.html"))) == 1
    for model in ("my_model", "my_second_model"):
        assert (tmp_path / model / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_grafting_guide_makes_a_hybrid_with_a_third_of_the_state(tmp_path: Path) -> None:
    small = " data.max_bytes=200000 train.batch_size=4 train.seq_len=64 train.valid_tokens=512"
    for fence in fences(GRAFTING, "bash"):
        for line in commands(fence):
            fewer = re.sub(r"\btokens=\d+", "tokens=512", line)
            own = {"train": f"{small} tracking=off", "graft": f"{small} fit_tokens=512"}
            run(fewer + own.get(line.split()[2].removeprefix("hybridnas."), ""), tmp_path)
    from hybridnas.export.load import load

    transformer, hybrid, wider = (load(tmp_path / name) for name in ("runs/transformer/model", "hybrid", "wider"))
    assert str(hybrid.arch.pattern) == "GFAFGF"
    assert hybrid.arch.cost(2048).state_bytes < 0.36 * transformer.arch.cost(2048).state_bytes
    assert [len(model.lineage) for model in (hybrid, wider)] == [1, 2]
    assert [row["exact"] for row in wider.lineage[1]["layers"]] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "line", "command"), COMMANDS, ids=[f"{name(p)}:{n} {c[20:70]}" for p, n, c in COMMANDS]
)
def test_a_command_on_a_page_has_the_settings_that_it_names(
    page: Path, line: int, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hybridnas.cli.compose import read_settings

    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRIDNAS_STORAGE", "postgresql+psycopg://user:secret@host/base")
    _, _, module, *settings = shlex.split(command)
    assert importlib.util.find_spec(module) is not None
    if module.count(".") == 1:
        read_settings(module.split(".")[1], settings)


@pytest.mark.parametrize("page", pages(), ids=name)
def test_a_page_names_no_machine_and_loads_nothing_from_outside(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.~])/(root|home|work|tmp)/", text)
    assert not re.search(r"!\[[^\]]*\]\(https?:", text)


@pytest.mark.slow
def test_the_block_of_the_own_mixer_page_passes_the_contract_tests_and_is_searched(tmp_path: Path) -> None:
    write_files(OWN_MIXER, tmp_path)
    listed = run(
        f"{shlex.quote(sys.executable)} -m pytest -p my_mixer -p no:cacheprovider --rootdir {shlex.quote(str(ROOT))} "
        f"-c {shlex.quote(str(ROOT / 'pyproject.toml'))} "
        f"{shlex.quote(str(ROOT / 'tests/blocks/test_block_contract.py'))} -k average -q -rA",
        tmp_path,
    )
    assert listed.count("PASSED") >= 20
    described = tmp_path / "my_mixer-0.1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: my-mixer\nVersion: 0.1\n")
    (described / "entry_points.txt").write_text("[hybridnas.blocks]\nV = my_mixer\n")
    assert "average" in run("python -m hybridnas.describe pattern=VMVF arch.d_model=64", tmp_path)
