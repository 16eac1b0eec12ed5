"""The report of a study: one self-contained ``report.html`` that opens from disk and needs no network.

Its sections are those of sections.py.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridnas.analysis.confirmation import confirmed_winner, trained_objective
from hybridnas.analysis.held_out import TEST, VALID, loss_on, stated_part
from hybridnas.analysis.ranking import Row, preset_loss, preset_record, rows, winner
from hybridnas.analysis.verdict import Verdict, over_documents
from hybridnas.errors import HybridNASError
from hybridnas.report import leaderboard as board
from hybridnas.report.claims import budget_note, confirmed_headline, study_documents
from hybridnas.report.html import cell, difference, markup, render
from hybridnas.report.sections import ReportInput, color_of, sections
from hybridnas.study.objectives import objectives_of
from hybridnas.study.records import (
    ARCH,
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
from hybridnas.study.reference import read_reference_study
from hybridnas.units import human, human_bytes, several

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
    folder = Path(study_folder)
    given = ReportInput(records, meta, read_reference_study(folder), study_documents(folder))
    lines, best = rows(records, meta.reference), given.best
    drawing, missing = _drawing(Path(study_folder), best)
    return render(
        "report.html.j2",
        title=f"hybridnas: {meta.name}",
        meta=meta,
        best=best,
        headline=headline(records, meta.reference, given.verdict),
        searched=_searched(records, meta),
        confirmation=_confirmation(records),
        notes=_notes(records, meta),
        cards=_cards(given),
        drawing=drawing,
        drawing_missing=missing,
        table=_table(lines[:TABLE_LIMIT], given),
        footnotes=[note for note in board.footnotes(lines, len(lines) - TABLE_LIMIT) if "per active" not in note],
        sections=sections(given),
        failures=_failures(records),
        commands=_commands(records, meta),
        facts=_facts(records, meta),
    )


def headline(records: Sequence[TrialRecord], reference: str | None, verdict: Verdict | None = None) -> str:
    """State in one sentence what is best, and by how much it is better than the reference preset.

    ``verdict``: of a study whose winner was confirmed.
    """
    if verdict is not None:
        return confirmed_headline(verdict, reference)
    best = winner(records)
    if best is None or best.valid_loss is None:
        over = [record for record in records if record.state in (FAIL, INFEASIBLE)]
        count = several(len(over), "trial")
        return f"Nothing has completed: {count} failed" if over else "No trial has completed yet"
    part = stated_part(records)
    where = " on the test part" if part == TEST else ""
    loss = loss_on(best, part)
    if trained_objective(best) == "accuracy" and next(iter(objectives_of(best)), "") == "accuracy":
        accuracy = best.test_accuracy if part == TEST else best.accuracy
        return f"{best.name} is best, with accuracy {accuracy:.4f}{where}"
    if reference is None:
        return f"{best.name} is best, at {loss:.4f} nats per token{where}"
    compared = preset_record(records, reference)
    mark = None if compared is None else loss_on(compared, part)
    if compared is None or mark is None or loss is None:
        return f"Best so far: {best.name} at {loss:.4f} nats per token{where} ({reference} has not completed)"
    if compared.number == best.number:
        others = sum(record.state == COMPLETE for record in records) - 1
        ahead = "the other architecture" if others == 1 else f"all {others} other architectures"
        return f"{reference} stays ahead of {ahead}" if others else f"Only {reference} has completed"
    gap = mark - loss
    if abs(gap) < 5e-5 or (gap < 0 and part == VALID):  # the first objective may be another one than the loss
        return f"{best.name} and {reference} end at the same loss{where}"
    if gap < 0:
        return (
            f"{best.name} was chosen on validation data, but {reference} is better by {-gap:.4f} nats per token{where}"
        )
    return f"{best.name} leads {reference} by {gap:.4f} nats per token{where}, with one seed"


def _searched(records: Sequence[TrialRecord], meta: StudyMeta) -> str:
    best = winner(records)
    parts = [f"{len(records)} candidates"]
    if meta.active_params:
        parts[0] += f", each sized to {human(meta.active_params)} active parameters"
    tokens = meta.tokens or (best.tokens if best else None)
    if meta.from_table:
        return f"{parts[0]}. Nothing was trained: {meta.data}."
    if tokens:
        active = meta.active_params or (best.cost.get("active_params") if best else None)
        ratio = f" ({tokens / active:.1f} per active parameter)" if active else ""
        parts.append(f"those not stopped early trained on {human(tokens)} tokens{ratio}")
    if meta.data:
        parts.append(f"of {meta.data}" if tokens else f"data: {meta.data}")
    return ", ".join(parts[:2]) + (f" {parts[2]}" if len(parts) > 2 else "") + "."


def _confirmation(records: Sequence[TrialRecord]) -> tuple[str, str]:
    """Return the label beside the headline, whether the winner is confirmed, and its CSS class."""
    best = winner(records)
    if best is None:
        return "", ""
    if confirmed_winner(records) is None:
        return "unconfirmed: one seed", "bad"
    return f"confirmed: {several(len(best.confirmed), 'fresh seed')}", "good"


def _notes(records: Sequence[TrialRecord], meta: StudyMeta) -> list[str]:
    notes = list(meta.notes)
    if winner(records) is None:
        return notes
    tried = [record for record in records if meta.reference is not None and record.preset == meta.reference]
    if tried and preset_record(records, meta.reference) is None:
        why = f": {tried[0].reason}" if tried[0].reason else ""
        notes.append(f"{meta.reference} is {tried[0].state.lower()}{why}; so no difference to it is stated.")
    return [*notes, *filter(None, [budget_note(meta)])]


def _cards(given: ReportInput) -> list[dict[str, str]]:
    records, meta, best = given.records, given.meta, given.best
    cards = []
    if best is not None and best.valid_loss is not None:
        cards += _one_seed_cards(given, best) if given.verdict is None else _verdict_cards(given.verdict)
        active = best.cost.get("active_params")
        if active and best.tokens:
            cards.append(
                _card(f"{best.tokens / active:.1f}", f"tokens per active parameter ({human(best.tokens)} tokens)")
            )
        cards.append(_card(human(active), f"active of {human(best.cost.get('params'))} parameters"))
    counts = Counter(record.state for record in records)
    others = ", ".join(
        f"{counts[state]} {state.lower()}" for state in (PRUNED, FAIL, INFEASIBLE, DUPLICATE) if counts[state]
    )
    asked = f" of {meta.n_trials}" if meta.n_trials else ""
    cards.append(
        _card(f"{len(records)}{asked}", f"trials: {counts[COMPLETE]} complete" + (f", {others}" if others else ""))
    )
    return cards


def _one_seed_cards(given: ReportInput, best: TrialRecord) -> list[dict[str, str]]:
    """Return the winner's loss with the search's seed, and its difference to the reference preset: no claim."""
    part = stated_part(given.records)
    loss = loss_on(best, part)
    lowest = min(record.valid_loss for record in given.records if record.valid_loss is not None) == best.valid_loss
    what = f"{'lowest validation loss' if lowest else 'validation loss of the best'}, trial {best.number}"
    if part == TEST:
        what = f"test loss, trial {best.number} (validation {best.valid_loss:.4f})"
    cards = [_card(f"{loss:.4f}", what)]
    mark = preset_loss(given.records, given.meta.reference, part)
    if mark is not None and loss is not None:
        over = over_documents(given.records, given.meta.reference, given.documents, alpha=given.meta.alpha)
        interval = "" if over is None or over.half is None else f" ± {over.half:.4f} over {over.sources}"
        cards.append(_card(difference(loss - mark), f"to {given.meta.reference} ({mark:.4f}){interval}"))
    return cards


def _verdict_cards(verdict: Verdict) -> list[dict[str, str]]:
    """Return the winner's mean over the seeds that state it, and its first comparison."""
    best, tested = verdict.best, verdict.part == TEST
    values = best.verdict_test if tested else best.verdict
    words = "further seed"
    if not values:
        values, tested, words = best.confirmed, False, "fresh seed"
    known = [value for value in values.values() if value is not None]
    what = "accuracy" if trained_objective(best) == "accuracy" else "loss"
    label = f"{'test' if tested else 'validation'} {what}, trial {best.number}, mean of {several(len(known), words)}"
    cards = [_card(f"{statistics.fmean(known):.4f}" if known else "failed", label)]
    one = next((one for one in verdict.others if one.gap.half is not None), None)
    if one is not None:
        tone = "good" if one.claimed(verdict.alpha) and one.gap.mean < 0 else ""
        label = f"± {one.gap.half:.4f} to {one.name}, over {one.gap.sources}"
        cards.append(_card(difference(one.gap.mean), label, tone))
    return cards


def _card(value: str, label: str, tone: str = "") -> dict[str, str]:
    return {"value": value, "label": label, "tone": tone}


def _drawing(study_folder: Path, best: TrialRecord | None) -> tuple[Any, str]:
    """Return the winner's drawing, or why there is none."""
    if best is None:
        return "", ""
    path = trial_folder(study_folder, best.number) / ARCH
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


def _table(lines: Sequence[Row], given: ReportInput) -> dict[str, Any]:
    reference = given.meta.reference
    tested = any(row.part == TEST for row in lines)
    names = [
        ("#", "rank among completed trials"), ("trial", ""), ("architecture", ""), ("params", "without embeddings"),
        ("active", "parameters used for one token"), ("state", "bytes one sequence carries"),
        ("FLOPs", "forward, per token"), ("loss", "nats per token, validation"),
        *([("test", "nats per token of data that nothing was chosen by")] if tested else []),
        *([(f"vs {reference}", "negative is better")] if reference is not None else []),
        ("accuracy", "of the next token"), ("tokens/s", "while training"), ("", ""),
    ]  # fmt: skip
    columns = [{"name": name, "help": meaning, "text": name in ("architecture", "")} for name, meaning in names]
    shown = [_table_row(row, given, tested) for row in lines if row.record.state != INFEASIBLE]
    return {"columns": columns, "rows": shown}


def _table_row(row: Row, given: ReportInput, tested: bool) -> dict[str, Any]:
    reference = given.meta.reference
    record, cost = row.record, row.record.cost
    texts = board.human_cells(row, reference)
    color = color_of(record, given)
    named = {
        "strong": record.preset or "",
        "text": record.pattern,
        "sort": record.name,
        "style": "arch text",
        "dot": color if color != "faint" else "",
    }
    state = record.state.lower() + (f" of {record.duplicate_of}" if record.duplicate_of is not None else "")
    cells = [
        cell(texts["#"], row.rank),
        cell(texts["trial"], record.number),
        named,
        cell(texts["params"], cost.get("params")),
        cell(texts["active"], cost.get("active_params")),
        cell(human_bytes(cost.get("state_bytes")), cost.get("state_bytes")),
        cell(texts["FLOPs"], cost.get("flops_per_token")),
        cell(texts["loss"], row.loss),
        *([cell(texts["test"], record.test_loss)] if tested else []),
        *([cell(difference(row.gap), row.gap)] if reference is not None else []),
        cell(texts["acc"], record.accuracy),
        cell(texts["tok/s"], record.tokens_per_second),
        cell(state, state, "text"),
    ]
    style = "first" if row.rank == 1 else "" if row.rank else "dim"
    return {"trial": record.number, "style": style, "cells": cells}


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
    study, best = shlex.quote(f"study={meta.name}"), winner(records)
    model, database = shlex.quote(f"model={meta.path}/best"), shlex.quote(f"sqlite:///{meta.path}/mlflow.db")
    found = [("search on, or start over in an empty folder", meta.command)] if meta.command else []
    if best is not None and not meta.from_table:
        found += [
            ("train the winner again: same seed, same data, same numbers on CPU",
             f"python -m hybridnas.replay {study} trial={best.number}"),
            *_more_certain(records, meta),
            ("write any trial's model as a folder", f"python -m hybridnas.export {study} trial={best.number} out=DIR"),
            ("generate text with the winner", f"python -m hybridnas.generate {model} prompt='def '"),
        ]  # fmt: skip
        if preset_record(records, meta.reference) is not None:
            command = f"python -m hybridnas.compare {study} {shlex.quote(f'baseline={meta.reference}')}"
            found.append((f"tokens to reach {meta.reference}'s final loss", command))
    found.append(("browse the runs in MLflow", f"mlflow ui --backend-store-uri {database}"))
    return found


def _more_certain(records: Sequence[TrialRecord], meta: StudyMeta) -> list[tuple[str, str]]:
    best = confirmed_winner(records)
    if (best is not None and best.verdict) or not meta.command:
        return []
    purpose = "train the best again with fresh seeds, against a random search of equal cost"
    return [(purpose, f"{meta.command} confirm=on against=random")]


def _facts(records: Sequence[TrialRecord], meta: StudyMeta) -> list[tuple[str, str]]:
    trained = trained_tokens(records)
    facts: list[tuple[str, Any]] = [
        ("data", meta.data),
        ("context and batch", f"{meta.seq_len} tokens, {meta.batch_size} sequences" if meta.seq_len else ""),
        ("sampler and pruner", " and ".join(part for part in (meta.sampler, meta.pruner) if part)),
        ("looked up in all" if meta.from_table else "trained in all", f"{human(trained)} tokens" if trained else ""),
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
