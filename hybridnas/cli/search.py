"""``python -m hybridnas.search``: search, report, export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.cli.compose import compose
from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    from hybridnas.search.config import SearchConfig

HELP = "search a space of architectures at matched active parameters"
SUMMARY_ROWS = 12


def run(config: dict[str, Any]) -> int:
    """Run the search that the settings describe; returns 0, also when Ctrl-C ended it early with its report."""
    if config["action"] != "run":
        return _status(config)
    search = search_config(config, progress=show.is_terminal())
    if config["launch"] != "local":
        return _launch(config, search)
    from hybridnas.search.runner import Search

    if search.worker == "join":
        from hybridnas.search.storage.join import joined

        search = joined(search, search_config(compose("search", [])))
    summary = Search(search, show.line).run()
    _print(summary)
    return 0


def _status(config: dict[str, Any]) -> int:
    """Print how a study stands; reads alone, also while it runs."""
    from hybridnas.report.status import lines, read_status

    if config["action"] != "status":
        raise ConfigError(f"search action={config['action']!r} must be run or status")
    name = search_config(config).name
    for text in lines(read_status(Path(config["runs"]), name, config["storage"], config["heartbeat"])):
        show.line(text)
    return 0


def _launch(config: dict[str, Any], search: SearchConfig) -> int:
    """Write the batch script, say how to submit it, and start nothing."""
    from hybridnas.search.workers.slurm import write_script

    if config["launch"] != "slurm" or not isinstance(config["nodes"], int):
        raise ConfigError("search launch= must be local or slurm, the latter with nodes=NUMBER")
    path, submit = write_script(search, _given(config), config["nodes"])
    show.line(f"wrote {path}; nothing runs yet. Read it, then submit it:")
    show.line(f"    {submit}")
    return 0


def _given(config: dict[str, Any]) -> list[str]:
    """Return the overrides that make these settings of the command's defaults, groups by their names first."""
    groups = []
    for group, key in (("space", "name"), ("data", "kind"), ("budget", "name")):
        try:
            compose("search", [f"{group}={config[group].get(key)}"])
        except ConfigError:  # settings of its own, under no group's name
            continue
        groups.append(f"{group}={config[group][key]}")
    usual = dict(_dotted(compose("search", groups)))
    own = [
        f"{key}={_spelled(value)}"
        for key, value in _dotted(config)
        if (key not in usual or usual[key] != value) and not (key.startswith("space.") and value is None)
    ]
    return groups + own


def _dotted(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _spelled(value: Any) -> str:
    """Write a value as the command line reads it."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_spelled, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {_spelled(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def search_config(config: dict[str, Any], *, progress: bool = False) -> SearchConfig:
    """Return the search that composed settings describe; raises ConfigError."""
    from hybridnas.search.config import Budget, SearchConfig

    budget = Budget.from_dict(_limits(config))
    own = {key: config[key] for key in SearchConfig.field_names() if key in config}
    own["worker"] = {False: "off", True: "join"}.get(config["worker"], config["worker"])
    return SearchConfig.from_dict({**own, "budget": budget, "progress": progress})


def _limits(config: dict[str, Any]) -> dict[str, Any]:
    """Merge the command's own n_trials, minutes and confirmation over the budget's."""
    if not isinstance(config.get("budget"), dict):
        raise ConfigError("search needs a budget, e.g. budget=laptop")
    names = ("n_trials", "minutes", "confirm", "confirm_top", "confirm_seeds")
    own = {key: config[key] for key in names if config.get(key) is not None}
    return {**config["budget"], **own}


def _print(summary: Any) -> None:
    from rich.console import Console

    from hybridnas.report.leaderboard import render_leaderboard

    render_leaderboard(summary.records, summary.reference, Console())
    ended = {
        "completed": "all trials are finished",
        "time": "the budget's minutes are used",
        "tokens": "the budget's max_tokens are trained",
        "exhausted": "the space has no further architecture to try",
        "interrupted": "stopped early; the same command goes on from here",
    }[summary.ended]
    show.line(f"{ended}, {summary.seconds:.0f} s")
    if summary.best is None:
        show.line("no trial was trained to the end, so there is no winner yet")
    else:
        best = summary.best
        sure = f"confirmed by {len(best.confirmed)} fresh seeds" if best.confirmed else "one seed: unconfirmed"
        show.line(f"winner: trial {best.number}, {best.pattern}, loss {best.valid_loss:.4f} ({sure})")
    if summary.report is None:
        show.line("other workers go on; the last one to end writes the report, or the search's own command does")
        return
    show.line(f"report: {summary.report}")
    if summary.exported is not None:
        show.line(f"model:  {summary.exported}   python -m hybridnas.generate model={summary.exported} prompt='def '")
