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


def recall_task(length: int, pairs: int, *, vocab: int, batch: int, tokens: int, quick: bool, points: int = 16) -> Task:
    """Return MQAR at one size; quick: no example twice and zeros between the queries, else 100,000 and random ids."""
    return Task(
        name=f"length {length}, {pairs} pairs",
        column=f"length {length}, {pairs} pairs",
        data={
            "kind": "mqar",
            "vocab_size": vocab,
            "seq_len": length,
            "n_pairs": pairs,
            "n_train_examples": None if quick else 100_000,
            "n_test_examples": 512 if quick else 3000,
            "filler": "zero" if quick else "random",
        },
        train={
            "seq_len": length,
            "batch_size": batch,
            "tokens": tokens,
            "grad_clip": 1.0,
            "final_lr_fraction": 0.0,
            "valid_tokens": (512 if quick else 3000) * length,
        },
        measurements=points,
    )


_QUICK = (
    "Quick: 32 tokens, 64 ids instead of 8,192, zeros instead of random ids between the queries, fresh examples, "
    "widths 16 to 64, two rates."
)


@register_suite("mqar")
def mqar(quick: bool) -> Suite:
    """Two layers without channel mixers, each width on its own."""
    tasks: tuple[Task, ...]
    if quick:
        tasks = (
            recall_task(32, 4, vocab=64, batch=32, tokens=6_000_000, quick=True),
            recall_task(32, 8, vocab=64, batch=32, tokens=6_000_000, quick=True),
        )
    else:
        sizes = ((64, 4, 512), (128, 8, 512), (256, 16, 256), (512, 64, 128))
        tasks = tuple(
            recall_task(n, k, vocab=8192, batch=b, tokens=64 * 100_000 * n, quick=False, points=64) for n, k, b in sizes
        )
    return Suite(
        name="mqar",
        title="Multi-query associative recall (Zoology, Figure 2)",
        tasks=tasks,
        entries=tuple(
            Entry(name=name, pattern=pattern, fields=FIELDS)
            for name, pattern in (("attention", "Ax2"), ("mamba", "Mx2"), ("hybrid, one attention layer", "MA"))
        ),
        rates=(2e-3, 4e-3) if quick else RATES,
        decays=(0.1,),
        fields=FIELDS,
        variants=tuple({"d_model": width} for width in ((16, 32, 64) if quick else (64, 128, 256, 512))),
        stop_at=0.99,
        figure="widths",
        published=METALA,
        notes=(
            "Zoology: attention solves every size at every width; models of fixed state need a width that grows with "
            "the pairs. Its attention has learned positions, ours rotary ones; only Mamba has a short convolution.",
            *((_QUICK,) if quick else ()),
        ),
    )
