"""``suite=recall_state``: recall over the bytes that a sequence carries (the question of Zoology and Based)."""

from __future__ import annotations

from hybridnas.suites.mqar import FIELDS, recall_task
from hybridnas.suites.suite import Entry, Suite, register_suite


@register_suite("recall_state")
def recall_state(quick: bool) -> Suite:
    """MQAR for widths, state sizes and shares of attention; one line per pattern, one point per size."""
    widths: tuple[int, ...]
    states: tuple[int, ...]
    if quick:
        task = recall_task(32, 4, vocab=64, batch=32, tokens=6_000_000, quick=True)
        widths, states = (16, 32, 64), (4, 16)
    else:
        task = recall_task(256, 64, vocab=8192, batch=64, tokens=200 * 100_000 * 256, quick=False, points=64)
        widths, states = (32, 64, 128, 256), (4, 16, 64, 256)
    patterns = (("no attention", "Mx4"), ("1/4 attention", "MMAM"), ("1/2 attention", "MAMA"), ("attention", "Ax4"))
    return Suite(
        name="recall_state",
        title=f"Recall against state: MQAR, {task.name}",
        tasks=(task,),
        entries=tuple(Entry(name=name, pattern=pattern, fields=FIELDS) for name, pattern in patterns),
        rates=(2e-3, 4e-3) if quick else (4.64e-4, 2.15e-3, 1e-2),
        decays=(0.1,),
        fields=FIELDS,
        variants=tuple({"d_model": width, "d_state": state} for width in widths for state in states),
        stop_at=0.99,
        figure="state",
        notes=("State: what one sequence carries at the task's length (KV, SSM and convolution), float32.",),
    )
