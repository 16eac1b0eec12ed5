"""A page for each trial within the report: drawing, sizes, curve, costs, choices, and the commands to go on with it.

They are parts of the report's one file, shown when their address (``report.html#trial-7``) is opened: a report that is
sent to somebody keeps them, and a trial can be linked to and printed alone.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.analysis.ranking import Row, preset_record
from hybridnas.errors import HybridNASError
from hybridnas.report import plots
from hybridnas.report.colors import WHEEL
from hybridnas.report.html import difference, markup
from hybridnas.report.sections import ReportInput, choice_name, color_of, state_of
from hybridnas.study.records import ARCH, COMPLETE, DUPLICATE, PRUNED, WORDS, TrialRecord, trial_folder
from hybridnas.units import human, human_bytes, percent

if TYPE_CHECKING:
    from hybridnas.arch.arch import Arch


@dataclass(frozen=True)
class TrialPage:
    """What the page of a trial shows."""

    number: int
    name: str
    pattern: str
    summary: str
    drawing: Any = ""  # SVG; empty where the architecture cannot be read
    layers: Sequence[tuple[str, str, str, str, str]] = ()  # where, block, sizes, parameters, state
    facts: Sequence[tuple[str, str]] = ()
    chart: plots.Chart | None = None
    commands: Sequence[tuple[str, str]] = ()


def read_arch(study_folder: Path, record: TrialRecord) -> tuple[Arch | None, str]:
    """Return a trial's architecture, or None and why it cannot be read."""
    from hybridnas.arch.arch import Arch

    number = record.number if record.duplicate_of is None else record.duplicate_of
    path = trial_folder(study_folder, number) / ARCH
    try:
        return Arch.from_dict(json.loads(path.read_text(encoding="utf-8"))), ""
    except (OSError, ValueError):
        return None, f"{path.parent.name}/{path.name} is missing or damaged."
    except HybridNASError as error:  # a block of the user's that this process has not registered
        return None, str(error)


def trial_pages(study_folder: Path, lines: Sequence[Row], given: ReportInput) -> list[TrialPage]:
    """Return the pages of the leaderboard's trials."""
    return [_page(study_folder, row, given) for row in lines]


def _page(study_folder: Path, row: Row, given: ReportInput) -> TrialPage:
    record = row.record
    arch, _ = read_arch(study_folder, record)
    points, color = record.points(), color_of(record, given)
    return TrialPage(
        record.number,
        record.name,
        record.pattern,
        _summary(row, given),
        _drawing(record, arch),
        _layers(arch, given),
        _facts(record, given),
        plots.curve(points, WHEEL[1] if color == "faint" else color, record.name) if len(points) > 1 else None,
        _commands(record, given),
    )


def _summary(row: Row, given: ReportInput) -> str:
    record = row.record
    parts = [WORDS[record.state]]
    if row.rank is not None:
        parts = [f"rank {row.rank}"]
    if row.loss is not None:
        parts.append(f"loss {row.loss:.4f} nats/token")
    if row.gap is not None and record.preset != given.meta.reference:
        parts.append(f"{difference(row.gap)} to {given.meta.reference}")
    for text in (record.violation, record.reason):
        if text:
            parts.append(text)
    return ", ".join(parts)


def _drawing(record: TrialRecord, arch: Arch | None) -> Any:
    if arch is None:
        return ""
    from hybridnas.draw.strips import strips_text

    return markup(strips_text([(record.preset or f"trial {record.number}", arch)]))


def _layers(arch: Arch | None, given: ReportInput) -> list[tuple[str, str, str, str, str]]:
    if arch is None:
        return []
    from hybridnas.draw.table import describe_layers

    return [
        (one.where, f"{one.letter} {one.name}".strip(), one.sizes, human(one.cost.params or one.cost.embedding_params),
         human_bytes(one.cost.state_bytes) if one.cost.state_bytes else "")
        for one in describe_layers(arch, given.state_length or 1024).rows
    ]  # fmt: skip


def _facts(record: TrialRecord, given: ReportInput) -> list[tuple[str, str]]:
    cost, at = record.cost, f" at {given.state_length:,} tokens" if given.state_length else ""
    found = [
        ("parameters", human(cost.get("params"))),
        ("active parameters", human(cost.get("active_params"))),
        (f"state{at}", human_bytes(state_of(record))),
        ("FLOPs per token, forward", human(cost.get("flops_per_token"))),
        ("test loss", "" if record.test_loss is None else f"{record.test_loss:.4f} nats/token"),
        ("bits", "" if record.bits_per_byte is None else given.meta.bits(record.bits_per_byte)),
        ("accuracy", percent(record.accuracy)),
        ("recall, where the test part repeats itself", percent(record.test_repeat_accuracy)),
        ("tokens", f"{record.tokens:,}" if record.tokens else ""),
        ("time", f"{record.seconds:,.0f} s" if record.seconds else ""),
        ("training speed", f"{record.tokens_per_second:,.0f} tokens/s" if record.tokens_per_second else ""),
        ("learning rate", "" if record.lr is None else f"{record.lr:.3g}"),
        ("seed", str(record.seed)),
        ("fingerprint", record.fingerprint[:12]),
    ]
    found += [(choice_name(name), str(value)) for name, value in record.choices.items()]
    return [(name, value) for name, value in found if value]


def _commands(record: TrialRecord, given: ReportInput) -> list[tuple[str, str]]:
    if record.state not in (COMPLETE, PRUNED, DUPLICATE) or given.meta.from_table:
        return []
    study, number = shlex.quote(f"study={given.meta.name}"), record.number
    found = [
        ("train it again: same seed, same data", f"python -m hybridnas.replay {study} trial={number}"),
        ("write its model as a folder", f"python -m hybridnas.export {study} trial={number} out=DIR"),
    ]
    if preset_record(given.records, given.meta.reference) is not None:
        baseline = shlex.quote(f"baseline={given.meta.reference}")
        found.append(("compare it", f"python -m hybridnas.compare {study} run={number} {baseline}"))
    return found
