"""``python -m hybridnas.evaluate suite=NAME`` and ``lengths=[...]``: what the suites measure, printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.cli.command import Done
from hybridnas.cli.wanted import model_folder
from hybridnas.errors import ConfigError, StudyError
from hybridnas.units import duration

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM
    from hybridnas.cli.evaluate import Settings
    from hybridnas.suites.runner import Outcome
    from hybridnas.suites.suite import Suite, SuiteConfig


QUICK_MINUTES = 2.0  # of quick=true, where neither minutes= nor tokens= nor an experiment says how long


def run_suite(given: Settings) -> Done:
    """Train and score what the suite asks for, print its table and draw its figure; also when time was up first."""
    from dataclasses import asdict

    from hybridnas.suites.forecast import expected_seconds
    from hybridnas.suites.runner import Runner
    from hybridnas.suites.suite import SuiteConfig

    _refuse_unread(given)
    assert given.suite is not None
    settings = SuiteConfig.from_dict(given.suite)
    suite = settings.suite()
    folder = settings.runs / settings.folder_name
    out = settings.out or folder / f"{folder.name}.csv"
    if settings.against:
        return _compare(suite, settings, out)
    fields = {**preset_sizes(given), **{k: v for k, v in given.arch.items() if v is not None}}
    entries = suite.expanded(architectures(given), fields)
    minutes = settings.minutes
    if settings.quick and minutes is None and settings.tokens is None and given.experiment is None:
        minutes = QUICK_MINUTES
    runner = Runner(
        suite,
        entries,
        folder=folder,
        out=out,
        quick=settings.quick,
        device=given.device,
        tracking=given.tracking,
        minutes=minutes,
        report=show.line,
    )
    show.line(
        f"suite {suite.name}: {suite.title}; tasks {len(suite.tasks)}, architectures {len(entries)}, "
        f"trainings {runner.total}; folder {folder}"
    )
    if any(runner.planned()):
        show.line(_forecast(expected_seconds(runner), minutes, suite))
    outcome = runner.run()
    print_suite(suite, outcome)
    figures = []
    if outcome.rows:
        from hybridnas.suites.plots import draw

        figures = draw(suite, outcome, out)
        show.line(f"written: {out} and the files beside it, {', '.join(path.name for path in figures)}")
    if not outcome.done:
        show.line(f"time is up after {minutes:g} minutes; the same command goes on")
    found = {"suite": suite.name, "done": outcome.done, "folder": str(folder), "out": str(out)}
    rows = [asdict(row) for row in outcome.rows]
    return Done({**found, "rows": rows, "lengths": [asdict(row) for row in outcome.lengths], "figures": figures})


def _forecast(seconds: float, minutes: float | None, suite: Suite) -> str:
    """Say how long all will take, and when this call ends before that."""
    most = "at most " if suite.stop_at is not None else ""
    text = f"time: {most}about {duration(seconds)} for all that is missing, by a few steps of training"
    if minutes is not None and seconds > 60 * minutes:
        text += f"; this call ends after {minutes:g} min, the same command goes on, suite.minutes=N gives it longer"
    return text


def _refuse_unread(given: Settings) -> None:
    """Raise ConfigError for settings that a suite decides itself."""
    assert given.suite is not None
    unread = [
        name for name in ("model", "lengths", "valid_tokens", "seq_len", "max_gib", "out") if getattr(given, name)
    ]
    unread += ["data"] if given.data["kind"] != "stdlib" else []
    if unread:
        raise ConfigError(
            f"{unread[0]}= does not go with suite={given.suite['name']}, which brings its own data and trains its own "
            f"models; set suite.out= for the results, suite.tasks= for the data",
            field=unread[0],
            got=getattr(given, unread[0]),
        )


def print_suite(suite: Suite, outcome: Outcome) -> None:
    """Print a suite's tables: ours beside the published rows."""
    from hybridnas.suites import results, speed

    rows, lengths = outcome.rows, outcome.lengths
    unit = "accuracy [%]" if suite.higher else f"validation loss [{results.unit(suite)}]"
    if rows:
        columns, lines = results.table(rows, suite)
        if not lengths:
            show.table(f"{suite.title}: {unit}", columns, lines, left=(0, len(columns) - 1))
    if lengths:
        columns, lines = results.length_table(lengths, suite)
        show.table(f"{suite.title}: accuracy [%] by length", columns, lines, left=(0, len(columns) - 1))
    if suite.baseline:
        columns, lines = speed.table(rows, outcome.curves, suite)
        show.table(f"Steps to {suite.baseline}'s final loss", columns, lines)
    for note in suite.notes:
        show.line(note)


def _compare(suite: Suite, settings: SuiteConfig, out: Path) -> Done:
    """Print how two versions of a suite rank the architectures that both have measured."""
    from hybridnas.suites import results

    other = settings.replace(quick=not settings.quick).suite()
    assert settings.against is not None
    tables = [
        results.scores(results.read_rows(path, version), version)
        for path, version in ((out, suite), (settings.against, other))
    ]
    for path, found in zip((out, settings.against), tables, strict=True):
        if not found:
            raise StudyError(f"{path} has no finished column of suite {suite.name!r}; run both versions first")
    agreement = results.agreement(*tables)
    lines = [[c, str(n), "-" if rho is None else f"{rho:.3f}"] for c, n, rho in agreement]
    show.table(f"Rank correlation of {out} and {settings.against}", ["column", "models", "Spearman"], lines)
    correlations = [{"column": c, "models": n, "spearman": rho} for c, n, rho in agreement]
    return Done({"suite": suite.name, "out": str(out), "against": str(settings.against), "correlations": correlations})


def preset_sizes(given: Settings) -> dict[str, Any]:
    """Return the sizes that the user has given to preset=; the others are the suite's to choose."""
    return {key: value for key, value in (given.preset or {}).items() if key != "name" and value is not None}


def architectures(given: Settings) -> list[str]:
    """Return the patterns and presets that ``patterns=``, ``pattern=`` or ``preset=`` name; none: the suite's own."""
    if sum(map(bool, (given.patterns, given.pattern, given.preset))) > 1:
        raise ConfigError("give patterns=[...], pattern=TEXT or preset=NAME, not several of them", field="patterns")
    if given.preset:
        return [str(given.preset["name"])]
    return [given.pattern] if given.pattern else list(given.patterns)


def run_lengths(given: Settings) -> Done:
    """Print accuracy at each of ``lengths``, in constant memory for recurrent blocks."""
    from dataclasses import asdict

    from hybridnas.suites import results
    from hybridnas.suites.lengths import at_lengths

    if given.model is None:
        raise ConfigError(
            "lengths=[...] needs model=FOLDER: an exported model, or the folder of a training run", field="model"
        )
    model = _model(given.model)
    show.line(f"model: {model.arch.pattern}, d_model {model.arch.d_model}, fingerprint {model.arch.short}")
    rows = []
    memory = None if given.max_gib is None else int(given.max_gib * 2**30)
    found = at_lengths(
        model,
        given.data,
        given.lengths,
        device=given.device,
        name=given.model.name,
        seed=given.seed,
        memory=memory,
    )
    for row in found:
        rows.append(row)
        show.line(f"{row.length:>9,}: {results.length_words(row)}")
    columns = ["length", "accuracy [%]", "examples", "state [bytes]", "peak memory [bytes]", "seconds"]
    lines = [
        [f"{r.length:,}", results.length_words(r), f"{r.examples:,}", f"{r.state_bytes:,}", f"{r.peak_bytes:,}",
         f"{r.seconds:.1f}"]
        for r in rows
    ]  # fmt: skip
    show.table("Accuracy by length", columns, lines, left=(1,))
    if given.out is not None:
        results.write_rows(given.out, rows)
        show.line(f"written: {given.out}")
    return Done({"lengths": [asdict(row) for row in rows], "out": given.out})


def _model(folder: Path) -> HybridLM:
    """Load an exported model, or the newest weights of a training run; raises ExportError or CheckpointError."""
    from hybridnas.export.load import load
    from hybridnas.train.checkpoint import load_model
    from hybridnas.train.records import RUN

    if (folder / RUN).is_file():
        return load_model(folder)
    return load(model_folder(folder), device="cpu")
