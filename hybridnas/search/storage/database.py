"""Records in PostgreSQL: workers of any number of hosts join a study with nothing but its name and the address.

Two tables of our own, ``hybridnas_studies`` (name, settings, limits) and ``hybridnas_trials`` (one row for each trial:
record, owner, heartbeat). Deciding what comes next happens under an advisory lock, which the server takes back when a
connection ends; beginning and saving a trial compare the owner as well, so that a lock lost in an outage costs nothing
but a second look. A trial whose owner has missed three heartbeats may be taken over.

Every record is also written into the local folder, which so stays whole, checkpoints left out: these lie where a trial
was trained. An interrupted trial goes on from its checkpoint where the folder is shared or the same host takes it up,
and elsewhere begins again with the same choices and the same seed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hybridnas.errors import ConfigError, StudyError
from hybridnas.files import write_json
from hybridnas.search.storage.folder_store import FolderStore
from hybridnas.search.storage.store import Held, TrialLostError
from hybridnas.study.folder import first_difference
from hybridnas.study.records import ARCH, RESULT, RUNNING, TrialRecord, trial_folder, write_record
from hybridnas.tracking.secrets import masked

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

GRACE = 3  # heartbeats that may be missed
BLOCK = 256  # trials whose versions are summed when a worker looks for changes [count]
PATIENCE = 900.0  # seconds that a database may be away before a worker saves and leaves
ENVIRONMENT = "HYBRIDNAS_STORAGE"
TABLES = (
    "CREATE TABLE IF NOT EXISTS hybridnas_studies ("
    "name text PRIMARY KEY, card text NOT NULL, made timestamptz NOT NULL DEFAULT now())",
    "CREATE TABLE IF NOT EXISTS hybridnas_trials ("
    "study text NOT NULL REFERENCES hybridnas_studies(name) ON DELETE CASCADE, number integer NOT NULL,"
    " state text NOT NULL, fingerprint text NOT NULL, record text NOT NULL, arch text,"
    " version integer NOT NULL, owner text, place text, beat timestamptz,"
    " PRIMARY KEY (study, number))",
)
T = TypeVar("T")


def database_url(given: str | None) -> str | None:
    """Return the URL of ``storage=``, or of HYBRIDNAS_STORAGE for ``storage=env``; None: files in the folder.

    Raises ConfigError for anything but PostgreSQL.
    """
    if given is None:
        return None
    url = os.environ.get(ENVIRONMENT, "") if given == "env" else given
    if given == "env" and not url:
        raise ConfigError(
            f"storage=env needs the database's URL in the environment variable {ENVIRONMENT}",
            field="storage",
            got=given,
            allowed=ENVIRONMENT,
        )
    if not re.match(r"postgres(ql)?(\+\w+)?://", url):
        raise ConfigError(
            f"storage={masked(url)!r} must be postgresql+psycopg://USER@HOST/DATABASE, or env to read it from "
            f"{ENVIRONMENT}; on one host leave it out: workers=N share the study's folder",
            field="storage",
            got=masked(url),
            allowed="postgresql+psycopg://USER@HOST/DATABASE",
        )
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)


class Database:
    """Tables of one server, made where they are missing. Every call waits out a server that is away for a while.

    ``patient``: a parent has opened it a moment ago, so opening waits, too, instead of calling the address wrong.
    Raises StudyError, without the password, when it cannot be reached, and ConfigError when the driver is missing.
    """

    def __init__(
        self,
        url: str,
        *,
        tables: Sequence[str] = TABLES,
        note: Callable[[str], None] = lambda text: None,
        patience: float = PATIENCE,
        patient: bool = False,
    ) -> None:
        self.url, self.tables, self.note, self.patience = url, tables, note, patience
        try:
            self.engine = _engine(url)
        except ImportError:
            raise ConfigError(
                "storage= needs the driver psycopg: pip install 'hybridnas[postgres]'", field="storage"
            ) from None
        try:
            if patient:
                self.patiently(self._make_tables)
            else:
                self._make_tables()
        except StudyError:
            raise
        except Exception as error:
            self.engine.dispose()
            raise StudyError(
                f"storage {masked(url)} cannot be opened: {reason(error, url)}", field="storage", got=masked(url)
            ) from None

    def _make_tables(self) -> None:
        from sqlalchemy import text

        with self.engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _key("hybridnas tables")})
            for statement in self.tables:
                connection.execute(text(statement))

    def patiently(self, call: Callable[[], T]) -> T:
        """Call a function until the server answers; it may be called again after it has had its effect."""
        until, noted, tries = time.monotonic() + self.patience, False, 0
        while True:
            try:
                return call()
            except Exception as error:
                if not is_outage(error):
                    raise
                if time.monotonic() > until:
                    raise StudyError(
                        f"the database has been away for {self.patience:.0f} s ({reason(error, self.url)}); the same "
                        f"command goes on when it is back, nothing recorded is lost",
                        field="storage",
                        got=masked(self.url),
                    ) from None
                if not noted:
                    self.note(f"the database does not answer; waiting for it up to {self.patience:.0f} s")
                noted, tries = True, tries + 1
                time.sleep(min(0.2 * 2**tries, 5.0))

    def run(self, sql: str, **values: Any) -> list[Any]:
        """Run one statement in its own transaction and return its rows."""

        def call() -> list[Any]:
            with self.engine.begin() as connection:
                return rows(connection, sql, values)

        return self.patiently(call)

    def card(self, study: str) -> dict[str, Any]:
        """Return what a study is about; raises StudyError that lists the studies there are."""
        found = self.run("SELECT card FROM hybridnas_studies WHERE name = :name", name=study)
        if not found:
            names = [row[0] for row in self.run("SELECT name FROM hybridnas_studies ORDER BY name")]
            raise StudyError(
                f"storage {masked(self.url)} has no study {study!r} (studies there: {', '.join(names) or 'none'}); "
                f"start it with the same command without worker=true",
                field="study",
                got=study,
                allowed=names,
            )
        return dict(json.loads(found[0][0]))

    def close(self) -> None:
        self.engine.dispose()


class SqlStore:
    """The records of one study in a database, as one of its workers sees them."""

    def __init__(
        self,
        url: str,
        folder: Path,
        heartbeat: int,
        worker: int = 0,
        *,
        note: Callable[[str], None] = lambda text: None,
        patience: float = PATIENCE,
        patient: bool = False,
    ) -> None:
        self.database = Database(url, note=note, patience=patience, patient=patient)
        self.local = FolderStore(folder, worker)
        self.folder, self.study, self.heartbeat = folder, folder.name, heartbeat
        self.warnings = self.local.warnings
        self._owner = uuid.uuid4().hex
        self._place = f"worker {worker}, process {os.getpid()} on {socket.gethostname()}"
        self._versions: dict[int, int] = {}
        self._records: dict[int, TrialRecord] = {}
        self._held: set[int] = set()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="hybridnas-heartbeat", daemon=True)
        self._heart.start()

    def agree(self, identity: Mapping[str, Any], data_fingerprint: str, limits: Mapping[str, Any] | None) -> None:
        """Write what the study is about, or hold it against what is written; raises StudyError with the difference."""
        card = json.loads(json.dumps({"identity": identity, "data_fingerprint": data_fingerprint, "limits": limits}))
        self.database.run(
            "INSERT INTO hybridnas_studies (name, card) VALUES (:name, :card) ON CONFLICT DO NOTHING",
            name=self.study,
            card=json.dumps(card),
        )
        stored = self.database.card(self.study)
        found = first_difference(stored["identity"], card["identity"])
        if found:
            raise StudyError(
                f"the storage holds another study {self.study!r}: {found}; choose study=NEWNAME, "
                f"or the same settings to go on",
                field=found.field,
                got=found.asked,
                allowed=found.stored,
            )
        if stored["data_fingerprint"] != data_fingerprint:
            raise StudyError(
                f"study {self.study!r} was begun on other data than is here, so its trials cannot be compared; "
                f"bring the same files to this host, or choose study=NEWNAME",
                field="data_fingerprint",
                got=data_fingerprint,
                allowed=stored["data_fingerprint"],
            )
        if limits is not None and stored.get("limits") != card["limits"]:
            self.database.run(
                "UPDATE hybridnas_studies SET card = :card WHERE name = :name",
                name=self.study,
                card=json.dumps({**stored, "limits": card["limits"]}),
            )

    @contextmanager
    def deciding(self) -> Iterator[None]:
        from sqlalchemy import text
        from sqlalchemy.exc import DBAPIError

        key = {"key": _key(self.study)}

        def lock() -> Connection:
            connection = self.database.engine.connect()
            try:
                connection.execute(text("SELECT pg_advisory_lock(:key)"), key)
                connection.commit()  # no transaction stays open; the lock is the session's
            except BaseException:
                connection.invalidate()
                connection.close()
                raise
            return connection

        connection = self.database.patiently(lock)
        try:
            yield
        finally:
            try:
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), key)
                connection.commit()
            except DBAPIError:  # the connection is gone, and the lock with it
                with contextlib.suppress(DBAPIError):
                    connection.invalidate()
            except BaseException:
                connection.invalidate()  # Ctrl-C in between: the lock must not return to the pool
                raise
            finally:
                connection.close()

    def changes(self) -> list[TrialRecord]:
        changed = self._changed()
        if not changed:
            return []
        rows_now = self.database.run(
            "SELECT number, version, record, arch, owner FROM hybridnas_trials WHERE study = :study "
            "AND number = ANY(:changed) ORDER BY number",
            study=self.study,
            changed=changed,
        )
        found = []
        for number, version, text, arch, owner in rows_now:
            record = TrialRecord.from_dict(json.loads(text))
            self._versions[number] = version
            self._records[number] = record
            found.append(record)
            if owner != self._owner or number not in self._held:
                self._keep_here(record, arch)
        return found

    def _changed(self) -> list[int]:
        """Return the trials whose version is not the one known here.

        Versions only rise, so the sum over a block of trials changes with any of them: asked for first, such sums
        keep a look at many trials short, since the versions of the blocks that differ are read alone.
        """
        sums = self.database.run(
            "SELECT number / :size, sum(version) FROM hybridnas_trials WHERE study = :study GROUP BY 1",
            study=self.study,
            size=BLOCK,
        )
        known: Counter[int] = Counter()
        for number, version in self._versions.items():
            known[number // BLOCK] += version
        blocks = [block for block, total in sums if known[block] != total]
        if not blocks:
            return []
        versions = self.database.run(
            "SELECT number, version FROM hybridnas_trials WHERE study = :study AND number / :size = ANY(:blocks)"
            " ORDER BY number",
            study=self.study,
            size=BLOCK,
            blocks=blocks,
        )
        return [number for number, version in versions if self._versions.get(number) != version]

    def _keep_here(self, record: TrialRecord, arch: str | None) -> None:
        """Write another worker's record into the local folder; the next look after a power failure writes it again."""
        folder = trial_folder(self.folder, record.number)
        if record.state == RUNNING and not (folder / RESULT).exists():
            return  # nothing to show yet, and where the folder is shared its worker writes it
        write_record(folder, record, sync=False)
        if arch is not None:
            write_json(folder / ARCH, json.loads(arch))

    def next_number(self) -> int:
        found = self.database.run(
            "SELECT coalesce(max(number), -1) + 1 FROM hybridnas_trials WHERE study = :study", study=self.study
        )
        return int(found[0][0])

    def begin(self, record: TrialRecord) -> bool:
        number, known = record.number, self._records.get(record.number)
        if not self.local.hold(number):  # another process of the same folder
            return False
        if known is None:
            sql = (
                "INSERT INTO hybridnas_trials (study, number, state, fingerprint, record, version, owner, place, beat)"
                " VALUES (:study, :number, :state, :fingerprint, :record, 1, :owner, :place, clock_timestamp())"
                " ON CONFLICT DO NOTHING"
            )
        else:
            sql = (
                "UPDATE hybridnas_trials SET state = :state, record = :record, version = version + 1, owner = :owner,"
                " place = :place, beat = clock_timestamp() WHERE study = :study AND number = :number"
                " AND version = :version"
            )
        self.database.run(
            sql,
            study=self.study,
            number=number,
            state=record.state,
            fingerprint=record.fingerprint,
            record=json.dumps(record.to_dict()),
            owner=self._owner,
            place=self._place,
            **({} if known is None else {"version": self._versions[number]}),
        )
        # Asked for rather than counted: the answer to the statement may have been lost, and its effect not.
        owner = self.database.run(
            "SELECT owner, version FROM hybridnas_trials WHERE study = :study AND number = :number",
            study=self.study,
            number=number,
        )
        if not owner or owner[0][0] != self._owner:
            self.local.release(number)
            return False
        self._held.add(number)
        self._versions[number] = owner[0][1]
        self._records[number] = record
        write_record(trial_folder(self.folder, number), record)
        return True

    def save(self, record: TrialRecord) -> None:
        number = record.number
        folder = trial_folder(self.folder, number)
        arch = (folder / ARCH).read_text() if (folder / ARCH).is_file() else None
        values = {
            "study": self.study,
            "number": number,
            "state": record.state,
            "fingerprint": record.fingerprint,
            "record": json.dumps(record.to_dict()),
            "arch": arch,
        }
        update = (
            "UPDATE hybridnas_trials SET state = :state, fingerprint = :fingerprint, record = :record,"
            " arch = coalesce(:arch, arch), version = version + 1 WHERE study = :study AND number = :number"
        )
        if number in self._held:
            done = self.database.run(f"{update} AND owner = :owner RETURNING version", **values, owner=self._owner)
            if not done:
                self._held.discard(number)
                self.local.release(number)
                raise TrialLostError(
                    f"trial {number} was taken over by another worker while this one was silent",
                    field="trial",
                    got=number,
                )
        elif number in self._records:
            done = self.database.run(f"{update} RETURNING version", **values)
        else:
            done = self.database.run(
                "INSERT INTO hybridnas_trials (study, number, state, fingerprint, record, arch, version) VALUES"
                " (:study, :number, :state, :fingerprint, :record, :arch, 1) ON CONFLICT DO NOTHING RETURNING version",
                **values,
            )
        if done:
            self._versions[number] = done[0][0]
            self._records[number] = record
        write_record(folder, record)

    def release(self, number: int) -> None:
        if number in self._held:
            self._held.discard(number)
            self.database.run(
                "UPDATE hybridnas_trials SET owner = NULL, place = NULL, beat = NULL"
                " WHERE study = :study AND number = :number AND owner = :owner",
                study=self.study,
                number=number,
                owner=self._owner,
            )
        self.local.release(number)

    def orphans(self) -> list[int]:
        found = self.database.run(
            "SELECT number FROM hybridnas_trials WHERE study = :study AND state = :state AND (owner IS NULL OR"
            " clock_timestamp() - beat >= make_interval(secs => :grace)) ORDER BY number",
            study=self.study,
            state=RUNNING,
            grace=GRACE * self.heartbeat,
        )
        return [number for (number,) in found if number not in self._held]

    def running(self) -> list[Held]:
        found = self.database.run(
            "SELECT number, record, coalesce(place, ''), owner IS NOT NULL AND"
            " clock_timestamp() - beat < make_interval(secs => :grace) FROM hybridnas_trials"
            " WHERE study = :study AND state = :state ORDER BY number",
            study=self.study,
            state=RUNNING,
            grace=GRACE * self.heartbeat,
        )
        held = []
        for number, text, place, alive in found:
            where = "this process" if number in self._held else place if alive else ""
            held.append(Held(TrialRecord.from_dict(json.loads(text)), where))
        return held

    def close(self) -> None:
        """Give back what is not finished, so that no worker waits until this one's heartbeat runs out."""
        self._stop.set()
        self._heart.join()
        self.database.patience = 0.0
        for number in list(self._held):
            with contextlib.suppress(Exception):  # the database is away: then the heartbeat runs out
                self.release(number)
        self.local.close()
        self.database.close()

    def _beat(self) -> None:
        from sqlalchemy import text

        while not self._stop.wait(self.heartbeat):
            for number in list(self._held):
                with contextlib.suppress(Exception), self.database.engine.begin() as connection:
                    # Where it fails, the next one may come through.
                    connection.execute(
                        text(
                            "UPDATE hybridnas_trials SET beat = clock_timestamp()"
                            " WHERE study = :study AND number = :number AND owner = :owner"
                        ),
                        {"study": self.study, "number": number, "owner": self._owner},
                    )


def read_database(url: str, name: str, heartbeat: int) -> tuple[dict[str, Any], list[TrialRecord], list[Held]]:
    """Return a study's card, its finished records and its running trials; writes nothing.

    Raises StudyError where there is no such study.
    """
    database = Database(url, patience=0.0)
    try:
        card = database.card(name)
        found = database.run(
            "SELECT record, coalesce(place, ''), owner IS NOT NULL AND"
            " clock_timestamp() - beat < make_interval(secs => :grace) FROM hybridnas_trials"
            " WHERE study = :study ORDER BY number",
            study=name,
            grace=GRACE * heartbeat,
        )
    finally:
        database.close()
    records = [(TrialRecord.from_dict(json.loads(text)), place if alive else "") for text, place, alive in found]
    finished = [record for record, _ in records if record.state != RUNNING]
    return card, finished, [Held(record, where) for record, where in records if record.state == RUNNING]


def rows(connection: Connection, sql: str, values: Mapping[str, Any]) -> list[Any]:
    """Run a statement and return its rows, none for one that returns no rows."""
    from sqlalchemy import text

    result = connection.execute(text(sql), dict(values))
    return list(result) if result.returns_rows else []


def is_outage(error: BaseException) -> bool:
    """Whether an error means that the server is away."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    return isinstance(error, (OperationalError, InterfaceError))


def reason(error: BaseException, url: str) -> str:
    """Return the first line of a database error, without the password."""
    from urllib.parse import unquote

    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().partition("\n")[0]
    secret = re.search(r"//[^:/@]*:(.*)@", url)
    for word in {secret[1], unquote(secret[1])} if secret else ():
        text = text.replace(word, "***") if word else text
    return str(masked(text)) or type(error).__name__


@functools.lru_cache(maxsize=64)
def _key(name: str) -> int:
    """Return the number under which PostgreSQL knows a lock."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)


def _engine(url: str) -> Engine:
    from sqlalchemy import create_engine

    alive = {"keepalives": 1, "keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 3}
    arguments = {"connect_timeout": 10, **alive} if "psycopg" in url.partition("://")[0] else {}
    return create_engine(url, pool_pre_ping=True, connect_args=arguments)
