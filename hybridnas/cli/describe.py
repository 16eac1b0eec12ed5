"""``python -m hybridnas.describe``: the presets, or one architecture in numbers and as a drawing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.cli.command import ARCH, DEVICE, PATTERN, Command, Done, group
from hybridnas.cli.lineage import show_lineage
from hybridnas.cli.wanted import NONCAUSAL, model_folder, wanted_arch
from hybridnas.config import allowed_text, option, spell
from hybridnas.errors import ConfigError, suggest
from hybridnas.units import human, human_bytes

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch
    from hybridnas.arch.presets import Release

# How the parameters that one token uses are counted; ours is the first. A tied pair is one matrix, and both count once.
CONVENTIONS = {
    "neither": "without embedding and head",
    "one": "with one of the two matrices",
    "both": "with embedding and head",
}


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    preset: Mapping[str, Any] | None = group(None, "architecture of a paper, with its sizes")
    experiment: Mapping[str, Any] | None = group(None, "settings from a file")
    pattern: str | None = option(None, PATTERN)
    model: Path | None = option(None, "a model's folder, whose grafts are listed, too")
    block: str | None = option(None, "lists the settings of a block by its letter or name, e.g. E or moe")
    presets: str = option("all", "which presets stand side by side: all, or families and names, e.g. granite,jamba")
    arch: Mapping[str, Any] = option({}, ARCH)
    seq_len: int = option(1024, "length at which FLOPs and state are stated [tokens]", ge=1)
    out: Path | None = option(None, "draws the architecture: FILE.svg, .png or .pdf; several presets: FILE.svg")
    exportable: bool = option(False, "lists the classes of transformers, and which can hold the architecture [yes/no]")
    device: str = option("auto", f"whose kernels are named: {DEVICE}")

    @classmethod
    def label(cls) -> str:
        return "describe"


def run(settings: Settings) -> Done:
    """Describe ``preset=``, ``pattern=`` or ``model=`` layer by layer; without either, presets side by side."""
    if settings.block is not None:
        return Done(_block(settings.block))
    arch = wanted_arch(settings.preset, settings.pattern, settings.arch)
    lineage: tuple[Mapping[str, Any], ...] = ()
    if settings.model is not None:
        if arch is not None:
            name = "preset" if settings.preset else "pattern"
            raise ConfigError(
                f"describe model=FOLDER has its architecture, got {name}= too; leave one out",
                field=name,
                got=getattr(settings, name),
            )
        arch, lineage = _stored(settings.model)
    if arch is None:
        return Done(_presets(settings.presets, settings.seq_len, settings.out))
    from hybridnas.arch.presets import PRESETS

    found = {**facts(arch, settings.seq_len), "layers": _layers(arch, settings.seq_len)}
    show.line(_active_text(found["active"]))
    if settings.preset is not None:
        release = PRESETS.get(settings.preset["name"]).release
        found["published"] = _published(release)
        if release is not None:
            _show_release(release)
    found["implementations"] = _kernels(arch, settings.device)
    if not arch.causal:
        show.line(NONCAUSAL)
    if lineage:
        show_lineage(lineage)
        found["lineage"] = list(lineage)
    if settings.exportable:
        found["exportable"] = _exportable(arch)
    if settings.out is not None:
        from hybridnas.draw.svg import draw_svg

        found["drawing"] = str(draw_svg(arch, settings.out))
        show.line(f"drawn: {found['drawing']}")
    return Done(found)


def _stored(folder: Path) -> tuple[Arch, tuple[Mapping[str, Any], ...]]:
    """Return the architecture of an exported folder, and the grafts that led to it."""
    from hybridnas.export.layout import CONFIG
    from hybridnas.export.load import arch_of, lineage_of, read_config

    where = model_folder(folder)
    config = read_config(where)
    return arch_of(config, where / CONFIG), lineage_of(config, where / CONFIG)


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
        "active": active_counts(arch),
    }


def _exportable(arch: Arch) -> dict[str, str]:
    """Print which formats can hold the architecture, and why the others cannot."""
    from hybridnas.export.hf.fitting import exportable

    reasons = exportable(arch)
    rows = [[name, "yes" if not reason else "no", reason] for name, reason in reasons.items()]
    show.table("Formats of python -m hybridnas.export", ["format", "fits", "what it lacks"], rows, left=(0, 1, 2))
    return reasons


def active_counts(arch: Arch) -> dict[str, int]:
    """Return the active parameters by each convention in use, keys of ``CONVENTIONS`` [count per token]."""
    cost = arch.cost()
    matrix = arch.d_model * arch.vocab_size
    counts = {"neither": cost.active_params, "both": cost.active_params + cost.embedding_params}
    return counts if arch.model.tie_embeddings else {**counts, "one": cost.active_params + matrix}


def conventions_of(figure: str, active: Mapping[str, int]) -> list[str]:
    """Return by which conventions the active parameters round to a printed figure such as 12.9B."""
    unit = {"M": 1e6, "B": 1e9}[figure[-1]]
    digits = len(figure[:-1].partition(".")[2])
    return [key for key, count in active.items() if f"{count / unit:.{digits}f}" == figure[:-1]]


def stated(release: Release, active: Mapping[str, int]) -> str:
    """Return in words what the makers state of a release, and by which convention they count active parameters."""
    if not release.active_params:
        return f"{release.params} parameters"
    found = conventions_of(release.active_params, active)
    how = " or ".join(CONVENTIONS[key] for key in found) or "by none of these conventions"
    return f"{release.params} parameters, {release.active_params} active ({how})"


def _active_text(active: Mapping[str, int]) -> str:
    return "active parameters: " + ", ".join(f"{count:,} {CONVENTIONS[key]}" for key, count in active.items())


def _published(release: Release | None) -> dict[str, Any] | None:
    """Return what is published of a preset's release; None for a preset that is none."""
    if release is None:
        return None
    from hybridnas.arch.presets import preset

    keys = ("title", "source", "total", "counted", "params", "active_params", "lacks")
    active = active_counts(preset(release.name))
    how = conventions_of(release.active_params, active) if release.active_params else []
    return {**{key: getattr(release, key) for key in keys}, "active_params_by": how}


def _show_release(release: Release) -> None:
    from hybridnas.arch.presets import preset

    show.line(f"released: {release.title}, {release.total:,} parameters with embedding and head ({release.counted})")
    if release.lacks:
        show.line(f"the preset lacks: {release.lacks}")
    show.line(f"its makers state: {stated(release, active_counts(preset(release.name)))}; source: {release.source}")


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


def _presets(chosen: str, seq_len: int, out: Path | None) -> dict[str, Any]:
    """Print presets side by side, one family after the other, draw them where asked to, and return their facts."""
    from hybridnas.arch.presets import PRESETS, families, preset
    from hybridnas.draw.strips import STATE_LENGTHS, draw_strips

    known = families()
    names = [name for group in known.values() for name in group]
    if chosen != "all":
        wanted = [part.strip() for part in chosen.split(",")]
        for part in wanted:
            if part not in known and part not in PRESETS:
                raise ConfigError(
                    f"describe presets={part} is neither a family nor a preset{suggest(part, [*known, *names])}",
                    field="presets",
                    got=part,
                    allowed=("all", *known, *names),
                )
        names = [name for name in names if name in wanted or PRESETS.get(name).family in wanted]
    found, rows = [], []
    for name in names:
        arch, entry = preset(name), PRESETS.get(name)
        cost = arch.cost(seq_len)
        figures: Any = entry.release or next(iter(entry.paper), None)
        states = {length: arch.cost(length).state_bytes for length in STATE_LENGTHS}
        own = {"preset": name, "family": entry.family, **facts(arch, seq_len), "state_bytes": states}
        found.append({**own, "published": _published(entry.release)})
        rows.append(
            [
                name,
                letters_of(arch),
                str(arch.d_model),
                f"{cost.params:,}",
                f"{cost.active_params:,}",
                f"{cost.params + cost.embedding_params:,}",
                " / ".join(filter(None, (figures.params, figures.active_params))) if figures else "",
                human(cost.flops_per_token),
                *(human_bytes(states[length]) for length in STATE_LENGTHS),
            ]
        )
    columns = ["preset", "pattern", "d_model", "params", "active", "with embedding and head", "published"]
    columns += ["FLOPs/token", *(f"state at {length // 1024}k" for length in STATE_LENGTHS)]
    show.table("Presets (params and active without embedding and head; states in float32)", columns, rows, left=(0, 1))
    if out is None:
        return {"presets": found}
    drawing = str(draw_strips([(name, preset(name)) for name in names], out))
    show.line(f"drawn: {drawing}")
    return {"presets": found, "drawing": drawing}


def letters_of(arch: Arch) -> str:
    """Return the folded pattern without the arguments of single slots."""
    from hybridnas.arch.folding import spell as folded

    return folded([re.sub(r"\{[^}]*\}", "", str(layer)) for layer in arch.pattern.layers])


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
    parts = {part: own for part, own in model.implementations(device).items() if part not in ("norm", "loss")}
    found = {op: text for own in parts.values() for op, text in own.items()}
    for operation, text in found.items():
        show.line(f"{operation} on {device}: {text}")
    return found
