"""Drawings that the build makes: the matrix of imports between packages, trials at their rungs, patterns."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(__file__).resolve().parents[2] / "hybridnas"
LABELS = {"registry": "foundation"}  # of layers that hold several modules, by the first one; else the first one's name
_CELL, _LEFT, _TOP = 26, 150, 110


def layers() -> list[tuple[str, ...]]:
    """Return the layers of the import contract in ``pyproject.toml``, lowest first; modules of one layer are equals."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    return [tuple(name.strip() for name in layer.split(":")) for layer in reversed(contract["layers"])]


def imports() -> dict[str, set[str]]:
    """Return package -> packages whose modules its modules import, imports for type checking alone left out."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        owner = parts[0]
        if parts[-1] == "__main__":  # `python -m hybridnas.search` is a command: it belongs to cli
            continue
        for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                pieces = (name or "").split(".")
                if pieces[0] == "hybridnas" and len(pieces) > 1 and pieces[1] != owner:
                    found.setdefault(owner, set()).add(pieces[1])
    return found


def _run_time_nodes(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    nodes: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            nodes.append(node)
        nodes.extend(_run_time_nodes(node))
    return nodes


@functools.cache  # asked for at every page: reading all modules takes a second
def import_matrix() -> str:
    """Return the matrix as SVG: a filled cell says that the row's package imports the column's."""
    found = layers()
    rows = [LABELS.get(layer[0], layer[0]) for layer in found]
    layer_of = {name: number for number, layer in enumerate(found) for name in layer}
    edges = {
        (layer_of[owner], layer_of[target])
        for owner, targets in imports().items()
        for target in targets
        if owner in layer_of and target in layer_of and layer_of[owner] != layer_of[target]
    }
    size = len(rows) * _CELL
    width, height = _LEFT + size + 10, _TOP + size + 10
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">']
    parts.append("<title>Which package imports which</title>")
    for number, name in enumerate(rows):
        middle = number * _CELL + _CELL / 2
        parts.append(f'<text x="{_LEFT - 8}" y="{_TOP + middle + 4}" text-anchor="end" font-size="13">{name}</text>')
        turn = f"translate({_LEFT + middle + 4} {_TOP - 8}) rotate(-60)"
        parts.append(f'<text transform="{turn}" font-size="13">{name}</text>')
    for row in range(len(rows)):
        for column in range(len(rows)):
            x, y = _LEFT + column * _CELL, _TOP + row * _CELL
            kind = "own" if row == column else "import" if (row, column) in edges else ""
            parts.append(
                f'<rect class="{kind}" x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" height="{_CELL - 2}" rx="3"/>'
            )
    parts.append("</svg>")
    return "".join(parts)


def drawing(pattern: str) -> str:
    """Return the drawing of a small architecture of this pattern, as ``describe out=`` writes it."""
    from hybridnas.arch.arch import Arch
    from hybridnas.draw.svg import svg_text

    arch = Arch.from_pattern(pattern, d_model=64, vocab_size=256)
    return f'<div class="diagram drawing" markdown="0">{svg_text(arch)}</div>'


def rungs() -> str:
    """Return an example of successive halving with resume: bars are trials, their length what was trained."""
    width, row, left = 480, 22, 70
    steps = [1, 4, 1, 1, 2, 1, 2, 1, 1]  # quarters of the training: paused at 1 (a quarter) or 2 (a half), or whole
    resumed = 4  # this trial was paused at a quarter first, and taken up again when it proved to be among the best
    height = 34 + row * len(steps)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 90} {height + 4}" role="img">']
    parts.append("<title>Trials pause at a quarter or a half of the training; one goes to the end</title>")
    for share, name in ((1, "1/4"), (2, "1/2"), (4, "end")):
        x = left + width * share / 4
        parts.append(f'<path d="M{x} 22V{height}" stroke-dasharray="3 3"/>')
        parts.append(f'<text x="{x}" y="15" text-anchor="middle" font-size="13">{name}</text>')
    for number, quarters in enumerate(steps):
        y = 30 + number * row
        length = width * quarters / 4
        parts.append(f'<text x="{left - 10}" y="{y + 12}" text-anchor="end" font-size="13">trial {number}</text>')
        kind = "import" if quarters == 4 else "own"
        parts.append(f'<rect class="{kind}" x="{left}" y="{y}" width="{length}" height="{row - 6}" rx="3"/>')
        if number == resumed:
            x = left + width / 4
            parts.append(f'<path class="strong" stroke-width="3" d="M{x} {y - 2}V{y + row - 4}"/>')
        if quarters < 4:
            note = "paused, resumed, paused" if number == resumed else "paused"
            parts.append(f'<text x="{left + length + 8}" y="{y + 12}" font-size="12">{note}</text>')
    parts.append("</svg>")
    return f'<div class="diagram" markdown="0">{"".join(parts)}</div>'
