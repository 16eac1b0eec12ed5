"""The layout of the repository and what a wheel holds."""

import dataclasses
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hybridnas
from hybridnas.config import FrozenConfig
from tests.conftest import SLOW_FILES

PACKAGE = Path(hybridnas.__file__).resolve().parent
ROOT = PACKAGE.parent
LINKED = ("blocks", "kernels", "search_spaces")
needs_repository = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="installed without the repository"
)


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("name", LINKED)
def test_the_linked_folders_are_no_packages_of_their_own(name):
    assert not (PACKAGE / name / "__init__.py").exists()


@needs_repository
@pytest.mark.parametrize("name", LINKED)
def test_a_linked_folder_is_a_relative_link(name):
    link = ROOT / name
    assert link.is_symlink()
    assert link.readlink() == Path("hybridnas") / name


@pytest.mark.slow
@needs_repository
def test_a_block_imported_through_a_link_is_refused_with_the_reason():
    module = "blocks.attention"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert (
        f"LayoutError: '{module}' is 'hybridnas.{module}' under a second name, through the link in the repository "
        f"root; import 'hybridnas.{module}' instead"
    ) in done.stderr


@pytest.mark.slow
@needs_repository
def test_the_wheel_holds_the_package_alone_and_all_its_files(tmp_path):
    pytest.importorskip("build", reason="the package 'build' is in the extra [dev]")
    pytest.importorskip("setuptools", minversion="77", reason="an offline build needs setuptools in the environment")
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, source / "hybridnas", ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        ".",
    ]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"hybridnas"}
    kept = {".py", ".yaml", ".j2", ".tmpl", ".js", ".txt", ".c", ".h", ".typed"}
    here = {f"hybridnas/{name_of(path)}" for path in PACKAGE.rglob("*") if path.suffix in kept and path.is_file()}
    assert here - set(names) == set()
    recipes = {f"hybridnas/experiments/{path.name}" for path in (ROOT / "experiments").glob("*.yaml")}
    assert recipes | {"hybridnas/experiments/results/tabular.csv"} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def configs():
    """Return every config class of the package."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "hybridnas."):
        if not re.search(r"__main__|triton", module.name):
            importlib.import_module(module.name)
    for name in LINKED:  # folders without __init__.py are not walked
        for file in sorted((PACKAGE / name).glob("*.py")):
            importlib.import_module(f"hybridnas.{name}.{file.stem}")
    found, queue = set(), [FrozenConfig]
    while queue:
        for child in queue.pop().__subclasses__():
            if child.__module__.startswith("hybridnas.") and child not in found:
                found.add(child)
                queue.append(child)
    return sorted(found, key=lambda cls: (cls.__module__, cls.__qualname__))


def test_every_field_of_every_config_says_what_it_is():
    known = configs()
    assert {"Budget", "SearchConfig", "Space", "Scale", "TrainConfig", "DataConfig"} <= {c.__name__ for c in known}
    for config in known:
        for field in dataclasses.fields(config):
            doc = field.metadata.get("doc", "")
            assert doc, f"{config.__module__}.{config.__qualname__}.{field.name} has no doc line"
            assert "\n" not in doc


@needs_repository
def test_no_file_names_a_place_of_one_machine():
    machine = re.compile("/" + "work/" + "|/" + "root/")
    kept = {".py", ".yaml", ".toml", ".md", ".c", ".h", ".j2", ".txt", ".csv", ""}
    files = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "constraints.txt", *(ROOT / ".ci").iterdir()]
    for folder in ("hybridnas", "tests", "experiments"):
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in kept]
    found = [str(path) for path in files if path.is_file() and machine.search(path.read_text(errors="replace"))]
    assert found == []


@pytest.mark.slow
@needs_repository
def test_imports_keep_the_contracts_of_pyproject():
    pytest.importorskip("importlinter", reason="import-linter is in the extra [dev]")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@needs_repository
def test_no_module_imports_itself_by_way_of_others():
    """The contract of siblings does not see a package that imports a module of its own which imports the package."""
    grimp = pytest.importorskip("grimp", reason="grimp comes with import-linter, which is in the extra [dev]")
    folders = [f"hybridnas.{name}" for name in LINKED]
    graph = grimp.build_graph("hybridnas", *folders, exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while leaves := {module for module, imported in imports.items() if not imported & imports.keys()}:
        imports = {module: imported for module, imported in imports.items() if module not in leaves}
    assert imports == {}


@needs_repository
def test_files_that_are_listed_as_slow_exist():
    assert set(SLOW_FILES) <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.parametrize(
    "modules",
    [
        ("hybridnas", "hybridnas.registry", "hybridnas.arch.presets", "hybridnas.search_spaces.listing"),
        ("hybridnas.study.records", "hybridnas.study.objectives"),
    ],
)
def test_names_and_records_are_read_without_heavy_libraries(modules):
    heavy = {"torch", "optuna", "mlflow", "hydra", "omegaconf", "numpy", "matplotlib", "transformers", "networkx"}
    code = f"import sys, {', '.join(modules)}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_one_paper_is_named_by_its_presets_its_suite_and_defaults_alone():
    named = {name_of(path) for path in PACKAGE.rglob("*.py") if "moe_mamba" in path.read_text(encoding="utf-8")}
    named = {name for name in named if not name.startswith(("arch/presets/", "bench/"))}
    # an example, the paper's own figures, and the color that each preset has in every picture
    assert named <= {"__init__.py", "suites/headline.py", "draw/figure.py"}


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


@needs_repository
def test_the_version_is_that_of_the_changelogs_first_heading():
    """A release in preparation is X.Y.Z.devN in pyproject.toml and "Unreleased (X.Y.Z)" in the changelog."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "([^"]+)"', text, re.MULTILINE)[1]
    heading = re.search(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    release, _, preview = version.partition(".dev")
    assert heading.startswith(f"Unreleased ({release})" if preview else release)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
