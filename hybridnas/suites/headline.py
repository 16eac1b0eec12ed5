"""``suite=headline``: the presets at matched active parameters and 250 tokens for each (MoE-Mamba, arXiv 2401.04081).

And what goes with it: the number of experts, and Mamba's own ablations, on the same text.
"""

from __future__ import annotations

from typing import Any

from hybridnas.suites.suite import Entry, Published, Suite, Task, register_suite

WIDTH = 32
TOKENS_PER_ACTIVE = 250.0  # the paper's 6.55 B tokens on 26 M active parameters
MAMBA_ACTIVE = 39_936  # of preset mamba at d_model 32 with four layers: what the others are matched to
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)  # Mamba is best at the upper end, MoE-Mamba in the lower half
MIDDLE_RATES = RATES[1:3]
COLUMN = "loss"
_V1, _V2 = "2401.04081v1 Table 1", "2401.04081v2 Table 1"
_COUNTS = "2401.04081 v1 Table 2, v2 Table 4"


def _text(points: int, per_active: float | None = None, **train: Any) -> Task:
    return Task(
        name=COLUMN,
        column=COLUMN,
        data={"kind": "stdlib"},
        train={"seq_len": 256, "batch_size": 16, "weight_decay": 0.1, "valid_tokens": 65_536, **train},
        tokens_per_active=per_active,
        measurements=points,
    )


def _preset(name: str, blocks: int, **fields: Any) -> Entry:
    target = None if name == "mamba" else MAMBA_ACTIVE
    matters = name in ("mamba", "moe_mamba")
    sizes = {"d_model": WIDTH, "n_blocks": blocks, **fields}
    seeds, rates = (None, None) if matters else ((0,), MIDDLE_RATES)
    return Entry(name=name, preset=name, fields=sizes, active_params=target, seeds=seeds, rates=rates)


def _v1(model: str, active: str, loss: float, share: float | None) -> Published:
    values = {"loss at 100k steps, v1": loss, **({} if share is None else {"% of Mamba's steps, v1": share})}
    return Published(model=model, values=values, source=_V1, settings=f"{active} active, 6.55 B tokens")


def _v2(model: str, active: str, loss: float, speed: float | None) -> Published:
    values = {"log-perplexity, v2": loss, **({} if speed is None else {"speed-up, v2": speed})}
    return Published(model=model, values=values, source=_V2, settings=f"{active} active, 9.83 B tokens")


HEADLINE = (
    _v1("Transformer", "25M", 3.66, None),
    _v1("Mamba-MLP", "26M", 3.56, None),
    _v1("Transformer-MoE", "25M", 3.54, None),
    _v1("Mamba", "27M", 3.51, 100),
    _v1("MoE-Mamba", "26M", 3.41, 46),
    _v2("Mamba-25M", "27M", 3.34, 1),
    _v2("MoE-Mamba-25M", "26M", 3.19, 1.76),
    _v2("Transformer-MoE-25M", "25M", 3.23, 1.56),
    _v2("Transformer-25M", "25M", 3.43, None),
)


@register_suite("headline")
def headline(quick: bool) -> Suite:
    """What share of Mamba's steps does MoE-Mamba need to reach Mamba's final loss?"""
    return Suite(
        name="headline",
        title="MoE-Mamba's headline at d_model 32, active parameters matched",
        tasks=(_text(6 if quick else 24, 25.0 if quick else TOKENS_PER_ACTIVE),),
        entries=(
            _preset("mamba", 4),
            _preset("moe_mamba", 2, n_experts=32),
            _preset("mamba_mlp", 2),
            _preset("transformer_moe", 2, n_experts=32),
            _preset("transformer", 2),
        ),
        rates=RATES,
        seeds=(0,) if quick else (0, 1, 2),
        decays=(0.1,),
        score="valid_loss",
        fields={"d_model": WIDTH},
        active_params=MAMBA_ACTIVE,
        published=HEADLINE,
        figure="curves",
        baseline="mamba",
        notes=(
            "Ours: bytes of the standard library's source, validation loss at 24 points; the papers: C4, smoothed "
            "training loss. mamba and moe_mamba have three seeds and four rates, the others one seed and two rates.",
            *(("Quick: 25 tokens per active parameter, where the paper's order is not there yet.",) if quick else ()),
        ),
    )


def _experts(model: str, v1: float, v2: float) -> Published:
    values = {"loss at 100k steps, v1": v1, "log-perplexity, v2": v2}
    return Published(model=model, values=values, source=_COUNTS, settings="d_model 512, 26M active")


@register_suite("expert_count")
def expert_count(quick: bool) -> Suite:
    """Does the loss fall with every doubling of experts, and where does it cross Mamba's?"""
    entries = [_preset("mamba", 4)]
    for count in (1, 4, 8, 16, 32):
        sizes = {"d_model": WIDTH, "n_blocks": 2, "n_experts": count}
        entries.append(
            Entry(
                name=f"{count} expert{'s' * (count > 1)}",
                preset="moe_mamba",
                fields=sizes,
                active_params=MAMBA_ACTIVE,
            )
        )
    return Suite(
        name="expert_count",
        title="MoE-Mamba by the number of experts, active parameters matched",
        tasks=(_text(6 if quick else 24, 25.0 if quick else TOKENS_PER_ACTIVE),),
        entries=tuple(entries),
        rates=MIDDLE_RATES,
        decays=(0.1,),
        score="valid_loss",
        fields={"d_model": WIDTH},
        active_params=MAMBA_ACTIVE,
        published=(
            _experts("Mamba", 3.51, 3.72),
            _experts("1 expert", 3.56, 3.75),
            _experts("4 experts", 3.55, 3.72),
            _experts("8 experts", 3.51, 3.70),
            _experts("16 experts", 3.45, 3.67),
            _experts("32 experts", 3.41, 3.67),
        ),
        figure="curves",
        baseline="mamba",
        notes=("v1: loss at 100k steps of 65,536 tokens; v2: log-perplexity at 1 B tokens.",),
    )


def _perplexity(model: str, figure: float, table: str) -> Published:
    values = {"perplexity, 350M": figure}
    return Published(model=model, values=values, source=f"2312.00752 {table}", settings="about 350M, Pile, 7 B tokens")


_SELECTIVE = {"none": 10.93, "B": 10.15, "C": 9.98, "dt": 9.81, "dt+B+C": 8.71}
_RANKS = {1: 8.97, 2: 8.97, 4: 8.91}
_STATES = (1, 2, 4, 8, 16)
_CONSTANT = (9.88, 9.86, 9.82, 9.82, 9.81)
_CHOSEN = (9.73, 9.40, 9.09, 8.84, 8.71)

ABLATIONS = (
    *(_perplexity(f"selective: {parts}", figure, "Table 7") for parts, figure in _SELECTIVE.items()),
    _perplexity("selective: B+C", 9.12, "Table 9, static Delta"),
    *(_perplexity(f"Delta rank {rank}", figure, "Table 9") for rank, figure in _RANKS.items()),
    *(_perplexity(f"N {n}, B and C constant", f, "Table 10") for n, f in zip(_STATES, _CONSTANT, strict=True)),
    *(_perplexity(f"N {n}, B and C selective", f, "Table 10") for n, f in zip(_STATES, _CHOSEN, strict=True)),
)


@register_suite("mamba_ablations")
def mamba_ablations(quick: bool) -> Suite:
    """Which parameters are selective, the rank of Delta, and the state size with and without selection."""
    size = {"d_model": 64}
    made: list[tuple[str, dict[str, Any]]] = [
        (f"selective: {parts}", {"selective": parts}) for parts in (*_SELECTIVE, "B+C")
    ]
    made += [(f"Delta rank {rank}", {"dt_rank": rank}) for rank in (1, 2)]
    made += [(f"N {n}, B and C constant", {"selective": "dt", "d_state": n}) for n in _STATES[:-1]]
    made += [(f"N {n}, B and C selective", {"d_state": n}) for n in _STATES[:-1]]
    return Suite(
        name="mamba_ablations",
        title="Mamba's ablations at d_model 64, two layers",
        tasks=(_text(6, tokens=1_310_720 if quick else 3_276_800),),
        entries=tuple(Entry(name=name, pattern="Mx2", fields={**size, **fields}) for name, fields in made),
        rates=(1.2e-2, 2.4e-2),
        decays=(0.1,),
        score="valid_loss",
        fields={"d_model": 64},
        published=ABLATIONS,
        figure="curves",
        baseline="selective: dt+B+C",
        notes=(
            "N 16 with B and C constant is 'selective: dt', with B and C selective 'selective: dt+B+C'; rank 4 is "
            "the default at this width. All see the same tokens, 1.3 M (full: 3.3 M).",
        ),
    )
