"""``python -m hybridnas.describe``: the presets, or one architecture in numbers and as a drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.cli.command import ARCH, DEVICE, PATTERN, Command, Done, group
from hybridnas.cli.wanted import NONCAUSAL, wanted_arch
from hybridnas.config import allowed_text, option, spell
from hybridnas.units import human

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    preset: Mapping[str, Any] | None = group(None, "architecture of a paper, with its sizes")
    experiment: Mapping[str, Any] | None = group(None, "settings from a file")
    pattern: str | None = option(None, PATTERN)
    block: str | None = option(None, "lists the settings of a block by its letter or name, e.g. E or moe")
    arch: Mapping[str, Any] = option({}, ARCH)
    seq_len: int = option(1024, "length at which FLOPs and state are stated [tokens]", ge=1)
    out: Path | None = option(None, "draws the architecture: FILE.svg, .png or .pdf")
    device: str = option("auto", f"whose kernels are named: {DEVICE}")

    @classmethod
    def label(cls) -> str:
        return "describe"


def run(settings: Settings) -> Done:
    """Describe ``preset=`` or ``pattern=`` layer by layer; without either, all presets beside the paper's figures."""
    if settings.block is not None:
        return Done(_block(settings.block))
    arch = wanted_arch(settings.preset, settings.pattern, settings.arch)
    if arch is None:
        return Done({"presets": _presets(settings.seq_len)})
    found = {**facts(arch, settings.seq_len), "layers": _layers(arch, settings.seq_len)}
    found["implementations"] = _kernels(arch, settings.device)
    if not arch.causal:
        show.line(NONCAUSAL)
    if settings.out is not None:
        from hybridnas.draw.svg import draw_svg

        found["drawing"] = str(draw_svg(arch, settings.out))
        show.line(f"drawn: {found['drawing']}")
    return Done(found)


def facts(arch: Arch, seq_len: int) -> dict[str, Any]:
    """Return what identifies an architecture and what it costs, for ``json=true``."""
    return {
        "pattern": str(arch.pattern),
        "fingerprint": arch.fingerprint(),
        "causal": arch.causal,
        "d_model": arch.d_model,
        "vocab_size": arch.vocab_size,
        "seq_len": seq_len,
        "cost": asdict(arch.cost(seq_len)),
    }


def _block(name: str) -> dict[str, Any]:
    """Print a block's fields with defaults and meanings."""
    from hybridnas.registry import BLOCKS

    letters = [letter for letter in BLOCKS if name in (letter, BLOCKS.get(letter).name)]
    letter = letters[0] if letters else name
    block = BLOCKS.get(letter)  # raises with the letters that there are
    found = []
    for field in dataclasses.fields(block.Config):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = "given by the model" if needed else spell(getattr(block.Config(d_model=64), field.name))
        found.append((field.name, default, allowed_text(field), field.metadata["doc"]))
    title = f"{letter} {block.name}: set as arch.{letter}.NAME=VALUE, or in a pattern as {letter}{{NAME=VALUE}}"
    show.table(title, ["setting", "default", "allowed", "meaning"], found, left=(0, 1, 2, 3))
    fields = [dict(zip(("name", "default", "allowed", "meaning"), row, strict=True)) for row in found]
    return {"letter": letter, "block": block.name, "fields": fields}


def _presets(seq_len: int) -> list[dict[str, Any]]:
    from hybridnas.arch.presets import PRESETS, preset

    found, rows = [], []
    for name in PRESETS:
        arch = preset(name)
        cost = arch.cost(seq_len)
        papers = PRESETS.get(name).paper
        printed = f"{papers[0].params} / {papers[0].active_params}" if papers else "-"
        found.append({"preset": name, **facts(arch, seq_len)})
        rows.append(
            [
                name,
                str(arch.pattern),
                str(arch.d_model),
                f"{cost.params:,}",
                f"{cost.active_params:,}",
                printed,
                human(cost.flops_per_token),
                human(cost.state_bytes),
            ]
        )
    columns = ["preset", "pattern", "d_model", "params", "active", "paper", "FLOPs/token", f"state@{seq_len} [B]"]
    show.table("Presets (parameters without embedding and head)", columns, rows, left=(0, 1))
    return found


def _layers(arch: Arch, seq_len: int) -> list[dict[str, Any]]:
    from hybridnas.draw.table import describe_layers

    table = describe_layers(arch, seq_len)
    rows = [
        [
            where,
            name,
            sizes,
            f"{cost.params + cost.embedding_params:,}",
            f"{cost.active_params:,}",
            human(cost.flops_per_token),
            f"{cost.state_bytes:,}",
        ]
        for where, name, sizes, cost in (
            *((row.where, f"{row.letter} {row.name}".strip(), row.sizes, row.cost) for row in table.rows),
            ("", "total", "", table.total),
        )
    ]
    title = f"{arch.pattern}   d_model {arch.d_model}, vocabulary {arch.vocab_size:,}, fingerprint {arch.short}"
    columns = ["layers", "block", "sizes", "params", "active", "FLOPs/token", f"state@{seq_len} [B]"]
    show.table(title, columns, rows, left=(0, 1, 2))
    return [
        {"layers": row.where, "letter": row.letter, "block": row.name, "sizes": row.sizes, "cost": asdict(row.cost)}
        for row in table.rows
    ]


def _kernels(arch: Arch, device_name: str) -> dict[str, str]:
    from hybridnas.arch.model import HybridLM
    from hybridnas.hardware import pick_device

    device = pick_device(device_name)
    model = HybridLM(arch, device="meta")
    found = {op: text for block in model.blocks() for op, text in block.implementations(device).items()}
    for operation, text in found.items():
        show.line(f"{operation} on {device}: {text}")
    return found
