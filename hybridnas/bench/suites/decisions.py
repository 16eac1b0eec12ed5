"""How often a budget decides rightly: every policy against the truth set, the default chosen on one half of it.

Writes ``decisions.json`` and a figure beside the truth set's rows, and works on a part of it, which it states.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from hybridnas.analysis import decisions
from hybridnas.analysis.decisions import ANNEALED, COSINE, HALVED, OWN, Rows, StepShare, Truth
from hybridnas.analysis.shapes import Shape, play
from hybridnas.bench.context import BenchConfig, provenance
from hybridnas.bench.result import Result, Table
from hybridnas.draw.figure import FAINT, INK, SETTINGS, save
from hybridnas.errors import StudyError
from hybridnas.files import write_json
from hybridnas.study.truth import CHOOSING, HALVES, RATES, RECALL, REPORTING, RUNGS, TEXT, TruthRow, read_truth

LIMIT = 1 / 8  # compute of the default policy at most, as a part of the truth's
BEFORE = "0.012"  # the rate for all, in one cosine, by which searches compared before this was measured
DATA_DECIDE = 0.8  # pairs that small trainings decide rightly between data sets (arXiv 2504.11393)
_MAMBA, _MOE_MAMBA = "Mx4", "MEME"
SHAPES = {  # of searches, of which the last is the default's: budget=laptop
    "the best by one seed": Shape(),
    "the best two confirmed": Shape(top=2, seeds=3),
    "one more seed for five, the best two confirmed": Shape(screen=5, top=2, seeds=2),
    "one more seed for six, the best two confirmed": Shape(screen=6, top=2, seeds=2),
}
_COLORS = {ANNEALED: "#2F6DA8", "trunk": "#5B8C3A", COSINE: "#C8553D", "training speed": "#7B519D"}
_OTHER_COLOR = "#D08A1D"
_MARKS = {OWN: "o", HALVED: "s"}


def run(config: BenchConfig) -> Result:
    """Judge all policies; returns the tables, and files beside the truth set."""
    result = Result("decisions")
    try:
        read = simulated(16) if config.tiny else read_truth(config.truth)
        rows = Rows(read)
        truth = rows.truth()
    except StudyError as error:
        if config.suite != "all":
            raise
        result.notes.append(f"not run: {error}")
        return result
    signals = {} if config.tiny else _signals(truth, rows, read)
    body = measure(rows, truth, signals, draws=config.pick(1000, 200, 20))
    result.tables += tables(body)
    if not config.tiny:
        facts = provenance(sys.argv[1:], config.threads)
        kept = {name: facts[name] for name in ("command", "commit", "changed_since_commit", "versions")}
        target = config.truth.with_name("decisions.json")
        write_json(target, {**kept, **body})
        result.files += [str(target), *map(str, draw(body, target.with_suffix(".svg")))]
    return result


def measure(
    rows: Rows, truth: Truth, signals: Mapping[str, Mapping[str, float]], *, draws: int = 1000
) -> dict[str, Any]:
    """Return all that is known about policies, as plain values.

    ``policies`` are judged on both halves together, those that nine tenths of the architectures have; ``default`` was
    chosen on the choosing half and ``reporting`` is its quality on the other. ``signals``: name -> pattern -> value, of
    which more should be better.
    """
    wanted = [policy for policy in decisions.policies(rows) if policy.size <= truth.size]
    both = [judged for policy in wanted if (judged := decisions.judge(rows, policy, truth, draws=draws))]
    both = [judged for judged in both if judged.quality.n > 0.9 * len(truth.scores)]
    choosing = [j for policy in wanted if (j := decisions.judge(rows, policy, truth, CHOOSING, draws=2))]
    chosen = decisions.choose(choosing, LIMIT)
    report = None if chosen is None else decisions.judge(rows, chosen.policy, truth, REPORTING, draws=draws)
    former = [p for p in wanted if (p.signal, p.rate, p.rung) == (COSINE, BEFORE, 0.25) and p.size < truth.size]
    olds = [j for policy in former if (j := decisions.judge(rows, policy, truth, REPORTING, draws=draws))]
    trainings = [row for row in rows.all if row.size == truth.size]
    whole = fmean(row.tokens / row.size for row in trainings)
    count = {half: sum(one == half for one in truth.halves.values()) for half in HALVES}
    shares = [decisions.step_share(rows, size, _MOE_MAMBA, _MAMBA) for size in rows.sizes]
    return {
        "truth": {
            **{"size": truth.size, "tokens_per_active_param": whole, "architectures": count},
            **{"seeds": sorted(truth.seeds.values()), "core_hours": sum(row.cpu_seconds for row in trainings) / 3600},
            "trainings": {str(size): sum(row.size == size for row in rows.all) for size in rows.sizes},
        },
        "default": None if chosen is None else chosen.to_dict(),
        "reporting": None if report is None else report.to_dict(),
        "before": olds[-1].to_dict() if olds else None,  # at the largest size
        "policies": [judged.to_dict() for judged in both],
        "signals": [
            {"signal": name, **_signal_quality(values, truth, draws).to_dict()} for name, values in signals.items()
        ],
        "searches": _searches(rows, truth, draws),
        "headline": [_share_dict(one) for one in shares if one is not None],
    }


def _searches(rows: Rows, truth: Truth, draws: int) -> list[dict[str, Any]]:
    """Return what searches of every shape hand over, by half; those are left out for which trainings are missing."""
    found = []
    for name, shape in SHAPES.items():
        of = {half: [pattern for pattern, own in truth.halves.items() if own == half] for half in HALVES}
        played = {half: play(rows, truth, shape, patterns, draws=draws) for half, patterns in of.items()}
        whole = {half: one.to_dict() for half, one in played.items() if one is not None}
        if len(whole) == len(HALVES):
            found.append({"search": name, **whole})
    return found


def _signal_quality(values: Mapping[str, float], truth: Truth, draws: int) -> decisions.Quality:
    return decisions.quality([-values[p] for p in truth.scores], list(truth.scores.values()), draws=draws)


def _share_dict(one: StepShare) -> dict[str, Any]:
    return {**vars(one), "interval": None if one.interval is None else list(one.interval)}


def _signals(truth: Truth, rows: Rows, read: Sequence[TruthRow]) -> dict[str, dict[str, float]]:
    """Return costs at the truth's size, proxies at initialization, and recall where it was measured."""
    from hybridnas.data import open_source, source_config
    from hybridnas.tabular.proxies import proxies
    from hybridnas.tabular.truth import SIZES, sized

    one = {pattern: next(iter(rows.at(pattern, truth.size).values())) for pattern in truth.scores}
    found = {
        "parameters": {pattern: float(row.params) for pattern, row in one.items()},
        "state bytes": {pattern: float(row.state_bytes) for pattern, row in one.items()},
        "FLOPs per token": {pattern: row.flops_per_token for pattern, row in one.items()},
    }
    source = open_source(source_config({"kind": "stdlib"}))
    size = next(size for size in SIZES if size.active_params == truth.size)
    for pattern in truth.scores:
        for name, value in proxies(sized(pattern, size, source.vocab_size), source).items():
            found.setdefault(name, {})[pattern] = value
    recall: dict[str, dict[str, float]] = {}
    for active in (active for active in rows.sizes if active <= truth.size):
        for pattern in truth.scores:
            runs = rows.at_best_rate(pattern, active).values()
            known = [row.test_repeat_accuracy for row in runs if row.test_repeat_accuracy is not None]
            if known:
                recall.setdefault(f"recall on text at {active:,}", {})[pattern] = fmean(known)
    for row in read:
        if row.task == RECALL and not row.failed and row.size <= truth.size:
            recall.setdefault(f"in-context recall at {row.size:,}", {})[row.pattern] = row.accuracies[1.0]
    return found | {name: values for name, values in recall.items() if set(truth.scores) <= set(values)}


def tables(body: Mapping[str, Any]) -> list[Table]:
    """Return the default beside what was done before, the policies by compute, the signals and the headline."""
    columns = (
        "signal",
        "size",
        "rate",
        "first",
        "rung",
        "seeds",
        "compute",
        "n",
        "all pairs",
        "best half",
        "regret [nats]",
    )
    named = [("default", body["default"]), ("its reporting half", body["reporting"]), ("before", body["before"])]
    found = [
        Table(
            f"decisions: agreement with {body['truth']['size']:,} active parameters at own best rates",
            ("what", *columns),
            [[name, *_line(one)] for name, one in named if one is not None],
        ),
        Table("decisions: policies, on both halves", columns, [_line(one) for one in _efficient(body["policies"])]),
    ]
    if body["signals"]:
        lines = [
            [one["signal"], one["n"], _share(one, "accuracy"), _share(one, "accuracy_best_half"), one["regret"]]
            for one in body["signals"]
        ]
        found.append(Table("decisions: signals without training", ("signal", *columns[7:]), lines))
    lines = [
        [one["search"], half, *(one[half][name] for name in ("n", "pool", "compute_fraction", "found", "regret"))]
        for one in body["searches"]
        for half in HALVES
    ]
    handed = ("search", "half", "architectures", "drawn", "compute", "best found", "regret [nats]")
    found.append(Table("decisions: what a search hands over", handed, lines))
    lines = [
        [one["size"], one["seeds"], one["gap"], share_words(one["share"], one["interval"])] for one in body["headline"]
    ]
    head = ("size", "seeds", "loss of Mamba minus MoE-Mamba [nats]", "share of Mamba's steps")
    return [*found, Table("MoE-Mamba beside Mamba, each at its own best rate", head, lines)]


def _efficient(policies: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the policies that no cheaper one beats in pairs decided rightly, by compute."""
    kept: list[Mapping[str, Any]] = []
    for one in sorted(policies, key=lambda one: (one["compute_fraction"], -one["accuracy"])):
        if not one["shares_trainings"] and (not kept or one["accuracy"] > kept[-1]["accuracy"]):
            kept.append(one)
    return kept


def _line(one: Mapping[str, Any]) -> list[Any]:
    shares = [_share(one, "accuracy"), _share(one, "accuracy_best_half")]
    known = [one[name] for name in ("signal", "size", "rate", "first", "rung", "seeds", "compute_fraction", "n")]
    return [*(value or "" for value in known), *shares, one["regret"]]


def _share(one: Mapping[str, Any], name: str) -> str:
    if one[name] is None:
        return ""
    low, high = one.get(f"{name}_interval", (math.nan, math.nan))
    return f"{100 * one[name]:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def share_words(share: float | None, interval: Sequence[float] | None) -> str:
    """Return a share of steps in percent with its interval, or that the loss was not reached."""
    if share is None:
        return "not reached"
    return f"{100 * share:.0f} %" + (
        "" if interval is None else f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"
    )


def draw(body: Mapping[str, Any], path: Path) -> list[Path]:
    """Draw accuracy over compute, all pairs and the best half, as SVG and PNG; returns the files."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 2, sharey=True)
        for panel, name, words in zip(
            panels, ("accuracy", "accuracy_best_half"), ("all pairs", "pairs within the better half"), strict=True
        ):
            for one in body["policies"]:
                if one["shares_trainings"] or one[name] is None:
                    continue
                panel.scatter(
                    one["compute_fraction"],
                    one[name],
                    s=12 + 14 * RUNGS.index(one["rung"]),
                    color=_COLORS.get(one["signal"], _OTHER_COLOR),
                    marker=_MARKS.get(one["rate"], "x"),
                    alpha=0.75,
                    linewidths=1,
                )
            if body["reporting"] is not None and body["reporting"][name] is not None:
                one = body["reporting"]
                low, high = one.get(f"{name}_interval", (one[name], one[name]))
                panel.errorbar(
                    one["compute_fraction"],
                    one[name],
                    yerr=[[max(0.0, one[name] - low)], [max(0.0, high - one[name])]],
                    fmt="*",
                    color=INK,
                    markersize=13,
                    capsize=3,
                )
            panel.axhline(DATA_DECIDE, color=FAINT, linestyle="--", linewidth=1)
            panel.axhline(0.5, color=FAINT, linestyle=":", linewidth=1)
            panel.axvline(LIMIT, color=FAINT, linestyle=":", linewidth=1)
            panel.set_xscale("log")
            panel.set_xlabel("compute, as a part of the truth's")
            panel.set_title(words, loc="left")
        panels[0].set_ylabel("share decided as by the truth")
        for signal in dict.fromkeys(one["signal"] for one in body["policies"]):
            panels[1].scatter([], [], color=_COLORS.get(signal, _OTHER_COLOR), label=signal, s=30)
        for mark, words in (("o", "own best rate"), ("s", "own rate, halved"), ("x", "one rate for all")):
            panels[1].scatter([], [], color=INK, marker=mark, label=words, s=30)
        panels[1].scatter([], [], color=INK, marker="*", s=110, label="default, reporting half")
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right upper")
        return save(figure, path)


def simulated(
    architectures: int = 24, *, sizes: Sequence[int] = (1000, 8000), noise: float = 0.0, seeds: int = 2, seed: int = 0
) -> list[TruthRow]:
    """Return the rows of a truth set that was never trained, whose architectures differ by a known amount.

    Architecture ``i`` has the loss ``2 + 0.01 i`` at the end and ``0.5 / rung`` times 0.1 more at a rung, at its best
    rate; at others 0.1 more. ``noise``: standard deviation of what is added to every score [nats].
    """
    draws = random.Random(seed)
    found = []
    for size in sizes:
        for i in range(architectures):
            best = RATES[i % len(RATES)]
            for schedule, rates in (("wsd", RATES), (COSINE, RATES[:1])):
                for rate in rates:
                    for one in range(seeds if rate == best and schedule == "wsd" else 1):
                        off = 2 + 0.01 * i + (0.1 if rate != best else 0.0)

                        def at(rung: float, off: float = off) -> float:
                            return off + 0.05 * (1 / rung - 1) + draws.gauss(0, noise)

                        tokens = 100 * size
                        losses = {rung: at(rung) for rung in RUNGS}
                        found.append(
                            TruthRow(
                                pattern=f"architecture {i}",
                                fingerprint=f"{i}-{size}",
                                half=HALVES[i // 2 % 2],
                                size=size,
                                d_model=8,
                                active_params=size,
                                params=size,
                                embedding_params=0,
                                flops_per_token=2.0 * size,
                                state_bytes=0,
                                task=TEXT,
                                schedule=schedule,
                                rate=rate,
                                seed=one,
                                tokens=tokens,
                                losses=losses,
                                accuracies=dict.fromkeys(RUNGS, 0.5),
                                trunk={rung: at(rung) + 0.1 for rung in RUNGS} if schedule == "wsd" else {},
                                curve=tuple((round(0.85 * rung * tokens), at(rung), at(rung)) for rung in RUNGS),
                                test_loss=at(1.0),
                                trained_tokens=round(1.13 * tokens) if schedule == "wsd" else tokens,
                                tokens_per_second=1.0,
                                cpu_seconds=1.0,
                            )
                        )
    return found
