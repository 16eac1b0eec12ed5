"""Synthetic tasks: what a batch of examples costs, beside the training step that reads it; the goal is 5 % of a step.

Each task at its own settings, in batches of 8,192 tokens, against a step of a small Mamba (4 layers, d_model 128, the
size at which tasks are trained), and in batches of 128 x 512 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from hybridnas.bench import models
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, Spread, measure
from hybridnas.bench.models import MAMBA, Sizes
from hybridnas.bench.result import Result, Table
from hybridnas.data import SOURCES, open_source
from hybridnas.data.task import TaskConfig

STEP = "a training step"
_TOKENS = 8_192  # of a batch
_SHARE = 0.05
_LARGE = (128, 512)  # examples and tokens of a batch that is measured alone


def run(config: BenchConfig) -> Result:
    """Measure every registered task; those whose examples are of one length share their rounds and their step."""
    result = Result("tasks")
    sizes = Sizes(1, 16) if config.tiny else Sizes(4, 128)
    kinds = {kind: SOURCES.get(kind).config for kind in SOURCES}
    tasks = {kind: settings for kind, settings in kinds.items() if issubclass(settings, TaskConfig)}
    tokens = config.pick(_TOKENS, _TOKENS, 512)
    for length in sorted({settings().seq_len for settings in tasks.values()}):
        size = max(1, tokens // length)
        shape = (1, 16) if config.tiny else (size, length)
        case = f"{size} x {length}"
        alike = [kind for kind, settings in tasks.items() if settings().seq_len == length]
        forms = [Form(STEP, models.training_step(MAMBA, sizes, *shape)[0])]
        forms += [Form(kind, _batches(tasks[kind](), size)) for kind in alike]
        result.add(case, measure(forms, config.pick(9, 3, 1)))
        for kind in alike:
            what = f"a batch of {kind}, {case}"
            result.goal("at most", _SHARE, case=case, of=kind, over=STEP, what=what, against="its training step")
    rows = [[kind, *_large(settings, config)] for kind, settings in tasks.items()]
    title = f"tasks: a batch of {_LARGE[0]} x {_LARGE[1]} tokens [us]"
    result.tables.append(Table(title, ("task", "median", "least"), rows))
    return result


def _batches(settings: TaskConfig, size: int) -> Callable[[], None]:
    source, steps = open_source(settings), count()

    def one() -> None:
        source.train_batch(next(steps), size, settings.seq_len, 0)

    return one


def _large(settings: type[TaskConfig], config: BenchConfig) -> tuple[float, float]:
    size, length = (2, 512) if config.tiny else _LARGE
    form = Form("", _batches(settings(seq_len=length), size))
    spread = Spread.of(measure([form], config.pick(30, 10, 1))[""])
    return spread.median * 1e6, spread.low * 1e6
