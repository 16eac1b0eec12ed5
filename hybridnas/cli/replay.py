"""``python -m hybridnas.replay``: the same trial again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybridnas.cli import show
from hybridnas.errors import ConfigError

HELP = "run a trial of a study again: same seed, same data, same numbers on CPU"


def run(config: dict[str, Any]) -> int:
    """Replay one trial and print recorded and new losses; returns 1 when they differ."""
    from hybridnas.cli.progress import progress
    from hybridnas.search.replay import replay

    if config["study"] is None or config["trial"] is None:
        raise ConfigError("replay needs study=NAME and trial=NUMBER")
    if not isinstance(config["trial"], int) or config["trial"] < 0:
        raise ConfigError(f"replay trial={config['trial']!r} must be a whole number of 0 or more")
    study = Path(config["study"])
    if not (study / "study.json").is_file():
        study = Path(config["runs"]) / config["study"]
    again = replay(
        study,
        config["trial"],
        out=Path(config["out"]) if config["out"] else None,
        device=config["device"],
        callbacks=[progress()],
        news=show.line,
    )
    rows = [[f"{tokens:,}", f"{old:.17g}", f"{new:.17g}", f"{new - old:+.2g}"] for tokens, old, new in again.pairs]
    show.table("Validation loss [nats per token]", ["tokens", "recorded", "again", "difference"], rows)
    show.line("the same to the bit" if again.identical else "not the same to the bit; see the differences")
    show.line(f"weights: {again.folder}")
    return 0 if again.identical else 1
