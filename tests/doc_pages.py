"""The documentation's pages and what stands in their fences, for tests."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^( *)```(\w+)([^\n]*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A fenced block: its page, first line, language, the file that it is part of (``title="x.py"``), and its text."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Return every hand-written page: the site's, and the Markdown files of the repository's root."""
    return [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def fences(page: Path, language: str = "") -> list[Fence]:
    """Return a page's fenced blocks, of one language if it is given."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match[3])
        line = text.count("\n", 0, match.start()) + 2
        found.append(Fence(page, line, match[2], title[1] if title else "", textwrap.dedent(match[4])))
    return [fence for fence in found if not language or fence.language == language]


def commands(fence: Fence) -> list[str]:
    """Return a shell block's commands, comments left out and continued lines joined."""
    joined = fence.text.replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def hybridnas_commands(page: Path) -> list[tuple[int, str]]:
    """Return (line, command) of every ``python -m hybridnas...`` on a page, in fences and in running text.

    Commands with a placeholder (``...`` or ``=NAME``) are left out.
    """
    text = page.read_text(encoding="utf-8")
    found = [(fence.line, line) for fence in fences(page) for line in commands(fence)]
    outside = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    found += [(outside.count("\n", 0, m.start()) + 1, m[1]) for m in re.finditer(r"`([^`\n]+)`", outside)]
    stripped = [(line, re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)) for line, command in found]
    wanted = [(line, command) for line, command in stripped if command.startswith("python -m hybridnas")]
    return [(line, command) for line, command in wanted if not re.search(r"\.\.\.|=NAME\b|hybridnas\.[A-Z]", command)]


def write_files(page: Path, folder: Path) -> None:
    """Write the page's files into a folder: YAML that names its path in the first line, Python with a title."""
    for fence in fences(page):
        named = re.match(r"# (\S+\.yaml)\b", fence.text)
        if fence.language == "yaml" and named:
            path = folder / named[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fence.text, encoding="utf-8")
        elif fence.title:
            with (folder / fence.title).open("a", encoding="utf-8") as file:
                file.write(fence.text + "\n\n")


def run(command: str, folder: Path, **environment: str) -> str:
    """Run a shell command in a folder with this Python first in the path; return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": _roots(folder), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def run_commands(page: Path, folder: Path) -> dict[str, str]:
    """Run a page's shell blocks line by line in a folder; return command -> what it printed."""
    return {line: run(line, folder) for fence in fences(page, "bash") for line in commands(fence)}


def run_python(page: Path, folder: Path) -> str:
    """Run a page's Python blocks in one process, each under its own page and line; return what they printed."""
    write_files(page, folder)
    name = page.relative_to(ROOT).as_posix()
    program = []
    for fence in fences(page, "python"):
        if not fence.title:
            source = "\n" * (fence.line - 1) + fence.text
            program.append(f"exec(compile({source!r}, {name!r}, 'exec'), globals())")
    (folder / "page.py").write_text("\n".join(program), encoding="utf-8")
    context = multiprocessing.get_context("forkserver")  # imports what every page needs once, and forks for each
    context.set_forkserver_preload(["torch", "optuna", "hybridnas.arch.model"])
    child = context.Process(target=_run_in, args=(folder, _roots(folder)))
    child.start()
    child.join(600)
    how = "took longer than 600 s" if child.is_alive() else f"exit code {child.exitcode}"
    child.kill()
    printed = (folder / "page.txt").read_text(encoding="utf-8")
    assert child.exitcode == 0, f"{name}: {how}\n{printed[-4000:]}"
    return printed


def _run_in(folder: Path, roots: str) -> None:
    """Be the process of a page's Python, as if started in its folder."""
    os.chdir(folder)
    with Path("page.txt").open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    os.environ["PYTHONPATH"] = roots
    sys.path[:0] = roots.split(os.pathsep)
    runpy.run_path("page.py", run_name="__main__")


def _roots(folder: Path) -> str:
    return os.pathsep.join(filter(None, (str(folder), str(ROOT), os.environ.get("PYTHONPATH", ""))))
