"""The training run: resumed where it stopped, measured at fixed token counts, ended with a reason.

Shapes: B batch, L length.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Source, check_vocab
from hybridnas.errors import KernelInputError, TrainingError
from hybridnas.hardware import describe_machine, pick_device
from hybridnas.train import checkpoint
from hybridnas.train.config import TrainConfig
from hybridnas.train.distributed import Group, check_devices, launch
from hybridnas.train.progress import Progress, Report, make_progress
from hybridnas.train.records import (
    FORMAT_VERSION,
    RUN,
    Eval,
    TrainResult,
    compare_identity,
    disk_error,
    read_run,
    repair_evals,
    write_json,
)
from hybridnas.train.trainer import OnEval, Outcome, Trainer

_NO_MEMORY = re.compile(r"out of memory|(can.t|cannot|not able to|not enough) (allocate )?memory", re.IGNORECASE)


def run(
    arch: Arch,
    source: Source,
    config: TrainConfig,
    *,
    folder: str | Path,
    device: str = "auto",
    on_eval: OnEval | None = None,
    progress: bool | Report = True,
    keep_checkpoint: bool = True,
    max_seconds: float | None = None,
    impl: str = "auto",
    group: Group | None = None,
) -> TrainResult:
    """Train ``arch`` on ``source``, or go on from where ``folder`` stands; the same call again is how one resumes.

    ``on_eval`` sees every measurement of the run in order, those of earlier processes first (so report them
    idempotently), and stops the run by returning True. A run that is completed, failed or so stopped is not trained
    again: its stored result is returned. Returning ``PAUSE`` leaves the run with status "paused" and its whole
    checkpoint instead: the next call goes on, as after ``max_seconds``, Ctrl-C, a crash or lack of memory.
    On a processor with the same number of threads, a run that was interrupted equals one that was not, to the bit.

    ``progress``: True (bar or lines), False (silence) or a callable that takes lines. ``keep_checkpoint=False``
    deletes the weights when the run has ended. Ctrl-C finishes the step, saves, and raises KeyboardInterrupt.

    Raises CheckpointError for a folder of another run or with damaged files, DataError for a vocabulary larger than
    the model's, TrainingError when the disk refuses or another process trains in the folder.
    """
    check_vocab(source.vocab_size, arch.vocab_size)
    target = pick_device(device)
    where = Path(folder)
    group = group or Group()
    if config.devices > 1:
        check_devices(config, target)
    job = _Job(arch, source, config, where, target, impl, identity(arch, source, config), group)
    if not group.first:
        _follow(job, max_seconds)
        return TrainResult("completed", "", [], None, where)
    with _claimed(where):
        stored = read_run(where)
        if stored is not None:
            compare_identity(stored, job.identity, where)
        evals, torn = repair_evals(where)
        if stored is not None and stored["final"]:
            return _stored_result(stored, evals, arch, where, target, impl, on_eval)
        if config.devices == group.size:
            return _own(job, evals, torn, on_eval, make_progress(progress), max_seconds, keep_checkpoint)
    result = launch(
        arch,
        source,
        config,
        folder=where,
        device=device,
        on_eval=on_eval,
        shown=make_progress(progress),
        max_seconds=max_seconds,
        impl=impl,
        keep_checkpoint=keep_checkpoint,
    )
    ended = read_run(where)
    if result.status == "failed" or ended is None or not ended["final"]:
        return result
    return _stored_result(ended, result.evals, arch, where, target, impl, None)


def _own(
    job: _Job,
    evals: list[Eval],
    torn: str,
    on_eval: OnEval | None,
    shown: Progress,
    max_seconds: float | None,
    keep_checkpoint: bool,
) -> TrainResult:
    """Train what is ours to write: the folder is held, its measurements are read."""
    where = job.folder
    if torn:
        shown.note(torn)
    machine = {"device": str(job.device), "machine": describe_machine(), "data_words": job.source.describe()}
    about = {"format": FORMAT_VERSION, **job.identity, **machine}
    write_json(where / RUN, {**about, "status": "running", "reason": "", "final": False})
    job.group.share([asdict(value) for value in evals])
    outcome, trainer = _train(job, evals, on_eval, shown, max_seconds)
    speed = trainer.tokens_per_second if trainer else 0.0
    ended = {"status": outcome.status, "reason": outcome.reason, "final": outcome.final, "tokens_per_second": speed}
    if outcome.final:
        _settle_checkpoints(trainer, where, keep_checkpoint, sound=outcome.status != "failed")
    elif outcome.status == "paused":
        checkpoint.remove(where, names=(checkpoint.PREVIOUS,))  # it may lie there for long, and the newest is whole
    write_json(where / RUN, {**about, **ended})
    model = trainer.model if trainer and outcome.status != "failed" else None
    return TrainResult(outcome.status, outcome.reason, evals, model, where, speed)


@dataclass(frozen=True)
class _Job:
    """What is trained, where, and on what."""

    arch: Arch
    source: Source
    config: TrainConfig
    folder: Path
    device: torch.device
    impl: str
    identity: dict[str, Any]
    group: Group

    def trainer(self, evals: list[Eval]) -> Trainer:
        model = HybridLM(self.arch, impl=self.impl, seed=self.config.seed).to(self.device)
        return Trainer(
            model,
            self.source,
            self.config,
            folder=self.folder,
            device=self.device,
            evals=evals,
            identity=self.identity,
            group=self.group,
        )


def _follow(job: _Job, max_seconds: float | None) -> None:
    """Train along with rank 0, which owns the folder, measures and decides."""
    evals = [Eval.from_dict(value) for value in job.group.share(None)]
    _train(job, evals, None, Progress(), max_seconds)


def _train(
    job: _Job, evals: list[Eval], on_eval: OnEval | None, shown: Progress, max_seconds: float | None
) -> tuple[Outcome, Trainer | None]:
    """Build, restore, and train to the end; everything random in it leaves the caller's generators alone."""
    trainer: Trainer | None = None
    forked = [job.device] if job.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=forked), _interrupt() as interrupted:
            trainer = job.trainer(evals)
            found = checkpoint.load(job.folder)
            if found is not None:
                compare_identity(found.header, job.identity, job.folder)
                trainer.restore(found)
                if found.note:
                    shown.note(found.note)
                shown.note(f"{job.folder}: going on from {trainer.tokens:,} of {job.config.tokens:,} tokens")
            shown.begin(trainer.tokens, job.config.tokens)
            return trainer.train(on_eval, shown, interrupted, max_seconds), trainer
    except KernelInputError as error:
        if trainer is None or "finite" not in str(error):
            raise
        return Outcome("failed", trainer.why(f"the weights have grown beyond all numbers: {error}")), trainer
    except (MemoryError, RuntimeError) as error:
        if job.config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise TrainingError(
                f"train.compile=True: torch cannot compile this model on this machine ({str(error).splitlines()[0]}); "
                f"install a C++ compiler or set train.compile=False"
            ) from None
        if not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
            raise
        step = trainer.state.step + 1 if trainer else 1
        reason = (
            f"out of memory in step {step:,}; lower train.batch_size={job.config.batch_size} (and raise "
            f"train.accumulate to keep the step's size) or train.seq_len={job.config.seq_len}"
        )
        return Outcome("failed", reason, final=False), None  # what was taken then may be free later
    finally:
        shown.end()


def _settle_checkpoints(trainer: Trainer | None, folder: Path, keep: bool, *, sound: bool) -> None:
    """A run that has ended keeps its weights alone, without moments; a failed one its last checkpoint as it is."""
    if not keep:
        checkpoint.remove(folder)
    elif sound and trainer is not None:
        trainer.save(with_optimizer=False)
        checkpoint.remove(folder, names=(checkpoint.PREVIOUS,))


def _stored_result(
    stored: dict[str, Any],
    evals: list[Eval],
    arch: Arch,
    folder: Path,
    device: torch.device,
    impl: str,
    on_eval: OnEval | None,
) -> TrainResult:
    if on_eval is not None:
        for value in evals:
            on_eval(value)
    found = checkpoint.load(folder)
    model = None
    if found is not None:
        model = HybridLM(arch, impl=impl)
        checkpoint.restore_model(model, found.model, folder / checkpoint.NEWEST)
        model = model.to(device)
    return TrainResult(stored["status"], stored["reason"], evals, model, folder, stored["tokens_per_second"])


def identity(arch: Arch, source: Source, config: TrainConfig) -> dict[str, Any]:
    """Return what makes two runs the same: architecture, data and every setting that touches a number."""
    return {
        "fingerprint": arch.fingerprint(),
        "architecture": arch.to_dict(),
        "data": {"fingerprint": source.fingerprint},
        "train": config.identity(),
    }


@contextlib.contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Make the folder and hold it, so that two processes never write one run; the hold ends with the process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise disk_error(error, folder, "the run's folder") from None
    with file:
        try:
            import fcntl
        except ImportError:  # Windows has no flock; the hold is a comfort, not a need
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"{folder} is being trained in by another process; wait for it or choose another folder"
            ) from None
        yield


@contextlib.contextmanager
def _interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that the step is finished and saved; a second one acts at once.

    Only in the main thread and where nobody else has asked for the signal.
    """
    seen = threading.Event()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return

    def catch(number: int, frame: Any) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()
        os.write(2, b"\nfinishing this step and saving; Ctrl-C again stops at once\n")

    signal.signal(signal.SIGINT, catch)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
