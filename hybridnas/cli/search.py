"""``python -m hybridnas.search``: search, report, export."""

from __future__ import annotations

from typing import Any

from hybridnas.cli import show
from hybridnas.errors import ConfigError

HELP = "search a space of architectures at matched active parameters"
SUMMARY_ROWS = 12


def run(config: dict[str, Any]) -> int:
    """Run the search that the settings describe; returns 0, also when Ctrl-C ended it early with its report."""
    from hybridnas.search.config import Budget, SearchConfig
    from hybridnas.search.runner import Search

    budget = Budget.from_dict(_limits(config))
    search = SearchConfig.from_dict(
        {
            "space": config["space"],
            "data": config["data"],
            "budget": budget,
            **{
                key: config[key]
                for key in ("study", "runs", "seed", "sampler", "pruner", "tracking", "device", "workers")
            },
            "progress": show.is_terminal(),
        }
    )
    summary = Search(search, show.line).run()
    _print(summary)
    return 0


def _limits(config: dict[str, Any]) -> dict[str, Any]:
    """Merge the command's own n_trials and minutes over the budget's."""
    if not isinstance(config.get("budget"), dict):
        raise ConfigError("search needs a budget, e.g. budget=laptop")
    own = {key: config[key] for key in ("n_trials", "minutes") if config.get(key) is not None}
    return {**config["budget"], **own}


def _print(summary: Any) -> None:
    from rich.console import Console

    from hybridnas.search.leaderboard import render_leaderboard

    render_leaderboard(summary.records, Console())
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
        show.line(f"winner: trial {best.number}, {best.pattern}, loss {best.valid_loss:.4f} (one seed: unconfirmed)")
    show.line(f"report: {summary.report}")
    if summary.exported is not None:
        show.line(f"model:  {summary.exported}   python -m hybridnas.generate model={summary.exported} prompt='def '")
