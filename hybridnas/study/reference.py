"""The reference study of a study: another one to be better than, as it is kept in ``STUDY/against.json``.

Kept are its best architecture, how its best score fell with the tokens it trained, and what that architecture reached
with the fresh seeds of our confirmation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridnas.errors import StudyError
from hybridnas.study.records import SEED_RESULTS, TrialRecord, save

FILE = "against.json"


@dataclass(frozen=True)
class ReferenceStudy:
    """A study that ours is compared with, and its best architecture."""

    study: str
    record: TrialRecord
    tokens: int  # trained by the whole study
    steps: Sequence[Sequence[float]]  # [trained tokens, best score so far], falling
    screened: Mapping[str, float | None] = field(default_factory=dict)  # seed that helped to choose it -> result
    confirmed: Mapping[str, float | None] = field(default_factory=dict)  # fresh seed -> result at full length
    confirmed_test: Mapping[str, float | None] = field(default_factory=dict)  # the same on the test part
    verdict: Mapping[str, float | None] = field(default_factory=dict)  # seed that chose nothing -> result
    verdict_test: Mapping[str, float | None] = field(default_factory=dict)  # the same on the test part
    verdict_repeats: Mapping[str, float | None] = field(default_factory=dict)  # accuracy of these where text repeats

    @property
    def name(self) -> str:
        """Return what the report calls its best."""
        return f"the best of {self.study}"

    @property
    def again(self) -> TrialRecord:
        """Return its best with the results of our fresh seeds."""
        return dataclasses.replace(self.record, **{name: getattr(self, name) for name in SEED_RESULTS})


def read_reference_study(study: Path) -> ReferenceStudy | None:
    """Return the study that this one was compared with; None where there was none, or its file is damaged."""
    try:
        values = json.loads((study / FILE).read_text(encoding="utf-8"))
        return ReferenceStudy(**{**values, "record": TrialRecord.from_dict(values["record"])})
    except (OSError, ValueError, KeyError, TypeError, StudyError):
        return None


def write_reference_study(study: Path, reference: ReferenceStudy) -> None:
    """Keep what is known of the reference study; raises StudyError when the disk refuses."""
    values: dict[str, Any] = {**dataclasses.asdict(reference), "record": reference.record.to_dict()}
    save(study / FILE, json.dumps(values, indent=1) + "\n")
