"""``suite=rates`` and ``suite=optimizers``: best learning rates by letter and width, and what other options change.

The first trains with one rate for all weights and with muP's rates, the second beside AdamW with Muon, with a z-loss
and with a faster embedding, each at its own best rate.
"""

from __future__ import annotations

from typing import Any

from hybridnas.suites.suite import Entry, Suite, Task, register_suite

BASE_WIDTH = 24  # where both parametrisations are the same, so that it is trained once
PATTERNS = ("MM", "AF", "AE", "GF", "NF", "LF", "KF", "CF")
FEW = PATTERNS[:4]  # in which the options are compared
RATES = (6e-3, 1.2e-2, 2.4e-2, 4.8e-2, 9.6e-2)


def _task(name: str, **train: Any) -> Task:
    sizes = {"tokens": 131_072, "seq_len": 64, "batch_size": 8, "valid_tokens": 16_384}
    return Task(name=name, column=name, data={"kind": "stdlib"}, train={**sizes, **train}, measurements=2)


def _entry(pattern: str, width: int, tasks: tuple[str, ...] = ()) -> Entry:
    fields: dict[str, Any] = {"d_model": width, **({"n_experts": 4} if "E" in pattern else {})}
    if "N" in pattern:
        fields["N"] = {"d_state": 16}
    return Entry(name=f"{pattern} {width}", pattern=pattern, fields=fields, tasks=tasks)


@register_suite("rates")
def rates(quick: bool) -> Suite:
    """Does one learning rate serve every letter and every width?"""
    widths = (BASE_WIDTH, 96) if quick else (BASE_WIDTH, 96, 48)
    return Suite(
        name="rates",
        title="Best learning rate by letter and width",
        tasks=(_task("none"), _task("mup", rate_scaling="mup", base_width=BASE_WIDTH)),
        entries=tuple(
            _entry(pattern, width, ("none",) if width == BASE_WIDTH else ()) for width in widths for pattern in PATTERNS
        ),
        rates=RATES,
        decays=(0.1,),
        score="valid_loss",
        notes=(f"At width {BASE_WIDTH}, the base width, both parametrisations are the same training.",),
    )


@register_suite("optimizers")
def optimizers(quick: bool) -> Suite:
    """Do Muon, a z-loss or a faster embedding lower the loss, each at its own best rate?"""
    return Suite(
        name="optimizers",
        title="AdamW, Muon, z-loss and the embedding's rate",
        tasks=(
            _task("adamw"),
            _task("muon", optimizer="muon"),
            _task("z_loss", z_loss=1e-4),
            _task("embedding", embedding_lr=4.0),
        ),
        entries=tuple(_entry(pattern, width) for width in ((24,) if quick else (24, 96)) for pattern in FEW),
        rates=RATES,
        decays=(0.1,),
        score="valid_loss",
        notes=("z_loss: 0.0001; embedding: its rate is 4 times that of the other weights.",),
    )
