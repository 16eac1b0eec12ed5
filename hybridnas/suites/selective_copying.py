"""``suite=selective_copying``: what selection is for (Mamba, arXiv 2312.00752, Table 1)."""

from __future__ import annotations

from hybridnas.suites.suite import Entry, Published, Suite, Task, register_suite

_BOTH = {"norm": "rmsnorm", "final_norm": True, "d_model": 64}


def _row(model: str, accuracy: float) -> Published:
    settings = "length 4096, 16 ids, 16 to copy, 2 layers, D 64, 400k steps, constant lr 1e-4, batch 64"
    return Published(model=model, values={"length 4096": accuracy}, source="2312.00752 Table 1", settings=settings)


TABLE_1 = (
    _row("S4, no gate", 18.3),
    _row("S6, no gate", 97.0),
    _row("H3 block, S4", 57.0),
    _row("H3 block, Hyena", 30.1),
    _row("H3 block, S6", 99.7),
    _row("Mamba block, S4", 56.4),
    _row("Mamba block, Hyena", 28.4),
    _row("Mamba block, S6", 99.8),
)


def _task(length: int, tokens: int, batch_size: int, schedule: str) -> Task:
    return Task(
        name=f"length {length}",
        column=f"length {length}",
        data={"kind": "selective_copying", "vocab_size": 16, "seq_len": length, "n_tokens_to_copy": 16},
        train={
            "seq_len": length,
            "batch_size": batch_size,
            "tokens": tokens,
            "schedule": schedule,
            "grad_clip": 1.0,
            "valid_tokens": 256 * length,
        },
        measurements=24,
    )


@register_suite("selective_copying")
def selective_copying(quick: bool) -> Suite:
    """Two Mamba layers of width 64, selective and with Delta, B and C independent of the input."""
    paper = _task(4096, 400_000 * 64 * 4096, 64, "constant")
    return Suite(
        name="selective_copying",
        title="Selective copying: 16 tokens out of noise (Mamba, Table 1)",
        tasks=(_task(128, 25_165_824, 16, "cosine"),) if quick else (paper,),
        entries=(
            Entry(name="selective", pattern="Mx2", fields=_BOTH),
            Entry(name="not selective", pattern="M{selective=none}x2", fields=_BOTH),
            Entry(name="only Delta", pattern="M{selective=dt}x2", fields=_BOTH, seeds=(0,)),
            Entry(name="only B and C", pattern="M{selective=B+C}x2", fields=_BOTH, seeds=(0,)),
        ),
        rates=(1e-3, 2e-3) if quick else (1e-4,),
        seeds=(0, 1) if quick else (0,),
        fields=_BOTH,
        stop_at=0.9999,
        published=TABLE_1,
        notes=(
            "Not selective: constant Delta per channel, B and C per state; the paper's S4 has B and C per channel.",
            *(("Quick: length 128 for 4096, batch 16, rates that fall to a tenth, 25.2 M tokens.",) if quick else ()),
        ),
    )
