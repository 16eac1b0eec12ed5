"""Architectures as Mermaid flowcharts, which READMEs and model cards show without an image file."""

from __future__ import annotations

from hybridnas.arch.arch import Arch
from hybridnas.arch.folding import Motif
from hybridnas.draw.palette import INK, color, tint
from hybridnas.draw.table import main_sizes
from hybridnas.registry import BLOCKS


def mermaid(arch: Arch) -> str:
    """Return the layers as a Mermaid flowchart, repeats folded into boxes, for READMEs and model cards."""
    chart = _Mermaid(arch)
    return chart.text()


class _Mermaid:
    """Writes the flowchart; a group that repeats is a subgraph titled with its count."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch
        self.lines = ["flowchart TD", "  embed([embedding])"]
        self.edges: list[str] = []
        self.shared: dict[str, str] = {}
        self.groups = 0

    def text(self) -> str:
        before = "embed"
        for part in self.arch.pattern.motif.parts:
            before = self._piece(part, before, "  ")
        self.lines.append("  head([head])")
        letters = sorted({slot.letter for slot in self.arch.pattern.slots})
        classes = [f"  classDef {x} fill:{tint(color(x))},stroke:{color(x)},color:{INK}" for x in letters]
        return "\n".join([*self.lines, *self.edges, f"  {before} --> head", *classes]) + "\n"

    def _piece(self, part: Motif, before: str, indent: str) -> str:
        inside = indent
        if part.times > 1:
            self.groups += 1
            self.lines.append(f'{indent}subgraph g{self.groups}["\N{MULTIPLICATION SIGN}{part.times}"]')
            inside = indent + "  "
        if part.parts:
            for inner in part.parts:
                before = self._piece(inner, before, inside)
        else:
            before = self._layer(part, before, inside)
        if part.times > 1:
            self.lines.append(f"{indent}end")
        return before

    def _layer(self, leaf: Motif, before: str, indent: str) -> str:
        branches = self.arch.layers[leaf.layers[0]]
        ends = []
        for branch in branches:
            previous = before
            for node in branch:
                name = f"n{node.layer}_{node.branch}_{node.position}"
                share = f" @{node.slot.share}" if node.slot.share else ""
                label = f"<b>{node.slot.letter}</b> {BLOCKS.get(node.slot.letter).name}{share}<br/>{main_sizes(node)}"
                self.lines.append(f'{indent}{name}["{label}"]:::{node.slot.letter}')
                self.edges.append(f"  {previous} --> {name}")
                if node.slot.share and self.shared.setdefault(node.slot.share, name) != name:
                    self.edges.append(f"  {self.shared[node.slot.share]} -.- {name}")
                previous = name
            ends.append(previous)
        if len(ends) == 1:
            return ends[0]
        total = f"n{leaf.layers[0]}_sum"
        self.lines.append(f"{indent}{total}((+))")
        self.edges += [f"  {end} --> {total}" for end in ends]
        return total
