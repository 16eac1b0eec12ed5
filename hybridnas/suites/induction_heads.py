"""``suite=induction_heads``: accuracy far beyond the 256 tokens of training (Mamba, arXiv 2312.00752, Table 11)"""

from __future__ import annotations

from hybridnas.suites.suite import Entry, Published, Suite, Task, register_suite

LENGTHS = tuple(2**power for power in range(6, 21))
_NAMES = tuple(f"2^{power}" for power in range(6, 21))
_BOTH = {"norm": "rmsnorm", "final_norm": True}


def _row(model: str, params: str, *figures: float) -> Published:
    settings = f"{params} parameters; trained at 2^8, 16 ids, batch 8, constant lr, no weight decay"
    values = dict(zip(_NAMES, figures, strict=False))
    return Published(model=model, values=values, source="2312.00752 Table 11", settings=settings)


# OK in the paper is 100; attention was run to 2^14.
TABLE_11 = (
    _row("MHA-Abs", "137K", 100, 99.6, 100, 58.6, 26.6, 18.8, 9.8, 10.9, 7.8),
    _row("MHA-RoPE", "137K", 100, 100, 100, 83.6, 31.3, 18.4, 8.6, 9.0, 5.5),
    _row("MHA-xPos", "137K", 100, 100, 100, 99.6, 67.6, 25.4, 7.0, 9.0, 7.8),
    _row("H3", "153K", 100, 100, 100, 80.9, 39.5, 23.8, 14.8, 8.2, 5.9, 6.6, 8.2, 4.7, 8.2, 6.3, 7.4),
    _row("Hyena", "69M", 97.7, 100, 100, 100, 44.1, 12.5, 6.6, 5.1, 7.0, 5.9, 6.6, 6.6, 5.9, 6.3, 9.8),
    _row("Mamba", "74K", *[100] * 15),
)

_LONG, _SHORT = "trained at 2^8", "trained at 2^6"
_QUICK = (
    "Quick: at 2^8 Mamba alone, 16,384 steps, for attention did not leave chance there in half of them; at 2^6 all "
    "three, batch 32, 4,096 steps. One rate each: Mamba 2e-3, attention 1e-3."
)


def _task(name: str, length: int, batch_size: int, steps: int) -> Task:
    seen = batch_size * length
    return Task(
        name=name,
        column=name.rpartition(" ")[2],
        data={"kind": "induction_heads", "vocab_size": 16, "seq_len": length},
        train={
            "seq_len": length,
            "batch_size": batch_size,
            "tokens": steps * seen,
            "schedule": "constant",
            "grad_clip": 1.0,
            "eval_at": list(range(1024 * seen, steps * seen, 1024 * seen)),
            "valid_tokens": 512 * length,
        },
        lengths=LENGTHS,
    )


@register_suite("induction_heads")
def induction_heads(quick: bool) -> Suite:
    """Two layers: Mamba of width 64, attention of width 128 with rotary positions and with none."""
    paper = _task(_LONG, 256, 8, 204_800)
    mamba = {**_BOTH, "d_model": 64}
    heads = {**_BOTH, "d_model": 128, "A": {"n_heads": 8, "bias": True}}
    blind = {**heads, "A": {"n_heads": 8, "bias": True, "positions": "none"}}
    rates, tasks = ((1e-3,), (_SHORT,)) if quick else ((2e-4, 1e-3), ())
    entries = (
        Entry(name="mamba", pattern="Mx2", fields=mamba),
        Entry(name="attention, RoPE", pattern="Ax2", fields=heads, rates=rates, seeds=(0,), tasks=tasks),
        Entry(name="attention, no positions", pattern="Ax2", fields=blind, rates=rates, seeds=(0,), tasks=tasks),
    )
    return Suite(
        name="induction_heads",
        title="Induction heads (Mamba, Table 11)",
        tasks=(_task(_LONG, 256, 8, 16_384), _task(_SHORT, 64, 32, 4096)) if quick else (paper,),
        entries=entries,
        rates=(2e-3,) if quick else (1e-3, 2e-3),
        seeds=(0, 1) if quick else (0, 1, 2),
        fields=mamba,
        published=TABLE_11,
        figure="lengths",
        notes=(
            "As the paper: 16 ids, fresh examples, batch 8, constant rate, no weight decay, 204,800 steps. No training "
            "ends early: right at 256 tokens, after 3,072 steps, was not yet right at 131,072.",
            "Departures: Mamba's grid is 1e-3 and 2e-3, attention's the paper's 2e-4 and 1e-3; 1 % warm-up; gradients "
            "clipped at 1; AdamW. At least one token lies between the answer and the last trigger, as in H3's data.",
            *((_QUICK,) if quick else ()),
        ),
    )
