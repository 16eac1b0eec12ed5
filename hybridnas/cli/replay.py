"""``python -m hybridnas.replay``: the same trial again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hybridnas.cli import show
from hybridnas.cli.command import DEVICE, Command, Done
from hybridnas.cli.wanted import study_folder
from hybridnas.config import option
from hybridnas.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    study: str | None = option(None, "name of the study, or its folder")
    trial: int | None = option(None, "number of the trial", ge=0)
    runs: Path = option(Path("runs"), "folder in which studies lie")
    out: Path | None = option(None, "folder of the rerun; none: RUNS/STUDY/replays/NUMBER")
    device: str = option("auto", DEVICE)

    @classmethod
    def label(cls) -> str:
        return "replay"


def run(settings: Settings) -> Done:
    """Replay one trial and print recorded and new losses; exit code 1 when they differ."""
    if settings.study is None or settings.trial is None:
        missing = "study" if settings.study is None else "trial"
        raise ConfigError("replay needs study=NAME and trial=NUMBER", field=missing, allowed="a study and a trial")
    from hybridnas.cli.progress import progress
    from hybridnas.plugins import load_files
    from hybridnas.search.replay import replay
    from hybridnas.study.folder import read_study

    folder = study_folder(settings.study, settings.runs)
    if settings.plugins:
        load_files(read_study(folder).get("plugin_files", ()))
    again = replay(
        folder,
        settings.trial,
        out=settings.out,
        device=settings.device,
        callbacks=[progress()],
        note=show.line,
    )
    rows = [[f"{tokens:,}", f"{old:.17g}", f"{new:.17g}", f"{new - old:+.2g}"] for tokens, old, new in again.pairs]
    show.table("Validation loss [nats per token]", ["tokens", "recorded", "again", "difference"], rows)
    if again.result.status == "failed":
        show.line(f"the rerun failed: {again.result.reason}")
    show.line("the same to the bit" if again.identical else "not the same to the bit; see the differences")
    show.line(f"weights: {again.folder}")
    losses = [{"tokens": tokens, "recorded": old, "again": new} for tokens, old, new in again.pairs]
    found = {"identical": again.identical, "losses": losses, "folder": str(again.folder)}
    found |= {"status": again.result.status, "reason": again.result.reason}
    return Done(found, 0 if again.identical else 1)
