"""A case timed once more in a fresh process, whose malloc is as users have it.

Suites run with ``keep_memory`` favour forms that allocate much: freed memory comes back without page faults. That is
the fair comparison of arithmetic; what either side costs its user out of the box is this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybridnas.bench import child
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.result import Result


def again(
    config: BenchConfig,
    result: Result,
    case: str,
    work: str,
    arguments: dict[str, Any],
    ratios: Sequence[tuple[str, str]],
) -> None:
    """Add ``case``, labelled with its malloc: ``work(**arguments)()`` in a child gives name -> seconds of every round.

    Where this process itself has kept malloc as it comes, its own figures are those, and a note says so.
    """
    if not config.keep_memory:
        result.notes.append(f"{case}: default malloc throughout (keep_memory=false); who allocates much pays for it")
        return
    labelled = f"{case}, default malloc"
    one = child.measured(work, arguments, threads=config.threads)
    if one.failed:
        result.missing(labelled, ratios[0][1], one.failed)
        return
    result.add(labelled, one.value)
    for of, over in ratios:
        result.ratio(labelled, of, over)
