"""``suite=mad``: MAD's six tasks, scored as MAD scores them (arXiv 2403.17844; athms/mad-lab)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybridnas.suites.suite import Entry, Published, Suite, Task, register_suite

COLUMNS = ("compress", "fuzzy recall", "in-context recall", "memorise", "noisy recall", "selective copy")
_QUOTED = "2403.17844, as quoted by DeltaNet (2406.06484)"
_SETTINGS = "2 blocks of mixer and channel mixer, width 128, 66 settings x 6 optimiser settings, one seed"
_FEWER = {"n_train_examples": (6400, 3200, 1600, 800)}
_LONGER = {"seq_len": (256, 512, 1024)}
_WIDER = {"vocab_size": (32, 64, 128)}

# column -> kind of data, its baseline, and what is changed, one at a time (mad-lab's configs/tasks)
TASKS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    "compress": (
        "compression",
        {"vocab_size": 16, "seq_len": 32, "n_train_examples": 12_800},
        {**_WIDER, "seq_len": (64, 128, 256), **_FEWER},
    ),
    "fuzzy recall": (
        "fuzzy_recall",
        {"vocab_size": 16, "seq_len": 128, "n_train_examples": 12_800},
        {**_WIDER, **_LONGER, **_FEWER},
    ),
    "in-context recall": (
        "in_context_recall",
        {"vocab_size": 16, "seq_len": 128, "n_train_examples": 12_800},
        {**_WIDER, **_LONGER, **_FEWER},
    ),
    "memorise": (
        "memorisation",
        {"vocab_size": 256, "seq_len": 32, "n_train_examples": 256},
        {"vocab_size": (512, 1024, 2048, 4096, 8192)},
    ),
    "noisy recall": (
        "noisy_recall",
        {"vocab_size": 32, "seq_len": 128, "n_train_examples": 12_800, "frac_noise": 0.2},
        {"vocab_size": (48, 80, 144), **_LONGER, **_FEWER, "frac_noise": (0.4, 0.6, 0.8)},
    ),
    "selective copy": (
        "mad_selective_copying",
        {"vocab_size": 16, "seq_len": 256, "n_train_examples": 12_800, "n_tokens_to_copy": 16},
        {**_WIDER, "seq_len": (512, 1024), **_FEWER, "n_tokens_to_copy": (32, 64, 96)},
    ),
}


def _printed(model: str, *figures: float, source: str = _QUOTED) -> Published:
    values = dict(zip((*COLUMNS, "average"), figures, strict=True))
    return Published(model=model, values=values, source=source, settings=_SETTINGS)


TABLE = (
    _printed("Transformer", 51.6, 29.8, 94.1, 85.2, 86.8, 99.6, 74.5),
    _printed("Hyena", 45.2, 7.9, 81.7, 89.5, 78.8, 93.1, 66.0),
    _printed("multi-head Hyena", 44.8, 14.4, 99.0, 89.4, 98.6, 93.0, 73.2),
    _printed("Mamba", 52.7, 6.7, 90.4, 89.5, 90.1, 86.3, 69.3),
    _printed("GLA", 38.8, 6.9, 80.8, 63.3, 81.6, 88.6, 60.0),
    _printed("DeltaNet", 42.2, 35.7, 100, 52.8, 100, 100, 71.8),
    _printed("Mamba, rerun", 44.0, 9.6, 87.9, 89.5, 90.9, 81.8, 67.3, source="MetaLA's rerun, as quoted"),
)


def settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (column, name, data) of all 66 settings: six baselines, and every change of one figure."""
    for column, (kind, baseline, changes) in TASKS.items():
        yield column, f"{column}, baseline", {"kind": kind, **baseline}
        for field, values in changes.items():
            for value in values:
                yield column, f"{column}, {field} {value}", {"kind": kind, **baseline, field: value}


def _task(column: str, name: str, data: dict[str, Any], quick: bool) -> Task:
    length, examples = data["seq_len"], data["n_train_examples"]
    batch = 32 if quick else 128
    tokens = QUICK_TOKENS.get(column, QUICK_TOKENS["default"]) if quick else 200 * examples * length
    return Task(
        name=name,
        column=column,
        data={**data, "n_test_examples": 320 if quick else 1280},
        train={
            "seq_len": length,
            "batch_size": batch,
            "tokens": max(tokens, batch * length),
            "warmup_fraction": 0.0,
            "final_lr_fraction": 0.0,
            "grad_clip": 1.0,
            "valid_tokens": (320 if quick else 1280) * length,
        },
        measurements=10 if quick else 20,
    )


QUICK_TOKENS = {"default": 2_000_000, "compress": 1_000_000, "memorise": 800_000, "selective copy": 3_000_000}


@register_suite("mad")
def mad(quick: bool) -> Suite:
    """Six tasks; the score of one is the mean over its settings of the best of the optimiser grid."""
    chosen = [item for item in settings() if not quick or item[1].endswith("baseline")]
    fields = {"d_model": 64 if quick else 128, "norm": "rmsnorm", "final_norm": True}
    swiglu = {"activation": "silu", "gated": True, "bias": False, "d_ff": 176 if quick else 352}
    heads = {"n_heads": 8 if quick else 16}
    return Suite(
        name="mad",
        title="MAD: mechanistic tasks (2403.17844)",
        tasks=tuple(_task(*item, quick) for item in chosen),
        entries=(
            Entry(name="transformer", pattern="(AF)x2", fields={**fields, "F": swiglu, "A": heads}),
            Entry(name="mamba", pattern="(MF)x2", fields={**fields, "F": swiglu, "M": {"d_state": 4}}),
        ),
        rates=(1e-3, 4e-3) if quick else (1e-4, 5e-4, 1e-3),
        decays=(0.0,) if quick else (0.0, 0.1),
        fields=fields,
        stop_at=0.999,
        published=TABLE,
        notes=(
            "Our mamba has MAD's state size 4; patterns given by name take the blocks' defaults (16). Accuracy is per "
            "place, mad-lab's averaged over the vocabulary. Weight decay spares norms and embeddings; the rate falls "
            "to 0; gradients are clipped at 1.",
            *((_QUICK,) if quick else ()),
        ),
    )


_QUICK = (
    "Quick: the six baselines alone, width 64, batch 32, 0.8 to 3 M tokens a run, two rates, no decay: its ranks stand "
    "for the full version's only as far as suite.against= has measured."
)
