"""The report's sections: a title, a sentence, a plot and perhaps a table, each made from a study's records alone.

A new section is a function in ``SECTIONS``; it returns None where the records hold too little for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hybridnas.analysis import effects, rung_correlation
from hybridnas.analysis.bootstrap import Difference, difference, holm
from hybridnas.analysis.confirmation import confirmed_part, confirmed_scores, summaries, trained_objective
from hybridnas.analysis.curves import best_so_far, course
from hybridnas.analysis.held_out import TEST
from hybridnas.analysis.ranking import front, last_loss, preset_record, winner
from hybridnas.analysis.verdict import Documents, Verdict, verdict
from hybridnas.report import charts, plots
from hybridnas.report.claims import sentence
from hybridnas.report.colors import preset_key
from hybridnas.report.html import cell, short
from hybridnas.report.html import difference as shown_difference
from hybridnas.report.plots import Axis, Chart, Series
from hybridnas.study.objectives import OBJECTIVES, eligible, objectives_of
from hybridnas.study.records import COMPLETE, PRUNED, StudyMeta, TrialRecord, trained_tokens
from hybridnas.study.reference import ReferenceStudy
from hybridnas.units import human, human_bytes, percent

SHOWN = 3  # architectures that must have a letter, for its effect to be drawn
UNITS = {"val_loss": "nats/token", "accuracy": "negative accuracy"}


@dataclass(frozen=True)
class ReportInput:
    """What a report is made from."""

    records: Sequence[TrialRecord]
    meta: StudyMeta
    reference_study: ReferenceStudy | None = None
    documents: Documents | None = None  # finds what runs lost on each document of the test part
    limits: Mapping[str, float] = field(default_factory=dict)  # by name

    @cached_property
    def best(self) -> TrialRecord | None:
        """The winner so far."""
        return winner(self.records)

    @cached_property
    def verdict(self) -> Verdict | None:
        """The winner compared with others by seeds that chose nothing; None before fresh seeds decide who wins."""
        reference, against = self.meta.reference, self.reference_study
        return verdict(self.records, reference, against=against, documents=self.documents, alpha=self.meta.alpha)

    @cached_property
    def drawn(self) -> TrialRecord | None:
        """The best that the search drew, presets left out."""
        return winner(record for record in self.records if record.preset is None)

    @property
    def state_length(self) -> int | None:
        """Tokens at which every state in the report is given."""
        return self.meta.state_length or self.meta.seq_len


def state_of(record: TrialRecord) -> float | None:
    """Return the state of one sequence at the study's ``state_length``, the training length where it has none."""
    return record.figures.get("state_bytes", record.cost.get("state_bytes"))


@dataclass(frozen=True)
class Section:
    """One part of the report: its sentences, charts or none, a table or none."""

    title: str
    intro: str
    charts: Sequence[Chart] = ()
    caption: str = ""
    table: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=tuple)


def color_of(record: TrialRecord, given: ReportInput) -> str:
    """Return the name of a trial's color: a preset has its own in every picture, the best that was drawn another."""
    if record.preset:
        return preset_key(record.preset)
    return "winner" if given.drawn is not None and record.number == given.drawn.number else "faint"


def _label(record: TrialRecord, given: ReportInput) -> str:
    if record.preset:
        return record.preset if record.state == COMPLETE else ""
    return f"best drawn: {short(record.name)}" if color_of(record, given) == "winner" else ""


def _title(record: TrialRecord) -> str:
    loss = last_loss(record)
    return f"trial {record.number} {record.name}" + ("" if loss is None else f", loss {loss:.4f}")


def _series(given: ReportInput, records: Sequence[TrialRecord], figure: str | None) -> list[Series]:
    """Return every trained trial as a curve, or as one point: a figure of its cost against its last loss."""
    found = []
    for record in records:
        loss = last_loss(record)
        if record.state not in (COMPLETE, PRUNED) or loss is None:
            continue
        points = record.points()
        if figure is not None:
            value = state_of(record) if figure == "state_bytes" else record.cost.get(figure)
            points = [] if value is None else [(float(value), loss)]
        hollow = record.state == PRUNED
        color, label = color_of(record, given), _label(record, given)
        found.append(Series(record.number, _title(record), color, label, points, hollow))
    return found


def _confirmed(given: ReportInput) -> Section | None:
    """Fresh seeds: each mean with its error and paired differences; the verdict by seeds that chose nothing."""
    found = summaries(given.records)
    if not found:
        return None
    best, alpha = given.best, given.meta.alpha
    others: list[tuple[str, TrialRecord]] = []
    compared = preset_record(given.records, given.meta.reference)
    if compared is not None and compared.confirmed:
        others.append((str(given.meta.reference), compared))
    study = given.reference_study
    if study is not None and study.confirmed:
        others.append((study.name, study.again))
    part = confirmed_part([*given.records, *(record for _, record in others)])
    tested = {one.record.number: one.value for one in summaries(given.records, part)} if part == TEST else {}
    columns = [("architecture", True), ("seeds", False), ("mean", False), ("standard error", False)]
    columns += [("test mean", False)] if tested else []
    raced = any(one.record.own_lr is not None for one in found)
    columns += [("learning rate", False)] if raced else []
    columns += [(f"vs {name}", False) for name, _ in others]
    gaps = [_gaps([one.record for one in found], record, part, alpha) for _, record in others]
    rows = []
    for place, one in enumerate(found):
        test = tested.get(one.record.number)
        value = "a seed failed" if one.value is None else f"{one.value:.4f}"
        cells = [
            _named(one.record),
            cell(str(one.n), one.n),
            cell(value, one.value),
            cell("" if one.error is None else f"{one.error:.4f}", one.error),
            *([cell("" if test is None else f"{test:.4f}", test)] if tested else []),
            *([_rate_cell(one.record)] if raced else []),
            *(_pair_cell(*column[place], alpha) for column in gaps),
        ]
        first = best is not None and one.record.number == best.number
        rows.append({"trial": one.record.number, "style": "first" if first else "", "cells": cells})
    seeds = max(one.n for one in found)
    intro = (
        f"The best of the search and the presets, trained again with {seeds} fresh seeds each at full length. The "
        f"search's own seed is left out: its results chose these. Pairs share seed and order of the data. The best "
        f"mean on validation data wins; since these seeds chose it, other seeds state by how much it is better."
    )
    screened = sum(bool(record.screened) for record in given.records)
    if screened:
        intro += f" Which of the drawn: the best of {screened} by the mean of two seeds, the search's own and one more."
    if raced:
        intro += " Each at its own best learning rate, found at full length with the search's seed."
    caption = (
        f"± is half the {100 * (1 - alpha):g}% interval of the paired difference over these seeds"
        f"{', on the test part' if tested else ''}; grey: Holm's adjusted p, over all in the column, is not below "
        f"{alpha:g}."
    )
    table = {"columns": [{"name": name, "help": "", "text": text} for name, text in columns], "rows": rows}
    return Section("Confirmation", intro, caption=caption, table=table, notes=_verdict_notes(given.verdict))


def _rate_cell(record: TrialRecord) -> dict[str, Any]:
    return cell("" if record.own_lr is None else f"{record.own_lr:.4g}", record.own_lr)


def _gaps(
    records: Sequence[TrialRecord], compared: TrialRecord, part: str, alpha: float
) -> list[tuple[Difference | None, float | None]]:
    """Return each record's difference to another one over the seeds that choose, and its adjusted p-value."""
    found: list[Difference | None] = []
    for record in records:
        same = record.fingerprint == compared.fingerprint and record.confirmed == compared.confirmed
        gap = difference(confirmed_scores(record, part), confirmed_scores(compared, part), alpha=alpha)
        found.append(None if same else gap)
    adjusted = iter(holm([gap.p for gap in found if gap is not None and gap.p is not None]))
    return [(gap, None if gap is None or gap.p is None else next(adjusted)) for gap in found]


def _verdict_notes(found: Verdict | None) -> list[str]:
    """Return the verdict's comparisons as sentences, after one that says by what they were made."""
    if found is None:
        return []
    if not found.stated:
        return ["No difference is stated: the seeds above chose the winner, and no others were trained (confirm=on)."]
    where = " on the test part" if found.part == TEST else ""
    count = sum(one.adjusted is not None for one in found.others)
    how = f"Verdict{where}, by {len(found.best.verdict)} further seeds that chose nothing"
    how += f"; p-values are adjusted for {count} comparisons (Holm)." if count > 1 else "."
    return [how, *(sentence(found, one) for one in found.others)]


def _pair_cell(gap: Difference | None, adjusted: float | None, alpha: float) -> dict[str, Any]:
    if gap is None or gap.half is None or adjusted is None:
        return cell("", None)
    style = "quiet" if adjusted >= alpha else "good" if gap.mean < 0 else "bad"
    return cell(f"{shown_difference(gap.mean)} ± {gap.half:.4f}", gap.mean, style)


def _pareto(given: ReportInput) -> Section | None:
    """Several objectives: each against the first, and the trials on the front."""
    best = front(given.records)
    names = list(objectives_of(best[0])) if best else []
    if len(names) < 2:
        return None
    done = [record for record in given.records if eligible(record) and len(objectives_of(record)) == len(names)]
    on = {record.number for record in best}
    panels = []
    for name in names[1:]:
        series = []
        for record in done:
            values = objectives_of(record)
            color, label = color_of(record, given), _label(record, given)
            if record.number in on and color == "faint":
                color, label = "c5", label or short(record.name, 14)
            series.append(Series(record.number, _title(record), color, label, [(values[name], values[names[0]])]))
        axis = Axis(_axis_label(name, given), log=name in ("params", "flops_per_token"), in_bytes=name == "state_bytes")
        panels.append((axis, series))
    lines = [[(objectives_of(r)[name], objectives_of(r)[names[0]]) for r in best] for name in names[1:]]
    drawn = plots.scatter(panels, ylabel=OBJECTIVES[names[0]].label, joined=lines)
    columns = [("trial", False), ("architecture", True), *((_axis_label(name, given), False) for name in names)]
    rows = [
        {
            "trial": record.number,
            "style": "",
            "cells": [
                cell(str(record.number), record.number),
                _named(record),
                *(cell(_figure(name, value), value) for name, value in objectives_of(record).items()),
            ],
        }
        for record in best
    ]
    table = {"columns": [{"name": name, "help": "", "text": text} for name, text in columns], "rows": rows}
    beaten = [r for r in done if r.preset is not None and r.number not in on]
    intro = (
        f"{len(best)} of {len(done)} completed trials are beaten by no other in all of {', '.join(names)}. "
        f"The first objective decides which of them is exported."
    )
    notes = [f"Presets that are not on the front: {', '.join(r.name for r in beaten)}."] if beaten else []
    return Section("Pareto front", intro, drawn, "The line joins the front.", table, notes)


def _axis_label(name: str, given: ReportInput) -> str:
    length = given.state_length
    return OBJECTIVES[name].label + (f" of {length:,} tokens" if name == "state_bytes" and length else "")


def _figure(name: str, value: float) -> str:
    if name == "state_bytes":
        return human_bytes(value)
    return (
        human(value) if name in ("params", "active_params", "flops_per_token", "tokens_per_second") else f"{value:.4f}"
    )


def _curves(given: ReportInput) -> Section | None:
    rungs = _rungs(given.records)
    drawn = plots.curves(_series(given, given.records, None), marks=rungs[:-1])
    intro = "All trials read the same data in the same order; a curve that ends early was stopped at a rung."
    caption = "Rest the pointer on a row of the leaderboard to find its curve; a click on a curve opens its trial." + (
        " Dashed: the rungs." if len(rungs) > 1 else ""
    )
    return Section("Loss over training tokens", intro, drawn, caption) if drawn else None


def _rungs(records: Sequence[TrialRecord]) -> list[int]:
    return sorted({int(tokens) for record in records for tokens, _ in record.rungs})


def _rung_table(given: ReportInput) -> Section | None:
    """For each rung the number of trials, the best loss, and the rank correlation with the final loss."""
    rungs = _rungs(given.records)
    trained = [record for record in given.records if record.state in (COMPLETE, PRUNED)]
    if len(rungs) < 2:
        return None
    known = {one.tokens: one for one in rung_correlation.study_agreements(given.records)}
    rows = []
    for rung in rungs:
        there = [loss for record in trained for tokens, loss in record.rungs if int(tokens) == rung]
        if not there:
            continue
        found = known.get(rung)
        spearman, kendall = (found.spearman, found.kendall) if found else (None, None)
        cells = [
            cell(human(rung), rung),
            cell(str(len(there)), len(there)),
            cell(f"{min(there):.4f}", min(there)),
            *(cell("" if value is None else f"{value:+.2f}", value) for value in (spearman, kendall)),
        ]
        rows.append({"trial": None, "style": "", "cells": cells})
    names = ("tokens", "trials that reached it", "best loss there", "Spearman with the end", "Kendall with the end")
    table = {"columns": [{"name": name, "help": "", "text": False} for name in names], "rows": rows}
    resumed = [record for record in trained if len(record.legs) > 1]
    pruned = sum(record.state == PRUNED for record in trained)
    notes = [f"Rank correlations are {rung_correlation.caveat(list(known.values()), pruned)}."] if known else []
    if resumed:
        saved = sum(sum(tokens for _, tokens in list(record.legs)[:-1]) for record in resumed)
        count = "1 candidate was" if len(resumed) == 1 else f"{len(resumed)} candidates were"
        notes.append(
            f"{count} paused at a rung and taken up from the checkpoint when better than later arrivals; starting each "
            f"anew would have cost {human(saved)} tokens more than the {human(trained_tokens(given.records))} trained."
        )
    intro = "Rank correlation of the losses at each rung with the final ones: whether early losses predict the order."
    return Section("Rungs", intro, table=table, notes=notes)


def _parameters(given: ReportInput) -> Section | None:
    meta = given.meta
    active = Axis("active parameters", target=meta.active_params)
    total = Axis("parameters in all, without embeddings", log=True)
    complete = [record for record in given.records if record.state == COMPLETE]
    drawn = plots.scatter(
        [(active, _series(given, complete, "active_params")), (total, _series(given, complete, "params"))]
    )
    intro = "All candidates are sized to the same active parameters, so the left panel should be a narrow column."
    caption = "Completed trials. Dashed: the target that every candidate was sized to." if meta.active_params else ""
    return Section("Loss against parameters", intro, drawn, caption) if drawn else None


def _state(given: ReportInput) -> Section | None:
    complete = [record for record in given.records if record.state == COMPLETE]
    length = f" at {given.state_length:,} tokens" if given.state_length else ""
    axis = Axis(f"state of one sequence{length}", log=True, in_bytes=True)
    drawn = plots.scatter([(axis, _series(given, complete, "state_bytes"))], front=True)
    intro = "What a model must remember while it generates: keys and values of attention, states of the other mixers."
    caption = "The line joins the trials that none beats in both loss and state."
    return Section("Loss against state", intro, drawn, caption) if drawn else None


def _effects(given: ReportInput) -> Section | None:
    first, scores = effects.first_scores(given.records)
    if len(scores) < effects.LEAST:
        return None
    alpha = given.meta.alpha
    positions = effects.position_effects(given.records, scores, alpha=alpha)
    letters = effects.letter_effects(given.records, scores, alpha=alpha)
    known = [one for one in positions if one.n >= SHOWN]
    drawn = charts.effects(known, [one for one in letters if one.n >= SHOWN], _score_unit(given))
    intro = (
        f"From one additive model of the score, over the {len(scores)} architectures that were measured after "
        f"{human(first)} tokens: each letter at its position in place of the average of the others there, the other "
        f"positions held, and one sub-layer more of it anywhere."
    )
    if not positions:
        intro += " There are too few architectures to tell the positions apart."
    caption = (
        f"Bars: {100 * (1 - alpha):g}% intervals over architectures (jackknife), not corrected for their number; "
        f"hollow: zero is inside. Letters of fewer than {SHOWN} architectures are not drawn. One effect may depend on "
        f"another choice, which the model leaves out: a hint for the next space, no proof."
    )
    return Section("Effect of each letter and position", intro, drawn, caption) if drawn else None


def _score_unit(given: ReportInput) -> str:
    best = given.best
    return UNITS[trained_objective(best)] if best else UNITS["val_loss"]


def _importance(given: ReportInput) -> Section | None:
    first, scores = effects.first_scores(given.records)
    shares = {choice_name(name): share for name, share in effects.importances(given.records, scores).items()}
    drawn = charts.bars(shares)
    intro = f"Which choices of the space separate the best tenth from the others at {human(first)} tokens (PED-ANOVA)."
    return Section("Importance of the choices", intro, drawn, "The shares sum to 100%.") if drawn else None


def _progress(given: ReportInput) -> Section | None:
    ours = best_so_far(given.records)
    if not ours:
        return None
    events = course(given.records)
    end = (events[-1][0], ours[-1][1])
    sign = -1 if any(next(iter(record.objectives), "val_loss") == "accuracy" for record in given.records) else 1
    label = _progress_label(ours, given.meta.sampler or "this study", sign)
    series = [Series("this", given.meta.name, "winner", label, [*ours, end])]
    dots = [Series(r.number, _title(r), "faint", points=[(at, value)]) for at, value, r in events if value is not None]
    intro = "Best score so far of the candidates that the search drew and trained to the end, presets left out."
    intro += f" The last improvement came after {human(ours[-1][0])} of {human(end[0])} tokens."
    if given.reference_study is not None and given.reference_study.steps:
        theirs = [(float(tokens), float(value)) for tokens, value in given.reference_study.steps]
        name = given.reference_study.study
        series.append(Series("reference", name, "c7", _progress_label(theirs, name, sign), theirs))
        ahead = next((tokens for tokens, value in ours if value <= theirs[-1][1]), math.inf)
        if math.isfinite(ahead):
            intro += f" This study was as good as the best of {name} after {human(ahead)}; that one needed "
            intro += f"{human(theirs[-1][0])}."
        else:
            intro += f" {name} found a better one than this study after {human(theirs[-1][0])} (one seed each)."
    else:
        intro += " against=random adds a random search of the same cost."
    unit = "negative accuracy" if sign < 0 else "best validation loss [nats/token]"
    return Section("Best loss over training tokens", intro, charts.course(series, dots, unit), "Dots: full trials.")


def _progress_label(points: Sequence[tuple[float, float]], name: str, sign: int) -> str:
    return f"{name} {sign * points[-1][1]:.4f}"


def choice_name(name: str) -> str:
    """Return a choice of the space as people read it: sub-layers count from 1, as positions do everywhere else."""
    place = name.removeprefix("slot")
    return f"sub-layer {int(place) + 1}" if name.startswith("slot") and place.isdigit() else name.replace("_", " ")


def _parts(given: ReportInput) -> Section | None:
    """What each trial reached on each task of a mixture."""
    last = {record.number: record.curve[-1] for record in given.records if record.state == COMPLETE and record.curve}
    found = {
        number: {name: value for name, value in {**entry, **(entry.get("aux") or {})}.items() if _is_part(name)}
        for number, entry in last.items()
    }
    names = sorted({name for parts in found.values() for name in parts})
    if not names:
        return None
    columns = [("trial", False), ("architecture", True), *((_part_label(name), False) for name in names)]
    rows = []
    for record in sorted(given.records, key=lambda one: (last_loss(one) or math.inf, one.number)):
        own = found.get(record.number)
        if own:
            cells = [cell(str(record.number), record.number), _named(record)]
            cells += [cell(_part_text(name, own.get(name)), own.get(name)) for name in names]
            rows.append({"trial": record.number, "style": "", "cells": cells})
    table = {"columns": [{"name": name, "help": "", "text": text} for name, text in columns], "rows": rows}
    return Section("Task by task", "The same trials on each part of the data, at the end of training.", table=table)


def _is_part(name: str) -> bool:
    return name.startswith(("loss.", "accuracy."))


def _part_label(name: str) -> str:
    kind, _, part = name.partition(".")
    return f"{part.replace('_', ' ')}, {'accuracy' if kind == 'accuracy' else 'loss [nats/token]'}"


def _part_text(name: str, value: Any) -> str:
    if not isinstance(value, (int, float)):
        return ""
    return percent(value) if name.startswith("accuracy.") else f"{value:.4f}"


def _named(record: TrialRecord) -> dict[str, Any]:
    """Return the cell of a trial's name."""
    return {**cell(record.pattern, record.name, "arch text"), "strong": record.preset or ""}


SECTIONS: tuple[Callable[[ReportInput], Section | None], ...] = (
    *(_confirmed, _pareto, _curves, _parts, _rung_table, _progress),
    *(_effects, _importance, _parameters, _state),
)


def sections(given: ReportInput) -> list[Section]:
    """Return the sections that the records suffice for."""
    return [section for make in SECTIONS if (section := make(given)) is not None]
