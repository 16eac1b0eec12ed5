"""The loop of a search: decide what comes next, train it, record it; the same on data, on a table and in memory.

What comes next is decided from the records alone, by one worker at a time: an interrupted trial goes on, else a paused
one is promoted, else the next preset or a new candidate begins. So a search that was killed and started again takes the
course of one that was not.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from hybridnas.analysis.limits import misses
from hybridnas.arch.arch import Arch
from hybridnas.errors import MatchError, TrainingError
from hybridnas.search import speeds
from hybridnas.search.history import History
from hybridnas.search.plan import Plan
from hybridnas.search.sampling.candidates import Draw
from hybridnas.search.storage.store import RecordStore, TrialLostError
from hybridnas.search.trial import Trainer, TrialRun, died, new_record, reuse, weigh
from hybridnas.study.callbacks import (
    COMPLETED,
    EXHAUSTED,
    NEW,
    PROMOTED,
    RESUMED,
    TIME,
    TOKENS,
)
from hybridnas.study.records import COMPLETE, FAIL, INFEASIBLE, RUNNING, TrialRecord

log = logging.getLogger("hybridnas.search")

MAX_DRAWS_PER_TRIAL = 20  # candidates that cost no training, such as infeasible ones, for each trial that was asked for
USED_UP = 20  # so many candidates in a row that were all tried before: the space has no other ones
MEASURED_ENOUGH = 12  # candidates that were measured and are all outside the limits by FAR or more: no further is tried
FAR = 2.0  # factor between a limit and what was measured
MAX_FAILED_TRIALS = 5  # the search ends with an error when so many trials have ended and none has trained
WAIT_SECONDS = 0.2  # between looks at what other workers have finished


class Listener:
    """Receives the events of the loop; the methods do nothing."""

    def started(self, record: TrialRecord, tokens: int, why: str) -> None:
        """A trial begins to train in this process."""

    def measured(self, number: int, values: dict[str, Any]) -> None:
        """A trial of this process was evaluated."""

    def ended(self, record: TrialRecord, history: History) -> None:
        """A record was written, here or by another worker."""

    def note(self, text: str) -> None:
        """A sentence for a person who watches."""


class Loop:
    """One worker's part in a search; :meth:`run` returns why there is nothing left to do."""

    def __init__(
        self,
        plan: Plan,
        store: RecordStore,
        trainer: Trainer,
        listener: Listener | None = None,
        *,
        elapsed: Callable[[], float] = lambda: 0.0,
        stop: Callable[[History], str | None] = lambda history: None,
        give_up: bool = True,
    ) -> None:
        """``elapsed``: seconds since the command began. ``stop``: a further reason to end, asked before each trial.

        ``give_up``: raise where the first trials all failed or are infeasible.
        """
        self.plan, self.store, self.trainer = plan, store, trainer
        self.listener = listener or Listener()
        self.elapsed, self.stop, self.give_up = elapsed, stop, give_up
        self.history = History(plan.objectives, plan.rungs)
        self.redrawn = 0  # draws that were thrown away, because the study had the candidate
        self._sampler = plan.draws
        self._own: set[int] = set()  # trials whose latest record was written here, and not read back yet
        self.look(report=False)

    def run(self) -> str:
        """Train until the search is complete or has to end; returns one of the reasons of study.callbacks."""
        while True:
            with self.store.deciding():
                self.look()
                found = self._next()
            if isinstance(found, str):
                return found
            if found is None:
                time.sleep(WAIT_SECONDS)
                continue
            record, why = found
            if record.state == RUNNING:
                try:
                    record = self._train(record, why)
                except TrialLostError as error:
                    self.listener.note(str(error))
                    continue
                self.trainer.tidy(self.plan, self.history)
            self.listener.ended(record, self.history)
            self._raise_if_hopeless(record)

    def look(self, *, report: bool = True) -> None:
        """Take in what other workers have recorded."""
        for record in self.store.changes():
            own = record.number in self._own
            self._own.discard(record.number)
            if self.history.put(record) and report and not own and record.state != RUNNING:
                self.listener.ended(record, self.history)

    def _save(self, record: TrialRecord) -> None:
        self.store.save(record)
        self._put(record)

    def _put(self, record: TrialRecord) -> None:
        """Take in a record that this process has written."""
        self._own.add(record.number)
        self.history.put(record)

    def _next(self) -> tuple[TrialRecord, str] | str | None:
        """Begin the next trial, or return None while only others' trials can decide, or why there is nothing to do.

        A trial that needs no training is recorded here, and its record is returned.
        """
        plan, history = self.plan, self.history
        ended = self.stop(history)
        if ended is not None:
            return ended
        orphan = self._take_over()
        if orphan is not None:
            return orphan
        if plan.pruner == "halving" and self._time_for(plan.promotion.remainder):
            number = plan.promotion.next(history)
            if number is not None:
                return self._promote(history[number])
        if history.finished >= plan.n_trials:
            return COMPLETED
        training = sum(not history[number].rungs for number in history.running)
        if history.finished + training >= plan.n_trials:
            return None
        tried = {record.preset for record in history.values()}
        preset = next((name for name in plan.presets if name not in tried), None)
        if preset is None:
            if not self._time_for(1.0):
                return TIME
            if plan.max_tokens is not None and history.trained_tokens >= plan.max_tokens:
                return TOKENS
            if self._out_of_reach():
                return EXHAUSTED
            used_up = history.trailing_duplicates() >= USED_UP
            if used_up or len(history) >= (plan.max_draws or MAX_DRAWS_PER_TRIAL * plan.n_trials):
                return EXHAUSTED
        return self._begin(preset)

    def _out_of_reach(self) -> bool:
        """Whether nothing kept the measured limits so far, of enough candidates none came near, and says so."""
        known = list(self.history.values())
        measured = [record for record in known if record.spread]
        drawn = [record for record in measured if record.preset is None]
        if len(drawn) < MEASURED_ENOUGH or any(record.state != INFEASIBLE for record in measured):
            return False
        missed = [max(misses(record, self.plan.limits), key=lambda miss: miss.factor, default=None) for record in drawn]
        found = [miss for miss in missed if miss is not None]
        nearest = min(found, key=lambda miss: miss.factor, default=None)
        if nearest is None or len(found) < len(drawn) or nearest.factor < FAR:
            return False
        self.listener.note(
            f"none of {len(drawn)} candidates that were measured comes within a factor of {FAR:g} of the limits, so no "
            f"other is tried; nearest: {nearest.record.pattern}, {nearest.value:,.4g} where "
            f"{nearest.limit}={nearest.bound:,.4g}"
        )
        return True

    def _take_over(self) -> tuple[TrialRecord, str] | None:
        """Return a trial whose worker has died, held by this process now."""
        for number in self.store.orphans():
            record = self.history[number]
            going_on = died(self.plan, record, self.trainer.progress(number))
            if not self.store.begin(dataclasses.replace(going_on, state=RUNNING)):
                continue
            if going_on.state == FAIL:
                self._save(going_on)
                self.store.release(number)
                return going_on, RESUMED
            self._put(going_on)
            return going_on, RESUMED
        return None

    def _promote(self, record: TrialRecord) -> tuple[TrialRecord, str] | None:
        """Take up a paused candidate; None where another worker was faster."""
        record = dataclasses.replace(record, state=RUNNING, reason=None)
        if not self.store.begin(record):
            return None
        self._put(record)
        return record, PROMOTED

    def _begin(self, preset: str | None) -> tuple[TrialRecord, str] | str | None:
        """Begin a preset, or a candidate that the sampler draws."""
        plan, history = self.plan, self.history
        began = time.monotonic()
        number = self.store.next_number()
        if preset is not None:
            draw = Draw(plan.candidates.preset(preset))
        else:
            found = self._draw(number)
            if found is None:
                return None if history.running else EXHAUSTED
            draw = found
            self.redrawn += draw.redrawn
        record = new_record(plan, number, draw)
        if record.state == RUNNING:
            same = history.same(record.fingerprint, number)
            if same is not None:
                record = reuse(record, same)
            else:
                assert draw.candidate.arch is not None
                record = weigh(plan, record, draw.candidate.arch, {})
        record = dataclasses.replace(record, draw_seconds=time.monotonic() - began)
        if record.state == RUNNING:
            if not self.store.begin(record):
                return None
            self._put(record)
        else:
            self._save(record)
        return record, NEW

    def _draw(self, number: int) -> Draw | None:
        """Ask the sampler, which passes by what was measured of others to be too slow in all likelihood."""
        self.plan.candidates.unlikely = speeds.outlook(self.history, self.plan.limits)
        return self._sampler.draw(self.history, number)

    def _train(self, record: TrialRecord, why: str) -> TrialRecord:
        """Train a trial that this process holds, and write its record."""
        plan, number = self.plan, record.number
        arch = self._arch(record)
        if plan.hardware and not record.rungs:
            began = time.monotonic()
            record = weigh(plan, record, arch, self.trainer.figures(arch))
            seconds = record.draw_seconds + time.monotonic() - began
            record = dataclasses.replace(record, draw_seconds=seconds)
        if record.state == RUNNING:
            self.listener.started(record, record.tokens, why)
            self._say(record, why)
            run = TrialRun(
                plan,
                self.history,
                record,
                self.trainer,
                look=self.look,
                note=self._save,
                on_eval=lambda values: self.listener.measured(number, dict(values)),
            )
            record = run.run(arch)
        self._save(record)
        self.store.release(number)
        return record

    def _arch(self, record: TrialRecord) -> Arch:
        """Return a trial's architecture, from its choices."""
        candidates = self.plan.candidates
        candidate = (
            candidates.preset(record.preset) if record.preset is not None else candidates.recorded(record.choices)
        )
        if candidate.arch is None or candidate.fingerprint != record.fingerprint:
            raise MatchError(
                f"trial {record.number} was begun as {record.pattern}, and its choices lead to another architecture "
                f"now; was the package changed in between? choose study=NEWNAME",
                field="choices",
                got=dict(record.choices),
            )
        return candidate.arch

    def _say(self, record: TrialRecord, why: str) -> None:
        number = record.number
        if why == RESUMED:
            self.listener.note(f"trial {number} was interrupted; going on from its checkpoint")
        if why == PROMOTED:
            self.listener.note(f"trial {number} is among the best at {record.tokens:,} tokens by now and goes on")
        if record.rungs and not self.trainer.kept(number):
            self.listener.note(f"trial {number}: its checkpoint is gone, so it is trained again from nothing")

    def _time_for(self, part: float) -> bool:
        """Whether this part of a full training would end within the minutes, judged by the trials so far."""
        if self.plan.minutes is None:
            return True
        full = sorted(record.seconds for record in self.history.values() if record.state == COMPLETE)
        expected = full[len(full) // 2] if full else 0.0
        return self.elapsed() + part * expected <= 60 * self.plan.minutes

    def _raise_if_hopeless(self, last: TrialRecord) -> None:
        """Raise where nothing has worked so far: then it is the settings, not the candidates."""
        if not self.give_up or len(self.history) < MAX_FAILED_TRIALS or last.state not in (FAIL, INFEASIBLE):
            return
        # Baselines outside the limits are shown from their costs, and what was measured here may yet be met by another
        # candidate: neither is a sign of wrong settings.
        refused = [record for record in self.history.values() if record.state == INFEASIBLE]
        outside = {record.number for record in refused if record.violation or record.spread}
        ended = [r for r in self.history.ordered() if r.state != RUNNING and r.number not in outside]
        states = {record.state for record in ended}
        if len(ended) < MAX_FAILED_TRIALS or not states <= {FAIL, INFEASIBLE}:
            return
        if FAIL in states:
            why = next(record.reason for record in reversed(ended) if record.state == FAIL)
            raise TrainingError(
                f"the first {len(ended)} trials all failed, the last one because: {why}; "
                f"change the budget (a lower budget.lr, a smaller budget.batch_size) and choose study=NEWNAME",
                field="budget",
                got=why,
            )
        if self.plan.presets or len(ended) >= MAX_DRAWS_PER_TRIAL:
            raise MatchError(
                f"the first {len(ended)} candidates are all infeasible, the last one because: {last.reason}; "
                f"change the budget (budget.active_params, budget.multiple) or the space, and choose study=NEWNAME",
                field="budget",
                got=last.reason,
            )
