"""``workers=N`` and confirmations: independent processes on one study, watched by the command that started them.

The parent trains nothing. It holds the study's folder, starts the workers, hands their events to the callbacks, starts
another one where one has died, and ends the search when all have ended.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybridnas import errors
from hybridnas.errors import HybridNASError, StudyError
from hybridnas.plugins import all_loaded
from hybridnas.search.config import SearchConfig
from hybridnas.search.lines import received, send
from hybridnas.search.storage.folder_store import LEASES
from hybridnas.search.training import Wanted
from hybridnas.search.workers.orders import Orders
from hybridnas.study.callbacks import COMPLETED, TIME, StudyCallback, TrialMeasured, TrialStarted
from hybridnas.study.records import TrialRecord
from hybridnas.units import several

if TYPE_CHECKING:
    from hybridnas.search.loop import Loop
    from hybridnas.search.session import Session

POLL_SECONDS = 0.2
MAX_STARTUP_FAILURES = 3  # workers in a row that end before they are ready: then the search ends with an error
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
GRACE_SECONDS = 60.0  # for workers to save and leave once the search has gone wrong


@dataclass
class Worker:
    """One child process as its parent sees it."""

    number: int
    process: subprocess.Popen[str]
    log: Path
    ready: bool = False
    reason: str | None = None  # why it has nothing left to do
    error: tuple[str, str] | None = None
    ended: bool = False  # its last message was read
    messages: queue.SimpleQueue[Mapping[str, Any] | None] = field(default_factory=queue.SimpleQueue)


class Supervisor:
    """Starts and watches the workers of one search."""

    def __init__(
        self,
        session: Session,
        loop: Loop,
        callbacks: StudyCallback,
        *,
        elapsed: float,
        count: int,
        again: Sequence[Wanted] = (),
    ) -> None:
        """``loop`` is not run: it reads what the workers have recorded. ``elapsed``: seconds since the command.

        ``again``: trainings of a confirmation, which ``count`` workers share instead of trials.
        """
        self.session, self.loop, self.callbacks = session, loop, callbacks
        self.count, self.again = count, tuple(again)
        self.started = time.time() - elapsed
        self.workers: list[Worker] = []
        self.interrupts = 0  # how often Ctrl-C was pressed
        self.startup_failures = 0
        self.failure: HybridNASError | None = None
        self.reasons: list[str] = []

    def run(self) -> str:
        """Watch until every worker has ended; returns why the search ended, or raises what a worker raised."""
        if not self.again:
            self.callbacks.on_note(f"{self.count} workers of {several(threads_each(self.count), 'thread')} each")
        try:
            self.workers = [self._start(number) for number in range(self.count)]
            while self.workers:
                try:
                    self._look()
                except KeyboardInterrupt:
                    self._pass_on_interrupt()
        finally:
            self._end_all()
        self.loop.look()
        if self.failure is not None:
            raise self.failure
        if self.interrupts:
            raise KeyboardInterrupt
        return next((reason for reason in (COMPLETED, TIME) if reason in self.reasons), self.reasons[-1])

    def _start(self, number: int) -> Worker:
        session = self.session
        config = session.config
        log = session.folder.path / LEASES / f"worker-{number}.log"
        log.parent.mkdir(exist_ok=True)
        own: dict[str, Any] = {"start_new_session": True}  # Ctrl-C in the terminal is the parent's, which passes it on
        if sys.platform == "win32":
            own = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        with log.open("ab") as errors_to:
            process = subprocess.Popen(
                [sys.executable, "-m", "hybridnas.search.workers.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors_to,
                text=True,
                encoding="utf-8",
                errors="replace",  # a killed worker may leave half a character
                env=environment(config, number, self.count),
                **own,
            )
        held = session.folder.token
        orders = Orders(config.to_dict(), held, number, self.started, self.again, all_loaded())
        assert process.stdin is not None and process.stdout is not None
        send(process.stdin, orders.__dict__)  # one that died at once is seen when it is waited for
        worker = Worker(number, process, log)
        threading.Thread(target=_listen, args=(process.stdout, worker.messages), daemon=True).start()
        return worker

    def _look(self) -> None:
        time.sleep(POLL_SECONDS)
        anything = False
        for worker in list(self.workers):
            gone = worker.process.poll() is not None
            anything |= self._read(worker, to_the_end=gone)
            if gone:
                self.workers.remove(worker)
                self._account_for(worker)
        if anything:
            self.loop.look()

    def _read(self, worker: Worker, *, to_the_end: bool) -> bool:
        """Act on a worker's messages; on those of a dead one to the last. Returns whether there were any."""
        anything = False
        while not worker.ended and (to_the_end or not worker.messages.empty()):
            message = worker.messages.get()
            if message is None:
                worker.ended = True  # the pipe may end a moment before the process: nothing follows
                break
            anything = True
            worker.ready |= "ready" in message
            worker.reason = message.get("reason", worker.reason)
            if "error" in message:
                worker.error = (message["error"][0], message["error"][1])
            self._hand_on(message)
        if worker.ready:
            self.startup_failures = 0
        return anything

    def _hand_on(self, message: Mapping[str, Any]) -> None:
        if "note" in message:
            self.callbacks.on_note(message["note"])
        if "started" in message:
            record, tokens, why = message["started"]
            self.callbacks.on_trial_start(TrialStarted(record=TrialRecord.from_dict(record), tokens=tokens, why=why))
        if "measured" in message:
            number, values = message["measured"]
            self.callbacks.on_trial_eval(TrialMeasured(number=number, values=values))

    def _account_for(self, worker: Worker) -> None:
        """See how a worker ended; one that died is replaced."""
        if worker.process.stdin is not None:
            with contextlib.suppress(OSError):
                worker.process.stdin.close()
        code = worker.process.returncode
        if worker.error is not None:
            name, text = worker.error
            self._fail(getattr(errors, name, StudyError)(text))
        elif worker.reason is not None:
            self.reasons.append(worker.reason)
        elif not self.interrupts and self.failure is None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.startup_failures += not worker.ready
            if self.startup_failures >= MAX_STARTUP_FAILURES:
                last = worker.log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
                self._fail(
                    StudyError(f"workers cannot start ({how}); their log ends with: {last[0]} (see {worker.log})")
                )
                return
            self.callbacks.on_note(
                f"worker {worker.number} died ({how}); another takes its place and goes on from its trial's checkpoint"
            )
            self.workers.append(self._start(worker.number))

    def _fail(self, error: HybridNASError) -> None:
        """Keep the first error, and let the others save what they have."""
        if self.failure is None:
            self.failure = error
            self._ask_to_leave()

    def _ask_to_leave(self) -> None:
        for worker in self.workers:
            if worker.process.stdin is not None:
                with contextlib.suppress(OSError):
                    worker.process.stdin.close()

    def _pass_on_interrupt(self) -> None:
        """The first Ctrl-C lets workers finish their step and save, the second ends them at once."""
        self.interrupts += 1
        if self.interrupts == 1:
            self.callbacks.on_note("stopping: each worker finishes its step and saves; Ctrl-C again stops at once")
            self._ask_to_leave()
        else:
            for worker in self.workers:
                worker.process.kill()

    def _end_all(self) -> None:
        """Leave no process behind, whatever happened here: without this pipe they end by themselves, too."""
        until = time.monotonic() + (0.0 if self.interrupts > 1 else GRACE_SECONDS)
        self._ask_to_leave()
        for worker in self.workers:
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def threads_each(workers: int) -> int:
    """Return how many threads a worker computes with: the processor divided, or OMP_NUM_THREADS if less."""
    from hybridnas.hardware import usable_cores

    cores = usable_cores()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // workers, int(wanted) if wanted.isdigit() and int(wanted) > 0 else cores))


def environment(config: SearchConfig, worker: int, workers: int) -> dict[str, str]:
    """Return a worker's environment: its share of the processor, and one of the GPUs where there are several."""
    from hybridnas.hardware import pick_device

    threads = str(threads_each(workers))
    values = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, threads), "PYTHONIOENCODING": "utf-8"}
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is None:
        import torch

        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        values["CUDA_VISIBLE_DEVICES"] = seen.split(",")[worker % len(seen.split(","))]
    return values


def _listen(stream: IO[str], messages: queue.SimpleQueue[Mapping[str, Any] | None]) -> None:
    try:
        with stream:
            for message in received(stream):
                messages.put(message)
    finally:
        messages.put(None)
