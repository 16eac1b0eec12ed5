"""Time and peak memory of training and of decoding against sequence length, as figure 8 of the Mamba paper draws it.

Every point is a process of its own. Training: one step at batch 1 (forward, cross-entropy, backward, AdamW), the
median of a few. Decoding: a prompt of the length is read, then 16 tokens are generated; the time is that of a token,
the memory includes reading the prompt and whatever is kept of it. Where patience or memory ends, the table says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hybridnas.arch.model import HybridLM
from hybridnas.bench import child, models
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.models import HF_MAMBAPY, HF_SLOW, MAMBA, TRANSFORMER, Sizes
from hybridnas.bench.result import Result, Table
from hybridnas.bench.suites import decode

_NEW = 16  # tokens of which decoding takes the mean
_ENOUGH = 5.0  # seconds of training steps after the first
_COLOURS = {MAMBA: "C0", TRANSFORMER: "C1", HF_MAMBAPY: "C2", HF_SLOW: "C3"}
_PLANS = {"training": (MAMBA, TRANSFORMER, HF_MAMBAPY, HF_SLOW), "decoding": (MAMBA, TRANSFORMER, HF_SLOW)}


class Point(NamedTuple):
    """One process: seconds of a step or a token, and bytes beyond the loaded model; or why there are none."""

    kind: str
    model: str
    length: int
    seconds: float | None
    extra_bytes: int | None
    note: str


def training(model: str, layers: int, d_model: int, length: int) -> Callable[[], float]:
    """Build a model; returns what takes training steps and returns the median of their seconds."""
    sizes = Sizes(layers, d_model)
    models.training_step(model, sizes, 1, 16)[0]()
    step, _ = models.training_step(model, sizes, 1, length)

    def measured() -> float:
        seconds: list[float] = []
        began = time.perf_counter()
        while len(seconds) < 2 or (len(seconds) < 6 and time.perf_counter() - began < _ENOUGH):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
            if seconds[0] > _ENOUGH:
                break
        return statistics.median(seconds[1:] or seconds)  # the first makes the optimizer's state

    return measured


def decoding(model: str, layers: int, d_model: int, length: int) -> Callable[[], float]:
    """Build a model; returns what reads a prompt, generates, and returns the seconds of a token."""
    sizes = Sizes(layers, d_model)
    ids_BL = torch.randint(0, sizes.vocab, (1, length), generator=torch.Generator().manual_seed(0))
    own, _ = models.build(model, sizes)
    generate: Callable[[Any, torch.Tensor, int], float]
    generate = decode.ours if isinstance(own, HybridLM) else decode.hugging_face
    generate(own.eval(), ids_BL[:, :8], 2)
    return lambda: generate(own, ids_BL, _NEW)


def run(config: BenchConfig) -> Result:
    """Measure 2^8 to 2^15 (2^12 when quick), print a table, and draw it beside ``out``."""
    result = Result("lengths")
    layers, width = (1, 16) if config.tiny else (4, 256)
    powers = range(4, 5) if config.tiny else range(8, config.pick(16, 13, 0))
    limit = config.pick(config.patience, min(config.patience, 30.0), config.patience)
    points: list[Point] = []
    ended: dict[tuple[str, str], str] = {}
    for power in powers:
        for kind, names in _PLANS.items():
            for name in names:
                why = models.needs(name) or ended.get((kind, name), "")
                if why:
                    points.append(Point(kind, name, 2**power, None, None, why))
                    continue
                sizes = {"model": name, "layers": layers, "d_model": width, "length": 2**power}
                function = f"hybridnas.bench.suites.lengths:{kind}"
                one = child.measured(function, sizes, threads=config.threads, limit=limit)
                points.append(Point(kind, name, 2**power, one.value, one.extra_bytes, one.failed))
                if one.failed:
                    ended[kind, name] = f"not run: at {2**power:,} tokens it was {one.failed}"
    columns = ("model", "tokens", "seconds", "peak beyond the loaded model [MiB]", "note")
    for kind, unit in (("training", "one step"), ("decoding", "one token")):
        rows = [
            [p.model, p.length, p.seconds, None if p.extra_bytes is None else p.extra_bytes / 2**20, p.note]
            for name in _PLANS[kind]
            for p in points
            if (p.kind, p.model) == (kind, name)
        ]
        title = f"lengths: {kind}, {unit}, batch 1, {layers} Mamba layers of width {width} or equal parameters"
        result.tables.append(Table(title, columns, rows))
    for suffix in (".svg", ".png"):
        target = config.beside(f"-lengths{suffix}")
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            draw(points, str(target))
            result.files.append(str(target))
    return result


def draw(points: list[Point], target: str) -> None:
    """Draw seconds and memory of both kinds against length, logarithmic both ways."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    units = {"training": "seconds a step", "decoding": "seconds a token"}
    for row, (kind, names) in enumerate(_PLANS.items()):
        for column, (field, label) in enumerate((("seconds", units[kind]), ("extra_bytes", "peak memory [MiB]"))):
            panel = axes[row][column]
            for name in names:
                found = [(p.length, getattr(p, field)) for p in points if (p.kind, p.model) == (kind, name)]
                shown = [(x, y / (2**20 if field == "extra_bytes" else 1)) for x, y in found if y]
                if shown:
                    panel.plot(*zip(*shown, strict=True), marker="o", markersize=3.5, color=_COLOURS[name], label=name)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xlabel("sequence length [tokens]")
            panel.set_ylabel(f"{kind}: {label}")
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(True, which="major", linewidth=0.4, alpha=0.5)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(target, dpi=160)
