"""``suite=rates``: the best learning rate by letter and width, with one rate for all weights and with muP's rates."""

from __future__ import annotations

from typing import Any

from hybridnas.suites.suite import Entry, Suite, Task, register_suite

BASE_WIDTH = 24  # where both parametrisations are the same, so that it is trained once
PATTERNS = ("MM", "AF", "AE", "GF")
RATES = (6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2)


def _task(name: str, **train: Any) -> Task:
    sizes = {"tokens": 131_072, "seq_len": 64, "batch_size": 8, "valid_tokens": 16_384}
    return Task(name=name, column=name, data={"kind": "stdlib"}, train={**sizes, **train}, measurements=2)


@register_suite("rates")
def rates(quick: bool) -> Suite:
    """Does one learning rate serve every letter and every width?"""
    widths = (BASE_WIDTH, 96) if quick else (BASE_WIDTH, 96, 48)
    return Suite(
        name="rates",
        title="Best learning rate by letter and width",
        tasks=(_task("none"), _task("mup", rate_scaling="mup", base_width=BASE_WIDTH)),
        entries=tuple(
            Entry(
                name=f"{pattern} {width}",
                pattern=pattern,
                fields={"d_model": width, **({"n_experts": 4} if "E" in pattern else {})},
                tasks=("none",) if width == BASE_WIDTH else (),
            )
            for width in widths
            for pattern in PATTERNS
        ),
        rates=RATES,
        decays=(0.1,),
        score="valid_loss",
        notes=(f"At width {BASE_WIDTH}, the base width, both parametrisations are the same training.",),
    )
