"""What a report claims of a study's winner, in sentences: differences with interval, sources and adjusted p-value.

"Beats" is written of a difference by the verdict's seeds whose adjusted p-value is below the significance level, and of
nothing else.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from hybridnas.analysis.confirmation import trained_objective
from hybridnas.analysis.decisions import ANNEALED, COSINE, HALVED, OWN, budget_words
from hybridnas.analysis.held_out import TEST
from hybridnas.analysis.verdict import Compared, Documents, Verdict
from hybridnas.errors import StudyError
from hybridnas.study.documents import DocumentSums, read_documents
from hybridnas.study.records import CONFIRM, StudyMeta, TrialRecord, trial_folder
from hybridnas.units import several

# Written by python -m hybridnas.bench decisions; in a checkout through a link, in a wheel as a copy.
DECISIONS = Path(__file__).resolve().parents[1] / "experiments" / "results" / "decisions.json"
CONFIRMED_SEEDS = 2  # of a policy that stands for confirmation: more would leave none for the truth to be independent
log = logging.getLogger("hybridnas.report")


def study_documents(study_folder: Path) -> Documents:
    """Return what finds the losses by document of a study's trials, and of other studies beside it."""

    def find(study: str | None, number: int, seed: str | None) -> DocumentSums | None:
        folder = trial_folder(study_folder if study is None else study_folder.parent / study, number)
        try:
            return read_documents(folder if seed is None else folder / CONFIRM / f"seed{seed}")
        except StudyError as error:  # a report is written all the same; it names the sources of each interval
            log.warning("%s", error)
            return None

    return find


def budget_notes(meta: StudyMeta, *, confirmed: bool = False, decisions: Path = DECISIONS) -> list[str]:
    """State how often comparisons at a study's budget decide rightly, as far as it was measured.

    ``confirmed``: some were trained again, each at its own best rate; a second sentence tells of those. Nothing is
    stated for a study that trained nothing, or whose size and learning rate are not known.
    """
    if meta.from_table or not (meta.tokens and meta.active_params and meta.lr):
        return []
    measured = json.loads(decisions.read_text(encoding="utf-8")) if decisions.is_file() else {"policies": []}
    rates: dict[str, str | float] = {"tuned": HALVED, "shared": meta.lr}
    words = functools.partial(
        budget_words,
        measured,
        signal=ANNEALED if meta.schedule == "wsd" else COSINE,
        active_params=meta.active_params,
        tokens_per_active_param=meta.tokens / meta.active_params,
    )
    notes = [words(rate=rates.get(meta.rate, meta.rate))]
    if confirmed and meta.schedule == "wsd":
        notes.append(words(rate=OWN, seeds=CONFIRMED_SEEDS, what="comparisons by own rates and two seeds"))
    return [f"{words[0].upper()}{words[1:]}." for words in notes]


def unit_of(record: TrialRecord) -> str:
    """Return the unit of the differences of a study."""
    return "nats per token" if trained_objective(record) == "val_loss" else "of accuracy"


def confirmed_headline(verdict: Verdict, reference: str | None) -> str:
    """State in one sentence who won after confirmation, and by how much, or that it is undecided."""
    best = verdict.best
    known = [one for one in verdict.others if one.adjusted is not None]
    if not known:
        seeds = several(len(best.confirmed), "fresh seed")
        return f"{best.name} is best over {seeds}; they chose it, so they do not say by how much"
    if best.preset is not None:
        drawn = next((one for one in known if one.ours and one.record.preset is None), None)
        if drawn is not None:
            if drawn.claimed(verdict.alpha) and drawn.gap.mean > 0:
                return f"{drawn.name} beats {best.name}, which other seeds chose, {_amount(verdict, drawn)}"
            ahead = drawn.claimed(verdict.alpha)
            verb = "is behind" if ahead else "is inside the noise of"
            none = f"None of the {verdict.drawn} drawn" if verdict.drawn > 1 else "Nothing drawn"
            return f"{none} beat {best.name}: the best, {drawn.name}, {verb} it, {_amount(verdict, drawn)}"
    better = (one for one in known if one.ours and one.claimed(verdict.alpha) and one.gap.mean > 0)
    one = next(better, None) or next((one for one in known if one.record.preset == reference), known[0])
    if not one.claimed(verdict.alpha):
        return f"{best.name} and {one.name} are inside the noise of each other: {_amount(verdict, one)}"
    if one.gap.mean < 0:
        of = f", the best of {verdict.drawn} drawn," if best.preset is None and verdict.drawn > 1 else ""
        return f"{best.name}{of} beats {one.name} {_amount(verdict, one)}{_beside(verdict, known, one)}"
    return f"{best.name} was chosen on other seeds, but {one.name} beats it {_amount(verdict, one)}"


def _beside(verdict: Verdict, known: Sequence[Compared], said: Compared) -> str:
    """Return clauses on the best baseline and on the runner-up, as far as the sentence is not about them already."""
    others = [one for one in known if one.ours and one is not said]
    baseline = next((one for one in others if one.record.preset is not None), None)
    drawn = next((one for one in others if one.record.preset is None), None)
    clauses = ""
    for what, other in (("the best baseline", baseline), ("the next best drawn", drawn)):
        if other is not None:
            assert other.gap.half is not None
            by = f"({other.gap.mean:+.4f} ± {other.gap.half:.4f})"
            if not other.claimed(verdict.alpha):
                clauses += f"; {what}, {other.name}, is inside the noise of it {by}"
            else:
                clauses += f"; it beats {what}, {other.name}, too {by}"
    return clauses


def sentence(verdict: Verdict, one: Compared) -> str:
    """State one comparison of the winner: which is better, and whether that is claimed."""
    best = verdict.best.name
    if one.adjusted is None:
        return f"{best} and {one.name} have {several(one.gap.seeds, 'seed')} in common: too few for an interval."
    if not one.claimed(verdict.alpha):
        words = f"The difference between {best} and {one.name} is inside the noise"
    else:
        words = f"{best} is {'better' if one.gap.mean < 0 else 'worse'} than {one.name}"
    return f"{words}: {one.gap.words(unit_of(verdict.best))}, adjusted p {p_text(one.adjusted)}."


def p_text(p: float) -> str:
    """Write a p-value: ``= 0.0312`` or ``< 0.0001``."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.4f}" if p < 0.1 else f"= {p:.2f}"


def _amount(verdict: Verdict, one: Compared) -> str:
    assert one.adjusted is not None
    assert one.gap.half is not None
    where = " on the test part" if verdict.part == TEST else ""
    size = abs(one.gap.mean) if one.claimed(verdict.alpha) else one.gap.mean
    by = f"by {size:.4f}" if one.claimed(verdict.alpha) else f"{size:+.4f}"
    unit, over = unit_of(verdict.best), one.gap.sources
    return f"{by} ± {one.gap.half:.4f} {unit}{where} over {over} (adjusted p {p_text(one.adjusted)})"
