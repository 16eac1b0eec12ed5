"""``python -m hybridnas.ladder``: the same architectures at growing size, and the laws that they follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hybridnas.cli import show
from hybridnas.cli.command import Command, Done, group
from hybridnas.ladders.config import LadderConfig

if TYPE_CHECKING:
    from hybridnas.ladders.ladder import LadderResult


@dataclass(frozen=True, kw_only=True)
class Settings(LadderConfig, Command):
    """Settings of the command: those of a ladder, and its groups."""

    data: Mapping[str, Any] | None = group(None, "what is trained on; null: the study's data, or stdlib")
    budget: Mapping[str, Any] | None = group(None, "sizes and batch shape of size 1; null: the study's, or laptop")
    experiment: Mapping[str, Any] | None = group(None, "settings from a file")

    def ladder(self) -> LadderConfig:
        """Return the ladder without what is the command's own."""
        return LadderConfig(**{name: getattr(self, name) for name in LadderConfig.field_names()})


def run(settings: Settings) -> Done:
    """Train what is missing and print losses, laws and the order of each pair."""
    from hybridnas.cli.progress import progress
    from hybridnas.ladders.ladder import Ladder, found

    config = settings.ladder()
    ladder = Ladder(config)
    _print_sizes(ladder)
    result = ladder.run([progress()] if show.is_terminal() else [], report=show.line)
    _print_losses(result)
    _print_laws(result)
    for pair in result.verdict.pairs:
        show.line(pair.sentence())
    for text in (*result.verdict.notes, *(f"failed: {words}" for words in result.failed)):
        show.line(text)
    if not result.done:
        show.line(f"time is up after {config.minutes:g} minutes; the same command goes on" if config.minutes else
                  "some runs have not ended; the same command goes on")  # fmt: skip
    show.line(f"written: {', '.join(map(str, [*result.figures, result.folder / 'ladder.csv']))}")
    return Done({"ladder": config.title, "folder": str(result.folder), **found(result)})


def _print_sizes(ladder: Any) -> None:
    plan = ladder.plan
    rows = []
    for name, sizes in plan.archs.items():
        for factor, arch in sizes.items():
            how = plan.train_config(name, factor, 0, 1.0)
            rows.append(
                [
                    name,
                    f"{factor:g}",
                    f"{arch.cost().active_params:,}",
                    str(arch.d_model),
                    str(len(arch.pattern)),
                    f"{how.lr:.3g}",
                    str(how.batch_size),
                    f"{how.tokens:,}",
                ]
            )
    columns = ["architecture", "size", "active", "d_model", "depth", "rate", "batch", "tokens"]
    show.table("Sizes, and rate, batch and tokens by the laws", columns, rows)


def _print_losses(result: LadderResult) -> None:
    from hybridnas.ladders.rows import mean_losses

    means = mean_losses(result.rows)
    counts = {(row.size, row.tokens): row.tokens_per_param for row in result.rows}
    names = list(dict.fromkeys(row.model for row in result.rows))
    rows = [
        [f"{size:g}", f"{tokens:,}", f"{ratio:.3g}", *(_shown(means.get((name, size, tokens))) for name in names)]
        for (size, tokens), ratio in sorted(counts.items())
    ]
    if rows:
        title = "Validation loss of annealed models [nats per token], means over seeds"
        show.table(title, ["size", "tokens", "per active", *names], rows, left=())


def _print_laws(result: LadderResult) -> None:
    rows = []
    for model in result.verdict.models:
        if model.fit is None:
            show.line(f"{model.name}: no law: {model.why}")
            continue
        law = [_interval(model.fit.coefficient(name)) for name in ("E", "a", "b")]
        ahead = [_interval(loss) for _, _, _, loss in model.ahead]
        rows.append([model.name, *law, f"{model.fit.deviation:.2%}", *ahead])
    if rows:
        columns = ["architecture", "E", "a", "b", "deviation", "loss at 10x compute", "at 100x"]
        show.table("Laws L = E + A/N^a + B/D^b with 95 % intervals", columns, rows)
    for model in result.verdict.models:
        if model.why_untested and model.fit is not None:
            show.line(f"{model.name}: extrapolation not tested: {model.why_untested}")
        for one in model.held_out:
            inside = {True: ", inside the interval", False: ", outside the interval", None: ""}[one.inside]
            show.line(
                f"{model.name}: held-out size {one.size:g} at {one.tokens:,} tokens: predicted {one.predicted}, "
                f"measured {one.measured:.4f}, error {one.error:+.4f} nats{inside}"
            )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(found: Any) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})" if found.known else f"{found.value:.3f}"
