"""Models of one shape trained together: gradients of K models by vmap over stacked weights, beside one after another.

Seeds and rates of a study are such models. Stacking pays where launches of small operations dominate; it needs a
batching rule for every operation, which operators of our own do not have, and no look at a value on the way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.result import Result

SINGLE, STACKED = "one after another", "stacked (vmap)"
_PATTERNS = ("AFAF", "FFFF", "MFMF", "MEME", "CFCF", "GFGF")


def run(config: BenchConfig) -> Result:
    """Measure four models at the laptop budget's size: d_model 24, 4 layers, L 128, batch 16 for each, V 256."""
    result = Result("stacked")
    width, batch, length, count = (8, 2, 8, 2) if config.tiny else (24, 16, 128, 4)
    for pattern in _PATTERNS:
        case = f"{count} models {pattern}, d {width}, L {length}, batch {batch} each"
        extra = {"n_experts": 8} if "E" in pattern else {}
        arch = Arch.from_pattern(pattern, d_model=width, vocab_size=256, **extra)
        single, stacked = _forms(arch, batch, length, count)
        why = _refusal(stacked)
        if why:
            result.missing(case, STACKED, why)
            continue
        result.add(case, measure([Form(SINGLE, single), Form(STACKED, stacked)], config.pick(9, 4, 1)))
        what = f"gradients of {case}, stacked"
        result.goal("at least", 1.0, case=case, of=SINGLE, over=STACKED, what=what, against="one after another")
    return result


def _forms(arch: Arch, batch: int, length: int, count: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the gradients of ``count`` models on a batch of their own: one after another, and stacked."""
    models = [HybridLM(arch, seed=seed) for seed in range(count)]
    shape = count, batch, length + 1
    ids_KBL = torch.randint(0, arch.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    weights, buffers = stack_module_state(models)
    empty = HybridLM(arch, device="meta")

    def loss(weights: dict[str, Tensor], buffers: dict[str, Tensor], ids_BL: Tensor) -> Tensor:
        logits_BLV = functional_call(empty, (weights, buffers), (ids_BL[:, :-1],)).logits
        return F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten())

    def single() -> None:
        for model, ids_BL in zip(models, ids_KBL, strict=True):
            model.zero_grad(set_to_none=True)
            logits_BLV = model(ids_BL[:, :-1]).logits
            total = F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten())
            total.backward()  # type: ignore[no-untyped-call]

    together = vmap(grad(loss), randomness="different")

    def stacked() -> None:
        with warnings.catch_warnings():  # of operations that vmap runs one model at a time, as it does with attention
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            together(weights, buffers, ids_KBL)

    return single, stacked


def _refusal(stacked: Callable[[], None]) -> str:
    """Return why torch cannot batch a model's operations, or an empty string."""
    try:
        stacked()
    except RuntimeError as error:
        return f"torch cannot batch it: {str(error).splitlines()[0].partition('. ')[0]}"
    return ""
