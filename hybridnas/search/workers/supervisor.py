"""``workers=N``: independent processes on one study, watched by the command that started them.

The parent trains nothing. It holds the study's folder, starts the workers, passes on their news, mirrors their records
to MLflow, replaces a worker that dies, and writes the report when all have ended. A worker reads its orders as one line
of JSON on its standard input and takes the end of that pipe for the parent's death; it answers in lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hybridnas import errors
from hybridnas.errors import HybridNASError, StudyError
from hybridnas.search.config import Budget, SearchConfig
from hybridnas.search.storage.leases import LEASES

if TYPE_CHECKING:
    import optuna

    from hybridnas.search.runner import Search
    from hybridnas.search.trial import TrialContext

POLL_SECONDS = 0.2
STILLBORN = 3  # so many in a row that die before they have begun, and it is not chance
GRACE_SECONDS = 60.0  # for workers to save and leave once the search has gone wrong


@dataclass(frozen=True)
class Orders:
    """What a worker is told. It travels through a pipe: nothing of it is seen in a process list or lies on a disk."""

    config: Mapping[str, Any]
    token: str  # lets it into the folder that its parent holds
    worker: int
    started: float  # of the command [Unix time]

    def search_config(self) -> SearchConfig:
        """Return the settings of the search, as a worker runs them: silent, and without MLflow."""
        values = {**self.config, "budget": Budget.from_dict(self.config["budget"])}
        return SearchConfig.from_dict({**values, "progress": False, "tracking": "off"})


@dataclass
class Worker:
    """One child process as its parent sees it."""

    number: int
    process: subprocess.Popen[str]
    log: Path
    ready: bool = False
    ended: str | None = None
    error: tuple[str, str] | None = None
    silent: bool = False  # its last word has been heard
    words: queue.SimpleQueue[Mapping[str, Any] | None] = field(default_factory=queue.SimpleQueue)


class Supervisor:
    """Starts and watches the workers of one search."""

    def __init__(self, search: Search, study: optuna.Study, context: TrialContext) -> None:
        self.search = search
        self.study = study
        self.context = context
        self.workers: list[Worker] = []
        self.stopping = 0  # how often Ctrl-C was pressed
        self.stillborn = 0
        self.failure: HybridNASError | None = None
        self.ends: list[str] = []

    def run(self) -> str:
        """Watch until every worker has ended; returns why the search ended, or raises what a worker raised."""
        count = self.search.config.workers
        self.search.news(f"{count} workers of {threads_each(count)} thread(s) each")
        try:
            self.workers = [self._start(number) for number in range(count)]
            while self.workers:
                try:
                    self._look()
                except KeyboardInterrupt:
                    self._pass_on_interrupt()
        finally:
            self._end_all()
        self._take_in()
        if self.failure is not None:
            raise self.failure
        if self.stopping:
            raise KeyboardInterrupt
        return next((word for word in ("completed", "time") if word in self.ends), self.ends[-1])

    def _start(self, number: int) -> Worker:
        search = self.search
        config = search.config
        log = search.folder.path / LEASES / f"worker-{number}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as errors_to:
            process = subprocess.Popen(
                [sys.executable, "-m", "hybridnas.search.workers.supervisor"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors_to,
                text=True,
                errors="replace",  # a killed worker may leave half a character
                env=environment(config, number),
                start_new_session=True,  # Ctrl-C in the terminal is the parent's, which passes it on once
            )
        orders = Orders(config.to_dict(), search.folder.token, number, time.time() - search.elapsed)
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once, which is seen when it is waited for
            process.stdin.write(json.dumps(orders.__dict__) + "\n")
            process.stdin.flush()
        worker = Worker(number, process, log)
        threading.Thread(target=_listen, args=(process.stdout, worker.words), daemon=True).start()
        return worker

    def _look(self) -> None:
        time.sleep(POLL_SECONDS)
        said = False
        for worker in list(self.workers):
            gone = worker.process.poll() is not None
            said |= self._hear(worker, to_the_end=gone)
            if gone:
                self.workers.remove(worker)
                self._mourn(worker)
        if said:
            self._take_in()

    def _hear(self, worker: Worker, *, to_the_end: bool) -> bool:
        """Act on what a worker has said; of a dead one, on everything to its last word."""
        said = False
        while not worker.silent and (to_the_end or not worker.words.empty()):
            message = worker.words.get()
            if message is None:
                worker.silent = True  # the pipe may end a moment before the process: nothing follows
                break
            said = True
            worker.ready |= "ready" in message
            worker.ended = message.get("ended", worker.ended)
            if "news" in message:
                self.search.news(message["news"])
            if "error" in message:
                worker.error = (message["error"][0], message["error"][1])
        if worker.ready:
            self.stillborn = 0
        return said

    def _mourn(self, worker: Worker) -> None:
        """See how a worker ended; one that died is replaced."""
        if worker.process.stdin is not None:
            with contextlib.suppress(OSError):
                worker.process.stdin.close()
        code = worker.process.returncode
        if worker.error is not None:
            name, text = worker.error
            self._fail(getattr(errors, name, StudyError)(text))
        elif worker.ended is not None:
            self.ends.append(worker.ended)
        elif not self.stopping and self.failure is None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.stillborn += not worker.ready
            if self.stillborn >= STILLBORN:
                last = worker.log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
                self._fail(StudyError(f"workers cannot start ({how}); the last one said: {last[0]} (see {worker.log})"))
                return
            self.search.news(
                f"worker {worker.number} died ({how}); another takes its place and goes on from its trial's checkpoint"
            )
            self.workers.append(self._start(worker.number))

    def _fail(self, error: HybridNASError) -> None:
        """Keep the first error, and let the others save what they have."""
        if self.failure is None:
            self.failure = error
            self._signal()

    def _signal(self) -> None:
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGINT)

    def _pass_on_interrupt(self) -> None:
        """The first Ctrl-C lets workers finish their step and save, the second ends them at once."""
        self.stopping += 1
        if self.stopping == 1:
            self.search.news("stopping: each worker finishes its step and saves; Ctrl-C again stops at once")
            self._signal()
        else:
            for worker in self.workers:
                worker.process.kill()

    def _take_in(self) -> None:
        """Read what the workers have recorded, and mirror it."""
        self.context.tracker.sync(self.search.crew.refresh(self.study, self.search.records))
        if self.search.page is not None:
            self.search.page.update(self.search.records.values())

    def _end_all(self) -> None:
        """Leave no process behind, whatever happened here: without this pipe they end by themselves, too."""
        until = time.monotonic() + (0.0 if self.stopping > 1 else GRACE_SECONDS)
        for worker in self.workers:
            if worker.process.stdin is not None:
                with contextlib.suppress(OSError):
                    worker.process.stdin.close()
            try:
                worker.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()


def threads_each(workers: int) -> int:
    """Return how many threads a worker computes with: the processor divided, or what OMP_NUM_THREADS says if less."""
    from hybridnas.hardware import usable_cores

    cores = usable_cores()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores // workers, int(wanted) if wanted.isdigit() and int(wanted) > 0 else cores))


def environment(config: SearchConfig, worker: int) -> dict[str, str]:
    """Return a worker's environment: its share of the processor, and one of the GPUs where there are several."""
    from hybridnas.hardware import pick_device

    threads = str(threads_each(config.workers))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    values = {**os.environ, **dict.fromkeys(names, threads)}
    device = pick_device(config.device)
    if device.type == "cuda" and device.index is None:
        import torch

        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        values["CUDA_VISIBLE_DEVICES"] = seen.split(",")[worker % len(seen.split(","))]
    return values


def _listen(stream: IO[str], words: queue.SimpleQueue[Mapping[str, Any] | None]) -> None:
    try:
        with stream:
            for line in stream:
                try:
                    message = json.loads(line)
                except ValueError:
                    continue  # a library's own print
                if isinstance(message, dict):
                    words.put(message)
    finally:
        words.put(None)


def main() -> int:
    """Work as one child: the orders come on standard input, and its end is the parent's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no message

    def say(**message: Any) -> None:
        with contextlib.suppress(OSError):  # the parent is gone; the end of the other pipe says so, too
            print(json.dumps(message), file=answers, flush=True)

    line = sys.stdin.readline()
    if not line.strip():
        return 1
    orders = Orders(**json.loads(line))
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    try:
        from hybridnas.search.runner import Search

        search = Search(orders.search_config(), lambda text: say(news=text))
        say(ended=search.work(orders, lambda: say(ready=True)))
    except HybridNASError as error:
        say(error=[type(error).__name__, str(error)])
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _outlive_nobody() -> None:
    """Wait for the parent's end; then save and leave, as if Ctrl-C had been pressed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
