"""The verdict of a study: what was chosen, compared by evidence that had no part in choosing it.

The search's seed chooses who is confirmed, the fresh seeds choose the winner among these on validation data. A seed's
luck is in the validation and the test loss alike, so the test part alone would not undo that choice. The winner and
what it is compared with are therefore trained again with seeds of the verdict, which chose nothing, and the
differences are stated on the test part, over seeds and documents. The winner is compared with the reference preset,
the best baseline, the best that was drawn, the runner-up and the best of the reference study: p-values are adjusted for
their number (Holm), and a difference is claimed where the adjusted one is below the significance level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hybridnas.analysis.bootstrap import ALPHA, Difference, difference, holm
from hybridnas.analysis.confirmation import confirmed_winner, summaries, trained_objective, turned
from hybridnas.analysis.held_out import TEST, VALID, loss_on, stated_part
from hybridnas.analysis.ranking import preset_record, trained_drawn, winner
from hybridnas.study.documents import DocumentSums
from hybridnas.study.objectives import eligible
from hybridnas.study.records import TrialRecord
from hybridnas.study.reference import ReferenceStudy

Place = tuple[str | None, int, str | None]  # another study's name or None, trial, fresh seed or None: the search's own
Documents = Callable[[str | None, int, str | None], DocumentSums | None]  # finds the test part's losses by document


@dataclass(frozen=True)
class Compared:
    """What the winner is compared with, and the difference: winner minus this, less is better."""

    name: str
    record: TrialRecord
    gap: Difference
    adjusted: float | None  # p-value after Holm's adjustment; None where there is no interval
    ours: bool = True  # a trial of this study

    def claimed(self, alpha: float) -> bool:
        """Whether a difference is claimed, in either direction."""
        return self.adjusted is not None and self.adjusted < alpha


@dataclass(frozen=True)
class Verdict:
    """The winner, and its comparisons: with the reference preset first, where there is one besides the winner."""

    best: TrialRecord
    others: Sequence[Compared]
    part: str  # of the data, on which differences are stated
    drawn: int  # architectures that the search drew and trained [count]
    alpha: float = ALPHA

    @property
    def stated(self) -> bool:
        """Whether any difference has an interval."""
        return any(one.adjusted is not None for one in self.others)


def contenders(records: Iterable[TrialRecord], reference: str | None) -> list[TrialRecord]:
    """Return who is trained for the verdict: the winner by the fresh seeds, and what it is compared with.

    These are the reference preset, the best baseline, the best that was drawn and the runner-up by the fresh seeds: a
    winner that is not told from the runner-up may be another one with other seeds. Empty until fresh seeds decide.
    """
    known = list(records)
    best = confirmed_winner(known)
    if best is None:
        return []
    ranked = [one.record for one in summaries(known) if eligible(one.record) and one.value is not None]
    baseline = next((record for record in ranked if record.preset is not None), None)
    drawn = next((record for record in ranked if record.preset is None), None)
    second = next((record for record in ranked if record.number != best.number), None)
    found = (best, preset_record(known, reference), baseline, drawn, second)
    return list({record.number: record for record in found if record is not None and record.confirmed}.values())


def verdict(
    records: Iterable[TrialRecord],
    reference: str | None,
    *,
    against: ReferenceStudy | None = None,
    documents: Documents | None = None,
    alpha: float = ALPHA,
) -> Verdict | None:
    """Compare the winner with the others by the verdict's seeds; None until fresh seeds decide who wins.

    ``documents`` finds losses by document; where a seed's are missing, intervals are over seeds alone.
    """
    known = list(records)
    found = contenders(known, reference)
    if not found:
        return None
    best = found[0]
    named: list[tuple[str, TrialRecord, str | None]] = [(record.name, record, None) for record in found[1:]]
    if against is not None and against.verdict:
        named.append((against.name, against.again, against.study))
    part = TEST if all(_tested(record) for record in (best, *(record for _, record, _ in named))) else VALID
    read = documents if part == TEST and trained_objective(best) == "val_loss" else None
    gaps = []
    for _, record, study in named:
        pairs = {}
        for seed in best.verdict:
            pair = _pair(read, (None, best.number, seed), (study, record.number, seed))
            if pair is not None:
                pairs[seed] = pair
        gaps.append(difference(_scores(best, part), _scores(record, part), pairs, alpha=alpha))
    adjusted = iter(holm([gap.p for gap in gaps if gap.p is not None]))
    others = [
        Compared(name, record, gap, None if gap.p is None else next(adjusted), study is None)
        for (name, record, study), gap in zip(named, gaps, strict=True)
    ]
    return Verdict(best, others, part, len(trained_drawn(known)), alpha)


def _pair(read: Documents | None, first: Place, second: Place) -> tuple[DocumentSums, DocumentSums] | None:
    """Return what both lost by document, None where either is missing."""
    if read is None:
        return None
    ours, theirs = read(*first), read(*second)
    return None if ours is None or theirs is None else (ours, theirs)


def _scores(record: TrialRecord, part: str) -> dict[str, float | None]:
    return turned(record, record.verdict_test if part == TEST else record.verdict)


def _tested(record: TrialRecord) -> bool:
    return all(value is None or record.verdict_test.get(seed) is not None for seed, value in record.verdict.items())


def over_documents(
    records: Iterable[TrialRecord], reference: str | None, documents: Documents | None, *, alpha: float = ALPHA
) -> Difference | None:
    """Compare the winner with the reference preset by the search's one seed, over the test part's documents.

    None where either has no losses by document. What another seed would change is not in the interval.
    """
    known = list(records)
    best, compared = winner(known), preset_record(known, reference)
    if documents is None or best is None or compared is None or stated_part(known) != TEST:
        return None
    pair = _pair(documents, (None, best.number, None), (None, compared.number, None))
    if best.number == compared.number or pair is None:
        return None
    ours, theirs = ({"": loss_on(record, TEST)} for record in (best, compared))
    gap = difference(ours, theirs, {"": pair}, alpha=alpha)
    return gap if gap.documents else None
