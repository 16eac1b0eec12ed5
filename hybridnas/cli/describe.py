"""``python -m hybridnas.describe``: the presets, or one architecture in numbers and as a drawing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridnas.cli import show
from hybridnas.errors import ConfigError
from hybridnas.units import human

HELP = "tables of presets, layers, parameters, FLOPs and state; out=graph.svg draws the architecture"


def run(config: dict[str, Any]) -> int:
    """Describe ``preset=`` or ``pattern=`` layer by layer; without either, all presets beside the paper's figures."""
    from hybridnas.cli.wanted import wanted_arch

    if not isinstance(config["seq_len"], int) or config["seq_len"] < 1:
        raise ConfigError(f"describe seq_len={config['seq_len']!r} must be a whole number of 1 or more")
    arch = wanted_arch(config)
    if arch is None:
        _presets(config["seq_len"])
        return 0
    _layers(arch, config["seq_len"])
    _kernels(arch, config["device"])
    if config["out"]:
        from hybridnas.draw.svg import draw_svg

        show.line(f"drawn: {draw_svg(arch, Path(config['out']))}")
    return 0


def _presets(seq_len: int) -> None:
    from hybridnas.arch.presets import PRESETS, preset

    rows = []
    for name in PRESETS:
        arch = preset(name)
        cost = arch.cost(seq_len)
        paper = PRESETS.get(name).paper
        rows.append(
            [
                name,
                str(arch.pattern),
                str(arch.d_model),
                f"{cost.params:,}",
                f"{cost.active_params:,}",
                f"{paper[0].params} / {paper[0].active_params}" if paper else "",
                human(cost.flops_per_token),
                human(cost.state_bytes),
            ]
        )
    columns = ["preset", "pattern", "d_model", "params", "active", "paper", "FLOPs/token", f"state@{seq_len} [B]"]
    show.table("Presets (parameters without embedding and head)", columns, rows, left=(0, 1))


def _layers(arch: Any, seq_len: int) -> None:
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


def _kernels(arch: Any, device_name: str) -> None:
    from hybridnas.arch.model import HybridLM
    from hybridnas.hardware import pick_device

    device = pick_device(device_name)
    model = HybridLM(arch, device="meta")
    words = {op: text for block in model.blocks() for op, text in block.implementations(device).items()}
    for operation, text in words.items():
        show.line(f"{operation} on {device}: {text}")
