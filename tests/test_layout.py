"""Rooms and floors: what may lie where, what may import what, and what a wheel holds."""

import ast
import dataclasses
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path

import pytest

import hybridnas
from hybridnas.config import FrozenConfig

PACKAGE = Path(hybridnas.__file__).resolve().parent
ROOT = PACKAGE.parent
LINKED = ("blocks", "kernels", "search_spaces")
FLOORS = {
    **dict.fromkeys(("errors", "registry", "config", "cost", "hardware", "files", "units"), 0),
    **{"kernels": 1, "blocks": 2, "arch": 3, "search_spaces": 4},
    **dict.fromkeys(("data", "train", "search", "export", "suites"), 5),
    **dict.fromkeys(("cli", "conf", "api", "bench"), 6),
}
BESIDE = {
    "suites": {"data", "train", "search"},
    "search": {"train", "data", "export"},
    "export": {"data", "train"},
    "train": {"data"},
    "data": set(),
}
DOORS = {  # third-party name -> the only places that import it
    "optuna": ("search/",),
    "mlflow": ("search/tracking.py",),
    "hydra": ("cli/compose.py",),
    "omegaconf": ("cli/compose.py",),
    "networkx": ("arch/graph.py",),
    "datasets": ("data/",),
    "tokenizers": ("data/",),
    "safetensors": ("train/checkpoint.py", "export/"),
    "triton": ("kernels/",),
    "matplotlib": ("arch/draw.py", "search/plots.py", "suites/plots.py", "bench/"),
    "jinja2": ("search/page.py",),
    "yaml": ("config.py",),
    "numpy": ("data/", "bench/"),
}
needs_repository = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="installed without the repository"
)


def sources():
    return sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


@cache
def imports(path):
    """Return (module, whether for types alone) of every import in a file."""
    found = []

    def walk(node, typing_only):
        for child in ast.iter_child_nodes(node):
            guarded = typing_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            if isinstance(child, ast.Import):
                found.extend((alias.name, guarded) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path} imports relatively"
                found.extend((f"{child.module}.{alias.name}", guarded) for alias in child.names)
            walk(child, guarded)

    walk(ast.parse(path.read_text()), False)
    return tuple(found)


def room(path):
    """Return the room of a file; the doors of commands and the package's own front are the command line's."""
    parts = path.relative_to(PACKAGE).parts
    first = parts[0].removesuffix(".py")
    if path.name == "__main__.py" or (len(parts) == 1 and first not in FLOORS):
        return "cli"
    return first


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_only_go_down(path):
    here = room(path)
    if name_of(path) == "__init__.py":
        return  # the front: it names everything, lazily; test_config holds it to that
    for module, typing_only in imports(path):
        parts = module.split(".")
        if parts[0] != "hybridnas" or len(parts) < 2:
            continue
        there = parts[1]
        if there not in FLOORS:
            assert here == "cli", f"{name_of(path)} imports {module}"
            continue
        if typing_only and (here, there) == ("registry", "blocks"):
            continue
        allowed = there == here or FLOORS[there] < FLOORS[here] or (FLOORS[here] == 0 == FLOORS[there])
        assert allowed or there in BESIDE.get(here, ()) or here == "cli", f"{name_of(path)} imports {module}"


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library):
    users = [name_of(path) for path in sources() if library in {module.split(".")[0] for module, _ in imports(path)}]
    assert users, f"nobody imports {library}: take it from this table"
    assert [user for user in users if not user.startswith(DOORS[library])] == []


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("name", LINKED)
def test_the_linked_rooms_are_no_packages_of_their_own(name):
    assert not (PACKAGE / name / "__init__.py").exists()


@needs_repository
@pytest.mark.parametrize("name", LINKED)
def test_a_door_is_a_relative_link(name):
    door = ROOT / name
    assert door.is_symlink()
    assert door.readlink() == Path("hybridnas") / name


@needs_repository
def test_a_block_imported_through_a_door_says_why_it_is_refused():
    module = "blocks.attention"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert (
        f"LayoutError: '{module}' is 'hybridnas.{module}' under a second name, through the link in the repository "
        f"root; import 'hybridnas.{module}' instead"
    ) in done.stderr


@needs_repository
def test_the_wheel_holds_the_package_alone_and_all_its_files(tmp_path):
    pytest.importorskip("build", reason="the package 'build' is in the extra [dev]")
    pytest.importorskip("setuptools", minversion="77", reason="an offline build needs setuptools in the environment")
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, source / "hybridnas", ignore=skipped)
    for name in ("pyproject.toml", "README.md"):
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
    kept = {".py", ".yaml", ".j2", ".c", ".h", ".typed"}
    here = {f"hybridnas/{name_of(path)}" for path in PACKAGE.rglob("*") if path.suffix in kept and path.is_file()}
    assert here - set(names) == set()


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


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
