"""The held-out part that figures of a study are stated on.

Trials are stopped and chosen by validation loss, so the validation loss of the chosen one is too good. Nothing is
chosen by the test part, which is measured once, where a training ends.
"""

from __future__ import annotations

from collections.abc import Iterable

from hybridnas.study.records import COMPLETE, TrialRecord

VALID, TEST = "valid", "test"


def stated_part(records: Iterable[TrialRecord]) -> str:
    """Return TEST where every trial that was trained to the end has figures of the test part, else VALID.

    One answer for all trials of a study, so that no two figures of different parts are compared.
    """
    done = [record for record in records if record.state == COMPLETE and record.valid_loss is not None]
    return TEST if done and all(record.test_loss is not None for record in done) else VALID


def loss_on(record: TrialRecord, part: str) -> float | None:
    """Return a trial's final loss on a part [nats per token]."""
    return record.test_loss if part == TEST else record.valid_loss
