"""``suite=dna_context`` and ``suite=speech_context``: does loss fall as the context grows, at equal compute?

The questions of Mamba (arXiv 2312.00752, figure 5 right on DNA, figure 7 on audio), on data that a package registry
carries: the genome of Escherichia coli 536 from Debian's ``bowtie-examples``, and the prompts of a telephone exchange,
spoken by Allison Smith and recorded at 8 kHz, from Debian's ``asterisk-core-sounds-en-wav``.

All architectures have equally many active parameters and train with the FLOPs that Mamba needs for its tokens, by the
cost model; on DNA attention trains a second time, on as many tokens as Mamba. A batch holds equally many tokens at each
context. The held-out part is measured whole, so that each context is measured on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hybridnas.suites.suite import Entry, Fields, Suite, Task, register_suite

GENOME = "/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz"
SPEECH = "/usr/share/asterisk/sounds/en_US_f_Allison"
MAMBA = "Mx4"
_FIELDS: Fields = {"d_model": 16, "norm": "rmsnorm", "final_norm": True}
_ACTIVE = 13_568  # within half a per cent of four Mamba layers of width 16


def _tasks(
    data: Fields, contexts: Sequence[int], tokens: int, step_tokens: int, *, valid_tokens: int, twice: bool = False
) -> list[Task]:
    """Return a task for each context, ``twice``: and one of equally many tokens."""
    made = []
    for context in contexts:
        train = {
            "seq_len": context,
            "batch_size": step_tokens // context,
            "tokens": tokens,
            "grad_clip": 1.0,
            "valid_tokens": valid_tokens,
        }
        task = Task(name=str(context), column=str(context), data=data, train=train, flops_of=MAMBA)
        equal = f"{context}, equal tokens"
        made += [task, *([replace(task, name=equal, column=equal, flops_of=None)] if twice else [])]
    return made


def _entries(tasks: Sequence[Task], patterns: Sequence[tuple[str, str]]) -> tuple[Entry, ...]:
    flops = tuple(task.name for task in tasks if task.flops_of)
    tokens = tuple(task.name for task in tasks if not task.flops_of)
    found = [
        Entry(
            name=name,
            pattern=pattern,
            fields=_FIELDS,
            tasks=flops,
            active_params=_ACTIVE if "F" in pattern else None,
        )
        for name, pattern in patterns
    ]
    return (*found, *(replace(one, name=f"{one.name}, as many tokens", tasks=tokens) for one in found[-1:] if tokens))


_MORE = "'As many tokens': Mamba's tokens, which cost attention more."
_NOTES = (
    "Equal active parameters, and the training FLOPs of Mamba's tokens by the cost model.",
    "Losses are of the whole validation part, by which each architecture's rate was chosen with the first seed.",
)


@register_suite("dna_context")
def dna_context(quick: bool) -> Suite:
    """Bits per base of a bacterium's genome over the context, for Mamba and attention."""
    data = {"kind": "dna", "path": GENOME, "split_by": "segment"}
    tokens, step_tokens = (1 << 18, 2048) if quick else (1 << 26, 1 << 15)
    contexts = (128, 512, 2048) if quick else (128, 512, 2048, 8192, 32_768)
    tasks = _tasks(data, contexts, tokens, step_tokens, valid_tokens=1 << 20, twice=True)
    return Suite(
        name="dna_context",
        title="DNA: loss over context at equal training FLOPs",
        tasks=tuple(tasks),
        entries=_entries(tasks, (("mamba", MAMBA), ("attention", "(AF)x2"))),
        rates=(6e-3, 1.5e-2, 4e-2),
        decays=(0.1,),
        seeds=(0, 1) if quick else (0, 1, 2),
        score="valid_loss",
        fields=_FIELDS,
        active_params=_ACTIVE,
        figure="contexts",
        unit="base",
        files="the genome of Escherichia coli 536: apt-get install bowtie-examples",
        notes=(*_NOTES, _MORE),
    )


@register_suite("speech_context")
def speech_context(quick: bool) -> Suite:
    """Bits per sample of spoken prompts over the context, for Mamba, S4D and attention."""
    data = {"kind": "audio", "path": SPEECH, "rate": 8000, "valid_fraction": 0.02}
    tokens, step_tokens = (1 << 17, 1024) if quick else (1 << 26, 1 << 15)
    contexts = (128, 512, 1024) if quick else (128, 512, 2048, 8192)
    tasks = _tasks(data, contexts, tokens, step_tokens, valid_tokens=1 << 21)
    return Suite(
        name="speech_context",
        title="Speech, 8 kHz, mu-law: loss over context at equal training FLOPs",
        tasks=tuple(tasks),
        entries=_entries(tasks, (("mamba", MAMBA), ("S4D", "(DF)x2"), ("attention", "(AF)x2"))),
        rates=(6e-3, 1.5e-2, 4e-2),
        decays=(0.1,),
        seeds=(0, 1) if quick else (0, 1, 2),
        score="valid_loss",
        fields=_FIELDS,
        active_params=_ACTIVE,
        figure="contexts",
        unit="sample",
        files="spoken prompts: apt-get install asterisk-core-sounds-en-wav",
        notes=_NOTES,
    )
