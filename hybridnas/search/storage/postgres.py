"""A study in PostgreSQL: workers of any number of hosts join it with nothing but its name and the database's address.

The study's identity, its limits and every finished trial's record lie in the database as user attributes. Checkpoints
lie in each worker's own ``runs`` folder: an interrupted trial goes on from its checkpoint where that folder is shared
or the same host takes it up, and elsewhere begins again with the same choices and the same seed.
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
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError, StudyError
from hybridnas.files import write_json
from hybridnas.search.pruning.promotion import candidate_of
from hybridnas.search.storage.leases import Crew, TrialLostError
from hybridnas.study.records import RESULT, TrialRecord, trial_folder, write_record
from hybridnas.tracking.secrets import masked

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage

CARD = "hybridnas"  # the study's user attribute with its identity and limits
GRACE = 3  # heartbeats that may be missed
PATIENCE = 900.0  # seconds that a database may be away before a worker saves and leaves
ENVIRONMENT = "HYBRIDNAS_STORAGE"
_CALLS = (
    *("create_new_study", "get_study_id_from_name", "get_study_name_from_id", "get_study_directions"),
    *("set_study_user_attr", "set_study_system_attr", "get_study_user_attrs", "get_study_system_attrs"),
    *("_create_new_trial", "_set_trial_param", "set_trial_param", "set_trial_state_values", "get_trial"),
    *("set_trial_intermediate_value", "set_trial_user_attr", "set_trial_system_attr", "_get_trials"),
    *("get_all_studies", "_get_stale_trial_ids", "get_trial_id_from_study_id_trial_number"),
)


def database_url(given: str | None) -> str | None:
    """Return the URL of ``storage=``, or of HYBRIDNAS_STORAGE for ``storage=env``; None: the folder's journal.

    Raises ConfigError for anything but PostgreSQL.
    """
    if given is None:
        return None
    url = os.environ.get(ENVIRONMENT, "") if given == "env" else given
    if given == "env" and not url:
        raise ConfigError(f"search storage=env needs the database's URL in the environment variable {ENVIRONMENT}")
    if not re.match(r"postgres(ql)?(\+\w+)?://", url):
        raise ConfigError(
            f"search storage={masked(url)!r} must be postgresql+psycopg://USER@HOST/DATABASE, or env to read it from "
            f"{ENVIRONMENT}; on one host leave it out: workers=N share a journal"
        )
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)


def open_database(
    url: str, heartbeat: int, news: Callable[[str], None], patience: float = PATIENCE, *, known: bool = False
) -> RDBStorage:
    """Open Optuna's tables; every call waits out a database that is away for a while.

    ``known``: a parent has opened it a moment ago, so that opening waits, too, instead of calling the address wrong.

    Raises StudyError, without the password, when it cannot be reached, and ConfigError when the driver is missing.
    """
    from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
    from optuna.storages import RDBStorage

    def patient(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            until, told, tries = time.monotonic() + patience, False, 0
            while True:
                try:
                    return call(self, *args, **kwargs)
                except UpdateFinishedTrialError:
                    if tries and name == "set_trial_state_values":
                        return True  # the answer to an earlier try was lost, not its effect
                    raise
                except Exception as error:
                    if not _is_outage(error):
                        raise
                    if time.monotonic() > until:
                        raise StudyError(
                            f"the database has been away for {patience:.0f} s ({_why(error, url)}); the same command "
                            f"goes on when it is back, nothing recorded is lost"
                        ) from None
                    if not told:
                        news(f"the database does not answer; waiting for it up to {patience:.0f} s")
                    told, tries = True, tries + 1
                    time.sleep(min(0.2 * 2**tries, 5.0))

        return wrapped

    calls: dict[str, Any] = {name: patient(getattr(RDBStorage, name), name) for name in _CALLS}
    calls["get_heartbeat_interval"] = lambda self: None  # the crew's heart beats, Optuna's own would warn of ask()
    kind = type("PatientStorage", (RDBStorage,), calls)
    alive = {"keepalives": 1, "keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 3}
    arguments = {"connect_timeout": 10, **alive} if "psycopg" in url.partition("://")[0] else {}
    until = time.monotonic() + (patience if known else 0.0)
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                return kind(  # type: ignore[no-any-return]
                    url,
                    engine_kwargs={"pool_pre_ping": True, "connect_args": arguments},
                    heartbeat_interval=heartbeat,
                    grace_period=GRACE * heartbeat,
                )
        except ImportError:
            raise ConfigError("search storage= needs the driver psycopg: pip install 'hybridnas[postgres]'") from None
        except Exception as error:
            if not _is_outage(error) or time.monotonic() >= until:
                raise StudyError(f"storage {masked(url)} cannot be opened: {_why(error, url)}") from None
            time.sleep(1.0)


class DatabaseCrew(Crew):
    """The workers of a study in a database. A trial is held by a heartbeat, and in a shared folder by its lock, too."""

    def __init__(self, folder: Path, storage: RDBStorage, study: str, heartbeat: int, worker: int = 0) -> None:
        super().__init__(folder, worker)
        self.storage = storage
        self.name = study
        self._key = int.from_bytes(hashlib.sha256(study.encode()).digest()[:8], "big", signed=True)
        self._owner = uuid.uuid4().hex
        self._beating: dict[int, int] = {}  # trial number -> id
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, args=(heartbeat,), daemon=True)
        self._heart.start()

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """Hold the study's advisory lock, which the server takes back when the connection ends."""
        from sqlalchemy import text
        from sqlalchemy.exc import DBAPIError

        until = time.monotonic() + PATIENCE
        while True:
            try:
                connection = self.storage.engine.connect()
                connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": self._key})
                break
            except DBAPIError as error:
                if not _is_outage(error) or time.monotonic() > until:
                    raise StudyError(f"the database refuses its lock: {_why(error, str(self.storage.url))}") from None
                time.sleep(1.0)
        try:
            yield
        finally:
            with contextlib.suppress(DBAPIError):  # the connection is gone, and the lock with it
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": self._key})
            with contextlib.suppress(DBAPIError):
                connection.close()

    def take(self, study: optuna.Study, number: int) -> bool:
        if number not in self._trials and not super().take(study, number):
            return False
        trial_id = study.get_trials(deepcopy=False)[number]._trial_id
        self.storage.record_heartbeat(trial_id)
        study._storage.set_trial_user_attr(trial_id, "owner", self._owner)
        where = f"{socket.gethostname()}:{self.folder.absolute()}"
        study._storage.set_trial_user_attr(trial_id, "where", where)
        self._beating[number] = trial_id
        return True

    def adopt(self, study: optuna.Study, paused: Collection[int] = ()) -> optuna.Trial | None:
        from optuna.trial import TrialState

        open_ones = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        stale = set(self.storage._get_stale_trial_ids(study._study_id))
        # Taking one is a single step under the study's lock, so one without an owner was given back or its taker died.
        alive = [t.number for t in open_ones if t._trial_id not in stale and t.user_attrs.get("owner")]
        return super().adopt(study, [*paused, *alive])

    def claim(self, trial: optuna.Trial, fingerprint: str) -> int | None:
        from optuna.trial import TrialState

        with self.taking():
            for other in trial.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if other.number != trial.number and other.user_attrs.get("trains") == fingerprint:
                    return other.number
            trial.set_user_attr("trains", fingerprint)
        return None

    def publish(self, trial: optuna.Trial, record: TrialRecord) -> None:
        """Write the record into the database; raises StudyError where another worker has taken the trial over."""
        if trial.study._storage.get_trial(trial._trial_id).user_attrs.get("owner") != self._owner:
            raise TrialLostError(f"trial {trial.number} was taken over by another worker while this one was silent")
        trial.set_user_attr("record", json.dumps(record.to_dict()))
        arch = trial_folder(self.folder, record.number) / "arch.json"
        if arch.is_file():
            trial.set_user_attr("arch", arch.read_text())

    def done(self, number: int) -> None:
        self._beating.pop(number, None)
        super().done(number)

    def refresh(self, study: optuna.Study, records: dict[int, TrialRecord]) -> list[TrialRecord]:
        """Read what others have published, and lay it into this folder, which then is whole, checkpoints left out."""
        news = []
        for trial in study.get_trials(deepcopy=False):
            text = trial.user_attrs.get("record")
            if text is None or self._known.get(trial.number) == text:
                continue
            self._known[trial.number] = text
            record = TrialRecord.from_dict(json.loads(text))
            records[record.number] = record
            news.append(record)
            folder = trial_folder(self.folder, candidate_of(trial))
            if trial.user_attrs.get("owner") != self._owner or not (folder / RESULT).exists():
                write_record(folder, record)
                if "arch" in trial.user_attrs:
                    write_json(folder / "arch.json", json.loads(trial.user_attrs["arch"]))
        return news

    @functools.cached_property
    def _known(self) -> dict[int, str]:
        return {}

    def close(self) -> None:
        """Give back what is not finished, so that nobody waits for our silence."""
        self._stop.set()
        self._heart.join()
        for trial_id in self._beating.values():
            with contextlib.suppress(Exception):  # it may be finished, or the database away: then silence says it
                self.storage.set_trial_user_attr(trial_id, "owner", "")
        super().close()
        self.storage.engine.dispose()

    def _beat(self, seconds: int) -> None:
        while not self._stop.wait(seconds):
            for trial_id in list(self._beating.values()):
                with contextlib.suppress(Exception):  # the next beat may come through; a trial just finished needs none
                    self.storage.record_heartbeat(trial_id)


def agree(study: optuna.Study, card: dict[str, Any], *, difference: Callable[[Any, Any], str]) -> dict[str, Any]:
    """Write what the study is about, or hold it against what is written; raises StudyError with the difference."""
    stored = study.user_attrs.get(CARD)
    card = dict(json.loads(json.dumps(card)))
    if stored is None:
        study.set_user_attr(CARD, card)
        return card
    found = difference(stored["identity"], card["identity"])
    if found:
        raise StudyError(
            f"the storage holds another study {study.study_name!r}: {found}; choose study=NEWNAME, "
            f"or the same settings to go on"
        )
    if stored.get("data_fingerprint") != card["data_fingerprint"]:
        raise StudyError(
            f"study {study.study_name!r} was begun on other data than is here, so its trials cannot be compared; "
            f"bring the same files to this host, or choose study=NEWNAME"
        )
    if card.get("limits") and stored.get("limits") != card["limits"]:
        study.set_user_attr(CARD, {**stored, "limits": card["limits"]})
    return {**stored, "limits": card.get("limits") or stored.get("limits")}


def read_card(url: str, name: str) -> dict[str, Any]:
    """Return what the database says of a study; raises StudyError that lists the studies there are."""
    import optuna

    storage = open_database(url, 60, lambda text: None, patience=0.0)
    try:
        card = dict(optuna.load_study(study_name=name, storage=storage).user_attrs[CARD])
    except KeyError:
        names = ", ".join(sorted(optuna.get_all_study_names(storage))) or "none"
        raise StudyError(
            f"storage {masked(url)} has no study {name!r} (studies there: {names}); start it with the same command "
            f"without worker=true"
        ) from None
    finally:
        storage.engine.dispose()
    return card


def _is_outage(error: BaseException) -> bool:
    from sqlalchemy.exc import InterfaceError, OperationalError

    return isinstance(error, (OperationalError, InterfaceError)) or (
        error.__cause__ is not None and _is_outage(error.__cause__)
    )


def _why(error: BaseException, url: str) -> str:
    """Return the first line of what a database said, without the password."""
    from urllib.parse import unquote

    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().partition("\n")[0]
    secret = re.search(r"//[^:/@]*:(.*)@", url)
    for word in {secret[1], unquote(secret[1])} if secret else ():
        text = text.replace(word, "***") if word else text
    return str(masked(text)) or type(error).__name__
