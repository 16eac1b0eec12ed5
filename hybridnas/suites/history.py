"""``suite=history`` and ``suite=history_state``: the mixers from S4 to RWKV-7 side by side, what each is good for.

Each mixer alone and with one attention layer of four, every one followed by an MLP, at its own best rate: the first
suite at equal active parameters, the second at equal bytes of state too, for those whose state does not grow with the
length and can be sized.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from hybridnas.suites.suite import Entry, Published, Suite, Task, register_suite

if TYPE_CHECKING:  # names of suites are listed without torch
    from hybridnas.arch.arch import Arch

MIXERS = {  # in the order in which they are trained: what the claims below are about comes first
    "Mamba": "M",
    "Mamba, not selective": "M{selective=none}",
    "S4D": "D",
    "Hyena": "Y",
    "H3": "H",
    "attention": "A",
    "RWKV-7": "W",
    "Gated DeltaNet": "G",
    "mLSTM": "X",
    "GRU": "U{kind=gru}",
    "GLA": "L{kind=gla}",
    "RetNet": "L{kind=retnet}",
    "DeltaNet": "L{kind=deltanet}",
    "Gated DeltaNet, negative eigenvalues": "G{negative_eigenvalues=true}",
    "KDA": "K",
    "Mamba-2": "N",
    "minGRU": "U{kind=mingru}",
    "LSTM": "U{kind=lstm}",
    "windowed attention": "S",
}
NOT_SIZED = ("minGRU", "GRU", "LSTM", "attention", "windowed attention")  # no size of the state beside the width
RATES = (1e-3, 4e-3, 1.2e-2)
_CLAIMS = "S4D, H3 and Hyena do not select: Mamba's table 1 has 18 to 57 % for them and 97 to 99.8 % with selection"
TABLE_1 = tuple(
    Published(
        model=model,
        values={"selective copying": accuracy},
        source="2312.00752 Table 1",
        settings="length 4096, 16 ids, 16 to copy, 2 layers, D 64, 400k steps",
    )
    for model, accuracy in (("S4, no gate", 18.3), ("H3 block, S4", 57.0), ("H3 block, Hyena", 30.1), ("Mamba", 99.8))
)


def _task(column: str, kind: str, length: int, batch: int, tokens: int, **data: Any) -> Task:
    return Task(
        name=column,
        column=column,
        data={"kind": kind, **({} if kind == "stdlib" else {"seq_len": length}), **data},
        train={
            "seq_len": length,
            "batch_size": batch,
            "tokens": tokens,
            "grad_clip": 1.0,
            "valid_tokens": 512 * length,
        },
        measurements=8,
    )


def _tasks(quick: bool) -> tuple[Task, ...]:
    if quick:
        return (
            _task("selective copying", "selective_copying", 32, 16, 614_400, vocab_size=10, n_tokens_to_copy=4),
            _task("MQAR", "mqar", 32, 16, 614_400, vocab_size=32, n_pairs=4, filler="zero"),
        )
    return (
        _task("text", "stdlib", 256, 16, 8_388_608),
        _task("selective copying", "selective_copying", 256, 16, 25_165_824, vocab_size=16, n_tokens_to_copy=16),
        _task("induction heads", "induction_heads", 256, 16, 25_165_824, vocab_size=16),
        _task("MQAR", "mqar", 64, 64, 25_165_824, vocab_size=128, n_pairs=8, filler="zero"),
        _task("S5", "s5", 32, 64, 25_165_824),
    )


def _entries(quick: bool) -> tuple[Entry, ...]:
    """Return each mixer alone and, unless quick, with one attention layer of four, as many mixers in both."""
    width, repeats = (32, 2) if quick else (64, 4)
    fields = {"d_model": width, "norm": "rmsnorm", "final_norm": True, "F": {"d_ff": 2 * width}}
    sizes: dict[str, dict[str, Any]] = {"D": {"d_state": 16}, "N": {"d_state": 16}, "S": {"window": 8 if quick else 16}}
    sizes["H"] = {"d_state": 16, "d_conv": 16}
    found = []
    for name, mixer in MIXERS.items():
        patterns = {name: f"({mixer}F)x{repeats}"}
        if not quick and mixer != "A":
            patterns[f"{name}, 1 attention of 4"] = f"{mixer}F{mixer}FAF{mixer}F"
        for label, pattern in patterns.items():
            own = {**fields, mixer: sizes[mixer]} if mixer in sizes else fields
            found.append(
                Entry(name=label, pattern=pattern, fields=own, active_params=12 * repeats * width**2, free=("d_ff",))
            )
    return tuple(found)


def _of_state(entry: Entry, state_bytes: int, seq_len: int, vocab_size: int) -> Arch:
    """Return an entry's architecture with so many bytes of state, sized to its active parameters again."""
    from hybridnas.arch.match import match
    from hybridnas.search_spaces.fit import with_state

    arch = replace(entry, active_params=None).arch(vocab_size)
    assert arch is not None and entry.active_params is not None
    arch = with_state(arch, state_bytes, seq_len, tolerance=0.05)
    return match(arch, active_params=entry.active_params, free=entry.free, multiple=1)


@register_suite("history")
def history(quick: bool) -> Suite:
    """Mixers from S4 to RWKV-7 at equal active parameters."""
    return Suite(
        name="history",
        title="What each mixer is good for, at equal active parameters",
        tasks=_tasks(quick),
        entries=_entries(quick),
        rates=RATES[1:] if quick else RATES,
        decays=(0.1,),
        seeds=(0,) if quick else (0, 1, 2),
        stop_at=0.995,
        published=TABLE_1,
        notes=(
            f"{_CLAIMS}. Text: the share of bytes that are predicted right.",
            *(
                ("Quick: width 32, two layers, mixers alone, two rates, one seed, 1,200 steps of 512 tokens.",)
                if quick
                else ()
            ),
        ),
    )


@register_suite("history_state")
def history_state(quick: bool) -> Suite:
    """The same at equal bytes of state, without those whose state is their width or grows with the length."""
    state_bytes, length = (8192, 32) if quick else (65_536, 256)
    kept = [entry for entry in _entries(quick) if entry.name.partition(", 1 attention")[0] not in NOT_SIZED]
    alone = [entry for entry in kept if "1 attention" not in entry.name]  # the state of attention grows
    return replace(
        history(quick),
        name="history_state",
        title=f"What each mixer is good for, with {state_bytes:,} bytes of state",
        entries=tuple(Entry(name=entry.name, model=partial(_of_state, entry, state_bytes, length)) for entry in alone),
    )
