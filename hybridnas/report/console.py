"""What a search says while it runs: one line a trial."""

from __future__ import annotations

from collections.abc import Mapping

from hybridnas.study.records import COMPLETE, DUPLICATE, FAIL, INFEASIBLE, TrialRecord


def trial_news(record: TrialRecord, records: Mapping[int, TrialRecord]) -> str:
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
    paper = next((r for r in records.values() if r.preset == "moe_mamba" and r.valid_loss is not None), None)
    difference = ""
    if record.state == COMPLETE and paper is not None and paper.valid_loss is not None and paper is not record:
        difference = f"  ({(record.valid_loss or 0.0) - paper.valid_loss:+.4f} to moe_mamba)"
    speed = f"{record.tokens_per_second:,.0f} tokens/s" if record.tokens_per_second else ""
    state = "" if record.state == COMPLETE else f"  pruned at {record.tokens:,} tokens"
    return f"{head}  loss {loss}{difference}{state}  {record.seconds:.0f} s, {speed}"
