"""Train a ladder's runs, in this process or several; what has ended is never trained again.

A run is claimed by a lock that its process holds, so any number of processes can share a list: each takes the next run
that is neither ended nor claimed. Workers end when the pipe to the command that started them closes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from hybridnas.errors import HybridNASError, StudyError
from hybridnas.ladders.config import LadderConfig
from hybridnas.ladders.plan import LadderRun, Plan
from hybridnas.ladders.rows import ended
from hybridnas.study.locks import FileLock
from hybridnas.train.callbacks import Callback
from hybridnas.train.experiment import Cell, CellResult, Experiment

OnEnd = Callable[[str, str, str], None]  # takes a run's key, its status and its reason


def train(
    plan: Plan,
    runs: Sequence[LadderRun],
    on_end: OnEnd,
    *,
    callbacks: Iterable[Callback] = (),
    until: float | None = None,
) -> None:
    """Train what has not ended, until all has, or ``until`` [time.time()]; ``on_end`` is called with each that ends.

    Ctrl-C saves and raises KeyboardInterrupt. Raises what a training raises that would end the next one, too.
    """
    if plan.config.workers == 1:
        _train_here(plan, runs, on_end, callbacks, until)
    elif any(not ended(run) for run in runs):
        _train_apart(plan, runs, on_end, until)


def _train_here(
    plan: Plan, runs: Sequence[LadderRun], on_end: OnEnd, callbacks: Iterable[Callback], until: float | None
) -> None:
    def keep(done: CellResult) -> None:
        on_end(done.cell.key, done.result.status, done.result.reason)

    minutes = None if until is None else max(0.0, until - time.time()) / 60
    with contextlib.closing(_claimed(plan, runs)) as cells:  # whatever ends it, its claim ends here
        Experiment(cells, callbacks=callbacks, minutes=minutes, on_result=keep).run()


def _claimed(plan: Plan, runs: Sequence[LadderRun]) -> Generator[Cell, None, None]:
    """Yield the cells of runs that are neither ended nor another process's, each held until the next is asked for."""
    for run in runs:
        lock = FileLock(plan.folder / ".claims" / f"{run.key.replace('/', '--')}.lock")
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
                )
        finally:
            lock.release()


def _train_apart(plan: Plan, runs: Sequence[LadderRun], on_end: OnEnd, until: float | None) -> None:
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
                    if isinstance(message, HybridNASError):
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
    from hybridnas.ladders.entrants import base_of
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
        base = base_of(config)
        plan = make_plan(config, base, open_source(source_config(base.data)))
        runs = [plan.run(*how) for how in listed]
        _train_here(plan, runs, lambda *words: parent.send(words), (), until)
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
