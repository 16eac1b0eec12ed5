"""Join an existing study: load its settings from its storage and reject settings that conflict with them."""

from __future__ import annotations

from pathlib import Path

from hybridnas.config import flatten, plain
from hybridnas.errors import StudyError
from hybridnas.search.config import Budget, SearchConfig
from hybridnas.search.storage.database import Database, database_url
from hybridnas.study.folder import read_study

OWN = ("study", "runs", "tracking", "device", "worker", "heartbeat", "storage")  # what a worker decides for itself


def joined(asked: SearchConfig, usual: SearchConfig) -> SearchConfig:
    """Return the settings with which to work on the stored study that ``asked`` names.

    ``usual`` are the settings of a command without arguments: where ``asked`` differs from them, the stored study must
    agree. Raises StudyError with the difference, or where there is no such study.
    """
    url = database_url(asked.storage)
    if url is None:
        card = read_study(Path(asked.runs) / asked.name)
    else:
        database = Database(url, patience=0.0)
        try:
            card = database.card(asked.name)
        finally:
            database.close()
    identity = card["identity"]
    stored = flatten(identity)
    ordinary = flatten(plain(usual.identity()))
    for key, value in flatten(plain(asked.identity())).items():
        if value != ordinary.get(key) and value != stored.get(key):
            raise StudyError(
                f"study {asked.name!r} has {key}={stored.get(key)!r}, this worker was given {value!r}; leave the "
                f"setting out (a worker takes the study's own), or choose another study",
                field=key,
                got=value,
                allowed=stored.get(key),
            )
    limits = {key: value for key, value in (card.get("limits") or {}).items() if key in Budget.field_names()}
    budget = Budget.from_dict({**identity["budget"], **limits})
    rest = {key: value for key, value in identity.items() if key not in ("budget", "plugins")}
    own = {key: getattr(asked, key) for key in OWN}
    return SearchConfig.from_dict({**rest, **own, "budget": budget})
