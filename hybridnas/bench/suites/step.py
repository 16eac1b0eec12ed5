"""A training step of Mamba: 8 layers, d_model 256, V 256, batch 8, fused AdamW, side by side with its peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hybridnas.bench import models, plain
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.models import HF_MAMBAPY, HF_SLOW, MAMBA, TRANSFORMER, Sizes
from hybridnas.bench.result import Result, seconds_text

FLOOR = "the same matrix products alone"


def run(config: BenchConfig) -> Result:
    """Measure at L 256 against everything, at L 512 against the Transformer."""
    result = Result("step")
    sizes, batch = (Sizes(2, 16), 2) if config.tiny else (Sizes(8, 256), 8)
    short, long = (8, 16) if config.tiny else (256, 512)
    case = _one_length(config, result, sizes, batch, short, [TRANSFORMER, HF_MAMBAPY, HF_SLOW])
    what = f"training step, Mamba {case}"
    result.goal("at least", 8, case=case, of=HF_MAMBAPY, over=MAMBA, what=what, against="Hugging Face with mambapy")
    result.goal("at least", 100, case=case, of=HF_SLOW, over=MAMBA, what=what, against="Hugging Face's slow path")
    equal = "a Transformer (SDPA) of equal parameters"
    result.goal("at most", 1.0, case=case, of=MAMBA, over=TRANSFORMER, what=what, against=equal)
    result.goal("at most", 2.0, case=case, of=MAMBA, over=FLOOR, what=what, against="its matrix products alone")
    names = [name for name in (MAMBA, TRANSFORMER, HF_MAMBAPY) if not models.needs(name)]
    given = {"names": names, "sizes": list(sizes), "batch": batch, "length": short, "rounds": config.pick(3, 2, 1)}
    pairs = [(name, MAMBA) for name in names[1:]]
    plain.again(config, result, case, "hybridnas.bench.suites.step:default_malloc", given, pairs)
    case = _one_length(config, result, sizes, batch, long, [TRANSFORMER])
    what = f"training step, Mamba {case}"
    result.goal("at most", 1.0, case=case, of=MAMBA, over=TRANSFORMER, what=what, against=equal)
    return result


def default_malloc(
    names: list[str], sizes: list[int], batch: int, length: int, rounds: int
) -> Callable[[], dict[str, list[float]]]:
    """Build the models; returns the interleaved run of their steps, for a process of its own."""
    forms = [Form(name, models.training_step(name, Sizes(*sizes), batch, length)[0]) for name in names]
    return partial(measure, forms, rounds)


def _one_length(config: BenchConfig, result: Result, sizes: Sizes, batch: int, length: int, others: list[str]) -> str:
    case = f"{sizes.layers} layers, d {sizes.d_model}, L {length}, batch {batch}"
    step, params = models.training_step(MAMBA, sizes, batch, length)
    floor, flops = models.matmul_floor(step)
    forms, notes = [Form(MAMBA, step)], {MAMBA: f"{params:,} parameters"}
    for name in others:
        why = models.needs(name)
        if why:
            result.missing(case, name, why)
            continue
        other, params = models.training_step(name, sizes, batch, length)
        notes[name] = f"{params:,} parameters"
        slow = name == HF_SLOW
        forms.append(Form(name, other, config.pick(2, 1, 1) if slow else None, warm=not slow))
    forms.append(Form(FLOOR, floor))
    times = measure(forms, config.pick(9, 4, 1))
    result.add(case, times, notes)
    for name in others:
        result.ratio(case, name, MAMBA)
    best = min(times[FLOOR])
    result.notes.append(f"{case}: the matrix products are {flops:.3g} FLOPs, at best {seconds_text(best)}")
    return case
