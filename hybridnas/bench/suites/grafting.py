"""Grafts of small trained models: what each start of a new block recovers of the loss, by tokens, beside controls.

Every row is a replacement in a model that was trained here, started in one way and trained with one and the same number
of tokens, those of the fit among them. Controls: the model trained on without a graft, a block fitted to itself, a
block drawn at random, and replacements side by side against interleaved ones. The share recovered is of the gap between
the model and the graft with random blocks before any training: 0 is that, 1 is what the model trained on would be.

Rows are written as they are done: the same command goes on.
"""

from __future__ import annotations

import csv
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hybridnas.bench.context import BenchConfig
from hybridnas.bench.result import Result, Table
from hybridnas.bench.suites.table import say
from hybridnas.files import write_atomic

COLUMNS = (
    "case",
    "base",
    "edit",
    "init",
    "seed",
    "point",
    "tokens",
    "loss",
    "parent",
    "fit_before",
    "fit_after",
    "cpu",
)
TRAINED_ON = "trained on"  # the case without a graft


class Case(NamedTuple):
    """A replacement, the model that it is made in, and the ways in which its new blocks start."""

    name: str
    base: str
    edit: str
    inits: tuple[str, ...]


def _each(places: Sequence[int], edit: str) -> str:
    """Return the same edit at several layers."""
    return "; ".join(f"{at}:{edit}" for at in places)


_RECURRENT = ("random", "fit", "qkv", "qkv+fit")
ATTENTION, MAMBA = "(AF)x4", "(MF)x4"
_TO_G, _TO_N = "A->G{n_heads=2}", "A->N{head_dim=16,n_groups=2,d_state=16}"
APART = (0, 4)  # the layers that are replaced: two of four, with one of their kind between them
CASES = (
    Case(TRAINED_ON, ATTENTION, "", ("none",)),
    Case(TRAINED_ON, MAMBA, "", ("none",)),
    Case("A to G", ATTENTION, _each(APART, _TO_G), _RECURRENT),
    Case("A to M", ATTENTION, _each(APART, "A->M"), _RECURRENT),
    Case("A to N", ATTENTION, _each(APART, _TO_N), _RECURRENT),
    Case("A to windowed A", ATTENTION, _each(APART, "A->S{window=8}"), ("random", "fit", "copy", "copy+fit")),
    Case("M to A", MAMBA, _each(APART, "M->A{n_heads=2}"), ("random", "fit")),
    Case("F to E", ATTENTION, _each((1, 5), "F->E{n_experts=4}"), ("random", "fit", "upcycle", "upcycle+fit")),
    Case("A, F to parallel", ATTENTION, "0|1; 4|5", ("none",)),
    Case("A deleted", ATTENTION, "-0", ("none",)),
    Case("self-graft", ATTENTION, _each(APART, "A->A"), ("random", "fit")),
    Case("apart (2, 6)", ATTENTION, _each((2, 6), _TO_G), ("qkv+fit",)),
    Case("adjacent (0, 2)", ATTENTION, _each((0, 2), _TO_G), ("qkv+fit",)),
    Case("adjacent (4, 6)", ATTENTION, _each((4, 6), _TO_G), ("qkv+fit",)),
    Case("three of four", ATTENTION, _each((2, 4, 6), _TO_G), ("qkv+fit",)),
)
_ALONE = ("apart (2, 6)", "adjacent (0, 2)", "adjacent (4, 6)", "three of four")  # placements: in the tables alone


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large models and trainings are; tokens are of training."""

    d_model: int = 32
    seq_len: int = 128
    batch_size: int = 8
    base_tokens: int = 409_600
    fit_tokens: int = 16_384
    points: tuple[int, ...] = (4_096, 16_384, 32_768)  # of the training after the graft, those of the fit apart
    valid_tokens: int = 16_384
    base_lr: float = 0.006
    lr: float = 0.001  # after the graft, constant, so that points of one training compare
    seeds: int = 3


_TINY = Size(
    d_model=8, seq_len=16, batch_size=2, base_tokens=64, fit_tokens=32, points=(32, 64), valid_tokens=32, seeds=1
)


def run(config: BenchConfig) -> Result:
    """Train what is missing, until ``minutes`` are over, and state the shares recovered; draws them beside ``out``."""
    result = Result("grafting")
    if config.tiny:
        data = {"kind": "stdlib", "max_bytes": 100_000}
        with tempfile.TemporaryDirectory() as folder:
            rows = build(_TINY, Path(folder) / "rows.csv", Path(folder), CASES[:4], data, None)
    else:
        path = config.beside(".csv") or Path("runs/grafting/rows.csv")
        size = config.pick(Size(), Size(seeds=1), None)
        rows = build(size, path, Path("runs/grafting"), CASES, {"kind": "stdlib"}, config.minutes)
        result.files.append(str(path))
    result.tables.append(recovered_table(rows))
    result.tables.append(loss_table(rows))
    picture = config.beside(".png")
    if picture is not None:
        draw(rows, picture)
        result.files.append(str(picture))
    return result


def build(
    size: Size,
    path: Path,
    folder: Path,
    cases: Sequence[Case],
    data: Mapping[str, Any],
    minutes: float | None,
) -> list[dict[str, str]]:
    """Return the rows of all cases, training those that ``path`` lacks; seed by seed, so that each is a whole table."""
    from hybridnas.data import open_source, source_config

    source = open_source(source_config(data))
    rows = read_rows(path)
    known = {(row["case"], row["base"], row["init"], row["seed"]) for row in rows}
    started = time.monotonic()
    for seed, case in itertools.product(range(size.seeds), cases):
        for init in case.inits:
            if (case.name, case.base, init, str(seed)) in known:
                continue
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                say(f"stopped after {minutes:g} minutes; the same command goes on")
                return rows
            rows += _measured(size, folder, case, init, seed, source)
            write_rows(path, rows)
            say(f"seed {seed}: {case.name}, {init}: {float(rows[-1]['loss']):.4f} nats")
    return rows


def _measured(size: Size, folder: Path, case: Case, init: str, seed: int, source: Any) -> Iterator[dict[str, str]]:
    """Yield the rows of one graft: after its fit, and at each point of the training that follows."""
    import hybridnas
    from hybridnas.grafting.config import GraftConfig
    from hybridnas.grafting.operation import fine_tune, train_config, transplant

    shape: dict[str, Any] = {"batch_size": size.batch_size, "seq_len": size.seq_len, "valid_tokens": size.valid_tokens}
    arch = hybridnas.Arch.from_pattern(case.base, d_model=size.d_model, vocab_size=source.vocab_size, final_norm=True)
    if "A" in case.base:
        arch = arch.replace(A={"n_heads": 2})
    where = folder / f"{case.base.translate(str.maketrans('()', '__'))}-seed{seed}"
    base = hybridnas.fit(
        arch,
        source,
        folder=where,
        device="cpu",
        **{**shape, "tokens": size.base_tokens, "lr": size.base_lr, "seed": seed},
    ).model
    assert isinstance(base, hybridnas.HybridLM)
    base.eval()
    began = time.process_time()
    fitted = init.endswith("fit")
    spared = 0 if fitted else size.fit_tokens  # without a fit its tokens go to the training
    config = GraftConfig(
        init="random" if init == "none" else init,
        fit_tokens=size.fit_tokens,
        tokens=size.points[-1] + spared,
        seed=seed,
    )
    points = [point + spared for point in size.points]
    training = train_config(
        config,
        {
            **shape,
            "lr": size.lr,
            "schedule": "constant",
            "warmup_fraction": 0.02,
            "data_seed": 1000 + seed,
            "eval_at": points,
        },
        source,
    )
    found = transplant(base, case.edit or arch, source, config, training=training)
    loss, errors = found.record["loss"], [row["error"] for row in found.record["layers"] if "error" in row]
    measured = [(0, loss["start"])]
    measured += [(value.tokens, value.valid_loss) for value in fine_tune(found, base, source, config, training).evals]
    for point, (tokens, value) in enumerate(measured):
        yield {
            "case": case.name,
            "base": case.base,
            "edit": case.edit,
            "init": init,
            "seed": str(seed),
            "point": str(point),
            "tokens": str(tokens + (size.fit_tokens if fitted else 0)),
            "loss": f"{value:.6f}",
            "parent": f"{loss['parent']:.6f}",
            "fit_before": f"{statistics.mean(e[0] for e in errors):.4f}" if errors else "",
            "fit_after": f"{statistics.mean(e[1] for e in errors):.4f}" if errors else "",
            "cpu": f"{time.process_time() - began:.1f}",
        }


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file, none where it does not exist."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Write all rows, whole or not at all."""
    lines = [",".join(COLUMNS), *(",".join(_cell(row[name]) for name in COLUMNS) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def _cell(text: str) -> str:
    return f'"{text}"' if "," in text else text


def recovered(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, str, int], list[float]]:
    """Return (case, init, point) -> of each seed the share of the gap recovered.

    The gap: the loss with random new blocks before any training (of a case without new blocks: right after the edit)
    over the model's own; what is missing at a point: the loss over that of the model trained on with as many tokens.
    Of a case that was not started at random there is no gap, and no share.
    """
    at = {(row["case"], row["base"], row["init"], row["seed"], int(row["point"])): float(row["loss"]) for row in rows}
    parents = {(row["base"], row["seed"]): float(row["parent"]) for row in rows}
    found: dict[tuple[str, str, int], list[float]] = {}
    for (case, base, init, seed, point), loss in at.items():
        worst = at.get((case, base, "random", seed, 0), at.get((case, base, "none", seed, 0)))
        reached = at.get((TRAINED_ON, base, "none", seed, point))
        if worst is not None and reached is not None and case != TRAINED_ON:
            gap = worst - parents[base, seed]
            found.setdefault((case, init, point), []).append(1 - (loss - reached) / gap)
    return found


def recovered_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return the shares recovered, mean and extremes over seeds, a line for each start."""
    found = recovered(rows)
    points = sorted({point for *_, point in found})
    tokens = {int(row["point"]): row["tokens"] for row in rows if row["init"] != "none" and row["init"][-3:] == "fit"}
    lines = [
        [
            case,
            init,
            len(found[case, init, points[0]]),
            *(_spread(found.get((case, init, point), [])) for point in points),
        ]
        for case, init in dict.fromkeys((case, init) for case, init, _ in found)
    ]
    columns = (
        "graft",
        "start",
        "seeds",
        *(f"at {int(tokens.get(point, '0')):,} tokens" if point else "untrained" for point in points),
    )
    return Table("share of the gap recovered (mean, least to most over seeds)", columns, lines)


def loss_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return the mean losses over seeds."""
    lines = []
    for case, base, init in dict.fromkeys((row["case"], row["base"], row["init"]) for row in rows):
        own = [row for row in rows if (row["case"], row["base"], row["init"]) == (case, base, init)]
        points = sorted({row["point"] for row in own})
        losses = [statistics.mean(float(row["loss"]) for row in own if row["point"] == point) for point in points]
        parent = statistics.mean(float(row["parent"]) for row in own)
        errors = [float(row["fit_after"]) for row in own if row["fit_after"]]
        lines.append([case, base, init, parent, *losses, statistics.mean(errors) if errors else None])
    measured = max((len(line) for line in lines), default=5) - 5
    columns = ("graft", "model", "start", "model's loss", *(f"point {n}" for n in range(measured)), "error of the fit")
    return Table("validation losses [nats per token], means over seeds", columns, lines)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Draw the share recovered against tokens: a panel for each graft, a line for each start, ranges over seeds."""
    from matplotlib.figure import Figure

    found = recovered(rows)
    tokens = {(row["init"], int(row["point"])): int(row["tokens"]) for row in rows}
    panels = [case for case in dict.fromkeys(case for case, *_ in found) if case not in _ALONE]
    figure = Figure(figsize=(11, 1.5 + 2.3 * -(-len(panels) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 3), 3, squeeze=False, sharey=True).flatten()
    colors = {"random": "C7", "none": "C7", "fit": "C0"}
    for axis, case in zip(axes, panels, strict=False):
        for init in dict.fromkeys(init for name, init, _ in found if name == case):
            points = sorted(point for name, own, point in found if (name, own) == (case, init))
            x = [tokens[init, point] for point in points]
            shares = [found[case, init, point] for point in points]
            color = colors.get(init, "C2" if init.endswith("fit") else "C1")
            axis.plot(x, [statistics.mean(one) for one in shares], marker="o", ms=3, color=color, label=init)
            axis.fill_between(x, [min(s) for s in shares], [max(s) for s in shares], color=color, alpha=0.15, lw=0)
        axis.set_title(case, fontsize=10)
        axis.axhline(1, color="0.6", lw=0.8, ls=":")
        axis.legend(fontsize=7, frameon=False, loc="lower right")
        axis.set_xlabel("tokens, those of the fit among them", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[::3]:
        axis.set_ylabel("share recovered", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
