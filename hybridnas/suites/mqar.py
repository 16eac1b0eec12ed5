"""``suite=mqar``: multi-query associative recall at several widths (Zoology, arXiv 2312.04927, Figure 2)."""

from __future__ import annotations

from hybridnas.suites.suite import Entry, Published, Suite, Task, register_suite

FIELDS = {"norm": "rmsnorm", "final_norm": True}
RATES = (1e-4, 4.64e-4, 2.15e-3, 1e-2)  # Zoology's logspace(-4, -2, 4)


def _elsewhere(model: str, column: str, accuracy: float, settings: str) -> Published:
    return Published(model=model, values={column: accuracy}, source="MetaLA, as quoted", settings=settings)


_HARD = "length 512, 80 pairs"
METALA = (
    _elsewhere("Transformer", _HARD, 99.0, "d_model 64; printed as above 99"),
    _elsewhere("Mamba", _HARD, 0.0, "d_model 64, and 128"),
    _elsewhere("MetaLA", _HARD, 28.5, "d_model 64"),
    _elsewhere("MetaLA", _HARD, 90.4, "d_model 128"),
)


def recall_task(length: int, pairs: int, *, vocab: int, batch: int, tokens: int, fresh: bool, points: int = 16) -> Task:
    """Return MQAR at one size; ``fresh``: no example twice, else Zoology's 100,000."""
    return Task(
        name=f"length {length}, {pairs} pairs",
        column=f"length {length}, {pairs} pairs",
        data={
            "kind": "mqar",
            "vocab_size": vocab,
            "seq_len": length,
            "n_pairs": pairs,
            "n_train_examples": None if fresh else 100_000,
            "n_test_examples": 512 if fresh else 3000,
        },
        train={
            "seq_len": length,
            "batch_size": batch,
            "tokens": tokens,
            "grad_clip": 1.0,
            "final_lr_fraction": 0.0,
            "valid_tokens": (512 if fresh else 3000) * length,
        },
        measurements=points,
    )


@register_suite("mqar")
def mqar(quick: bool) -> Suite:
    """Two layers without channel mixers, each width on its own."""
    tasks: tuple[Task, ...]
    if quick:
        tasks = (
            recall_task(64, 4, vocab=128, batch=32, tokens=3_000_000, fresh=True),
            recall_task(64, 16, vocab=128, batch=32, tokens=3_000_000, fresh=True),
        )
    else:
        sizes = ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128))
        tasks = tuple(
            recall_task(n, k, vocab=8192, batch=b, tokens=64 * 100_000 * n, fresh=False, points=64) for n, k, b in sizes
        )
    return Suite(
        name="mqar",
        title="Multi-query associative recall (Zoology, Figure 2)",
        tasks=tasks,
        entries=tuple(
            Entry(name=name, pattern=pattern, fields=FIELDS)
            for name, pattern in (("attention", "Ax2"), ("mamba", "Mx2"), ("hybrid, one attention layer", "MA"))
        ),
        rates=(2e-3, 8e-3) if quick else RATES,
        decays=(0.1,),
        fields=FIELDS,
        variants=({"d_model": 32}, {"d_model": 64}) if quick else tuple({"d_model": 2**k} for k in (6, 7, 8, 9)),
        stop_at=0.99,
        published=METALA,
        notes=(
            "Zoology: attention solves every size at every width; models of fixed state need a width that grows with "
            "the pairs. Its attention has learned positions, ours rotary ones; only Mamba has a short convolution.",
            *(("Quick: 128 ids instead of 8,192, fresh examples, widths 32 and 64, two rates.",) if quick else ()),
        ),
    )
