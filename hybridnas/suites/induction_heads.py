"""``suite=induction_heads``: trained at 256 tokens, how far does it reach? (Mamba, arXiv 2312.00752, Table 11)"""

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

_QUICK = "Quick: 16,384 steps, one rate for each: Mamba 2e-3, attention 5e-4."


@register_suite("induction_heads")
def induction_heads(quick: bool) -> Suite:
    """Two layers: Mamba of width 64, attention of width 128 with rotary positions and with none."""
    steps = 16_384 if quick else 204_800
    task = Task(
        name="induction heads",
        column="2^8",
        data={"kind": "induction_heads", "vocab_size": 16, "seq_len": 256},
        train={
            "seq_len": 256,
            "batch_size": 8,
            "tokens": steps * 8 * 256,
            "schedule": "constant",
            "grad_clip": 1.0,
            "eval_at": list(range(1024 * 2048, steps * 2048, 1024 * 2048)),
            "valid_tokens": 512 * 256,
        },
        lengths=LENGTHS,
    )
    heads = {**_BOTH, "d_model": 128, "A": {"n_heads": 8, "bias": True}}
    attention = (5e-4,) if quick else (2e-4, 1e-3)
    blind = {**heads, "A": {"n_heads": 8, "bias": True, "positions": "none"}}
    return Suite(
        name="induction_heads",
        title="Induction heads, trained at 256 tokens (Mamba, Table 11)",
        tasks=(task,),
        entries=(
            Entry(name="mamba", pattern="Mx2", fields={**_BOTH, "d_model": 64}),
            Entry(name="attention, RoPE", pattern="Ax2", fields=heads, rates=attention, seeds=(0,)),
            Entry(name="attention, no positions", pattern="Ax2", fields=blind, rates=attention, seeds=(0,)),
        ),
        rates=(2e-3,) if quick else (1e-3, 2e-3),
        seeds=(0, 1) if quick else (0, 1, 2),
        fields={**_BOTH, "d_model": 64},
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
