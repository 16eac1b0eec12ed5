"""Hooks of the documentation build: pages written from the code, and Markdown files that lie outside ``docs/``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import diagram
import pages
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md")  # shown as they are
SHOWN = (".md", ".png", ".svg", ".csv", ".json", ".tsv")


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, the project files and the experiments' notes and results."""
    for path, text in pages.all_pages().items():
        files.append(File.generated(config, path, content=text))
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=_links((ROOT / name).read_text(encoding="utf-8"), "")))
    for path in sorted((ROOT / "experiments").rglob("*")):
        if path.suffix not in SHOWN:
            continue
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md":
            depth = "../" * name.count("/")
            content = re.sub(r"\]\((?:\.\./)+docs/", f"]({depth}", path.read_text(encoding="utf-8"))
            content = re.sub(r"\[`?results/`?\]\(\.\./results\)", "`results/`", content)
            files.append(File.generated(config, name, content=content))
        else:
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def _code(path: str) -> str:
    """Return a Python file of the repository as a fenced block."""
    return f"```python\n{(ROOT / path).read_text(encoding='utf-8').rstrip()}\n```"


def _links(text: str, depth: str) -> str:
    """Return Markdown of the repository's root with its links into ``docs/`` made relative to the site."""
    return text.replace("](docs/", f"]({depth}")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Put drawings and files where ``{{ import_matrix }}``, ``{{ rungs }}``, ``{{ draw X }}``, ``{{ file X }}`` are."""
    markdown = markdown.replace("{{ import_matrix }}", diagram.import_matrix()).replace("{{ rungs }}", diagram.rungs())
    markdown = re.sub(r"\{\{ file (\S+) \}\}", lambda match: _code(match[1]), markdown)
    return re.sub(r"\{\{ draw (\S+) \}\}", lambda match: diagram.drawing(match[1]), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Leave the roles of reStructuredText (``:class:`` and others) out of docstrings; let names in tables break.

    A long setting may break after a dot or an underscore, so that its row fits a narrow screen.
    """
    html = re.sub(r":(?:meth|class|func|mod|attr|exc|data):(?=<code>)", "", html)
    return re.sub(r"(?<=<td><code>)[\w.]+(?=</code>)", lambda name: re.sub(r"(?<=[._])", "<wbr>", name[0]), html)
