"""Train a ladder's runs, in this process or several; what has ended is never trained again.

A run is claimed by a lock that its process holds, and with ``storage=`` in the database besides, so any number of
processes can share a list: each takes the next run that is neither ended nor claimed. Workers end when the pipe to the
command that started them closes.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from hybridnas.errors import HybridNASError, StudyError
from hybridnas.ladders.config import LadderConfig
from hybridnas.ladders.plan import LadderRun, Plan
from hybridnas.ladders.rows import ended
from hybridnas.ladders.storage import SharedRuns, stored_base
from hybridnas.study.locks import FileLock
from hybridnas.train.callbacks import Action, Callback, Run
from hybridnas.train.experiment import Cell, CellResult, Experiment
from hybridnas.train.records import Eval

_POLL = 2.0  # between looks at what other hosts have done [s]
log = logging.getLogger("hybridnas.ladders")
OnEnd = Callable[[str, str, str], None]  # takes a run's key, its status and its reason


def train(
    plan: Plan,
    runs: Sequence[LadderRun],
    on_end: OnEnd,
    *,
    shared: SharedRuns | None = None,
    callbacks: Iterable[Callback] = (),
    until: float | None = None,
) -> None:
    """Train what has not ended, until all has, or ``until`` [time.time()]; ``on_end`` is called with each that ends.

    With ``shared`` runs that other hosts train are waited for, and their results are written here. Ctrl-C saves and
    raises KeyboardInterrupt. Raises what a training raises that would end the next one, too.
    """
    if plan.config.workers == 1:
        _train_here(plan, runs, on_end, shared, callbacks, until)
    elif any(not ended(run) for run in runs):
        _train_apart(plan, runs, on_end, until, note=log.info if shared is None else shared.note)


def _train_here(
    plan: Plan,
    runs: Sequence[LadderRun],
    on_end: OnEnd,
    shared: SharedRuns | None,
    callbacks: Iterable[Callback],
    until: float | None,
) -> None:
    def keep(done: CellResult) -> None:
        run = done.cell.facts["run"]
        if shared is not None and done.result.final:
            shared.keep(run)
        if done.result.final or shared is None or not shared.lost(run):
            on_end(run.key, done.result.status, done.result.reason)

    minutes = None if until is None else max(0.0, until - time.time()) / 60
    cells = _claimed(plan, runs) if shared is None else _claimed_together(plan, runs, shared, on_end, until)
    with contextlib.closing(cells):  # whatever ends it, its claim ends here
        Experiment(cells, callbacks=callbacks, minutes=minutes, on_result=keep).run()


def _claimed(plan: Plan, runs: Iterable[LadderRun]) -> Generator[Cell, None, None]:
    """Yield the cells of runs that are neither ended nor another process's, each held until the next is asked for."""
    for run in runs:
        lock = FileLock(run.lock)
        if ended(run) or not lock.acquire(wait=False):
            continue
        try:
            if not ended(run):
                yield Cell(
                    key=run.key,
                    model=run.arch,
                    source=plan.source,
                    config=run.config,
                    folder=run.folder,
                    device=plan.config.device,
                    keep_checkpoint=False,
                    labels={"model": run.entrant},
                    facts={"run": run},
                )
        finally:
            lock.release()


def _claimed_together(
    plan: Plan, runs: Sequence[LadderRun], shared: SharedRuns, on_end: OnEnd, until: float | None
) -> Generator[Cell, None, None]:
    """Yield the cells that no process of any host has, and wait for those that others have.

    A run is tried once: one that fails here is another's, or the next call's.
    """
    tried: set[str] = set()
    while True:
        new, elsewhere = shared.exchange(runs)
        for run in runs:
            if run.key in new:
                on_end(run.key, ended(run), f"by {new[run.key]}")
        left = [run for run in runs if not ended(run)]
        for run in left:
            if run.key in tried or run.key in elsewhere:
                continue
            with contextlib.closing(_claimed(plan, [run])) as cells:
                for cell in cells:
                    if not shared.claim(run):
                        break
                    tried.add(run.key)
                    try:
                        yield replace(cell, callbacks=(_PauseWhenLost(shared, run),))
                    finally:
                        shared.release(run)
            if run.key in tried:
                break  # what has ended elsewhere meanwhile comes first
        else:
            if all(run.key in tried and run.key not in elsewhere for run in left):
                return
            if until is not None and time.time() >= until:
                return
            time.sleep(min(_POLL, plan.config.heartbeat))


class _PauseWhenLost(Callback):
    """Leaves a run that another process has taken over, because this one was silent for too long."""

    def __init__(self, shared: SharedRuns, run: LadderRun) -> None:
        self._shared, self._run = shared, run

    def on_eval(self, run: Run, evaluation: Eval) -> Action:
        return Action.PAUSE if self._shared.lost(self._run) else Action.CONTINUE


def _train_apart(
    plan: Plan, runs: Sequence[LadderRun], on_end: OnEnd, until: float | None, *, note: Callable[[str], None]
) -> None:
    """Start workers on the runs and watch them; one that dies leaves its run to the others and to the next call."""
    context = multiprocessing.get_context("spawn")
    listed = [(run.entrant, run.factor, run.config.seed, run.rate, run.tuning) for run in runs]
    workers: dict[Connection, BaseProcess] = {}
    failure: BaseException | None = None
    interrupted = False
    try:
        with _environment(plan.config.workers):
            for _ in range(plan.config.workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(plan.config.to_dict(), listed, until, theirs), daemon=True
                )
                process.start()
                theirs.close()
                workers[ours] = process
        while workers:
            try:
                for connection in wait(list(workers)):
                    assert isinstance(connection, Connection)
                    try:
                        message = connection.recv()
                    except EOFError:
                        gone = workers.pop(connection)
                        gone.join()
                        if gone.exitcode and failure is None and not interrupted:
                            failure = StudyError(
                                f"ladder {plan.config.title!r}: a worker ended with exit code {gone.exitcode}; the "
                                f"same command goes on from the last checkpoints",
                                field="workers",
                                got=gone.exitcode,
                            )
                        continue
                    if isinstance(message, str):
                        note(message)
                    elif isinstance(message, HybridNASError):
                        failure = failure or message
                        _let_go(workers)
                    else:
                        on_end(*message)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                _let_go(workers)
    finally:
        for worker in workers.values():
            worker.kill()
    if interrupted:
        raise KeyboardInterrupt
    if failure is not None:
        raise failure


def _let_go(workers: Mapping[Connection, Any]) -> None:
    """Ask workers to save and leave."""
    for connection in workers:
        with contextlib.suppress(OSError):
            connection.send("leave")


def _work(
    settings: Mapping[str, Any],
    listed: Sequence[tuple[str, float, int, float, bool]],
    until: float | None,
    parent: Connection,
) -> None:
    """Train as a worker, until nothing is left to claim, the parent says so, or it is gone.

    ``listed``: entrant, factor, seed, rate and purpose of each run, as :meth:`Plan.run` takes them.
    """
    from hybridnas.data import open_source, source_config
    from hybridnas.ladders.plan import make_plan

    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in the terminal is the parent's, which passes it on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command in the background ignores it, and we inherit

    def listen() -> None:
        with contextlib.suppress(EOFError, OSError):
            parent.recv()
        signal.raise_signal(signal.SIGINT) if sys.platform == "win32" else os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=listen, daemon=True).start()
    try:
        config = LadderConfig.from_dict(settings)
        base = stored_base(config)
        plan = make_plan(config, base, open_source(source_config(base.data)))
        runs = [plan.run(*how) for how in listed]
        with contextlib.ExitStack() as stack:
            shared = None
            if config.storage is not None:
                shared = SharedRuns(config, note=parent.send, patient=True)
                stack.callback(shared.close)
            _train_here(plan, runs, lambda *words: parent.send(words), shared, (), until)
    except KeyboardInterrupt:
        return
    except HybridNASError as error:
        parent.send(error)


@contextlib.contextmanager
def _environment(workers: int) -> Iterator[None]:
    """Give each worker that is started here its share of the processor."""
    from hybridnas.search.workers.supervisor import THREAD_VARIABLES, threads_each

    threads = str(threads_each(workers))
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, threads))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
