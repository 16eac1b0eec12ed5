"""Architectures side by side: a strip of colored layers for each, with parameters, active parameters and state."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from hybridnas.arch.arch import Arch
from hybridnas.draw.palette import color
from hybridnas.errors import ConfigError
from hybridnas.files import write_atomic
from hybridnas.registry import BLOCKS
from hybridnas.units import human, human_bytes

STATE_LENGTHS = (4096, 131072)  # contexts at which states are compared [tokens]
_ROW, _BAR, _NAMES, _STRIP, _WIDEST = 22, 14, 170, 620, 14  # lengths in pixels
_COLUMNS = (75, 65, 95, 100)
_STYLE = (
    ".strips text{font:12px sans-serif;fill:#1F2933}.strips .soft{fill:#5F6C7B}"
    "@media (prefers-color-scheme:dark){.strips text{fill:#E9E9EA}.strips .soft{fill:#A7AFB9}}"
)


def draw_strips(models: Sequence[tuple[str, Arch]], path: str | Path) -> Path:
    """Draw named architectures below one another to ``FILE.svg`` and return its path; raises ConfigError for others."""
    path = Path(path)
    if path.suffix.lower() != ".svg":
        raise ConfigError(
            f"drawing {str(path)!r} of several architectures must end in .svg, got {path.suffix or 'no suffix'}",
            field="out",
            got=path.suffix,
            allowed=".svg",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, strips_text(models).encode())
    return path


def strips_text(models: Sequence[tuple[str, Arch]]) -> str:
    """Return the drawing as SVG text: one bar for a layer in its letter's color, branches of a layer stacked."""
    width = _NAMES + _STRIP + sum(_COLUMNS) + 10
    height = _ROW * (len(models) + 2)
    letters = sorted({slot.letter for _, arch in models for slot in arch.pattern.slots})
    heads = ("parameters", "active", *(f"state at {length // 1024}k" for length in STATE_LENGTHS))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="strips" role="img">',
        f"<style>{_STYLE}</style>",
        *_numbers(0, heads, "soft"),
    ]
    step = min(float(_WIDEST), _STRIP / max((len(arch.layers) for _, arch in models), default=1))
    for row, (name, arch) in enumerate(models, 1):
        top = _ROW * row
        parts.append(f'<text x="4" y="{top + 15}">{escape(name)}</text>')
        parts.append(f"<g><title>{escape(str(arch.pattern))}</title>{''.join(_strip(arch, top, step))}</g>")
        cost = arch.cost()
        states = (human_bytes(arch.cost(length).state_bytes) for length in STATE_LENGTHS)
        parts += _numbers(row, (human(cost.params), human(cost.active_params), *states))
    left, top = _NAMES, _ROW * (len(models) + 1)
    for letter in letters:
        name = f"{letter} {BLOCKS.get(letter).name}"
        parts.append(f'<rect x="{left}" y="{top + 4}" width="{_BAR}" height="{_BAR}" fill="{color(letter)}"/>')
        parts.append(f'<text class="soft" x="{left + _BAR + 4}" y="{top + 15}">{escape(name)}</text>')
        left += _BAR + 16 + 7 * len(name)
    return "\n".join([*parts, "</svg>"])


def _strip(arch: Arch, top: int, step: float) -> list[str]:
    found = []
    for index, layer in enumerate(arch.layers):
        tall = _BAR / len(layer)
        for place, branch in enumerate(layer):
            wide = step / len(branch)
            found += [
                f'<rect x="{_NAMES + step * index + wide * order:.2f}" y="{top + 4 + tall * place:.2f}" '
                f'width="{wide * 0.9:.2f}" height="{tall:.2f}" fill="{color(node.slot.letter)}"/>'
                for order, node in enumerate(branch)
            ]
    return found


def _numbers(row: int, texts: Sequence[str], style: str = "") -> list[str]:
    found, right = [], _NAMES + _STRIP
    for text, wide in zip(texts, _COLUMNS, strict=True):
        right += wide
        found.append(f'<text class="{style}" text-anchor="end" x="{right}" y="{_ROW * row + 15}">{escape(text)}</text>')
    return found
