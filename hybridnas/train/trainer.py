"""One model in training: the step, its sums, its measurements and its checkpoints.

Shapes: B batch, L length.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Batch
from hybridnas.errors import TrainingDiverged
from hybridnas.train import checkpoint, optim
from hybridnas.train.callbacks import Action, Callback, CallbackList, Run
from hybridnas.train.config import Decay
from hybridnas.train.distill import Teacher
from hybridnas.train.distributed import Group
from hybridnas.train.evaluate import Score, autocast, counted, evaluate, mean_stats, to_device
from hybridnas.train.objective import Loss, Objective
from hybridnas.train.records import Eval, append_eval, eval_line, keep_documents

_CHECK_EVERY = 16  # steps between looks at the loss on a device that would have to be waited for
_SMOOTH = 0.95  # decay of the running mean of the loss
_GO_ON, _INTERRUPTED, _LATE, _SAVE = range(4)  # what rank 0 decides after a step
log = logging.getLogger("hybridnas.train")


@dataclass(frozen=True)
class Outcome:
    """How training ended; ``final`` runs are not trained again."""

    status: str
    reason: str = ""
    final: bool = True


@dataclass
class Position:
    """Where a run is: all that, beside weights and moments, decides what comes next."""

    step: int = 0
    seconds: float = 0.0  # of the whole run
    train_seconds: float = 0.0  # of training alone
    since_steps: int = 0  # since the last measurement
    since_seconds: float = 0.0
    first_loss: float | None = None
    sums: dict[str, float] = field(default_factory=dict)  # since the last measurement
    smooth_loss: float = 0.0
    decay: int = 0  # of schedule wsd: the end of the decay under way [step]; 0: the rate is constant
    annealed: int = 0  # the end of the last decay that training has come back from [step]
    branch_steps: int = 0  # steps of the branches that training has come back from [count]


class Trainer:
    """Trains a model step by step; all numbers are functions of architecture, source, config and step."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        heads: nn.ModuleDict,
        *,
        identity: dict[str, Any],
        callbacks: Iterable[Callback] = (),
        group: Group | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.run = run
        self.model = model
        self.heads = heads
        self.source = run.source
        self.config = run.config
        self.folder = run.folder
        self.device = run.device
        self.evals = run.evals
        self.identity = identity
        self.callbacks = CallbackList(callbacks)
        self.group = group or Group()
        objective = Objective(
            model,
            heads,
            vocab_size=self.source.vocab_size,
            compile_model=run.config.compile,
            z_loss=run.config.z_loss,
            teacher=teacher,
        )
        self.optimizer = optim.make_optimizer(objective, run.config)
        self.state = Position()
        self._objective = objective
        self._forward: Callable[[Batch], Loss] = objective
        # Named as in a checkpoint: the model's own names, and "heads.NAME..." for what a task adds.
        self._named = {n.removeprefix("model."): p for n, p in optim.named_parameters(objective).items()}
        self._parameters = list(self._named.values())
        self._autocast = autocast(run.config.precision, run.device)
        self._sums: dict[str, Tensor] = {}
        self._smooth = self._scalar(0.0)
        self._stable: checkpoint.Checkpoint | None = None
        self._started = self._lap_start = self._saved_at = time.perf_counter()
        objective.train()

    @property
    def tokens(self) -> int:
        """Training tokens read so far [count]."""
        return self.state.step * self.config.step_tokens

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of training alone over the whole run."""
        return self.trained_tokens / self.state.train_seconds if self.state.train_seconds else 0.0

    @property
    def trained_tokens(self) -> int:
        """Training tokens of all steps taken, those of branches that were left included [count]."""
        return (self.state.step + self.state.branch_steps) * self.config.step_tokens

    @property
    def decay(self) -> Decay | None:
        """The decay under way, or None at a constant rate and with other schedules than ``wsd``."""
        return next((decay for decay in self.config.decays() if decay.end == self.state.decay), None)

    def train(self, interrupted: threading.Event, max_seconds: float | None) -> Outcome:
        """Run to the end, a stop or an interrupt; saves at measurements, at times, and before it leaves.

        Raises TrainingDiverged when the run cannot go on, KeyboardInterrupt when ``interrupted`` is set.
        """
        self.run.step, self.run.branch_steps = self.state.step, self.state.branch_steps
        if self.group.size > 1:
            self._forward = self.group.parallel(self._objective)
        try:
            return self._train(interrupted, max_seconds)
        finally:
            self._forward = self._objective

    def _train(self, interrupted: threading.Event, max_seconds: float | None) -> Outcome:
        if self.group.first:
            self.callbacks.on_start(self.run)
        for value in self.evals:
            action = self._ask(value)
            if action is not Action.CONTINUE:
                return _left(value, action)
        points = frozenset(self.config.eval_steps())
        self._started = self._lap_start = self._saved_at = time.perf_counter()
        while self.state.step < self.config.steps:
            self._turn()
            self._step()
            self._look()
            if self.group.first:
                self.callbacks.on_step(self.run, self.state.step)
            if self.state.step in points:
                measured = self._measure()
                self.save()
                action = Action.CONTINUE if measured is None else self._ask(measured)
                if measured is not None and action is not Action.CONTINUE:
                    return _left(measured, action)
                self._lap_start = time.perf_counter()
            decision = self.group.share(self._decide(interrupted, max_seconds))
            if decision == _INTERRUPTED:
                self.save()
                raise KeyboardInterrupt
            if decision == _LATE:
                self.save()
                reason = f"time limit of {max_seconds:g} s reached at {self.tokens:,} tokens; the same call goes on"
                return Outcome("stopped", reason, final=False)
            if decision == _SAVE:
                self._require_finite()
                self.save()
        return Outcome("completed")

    def _turn(self) -> None:
        """Begin a decay where one starts; after the end of a branch, go back to the state before its decay."""
        state = self.state
        if state.decay and state.step >= state.decay:
            self._return()
        if self.state.decay:
            return
        for decay in self.config.decays():
            if decay.start == self.state.step and decay.end > self.state.annealed:
                self._branch(decay)
                return

    def _branch(self, decay: Decay) -> None:
        """Keep the present state, and let the rate fall from here to the end of ``decay``."""
        self._lap()
        header, weights, moments, heads = self._contents()
        self._stable = checkpoint.Checkpoint(header, _copied(weights), _copied(moments), _copied(heads))
        if self.group.first and self.folder is not None:
            checkpoint.save(self.folder, header, weights, moments, heads, name=checkpoint.STABLE)
        self.state.decay = decay.end
        self._lap_start = time.perf_counter()

    def _return(self) -> None:
        """Take up the state before the branch that has ended; time and trained steps go on."""
        found, branch = self._stable, self.state
        if found is None:  # an earlier process kept it
            assert self.folder is not None
            found = checkpoint.load_stable(self.folder)
        self._take(found, checkpoint.STABLE)
        state = self.state
        state.annealed = branch.decay
        state.branch_steps = branch.branch_steps + branch.step - state.step
        state.seconds, state.train_seconds = branch.seconds, branch.train_seconds
        self._stable = None
        self.run.step, self.run.branch_steps = state.step, state.branch_steps

    def _decide(self, interrupted: threading.Event, max_seconds: float | None) -> int:
        now = time.perf_counter()
        if interrupted.is_set():
            return _INTERRUPTED
        if max_seconds is not None and now - self._started >= max_seconds and self.state.step < self.config.steps:
            return _LATE
        return _SAVE if now - self._saved_at >= self.config.checkpoint_seconds else _GO_ON

    def _ask(self, value: Eval) -> Action:
        """Return what the callbacks want after a measurement: rank 0 asks, all ranks do the same."""
        action = self.callbacks.on_eval(self.run, value) if self.group.first else None
        return Action(self.group.share(action))

    def _step(self) -> None:
        """Take one optimizer step; raises TrainingDiverged, with nothing changed, where it cannot be taken."""
        config, step, group = self.config, self.state.step, self.group
        self._seed(step)
        rate = optim.learning_rate(config, (step + 1) * config.step_tokens, self.decay)
        optim.set_learning_rate(self.optimizer, rate)
        # One draw of the whole step, then cut: accumulation reads exactly what one large batch would read.
        order = config.seed if config.data_seed is None else config.data_seed
        context = config.context_at(step)
        count = config.batch_size * config.accumulate * (config.seq_len // context)
        whole = self.source.train_batch(step, count, context, order)
        whole = to_device(whole, self.device)
        places = counted(whole)
        places = places.clamp(min=1) if isinstance(places, Tensor) else places
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}  # statistics of integers: what blocks learn from without gradients
        rows = len(whole.inputs_BL)  # more than batch_size * accumulate where contexts are shorter
        parts = config.accumulate * group.size
        for part in range(group.rank, parts, group.size):
            first, last = (rows * number // parts for number in (part, part + 1))
            batch = _slice(whole, first, last - first)
            accumulating = group.size > 1 and part + group.size < parts
            with group.accumulating() if accumulating else contextlib.nullcontext():
                with self._autocast():
                    found = self._forward(batch)
                    loss = found.total / places
                extra = sum(found.losses.values(), start=loss.new_zeros(())) / parts
                total = loss + extra
                # DistributedDataParallel averages over ranks what one process would have summed.
                (total * group.size if group.size > 1 else total).backward()  # type: ignore[no-untyped-call]
            _add(sums, "loss", loss.detach())
            for name, value in (*found.losses.items(), *mean_stats(found.stats).items()):
                _add(sums, name, value.detach() / parts)
            for name, value in found.stats.items():
                if not value.is_floating_point():
                    _add(counts, name, value)
        group.sum_figures(sums)
        group.sum_counts(counts)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, config.grad_clip or math.inf, foreach=True)
        sums["grad_norm"] = norm
        self._count(sums)
        if self.device.type == "cpu":
            self._require_finite()
        self.optimizer.step()
        if counts and isinstance(self.model, HybridLM):
            self.model.after_step(counts)
        self.state.step += 1
        self.state.since_steps += 1
        self.run.step = self.state.step

    def _count(self, sums: dict[str, Tensor]) -> None:
        """Add a step's figures to the sums since the last measurement, on the device: no waiting."""
        for name, value in sums.items():
            _add(self._sums, name, value.to(self._scalar(0.0).dtype))
        loss = sums["loss"].to(self._smooth.dtype)
        if self.state.first_loss is None:
            self.state.first_loss = float(loss)
            self._smooth = loss.clone()
            return
        # Bounded, so that one bad batch is not taken for a run that has diverged.
        bounded = loss.clamp(max=2 * self._limit())
        self._smooth = _SMOOTH * self._smooth + (1 - _SMOOTH) * bounded

    def _limit(self) -> float:
        """The loss above which a run counts as diverged, when it stays there."""
        arch = self.run.arch
        vocab_size = self.source.vocab_size if arch is None else arch.vocab_size
        start = max(math.log(vocab_size), self.state.first_loss or 0.0)
        return (self.config.divergence_factor or math.inf) * start

    def _require_finite(self) -> None:
        for name, words in (("loss", "training loss"), ("grad_norm", "gradient")):
            if name in self._sums and not math.isfinite(float(self._sums[name])):
                raise TrainingDiverged(self.why(f"the {words} is not a finite number"))

    def _look(self) -> None:
        """Now and then, wait for the device, update what callbacks see, and raise TrainingDiverged for a high loss."""
        if self.device.type != "cpu" and self.state.step % _CHECK_EVERY:
            return
        self._require_finite()
        smooth = float(self._smooth)
        if smooth > self._limit():
            raise TrainingDiverged(
                self.why(f"diverged: the training loss stays at {smooth:.3g}, above {self._limit():.3g}")
            )
        elapsed = self.state.since_seconds + time.perf_counter() - self._lap_start
        self.run.loss = smooth
        self.run.tokens_per_second = self.state.since_steps * self.config.step_tokens / max(elapsed, 1e-9)

    def why(self, what: str) -> str:
        """Say what went wrong, where in the run, and what to try."""
        step = self.state.step + 1
        return (
            f"{what} (step {step:,}, {step * self.config.step_tokens:,} tokens); lower train.lr={self.config.lr:g}, "
            f"or raise train.warmup_fraction={self.config.warmup_fraction:g}"
        )

    def _measure(self) -> Eval | None:
        """Measure, record and start new sums; returns the measurement, or None where it was known already.

        Raises TrainingDiverged for a loss that is not finite.
        """
        self._lap()
        self._require_finite()
        value: Eval | None = None
        if not self.evals or self.evals[-1].step < self.state.step:
            value = self.group.share(self._evaluate() if self.group.first else None)
            assert value is not None
            if not math.isfinite(value.valid_loss):
                raise TrainingDiverged(self.why("the validation loss is not a finite number"))
            if self.group.first:
                if self.folder is not None:
                    append_eval(self.folder, value)
                log.info("%s", eval_line(value, self.run.total_tokens, self.source.bits))
            self.evals.append(value)
        self._sums = {}
        self.state.since_steps, self.state.since_seconds = 0, 0.0
        self._lap_start = time.perf_counter()
        return value

    def _score(self, part: str) -> Score:
        config = self.config
        return evaluate(
            self.model,
            self.source,
            n_tokens=config.valid_tokens,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            device=self.device,
            precision=config.precision,
            heads=self.heads,
            allow_noncausal=config.allow_noncausal,
            part=part,
            by_document=part == "test",
        )

    def _evaluate(self) -> Eval:
        """Measure on the validation part, and at the end of the run on the test part, where the data has one."""
        config, state = self.config, self.state
        score = self._score("valid")
        means = {name: float(value) / state.since_steps for name, value in self._sums.items()}
        train_loss = means.pop("loss")
        means["lr"] = optim.learning_rate(config, self.tokens, self.decay)
        if config.schedule == "wsd":
            means["annealed"] = float(self.state.decay == state.step)
            means["trained_tokens"] = float(self.trained_tokens)
        means.update(score.figures())
        if state.step == config.steps and self.source.test_tokens != 0:
            tested = self._score("test")
            means.update(tested.test_figures())
            if tested.documents is not None and self.folder is not None and math.isfinite(tested.loss):
                keep_documents(self.folder, tested.documents)
        return Eval(
            tokens=self.tokens,
            step=state.step,
            train_loss=train_loss,
            valid_loss=score.loss,
            bits_per_byte=score.bits_per_byte,
            accuracy=score.accuracy,
            tokens_per_second=state.since_steps * config.step_tokens / max(state.since_seconds, 1e-9),
            seconds=self._seconds(),
            aux=means,
        )

    def save(self, *, with_optimizer: bool = True) -> None:
        """Write a checkpoint of this moment; raises TrainingError when the disk refuses."""
        if not self.group.first or self.folder is None:
            self._saved_at = time.perf_counter()
            return
        self._lap()
        header, weights, moments, heads = self._contents()
        checkpoint.save(self.folder, header, weights, moments if with_optimizer else {}, heads)
        self._saved_at = self._lap_start = time.perf_counter()

    def _contents(self) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Return what a checkpoint of this moment holds: header, weights, moments and heads."""
        self.state.sums = {name: float(value) for name, value in self._sums.items()}
        self.state.smooth_loss = float(self._smooth)
        header = {**self.identity, "progress": {**asdict(self.state), "seconds": self._seconds()}}
        moments = optim.optimizer_tensors(self._named, self.optimizer)
        return header, checkpoint.model_tensors(self.model), moments, checkpoint.model_tensors(self.heads)

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Take up a checkpoint: weights, moments, position and sums."""
        self._take(found, checkpoint.NEWEST)

    def take_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Begin with the optimizer's moments of some weights, as :func:`optim.optimizer_tensors` names them."""
        optim.restore_optimizer(self._named, self.optimizer, moments)

    def leave_branch(self) -> None:
        """Go on from the state before the decay that has ended, and let a checkpoint of it be the only one."""
        self._return()
        self.save()
        if self.group.first and self.folder is not None:
            checkpoint.remove(self.folder, names=(checkpoint.PREVIOUS,))

    def _take(self, found: checkpoint.Checkpoint, name: str) -> None:
        path = Path(name) if self.folder is None else self.folder / name
        checkpoint.restore_model(self.model, found.model, path)
        checkpoint.restore_model(self.heads, found.heads, path)
        optim.restore_optimizer(self._named, self.optimizer, found.optimizer)
        self.state = Position(**found.header["progress"])
        self._sums = {name: self._scalar(value) for name, value in self.state.sums.items()}
        self._smooth = self._scalar(self.state.smooth_loss)

    def _seed(self, step: int) -> None:
        """Make dropout and the like a function of seed, step and rank, so that no generator's state needs saving.

        It is torch's global generator that is seeded, since that is what ``F.dropout`` draws from; the run holds it
        inside ``fork_rng``, so the caller's own stream goes on as if no training had been.
        """
        mixed = (self.config.seed * 0x9E3779B97F4A7C15 + self.group.rank * 0xBF58476D1CE4E5B9 + step) % (1 << 63)
        torch.default_generator.manual_seed(mixed)  # torch.manual_seed takes 0.2 ms for its calls to absent devices
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(mixed)

    def _lap(self) -> None:
        """Book the time since the last lap as training."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.state.train_seconds += now - self._lap_start
        self.state.since_seconds += now - self._lap_start
        self._lap_start = now

    def _seconds(self) -> float:
        return self.state.seconds + time.perf_counter() - self._started

    def _scalar(self, value: float) -> Tensor:
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.tensor(value, dtype=wide, device=self.device)


def _slice(batch: Batch, start: int, length: int) -> Batch:
    rows = slice(start, start + length)
    names = ("inputs_BL", "targets_BL", "mask_BL", "segments_BL", "values_BL")
    given = {name: tensor for name in names if (tensor := getattr(batch, name)) is not None}
    return batch._replace(**{name: tensor[rows] for name, tensor in given.items()})


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _left(value: Eval, action: Action) -> Outcome:
    if action is Action.PAUSE:
        return Outcome("paused", f"paused after the measurement at {value.tokens:,} tokens", final=False)
    return Outcome("stopped", f"stopped after the measurement at {value.tokens:,} tokens")
