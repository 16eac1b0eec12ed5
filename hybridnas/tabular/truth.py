"""Trains the truth set: listed architectures at several sizes, each at rates of its own and with seeds at the best one.

Each training is a cell of an :class:`hybridnas.train.experiment.Experiment`, so it resumes to the bit. Any number of
processes work on one set: each takes the first training that has no row and is locked by no other. The order makes any
beginning useful: small sizes first; of a size one rate of every architecture, then the others, then seeds at the best
rate and at the first one, then one cosine, then the recall of a task.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridnas.arch.arch import Arch
from hybridnas.arch.pattern import parse
from hybridnas.arch.presets import DEFAULT_BASELINES, preset
from hybridnas.data import Source, open_source, source_config
from hybridnas.errors import MatchError
from hybridnas.files import locked
from hybridnas.search.rates import rate_beyond
from hybridnas.search_spaces.fit import fit
from hybridnas.study.locks import FileLock
from hybridnas.study.truth import (
    CHOOSING,
    RATES,
    RECALL,
    REPORTING,
    RUNGS,
    TEXT,
    Listed,
    TruthRow,
    read_truth,
    write_truth,
)
from hybridnas.train.callbacks import Callback, Run
from hybridnas.train.config import ANNEALED_LR_FRACTION, TrainConfig
from hybridnas.train.experiment import Cell, CellResult, Experiment
from hybridnas.train.records import TrainResult

LETTERS = "AMSNGLKCFE"
DEPTH = 4  # sub-layers of every architecture
_WIDE = "MNCFE"  # letters whose block has a width that matching can size; a pattern needs one of them
_CHANNEL = "FE"  # letters that mix channels alone
# Block fields beside the defaults: a state and a window that fit these widths and lengths.
_FIELDS: Mapping[str, Mapping[str, Any]] = {"N": {"d_state": 16}, "S": {"window": 32}, "E": {"n_experts": 8}}


@dataclass(frozen=True, kw_only=True)
class TruthSize:
    """One size of the truth set."""

    active_params: int  # that every architecture is matched to [count per token]
    d_model: int
    batch_size: int
    valid_tokens: int
    cosine: bool = False  # whether the middle rate is trained with a cosine, too
    recall: bool = False  # whether the recall of a task is measured, too
    shared_seeds: int = 0  # seeds after the first at the first rate, too, where another one is best [count]
    more_seeds: int = 0  # seeds at the best rate beyond those of the set [count]
    baselines_only: bool = False  # whether architectures that were drawn are left out


@dataclass(frozen=True, kw_only=True)
class TruthSpec:
    """What a truth set is: all that decides its numbers."""

    architectures: Sequence[Listed]
    sizes: Sequence[TruthSize]
    data: Mapping[str, Any] = field(default_factory=lambda: {"kind": "stdlib"})
    recall: Mapping[str, Any] = field(default_factory=lambda: RECALL_DATA)
    recall_tokens: int = 1_000_000
    tokens_per_active_param: float = 100.0
    seq_len: int = 128
    rates: tuple[float, ...] = RATES  # in the order in which they are trained
    seeds: int = 3  # at the best rate
    schedule: str = "wsd"  # or constant, whose scores at the rungs are plain ones


RECALL_DATA: Mapping[str, Any] = {
    "kind": "in_context_recall",
    "vocab_size": 16,
    "seq_len": 128,
    "n_train_examples": None,
}
SIZES = (
    TruthSize(active_params=4_608, d_model=12, batch_size=8, valid_tokens=65_536, cosine=True, recall=True),
    TruthSize(
        active_params=16_384,
        d_model=24,
        batch_size=16,
        valid_tokens=65_536,
        cosine=True,
        recall=True,
        shared_seeds=2,
        more_seeds=1,
    ),
    TruthSize(active_params=65_536, d_model=48, batch_size=32, valid_tokens=131_072, baselines_only=True),
    TruthSize(active_params=262_144, d_model=96, batch_size=64, valid_tokens=131_072),
)


def draw_architectures(count: int = 48, seed: int = 0, sizes: Sequence[TruthSize] = SIZES) -> list[Listed]:
    """Draw the truth set: the five baselines, and patterns of four sub-layers balanced over letters and positions.

    Of the drawn ones a sixth has no channel mixer (MLP or experts), a third one, a third two and a sixth three; every
    other one with channel mixers has a single kind of mixer, the rest any. Of each two with equally many channel
    mixers one is for choosing and one for reporting, and so with the baselines. All can be matched at every size.
    """
    rng = random.Random(seed)
    known = {_preset_pattern(name): name for name in DEFAULT_BASELINES}
    used: Counter[Any] = Counter()
    drawn: dict[str, int] = {}  # pattern -> channel mixers
    while len(drawn) < count - len(known):
        channel_mixers = (1, 2, 0, 2, 1, 3)[len(drawn) // 2 % 6]
        one_kind = channel_mixers > 0 and len(drawn) % 2 == 0
        candidates = [_draw_pattern(rng, channel_mixers, one_kind) for _ in range(64)]
        for text in sorted(candidates, key=lambda text: sum(used[x] + used[place] for x, place in _places(text))):
            canonical = str(parse(text))
            if canonical not in known and canonical not in drawn and _matches(text, sizes):
                drawn[canonical] = channel_mixers
                for letter, place in _places(text):
                    used.update((letter, place))
                break
    ordered = [*sorted(known), *sorted(drawn, key=lambda pattern: -drawn[pattern])]
    listed = []
    for pair in zip(ordered[::2], ordered[1::2], strict=True):
        halves = [CHOOSING, REPORTING]
        rng.shuffle(halves)
        listed += [Listed(pattern=p, half=h, preset=known.get(p, "")) for p, h in zip(pair, halves, strict=True)]
    rng.shuffle(listed)
    return listed


def _places(pattern: str) -> list[tuple[str, tuple[str, int]]]:
    """Return each letter, and it with its position."""
    return [(letter, (letter, place)) for place, letter in enumerate(pattern)]


def _preset_pattern(name: str) -> str:
    """Return a preset's pattern, cut to the depth."""
    pattern = preset(name, d_model=24, vocab_size=257).pattern
    return str(parse("".join(str(layer) for layer in pattern.layers[:DEPTH])))


def _draw_pattern(rng: random.Random, channel_mixers: int, one_kind: bool) -> str:
    """Return letters in any order, so many of them MLPs or experts, at least one with a width to size."""
    while True:
        kinds = [x for x in LETTERS if x not in _CHANNEL]
        kinds = [rng.choice(kinds)] if one_kind else kinds
        letters = [rng.choice(kinds) for _ in range(DEPTH - channel_mixers)]
        letters += [rng.choice(_CHANNEL) for _ in range(channel_mixers)]
        rng.shuffle(letters)
        if set(letters) & set(_WIDE):
            return "".join(letters)


def _matches(pattern: str, sizes: Sequence[TruthSize]) -> bool:
    try:
        for size in sizes:
            sized(pattern, size, 257)
    except MatchError:
        return False
    return True


def sized(pattern: str, size: TruthSize, vocab_size: int) -> Arch:
    """Return the architecture at a size: width as given, block widths matched; raises MatchError."""
    letters = {slot.letter for slot in parse(pattern).slots}
    fields = {letter: dict(values) for letter, values in _FIELDS.items() if letter in letters}
    arch = Arch.from_pattern(pattern, d_model=size.d_model, vocab_size=vocab_size, **fields)
    return fit(arch, size.active_params, 1)


_sized = functools.cache(sized)  # matching takes a tenth of a second


@dataclass(frozen=True)
class _Training:
    """One training that the set wants."""

    listed: Listed
    size: TruthSize
    task: str
    schedule: str
    rate: float
    seed: int


class _CpuTime(Callback):
    """Measures the processor time of a training [s]; what earlier processes did of it is taken at this one's pace."""

    seconds = 0.0

    def on_start(self, run: Run) -> None:
        self._began, self._first = time.process_time(), run.step

    def on_end(self, run: Run, result: TrainResult) -> None:
        done = run.step - self._first
        self.seconds = (time.process_time() - self._began) * (run.step / done if done else 1.0)


def build_truth(
    spec: TruthSpec,
    path: Path,
    work: Path,
    *,
    minutes: float | None = None,
    report: Callable[[str], None] = print,
    origin: Mapping[str, str] | None = None,
) -> list[TruthRow]:
    """Train what the set lacks, each row written at once; returns the rows as they then are.

    ``minutes``: stop after this long, inside a training, which the next call goes on with. ``work``: where unfinished
    trainings lie; processes that share it and ``path`` share the set. ``origin``: ``command`` and ``commit`` of rows.
    """
    return _Builder(spec, path, work, report, {"command": "", "commit": "unknown", **(origin or {})}).run(minutes)


class _Builder:
    """One process at a truth set."""

    def __init__(
        self, spec: TruthSpec, path: Path, work: Path, report: Callable[[str], None], origin: dict[str, str]
    ) -> None:
        self.spec, self.path, self.work, self.report, self.origin = spec, path, work, report, origin
        self._held: FileLock | None = None

    @functools.cached_property
    def _text(self) -> Source:
        return open_source(source_config(self.spec.data))

    @functools.cached_property
    def _recall(self) -> Source:
        return open_source(source_config(self.spec.recall))

    def run(self, minutes: float | None) -> list[TruthRow]:
        self.report(f"{len(self.spec.architectures)} architectures; {len(self._read())} trainings are in {self.path}")
        experiment = Experiment(self._cells(), minutes=minutes, on_result=self._keep)
        try:
            experiment.run()
        finally:
            self._release()
        if not experiment.complete:
            self.report("the minutes are used; the same command goes on")
        return self._read()

    def _cells(self) -> Iterator[Cell]:
        while (cell := self._next()) is not None:
            yield cell

    def _next(self) -> Cell | None:
        """Return the first training that is wanted, not done and not held by another process, and hold it."""
        rows = self._read()
        done = {row.key for row in rows}
        for training in self._wanted(rows):
            name = _name(training)
            lock = FileLock(self.work / f"{name}.lock")
            cell = self._cell(training, name)
            if self._key(training, cell) in done or not lock.acquire(wait=False):
                continue
            if self._key(training, cell) in {row.key for row in self._read()}:  # ended while we looked
                lock.release()
                continue
            self._held = lock
            return cell
        return None

    def _wanted(self, rows: Sequence[TruthRow]) -> Iterator[_Training]:
        """Yield all trainings of the set in their order, as far as the rows so far decide it."""
        spec = self.spec
        best_before: dict[str, float] = {}  # pattern -> best rate at the size before
        for size in spec.sizes:
            found = _by_rate(rows, size, spec.schedule)
            wanted = [one for one in spec.architectures if one.preset or not size.baselines_only]
            first = {one.pattern: best_before.get(one.pattern, spec.rates[0]) for one in wanted}
            for one in wanted:
                yield _Training(one, size, TEXT, spec.schedule, first[one.pattern], 0)
            for one in wanted:
                for rate in spec.rates:
                    yield _Training(one, size, TEXT, spec.schedule, rate, 0)
                beyond = rate_beyond(found.get(one.pattern, {}), spec.rates)
                if beyond is not None:
                    yield _Training(one, size, TEXT, spec.schedule, beyond, 0)
            best = {
                pattern: min(losses, key=lambda rate: (losses[rate], rate))
                for pattern, losses in found.items()
                if set(spec.rates) <= set(losses)
                and rate_beyond(losses, spec.rates) is None
                and math.isfinite(min(losses.values()))
            }
            at_best = [one for one in wanted if one.pattern in best]
            for seed in range(1, spec.seeds):
                for one in at_best:
                    yield _Training(one, size, TEXT, spec.schedule, best[one.pattern], seed)
            for seed in range(1, 1 + size.shared_seeds):
                for one in at_best:
                    yield _Training(one, size, TEXT, spec.schedule, spec.rates[0], seed)
            for seed in range(spec.seeds, spec.seeds + size.more_seeds):
                for one in at_best:
                    yield _Training(one, size, TEXT, spec.schedule, best[one.pattern], seed)
            if size.cosine:
                for one in wanted:
                    yield _Training(one, size, TEXT, "cosine", spec.rates[0], 0)
            if size.recall:
                for one in at_best:
                    yield _Training(one, size, RECALL, "cosine", best[one.pattern], 0)
            best_before = best

    def _cell(self, training: _Training, name: str) -> Cell:
        source = self._text if training.task == TEXT else self._recall
        used = _CpuTime()
        return Cell(
            key=name,
            model=_sized(training.listed.pattern, training.size, source.vocab_size),
            source=source,
            config=self._config(training),
            folder=self.work / name,
            device="cpu",
            keep_checkpoint=False,
            callbacks=(used,),
            facts={"training": training, "cpu": used},
        )

    def _config(self, training: _Training) -> TrainConfig:
        spec, size = self.spec, training.size
        step = size.batch_size * spec.seq_len
        wanted = spec.tokens_per_active_param * size.active_params if training.task == TEXT else spec.recall_tokens
        tokens = max(1, round(wanted / (8 * step))) * 8 * step  # every rung is a whole step
        values: dict[str, Any] = {
            **{"tokens": tokens, "batch_size": size.batch_size, "seq_len": spec.seq_len, "lr": training.rate},
            **{"seed": training.seed, "warmup_fraction": 0.02, "schedule": training.schedule},
            **{"valid_tokens": size.valid_tokens, "checkpoint_seconds": 60.0},
        }
        rungs = [round(rung * tokens) for rung in RUNGS]
        points = {tokens // 32, tokens // 16}
        if training.schedule == "wsd":
            values |= {"anneal_at": tuple(rungs[:-1]), "final_lr_fraction": ANNEALED_LR_FRACTION}
            starts = {decay.start * step for decay in TrainConfig.from_dict(values).decays()}
            return TrainConfig.from_dict({**values, "eval_at": tuple(sorted(points | starts))})
        return TrainConfig.from_dict({**values, "eval_at": tuple(sorted({*points, *rungs}))})

    def _settings(self, cell: Cell) -> str:
        """Return 12 hex digits of all that decides a row beside its architecture, rate and seed."""
        config = {key: value for key, value in cell.config.identity().items() if key not in ("lr", "seed")}
        text = json.dumps({"data": cell.source.fingerprint, "train": config}, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _key(self, training: _Training, cell: Cell) -> tuple[Any, ...]:
        assert isinstance(cell.model, Arch)
        how = (training.size.active_params, training.task, training.schedule, training.rate, training.seed)
        return (cell.model.fingerprint(), *how, self._settings(cell))

    def _read(self) -> list[TruthRow]:
        return read_truth(self.path)

    def _keep(self, ended: CellResult) -> None:
        """Put a result into the file, which other processes write, too."""
        row = self._row(ended)
        with locked(self.work / "rows.lock"):
            rows = [*self._read(), row]
            write_truth(self.path, rows)
        assert ended.cell.folder is not None
        if ended.result.final:  # else its error.txt is there to be read
            shutil.rmtree(ended.cell.folder, ignore_errors=True)
        self._release()
        how = f"failed: {row.failed}" if row.failed else f"loss {row.loss:.4f} accuracy {row.accuracies[1.0]:.3f}"
        self.report(f"{len(rows):4} rows  {ended.cell.key}  {row.cpu_seconds:.1f} core-seconds  {how}")

    def _release(self) -> None:
        if self._held is not None:
            self._held.release()
            self._held = None

    def _row(self, ended: CellResult) -> TruthRow:
        cell, done = ended.cell, ended.result
        training: _Training = cell.facts["training"]
        arch, config = cell.model, cell.config
        assert isinstance(arch, Arch)
        cost = arch.cost(config.seq_len)
        at = {round(rung * config.tokens): rung for rung in RUNGS}
        rungs = {at[e.tokens]: e for e in done.evals if e.tokens in at}
        plain = [e for e in done.evals if not e.aux.get("annealed")]
        last = done.evals[-1].aux if done.evals else {}
        starts = {decay.start: at[decay.end * config.step_tokens] for decay in config.decays()}
        return TruthRow(
            pattern=training.listed.pattern,
            fingerprint=arch.fingerprint(),
            half=training.listed.half,
            size=training.size.active_params,
            d_model=arch.d_model,
            active_params=cost.active_params,
            params=cost.params,
            embedding_params=cost.embedding_params,
            flops_per_token=cost.flops_per_token,
            state_bytes=cost.state_bytes,
            task=training.task,
            schedule=training.schedule,
            rate=training.rate,
            seed=training.seed,
            tokens=config.tokens,
            losses={rung: e.valid_loss for rung, e in rungs.items()},
            accuracies={rung: e.accuracy for rung, e in rungs.items()},
            trunk={starts[e.step]: e.valid_loss for e in plain if e.step in starts},
            curve=tuple((e.tokens, e.valid_loss, e.train_loss) for e in plain),
            test_loss=done.test_loss,
            test_repeat_loss=last.get("test_repeat_loss"),
            test_repeat_accuracy=last.get("test_repeat_accuracy"),
            trained_tokens=config.trained_steps() * config.step_tokens,
            tokens_per_second=round(done.tokens_per_second),
            cpu_seconds=round(cell.facts["cpu"].seconds, 2),
            failed=done.reason if done.status != "completed" else "",
            settings=self._settings(cell),
            data=cell.source.fingerprint[:12],
            command=self.origin["command"],
            commit=self.origin["commit"],
        )


def _by_rate(rows: Iterable[TruthRow], size: TruthSize, schedule: str) -> dict[str, dict[float, float]]:
    """Return pattern -> rate -> final validation loss of the first seed."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        if (row.size, row.task, row.schedule, row.seed) == (size.active_params, TEXT, schedule, 0):
            found.setdefault(row.pattern, {})[row.rate] = row.loss
    return found


def _name(training: _Training) -> str:
    pattern = training.listed.pattern
    letters = "".join(slot.letter for slot in parse(pattern).slots)
    if "{" in pattern:  # letters alone do not tell two options apart
        letters += "-" + hashlib.sha256(pattern.encode()).hexdigest()[:6]
    return (
        f"{training.size.active_params}-{training.task}-{training.schedule}-{letters}-{training.rate:g}-{training.seed}"
    )
