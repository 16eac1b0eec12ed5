"""One model in training: the step, its sums, its measurements and its checkpoints.

Shapes: B batch, L length.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybridnas.arch.model import HybridLM, LMHidden
from hybridnas.data.source import Batch, Source
from hybridnas.train import checkpoint, optim
from hybridnas.train.config import TrainConfig
from hybridnas.train.distributed import Group
from hybridnas.train.evaluate import autocast, counted, cross_entropy_sum, evaluate, mean_stats, to_device
from hybridnas.train.progress import Progress
from hybridnas.train.readout import attach, read
from hybridnas.train.records import Eval, append_eval

PAUSE = "pause"  # what on_eval returns to leave a run that may go on later
OnEval = Callable[[Eval], bool | str | None]
_CHECK_EVERY = 16  # steps between looks at the loss on a device that would have to be waited for
_SMOOTH = 0.95  # decay of the running mean of the loss


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


class Trainer:
    """Trains a model step by step; all numbers are functions of architecture, source, config and step."""

    def __init__(
        self,
        model: HybridLM,
        source: Source,
        config: TrainConfig,
        *,
        folder: Path,
        device: torch.device,
        evals: list[Eval],
        identity: dict[str, Any],
        group: Group | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.config = config
        self.folder = folder
        self.device = device
        self.evals = evals
        self.identity = identity
        self.group = group or Group()
        self._interrupted = threading.Event()
        self._stop = False  # whether any process of the group was asked to
        if source.summary:
            attach(model, config.seed)
        self.optimizer = optim.make_optimizer(model, config)
        self.state = Position()
        self._parameters = list(optim.named_parameters(model).values())
        self._hidden: Callable[[Tensor], LMHidden] = torch.compile(model.hidden) if config.compile else model.hidden
        self._autocast = autocast(config.precision, device)
        self._sums: dict[str, Tensor] = {}
        self._smooth = self._scalar(0.0)
        self._saved_step = -1
        self._started = self._lap_start = self._saved_at = time.perf_counter()
        model.train()

    @property
    def tokens(self) -> int:
        """Training tokens read so far [count]."""
        return self.state.step * self.config.step_tokens

    @property
    def tokens_per_second(self) -> float:
        """Mean speed of training alone over the whole run."""
        return self.tokens / self.state.train_seconds if self.state.train_seconds else 0.0

    def train(
        self,
        on_eval: OnEval | None,
        shown: Progress,
        interrupted: threading.Event,
        max_seconds: float | None,
    ) -> Outcome:
        """Run to the end, a stop, a failure or an interrupt; saves at measurements, at times, and before it leaves."""
        self._interrupted = interrupted
        for value in self.evals:
            if said := self._ask(on_eval, value):
                return _left(value, said)
        points = frozenset(self.config.eval_steps())
        self._started = self._lap_start = self._saved_at = time.perf_counter()
        while self.state.step < self.config.steps:
            reason = self._step() or self._look(shown)
            if reason:
                return Outcome("failed", reason)
            due = self.state.step in points
            if due:
                measured = self._measure(shown)
                if isinstance(measured, str):
                    return Outcome("failed", measured)
                self.save()
                if measured is not None and (said := self._ask(on_eval, measured)):
                    return _left(measured, said)
                self._lap_start = time.perf_counter()
            if self._stop or (self.group.size == 1 and interrupted.is_set()):
                self.save()
                raise KeyboardInterrupt
            now = time.perf_counter()
            late = max_seconds is not None and self.group.share(now - self._started) >= max_seconds
            if late and self.state.step < self.config.steps:
                self.save()
                reason = f"time limit of {max_seconds:g} s reached at {self.tokens:,} tokens; the same call goes on"
                return Outcome("stopped", reason, final=False)
            if now - self._saved_at >= self.config.checkpoint_seconds:
                reason = self._not_finite()
                if reason and self.group.size == 1:  # several look at the same step, or some would wait for ever
                    return Outcome("failed", reason)
                if not reason:
                    self.save()
        return Outcome("completed")

    def _ask(self, on_eval: OnEval | None, value: Eval) -> bool | str | None:
        """Return what ``on_eval`` says of a measurement: rank 0 asks, and all hear it."""
        said = on_eval(value) if on_eval is not None and self.group.first else None
        return self.group.share(said)  # type: ignore[no-any-return]

    def _step(self) -> str:
        """Take one optimiser step; returns why it could not be taken, or ''. Nothing is changed by a refused step."""
        config, step = self.config, self.state.step
        self._seed(step)
        optim.set_learning_rate(self.optimizer, optim.learning_rate(config, (step + 1) * config.step_tokens))
        # One draw of the whole step, then cut: accumulation reads exactly what one large batch would read.
        order = config.seed if config.data_seed is None else config.data_seed
        whole = self.source.train_batch(step, config.batch_size * config.accumulate, config.seq_len, order)
        whole = to_device(whole, self.device)
        places = counted(whole)
        places = places.clamp(min=1) if isinstance(places, Tensor) else places
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        rows = len(whole.inputs_BL)  # more than batch_size * accumulate where a mixture's part has shorter examples
        parts = config.accumulate * self.group.size
        for part in range(self.group.rank, parts, self.group.size):
            first, last = (rows * number // parts for number in (part, part + 1))
            batch = _slice(whole, first, last - first)
            with self._autocast():
                output = self._hidden(batch.inputs_BL)
                x_BLD = read(self.model, output.x_BLD, batch)
                loss = cross_entropy_sum(x_BLD, self.model.head.weight, batch) / places
            extra = sum(output.aux.losses.values(), start=loss.new_zeros(())) / parts
            (loss + extra).backward()  # type: ignore[no-untyped-call]
            _add(sums, "loss", loss.detach())
            for name, value in (*output.aux.losses.items(), *mean_stats(output.aux.stats).items()):
                _add(sums, name, value.detach() / parts)
        self._stop = self.group.reduce(self._parameters, sums, self._interrupted.is_set())
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, config.grad_clip or math.inf, foreach=True)
        sums["grad_norm"] = norm
        self._count(sums)
        if self.device.type == "cpu":
            reason = self._not_finite()
            if reason:
                return reason
        self.optimizer.step()
        self.state.step += 1
        self.state.since_steps += 1
        return ""

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
        start = max(math.log(self.model.arch.vocab_size), self.state.first_loss or 0.0)
        return (self.config.divergence_factor or math.inf) * start

    def _not_finite(self) -> str:
        for name, words in (("loss", "training loss"), ("grad_norm", "gradient")):
            if name in self._sums and not math.isfinite(float(self._sums[name])):
                return self.why(f"the {words} is not a finite number")
        return ""

    def _look(self, shown: Progress) -> str:
        """Now and then, wait for the device, show where the run is, and say why it cannot go on, or ''."""
        if self.device.type != "cpu" and self.state.step % _CHECK_EVERY:
            return ""
        reason = self._not_finite()
        smooth = float(self._smooth)
        if not reason and smooth > self._limit():
            reason = self.why(f"diverged: the training loss stays at {smooth:.3g}, above {self._limit():.3g}")
        elapsed = self.state.since_seconds + time.perf_counter() - self._lap_start
        shown.step(self.tokens, smooth, self.state.since_steps * self.config.step_tokens / max(elapsed, 1e-9))
        return reason

    def why(self, what: str) -> str:
        """Say what went wrong, where in the run, and what to try."""
        step = self.state.step + 1
        return (
            f"{what} (step {step:,}, {step * self.config.step_tokens:,} tokens); lower train.lr={self.config.lr:g}, "
            f"or raise train.warmup_fraction={self.config.warmup_fraction:g}"
        )

    def _measure(self, shown: Progress) -> Eval | str | None:
        """Measure, record and start new sums; returns the measurement, a reason for failure, or None if it is known."""
        reason = self._not_finite()
        self._lap()
        if reason:
            return reason
        value: Eval | None = None
        if not self.evals or self.evals[-1].step < self.state.step:
            measured = asdict(self._evaluate()) if self.group.first else None
            value = Eval.from_dict(self.group.share(measured))
            if not math.isfinite(value.valid_loss):
                return self.why("the validation loss is not a finite number")
            if self.group.first:
                append_eval(self.folder, value)
            self.evals.append(value)
            shown.measured(value, self.config.tokens)
        self._sums = {}
        self.state.since_steps, self.state.since_seconds = 0, 0.0
        self._lap_start = time.perf_counter()
        return value

    def _evaluate(self) -> Eval:
        config, state = self.config, self.state
        score = evaluate(
            self.model,
            self.source,
            n_tokens=config.valid_tokens,
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            device=self.device,
            precision=config.precision,
        )
        means = {name: float(value) / state.since_steps for name, value in self._sums.items()}
        train_loss = means.pop("loss")
        means["lr"] = optim.learning_rate(config, self.tokens)
        means.update(score.figures())
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
        if not self.group.first:
            self._saved_at = time.perf_counter()
            return
        self._lap()
        self.state.sums = {name: float(value) for name, value in self._sums.items()}
        self.state.smooth_loss = float(self._smooth)
        position = {**asdict(self.state), "seconds": self._seconds()}
        moments = optim.optimizer_tensors(self.model, self.optimizer) if with_optimizer else {}
        header = {**self.identity, "progress": position}
        checkpoint.save(self.folder, header, checkpoint.model_tensors(self.model), moments)
        self._saved_at = self._lap_start = time.perf_counter()

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Take up a checkpoint: weights, moments, position and sums."""
        checkpoint.restore_model(self.model, found.model, self.folder / checkpoint.NEWEST)
        optim.restore_optimizer(self.model, self.optimizer, found.optimizer)
        self.state = Position(**found.header["progress"])
        self._sums = {name: self._scalar(value) for name, value in self.state.sums.items()}
        self._smooth = self._scalar(self.state.smooth_loss)

    def _seed(self, step: int) -> None:
        """Make dropout and the like a function of seed and step, so that no generator needs saving."""
        mixed = (self.config.seed * 0x9E3779B97F4A7C15 + step) % (1 << 63)
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
    mask_BL = None if batch.mask_BL is None else batch.mask_BL[rows]
    return batch._replace(inputs_BL=batch.inputs_BL[rows], targets_BL=batch.targets_BL[rows], mask_BL=mask_BL)


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _left(value: Eval, said: bool | str) -> Outcome:
    if said == PAUSE:
        return Outcome("paused", f"paused after the measurement at {value.tokens:,} tokens", final=False)
    return Outcome("stopped", f"stopped after the measurement at {value.tokens:,} tokens")
