"""The mixers from S4D to RWKV-7 beside Mamba and attention: a training step at the lengths at which goals are set.

Each model is one mixer and an MLP at d_model 256, sized to the parameters of attention with an MLP. A step is forward,
cross-entropy, backward and fused AdamW. What recurs step by step (GRU, LSTM) is not here: the mixers suite has it.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybridnas.arch.model import HybridLM
from hybridnas.bench import models
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.models import Sizes
from hybridnas.bench.result import Result
from hybridnas.bench.suites.mixers import arch_of, ours

SIMPLE = ("D", "R", "U{kind=mingru}")  # one number or a few by channel: held against Mamba
OF_HEADS = ("W", "X")  # a matrix by head: held against attention
# length, what is timed there beside its rival, the rival, the most that it may take of the rival's time
CASES: tuple[tuple[int, Sequence[str], str, float], ...] = (
    (2048, SIMPLE, "M", 1.0),
    (2048, ("Y",), "M", 2.0),
    (1024, OF_HEADS, "A", 1.0),
    (2048, OF_HEADS, "A", 1.0),
    (8192, ("Y",), "A", 1.0),
)


def run(config: BenchConfig) -> Result:
    """Time one sequence a step, every mixer of a length in turn."""
    result = Result("history")
    sizes = Sizes(2, 64) if config.tiny else Sizes(2, 256)
    for length in sorted({length for length, *_ in CASES}):
        own = [(mixers, rival, most) for at, mixers, rival, most in CASES if at == length]
        names = list(dict.fromkeys(mixer for mixers, rival, _ in own for mixer in (*mixers, rival)))
        steps = length // 64 if config.tiny else length
        forms, notes = [], {}
        for mixer in names:
            model = HybridLM(arch_of(mixer, sizes), seed=0)
            forms.append(Form(ours(mixer), models.step_of(model, models.loss_of(model), 1, steps, sizes.vocab)))
            notes[ours(mixer)] = f"{sum(p.numel() for p in model.parameters()):,} parameters"
        case = f"step of one sequence of {steps:,} tokens"
        result.add(case, measure(forms, config.pick(9, 5, 1)), notes)
        for mixers, rival, most in own:
            against = "Mamba" if rival == "M" else "attention"
            for mixer in mixers:
                what = f"{mixer}, {case}"
                result.goal("at most", most, case=case, of=ours(mixer), over=ours(rival), what=what, against=against)
    return result
