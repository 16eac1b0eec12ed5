"""Lines that a terminal shows while a search runs: one for each trial that ended."""

from __future__ import annotations

from collections.abc import Mapping

from hybridnas.analysis.ranking import preset_loss
from hybridnas.study.records import COMPLETE, DUPLICATE, FAIL, INFEASIBLE, TrialRecord


def trial_line(record: TrialRecord, records: Mapping[int, TrialRecord], reference: str | None) -> str:
    """Return the line for a trial that has just ended; ``records`` are all so far, by number."""
    name = record.preset or record.choices.get("candidate")
    head = f"trial {record.number:>3}  {f'{name}  ' if name else ''}{record.pattern or dict(record.choices)}"
    if record.state == INFEASIBLE:
        return f"{head}  infeasible: {record.reason}"
    if record.state == FAIL:
        return f"{head}  failed: {record.reason}"
    if record.state == DUPLICATE:
        return f"{head}  {record.reason}"
    loss = f"{record.valid_loss:.4f}" if record.valid_loss is not None else "-"
    mark = preset_loss(records.values(), reference)
    difference = ""
    if record.state == COMPLETE and record.valid_loss is not None and mark is not None and record.preset != reference:
        difference = f"  ({record.valid_loss - mark:+.4f} to {reference})"
    speed = f"{record.tokens_per_second:,.0f} tokens/s" if record.tokens_per_second else ""
    state = "" if record.state == COMPLETE else f"  pruned at {record.tokens:,} tokens"
    return f"{head}  loss {loss}{difference}{state}  {record.seconds:.0f} s, {speed}"
