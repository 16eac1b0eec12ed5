"""MLflow as a tracker: one parent run for the study, one child run for each trial.

The only file that imports mlflow. A study's database is ``STUDY/mlflow.db`` unless another URI is named; its artifacts
lie in ``mlartifacts`` beside the database and move with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sqlite3
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlparse

from hybridnas.errors import StudyError
from hybridnas.files import cache_home, write_atomic
from hybridnas.study.records import COMPLETE, DUPLICATE, FAIL, INFEASIBLE, PRUNED, RUNNING, save
from hybridnas.tracking.secrets import masked
from hybridnas.tracking.tracker import FINISHED, KILLED, BackgroundTracker, first_line

EXPERIMENT = "hybridnas"
# What MLflow calls the state of a trial, and of the study's own run; all others are FAILED.
STATUS = {
    COMPLETE: FINISHED,
    DUPLICATE: FINISHED,
    PRUNED: KILLED,
    RUNNING: "RUNNING",
    FINISHED: FINISHED,
    KILLED: KILLED,
}
ARTIFACTS = "mlartifacts"  # folder beside an sqlite database
_CARD = "mlflow.json"  # in the study folder: which study this is, on whatever server
_LIMIT = 5000  # characters of a parameter's or tag's value; the server refuses more than 6000
_SQLITE = "sqlite:///"
# Loggers that report on their own what BackgroundTracker reports in one warning, or that a database was made.
_LOGGERS = ("mlflow.store.db.utils", "mlflow.store.db_migrations", "alembic.runtime.migration")


def open_tracker(
    uri: str | None, folder: Path | str, name: str, config: Mapping[str, Any], *, kind: str = "study"
) -> BackgroundTracker:
    """Start recording a study or a training in MLflow; returns at once.

    Without a URI the database is ``mlflow.db`` in ``folder``; ``off`` records nothing. ``kind="train"`` is for a
    training that stands alone, whose curve goes to its own run (number None). The run is found again by an id kept in
    the folder, so continuing makes no second one.
    """
    folder = Path(folder)
    if uri == "off":
        return BackgroundTracker(None, name)
    return BackgroundTracker(MLflowTracker(uri or default_uri(folder), folder, name, config, kind), name)


class MLflowTracker:
    """Records a study in an MLflow server or database, see :class:`hybridnas.tracking.tracker.Tracker`."""

    def __init__(self, uri: str, folder: Path, name: str, config: Mapping[str, Any], kind: str = "study") -> None:
        self.uri = uri
        self._folder = folder.absolute()
        self._name = name
        self._config = masked(dict(config))
        self._kind = kind
        self._client: Any = None
        self._experiment = ""
        self._id = ""
        self._runs: dict[int | None, str] = {}  # trial number (None: the study) -> run id
        self._states: dict[int, tuple[str, str]] = {}  # trial number -> fingerprint, state
        self._logged: dict[str, int] = {}  # run id -> training tokens up to which it has measurements
        self._made: set[str] = set()  # runs that this object made

    @property
    def place(self) -> str:
        """Where the runs are recorded, for messages."""
        return f"MLflow at {self.uri}"

    def open(self) -> None:
        """Connect and find the runs of this study; no run is changed."""
        home = artifact_home(self.uri)
        if home is not None and self.uri.startswith(_SQLITE):
            make_database(self.uri)
            move_artifacts(database_path(self.uri), home, own=self.uri == default_uri(self._folder))
        self._client = connect(self.uri)
        with quiet(self.uri):
            self._experiment = _experiment(self._client, home.as_uri() if home else None)
            self._id = self._own_id()
            for run in search_runs(self._client, self._experiment, f"tags.`hybridnas.study_id` = '{self._id}'"):
                tags = run.data.tags
                if tags.get("hybridnas.kind") == self._kind:
                    self._runs[None] = run.info.run_id
                elif "hybridnas.superseded" not in tags and tags.get("hybridnas.trial", "").isdigit():
                    number = int(tags["hybridnas.trial"])
                    self._runs[number] = run.info.run_id
                    self._states[number] = (
                        tags.get("hybridnas.fingerprint", ""),
                        tags.get("hybridnas.state", RUNNING),
                    )

    def known(self, number: int) -> tuple[str, str] | None:
        """Return fingerprint and state of a trial that is recorded already; None where it is not."""
        return self._states.get(number)

    def start(self, number: int | None, title: str, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Make a run, or go on with the one there is; a trial of another architecture gets a new one."""
        with quiet(self.uri):
            run_id = self._runs.get(number, "")
            if number is not None:
                fingerprint = tags.get("fingerprint", "")
                if run_id and self._states[number][0] != fingerprint:
                    self._client.set_tag(run_id, "hybridnas.superseded", "true")
                    run_id = ""
                self._states[number] = (fingerprint, RUNNING)
            if not run_id:
                run_id = self._runs[number] = self._make(number, title)
                self._made.add(run_id)
            else:
                self._client.update_run(run_id, status="RUNNING")
            if run_id not in self._logged:
                points = self._client.get_metric_history(run_id, "valid_loss")
                self._logged[run_id] = max((point.step for point in points), default=-1)
            own = params if run_id in self._made else {}  # MLflow changes no parameter, and an older run has them
            self._batch(run_id, {}, 0, own, {f"hybridnas.{key}": value for key, value in tags.items()})
            if number is None:
                self._client.log_dict(run_id, self._config, "config.json")

    def log(self, number: int | None, metrics: Mapping[str, float], tokens: int) -> None:
        """Record metrics at a count of training tokens; a measurement that the run has is not repeated."""
        run_id = self._runs[number]
        measured = "valid_loss" in metrics
        if measured and tokens <= self._logged[run_id]:
            return
        with quiet(self.uri):
            self._batch(run_id, metrics, tokens)
        if measured:
            self._logged[run_id] = tokens

    def end(self, number: int | None, state: str, tags: Mapping[str, str]) -> None:
        """End a run: PRUNED is KILLED, FAIL and INFEASIBLE are FAILED."""
        run_id = self._runs[number]
        with quiet(self.uri):
            self._batch(run_id, {}, 0, tags={f"hybridnas.{key}": value for key, value in tags.items()})
            self._client.set_terminated(run_id, STATUS.get(state, "FAILED"))
        if number is not None:
            self._states[number] = (self._states[number][0], state)

    def attach(self, number: int | None, path: Path) -> None:
        """Keep a copy of a file as the run's artifact."""
        with quiet(self.uri):
            self._client.log_artifact(self._runs[number], str(path))

    def _make(self, number: int | None, title: str) -> str:
        kind = self._kind if number is None else "trial"
        tags = {"hybridnas.kind": kind, "hybridnas.study": self._name, "hybridnas.study_id": self._id}
        if number is not None:
            tags |= {"hybridnas.trial": str(number), "mlflow.parentRunId": self._runs[None]}
        return str(self._client.create_run(self._experiment, run_name=title[:200], tags=tags).info.run_id)

    def _batch(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        tokens: int,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(_key(name), value, now, tokens) for name, value in metrics.items()],
            params=[Param(_key(name), value[:_LIMIT]) for name, value in (params or {}).items()],
            tags=[RunTag(name, value[:_LIMIT]) for name, value in (tags or {}).items()],
        )

    def _own_id(self) -> str:
        path = self._folder / _CARD
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["study_id"])
        except (OSError, ValueError, KeyError, TypeError):
            study_id = uuid.uuid4().hex
            save(path, json.dumps({"study_id": study_id}) + "\n")
            return study_id


def default_uri(folder: Path | str) -> str:
    """Return the study's own database: ``sqlite:///`` and the absolute path of ``mlflow.db`` in its folder."""
    return f"{_SQLITE}{(Path(folder).absolute() / 'mlflow.db').as_posix()}"


def database_path(uri: str) -> Path:
    """Return the absolute path of the file of an sqlite URI."""
    return Path(uri.removeprefix(_SQLITE)).absolute()


def artifact_home(uri: str) -> Path | None:
    """Return where artifacts go: beside an sqlite file; None: where the server keeps them."""
    return database_path(uri).parent / ARTIFACTS if uri.startswith(_SQLITE) else None


def make_database(uri: str) -> None:
    """Make an sqlite file whole or not at all: MLflow cannot go on with tables that a killed process began.

    MLflow takes seconds for it (some hundred migrations), so an empty database of its version is kept in the cache and
    copied. A cache that cannot be read or written costs those seconds, nothing else.
    """
    path = database_path(uri)
    if path.exists():
        return
    begun = path.with_name(f".{path.stem}.new.db")
    begun.unlink(missing_ok=True)
    empty = cache_home() / f"mlflow-{version('mlflow')}.db"
    if not _copied(empty, begun):
        client = connect(f"{_SQLITE}{begun.as_posix()}")
        with quiet(uri):
            client.search_experiments(max_results=1)
        with contextlib.suppress(OSError):
            write_atomic(empty, begun.read_bytes())
    begun.replace(path)


def _copied(empty: Path, to: Path) -> bool:
    """Copy an empty database; False where there is none or it is damaged."""
    try:
        shutil.copyfile(empty, to)
        with contextlib.closing(sqlite3.connect(to)) as connection:
            return bool(connection.execute("SELECT version_num FROM alembic_version").fetchone())
    except (OSError, sqlite3.DatabaseError):
        to.unlink(missing_ok=True)
        return False


def move_artifacts(database: Path, home: Path, *, own: bool) -> bool:
    """Let a database that was moved or copied keep its artifacts beside itself; returns whether anything changed.

    MLflow stores absolute places, so without this a moved study writes its files to where it was. A place that a user
    chose stays: only a folder called ``mlartifacts`` is changed, and, of a database that is not the study's own
    (``own``), only where that folder is gone.
    """
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        query = "SELECT experiment_id, artifact_location FROM experiments WHERE name = ?"
        found = connection.execute(query, (EXPERIMENT,)).fetchone()
        if found is None:
            return False
        experiment, stored = found
        before = _local_path(stored)
        if before is None or before.name != ARTIFACTS or before == home or (not own and before.exists()):
            return False
        connection.execute(
            "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (home.as_uri(), experiment)
        )
        connection.execute(
            "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
            "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
            (home.as_uri(), len(stored) + 1, experiment, len(stored), stored),
        )
        return True


def connect(uri: str) -> Any:
    """Return an ``MlflowClient``; mlflow is imported without its telemetry, unless the user imported it before."""
    asked = os.environ.get("MLFLOW_DISABLE_TELEMETRY")
    if asked is None and "mlflow" not in sys.modules:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    try:
        from mlflow import MlflowClient

        with quiet(uri):
            return MlflowClient(tracking_uri=uri)
    finally:
        if asked is None:
            os.environ.pop("MLFLOW_DISABLE_TELEMETRY", None)


class _ShortRequests:
    """Requests to a server give up after one retry and 5 s while anybody is inside, unless the user set limits.

    mlflow reads these limits from the environment at every request; they are taken back when the last one leaves.
    """

    limits: ClassVar = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._set: list[str] = []

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            for name, value in self.limits.items():
                if name not in os.environ:
                    os.environ[name] = value
                    self._set.append(name)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for name in self._set:
                    os.environ.pop(name, None)
                self._set.clear()


_short_requests = _ShortRequests()


@contextlib.contextmanager
def quiet(uri: str) -> Iterator[None]:
    """Keep mlflow's loggers silent in this thread, and requests to a server short, while the block runs."""
    thread = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(of_others)
    try:
        with contextlib.nullcontext() if uri.startswith(_SQLITE) else _short_requests:
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(of_others)


def search_runs(client: Any, experiment: str, query: str) -> list[Any]:
    """Return all runs of an experiment that a filter keeps, page by page."""
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs([experiment], query, max_results=1000, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return runs


@dataclass(frozen=True)
class RecordedRun:
    """A trial or training as MLflow has it."""

    run_id: str
    study: str
    trial: int | None
    state: str  # as in TrialRecord; of a training that stands alone COMPLETE, FAIL or RUNNING
    reference: str | None  # the preset that its study compares with
    tags: Mapping[str, str]  # ours, without their prefix
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    points: Sequence[tuple[float, float]]  # training tokens, validation loss


def read_runs(uri: str) -> tuple[list[RecordedRun], str]:
    """Return the trials and trainings that a server or database knows, and its name without a password.

    Raises StudyError where it cannot be read.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    place = f"at {masked(uri)}"
    if uri.startswith(_SQLITE) and not database_path(uri).is_file():
        raise StudyError(f"there is no MLflow database {place}; check uri=", field="uri", got=masked(uri))
    try:
        client = connect(uri)
        with quiet(uri):
            experiment = client.get_experiment_by_name(EXPERIMENT)
            found = [] if experiment is None else search_runs(client, experiment.experiment_id, "")
            curves = {
                run.info.run_id: client.get_metric_history(run.info.run_id, "valid_loss")
                for run in found
                if run.data.tags.get("hybridnas.kind") in ("trial", "train")
            }
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise StudyError(
            f"MLflow {place} cannot be read: {masked(first_line(error))}", field="uri", got=masked(uri)
        ) from None
    references = {
        run.data.tags["hybridnas.study_id"]: run.data.tags["hybridnas.reference"]
        for run in found
        if {"hybridnas.study_id", "hybridnas.reference"} <= set(run.data.tags)
    }
    runs = [_recorded(run, curves.get(run.info.run_id, ()), references) for run in found]
    return [run for run in runs if run is not None], place


def _recorded(run: Any, curve: Sequence[Any], references: Mapping[str, str]) -> RecordedRun | None:
    tags = {
        name.removeprefix("hybridnas."): str(value)
        for name, value in run.data.tags.items()
        if name.startswith("hybridnas.")
    }
    ended = {"FINISHED": COMPLETE, "FAILED": FAIL}
    state = tags.get("state", ended.get(run.info.status, RUNNING))
    if tags.get("kind") not in ("trial", "train") or "superseded" in tags or state in (DUPLICATE, INFEASIBLE):
        return None
    trial = tags.get("trial", "")
    points = sorted(curve, key=lambda metric: metric.timestamp)
    return RecordedRun(
        run_id=run.info.run_id,
        study=tags.get("study", ""),
        trial=int(trial) if trial.isdigit() else None,
        state=RUNNING if run.info.status == "RUNNING" else state,
        reference=references.get(tags.get("study_id", "")) or None,
        tags=tags,
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
        points=[(float(metric.step), float(metric.value)) for metric in points],
    )


def _experiment(client: Any, artifact_location: str | None) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        from mlflow.exceptions import MlflowException

        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=artifact_location))
        except MlflowException:
            found = client.get_experiment_by_name(EXPERIMENT)  # another process made it in between
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise StudyError(
            f"the experiment {EXPERIMENT!r} was deleted in MLflow; bring it back with "
            f"'mlflow experiments restore --experiment-id {found.experiment_id}', or record elsewhere (tracking=URI)",
            field="tracking",
            got="deleted",
            allowed="active",
        )
    return str(found.experiment_id)


def _local_path(location: str) -> Path | None:
    """Return the path of an artifact location on this machine; None for one elsewhere."""
    parts = urlparse(location)
    if parts.scheme not in ("", "file"):
        return None
    path = unquote(parts.path) if parts.scheme else location
    return Path(path[1:] if re.match(r"/[A-Za-z]:", path) else path)


def _key(name: str) -> str:
    """Return a name that MLflow takes for a parameter or metric."""
    return re.sub(r"[^\w\-. /]", "_", name)[:250]
