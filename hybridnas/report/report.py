"""The report of a study: one self-contained ``report.html`` that opens from disk and needs no network.

Its sections are those of sections.py, its pages of single trials those of trials.py.
"""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybridnas.analysis.confirmation import confirmed_winner, trained_objective
from hybridnas.analysis.held_out import TEST, VALID, loss_on, stated_part
from hybridnas.analysis.intervals import share_interval
from hybridnas.analysis.limits import measured_figures
from hybridnas.analysis.ranking import Row, preset_loss, preset_record, rows, winner
from hybridnas.analysis.verdict import Verdict, over_documents
from hybridnas.report import leaderboard as board
from hybridnas.report.claims import budget_notes, confirmed_headline, study_documents
from hybridnas.report.html import cell, difference, markup, render
from hybridnas.report.limits import limits_section, nothing_keeps, read_limits, refused_words, rows_of_refusals, words
from hybridnas.report.sections import ReportInput, choice_name, color_of, sections, state_of
from hybridnas.report.sound import sound_figures
from hybridnas.report.status import seconds_left
from hybridnas.report.trials import read_arch, trial_pages
from hybridnas.study.objectives import OBJECTIVES, objectives_of
from hybridnas.study.records import (
    COMPLETE,
    DUPLICATE,
    FAIL,
    INFEASIBLE,
    PRUNED,
    WORDS,
    StudyMeta,
    TrialRecord,
    save,
    trained_tokens,
)
from hybridnas.study.reference import read_reference_study
from hybridnas.units import duration, human, human_bytes, percent, several

REPORT = "report.html"
TABLE_LIMIT = 200  # rows in the page; leaderboard.csv has all
GENERATED = {  # by kind of data: what its models write, and the settings for it; no other kind's ids are readable
    **dict.fromkeys(("", "stdlib", "text", "hub"), ("text", "prompt='def '")),
    "audio": ("a recording", "out=sample.wav"),
    "dna": ("DNA", "prompt=ACGT"),
}
RELOAD = 20  # a page of a search that runs is read again after this long [s]


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
    given = ReportInput(records, meta, read_reference_study(folder), study_documents(folder), read_limits(folder))
    lines, best = rows(records, meta.reference), given.best
    shown = [row for row in lines[:TABLE_LIMIT] if row.record.state != INFEASIBLE]
    drawing, missing = _drawing(folder, best)
    limits = limits_section(given)
    return render(
        "report.html.j2",
        title=f"hybridnas: {meta.name}",
        meta=meta,
        reload=RELOAD if meta.status == "running" else None,
        running=_running(folder, given),
        best=best,
        headline=headline(records, meta.reference, given.verdict, limits=given.limits, length=given.state_length),
        searched=_searched(records, meta),
        confirmation=_confirmation(given),
        warnings=_warnings(given),
        notes=_notes(given),
        cards=_cards(given),
        drawing=drawing,
        drawing_missing=missing,
        sounds=sound_figures(folder),
        table=_table(shown, given),
        footnotes=[note for note in board.footnotes(lines, len(lines) - TABLE_LIMIT) if "per active" not in note],
        sections=([] if limits is None else [limits]) + sections(given),
        failures=rows_of_refusals(records),
        trials=trial_pages(folder, shown, given),
        commands=_commands(records, meta),
        facts=_facts(given),
    )


def conclusion(study_folder: Path | str, records: Sequence[TrialRecord], meta: StudyMeta) -> list[str]:
    """Return a study's answer in a few sentences: what won, by how much, and how often its budget decides rightly."""
    folder = Path(study_folder)
    given = ReportInput(records, meta, read_reference_study(folder), study_documents(folder), read_limits(folder))
    first = headline(records, meta.reference, given.verdict, limits=given.limits, length=given.state_length)
    size = (
        f"At {meta.active_params:,} active parameters and {meta.tokens:,} tokens: "
        if meta.active_params and meta.tokens
        else ""
    )
    return [f"{size}{first}.", *_notes(given)]


def headline(
    records: Sequence[TrialRecord],
    reference: str | None,
    verdict: Verdict | None = None,
    *,
    limits: Mapping[str, float] | None = None,
    length: int | None = None,
) -> str:
    """State in one sentence what is best, within which limits, and by how much it is better than the reference preset.

    Where a preset won: what the best was that the search drew. ``verdict``: of a study whose winner was confirmed.
    ``limits``: of the study, by name; ``length``: tokens at which a limit of the state counts.
    """
    within = f"Within {words(limits, length)}, " if limits else ""
    if verdict is not None:
        said = confirmed_headline(verdict, reference)
        return within + (said[0].lower() + said[1:] if within and said.startswith("No") else said)
    best = winner(records)
    if best is None or best.valid_loss is None:
        missed = nothing_keeps(records, limits or {}, length)
        if missed is not None:
            return missed
        over = Counter(WORDS[record.state] for record in records if record.state in (FAIL, INFEASIBLE))
        counts = " and ".join(f"{several(count, 'trial')} {state}" for state, count in over.items())
        return f"Nothing has completed: {counts}" if over else "No trial has completed yet"
    return within + _lead(records, best, reference) + _own_best(records, best)


def _own_best(records: Sequence[TrialRecord], best: TrialRecord) -> str:
    """Where a preset won, state what the search itself found."""
    if best.preset is None or not any(record.preset is None for record in records):
        return ""
    drawn = winner(record for record in records if record.preset is None)
    part = stated_part(records)
    ours, theirs = (None if one is None else loss_on(one, part) for one in (drawn, best))
    if drawn is None or ours is None or theirs is None:
        return "; nothing that the search drew has completed"
    gap = ours - theirs
    where = f"{abs(gap):.4f} nats per token {'behind' if gap > 0 else 'ahead'}" if abs(gap) >= 5e-5 else "level with it"
    return f"; the best that the search drew, {drawn.name} (trial {drawn.number}), is {where}"


def _lead(records: Sequence[TrialRecord], best: TrialRecord, reference: str | None) -> str:
    """State who leads by the search's one seed, and by how much."""
    part = stated_part(records)
    where = " on the test part" if part == TEST else ""
    loss = loss_on(best, part)
    if trained_objective(best) == "accuracy" and next(iter(objectives_of(best)), "") == "accuracy":
        accuracy = best.test_accuracy if part == TEST else best.accuracy
        return f"{best.name} is best, with accuracy {percent(accuracy)}{where}"
    if reference is None:
        return f"{best.name} is best, at {loss:.4f} nats per token{where}"
    compared = preset_record(records, reference)
    mark = None if compared is None else loss_on(compared, part)
    if compared is None or mark is None or loss is None:
        outside = any(record.preset == reference and record.state == INFEASIBLE for record in records)
        why = "is outside the limits" if outside else "has not completed"
        return f"{best.name} is best, at {loss:.4f} nats per token{where} ({reference} {why})"
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


def _running(folder: Path, given: ReportInput) -> str:
    """Return how far a search that runs has come, and how long it will take; empty for one that does not run."""
    meta = given.meta
    if meta.status != "running":
        return ""
    of = f" of {meta.n_trials}" if meta.n_trials else ""
    left = None if meta.from_table else seconds_left(folder, given.records, meta.n_trials)
    about = f", about {duration(left)} left" if left is not None else ""
    return f"running: {len(given.records)}{of} trials{about}; this page reads itself again every {RELOAD} s"


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
        data = meta.data if len(meta.data) < 60 else meta.data.partition(":")[0]
        parts.append(f"of {data}" if tokens else f"data: {data}")
    return ", ".join(parts[:2]) + (f" {parts[2]}" if len(parts) > 2 else "") + "."


def _confirmation(given: ReportInput) -> tuple[str, str]:
    """Return the label beside the headline, whether the winner is confirmed, and its CSS class.

    Green is kept for a lead that fresh seeds confirm: seeds may as well show that there is none.
    """
    best = given.best
    if best is None:
        return "", ""
    if confirmed_winner(given.records) is None:
        return "unconfirmed: one seed", "bad"
    others = [] if given.verdict is None else [one for one in given.verdict.others if one.adjusted is not None]
    ahead = bool(others) and all(one.claimed(given.meta.alpha) and one.gap.mean < 0 for one in others)
    return f"confirmed: {several(len(best.confirmed), 'fresh seed')}", "good" if ahead else ""


def _warnings(given: ReportInput) -> list[str]:
    """Return what went wrong or is missing."""
    records, meta = given.records, given.meta
    notes = list(meta.notes)
    tried = [record for record in records if meta.reference is not None and record.preset == meta.reference]
    if given.best is not None and tried and preset_record(records, meta.reference) is None:
        why = f": {tried[0].reason}" if tried[0].reason else ""
        notes.append(f"{meta.reference} is {WORDS[tried[0].state]}{why}; so no difference to it is stated.")
    return notes


def _notes(given: ReportInput) -> list[str]:
    """Return what was refused, and how far the comparisons can be trusted."""
    raced = any(record.own_rates for record in given.records)
    trust = [] if given.best is None else budget_notes(given.meta, confirmed=raced)
    return [*filter(None, [refused_words(given.records, given.limits)]), *trust]


def _cards(given: ReportInput) -> list[dict[str, str]]:
    records, meta, best = given.records, given.meta, given.best
    cards = []
    if best is not None and best.valid_loss is not None:
        cards += _one_seed_cards(given, best) if given.verdict is None else _verdict_cards(given.verdict)
        cards += _accuracy_card(given, best)
        active = best.cost.get("active_params")
        if active and best.tokens:
            cards.append(
                _card(f"{best.tokens / active:.1f}", f"tokens per active parameter ({human(best.tokens)} tokens)")
            )
        cards.append(_card(human(active), f"active of {human(best.cost.get('params'))} parameters"))
    counts = Counter(record.state for record in records)
    others = ", ".join(
        f"{counts[state]} {WORDS[state]}" for state in (PRUNED, FAIL, INFEASIBLE, DUPLICATE) if counts[state]
    )
    asked = f" of {meta.n_trials}" if meta.n_trials else ""
    cards.append(
        _card(f"{len(records)}{asked}", f"trials: {counts[COMPLETE]} complete" + (f", {others}" if others else ""))
    )
    return cards


def _accuracy_card(given: ReportInput, best: TrialRecord) -> list[dict[str, str]]:
    """Return the winner's test accuracy and its interval where each example has one answer, else nothing."""
    find = given.documents
    sums = find(None, best.number, None) if find is not None and best.test_accuracy is not None else None
    if sums is None or best.test_accuracy is None or any(count != 1 for count in sums.tokens):
        return []
    right = best.test_accuracy * len(sums.tokens)
    if abs(right - round(right)) > 1e-6:  # R2 of numbers is no share of the examples
        return []
    low, high = share_interval(round(right), len(sums.tokens))
    words = f"test accuracy, {percent(low)} to {percent(high)} with 95 %, {len(sums.tokens):,} examples"
    return [_card(percent(best.test_accuracy), words)]


def _one_seed_cards(given: ReportInput, best: TrialRecord) -> list[dict[str, str]]:
    """Return the winner's loss with the search's seed, and its difference to the reference preset: no claim."""
    part = stated_part(given.records)
    loss = loss_on(best, part)
    lowest = min(record.valid_loss for record in given.records if record.valid_loss is not None) == best.valid_loss
    what = f"{'lowest validation loss' if lowest else 'validation loss of the best'}, trial {best.number}"
    if part == TEST:
        what = f"test loss, trial {best.number} (validation {best.valid_loss:.4f})"
    bits = best.test_bits_per_byte if part == TEST else best.bits_per_byte
    if bits is not None:
        what += f"; {given.meta.bits(bits)}"
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
    arch, why = read_arch(study_folder, best)
    if arch is None:
        return "", f"It is not drawn: {why}"
    from hybridnas.draw.svg import svg_text

    return markup(svg_text(arch)), ""


def _table(lines: Sequence[Row], given: ReportInput) -> dict[str, Any]:
    reference, length = given.meta.reference, given.state_length
    tested = any(row.part == TEST for row in lines)
    choices = board.differing_choices(row.record for row in lines)
    recalled = any(row.record.test_repeat_accuracy is not None for row in lines)
    names = [
        ("#", "rank among completed trials"), ("trial", ""), ("architecture", ""),
        ("loss", "nats per token, validation"),
        *([("test", "nats per token of data that nothing was chosen by")] if tested else []),
        *([(f"vs {reference}", "negative is better")] if reference is not None else []),
        *((choice_name(name), "a choice of the space") for name in choices),
        ("params", "without embeddings"), ("active", "parameters used for one token"),
        (f"state at {length:,}" if length else "state", "bytes one sequence carries"),
        ("FLOPs", "forward, per token"), ("accuracy", "of the next token"),
        *([("recall", "accuracy on the test part where a window repeats itself")] if recalled else []),
        ("tokens/s", "while training"),
        *((OBJECTIVES[name].label, "as measured for the limit, before training")
          for name in measured_figures(given.limits or {})),
        ("", ""),
    ]  # fmt: skip
    columns = [{"name": name, "help": meaning, "text": name in ("architecture", "")} for name, meaning in names]
    return {"columns": columns, "rows": [_table_row(row, given, tested, choices, recalled) for row in lines]}


def _table_row(row: Row, given: ReportInput, tested: bool, choices: Sequence[str], recalled: bool) -> dict[str, Any]:
    reference = given.meta.reference
    record, cost = row.record, row.record.cost
    texts = board.human_cells(row, reference)
    color = color_of(record, given)
    named = {
        **cell(record.pattern, record.name, "arch text"),
        "strong": record.preset or "",
        "dot": color if color != "faint" else "",
    }
    state = WORDS[record.state] + (f" of {record.duplicate_of}" if record.duplicate_of is not None else "")
    if record.violation:
        state += ", outside limits"
    cells = [
        cell(texts["#"], row.rank),
        {**cell(texts["trial"], record.number), "link": f"#trial-{record.number}"},
        named,
        cell(texts["loss"], row.loss),
        *([cell(texts["test"], record.test_loss)] if tested else []),
        *([cell(difference(row.gap), row.gap)] if reference is not None else []),
        *(cell(board.choice_text(record, name), record.choices.get(name)) for name in choices),
        cell(texts["params"], cost.get("params")),
        cell(texts["active"], cost.get("active_params")),
        cell(human_bytes(state_of(record)), state_of(record)),
        cell(texts["FLOPs"], cost.get("flops_per_token")),
        cell(texts["acc"], record.accuracy),
        *([cell(texts["recall"], record.test_repeat_accuracy)] if recalled else []),
        cell(texts["tok/s"], record.tokens_per_second),
        *(
            cell(human(record.figures.get(name)), record.figures.get(name))
            for name in measured_figures(given.limits or {})
        ),
        cell(state, state, "text"),
    ]
    style = "first" if row.rank == 1 else "" if row.rank else "dim"
    return {"trial": record.number, "style": style, "cells": cells}


def _commands(records: Sequence[TrialRecord], meta: StudyMeta) -> list[tuple[str, str]]:
    study, best = shlex.quote(f"study={meta.name}"), winner(records)
    made, how = GENERATED.get(meta.kind, ("", ""))
    model, database = shlex.quote(f"model={meta.path}/best"), shlex.quote(f"sqlite:///{meta.path}/mlflow.db")
    found = [("search on, or start over in an empty folder", meta.command)] if meta.command else []
    if best is not None and not meta.from_table:
        found += [
            ("train the winner again: same seed, same data, same numbers on CPU",
             f"python -m hybridnas.replay {study} trial={best.number}"),
            *_more_certain(records, meta),
            ("write any trial's model as a folder", f"python -m hybridnas.export {study} trial={best.number} out=DIR"),
            *([(f"generate {made} with the winner", f"python -m hybridnas.generate {model} {how}")] if made else []),
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


def _facts(given: ReportInput) -> list[tuple[str, str]]:
    records, meta = given.records, given.meta
    trained = trained_tokens(records)
    facts: list[tuple[str, Any]] = [
        ("data", meta.data),
        ("context and batch", f"{meta.seq_len} tokens, {meta.batch_size} sequences" if meta.seq_len else ""),
        ("limits", words(given.limits, given.state_length)),
        ("sampler and pruner", " and ".join(part for part in (meta.sampler, meta.pruner) if part)),
        ("looked up in all" if meta.from_table else "trained in all", f"{human(trained)} tokens" if trained else ""),
        ("seed", str(meta.seed)),
        ("started", meta.started),
        ("wall time", duration(meta.seconds)),
        ("machine", meta.machine),
        ("versions", _versions(meta.versions)),
    ]
    return [(key, str(value)) for key, value in facts if value]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
