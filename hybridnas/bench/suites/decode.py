"""Greedy decoding, batch 1, one token at a time, after a short and a long context, against Hugging Face's ``generate``.

Seconds per token are taken between the first and the last new token, as each is handed over (``on_token`` here, a
streamer there), so that reading the prompt counts for nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybridnas.arch.model import HybridLM
from hybridnas.bench import models, peers
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, Spread, measure, ratios
from hybridnas.bench.models import HF_SLOW, MAMBA, Sizes
from hybridnas.bench.result import Result
from hybridnas.kernels import mamba_step

_HF = "HF Mamba generate"
_CONSTANT = 1.1  # how much slower a token may be after the long context and still count as equally fast


def ours(model: Any, ids_BL: Tensor, new: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Generate and return the seconds per token."""
    at: list[float] = []

    def note(_: Tensor) -> None:
        at.append(clock())

    model.generate(ids_BL, new, temperature=0, on_token=note)
    return (at[-1] - at[0]) / (len(at) - 1)


def hugging_face(model: Any, ids_BL: Tensor, new: int) -> float:
    """Generate with transformers' cache and return the seconds per token."""
    at: list[float] = []
    base = peers.load_quietly("transformers.generation.streamers").BaseStreamer

    class Streamer(base):  # type: ignore[misc, valid-type]
        def put(self, value: Tensor) -> None:
            if value.ndim == 1:  # the prompt comes first, in two dimensions
                at.append(time.perf_counter())

        def end(self) -> None:
            pass

    with torch.no_grad():
        model.generate(
            ids_BL, attention_mask=torch.ones_like(ids_BL), max_new_tokens=new, do_sample=False, use_cache=True,
            streamer=Streamer(),
        )  # fmt: skip
    return (at[-1] - at[0]) / (len(at) - 1)


def run(config: BenchConfig) -> Result:
    """Measure after 16 and after 4096 tokens of context."""
    result = Result("decode")
    sizes = Sizes(2, 16) if config.tiny else Sizes(8, 256)
    contexts, new = ((4, 12), 4) if config.tiny else ((16, 4096), config.pick(128, 32, 4))
    own, _ = models.build(MAMBA, sizes)
    assert isinstance(own, HybridLM)
    why = models.needs(HF_SLOW)
    peer = None if why else models.hf_mamba(sizes, use_mambapy=False).eval()
    cases = {context: f"{sizes.layers} layers, d {sizes.d_model}, batch 1, context {context}" for context in contexts}
    forms = []
    for context, case in cases.items():
        ids_BL = torch.randint(0, sizes.vocab, (1, context), generator=torch.Generator().manual_seed(0))
        forms.append(Form(f"{MAMBA}|{case}", partial(ours, own, ids_BL, new)))
        if peer is not None:
            # reading 4096 tokens takes Hugging Face seconds, in every round
            rounds = None if context == contexts[0] else config.pick(4, 2, 1)
            forms.append(Form(f"{_HF}|{case}", partial(hugging_face, peer, ids_BL, new), rounds, warm=rounds is None))
    times = measure(forms, config.pick(11, 5, 1))
    for case in cases.values():
        if peer is None:
            result.missing(case, _HF, why)
        result.add(case, {name.partition("|")[0]: v for name, v in times.items() if name.endswith(f"|{case}")})
        what = f"decoding one token, {case}"
        result.goal("at least", 5, case=case, of=_HF, over=MAMBA, what=what, against="Hugging Face generate with cache")
    result.notes.append(f"one token through a Mamba layer: {mamba_step.describe('cpu')}")
    first, last = (times[f"{MAMBA}|{case}"] for case in cases.values())
    constant = Spread.of(ratios(last, first))
    what = f"decoding one token after {contexts[1]} tokens"
    result.hold("at most", _CONSTANT, constant, what=what, against=f"after {contexts[0]} (constant in context)")
    return result
