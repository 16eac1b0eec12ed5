"""The search itself: open or resume the study, draw and train until it is done, confirm, export the winner.

It writes records; whatever else a search leaves (leaderboard, report, MLflow, lines in a terminal) is the work of
callbacks, see :mod:`hybridnas.study.callbacks`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.analysis.limits import stated
from hybridnas.analysis.ranking import winner
from hybridnas.arch.arch import Arch
from hybridnas.errors import StudyError
from hybridnas.hardware import describe_machine
from hybridnas.search.config import SearchConfig
from hybridnas.search.dashboard import JournalExport
from hybridnas.search.forecast import Forecast, forecast
from hybridnas.search.history import History
from hybridnas.search.latency import Setting
from hybridnas.search.loop import Listener, Loop
from hybridnas.search.session import Session, Settings, open_session
from hybridnas.study.callbacks import (
    COMPLETED,
    FAILED,
    INTERRUPTED,
    Callbacks,
    StudyCallback,
    StudyEnded,
    StudyStarted,
    TrialEnded,
    TrialMeasured,
    TrialStarted,
)
from hybridnas.study.folder import REPORT
from hybridnas.study.records import ARCH, RUNNING, TrialRecord
from hybridnas.train.callbacks import Callback

if TYPE_CHECKING:
    from hybridnas.search.confirm import Ahead
    from hybridnas.search.training import Wanted
    from hybridnas.study.records import StudyMeta

log = logging.getLogger("hybridnas.search")


@dataclass
class SearchSummary:
    """What a search call did: all records so far, the best of them, where everything lies, and why it ended."""

    records: list[TrialRecord] = field(repr=False)  # a notebook shows the summary, not every curve
    best: TrialRecord | None
    folder: Path
    exported: Path | None
    report: Path | None  # None: other workers go on, and the last one writes it; or no callback writes one
    ended: str  # completed | time | tokens | exhausted | interrupted
    seconds: float
    reference: str | None = None  # the preset that losses are compared with; None: none
    meta: StudyMeta | None = field(default=None, repr=False)  # of the study; None: not known


class Search:
    """One call of a search; :meth:`run` in the same or another process goes on where the study stands."""

    def __init__(
        self,
        config: SearchConfig,
        callbacks: Sequence[StudyCallback] = (),
        *,
        training: Sequence[Callback] = (),
        reference_callbacks: Sequence[StudyCallback] = (),
    ) -> None:
        """``callbacks`` get the search's events, ``training`` watch every training of this process.

        ``reference_callbacks`` get the events of the search that ``against=random`` runs.

        Raises ConfigError before a folder is made.
        """
        self.settings = Settings.of(config)
        self.config = self.settings.config
        self._given = tuple(callbacks)
        self.callbacks = Callbacks(self._given)
        self.training = tuple(training)
        self._reference_callbacks = tuple(reference_callbacks)
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since this call began."""
        return time.monotonic() - self.started

    def run(self) -> SearchSummary:
        """Search until the budget's trials are finished or its minutes are up; Ctrl-C ends it with what there is.

        Raises StudyError for a folder that is busy, damaged, of another study, or on a disk that refuses.
        """
        self.started = time.monotonic()
        try:
            with open_session(
                self.settings, elapsed=lambda: self.elapsed, note=self.callbacks.on_note, callbacks=self.training
            ) as session:
                return self._run(session)
        except OSError as error:
            folder = Path(self.config.runs).expanduser() / self.config.name
            raise StudyError(
                f"study folder {folder}: {error.filename or 'a file'} cannot be written or read "
                f"({error.strerror or error}); free space or change permissions and run the same command again, "
                f"nothing already recorded is lost",
                field="runs",
                got=str(error.filename or folder),
            ) from error

    def _run(self, session: Session) -> SearchSummary:
        folder = session.folder.path
        callbacks = self.callbacks = Callbacks([*self._given, _Log(), JournalExport(session.plan)])
        listener = _Emitter(callbacks, folder)
        loop = Loop(session.plan, session.store, session.trainer, listener, elapsed=lambda: self.elapsed)
        expected = self._expected(session, loop.history)  # before MLflow is imported beside it, which takes seconds
        callbacks.on_study_start(
            StudyStarted(
                folder=folder,
                meta=session.meta,
                identity=session.identity,
                records=shown(loop.history),
                tracking=self._tracking(),
                tracking_experiment=self.config.tracking_experiment,
            )
        )
        ended, last, exported = FAILED, True, None
        try:
            self._announce(session, loop.history, expected)
            try:
                ended = self._search(session, loop)
            except KeyboardInterrupt:
                ended = INTERRUPTED
                callbacks.on_note(
                    "stopping: writing the report of what is finished; the same command goes on from here"
                )
            last = self.config.worker == "off" or session.folder.alone()
            if last:
                ended = self._confirm(session, loop, ended)
                exported = self._export(session, loop.history)
        except BaseException:
            self._end(session, loop.history, FAILED, last, quietly=True)
            raise
        meta = self._end(session, loop.history, ended, last)
        records = shown(loop.history)
        report = folder / REPORT
        return SearchSummary(
            records,
            winner(records),
            folder,
            exported,
            report if last and report.is_file() else None,
            ended,
            self.elapsed,
            meta.reference,
            meta,
        )

    def _search(self, session: Session, loop: Loop) -> str:
        count = self._trainers(session)
        if count == 1:
            return loop.run()
        from hybridnas.search.workers.supervisor import Supervisor

        return Supervisor(session, loop, self.callbacks, elapsed=self.elapsed, count=count).run()

    def _trainers(self, session: Session) -> int:
        """Return in how many processes trials train; one where nothing else was asked for and callbacks watch it."""
        here = bool(self.training) or session.on_table
        return 1 if here and self.config.workers is None else self.config.trainers

    def _train_ahead(self, session: Session, loop: Loop) -> Ahead | None:
        """Return what trains a confirmation's runs in several processes; None where one process trains them."""
        count = 1 if self.training and self.config.confirm_workers is None else session.config.confirmers
        if count == 1:
            return None
        from hybridnas.search.workers.supervisor import Supervisor

        def ahead(again: Sequence[Wanted]) -> None:
            few = min(count, len(again))
            Supervisor(session, loop, self.callbacks, elapsed=self.elapsed, count=few, again=again).run()

        return ahead

    def _confirm(self, session: Session, loop: Loop, ended: str) -> str:
        """Train the best, the presets and the reference study's best with fresh seeds, where that was asked for."""
        if ended == INTERRUPTED or session.on_table:
            return ended
        from hybridnas.search.confirm import confirm
        from hybridnas.search.reference import confirm_reference_study, find_reference_study

        records = shown(loop.history)

        def save(record: TrialRecord) -> None:
            session.store.save(record)
            loop.history.put(record)

        try:
            reference = find_reference_study(session, records, self._search_too, self.callbacks.on_note)
            if self.config.budget.confirm == "on" and winner(records) is not None:
                confirm(session, records, save, self.callbacks.on_note, self._train_ahead(session, loop))
                if reference is not None:
                    confirm_reference_study(session, loop.history.values(), reference, self.callbacks.on_note)
        except KeyboardInterrupt:
            self.callbacks.on_note("stopping: the same command goes on with the confirmation")
            return INTERRUPTED
        return ended

    def _search_too(self, config: SearchConfig) -> None:
        """Run the search of a reference study."""
        Search(config, [_Notes(self.callbacks), *self._reference_callbacks], training=self.training).run()

    def _export(self, session: Session, history: History) -> Path | None:
        """Write the winner's weights and card into ``STUDY/best``."""
        best = winner(shown(history))
        if best is None or session.on_table:
            return None
        from hybridnas.export.folder import export
        from hybridnas.export.trials import card_facts
        from hybridnas.train.checkpoint import NEWEST, load_model

        folder = session.folder.trial(best.number)
        if self.config.storage is not None and not (folder / NEWEST).exists():
            asked = (f"study={session.folder.name}", f"runs={self.config.runs}", f"trial={best.number}")
            again = shlex.join(["python", "-m", "hybridnas.replay", *asked])
            self.callbacks.on_note(
                f"the winner was trained in another folder, where its weights are; to have them here: {again}"
            )
            return None
        card = card_facts(best, session.folder.name, self.config)
        return export(load_model(folder), session.folder.path / "best", source=session.source, card=card)

    def _end(self, session: Session, history: History, ended: str, last: bool, *, quietly: bool = False) -> StudyMeta:
        meta = dataclasses.replace(
            session.meta,
            seconds=self.elapsed,
            status="interrupted" if ended in (INTERRUPTED, FAILED) else COMPLETED,
            notes=tuple(getattr(session.store, "warnings", ())),
        )
        if last:
            session.folder.keep(meta=dataclasses.asdict(meta))
        event = StudyEnded(
            folder=session.folder.path, meta=meta, records=shown(history), ended=ended, last=last and ended != FAILED
        )
        try:
            self.callbacks.on_study_end(event)
        except Exception:
            if not quietly:
                raise
            log.exception("a callback failed after the search had failed")
        return meta

    def _tracking(self) -> str | None:
        """Return where to track: workers beside each other write no sqlite file, only to a server that was named."""
        return self.config.tracking if self.config.worker == "off" or self.config.tracking else "off"

    def _expected(self, session: Session, history: History) -> Forecast | None:
        """Return what the search will come to by this machine's speed; None for one that goes on, and for a table."""
        if session.on_table or history:
            return None
        workers = self._trainers(session)
        return forecast(session.plan, self.config.budget, history, workers=workers, confirmers=self.config.confirmers)

    def _announce(self, session: Session, history: History, expected: Forecast | None) -> None:
        budget, plan, note = self.config.budget, session.plan, self.callbacks.on_note
        for warning in getattr(session.store, "warnings", ()):
            note(f"warning: {warning}")
        note(f"study {session.folder.name} in {session.folder.path}, {describe_machine()}")
        note(f"data: {session.source.describe()}")
        note(
            f"every candidate has {session.target:,} active parameters and trains for {plan.rungs[-1]:,} tokens "
            f"({plan.rungs[-1] / session.target:.0f} per active parameter), d_model {budget.d_model}, "
            f"{budget.depth} sub-layers"
        )
        if repeated := session.source.repeated(plan.rungs[-1]):
            note(repeated)
        if self.config.limits:
            said = [stated(name, bound, self.config.state_length) for name, bound in self.config.limits.items()]
            note(f"limits: {', '.join(said)}")
        if self.config.hardware:
            setting = Setting.of(self.config)
            note("measured here: " + "; ".join(f"{name} of {setting.words(name)}" for name in setting.figures))
        if session.share is not None:
            note(str(session.share))
        if expected is not None:
            note(str(expected))
        if history:
            note(f"resuming: {history.finished} of {budget.n_trials} trials finished")


class _Emitter(Listener):
    """Hands the events of the loop to the callbacks."""

    def __init__(self, callbacks: StudyCallback, folder: Path) -> None:
        self.callbacks, self.folder = callbacks, folder

    def started(self, record: TrialRecord, tokens: int, why: str) -> None:
        self.callbacks.on_trial_start(TrialStarted(record=record, tokens=tokens, why=why))

    def measured(self, number: int, values: dict[str, Any]) -> None:
        self.callbacks.on_trial_eval(TrialMeasured(number=number, values=values))

    def ended(self, record: TrialRecord, history: History) -> None:
        self.callbacks.on_trial_end(TrialEnded(record=record, records=history, folder=self.folder))

    def note(self, text: str) -> None:
        self.callbacks.on_note(text)


class _Log(StudyCallback):
    """Writes the notes of a search, and one line for each trial, to the logger ``hybridnas.search``."""

    def on_trial_end(self, event: TrialEnded) -> None:
        record = event.record
        log.info("trial %d %s: %s %s", record.number, record.name, record.state, dict(record.objectives))

    def on_note(self, text: str) -> None:
        log.info(text)


class _Notes(StudyCallback):
    """Passes on the notes of a search within a search."""

    def __init__(self, callbacks: StudyCallback) -> None:
        self.callbacks = callbacks

    def on_note(self, text: str) -> None:
        self.callbacks.on_note(text)


def shown(history: History) -> list[TrialRecord]:
    """Return the records that have something to show: all but those that train for the first time."""
    return [record for record in history.ordered() if record.state != RUNNING or record.rungs]


def rebuild(study: Path, number: int) -> Arch:
    """Return the architecture of a study's trial; raises StudyError when there is no such trial."""
    path = study / "trials" / f"{number:04d}" / ARCH
    if not path.is_file():
        have = sorted(int(p.parent.name) for p in (study / "trials").glob(f"*/{ARCH}"))
        raise StudyError(
            f"study {study} has no trained trial {number}; trained: {', '.join(map(str, have)) or 'none'}",
            field="trial",
            got=number,
            allowed=have,
        )
    return Arch.from_dict(json.loads(path.read_text()))
