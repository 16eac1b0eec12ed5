"""``python -m hybridnas.search.workers.child``: one worker of a search, started by the command that runs it.

Its orders come as one line of JSON on standard input. The end of that stream is the request to save and leave, whether
the parent closes it or dies. Events go back as lines of JSON on standard output.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import IO, Any

from hybridnas.errors import HybridNASError
from hybridnas.plugins import load_files
from hybridnas.search.confirm import train_ahead
from hybridnas.search.history import History
from hybridnas.search.lines import received, send
from hybridnas.search.loop import Listener, Loop
from hybridnas.search.session import Settings, open_session
from hybridnas.search.workers.orders import Orders
from hybridnas.study.callbacks import COMPLETED
from hybridnas.study.records import TrialRecord


class _Sender(Listener):
    """Sends the events of the loop to the parent, which reads records from the store itself."""

    def __init__(self, answers: IO[str]) -> None:
        self.answers = answers

    def started(self, record: TrialRecord, tokens: int, why: str) -> None:
        send(self.answers, {"started": [record.to_dict(), tokens, why]})

    def measured(self, number: int, values: dict[str, Any]) -> None:
        finite = {name: value for name, value in values.items() if value is None or value == value}
        send(self.answers, {"measured": [number, finite]})

    def ended(self, record: TrialRecord, history: History) -> None:
        send(self.answers, {"ended": record.number})

    def note(self, text: str) -> None:
        send(self.answers, {"note": text})


def main() -> int:
    """Work until there is nothing left to do; returns the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background may have it ignored
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no message
    first = next(received(sys.stdin), None)
    if first is None:
        return 1
    orders = Orders.of(first)
    threading.Thread(target=_interrupt_at_the_end, daemon=True).start()
    began = time.monotonic() - max(0.0, time.time() - orders.started)

    def elapsed() -> float:
        return time.monotonic() - began

    listener = _Sender(answers)
    try:
        load_files(orders.plugins)
        settings = Settings.of(orders.search_config())
        with open_session(settings, orders=orders, elapsed=elapsed, note=listener.note) as session:
            loop = Loop(session.plan, session.store, session.trainer, listener, elapsed=elapsed)
            send(answers, {"ready": True})
            if orders.again:
                train_ahead(session, orders.again, listener.note)
                send(answers, {"reason": COMPLETED})
            else:
                send(answers, {"reason": loop.run()})
    except HybridNASError as error:
        send(answers, {"error": [type(error).__name__, str(error)]})
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _interrupt_at_the_end() -> None:
    """Wait for the end of standard input; then save and leave, as if Ctrl-C had been pressed."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdin.read()
    if sys.platform == "win32":
        import _thread

        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
