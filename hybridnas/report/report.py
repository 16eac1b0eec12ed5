"""The report of a study: one ``report.html`` that opens from disk, needs no network, and says how it was made.

Its sections are those of sections.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridnas.errors import HybridNASError
from hybridnas.report import leaderboard as board
from hybridnas.report.html import cell, difference, markup, render
from hybridnas.report.leaderboard import Row
from hybridnas.report.sections import Story, colour_of, tell
from hybridnas.search.confirm import confirmed_winner, paired, trained_name, turned
from hybridnas.search.reference import read_rival
from hybridnas.study.objectives import objectives_of
from hybridnas.study.records import (
    COMPLETE,
    DUPLICATE,
    FAIL,
    INFEASIBLE,
    PRUNED,
    StudyMeta,
    TrialRecord,
    save,
    trained_tokens,
    trial_folder,
)
from hybridnas.units import human, human_bytes

REPORT = "report.html"
TABLE_LIMIT = 200  # rows in the page; leaderboard.csv has all


def write_report(study_folder: Path | str, records: Iterable[TrialRecord], meta: StudyMeta) -> Path:
    """Write the study's ``report.html`` atomically and return its path; works with any number of records, even none.

    Raises StudyError when the disk refuses.
    """
    path = Path(study_folder) / REPORT
    save(path, render_report(study_folder, list(records), meta))
    return path


def render_report(study_folder: Path | str, records: Sequence[TrialRecord], meta: StudyMeta) -> str:
    """Return the report as one HTML text; the same input gives the same text."""
    rows = board.rows(records)
    best = board.winner(records)
    drawing, missing = _drawing(Path(study_folder), best)
    return render(
        "report.html.j2",
        title=f"hybridnas: {meta.name}",
        meta=meta,
        best=best,
        headline=headline(records),
        searched=_searched(records, meta),
        confirmation=_confirmation(records),
        notes=_notes(records, meta),
        cards=_cards(records, meta),
        drawing=drawing,
        drawing_missing=missing,
        table=_table(rows[:TABLE_LIMIT], best),
        footnotes=[note for note in board.footnotes(rows, len(rows) - TABLE_LIMIT) if "per active" not in note],
        sections=tell(Story(records, meta, read_rival(Path(study_folder)))),
        failures=_failures(records),
        commands=_commands(records, meta),
        facts=_facts(records, meta),
    )


def headline(records: Sequence[TrialRecord]) -> str:
    """Return the study's answer to "better than the paper's?" in one sentence."""
    best = board.winner(records)
    if best is None or best.valid_loss is None:
        over = [record for record in records if record.state in (FAIL, INFEASIBLE)]
        words = "1 trial" if len(over) == 1 else f"{len(over)} trials"
        return f"Nothing has completed: {words} failed" if over else "No trial has completed yet"
    if trained_name(best) == "accuracy" and next(iter(objectives_of(best)), "") == "accuracy":
        return f"{best.name} is best, with accuracy {best.accuracy:.4f}"
    paper = board.baseline(records, "moe_mamba")
    if confirmed_winner(records) is not None and paper is not None and paper.confirmed:
        return _confirmed_headline(best, paper)
    if paper is None or paper.valid_loss is None:
        return f"Best so far: {best.name} at {best.valid_loss:.4f} nats per token (moe_mamba has not completed)"
    if paper.number == best.number:
        others = sum(record.state == COMPLETE for record in records) - 1
        ahead = "the other architecture" if others == 1 else f"all {others} other architectures"
        return f"moe_mamba stays ahead of {ahead}" if others else "Only moe_mamba has completed"
    gap = paper.valid_loss - best.valid_loss
    if gap < 5e-5:
        return f"{best.name} and moe_mamba end at the same loss"
    return f"{best.name} beats moe_mamba by {gap:.4f} nats per token"


def _confirmed_headline(best: TrialRecord, paper: TrialRecord) -> str:
    if best.number == paper.number:
        return f"moe_mamba stays ahead over {len(best.confirmed)} fresh seeds"
    gap = paired(turned(best), turned(paper))
    if not gap.clear:
        return f"{best.name} is best on average, but its lead over moe_mamba is inside the noise"
    return f"{best.name} beats moe_mamba by {-gap.mean:.4f} ± {gap.half:.4f} nats per token over {gap.n} fresh seeds"


def _searched(records: Sequence[TrialRecord], meta: StudyMeta) -> str:
    best = board.winner(records)
    parts = [f"{len(records)} candidates"]
    if meta.active_params:
        parts[0] += f", each matched to {human(meta.active_params)} active parameters"
    tokens = meta.tokens or (best.tokens if best else None)
    if tokens:
        active = meta.active_params or (best.cost.get("active_params") if best else None)
        ratio = f" ({tokens / active:.1f} per active parameter)" if active else ""
        parts.append(f"the survivors trained on {human(tokens)} tokens{ratio}")
    if meta.data:
        parts.append(f"of {meta.data}" if tokens else f"data: {meta.data}")
    return ", ".join(parts[:2]) + (f" {parts[2]}" if len(parts) > 2 else "") + "."


def _confirmation(records: Sequence[TrialRecord]) -> tuple[str, str]:
    """Return what the pill beside the headline says of the winner, and its tone."""
    best = board.winner(records)
    if best is None:
        return "", ""
    if confirmed_winner(records) is None:
        return "unconfirmed: one seed", "bad"
    return f"confirmed: {len(best.confirmed)} fresh seeds", "good"


def _notes(records: Sequence[TrialRecord], meta: StudyMeta) -> list[str]:
    notes = list(meta.notes)
    if board.winner(records) is None:
        return notes
    for name in board.BASELINES:
        tried = [record for record in records if record.preset == name]
        if tried and board.baseline(records, name) is None:
            why = f": {tried[0].reason}" if tried[0].reason else ""
            notes.append(f"{name} is {tried[0].state.lower()}{why}; so no difference to it is stated.")
    return notes


def _cards(records: Sequence[TrialRecord], meta: StudyMeta) -> list[dict[str, str]]:
    best = board.winner(records)
    cards = []
    if best is not None and best.valid_loss is not None:
        cards.append(_card(f"{best.valid_loss:.4f}", f"lowest validation loss, trial {best.number}"))
        for name in board.BASELINES:
            mark = board.baseline_loss(records, name)
            if mark is not None:
                gap = best.valid_loss - mark
                tone = "good" if gap < -5e-5 else ""
                cards.append(_card(difference(gap), f"to {name} ({mark:.4f})", tone))
        active = best.cost.get("active_params")
        if active and best.tokens:
            cards.append(
                _card(f"{best.tokens / active:.1f}", f"tokens per active parameter ({human(best.tokens)} tokens)")
            )
        cards.append(_card(human(active), f"active of {human(best.cost.get('params'))} parameters"))
    counts = Counter(record.state for record in records)
    words = ", ".join(
        f"{counts[state]} {state.lower()}" for state in (PRUNED, FAIL, INFEASIBLE, DUPLICATE) if counts[state]
    )
    asked = f" of {meta.n_trials}" if meta.n_trials else ""
    cards.append(
        _card(f"{len(records)}{asked}", f"trials: {counts[COMPLETE]} complete" + (f", {words}" if words else ""))
    )
    return cards


def _card(value: str, words: str, tone: str = "") -> dict[str, str]:
    return {"value": value, "words": words, "tone": tone}


def _drawing(study_folder: Path, best: TrialRecord | None) -> tuple[Any, str]:
    """Return the winner's drawing, or why there is none."""
    if best is None:
        return "", ""
    path = trial_folder(study_folder, best.number) / "arch.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "", f"It is not drawn: {path.parent.name}/{path.name} is missing or damaged."
    from hybridnas.arch.arch import Arch
    from hybridnas.draw.svg import svg_text

    try:
        return markup(svg_text(Arch.from_dict(values))), ""
    except HybridNASError as error:  # a block of the user's that this process has not registered
        return "", f"It is not drawn: {error}"


def _table(rows: Sequence[Row], best: TrialRecord | None) -> dict[str, Any]:
    names = [
        ("#", "rank among completed trials"), ("trial", ""), ("architecture", ""), ("params", "without embeddings"),
        ("active", "parameters used for one token"), ("state", "bytes one sequence carries"),
        ("FLOPs", "forward, per token"), ("loss", "nats per token"), ("vs moe_mamba", "negative is better"),
        ("vs mamba", "negative is better"), ("accuracy", "of the next token"), ("tokens/s", "while training"), ("", ""),
    ]  # fmt: skip
    columns = [{"name": name, "help": words, "text": name in ("architecture", "")} for name, words in names]
    return {"columns": columns, "rows": [_table_row(row, best) for row in rows if row.record.state != INFEASIBLE]}


def _table_row(row: Row, best: TrialRecord | None) -> dict[str, Any]:
    record, cost = row.record, row.record.cost
    words = board.human_cells(row)
    colour = colour_of(record, best)
    named = {
        "strong": record.preset or "",
        "text": record.pattern,
        "sort": record.name,
        "style": "arch text",
        "dot": colour if colour != "faint" else "",
    }
    state = record.state.lower() + (f" of {record.duplicate_of}" if record.duplicate_of is not None else "")
    cells = [
        cell(words["#"], row.rank),
        cell(words["trial"], record.number),
        named,
        cell(words["params"], cost.get("params")),
        cell(words["active"], cost.get("active_params")),
        cell(human_bytes(cost.get("state_bytes")), cost.get("state_bytes")),
        cell(words["FLOPs"], cost.get("flops_per_token")),
        cell(words["loss"], row.loss),
        *(cell(difference(row.vs[name]), row.vs[name], _tone(row.vs[name])) for name in board.BASELINES),
        cell(words["acc"], record.accuracy),
        cell(words["tok/s"], record.tokens_per_second),
        cell(state, state, "text"),
    ]
    style = "first" if row.rank == 1 else "" if row.rank else "dim"
    return {"trial": record.number, "style": style, "cells": cells}


def _tone(gap: float | None) -> str:
    return "good" if gap is not None and gap < -5e-5 else ""


def _failures(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for record in records:
        if record.state in (FAIL, INFEASIBLE):
            reason = record.reason or "no reason was recorded"
            groups.setdefault((record.state.lower(), reason), []).append(record.number)
    return [
        {"state": state, "reason": reason, "count": len(numbers), "numbers": _listed(numbers)}
        for (state, reason), numbers in groups.items()
    ]


def _listed(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:12]))
    return f"{shown} and {len(numbers) - 12} more" if len(numbers) > 12 else shown


def _commands(records: Sequence[TrialRecord], meta: StudyMeta) -> list[tuple[str, str]]:
    study, best = f"study={meta.name}", board.winner(records)
    found = [("search on, or start over in an empty folder", meta.command)] if meta.command else []
    if best is not None:
        found += [
            ("train the winner again: same seed, same data, same numbers on CPU",
             f"python -m hybridnas.replay {study} trial={best.number}"),
            *_more_certain(records, meta),
            ("write any trial's model as a folder", f"python -m hybridnas.export {study} trial={best.number} out=DIR"),
            ("let the winner write", f"python -m hybridnas.generate model={meta.path}/best prompt='def '"),
            ("tokens to reach mamba's final loss", f"python -m hybridnas.compare {study} baseline=mamba"),
        ]  # fmt: skip
    found.append(("browse the runs in MLflow", f"mlflow ui --backend-store-uri sqlite:///{meta.path}/mlflow.db"))
    return found


def _more_certain(records: Sequence[TrialRecord], meta: StudyMeta) -> list[tuple[str, str]]:
    if confirmed_winner(records) is not None or not meta.command:
        return []
    words = "train the best again with fresh seeds, against a random search of equal cost"
    return [(words, f"{meta.command} confirm=on against=random")]


def _facts(records: Sequence[TrialRecord], meta: StudyMeta) -> list[tuple[str, str]]:
    trained = trained_tokens(records)
    facts: list[tuple[str, Any]] = [
        ("data", meta.data),
        ("context and batch", f"{meta.seq_len} tokens, {meta.batch_size} sequences" if meta.seq_len else ""),
        ("sampler and pruner", " and ".join(part for part in (meta.sampler, meta.pruner) if part)),
        ("trained in all", f"{human(trained)} tokens" if trained else ""),
        ("seed", f"{meta.seed}; {meta.seeds_per_trial} for each trial"),
        ("started", meta.started),
        ("wall time", _duration(meta.seconds)),
        ("machine", meta.machine),
        ("versions", _versions(meta.versions)),
    ]
    return [(key, str(value)) for key, value in facts if value]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
