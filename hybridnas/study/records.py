"""What a study keeps of every trial and of itself: plain frozen records, written atomically, read with tolerance.

The record of a trial is the truth about it: ``trials/0007/result.json``, or a row of the study's database. Everything
else (leaderboard, report, what a sampler knows, Optuna's journal, MLflow) is made from the records.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridnas.arch.presets import DEFAULT_REFERENCE
from hybridnas.errors import StudyError
from hybridnas.files import write_text

COMPLETE = "COMPLETE"  # trained to the full budget
PRUNED = "PRUNED"  # stopped or paused at a rung, its loss is that rung's
FAIL = "FAIL"  # diverged, ran out of memory or crashed; the reason says which
DUPLICATE = "DUPLICATE"  # the architecture of an earlier trial, whose result it reuses
INFEASIBLE = "INFEASIBLE"  # rejected before any training
RUNNING = "RUNNING"  # trains now, or did when its process ended: then it goes on with the same choices
STATES = (COMPLETE, PRUNED, FAIL, DUPLICATE, INFEASIBLE, RUNNING)
WORDS = {  # the one word for each state, wherever people read it
    COMPLETE: "complete",
    PRUNED: "pruned",
    FAIL: "failed",
    DUPLICATE: "duplicate",
    INFEASIBLE: "infeasible",
    RUNNING: "running",
}

# Of a record: by seed of a further training.
SEED_RESULTS = ("screened", "confirmed", "confirmed_test", "verdict", "verdict_test", "verdict_repeats")
# Of a record, and in the curve's last entry.
SOUNDS = "sound"  # folder of a study: what a search on recordings leaves to listen to
TEST_FIGURES = ("test_loss", "test_bits_per_byte", "test_accuracy", "test_repeat_loss", "test_repeat_accuracy")

RESULT = "result.json"
ARCH = "arch.json"  # the trial's architecture, in its folder
CONFIRM = "confirm"  # folder of its further trainings, at other rates and seeds
CURVE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial: what was tried, what it cost, how it went.

    Losses are cross-entropy [nats per token] on the validation part, by which trials are stopped and chosen; figures
    that begin with ``test`` are of the test part, measured where a training ended at full length and the data has one.
    """

    number: int
    state: str  # one of STATES
    pattern: str = ""  # canonical
    fingerprint: str = ""  # 64 hex
    preset: str | None = None  # the preset's name where the trial is a baseline
    choices: Mapping[str, Any] = field(default_factory=dict)  # what the space chose
    cost: Mapping[str, float] = field(default_factory=dict)  # the fields of hybridnas.cost.Cost
    valid_loss: float | None = None
    bits_per_byte: float | None = None
    accuracy: float | None = None  # of next-token predictions [0 to 1]
    test_loss: float | None = None
    test_bits_per_byte: float | None = None
    test_accuracy: float | None = None
    test_repeat_loss: float | None = None  # over the places that say again what their window has said before
    test_repeat_accuracy: float | None = None
    rungs: Sequence[Sequence[float]] = ()  # [training tokens, validation loss] as reported to the pruner
    curve: Sequence[Mapping[str, Any]] = ()  # every evaluation: tokens, valid_loss, train_loss, ...
    tokens: int = 0  # trained
    seconds: float = 0.0
    tokens_per_second: float | None = None
    reason: str | None = None  # why it failed, was pruned or rejected
    seed: int = 0
    lr: float | None = None  # peak learning rate where the trial has its own; None: the budget's
    rates: Sequence[Sequence[float | None]] = field(
        default_factory=list
    )  # of its race, best first: [rate, loss at the first rung, tokens]
    own_lr: float | None = None  # best peak rate at full length, by which it is confirmed; None: that of its training
    own_rates: Sequence[Sequence[float | None]] = field(
        default_factory=list
    )  # of that race, best first: [rate, score, tokens]
    duplicate_of: int | None = None  # number of the trial whose result is reused
    objectives: Mapping[str, float] = field(default_factory=dict)  # asked for, in their order and directions
    figures: Mapping[str, float] = field(default_factory=dict)  # measured here, and state_bytes as asked for
    spread: Mapping[str, Sequence[float]] = field(default_factory=dict)  # 95 % interval of each measured figure
    within_spread: Sequence[str] = field(default_factory=list)  # limits that a figure passes and its interval does not
    violation: str | None = None  # which limit a preset passes: it is trained for comparison and cannot win
    refused: Mapping[str, int] = field(default_factory=dict)  # draws before this one by the rule or limit they broke
    draw_seconds: float = 0.0  # from asking the sampler to the start of the training, measurements included
    screened: Mapping[str, float | None] = field(default_factory=dict)  # seed that helps to choose who is confirmed
    confirmed: Mapping[str, float | None] = field(default_factory=dict)  # fresh seed -> result at full length
    confirmed_test: Mapping[str, float | None] = field(default_factory=dict)  # the same on the test part
    verdict: Mapping[str, float | None] = field(default_factory=dict)  # seed that chose nothing -> result
    verdict_test: Mapping[str, float | None] = field(default_factory=dict)  # the same on the test part
    verdict_repeats: Mapping[str, float | None] = field(default_factory=dict)  # accuracy of these where text repeats
    legs: Sequence[Sequence[float]] = field(
        default_factory=list
    )  # [Unix time at its end, tokens trained] of each start

    marks: Mapping[str, Any] = field(default_factory=dict)  # what Optuna's sampler or pruner noted on the trial
    deaths: Sequence[str] = field(
        default_factory=list
    )  # how far it had come when its process ended, the last few times

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise StudyError(
                f"trial {self.number} has state {self.state!r}; allowed: {', '.join(STATES)}",
                field="state",
                got=self.state,
                allowed=STATES,
            )

    @property
    def name(self) -> str:
        """Return what people call it: the preset's name, else the pattern, else the trial's number."""
        return self.preset or self.pattern or f"trial {self.number}"

    def points(self) -> list[tuple[float, float]]:
        """Return the finite points (training tokens, validation loss), rising in tokens; the last value of each."""
        pairs: list[Sequence[Any]] = [(entry.get("tokens"), entry.get("valid_loss")) for entry in self.curve]
        return clean_points(pairs or self.rungs)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; a number that is not finite becomes null."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialRecord:
        """Read what ``to_dict`` wrote; unknown keys of a newer version are left out, a missing number is an error."""
        names = {item.name for item in dataclasses.fields(cls)}
        known = {key: value for key, value in values.items() if key in names}
        if type(known.get("number")) is not int or not isinstance(known.get("state"), str):
            raise StudyError("a trial's record needs an integer 'number' and a 'state'")
        for key in ("choices", "cost", "objectives", "figures", "spread", "refused", "marks", *SEED_RESULTS):
            if not isinstance(known.setdefault(key, {}), Mapping):
                raise StudyError(f"a trial's record needs a mapping for {key!r}, got {type(known[key]).__name__}")
        numbers = ("valid_loss", "bits_per_byte", "accuracy", *TEST_FIGURES, "tokens", "seconds", "tokens_per_second")
        for key in numbers:
            if not isinstance(known.get(key), (int, float, type(None))):
                raise StudyError(f"a trial's record needs a number for {key!r}, got {type(known[key]).__name__}")
        return cls(**known)


def reference_of(study: Mapping[str, Any]) -> str | None:
    """Return the preset that a study (its ``study.json``) compares with; None: it compares with none."""
    space = study.get("identity", {}).get("space", {})
    meta = study.get("meta")
    named = space if isinstance(space, Mapping) and "reference" in space else study
    if named is study and isinstance(meta, Mapping) and "reference" in meta:
        named = meta  # a space without a reference has no such key
    found = named.get("reference", DEFAULT_REFERENCE)
    return None if found is None else str(found)


@dataclass(frozen=True, kw_only=True)
class StudyMeta:
    """What the report shows of a study besides its trials; everything but the name may stay unknown."""

    name: str
    space: str = ""
    data: str = ""  # Source.describe()
    budget: str = ""
    reference: str | None = DEFAULT_REFERENCE  # the preset that losses are compared with; None: none
    alpha: float = 0.05  # significance level of what the report claims
    schedule: str = "cosine"  # budget.schedule: what a score at a rung is
    rate: str = "shared"  # budget.rate: which learning rate a trial has
    lr: float | None = None  # budget.lr
    active_params: int | None = None  # what every candidate was matched to [count]
    tokens: int | None = None  # training tokens of a full trial
    seq_len: int | None = None
    state_length: int = 0  # context at which state_bytes counts as an objective; 0: seq_len [tokens]
    batch_size: int | None = None
    n_trials: int | None = None  # asked for
    seed: int = 0
    seeds_per_trial: int = 1  # more than one only after confirmation
    sampler: str = ""
    pruner: str = ""
    command: str = ""  # the command line that made or continued the study
    machine: str = ""  # hardware.describe_machine()
    versions: Mapping[str, str] = field(default_factory=dict)  # package -> version
    started: str = ""  # ISO time
    seconds: float | None = None  # wall time so far
    status: str = "running"  # running | completed | interrupted
    from_table: bool = False  # whether scores were looked up in a table, so that nothing was trained
    notes: Sequence[str] = ()  # sentences for the reader, e.g. of skipped records
    folder: str = ""  # as the user would type it; empty: runs/NAME
    kind: str = ""  # kind of data, such as text; empty: of an older study
    bits_per: str = "byte"  # what bits are stated per: byte, base, sample
    bits_tokens: int = 1  # tokens of one of these, where it is no byte

    def bits(self, per_byte: float) -> str:
        """Return bits per byte in the data's own unit, as text."""
        return f"{per_byte * self.bits_tokens:.4f} bits per {self.bits_per}"

    @property
    def path(self) -> str:
        """Return the study folder as commands spell it."""
        return self.folder or f"runs/{self.name}"


def trained_tokens(records: Iterable[TrialRecord]) -> int:
    """Return the tokens that a study trained in all, branches and races over rates included.

    Each counts once, but again where a candidate had to start anew.
    """
    own = [record for record in records if record.state != DUPLICATE]
    return sum(round(sum(tokens for _, tokens in r.legs)) if r.legs else r.tokens for r in own)


def clean_points(pairs: Sequence[Sequence[Any]]) -> list[tuple[float, float]]:
    """Keep finite (tokens, loss) pairs, one for each token count (the last wins), in rising order."""
    seen: dict[float, float] = {}
    for pair in pairs:
        if len(pair) == 2 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in pair):
            seen[float(pair[0])] = float(pair[1])
    return sorted(seen.items())


def trial_folder(study_folder: Path | str, number: int) -> Path:
    """Return ``STUDY/trials/0007`` for trial 7."""
    return Path(study_folder) / "trials" / f"{number:04d}"


def write_record(folder: Path | str, record: TrialRecord, *, sync: bool = True) -> Path:
    """Write ``result.json`` into the trial's folder, whole or not at all; raises StudyError when the disk refuses.

    ``sync``: wait for the disk; a copy of what a database has need not.
    """
    path = Path(folder) / RESULT
    save(path, json.dumps(record.to_dict(), indent=1, allow_nan=False) + "\n", sync=sync)
    return path


def read_record(folder: Path | str) -> TrialRecord:
    """Read a trial's ``result.json``, its curve from ``metrics.jsonl`` where the record has none.

    Raises StudyError in one sentence for a missing, torn or foreign file.
    """
    path = Path(folder) / RESULT
    try:
        record = TrialRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise StudyError(f"{path} is missing; the trial has not finished") from None
    except (OSError, ValueError, TypeError, AttributeError, StudyError) as error:
        why = "it is not whole JSON" if isinstance(error, ValueError) else str(error)
        raise StudyError(
            f"{path} cannot be read ({why}); put back a copy of it, without one the study goes on without this trial",
            field="record",
            got=str(path),
        ) from None
    return record if record.curve else dataclasses.replace(record, curve=read_curve(folder))


def load_records(study_folder: Path | str, *, running: bool = False) -> tuple[list[TrialRecord], list[str]]:
    """Return the readable records of a study by number, and one warning sentence for each file that was skipped.

    ``running``: with the trials that are being trained, or were when their process ended.
    """
    records: dict[int, TrialRecord] = {}
    warnings: list[str] = []
    for path in sorted((Path(study_folder) / "trials").glob(f"*/{RESULT}")):
        try:
            record = read_record(path.parent)
        except StudyError as error:
            warnings.append(f"skipped a trial: {error}")
            continue
        if record.number in records:
            warnings.append(f"skipped a trial: {path} repeats the number {record.number}; the first one is kept")
            continue
        if running or record.state != RUNNING:
            records[record.number] = record
    return [records[number] for number in sorted(records)], warnings


def read_curve(folder: Path | str) -> tuple[dict[str, Any], ...]:
    """Return the evaluations of ``metrics.jsonl``; a torn line (the process was killed while writing) is left out."""
    try:
        lines = (Path(folder) / CURVE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    entries: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return tuple(entries)


def save(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a study's file atomically; raises StudyError when the disk is full or the folder cannot be written."""
    try:
        write_text(path, text, sync=sync)
    except OSError as error:
        raise StudyError(
            f"{path} cannot be written ({error.strerror or error}); free space or change permissions and run the same "
            "command again, nothing already recorded is lost"
        ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
