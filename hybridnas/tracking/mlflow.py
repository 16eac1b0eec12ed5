"""MLflow as a tracker: one parent run for the study, one child run for each trial.

The only file that imports mlflow. A study's database is ``STUDY/mlflow.db`` unless another URI is named; its artifacts
lie in ``mlartifacts`` beside the database and move with it. The winner is a logged model of MLflow without any pickle:
the exported folder, and ``hybridnas.export.pyfunc`` as the module that loads it.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlparse

from hybridnas.errors import StudyError
from hybridnas.files import cache_home, write_atomic
from hybridnas.study.records import COMPLETE, DUPLICATE, FAIL, INFEASIBLE, PRUNED, RUNNING, save
from hybridnas.tracking.secrets import masked
from hybridnas.tracking.tracker import FINISHED, KILLED, BackgroundTracker, Data, RunFacts, first_line

EXPERIMENT = "hybridnas"  # the experiment of all studies, unless another name is given
SHARED = "shared"  # instead of a URI: one database for all studies of a folder, beside them
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
# Where MLflow stores absolute places of artifacts: table, column.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
)
# Tags that MLflow has names for; all others are hybridnas.NAME.
_TAGS = {
    "description": "mlflow.note.content",
    "source": "mlflow.source.name",
    "git_commit": "mlflow.source.git.commit",
    "user": "mlflow.user",
}
# Loggers that report on their own what BackgroundTracker reports in one warning, or that a database was made.
_LOGGERS = ("mlflow.store.db.utils", "mlflow.store.db_migrations", "alembic.runtime.migration")


def open_tracker(
    uri: str | None,
    folder: Path | str,
    name: str,
    config: Mapping[str, Any],
    *,
    kind: str = "study",
    experiment: str = EXPERIMENT,
) -> BackgroundTracker:
    """Start recording a study or a training in MLflow; returns at once.

    Without a URI the database is ``mlflow.db`` in ``folder``, with ``shared`` in the folder above it; ``off`` records
    nothing. ``kind="train"`` is for a training that stands alone, whose curve goes to its own run (number None). The
    run is found again by an id kept in the folder, so continuing makes no second one.
    """
    folder = Path(folder)
    if uri == "off":
        return BackgroundTracker(None, name)
    uri = default_uri(folder.absolute().parent) if uri == SHARED else uri or default_uri(folder)
    return BackgroundTracker(MLflowTracker(uri, folder, name, config, kind, experiment), name)


class MLflowTracker:
    """Records a study in an MLflow server or database, see :class:`hybridnas.tracking.tracker.Tracker`."""

    def __init__(
        self,
        uri: str,
        folder: Path,
        name: str,
        config: Mapping[str, Any],
        kind: str = "study",
        experiment: str = EXPERIMENT,
    ) -> None:
        self.uri = uri
        self._folder = folder.absolute()
        self._name = name
        self._config = masked(dict(config))
        self._kind = kind
        self._named = experiment
        self._client: Any = None
        self._experiment = ""
        self._id = ""
        self._runs: dict[int | None, str] = {}  # trial number (None: the study) -> run id
        self._states: dict[int, tuple[str, str]] = {}  # trial number -> fingerprint, state
        self._logged: dict[str, int] = {}  # run id -> training tokens up to which it has measurements
        self._best: dict[str, set[tuple[int, float]]] = {}  # metric of the study's own run -> what it has of it

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
            self._experiment = _experiment(self._client, self._named, home.as_uri() if home else None)
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

    def start(self, number: int | None, facts: RunFacts) -> None:
        """Make a run, or go on with the one there is; a trial of another architecture gets a new one."""
        with quiet(self.uri):
            run_id = self._runs.get(number, "")
            if number is not None:
                fingerprint = facts.tags.get("fingerprint", "")
                if run_id and self._states[number][0] != fingerprint:
                    self._client.set_tag(run_id, "hybridnas.superseded", "true")
                    run_id = ""
                self._states[number] = (fingerprint, RUNNING)
            known: Mapping[str, str] = {}
            if not run_id:
                run_id = self._runs[number] = self._make(number, facts)
                self._logged[run_id] = -1
            else:
                self._client.update_run(run_id, status="RUNNING")
                known = self._client.get_run(run_id).data.params
            if run_id not in self._logged:
                points = self._client.get_metric_history(run_id, "valid_loss")
                self._logged[run_id] = max((point.step for point in points), default=-1)
            self._batch(run_id, params=_new(facts.params, known), tags=facts.tags)
            if number is None:
                self._client.log_dict(run_id, self._config, "config.json")

    def log(self, number: int | None, metrics: Mapping[str, float], step: int, at: float) -> None:
        """Record metrics at a count of training tokens; a measurement that the run has is not repeated."""
        run_id = self._runs[number]
        measured = "valid_loss" in metrics
        if measured and step <= self._logged[run_id]:
            return
        with quiet(self.uri):
            if number is None and self._kind == "study":
                metrics = {name: value for name, value in metrics.items() if self._is_new(run_id, name, step, value)}
            self._batch(run_id, metrics, step, at)
        if measured:
            self._logged[run_id] = step

    def end(self, number: int | None, state: str, facts: RunFacts) -> None:
        """End a run: PRUNED is KILLED, FAIL and INFEASIBLE are FAILED."""
        run_id = self._runs[number]
        with quiet(self.uri):
            known = self._client.get_run(run_id).data.params if facts.params else {}
            self._batch(run_id, params=_new(facts.params, known), tags=facts.tags)
            self._client.set_terminated(run_id, STATUS.get(state, "FAILED"), end_time=int(facts.at * 1000))
        if number is not None:
            self._states[number] = (self._states[number][0], state)

    def attach(self, number: int | None, path: Path) -> None:
        """Keep a copy of a file as the run's artifact, of an exported folder as its logged model."""
        with quiet(self.uri):
            if path.is_dir():
                self._log_model(self._runs[number], path)
            else:
                self._client.log_artifact(self._runs[number], str(path))

    def _make(self, number: int | None, facts: RunFacts) -> str:
        kind = self._kind if number is None else "trial"
        tags = {"hybridnas.kind": kind, "hybridnas.study": self._name, "hybridnas.study_id": self._id}
        tags["mlflow.source.type"] = "LOCAL"
        if number is not None:
            tags |= {"hybridnas.trial": str(number), "mlflow.parentRunId": self._runs[None]}
        at = int(facts.at * 1000) if facts.at else None
        made = self._client.create_run(self._experiment, start_time=at, run_name=facts.title[:200], tags=tags)
        if facts.data is not None:
            self._client.log_inputs(made.info.run_id, datasets=[_dataset(facts.data)])
        return str(made.info.run_id)

    def _is_new(self, run_id: str, name: str, step: int, value: float) -> bool:
        """Whether the study's own run lacks a point of a metric; it is counted as recorded from now on."""
        if name not in self._best:
            points = self._client.get_metric_history(run_id, _key(name))
            self._best[name] = {(point.step, point.value) for point in points}
        new = (step, value) not in self._best[name]
        self._best[name].add((step, value))
        return new

    def _batch(
        self,
        run_id: str,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        at: float = 0.0,
        *,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if not (metrics or params or tags):
            return
        self._client.log_batch(
            run_id,
            metrics=[Metric(_key(name), value, int(at * 1000), step) for name, value in (metrics or {}).items()],
            params=[Param(_key(name), value[:_LIMIT]) for name, value in (params or {}).items()],
            tags=[RunTag(_TAGS.get(name, f"hybridnas.{name}"), value[:_LIMIT]) for name, value in (tags or {}).items()],
        )

    def _log_model(self, run_id: str, folder: Path) -> None:
        """Log an exported folder as a model of MLflow, once for the same weights."""
        from mlflow.entities import LoggedModelOutput

        digest = _digest([folder / "config.json", *sorted(folder.glob("*.safetensors"))])
        run = self._client.get_run(run_id)
        if run.data.tags.get("hybridnas.model_digest") == digest:
            return
        made = self._client.create_logged_model(
            self._experiment, name=_model_name(self._name), source_run_id=run_id, tags={"hybridnas.study": self._name}
        )
        with tempfile.TemporaryDirectory() as temporary:
            write_model(Path(temporary), folder, run_id=run_id, model_id=made.model_id)
            self._client.log_model_artifacts(made.model_id, temporary)
        self._client.finalize_logged_model(made.model_id, "READY")
        self._client.log_outputs(run_id, [LoggedModelOutput(made.model_id, 0)])
        self._batch(run_id, tags={"model_digest": digest})

    def _own_id(self) -> str:
        path = self._folder / _CARD
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["study_id"])
        except (OSError, ValueError, KeyError, TypeError):
            study_id = uuid.uuid4().hex
            save(path, json.dumps({"study_id": study_id}) + "\n")
            return study_id


def write_model(path: Path, folder: Path, *, run_id: str | None = None, model_id: str | None = None) -> None:
    """Write an exported folder as a model that ``mlflow.pyfunc.load_model`` reads, into the folder ``path``.

    Texts go in and texts come out, of a model without a tokenizer ids and logits. There is no pickle and no code in it:
    ``hybridnas`` has to be installed where it is loaded.
    """
    import numpy
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    shutil.copytree(folder, path / "model", ignore=shutil.ignore_patterns(".*"))
    if (folder / "tokenizer.json").is_file():
        signature = ModelSignature(
            inputs=Schema([ColSpec(DataType.string)]),
            outputs=Schema([ColSpec(DataType.string)]),
            params=ParamSchema(
                [
                    ParamSpec("max_new_tokens", DataType.long, 64),
                    ParamSpec("temperature", DataType.double, 1.0),
                    ParamSpec("top_p", DataType.double, 1.0),
                    ParamSpec("seed", DataType.long, 0),
                ]
            ),
        )
    else:
        signature = ModelSignature(
            inputs=Schema([TensorSpec(numpy.dtype("int64"), (-1, -1), "ids")]),
            outputs=Schema([TensorSpec(numpy.dtype("float32"), (-1, -1, -1), "logits")]),
        )
    model = Model(artifact_path="model", run_id=run_id, model_id=model_id, signature=signature)
    python = ".".join(map(str, sys.version_info[:3]))
    needs = [f"hybridnas=={_version('hybridnas')}", f"torch=={_version('torch').partition('+')[0]}"]
    environment = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    model.add_flavor(
        "python_function",
        loader_module="hybridnas.export.pyfunc",
        python_version=python,
        data="model",
        env={"virtualenv": "python_env.yaml"},
    )
    save(path / "requirements.txt", "\n".join(needs) + "\n")
    save(path / "python_env.yaml", json.dumps(environment, indent=1) + "\n")
    model.save(str(path / "MLmodel"))


def _digest(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of files, one after the other."""
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _model_name(study: str) -> str:
    """Return a study's name as MLflow takes it for a model."""
    return re.sub(r"[/:.%\"']", "_", study)


def _dataset(data: Data) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    settings = json.dumps(masked(dict(data.settings)), default=str)
    entity = Dataset(
        name=data.name[:500],
        digest=data.fingerprint[:32] or hashlib.sha256(settings.encode()).hexdigest()[:32],
        source_type="local",
        source=settings,
        profile=json.dumps({"description": masked(data.words)}),
    )
    return DatasetInput(entity, [InputTag("mlflow.data.context", "training")])


def _new(params: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters that a run lacks: MLflow changes none."""
    return {name: value for name, value in params.items() if _key(name) not in known}


def standing_tags(command: str) -> dict[str, str]:
    """Return the tags ``source``, ``user`` and ``git_commit`` of this process, each where it is known."""
    found = {"source": command}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user without a name, as in some containers
        found["user"] = getpass.getuser()
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # no git
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
        found["git_commit"] = done.stdout.strip() if done.returncode == 0 else ""
    return {name: text for name, text in found.items() if text}


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
    moved = False
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        stored = connection.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall()
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for experiment, place in stored:
            before = _local_path(place or "")
            if before is None or before.name != ARTIFACTS or before == home or (not own and before.exists()):
                continue
            moved = True
            for table, column in _PLACES:
                if table in tables:
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE experiment_id = ? AND substr({column}, 1, ?) = ?",
                        (home.as_uri(), len(place) + 1, experiment, len(place), place),
                    )
    return moved


def rehome(folder: Path) -> bool:
    """Let the database of a study folder that was moved or copied find its artifacts; returns whether it had moved.

    Needs no MLflow. A folder without a database, or that nobody may write to, stays as it is.
    """
    database = folder.absolute() / "mlflow.db"
    if not database.is_file():
        return False
    try:
        return move_artifacts(database, database.parent / ARTIFACTS, own=True)
    except sqlite3.Error:
        return False


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


def search_runs(client: Any, experiments: str | list[str], query: str) -> list[Any]:
    """Return all runs of an experiment, or of several, that a filter keeps, page by page."""
    asked = [experiments] if isinstance(experiments, str) else experiments
    runs: list[Any] = []
    token = None
    while True:
        page = client.search_runs(asked, query, max_results=1000, page_token=token)
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
            experiments = [experiment.experiment_id for experiment in client.search_experiments()]
            found = search_runs(client, experiments, "tags.`hybridnas.kind` != ''")
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


def _experiment(client: Any, name: str, artifact_location: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        from mlflow.exceptions import MlflowException

        try:
            return str(client.create_experiment(name, artifact_location=artifact_location))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process made it in between
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise StudyError(
            f"the experiment {name!r} was deleted in MLflow; bring it back with "
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
