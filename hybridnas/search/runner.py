"""The search itself: open or resume the study, draw and train until it is done, report, export the winner."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.analysis.ranking import winner
from hybridnas.arch.arch import Arch
from hybridnas.arch.presets import DEFAULT_REFERENCE
from hybridnas.data import source_config
from hybridnas.errors import MatchError, StudyError, TrainingError
from hybridnas.hardware import describe_machine, pick_device
from hybridnas.report.console import trial_line
from hybridnas.report.leaderboard import write_leaderboard
from hybridnas.report.live import LiveReport
from hybridnas.search.config import SearchConfig
from hybridnas.search.pruning.promotion import FROM_TOKENS, busy, candidate_of, continues, promote
from hybridnas.search.session import opened
from hybridnas.search.storage.leases import Crew, Earlier, TrialLostError
from hybridnas.search.trial import TrialContext, TrialRun
from hybridnas.search_spaces.space import Space
from hybridnas.study.folder import StudyFolder
from hybridnas.study.objectives import eligible, score
from hybridnas.study.records import (
    COMPLETE,
    FAIL,
    INFEASIBLE,
    PRUNED,
    StudyMeta,
    TrialRecord,
    reference_of,
    trained_tokens,
    write_record,
)
from hybridnas.tabular.table import TableSource, on_table

if TYPE_CHECKING:
    import optuna

    from hybridnas.search.workers.supervisor import Orders

MAX_DRAWS_PER_TRIAL = 20  # duplicates and infeasible draws cost nothing, but a space can be exhausted
HOPELESS = 5  # so many trials without any that trained end the search
WAIT_SECONDS = 0.2  # between looks at what other workers have finished
KEPT_CHECKPOINTS = 3  # of the best trials besides the baselines; others come back through replay


@dataclass
class SearchSummary:
    """What a search call did: all records so far, the best of them, where everything lies, and why it ended."""

    records: list[TrialRecord]
    best: TrialRecord | None
    folder: Path
    exported: Path | None
    report: Path | None  # None: other workers go on, and the last one writes it
    ended: str  # completed | time | tokens | exhausted | interrupted
    seconds: float
    reference: str | None = DEFAULT_REFERENCE  # the preset that losses are compared with; None: none


class Search:
    """One call of a search; :meth:`run` may be called again by another process to go on."""

    def __init__(self, config: SearchConfig, news: Callable[[str], None] | None = None) -> None:
        self.config = config
        self.news = news or (lambda text: None)
        self.space = Space.from_mapping(config.space)
        self.table: TableSource | None = None
        if self.space.table:
            config, self.table = on_table(config, self.space)
        self.source_config = source_config(config.data)  # every setting is checked before a folder is made
        seq_len = self.source_config.own_seq_len or config.budget.seq_len  # a task's examples have their own length
        self.config = config.replace(budget=config.budget.replace(seq_len=seq_len))
        pick_device(config.device)
        self.folder = StudyFolder(Path(config.runs), config.name)
        self.crew = Crew(self.folder.path)
        self.orders: Orders | None = None  # of the command whose worker this is
        self.started = time.monotonic()
        self.records: dict[int, TrialRecord] = {}
        self.warnings: list[str] = []
        self.page: LiveReport | None = None
        self.reference = reference_of({"identity": {"space": config.space}})

    def run(self) -> SearchSummary:
        """Search until the budget's trials are finished or its minutes are up; Ctrl-C ends it with what there is.

        Raises StudyError for a folder that is busy, damaged, of another study, or on a disk that refuses.
        """
        try:
            with opened(self) as (study, context, meta):
                self._announce(context)
                self.page = LiveReport(self.folder.path, meta)
                ended = "interrupted"
                try:
                    ended = self._search(study, context)
                except KeyboardInterrupt:
                    self.news("stopping: writing the report of what is finished; the same command goes on from here")
                return self._end(context, meta, ended)
        except OSError as error:
            raise StudyError(
                f"study folder {self.folder.path}: {error.filename or 'a file'} cannot be written or read "
                f"({error.strerror or error}); make room or permission and run the same command again, "
                f"nothing already recorded is lost"
            ) from error

    def work(self, orders: Orders, ready: Callable[[], None]) -> str:
        """Take part in the search of another command, as one of its workers; returns why there is nothing left to do.

        Raises StudyError when that command has ended.
        """
        self.orders, self.crew = orders, Crew(self.folder.path, orders.worker)
        self.started -= max(0.0, time.time() - orders.started)
        with opened(self) as (study, context, _):
            ready()
            return self._loop(study, context)

    @property
    def elapsed(self) -> float:
        """Seconds since this call began."""
        return time.monotonic() - self.started

    def _end(self, context: TrialContext, meta: StudyMeta, ended: str) -> SearchSummary:
        """Confirm, and write what the search leaves; of several workers without a parent, the last one to end does."""
        if self.config.worker == "off" or self.folder.alone():
            if ended != "interrupted" and self.table is None:
                try:
                    self._confirm(context)
                except KeyboardInterrupt:
                    ended = "interrupted"
                    self.news("stopping: the same command goes on with the confirmation")
            return self._finish(context, meta, ended)
        context.tracker.close("FINISHED")
        records = [self.records[number] for number in sorted(self.records)]
        return SearchSummary(
            records, winner(records), self.folder.path, None, None, ended, self.elapsed, self.reference
        )

    def _confirm(self, context: TrialContext) -> None:
        """Train the best, the baselines and the reference study's best with fresh seeds, where that was asked for."""
        from hybridnas.search.confirm import confirm, fresh_seeds
        from hybridnas.search.reference import confirm_reference_study, find_reference_study

        records = [self.records[number] for number in sorted(self.records)]
        reference = find_reference_study(context, self.folder.path, records)
        if self.config.budget.confirm == "off" or winner(records) is None:
            return

        def save(record: TrialRecord) -> None:
            write_record(self.folder.trial(record.number), record)
            self.records[record.number] = record

        confirm(context, records, self.folder.trial, save)
        if reference is not None:
            seeds = fresh_seeds(self.config.seed, self.config.budget.confirm_seeds)
            confirm_reference_study(context, self.folder.path, reference, seeds)

    def _search(self, study: optuna.Study, context: TrialContext) -> str:
        if self.config.workers == 1:
            return self._loop(study, context)
        from hybridnas.search.workers.supervisor import Supervisor

        return Supervisor(self, study, context).run()

    def _loop(self, study: optuna.Study, context: TrialContext) -> str:
        draws = 0
        while True:
            # Whatever looks at the study to decide what comes next stands in _next: no other worker chooses meanwhile.
            with self.crew.taking():
                self.crew.refresh(study, self.records)
                found = self._next(study, context, draws)
                if isinstance(found, str):
                    return found
                if found is not None:
                    self.crew.take(study, found.number)
            if found is None:
                time.sleep(WAIT_SECONDS)
                continue
            draws += 1
            try:
                self._one(study, found, context)
            except TrialLostError as error:
                self.news(str(error))
            self.crew.done(found.number)

    def by_now(self, study: optuna.Study) -> list[TrialRecord]:
        """Return what is finished by now, also by other workers."""
        self.crew.refresh(study, self.records)
        return list(self.records.values())

    def _next(self, study: optuna.Study, context: TrialContext, draws: int) -> optuna.Trial | str | None:
        """Return the trial to run now, None while only others' trials can decide, or why there is nothing to do."""
        from hybridnas.search.sampling.distinct import ask

        budget = self.config.budget
        orphan = self.crew.adopt(study)
        if orphan is not None:
            self.news(f"trial {candidate_of(orphan)} was interrupted; going on from its checkpoint")
            return orphan
        again = self._promoted(study, context)
        if again is not None:
            return again
        others = len(self.crew.running(study))
        if self._finished() >= budget.n_trials:
            return "completed"
        if self._finished() + others >= budget.n_trials:
            return None
        waiting = any(trial.state.name == "WAITING" for trial in study.trials)
        if not waiting and not self._time_for(1.0):
            return "time"
        if budget.max_tokens is not None and trained_tokens(self.records.values()) >= budget.max_tokens:
            return "tokens"
        if draws >= MAX_DRAWS_PER_TRIAL * budget.n_trials:
            return "exhausted"
        if not waiting and self.config.sampler == "bruteforce":
            return None if others else "exhausted"
        return ask(study)

    def _promoted(self, study: optuna.Study, context: TrialContext) -> optuna.Trial | None:
        """Return a paused candidate to go on with, where the pruner is halving and one has its turn."""
        if context.ladder is None or not self._time_for(context.ladder.remainder):
            return None
        trial = promote(study, context.ladder, self.records)
        if trial is not None:
            record = self.records[candidate_of(trial)]
            self.news(f"trial {record.number} is among the best at {record.tokens:,} tokens by now and goes on")
        return trial

    def _one(self, study: optuna.Study, trial: optuna.Trial, context: TrialContext) -> None:
        from optuna.trial import TrialState

        record = self._record(study, trial, context)
        if record is None:  # what it was to go on with is lost, and is repeated under another number
            study.tell(trial, state=TrialState.FAIL)
            return
        source = self.records.get(record.duplicate_of) if record.duplicate_of is not None else record
        state = source.state if source is not None else FAIL  # of one that another worker trains: nothing to tell yet
        self.crew.publish(trial, record)
        if state == COMPLETE:
            told = source or record
            study.tell(trial, list(told.objectives.values()) or told.valid_loss)
        else:
            study.tell(trial, state=TrialState.FAIL if state == FAIL else TrialState.PRUNED)
        self.records[record.number] = record
        write_leaderboard(self.folder.path, list(self.records.values()), self.reference)
        if self.page is not None:
            self.page.update(self.records.values())
        self.news(trial_line(record, self.records, self.reference))
        self._drop_checkpoints(study, context)
        self._give_up_if_hopeless(record)

    def _record(self, study: optuna.Study, trial: optuna.Trial, context: TrialContext) -> TrialRecord | None:
        """Train the trial; where a process died between record and the journal's last word, the record stands."""
        self.crew.refresh(study, self.records)
        number = candidate_of(trial)
        record, run = self.records.get(number), TrialRun(context, trial, self.folder.trial(number))
        if continues(trial) is None:
            return record or run.run(Earlier(self.crew, study, trial, self.records))
        if record is None or record.state == FAIL or record.tokens > trial.user_attrs.get(FROM_TOKENS, 0):
            return record
        return run.go_on(record)

    def _give_up_if_hopeless(self, last: TrialRecord) -> None:
        """Raise where nothing has worked so far: then it is the settings, not the candidates."""
        states = {record.state for record in self.records.values()}
        if len(self.records) < HOPELESS or not states <= {FAIL, INFEASIBLE} or last.state not in states:
            return
        if FAIL in states:
            why = next(r.reason for r in reversed(self.records.values()) if r.state == FAIL)
            raise TrainingError(
                f"the first {len(self.records)} trials all failed, the last one because: {why}; "
                f"change the budget (a lower budget.lr, a smaller budget.batch_size) and choose study=NEWNAME"
            )
        if self.space.baselines or len(self.records) >= MAX_DRAWS_PER_TRIAL:
            raise MatchError(
                f"the first {len(self.records)} candidates are all infeasible, the last one because: {last.reason}; "
                f"change the budget (budget.active_params, budget.multiple) or the space, and choose study=NEWNAME"
            )

    def _finished(self) -> int:
        return sum(record.state in (COMPLETE, PRUNED, FAIL) for record in self.records.values())

    def _time_for(self, part: float) -> bool:
        """Whether this part of a full training would end within the budget's minutes, judged by the trials so far."""
        minutes = self.config.budget.minutes
        if minutes is None:
            return True
        full = [r.seconds for r in self.records.values() if r.state == COMPLETE]
        expected = sorted(full)[len(full) // 2] if full else 0.0
        return time.monotonic() - self.started + part * expected <= 60 * minutes

    def _drop_checkpoints(self, study: optuna.Study, context: TrialContext) -> None:
        """Keep the weights of baselines, of the best few, and of paused candidates that may yet go on.

        Disks are finite; replay brings any back, and a candidate that goes on without its checkpoint is trained again.
        """
        records = list(self.records.values())
        ranked = sorted(filter(eligible, records), key=lambda r: (score(r), r.number))
        kept = max(KEPT_CHECKPOINTS, self.config.budget.confirm_top)
        keep = {r.number for r in ranked[:kept]} | {r.number for r in records if r.preset}
        if context.ladder is not None:
            keep |= {*context.ladder.hopeful(records), *busy(study)}
        for record in records:
            if record.state in (COMPLETE, PRUNED, FAIL) and record.number not in keep:
                for path in self.folder.trial(record.number).glob("checkpoint*"):
                    path.unlink(missing_ok=True)

    def _finish(self, context: TrialContext, meta: StudyMeta, ended: str) -> SearchSummary:
        import dataclasses

        from hybridnas.report.report import write_report

        records = [self.records[number] for number in sorted(self.records)]
        best = winner(records)
        seconds = time.monotonic() - self.started
        meta = dataclasses.replace(
            meta,
            seconds=seconds,
            status="completed" if ended != "interrupted" else "interrupted",
            notes=tuple(self.warnings),
        )
        write_leaderboard(self.folder.path, records, meta.reference)
        report = write_report(self.folder.path, records, meta)
        context.tracker.sync(records)  # duplicates and infeasible draws have no run of their own yet
        context.tracker.log_artifacts([report, self.folder.path / "leaderboard.csv"])
        exported = self._export(best, context) if best is not None and self.table is None else None
        context.tracker.close("FINISHED" if ended != "interrupted" else "KILLED")
        return SearchSummary(records, best, self.folder.path, exported, report, ended, seconds, self.reference)

    def _export(self, best: TrialRecord, context: TrialContext) -> Path | None:
        from hybridnas.export.folder import export
        from hybridnas.export.trials import card_facts
        from hybridnas.train.checkpoint import NEWEST, load_model

        folder = self.folder.trial(best.number)
        if self.config.storage is not None and not (folder / NEWEST).exists():
            again = f"python -m hybridnas.replay study={self.folder.name} runs={self.config.runs} trial={best.number}"
            self.news(f"the winner was trained in another folder, where its weights are; to have them here: {again}")
            return None
        model = load_model(folder)
        return export(
            model,
            self.folder.path / "best",
            source=context.source,
            card=card_facts(best, self.folder.name, self.config),
        )

    def _announce(self, context: TrialContext) -> None:
        budget = self.config.budget
        tokens = budget.rung_tokens(context.target)[-1]
        for warning in self.warnings:
            self.news(f"warning: {warning}")
        self.news(f"study {self.folder.name} in {self.folder.path}, {describe_machine()}")
        self.news(f"data: {context.source.describe()}")
        self.news(
            f"every candidate has {context.target:,} active parameters and trains for {tokens:,} tokens "
            f"({tokens / context.target:.0f} per active parameter), d_model {budget.d_model}, {budget.depth} sub-layers"
        )
        if self.records:
            self.news(f"resuming: {self._finished()} trials are finished, of {budget.n_trials}")

    def meta(self, stored: dict[str, Any], context: TrialContext) -> StudyMeta:
        budget = self.config.budget
        return StudyMeta(
            name=self.folder.name,
            space=self.space.name,
            data=context.source.describe(),
            budget=budget.name,
            reference=self.reference,
            active_params=context.target,
            tokens=budget.rung_tokens(context.target)[-1],
            seq_len=budget.seq_len,
            state_length=self.config.state_length or 0,
            batch_size=budget.batch_size,
            n_trials=budget.n_trials,
            seed=self.config.seed,
            sampler=self.config.sampler,
            pruner=self.config.pruner,
            command=stored.get("command", ""),
            machine=stored.get("machine", ""),
            versions=stored.get("versions", {}),
            started=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(stored.get("created"))),
            folder=str(self.folder.path),
        )


def rebuild(study: Path, number: int) -> Arch:
    """Return the architecture of a study's trial; raises StudyError when there is no such trial."""
    import json

    path = study / "trials" / f"{number:04d}" / "arch.json"
    if not path.is_file():
        have = sorted(int(p.parent.name) for p in (study / "trials").glob("*/arch.json"))
        raise StudyError(f"study {study} has no trained trial {number}; trained: {', '.join(map(str, have)) or 'none'}")
    return Arch.from_dict(json.loads(path.read_text()))
