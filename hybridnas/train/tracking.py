"""Tracking of a training as a callback: parameters at its start, every measurement, and how it ended."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from hybridnas.study.records import COMPLETE, FAIL, PRUNED
from hybridnas.tracking.mlflow import EXPERIMENT, open_tracker, standing_tags
from hybridnas.tracking.secrets import masked
from hybridnas.tracking.tracker import FAILED, FINISHED, KILLED, BackgroundTracker, Data, Tracker
from hybridnas.train.callbacks import Action, Callback, Run
from hybridnas.train.records import Eval, TrainResult

TEXT = "Charts: Step, the x axis, is training tokens."


class Tracking(Callback):
    """Records a training: in MLflow at ``uri``, or in a tracker of your own.

    Without either, in ``mlflow.db`` of the training's folder; ``uri="off"`` records nothing. The tracker is touched
    when the training has been accepted and begins, so a refused one leaves no trace in it. ``tags`` are short texts to
    find the run by, such as its preset; ``params`` are shown beside the training's own settings. With ``number``, the
    training is one of several in a :class:`BackgroundTracker` that somebody else closes. ``experiment`` is MLflow's.
    """

    def __init__(
        self,
        uri: str | None = None,
        *,
        tracker: Tracker | BackgroundTracker | None = None,
        name: str | None = None,
        number: int | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        experiment: str = EXPERIMENT,
    ) -> None:
        self._uri = uri
        self._experiment = experiment
        self._given = tracker
        self._name = name
        self._number = number
        self._params = dict(params or {})
        self._tags = dict(tags or {})
        self._tracker: BackgroundTracker | None = None

    def on_start(self, run: Run) -> None:
        """Open the run and record what it trains."""
        self._tracker = self._open(run)
        params, tags = run.config.to_dict(), self._tags
        if run.arch is not None:
            named = {"pattern": str(run.arch.pattern), "fingerprint": run.arch.fingerprint()}
            cost = asdict(run.arch.cost(run.config.seq_len))
            sizes = {"d_model": run.arch.d_model, "vocab_size": run.arch.vocab_size, **run.arch.to_dict()["blocks"]}
            params, tags = {**named, **sizes, **cost, **params}, {**named, **tags}
        settings = run.source.config.to_dict() if run.source.config is not None else {}
        data = Data(
            name=str(settings.get("kind", "data")),
            fingerprint=run.source.fingerprint,
            words=run.source.describe(),
            settings=settings,
        )
        params = {**params, "data": data.name, "data_fingerprint": data.fingerprint, **self._params, **self._tags}
        if self._number is None:
            command = shlex.join(["python", "-m", "hybridnas.train", *sys.argv[1:]]) if _is_command() else ""
            about = {**standing_tags(str(masked(command)) or Path(sys.argv[0]).name), "description": TEXT}
            self._tracker.annotate(params, {**about, **tags}, data)
        else:
            self._tracker.start_trial(self._number, params, tags, data)

    def on_eval(self, run: Run, evaluation: Eval) -> Action:
        """Record a measurement."""
        if self._tracker is not None:
            self._tracker.log_eval(self._number, asdict(evaluation))
        return Action.CONTINUE

    def on_end(self, run: Run, result: TrainResult) -> None:
        """End the run: one that may go on later is KILLED, in MLflow's words."""
        failed = result.status == "failed"
        if self._tracker is not None and self._number is not None:
            self._tracker.end_trial(self._number, FAIL if failed else COMPLETE if result.final else PRUNED)
        self.close(FAILED if failed else FINISHED if result.final else KILLED)

    def close(self, status: str = KILLED) -> None:
        """End the run where on_end was not reached (Ctrl-C, an error); else the end of the process does."""
        if self._tracker is not None and not isinstance(self._given, BackgroundTracker):
            self._tracker.close(status)
        self._tracker = None

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(KILLED if kind is not None and issubclass(kind, KeyboardInterrupt) else FAILED)

    def _open(self, run: Run) -> BackgroundTracker:
        if isinstance(self._given, BackgroundTracker):
            return self._given
        folder = run.folder or Path("runs/training")
        name = self._name or folder.name
        if self._given is not None:
            return BackgroundTracker(self._given, name)
        return open_tracker(self._uri, folder, name, run.config.to_dict(), kind="train", experiment=self._experiment)


def _is_command() -> bool:
    """Whether this process is ``python -m hybridnas.train``."""
    return Path(sys.argv[0]).parts[-3:] == ("hybridnas", "train", "__main__.py")
