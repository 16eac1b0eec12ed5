"""The study's mirror in MLflow: one parent run for the study, one child run for each trial.

The only file that imports mlflow. Opening costs seconds (import, schema migration) and every write milliseconds, so all
of it happens on one background thread fed by a queue: training never waits. Whatever the tracking server does wrong
costs one warning, then the mirror is off and the search goes on; ``sync`` makes up for it when the study continues.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import queue
import re
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from hybridnas.study.records import COMPLETE, DUPLICATE, INFEASIBLE, PRUNED, RUNNING, TrialRecord, save
from hybridnas.tracking.secrets import masked

EXPERIMENT = "hybridnas"
STATUS = {COMPLETE: "FINISHED", DUPLICATE: "FINISHED", PRUNED: "KILLED", INFEASIBLE: "FAILED", RUNNING: "RUNNING"}
FLUSH_SECONDS = 60.0  # how long close() waits for what is still in the queue
_CARD = "mlflow.json"  # in the study folder: which study this is, on whatever server
_PARAM_LIMIT = 5000  # characters of a parameter's value; the server refuses more than 6000
_STOP = object()

log = logging.getLogger("hybridnas.tracking")


class Tracker:
    """Mirrors a study into MLflow from a background thread. Its methods return at once and never raise."""

    def __init__(self, uri: str, study_folder: Path, study_name: str, config: Mapping[str, Any], kind: str) -> None:
        self.uri = uri
        self.off = False  # True after the one warning
        self._folder = study_folder.absolute()
        self._name = study_name
        self._config = masked(dict(config))
        self._kind = kind
        self._client: Any = None
        self._experiment = ""
        self._parent = ""
        self._runs: dict[int, tuple[str, str, str]] = {}  # trial number -> run id, fingerprint, state
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._closed = False
        self._id = ""
        self._thread = threading.Thread(target=self._work, name="hybridnas-tracking", daemon=True)

    @classmethod
    def open(
        cls,
        uri: str | None,
        study_folder: Path | str,
        study_name: str,
        config: Mapping[str, Any],
        *,
        kind: str = "study",
    ) -> Tracker:
        """Start mirroring; returns at once. Without a URI the database is ``STUDY/mlflow.db``; ``off``: no mirror.

        The study's parent run is found again by an id kept in the folder, so continuing makes no second one.
        ``kind="train"`` is for a single training run, whose curve goes to the parent itself (number None).
        """
        folder = Path(study_folder)
        tracker = cls(uri or default_uri(folder), folder, study_name, config, kind)
        tracker.off = uri == "off"
        if tracker.off:
            tracker._closed = True
            tracker._opened.set()
            return tracker
        tracker._jobs.put(tracker._open)
        tracker._thread.start()
        atexit.register(tracker.close, "KILLED")
        return tracker

    def ready(self, timeout: float = FLUSH_SECONDS) -> bool:
        """Wait until database, experiment and parent run exist (before workers start); False when tracking is off."""
        self._opened.wait(timeout)
        return self._opened.is_set() and not self.off

    def annotate(self, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Give the parent run parameters and tags: what a single training run (``kind="train"``) trains."""
        flat = flatten(masked(params))
        marks = {f"hybridnas.{key}": str(value) for key, value in tags.items() if value is not None}
        self._post(lambda: self._log(self._parent, {}, 0, flat, marks))

    def start_trial(self, number: int, params: Mapping[str, Any], tags: Mapping[str, Any]) -> None:
        """Open the trial's run, or the one it already has when the same fingerprint is tried again.

        ``params`` may be nested; ``tags`` are short names (pattern, fingerprint, preset) without our prefix.
        """
        flat, marks = flatten(masked(params)), {key: str(value) for key, value in tags.items() if value is not None}
        self._post(lambda: self._start(number, flat, marks))

    def log_eval(self, number: int | None, evaluation: Any, step: int | None = None) -> None:
        """Log one evaluation (an ``Eval`` or a mapping) in one batch, at ``step`` training tokens."""
        values = dict(evaluation) if isinstance(evaluation, Mapping) else dict(vars_of(evaluation))
        at = int(step if step is not None else values.get("tokens", 0))
        metrics = numbers(values)
        self._post(lambda: self._log(self._run_of(number), metrics, at))

    def end_trial(
        self, number: int, state: str, record: TrialRecord | None = None, artifacts: Iterable[Path | str] = ()
    ) -> None:
        """Give the trial's run its last figures and status: PRUNED is KILLED, FAIL is FAILED."""
        paths = [Path(path) for path in artifacts]
        self._post(lambda: self._end(number, state, record, paths))

    def sync(self, records: Iterable[TrialRecord]) -> None:
        """Mirror every finished trial that MLflow lacks or knows only as running: what a kill or an outage lost."""
        kept = [record for record in records if record.state != RUNNING]
        self._post(lambda: self._sync(kept))

    def log_artifacts(self, paths: Iterable[Path | str]) -> None:
        """Attach files (report, leaderboard) to the study's run."""
        kept = [Path(path) for path in paths]
        self._post(lambda: self._attach(self._parent, kept))

    def close(self, status: str = "FINISHED", timeout: float = FLUSH_SECONDS) -> None:
        """Write what is queued, set the study's status (FINISHED, KILLED or FAILED) and stop; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._jobs.put(lambda: self._client.set_terminated(self._parent, status))
        self._jobs.put(_STOP)
        self._thread.join(timeout)
        if self._thread.is_alive() and not self.off:
            self._give_up(f"it did not take what was queued within {timeout:.0f} s")

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = kind is not None and issubclass(kind, KeyboardInterrupt)
        self.close("FINISHED" if kind is None else "KILLED" if interrupted else "FAILED")

    # The thread.

    def _post(self, job: Callable[[], None]) -> None:
        if not (self.off or self._closed):
            self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not _STOP:
            if not self.off:
                try:
                    job()
                except Exception as error:  # any library below may raise anything; none of it may cost a trial
                    self._give_up(first_line(error))
            if job == self._open:
                self._opened.set()

    def _give_up(self, words: str) -> None:
        self.off = True
        log.warning(
            "MLflow tracking at %s is off for the rest of this run: %s; the search goes on, all results are in %s",
            masked(self.uri),
            masked(words),
            self._folder.name,
        )

    def _open(self) -> None:
        make_database(self.uri)
        self._client = connect(self.uri)
        self._experiment = _experiment(self._client, self._artifact_home())
        self._id = self._study_id()
        for run in search_runs(self._client, self._experiment, f"tags.`hybridnas.study_id` = '{self._id}'"):
            tags = run.data.tags
            if tags.get("hybridnas.kind") == self._kind:
                self._parent = run.info.run_id
            elif "hybridnas.superseded" not in tags and tags.get("hybridnas.trial", "").isdigit():
                known = (tags.get("hybridnas.fingerprint", ""), tags.get("hybridnas.state", RUNNING))
                self._runs[int(tags["hybridnas.trial"])] = (run.info.run_id, *known)
        if self._parent:
            self._client.update_run(self._parent, status="RUNNING")
        else:
            tags = {"hybridnas.kind": self._kind, "hybridnas.study": self._name, "hybridnas.study_id": self._id}
            self._parent = self._client.create_run(self._experiment, run_name=self._name, tags=tags).info.run_id
        self._client.log_dict(self._parent, self._config, "config.json")

    def _artifact_home(self) -> str | None:
        """Say where artifacts go: inside the folder for a database, the server's own place for a server."""
        if self.uri == default_uri(self._folder):
            return (self._folder / "mlartifacts").as_uri()
        return None if self.uri.startswith(("http", "databricks")) else (self._folder.parent / "mlartifacts").as_uri()

    def _study_id(self) -> str:
        path = self._folder / _CARD
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["study_id"])
        except (OSError, ValueError, KeyError, TypeError):
            study_id = uuid.uuid4().hex
            save(path, json.dumps({"study_id": study_id, "uri": masked(self.uri)}) + "\n")
            return study_id

    def _start(self, number: int, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        run_id, fingerprint, _ = self._runs.get(number, ("", "", ""))
        if run_id and fingerprint == tags.get("fingerprint", ""):
            self._client.update_run(run_id, status="RUNNING")
            self._runs[number] = (run_id, fingerprint, RUNNING)
            return
        if run_id:
            self._client.set_tag(run_id, "hybridnas.superseded", "true")
        ours = {"kind": "trial", "study": self._name, "study_id": self._id, "trial": str(number), **tags}
        named = {f"hybridnas.{key}": value[:_PARAM_LIMIT] for key, value in ours.items()}
        title = f"{number:04d} {tags.get('preset') or tags.get('pattern', '')}".strip()[:200]
        run = self._client.create_run(
            self._experiment, run_name=title, tags={**named, "mlflow.parentRunId": self._parent}
        )
        self._runs[number] = (run.info.run_id, tags.get("fingerprint", ""), RUNNING)
        self._log(run.info.run_id, {}, 0, params)

    def _run_of(self, number: int | None) -> str:
        return self._parent if number is None else self._runs[number][0]

    def _log(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        step: int,
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, value, now, step) for name, value in metrics.items()],
            params=[Param(name, value[:_PARAM_LIMIT]) for name, value in (params or {}).items()],
            tags=[RunTag(name, value[:_PARAM_LIMIT]) for name, value in (tags or {}).items()],
        )

    def _end(self, number: int, state: str, record: TrialRecord | None, artifacts: list[Path]) -> None:
        run_id, fingerprint, _ = self._runs[number]
        tags: dict[str, str] = {"hybridnas.state": state}
        last: dict[str, Any] = {}
        if record is not None:
            last = {"best_valid_loss": record.valid_loss, "tokens": record.tokens, "seconds": record.seconds}
            last["tokens_per_second"] = record.tokens_per_second
            tags |= {"hybridnas.reason": masked(record.reason)} if record.reason else {}
        self._attach(run_id, artifacts)
        self._log(run_id, numbers(last), record.tokens if record else 0, tags=tags)
        self._client.set_terminated(run_id, STATUS.get(state, "FAILED"))
        self._runs[number] = (run_id, fingerprint, state)

    def _attach(self, run_id: str, paths: Iterable[Path]) -> None:
        for path in paths:
            if path.is_file():
                self._client.log_artifact(run_id, str(path))

    def _sync(self, records: Iterable[TrialRecord]) -> None:
        for record in records:
            known = self._runs.get(record.number)
            if known and known[1:] == (record.fingerprint, record.state):
                continue
            tags = {"pattern": record.pattern, "fingerprint": record.fingerprint, "preset": record.preset}
            self._start(record.number, record_params(record), {key: str(v) for key, v in tags.items() if v is not None})
            run_id = self._runs[record.number][0]
            for entry in record.curve or [{"tokens": tokens, "valid_loss": loss} for tokens, loss in record.points()]:
                self._log(run_id, numbers(entry), int(entry.get("tokens", 0)))
            self._end(record.number, record.state, record, [])


def record_params(record: TrialRecord) -> dict[str, str]:
    """Return the parameters that MLflow shows of a trial: its architecture, costs, choices and seed."""
    own = {"pattern": record.pattern, "fingerprint": record.fingerprint, "seed": record.seed, "preset": record.preset}
    return flatten(masked({**own, **record.cost, "choices": dict(record.choices)}))


def default_uri(study_folder: Path | str) -> str:
    """Return the study's own database: ``sqlite:///`` and the absolute path of ``mlflow.db`` in its folder."""
    return f"sqlite:///{(Path(study_folder).absolute() / 'mlflow.db').as_posix()}"


def make_database(uri: str) -> None:
    """Make an sqlite file whole or not at all: MLflow cannot go on with tables that a killed process began."""
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.exists():
        begun = path.with_name(f".{path.stem}.new.db")
        begun.unlink(missing_ok=True)
        connect(f"sqlite:///{begun.as_posix()}").search_experiments(max_results=1)
        begun.replace(path)


def connect(uri: str) -> Any:
    """Return an ``MlflowClient`` that gives up soon, says nothing, and reports to nobody but the given server."""
    quiet = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)  # what the user set stays
    for name in ("mlflow.store.db.utils", "mlflow.store.db_migrations", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is said once, by us
    for library in ("mlflow", "sqlalchemy", "alembic", "pydantic"):
        # Their quarrels with each other's versions are no news for our user, nor a reason to fail under -W error.
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def first_line(error: BaseException) -> str:
    """Return what an error says in one line, or its type where it says nothing."""
    cause = re.search(r"Caused by (\w+)", str(error))
    if cause:
        return f"the server gave no answer ({cause[1]})"
    lines = str(error).strip().splitlines()
    return lines[0][:300].rstrip(".") if lines else type(error).__name__


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values as ``{"a.b": "text"}``; None is left out, as an absent parameter."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = _metric_name(f"{prefix}{key}")
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        elif value is not None:
            flat[name] = str(value)
    return flat


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in an evaluation, mappings flattened with dots; of a vector its least and its greatest."""
    found: dict[str, float] = {}
    for key, value in values.items():
        name = _metric_name(f"{prefix}{key}")
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, Mapping):
            found.update(numbers(value, f"{name}."))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[name] = float(value)
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, (int, float)) for item in value):
            found.update({f"{name}.min": float(min(value)), f"{name}.max": float(max(value))})
    return found


def vars_of(evaluation: Any) -> Mapping[str, Any]:
    """Return the fields of a NamedTuple or a dataclass."""
    if hasattr(evaluation, "_asdict"):
        return dict(evaluation._asdict())
    return {name: getattr(evaluation, name) for name in evaluation.__dataclass_fields__}


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)[:250]


def _experiment(client: Any, artifact_home: str | None) -> str:
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=artifact_home))
        except Exception:
            found = client.get_experiment_by_name(EXPERIMENT)  # another process made it in between
            if found is None:
                raise
    return str(found.experiment_id)


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
