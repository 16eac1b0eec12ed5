"""The training run: resumed where it stopped, measured at fixed token counts, ended with a reason."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Source, check_vocab
from hybridnas.errors import ConfigError, NonFiniteInputError, TrainingDiverged, TrainingError
from hybridnas.files import locked
from hybridnas.hardware import describe_machine, keep_freed_memory, pick_device
from hybridnas.kernels._build.waits import shorten_waits
from hybridnas.train import checkpoint, distributed
from hybridnas.train.callbacks import Callback, CallbackList, Run
from hybridnas.train.config import TrainConfig
from hybridnas.train.distill import Teacher
from hybridnas.train.distributed import Group, RankLostError
from hybridnas.train.evaluate import autocast, to_device
from hybridnas.train.extend import Extension, extended
from hybridnas.train.objective import Objective, check_causal, make_heads
from hybridnas.train.records import (
    FORMAT_VERSION,
    TrainResult,
    compare_identity,
    differences,
    disk_error,
    read_run,
    repair_evals,
    write_run,
)
from hybridnas.train.scaling import scale_weights
from hybridnas.train.start import start_of, tensors_digest
from hybridnas.train.trainer import Outcome, Trainer

Trainee = Arch | nn.Module | Callable[[], nn.Module]
log = logging.getLogger("hybridnas.train")


def run(
    model: Trainee,
    source: Source,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    device: str = "auto",
    callbacks: Iterable[Callback] = (),
    keep_checkpoint: bool = True,
    max_seconds: float | None = None,
    impl: str = "auto",
    labels: Mapping[str, str] | None = None,
    start: Mapping[str, Any] | None = None,
    teacher: Teacher | None = None,
    moments: Mapping[str, Tensor] | None = None,
) -> TrainResult:
    """Train a model on ``source``, or go on from where ``folder`` stands; the same call again is how one resumes.

    ``model``: an architecture, whose weights are drawn from ``config.seed``; a module from ids (B, L) to logits
    (B, L, V), which is trained in place; or a function that builds one, called with torch's generator seeded.
    ``folder``: None writes nothing, so nothing can be resumed.

    ``callbacks`` see every measurement of the run in order, those of earlier processes first. A run that is completed,
    failed or stopped by a callback is not trained again: its stored result is returned. ``Action.PAUSE`` leaves the run
    with status "paused" and its whole checkpoint instead: the next call goes on, as after ``max_seconds``, Ctrl-C, a
    crash or lack of memory. On a processor with the same number of threads, a run that was interrupted equals one that
    was not, to the bit. A completed run of schedule ``wsd`` that is given more ``tokens`` goes on from the state before
    its last decay (:mod:`hybridnas.train.extend`). ``keep_checkpoint=False`` deletes the weights when the run has
    ended. Ctrl-C finishes the step, saves, and raises KeyboardInterrupt. ``labels`` are kept in ``run.json`` to find
    and name the run by, such as its preset; they decide nothing. ``start``: what a module's weights are, for the run's
    identity; None: those given. ``teacher``: a model to learn from beside the data. ``moments``: the optimizer's of
    some weights at the first step, ``NAME.exp_avg`` and so on as in a checkpoint; both are of a given module alone.

    Raises ConfigError for a model that sees later tokens (``config.allow_noncausal``), CheckpointError for a folder of
    another run or with damaged files, DataError for a vocabulary larger than the model's, TrainingError when the disk
    refuses or another process trains in the folder.
    """
    target = pick_device(device)
    if config.devices > 1:
        distributed.check_devices(config, target)
    place = None if folder is None else Path(folder)
    job = _Job(
        _Subject.of(model, config, impl, start).helped(teacher, moments),
        source,
        config,
        place,
        target,
        dict(labels or {}),
    ).extended()
    watchers = CallbackList(callbacks)
    if config.devices == 1:
        return _lead(job, lambda: contextlib.nullcontext(Group()), watchers, max_seconds, keep_checkpoint)
    if distributed.launched():
        with distributed.join(config, target) as group:
            job = job.on(distributed.own_device(target, distributed.local_rank(group)))
            if group.first:
                result = _lead(job, lambda: contextlib.nullcontext(group), watchers, max_seconds, keep_checkpoint)
            else:
                result = _follow(job, group)
            if result.final or result.status != "failed":  # else this rank alone has stopped: the others wait elsewhere
                group.leave()
            return result
    job = job.on(distributed.own_device(target, 0))
    ranks = functools.partial(distributed.start, config, job.device, job.for_ranks(), job.folder)
    return _lead(job, ranks, watchers, max_seconds, keep_checkpoint)


def follow(
    arch: Arch,
    source: Source,
    config: TrainConfig,
    *,
    folder: Path | None,
    device: torch.device,
    impl: str,
    group: Group,
) -> TrainResult:
    """Train along with rank 0, which owns the folder, measures and decides."""
    return _follow(_Job(_Subject.of(arch, config, impl), source, config, folder, device).extended(), group)


@dataclass(frozen=True)
class _Subject:
    """What is trained: how to build it, and what identifies it."""

    arch: Arch | None
    build: Callable[[], nn.Module]
    identity: dict[str, Any]
    impl: str = "auto"
    teacher: Teacher | None = None
    moments: Mapping[str, Tensor] | None = None

    def helped(self, teacher: Teacher | None, moments: Mapping[str, Tensor] | None) -> _Subject:
        """Return the subject with a teacher and moments to begin with, which are part of what identifies it."""
        if teacher is None and not moments:
            return self
        if "start" not in self.identity or self.arch is None:
            raise ConfigError(
                "train teacher= and moments= are of given weights; give a HybridLM",
                field="teacher" if teacher is not None else "moments",
                allowed="a HybridLM",
            )
        start = dict(self.identity["start"])
        if teacher is not None:
            start["teacher"] = teacher.identity()
        if moments:
            start["moments"] = tensors_digest(moments)
        return replace(self, identity={**self.identity, "start": start}, teacher=teacher, moments=moments)

    @classmethod
    def of(cls, model: Trainee, config: TrainConfig, impl: str, start: Mapping[str, Any] | None = None) -> _Subject:
        if isinstance(model, Arch):
            check_causal(model, config.allow_noncausal)
            return cls(model, lambda: _drawn(model, config, impl), _arch_identity(model), impl)
        given = isinstance(model, nn.Module)
        built = model if isinstance(model, nn.Module) else build_seeded(model, config.seed)
        if isinstance(built, HybridLM):
            check_causal(built.arch, config.allow_noncausal)
        about = _module_identity(built)
        if given:
            about["start"] = start_of(built, start)
        return cls(built.arch if isinstance(built, HybridLM) else None, lambda: built, about)


@dataclass(frozen=True)
class _Job:
    """What is trained, where, and on what."""

    subject: _Subject
    source: Source
    config: TrainConfig
    folder: Path | None
    device: torch.device
    labels: Mapping[str, str] = field(default_factory=dict)
    extension: Extension | None = None

    def __post_init__(self) -> None:
        if self.subject.arch is not None:
            check_vocab(self.source.vocab_size, self.subject.arch.vocab_size)
        if self.config.short_first and self.source.seq_len is not None:
            raise ConfigError(
                f"train short_first={list(self.config.short_first)} needs data that is read at any context; examples "
                f"of this data have {self.source.seq_len} tokens: leave it out",
                field="train.short_first",
                got=list(self.config.short_first),
                allowed=(),
            )

    def on(self, device: torch.device) -> _Job:
        return replace(self, device=device)

    def extended(self) -> _Job:
        """Return the job with the settings of a longer run, where it gives more tokens to the one in its folder."""
        if self.folder is None or not self.folder.is_dir():
            return self
        stored = read_run(self.folder)
        if stored is None or differences(stored, {**self.identity, "train": stored["train"]}):
            return self
        found = extended(stored, self.config, self.folder)
        return replace(self, config=found.config, extension=found)

    @property
    def identity(self) -> dict[str, Any]:
        data = {"fingerprint": self.source.fingerprint}
        return {**self.subject.identity, "data": data, "train": self.config.identity()}

    def goes_on_from(self, stored: Mapping[str, Any]) -> bool:
        """Return whether this is what a run or a checkpoint of fewer tokens is to become."""
        return self.extension is not None and stored["train"] == self.extension.shorter

    def for_ranks(self) -> dict[str, Any]:
        """Return what a rank in a process of its own needs to build the same; raises TrainingError where it cannot."""
        if self.source.config is None:
            raise TrainingError(
                "devices > 1 needs data that other processes can open, by hybridnas.data.open_source; or start this "
                "script with torchrun --nproc-per-node=N, where every process opens its own",
                field="data",
            )
        if self.subject.arch is None or "start" in self.subject.identity:
            raise TrainingError(
                "devices > 1 needs an architecture, which other processes can build; start this script with torchrun "
                "--nproc-per-node=N to train a module of your own, so that every process has it",
                field="model",
                allowed="an Arch",
            )
        return {
            "arch": self.subject.arch.to_dict(),
            "data": self.source.config.to_dict(),
            "train": self.config.to_dict(),
            "folder": None if self.folder is None else str(self.folder.absolute()),
            "impl": self.subject.impl,
        }


def _lead(
    job: _Job,
    open_group: Callable[[], AbstractContextManager[Group]],
    callbacks: CallbackList,
    max_seconds: float | None,
    keep_checkpoint: bool,
) -> TrainResult:
    """Train as the process that owns the folder: read what is there, train, write how it ended."""
    folder = job.folder
    run_ = Run(job.config, job.source, folder, job.subject.arch, None, job.device)
    with _claimed(folder):
        stored = read_run(folder) if folder is not None else None
        longer = stored is not None and job.goes_on_from(stored)
        if longer and folder is not None:
            checkpoint.load_stable(folder)  # refused before the finished run is changed
        if stored is not None and folder is not None and not longer:
            compare_identity(stored, job.identity, folder)
        if folder is not None:
            run_.evals, torn = repair_evals(folder)
            if torn:
                log.warning("%s", torn)
        if stored is not None and stored["final"] and not longer:
            if distributed.launched() and job.config.devices > 1:
                with open_group() as group:
                    group.share({"ended": (stored["status"], stored["reason"]), "evals": run_.evals})
            return _stored_result(stored, job, run_, callbacks)
        if job.subject.arch is not None and not job.subject.arch.causal:
            log.warning("%s sees later tokens: its loss is no language model's", job.subject.arch.pattern)
        machine = {"device": str(job.device), "machine": describe_machine(), "data_words": job.source.describe()}
        about = {"format": FORMAT_VERSION, **job.identity, **machine, "labels": dict(job.labels)}
        if job.extension is not None:
            about |= job.extension.to_dict()
        if folder is not None:
            write_run(folder, {**about, "status": "running", "reason": "", "final": False})
        try:
            outcome, trainer = _train(job, run_, open_group, callbacks, max_seconds)
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt)
            words = "stopped by Ctrl-C; the same call goes on" if interrupted else f"{type(error).__name__}: {error}"
            status = "interrupted" if interrupted else "failed"
            callbacks.on_end(run_, TrainResult(status, words, run_.evals, None, folder, final=False))
            raise
        speed = trainer.tokens_per_second if trainer else 0.0
        ended = {"status": outcome.status, "reason": outcome.reason, "final": outcome.final, "tokens_per_second": speed}
        if folder is not None:
            if outcome.final:
                _settle_checkpoints(trainer, folder, keep_checkpoint, sound=outcome.status != "failed")
            elif outcome.status == "paused":
                checkpoint.remove(folder, names=(checkpoint.PREVIOUS,))  # the newest one is whole
            write_run(folder, {**about, **ended})
        sound = trainer is not None and outcome.status != "failed"
        result = TrainResult(
            outcome.status,
            outcome.reason,
            run_.evals,
            trainer.model if trainer is not None and sound else None,
            folder,
            speed,
            trainer.heads if trainer is not None and sound else None,
            outcome.final,
        )
        callbacks.on_end(run_, result)
        return result


def _follow(job: _Job, group: Group) -> TrainResult:
    known = group.share(None)
    run_ = Run(job.config, job.source, job.folder, job.subject.arch, None, job.device, known["evals"])
    if known["ended"] is not None:
        status, reason = known["ended"]
        return TrainResult(status, reason, run_.evals, None, job.folder)
    outcome, trainer = _fit(job, run_, group, CallbackList(()), threading.Event(), None)
    return TrainResult(outcome.status, outcome.reason, run_.evals, trainer.model, job.folder, trainer.tokens_per_second)


def _train(
    job: _Job,
    run_: Run,
    open_group: Callable[[], AbstractContextManager[Group]],
    callbacks: CallbackList,
    max_seconds: float | None,
) -> tuple[Outcome, Trainer | None]:
    """Train to the end as rank 0; lack of memory and a lost rank are ends, too, from which the same call goes on."""
    config = job.config
    try:
        with _interrupt() as interrupted, open_group() as group:
            group.share({"ended": None, "evals": run_.evals})
            return _fit(job, run_, group, callbacks, interrupted, max_seconds)
    except RankLostError as error:
        return Outcome("failed", str(error), final=False), None
    except (MemoryError, RuntimeError) as error:
        if config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise TrainingError(
                f"train.compile=True: torch cannot compile this model on this machine ({str(error).splitlines()[0]}); "
                f"install a C++ compiler or set train.compile=False",
                field="compile",
                got=True,
                allowed=False,
            ) from None
        if not _out_of_memory(error):
            raise
        reason = (
            f"out of memory in step {run_.step + 1:,}; lower train.batch_size={config.batch_size}"
            f"{_what_fits(job, error) if run_.step == 0 else ''} (and raise "
            f"train.accumulate to keep the step's size; experts with a capacity then drop tokens within each smaller "
            f"pass) or train.seq_len={config.seq_len}"
        )
        return Outcome("failed", reason, final=False), None  # what was taken then may be free later


def _fit(
    job: _Job,
    run_: Run,
    group: Group,
    callbacks: CallbackList,
    interrupted: threading.Event,
    max_seconds: float | None,
) -> tuple[Outcome, Trainer]:
    """Build, restore, and train to the end; everything random in it leaves the caller's generators alone."""
    forked = [job.device] if job.device.type == "cuda" else []
    shorten_waits()
    keep_freed_memory()
    with torch.random.fork_rng(devices=forked):
        model = job.subject.build().to(job.device)
        run_.model = model
        heads = make_heads(job.source, model, job.config.seed)
        trainer = Trainer(
            run_,
            model,
            heads,
            identity=job.identity,
            callbacks=callbacks.callbacks,
            group=group,
            teacher=job.subject.teacher,
        )
        found = checkpoint.load(job.folder) if job.folder is not None else None
        if found is None and job.subject.moments:
            trainer.take_moments(job.subject.moments)
        if found is not None and job.folder is not None:
            longer = job.goes_on_from(found.header)
            if not longer:
                compare_identity(found.header, job.identity, job.folder)
            trainer.restore(found)
            if longer:
                trainer.leave_branch()
            if found.note and group.first:
                log.warning("%s", found.note)
            if group.first:
                log.info("%s: going on from %d of %d tokens", job.folder, trainer.tokens, run_.total_tokens)
        try:
            return trainer.train(interrupted, max_seconds), trainer
        except TrainingDiverged as error:
            return Outcome("failed", str(error)), trainer
        except NonFiniteInputError as error:
            return Outcome("failed", trainer.why(f"parameters became NaN or infinite: {error}")), trainer


def _what_fits(job: _Job, error: BaseException) -> str:
    """Return words on the largest half, quarter, ... of the batch whose first step fits, after one that did not.

    Tried with the moments that AdamW would hold, on weights drawn anew, so that nothing of the run is touched. Empty
    where it cannot be tried here: with several devices, or a module of the caller's own.
    """
    config = job.config
    if config.devices > 1 or "start" in job.subject.identity or job.subject.arch is None or config.batch_size == 1:
        return ""
    traceback.clear_frames(error.__traceback__)  # they hold the model and what it had computed
    forked = [job.device] if job.device.type == "cuda" else []
    size = config.batch_size // 2
    while size:
        try:
            if forked:
                torch.cuda.empty_cache()
            with torch.random.fork_rng(devices=forked):
                model = job.subject.build().to(job.device)
                objective = Objective(model, make_heads(job.source, model, config.seed), z_loss=config.z_loss)
                held = [torch.empty_like(p) for p in objective.parameters() for _ in range(2)]
                batch = to_device(job.source.train_batch(0, size, config.seq_len, config.seed), job.device)
                with autocast(config.precision, job.device)():
                    found = objective(batch)
                sum(found.losses.values(), start=found.total).backward()
            del model, objective, held, batch, found
            return f", of which {size} fits"
        except (MemoryError, RuntimeError) as again:
            if not _out_of_memory(again):
                raise
            traceback.clear_frames(again.__traceback__)
        size //= 2
    return ", of which not even 1 fits"


def _out_of_memory(error: BaseException) -> bool:
    # torch's CPU allocator raises a plain RuntimeError, which nothing but its name in the text tells from others.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def _settle_checkpoints(trainer: Trainer | None, folder: Path, keep: bool, *, sound: bool) -> None:
    """A run that has ended keeps its weights alone, without moments; a failed one its last checkpoint as it is."""
    if not keep:
        checkpoint.remove(folder)
    elif sound and trainer is not None:
        trainer.save(with_optimizer=False)
        checkpoint.remove(folder, names=(checkpoint.PREVIOUS,))


def _stored_result(stored: dict[str, Any], job: _Job, run_: Run, callbacks: CallbackList) -> TrainResult:
    """Return what a finished run left; callbacks see it as a run that starts at its end."""
    assert job.folder is not None
    found = checkpoint.load(job.folder)
    heads = None
    if found is not None:
        with torch.random.fork_rng(devices=[]):
            run_.model = job.subject.build()
            checkpoint.restore_model(run_.model, found.model, job.folder / checkpoint.NEWEST)
            heads = make_heads(job.source, run_.model, job.config.seed)
            checkpoint.restore_model(heads, found.heads, job.folder / checkpoint.NEWEST)
            run_.model = run_.model.to(job.device)
            heads = heads.to(job.device)
    run_.step = run_.evals[-1].step if run_.evals else 0
    result = TrainResult(
        stored["status"], stored["reason"], run_.evals, run_.model, job.folder, stored["tokens_per_second"], heads
    )
    callbacks.on_start(run_)
    for value in run_.evals:
        callbacks.on_eval(run_, value)
    callbacks.on_end(run_, result)
    return result


def identity(
    model: Arch | nn.Module, source: Source, config: TrainConfig, start: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what makes two runs the same: architecture, data and every setting that touches a number.

    ``start``: of a module with given weights, as :func:`run` takes it.
    """
    about = _arch_identity(model) if isinstance(model, Arch) else _module_identity(model)
    if start is not None and not isinstance(model, Arch):
        about["start"] = start_of(model, start)
    return {**about, "data": {"fingerprint": source.fingerprint}, "train": config.identity()}


def _arch_identity(arch: Arch) -> dict[str, Any]:
    return {"fingerprint": arch.fingerprint(), "architecture": arch.to_dict()}


def _module_identity(module: nn.Module) -> dict[str, Any]:
    """Identify a module by its class and the names, shapes and dtypes of what it stores, a HybridLM by its arch."""
    if isinstance(module, HybridLM):
        return _arch_identity(module.arch)
    stored = [[name, list(value.shape), str(value.dtype)] for name, value in module.state_dict().items()]
    digest = hashlib.sha256(json.dumps(stored).encode()).hexdigest()
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    about = {checkpoint.MODULE: name, "params": count_params(module), "tensors": digest[:12]}
    return {"fingerprint": digest, "architecture": about}


def _drawn(arch: Arch, config: TrainConfig, impl: str) -> HybridLM:
    """Return a model with fresh weights, at the size that the learning rates of its width need."""
    model = HybridLM(arch, impl=impl, seed=config.seed)
    scale_weights(model, config)
    return model


def count_params(module: nn.Module) -> int:
    """Return how many numbers a module learns [count]."""
    return sum(parameter.numel() for parameter in module.parameters())


def build_seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return what ``build`` makes with torch's generator seeded; the caller's own stream stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@contextlib.contextmanager
def _claimed(folder: Path | None) -> Iterator[None]:
    """Make the folder and hold it, so that two processes never write one run; the hold ends with the process."""
    if folder is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            ours = stack.enter_context(locked(folder / ".lock", wait=False))
        except OSError as error:
            raise disk_error(error, folder, "the run's folder") from None
        if not ours:
            raise TrainingError(
                f"{folder} is being trained in by another process; wait for it or choose another folder",
                field="folder",
                got=str(folder),
            )
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
        log.warning("finishing this step and saving; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, catch)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
