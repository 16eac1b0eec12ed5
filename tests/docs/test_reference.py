"""Reference pages are written from the code: nothing that is registered or can be set is missing from them."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from types import ModuleType

import pytest
from doc_pages import ROOT


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return script("pages").all_pages()


def test_every_setting_of_the_groups_is_on_the_settings_page(pages: dict[str, str]) -> None:
    from hybridnas.data.source import SOURCES
    from hybridnas.search.config import Budget
    from hybridnas.train.config import TrainConfig

    text = pages["reference/settings.md"]
    groups = [("budget", Budget), ("train", TrainConfig), *(("data", SOURCES.get(name).config) for name in SOURCES)]
    for prefix, config in groups:
        for field in dataclasses.fields(config):
            assert f"`{prefix}.{field.name}`" in text or field.name == "kind"
            assert field.metadata["doc"].replace("|", "\\|") in text or field.name == "kind"


def test_every_command_block_preset_and_error_has_its_place(pages: dict[str, str]) -> None:
    from hybridnas import errors
    from hybridnas.arch.presets import list_presets, preset
    from hybridnas.cli import COMMANDS
    from hybridnas.registry import BLOCKS

    assert all(f"\n## {name}\n" in pages["reference/commands.md"] for name in COMMANDS)
    for letter in BLOCKS:
        assert f"\n## {letter} {BLOCKS.get(letter).name}\n" in pages["reference/blocks.md"]
    for name in list_presets():
        cost = preset(name).cost()
        (row,) = [x for x in pages["reference/presets.md"].splitlines() if x.startswith(f"| [`{name}`]")]
        assert f"| {cost.params:,} | {cost.active_params:,} |" in row
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.HybridNASError):
            assert f"| `{name}` |" in pages["reference/errors.md"]


@pytest.mark.slow
def test_the_import_diagram_knows_every_package() -> None:
    diagram = script("diagram")
    listed = {name for layer in diagram.layers() for name in layer}
    package = ROOT / "hybridnas"
    folders = {path.name for path in package.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert folders - {"__pycache__"} <= listed
    assert diagram.import_matrix().count("<rect") == len(diagram.layers()) ** 2
