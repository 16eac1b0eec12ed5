"""What a run leaves on disk besides weights: run.json (what it is, how it ended), metrics.jsonl (its measurements).

Both survive a crash at any moment: run.json is replaced whole, a torn last line of metrics.jsonl is cut off and
measured again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.config import flatten
from hybridnas.errors import CheckpointError, TrainingError
from hybridnas.files import write_json
from hybridnas.study.documents import DocumentSums, write_documents
from hybridnas.units import percent

if TYPE_CHECKING:
    from torch import nn

RUN, METRICS = "run.json", "metrics.jsonl"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Eval:
    """One measurement of a run; ``train_loss``, ``tokens_per_second`` and ``aux`` are means since the one before."""

    tokens: int  # training tokens read so far
    step: int  # optimiser steps done
    train_loss: float  # cross-entropy of training batches [nats per token], auxiliary losses not in it
    valid_loss: float  # cross-entropy of validation batches [nats per token]
    bits_per_byte: float | None  # loss of all validation tokens over their bytes; None where the data has none
    accuracy: float  # share of validation tokens whose likeliest prediction is right [0 to 1]; of numbers R2 [<= 1]
    tokens_per_second: float  # training alone, measurements and checkpoints left out
    seconds: float  # time of the run so far, all processes that worked on it together [s]
    # auxiliary losses, routing statistics, grad_norm, lr; at the end of a run test_loss, test_accuracy and
    # test_bits_per_byte of the part that nothing is chosen by, where the data has one
    aux: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Eval:
        """Rebuild from one parsed line; raises KeyError or TypeError for anything else."""
        return cls(**{f.name: values[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class TrainResult:
    """How a run ended, and all that was measured.

    ``status``: completed, stopped (by a callback or a time limit), paused (by a callback, to go on later), failed, or
    interrupted (by Ctrl-C: callbacks see it, the caller gets KeyboardInterrupt).
    """

    status: str
    reason: str  # a sentence; empty for completed
    evals: list[Eval]
    model: nn.Module | None  # on the run's device; None when weights were not kept
    folder: Path | None  # None: nothing was written
    tokens_per_second: float = 0.0  # mean over the whole run
    heads: nn.ModuleDict | None = None  # of the data's tasks, which evaluate takes beside the model; mostly empty
    final: bool = True  # False: the same call goes on (paused, out of time or memory)

    @property
    def valid_loss(self) -> float | None:
        """The last measured validation loss [nats per token], or None when nothing was measured."""
        return self.evals[-1].valid_loss if self.evals else None

    @property
    def test_loss(self) -> float | None:
        """The loss on the test part [nats per token]; None for a run that is not complete, or data without one."""
        return self.evals[-1].aux.get("test_loss") if self.evals else None


def read_evals(folder: str | Path) -> list[Eval]:
    """Return what a run measured, in order; a torn last line is left out. An absent file is an empty list.

    Raises CheckpointError for a line in the middle that is not a measurement.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        return []
    return _parse(path, path.read_bytes())[0]


def repair_evals(folder: Path) -> tuple[list[Eval], str]:
    """Cut a torn last line off metrics.jsonl, so that the next one starts clean; returns evals, and a note or ''."""
    path = folder / METRICS
    if not path.is_file():
        return [], ""
    evals, good_bytes = _parse(path, path.read_bytes())
    if good_bytes == path.stat().st_size:
        return evals, ""
    os.truncate(path, good_bytes)
    return evals, f"{path} ended in a torn line, which was cut off; it will be measured again"


def _parse(path: Path, raw: bytes) -> tuple[list[Eval], int]:
    evals: list[Eval] = []
    good = 0
    lines = raw.split(b"\n")
    for number, line in enumerate(lines, start=1):
        is_last = number >= len(lines) - 1  # the last element follows the final newline
        try:
            if line:
                evals.append(Eval.from_dict(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            if is_last:
                break
            raise CheckpointError(
                f"{path} line {number} is not a measurement: {line[:60]!r}; remove that line and run again"
            ) from None
        if number == len(lines) and line:
            evals.pop()  # whole JSON but no newline: the write was cut, measure it again
            break
        good += len(line) + 1
    return evals, min(good, len(raw))


def keep_documents(folder: Path, sums: DocumentSums) -> None:
    """Write what the test part's documents cost beside the run; raises TrainingError when the disk refuses."""
    try:
        write_documents(folder, sums)
    except OSError as error:
        raise disk_error(error, folder, "the losses of the test part's documents") from None


def append_eval(folder: Path, value: Eval) -> None:
    """Append one line in one write and force it to disk; a write that fails leaves the file as it was."""
    line = (json.dumps(asdict(value)) + "\n").encode()
    path = folder / METRICS
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            written = os.write(descriptor, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, before)
            raise disk_error(error, path, f"the measurement at {value.tokens:,} tokens") from None
    finally:
        os.close(descriptor)


def write_run(folder: Path, values: dict[str, Any]) -> None:
    """Replace run.json whole; raises TrainingError when the disk refuses."""
    try:
        write_json(folder / RUN, values)
    except OSError as error:
        raise disk_error(error, folder / RUN, RUN) from None


def read_run(folder: Path) -> dict[str, Any] | None:
    """Return run.json, or None when there is none; raises CheckpointError for one that cannot be read."""
    path = folder / RUN
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        values = json.loads(text)
        version = values["format"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged; delete {folder} to train from the start, or use another") from None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {version}, this hybridnas reads {FORMAT_VERSION}; use another folder")
    return dict(values)


def final_status(folder: Path) -> str:
    """Return the status of a run that is not trained again, such as ``completed``; empty for one that goes on."""
    stored = read_run(folder)
    return str(stored["status"]) if stored is not None and stored["final"] else ""


def disk_error(error: OSError, path: Path, what: str) -> TrainingError:
    """Return the sentence for a write that the disk refused."""
    why = "no space left on the disk" if error.errno == errno.ENOSPC else (error.strerror or str(error))
    return TrainingError(
        f"{path}: {what} could not be written ({why}); what was recorded before is kept: "
        f"free space or change permissions and run the same command again to go on"
    )


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return the fields in which a stored run differs from the one asked for, as words with both values."""
    same_model = stored.get("fingerprint") == wanted["fingerprint"]  # two spellings of one architecture are one
    parts = ("start", "data", "train") if same_model else ("architecture", "start", "data", "train")
    differing = [
        f"{part} {key}={_show(old.get(key))} (asked for: {_show(new.get(key))})"
        for part in parts
        for old, new in ((flatten(stored.get(part, {})), flatten(wanted.get(part, {}))),)
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]
    if not same_model and not any(words.startswith("architecture") for words in differing):
        differing.insert(0, f"architecture fingerprint={_show(stored.get('fingerprint'))}")
    return differing


def compare_identity(stored: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise CheckpointError naming the fields in which the run in ``folder`` differs from the one asked for."""
    differing = differences(stored, wanted)
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise CheckpointError(
            f"{folder} holds another run, with {', '.join(differing[:3])}{more}; "
            f"choose another folder, or delete this one to train from the start",
            field="folder",
            got=str(folder),
            allowed=differing,
        )


def eval_line(value: Eval, total: int, bits: Callable[[float], tuple[float, str]] | None = None) -> str:
    """Return a measurement as one line of words and figures; ``total``: training tokens of the whole run.

    ``bits``: from bits per byte to the data's own unit (``Source.bits``); none: bytes.
    """
    parts = [
        f"{value.tokens:>13,} of {total:,} tokens",
        f"train {value.train_loss:.4f}",
        f"valid {value.valid_loss:.4f} nats/token",
        f"{'accuracy' if 'correlation' not in value.aux else 'R2'} {percent(value.accuracy)}",
        f"{value.tokens_per_second:,.0f} tokens/s",
    ]
    if value.bits_per_byte is not None:
        figure, unit = (value.bits_per_byte, "byte") if bits is None else bits(value.bits_per_byte)
        parts.insert(3, f"{figure:.4f} bits/{unit}")
    if "test_loss" in value.aux:
        parts.append(f"test {value.aux['test_loss']:.4f} nats/token")
    if "dropped" in value.aux:
        parts.append(f"dropped {value.aux['dropped']:.1%}")
    return "  ".join(parts)


def _show(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
