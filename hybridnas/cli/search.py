"""``python -m hybridnas.search``: search, report, export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hybridnas.cli import show
from hybridnas.cli.command import Command, Done, group, shorthand
from hybridnas.cli.wanted import generate_command
from hybridnas.config import option
from hybridnas.search.config import Budget, SearchConfig
from hybridnas.search.workers.kubernetes import Pod, write_manifest
from hybridnas.units import several

LIMITS = (  # of the budget, also without its prefix
    *("n_trials", "minutes", "confirm", "confirm_top", "confirm_screen", "confirm_rates", "confirm_seeds"),
    *("verdict_seeds", "alpha"),
)


@dataclass(frozen=True, kw_only=True)
class Settings(SearchConfig, Pod, Command):
    """Settings of the command: those of a search, its groups, and how it is launched."""

    space: Mapping[str, Any] = group("mamba_moe", "what is searched")
    data: Mapping[str, Any] = group("stdlib", "what every candidate is trained on")
    budget: Budget = group("laptop", "how large the models are, how long each is trained, when the search ends")
    experiment: Mapping[str, Any] | None = group(None, "settings from a file")
    n_trials: int | None = shorthand(Budget, "n_trials")
    minutes: float | None = shorthand(Budget, "minutes")
    confirm: str | None = shorthand(Budget, "confirm")
    confirm_top: int | None = shorthand(Budget, "confirm_top")
    confirm_screen: int | None = shorthand(Budget, "confirm_screen")
    confirm_rates: str | None = shorthand(Budget, "confirm_rates")
    confirm_seeds: int | None = shorthand(Budget, "confirm_seeds")
    verdict_seeds: int | None = shorthand(Budget, "verdict_seeds")
    alpha: float | None = shorthand(Budget, "alpha")
    launch: str = option(
        "local",
        "slurm: write a batch script for workers on several nodes, start nothing; k8s: a manifest of a Kubernetes Job",
        choices=("local", "slurm", "k8s"),
    )
    nodes: int = option(1, "with launch=slurm or k8s: nodes or pods, one worker on each [count]", ge=1)
    action: str = option("run", "status: how the study stands, also while it runs", choices=("run", "status"))

    def search(self) -> SearchConfig:
        """Return the search, with the command's own limits over the budget's."""
        limits = {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}
        own = {name: getattr(self, name) for name in SearchConfig.field_names()}
        return SearchConfig(**{**own, "budget": self.budget.replace(**limits)})


def search_config(values: Mapping[str, Any]) -> SearchConfig:
    """Return the search that composed settings describe; raises ConfigError."""
    return Settings.from_dict(values).search()


def run(settings: Settings) -> Done:
    """Run the search that the settings describe; code 0 also when Ctrl-C ended it early with its report."""
    search = settings.search()
    if settings.action == "status":
        return _status(search)
    if settings.launch != "local":
        return _launch(settings, search)
    from hybridnas.report.callbacks import ConsoleLines
    from hybridnas.studies import Study

    if search.worker == "join":
        from hybridnas.cli.compose import compose
        from hybridnas.search.storage.join import joined

        search = joined(search, search_config(compose("search", [])))
    if show.is_terminal():
        from hybridnas.cli.progress import SearchProgress

        bars = SearchProgress()
        return _print(Study.of(search).run([bars], training=[bars.training]), search)
    return _print(Study.of(search).run([ConsoleLines(show.line)]), search)


def _status(search: SearchConfig) -> Done:
    """Print how a study stands, also while it runs; reads records alone, and MLflow's places of files are set right."""
    from hybridnas.report.status import lines, read_status
    from hybridnas.tracking.mlflow import rehome

    rehome(Path(search.runs).expanduser() / search.name)
    status = read_status(Path(search.runs), search.name, search.storage, search.heartbeat)
    for text in lines(status):
        show.line(text)
    found = {"study": status.study, "finished": status.finished, "n_trials": status.n_trials}
    running = [asdict(trial) for trial in status.running]
    states = dict(status.states)
    return Done({**found, "states": states, "running": running, "seconds_left": status.seconds_left})


def _launch(settings: Settings, search: SearchConfig) -> Done:
    """Write the batch script or the manifest, say how to submit it, and start nothing."""
    from hybridnas.cli.compose import command_line
    from hybridnas.search.workers.slurm import write_script

    given = command_line("search", settings)
    if settings.launch == "k8s":
        pod = Pod(**{name: getattr(settings, name) for name in Pod.field_names()})
        path, submit = write_manifest(search, given, settings.nodes, pod)
    else:
        path, submit = write_script(search, given, settings.nodes)
    show.line(f"wrote {path}; nothing runs yet. Read it, then submit it:")
    show.line(f"    {submit}")
    return Done({"script": str(path), "submit": submit})


def _print(summary: Any, search: SearchConfig) -> Done:
    from rich.console import Console

    from hybridnas.analysis.confirmation import confirmed_winner
    from hybridnas.analysis.limits import limits_report, sentences
    from hybridnas.report.leaderboard import render_leaderboard
    from hybridnas.report.report import conclusion
    from hybridnas.study.records import COMPLETE, INFEASIBLE

    render_leaderboard(summary.records, summary.reference, Console())
    ended = {
        "completed": "all trials are finished",
        "time": "the budget's minutes are used",
        "tokens": "the budget's max_tokens are trained",
        "exhausted": "there is no further architecture to try",
        "interrupted": "stopped early; the same command goes on from here",
    }[summary.ended]
    show.line(f"{ended}, {summary.seconds:.0f} s")
    trained = [record for record in summary.records if record.state != INFEASIBLE]
    if summary.ended == "time" and trained and all(record.preset for record in trained):
        show.text("the presets alone used them, and no candidate of the space was drawn; give more with minutes=N")
    found = limits_report(summary.records, search.limits, search.state_length)
    for sentence in sentences(found):
        show.text(sentence)
    said = [] if summary.meta is None else conclusion(summary.folder, summary.records, summary.meta)
    if summary.best is None:
        if not any(record.state == COMPLETE for record in summary.records):
            show.line("no trial was trained to the end, so there is no winner yet")
    else:
        best = summary.best
        sure = "one seed: unconfirmed"
        if confirmed_winner(summary.records) is not None:
            sure = f"confirmed by {several(len(best.confirmed), 'fresh seed')}"
        test = "" if best.test_loss is None else f", test loss {best.test_loss:.4f}"
        name = best.pattern if best.preset is None else f"{best.preset} {best.pattern}"
        show.text(f"winner: trial {best.number}, {name}, loss {best.valid_loss:.4f}{test} ({sure})")
        for sentence in said:
            show.text(sentence)
    if summary.report is None:
        show.text("other workers go on; the last one to end writes the report, or the search's own command does")
    else:
        show.line(f"report: {summary.report}")
        if summary.exported is not None:
            show.line(f"model:  {summary.exported}   {generate_command(Path(summary.exported))}".rstrip())
    return Done({**_found(summary, search), "conclusion": said})


def _found(summary: Any, search: SearchConfig) -> dict[str, Any]:
    best = summary.best
    trial = None
    if best is not None:
        from hybridnas.study.records import SEED_RESULTS, TEST_FIGURES

        known = ("number", "preset", "pattern", "fingerprint", "choices", "cost", "tokens", "valid_loss", "accuracy")
        more = ("bits_per_byte", *TEST_FIGURES, "objectives", *SEED_RESULTS)
        trial = {name: getattr(best, name) for name in (*known, *more)}
    return {
        "study": search.name,
        "folder": str(summary.folder),
        "ended": summary.ended,
        "seconds": summary.seconds,
        "trials": len(summary.records),
        "best": trial,
        "report": summary.report,
        "model": summary.exported,
    }
