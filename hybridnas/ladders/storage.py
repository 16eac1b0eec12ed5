"""A ladder's runs in PostgreSQL: hosts train one ladder together with nothing but the same command and the address.

Two tables of our own, ``hybridnas_ladders`` (name, settings, architectures) and ``hybridnas_ladder_runs`` (one row for
each run: owner and heartbeat while it trains; status, ``run.json`` and measurements once it has ended). A run whose
owner has missed three heartbeats may be taken over: it goes on from its checkpoint where the folder is shared or the
same host takes it up, and elsewhere begins again. What has ended is written into the folder of every host.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hybridnas.errors import StudyError
from hybridnas.files import write_text
from hybridnas.ladders.config import LadderConfig
from hybridnas.ladders.entrants import Base, base_of, study_folder
from hybridnas.ladders.plan import LadderRun
from hybridnas.ladders.rows import ended
from hybridnas.search.storage.database import GRACE, Database, database_url, rows
from hybridnas.study.folder import first_difference
from hybridnas.study.locks import FileLock
from hybridnas.tracking.secrets import masked
from hybridnas.train import checkpoint
from hybridnas.train.experiment import ERROR
from hybridnas.train.records import METRICS, Eval, read_evals, read_run, write_run

TABLES = (
    "CREATE TABLE IF NOT EXISTS hybridnas_ladders ("
    "name text PRIMARY KEY, card text NOT NULL, made timestamptz NOT NULL DEFAULT now())",
    "CREATE TABLE IF NOT EXISTS hybridnas_ladder_runs ("
    "ladder text NOT NULL REFERENCES hybridnas_ladders(name) ON DELETE CASCADE, key text NOT NULL,"
    " status text, result text, owner text, place text, beat timestamptz, PRIMARY KEY (ladder, key))",
)


def stored_base(config: LadderConfig) -> Base:
    """Return budget, data and the study's architectures; with ``storage=`` also where the study lies elsewhere.

    Then they are those that the host which began the ladder has written. Raises as :func:`base_of`, and StudyError
    where no host has begun it.
    """
    url = database_url(config.storage)
    if url is None or config.study is None or (study_folder(config) / "study.json").is_file():
        return base_of(config)
    with contextlib.closing(Database(url, tables=TABLES, patience=0.0)) as database:
        found = database.run("SELECT card FROM hybridnas_ladders WHERE name = :name", name=config.title)
    if not found:
        raise StudyError(
            f"ladder study={config.study} is not in {config.runs}, and storage {masked(url)} has no ladder "
            f"{config.title!r}; begin the ladder on a host that has the study's folder",
            field="ladder.study",
            got=config.study,
        )
    return Base.from_dict(json.loads(found[0][0])["base"]).changed(config)


class SharedRuns:
    """The runs of one ladder in a database, as one of its processes sees them."""

    def __init__(self, config: LadderConfig, *, note: Callable[[str], None], patient: bool = False) -> None:
        url = database_url(config.storage)
        assert url is not None
        self.database = Database(url, tables=TABLES, note=note, patient=patient)
        self.ladder, self.heartbeat, self.note = config.title, config.heartbeat, note
        self._owner = uuid.uuid4().hex
        self._place = f"process {os.getpid()} on {socket.gethostname()}"
        self._held: str | None = None
        self._lost: set[str] = set()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="hybridnas-heartbeat", daemon=True)
        self._heart.start()

    def agree(self, identity: Mapping[str, Any], base: Base) -> None:
        """Write what the ladder is, or hold it against what is written; raises StudyError with the difference."""
        card = json.loads(json.dumps({"identity": identity, "base": base.to_dict()}))
        self.database.run(
            "INSERT INTO hybridnas_ladders (name, card) VALUES (:ladder, :card) ON CONFLICT DO NOTHING",
            ladder=self.ladder,
            card=json.dumps(card),
        )
        found = self.database.run("SELECT card FROM hybridnas_ladders WHERE name = :ladder", ladder=self.ladder)
        stored = json.loads(found[0][0])
        differing = first_difference(stored["identity"], card["identity"])
        if differing:
            raise StudyError(
                f"the storage holds another ladder {self.ladder!r}: {differing}; choose name=NEWNAME, or the same "
                f"settings to go on",
                field=f"ladder.{differing.field}",
                got=differing.asked,
                allowed=differing.stored,
            )
        if stored["base"] != card["base"]:  # the study has gone on since
            self.database.run(
                "UPDATE hybridnas_ladders SET card = :card WHERE name = :ladder",
                ladder=self.ladder,
                card=json.dumps(card),
            )

    def claim(self, run: LadderRun) -> bool:
        """Take a run that has not ended and that no living process trains; False where there is one."""
        about = {"ladder": self.ladder, "key": run.key}
        before = self.database.run(
            "SELECT place FROM hybridnas_ladder_runs WHERE ladder = :ladder AND key = :key AND owner IS NOT NULL",
            **about,
        )
        self.database.run(
            "INSERT INTO hybridnas_ladder_runs AS own (ladder, key, owner, place, beat)"
            " VALUES (:ladder, :key, :owner, :place, clock_timestamp()) ON CONFLICT (ladder, key) DO UPDATE"
            " SET owner = :owner, place = :place, beat = clock_timestamp() WHERE own.status IS NULL AND"
            " (own.owner IS NULL OR own.beat < clock_timestamp() - make_interval(secs => :grace))",
            **about,
            owner=self._owner,
            place=self._place,
            grace=GRACE * self.heartbeat,
        )
        # Asked for rather than counted: the answer to the statement may have been lost, and its effect not.
        owner = self.database.run(
            "SELECT owner FROM hybridnas_ladder_runs WHERE ladder = :ladder AND key = :key AND status IS NULL", **about
        )
        if not owner or owner[0][0] != self._owner:
            return False
        self._lost.discard(run.key)
        self._held = run.key
        if before:
            self.note(f"{run.key}: taken over from {before[0][0]}, which has been silent")
        return True

    def lost(self, run: LadderRun) -> bool:
        """Whether another process has taken over or ended a run that is held here."""
        return run.key in self._lost

    def keep(self, run: LadderRun) -> None:
        """Write the result of a run that has ended here; of two results of one run the first one counts."""
        self.database.run(
            "INSERT INTO hybridnas_ladder_runs AS own (ladder, key, status, result, place)"
            " VALUES (:ladder, :key, :status, :result, :place) ON CONFLICT (ladder, key) DO UPDATE"
            " SET status = :status, result = :result, owner = NULL, place = :place, beat = NULL"
            " WHERE own.status IS NULL",
            ladder=self.ladder,
            key=run.key,
            status=ended(run),
            result=_result(run),
            place=self._place,
        )
        if self._held == run.key:
            self._held = None

    def release(self, run: LadderRun) -> None:
        """Let go of a run that is held here and has not ended; where the database is away, its heartbeat runs out."""
        if self._held == run.key:
            self._held = None
            with contextlib.suppress(Exception):
                self._once(
                    "UPDATE hybridnas_ladder_runs SET owner = NULL, place = NULL, beat = NULL"
                    " WHERE ladder = :ladder AND key = :key AND owner = :owner AND status IS NULL",
                    key=run.key,
                )

    def exchange(self, runs: Sequence[LadderRun]) -> tuple[dict[str, str], set[str]]:
        """Write what has ended here into the database, and what has ended elsewhere into the folder.

        Returns run -> place of those that were not known here to have ended, and the runs that other living processes
        train.
        """
        found = self.database.run(
            "SELECT key, coalesce(place, ''), encode(sha256(convert_to(result, 'UTF8')), 'hex'),"
            " owner <> :owner AND clock_timestamp() - beat < make_interval(secs => :grace)"
            " FROM hybridnas_ladder_runs WHERE ladder = :ladder",
            ladder=self.ladder,
            owner=self._owner,
            grace=GRACE * self.heartbeat,
        )
        stored = {key: (place, digest) for key, place, digest, _ in found if digest is not None}
        new: dict[str, str] = {}
        for run in runs:
            known = ended(run)
            if run.key not in stored:
                if known:
                    self.keep(run)
                continue
            place, digest = stored[run.key]
            if known and hashlib.sha256(_result(run).encode()).hexdigest() == digest:
                continue
            if self._fetch(run) and not known:
                new[run.key] = place
        return new, {key for key, _, digest, alive in found if digest is None and alive}

    def _fetch(self, run: LadderRun) -> bool:
        """Write a stored result into the run's folder; False while another process of this host works in it."""
        found = self.database.run(
            "SELECT result FROM hybridnas_ladder_runs WHERE ladder = :ladder AND key = :key",
            ladder=self.ladder,
            key=run.key,
        )
        result = json.loads(found[0][0])
        lock = FileLock(run.lock)
        if not lock.acquire(wait=False):
            return False
        try:
            checkpoint.remove(run.folder)  # of an attempt that another process has overtaken
            (run.folder / ERROR).unlink(missing_ok=True)
            lines = [json.dumps(asdict(Eval.from_dict(value))) for value in result["evals"]]
            write_text(run.folder / METRICS, "".join(f"{line}\n" for line in lines))
            write_run(run.folder, result["run"])  # last: it says that the run has ended
        finally:
            lock.release()
        return True

    def close(self) -> None:
        """End the heartbeat and the connections."""
        self._stop.set()
        self._heart.join()
        self.database.close()

    def _once(self, sql: str, **values: Any) -> list[Any]:
        """Run a statement about what this process owns, without waiting for a server that is away."""
        with self.database.engine.begin() as connection:
            return rows(connection, sql, {"ladder": self.ladder, "owner": self._owner, **values})

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat):
            key = self._held
            if key is None:
                continue
            with contextlib.suppress(Exception):  # where it fails, the next one may come through
                alive = self._once(
                    "UPDATE hybridnas_ladder_runs SET beat = clock_timestamp()"
                    " WHERE ladder = :ladder AND key = :key AND owner = :owner RETURNING key",
                    key=key,
                )
                if not alive and self._held == key:
                    self._lost.add(key)


@contextlib.contextmanager
def shared_runs(
    config: LadderConfig, identity: Mapping[str, Any], base: Base, *, note: Callable[[str], None]
) -> Iterator[SharedRuns | None]:
    """Hold the connection of ``storage=`` for a block, of a ladder on which all agree; None without ``storage=``."""
    if config.storage is None:
        yield None
        return
    with contextlib.closing(SharedRuns(config, note=note)) as found:
        found.agree(identity, base)
        yield found


def _result(run: LadderRun) -> str:
    """Return what an ended run left, as it is stored."""
    evals = [asdict(value) for value in read_evals(run.folder)]
    return json.dumps({"run": read_run(run.folder), "evals": evals}, sort_keys=True)
