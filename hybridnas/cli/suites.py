"""``python -m hybridnas.evaluate suite=NAME`` and ``lengths=[...]``: what the suites measure, printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.errors import ConfigError, StudyError

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM
    from hybridnas.suites.runner import Outcome
    from hybridnas.suites.suite import Suite, SuiteConfig


def run_suite(config: dict[str, Any]) -> int:
    """Train and score what the suite asks for, print its table and draw its figure; 0 also when time was up first."""
    from hybridnas.suites.runner import Runner
    from hybridnas.suites.suite import SuiteConfig

    _refuse_unread(config)
    settings = SuiteConfig.from_dict(config["suite"])
    suite = settings.suite()
    folder = Path(settings.runs) / settings.folder_name
    out = Path(settings.out) if settings.out else folder / f"{folder.name}.csv"
    if settings.against:
        return _compare(suite, settings, out)
    fields = {**preset_sizes(config), **{k: v for k, v in (config.get("arch") or {}).items() if v is not None}}
    entries = suite.expanded(architectures(config), fields)
    runner = Runner(
        suite,
        entries,
        folder=folder,
        out=out,
        quick=settings.quick,
        device=config["device"],
        tracking=config["tracking"],
        minutes=settings.minutes,
        report=show.line,
    )
    show.line(
        f"suite {suite.name}: {suite.title}; tasks {len(suite.tasks)}, architectures {len(entries)}, "
        f"trainings {runner.total}; folder {folder}"
    )
    outcome = runner.run()
    print_suite(suite, outcome)
    if outcome.rows:
        from hybridnas.suites.plots import draw

        show.line(
            f"written: {out} and the files beside it, {', '.join(path.name for path in draw(suite, outcome, out))}"
        )
    if not outcome.done:
        show.line(f"time is up after {settings.minutes:g} minutes; the same command goes on")
    return 0


def _refuse_unread(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings that a suite decides itself."""
    given = [name for name in ("model", "lengths", "valid_tokens", "seq_len", "max_gib", "out") if config.get(name)]
    given += ["data"] if config["data"]["kind"] != "stdlib" else []
    if given:
        raise ConfigError(
            f"{given[0]}={config[given[0]]!r} does not go with suite={config['suite']['name']}, which brings its own "
            f"data and trains its own models; set suite.out= for the results, suite.tasks= for the data"
        )


def print_suite(suite: Suite, outcome: Outcome) -> None:
    """Print a suite's tables: ours beside the published rows."""
    from hybridnas.suites import results, speed

    rows, lengths = outcome.rows, outcome.lengths
    unit = "accuracy [%]" if suite.higher else "validation loss [nats per token]"
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


def _compare(suite: Suite, settings: SuiteConfig, out: Path) -> int:
    """Print how two versions of a suite rank the architectures that both have measured."""
    from hybridnas.suites import results

    other = settings.replace(quick=not settings.quick).suite()
    assert settings.against is not None
    tables = [
        results.scores(results.read_rows(path, version), version)
        for path, version in ((out, suite), (Path(settings.against), other))
    ]
    for path, found in zip((out, settings.against), tables, strict=True):
        if not found:
            raise StudyError(f"{path} has no finished column of suite {suite.name!r}; run both versions first")
    lines = [[c, str(n), "-" if rho is None else f"{rho:.3f}"] for c, n, rho in results.agreement(*tables)]
    show.table(f"Rank correlation of {out} and {settings.against}", ["column", "models", "Spearman"], lines)
    return 0


def preset_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that the user has given to preset=; what is as the preset has it is the suite's to choose."""
    from hybridnas.arch.presets import preset_arguments

    chosen = config.get("preset")
    if not chosen:
        return {}
    own = preset_arguments(chosen["name"])
    return {key: value for key, value in chosen.items() if key != "name" and value != own.get(key, chosen)}


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Return the patterns and presets that ``patterns=``, ``pattern=`` or ``preset=`` name; none: the suite's own."""
    many, one, preset = config.get("patterns") or [], config.get("pattern"), config.get("preset")
    if sum(map(bool, (many, one, preset))) > 1:
        raise ConfigError("give patterns=[...], pattern=TEXT or preset=NAME, not several of them")
    if preset:
        return [str(preset["name"])]
    return [str(one)] if one else listed(many)


def listed(text: str | Sequence[str]) -> list[str]:
    """Split '[Mx4, (ME)x2]' at commas that stand in no bracket; the brackets around the whole are the list's."""
    if not isinstance(text, str):
        return [str(item) for item in text]
    inner = text.strip()
    if inner.startswith("[") and inner.endswith("]"):
        inner = inner[1:-1]
    parts, depth = [""], 0
    for character in inner:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip().strip("'\"") for part in parts if part.strip()]


def run_lengths(config: dict[str, Any]) -> int:
    """Print accuracy at each of ``lengths``, in constant memory for recurrent blocks."""
    from hybridnas.suites import results
    from hybridnas.suites.lengths import at_lengths

    lengths = [_length(value) for value in config["lengths"]]
    if not config.get("model"):
        raise ConfigError("lengths=[...] needs model=FOLDER: an exported model, or the folder of a training run")
    folder = Path(config["model"])
    model = _model(folder)
    show.line(f"model: {model.arch.pattern}, d_model {model.arch.d_model}, fingerprint {model.arch.short}")
    rows = []
    limit = config["max_gib"]
    memory = None if limit is None else int(limit * 2**30)
    found = at_lengths(
        model, config["data"], lengths, device=config["device"], name=folder.name, seed=config["seed"], memory=memory
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
    if config.get("out"):
        results.write_rows(Path(config["out"]), rows)
        show.line(f"written: {config['out']}")
    return 0


def _model(folder: Path) -> HybridLM:
    """Load an exported model, or the newest weights of a training run; raises ExportError or CheckpointError."""
    from hybridnas.export.layout import home
    from hybridnas.export.load import load
    from hybridnas.train.checkpoint import load_model
    from hybridnas.train.records import RUN

    if (folder / RUN).is_file():
        return load_model(folder)
    return load(home(folder), device="cpu")


def _length(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"lengths has {value!r}, it must hold whole numbers of at least 1, e.g. lengths=[64,1024]")
    return value
