"""The gated delta rule, one decay a head and one a channel, float32, against transformers' torch forms and attention.

Shapes: B batch, L length, H heads, K key and value channels of a head. Peers get their own code: transformers'
``torch_chunk_gated_delta_rule`` of Qwen3-Next and ``chunk_kimi_delta_attention`` of Kimi Linear, and torch's own causal
attention on as many heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.bench import peers
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.result import Result
from hybridnas.kernels.gated_delta import gated_delta, native

OURS, CHUNKED, HF, ATTENTION = "ours", "ours, torch chunked", "Hugging Face", "attention"
_PEERS = {  # which decay -> module and function of transformers
    "head": ("transformers.models.qwen3_next.modeling_qwen3_next", "torch_chunk_gated_delta_rule"),
    "channel": ("transformers.models.kimi_linear.modeling_kimi_linear", "chunk_kimi_delta_attention"),
}


class Inputs(NamedTuple):
    """Arguments in our layout, all of them leaves that ask for gradients, and the gradient of the output."""

    q_BLHK: Tensor
    k_BLHK: Tensor
    v_BLHK: Tensor
    log_decay: Tensor  # (B, L, H) or (B, L, H, K)
    beta_BLH: Tensor
    do_BLHK: Tensor

    @classmethod
    def draw(cls, decay: str, batch: int, length: int, heads: int, size: int, seed: int = 0) -> Inputs:
        """Draw what an initialised layer sees: keys and queries of length one, decays of 1e-3 to 1, beta in (0, 1)."""
        normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
        steps, wide = (batch, length, heads), (batch, length, heads, size)
        q_BLHK, k_BLHK = (F.normalize(normal(wide), dim=-1) for _ in range(2))
        log = -torch.exp(normal(wide if decay == "channel" else steps) - 3)
        given = [q_BLHK, k_BLHK, normal(wide), log, torch.sigmoid(normal(steps))]
        return cls._make([*(t.requires_grad_() for t in given), normal(wide)])


def ours(i: Inputs, impl: str = "auto") -> Tensor:
    o_BLHK = gated_delta(*i[:-1], impl=impl)
    assert isinstance(o_BLHK, Tensor)
    return o_BLHK


def hugging_face(function: Any, i: Inputs) -> Tensor:
    """Transformers' chunked form, which scales the queries as ours does."""
    o_BLHK: Tensor = function(i.q_BLHK, i.k_BLHK, i.v_BLHK, g=i.log_decay, beta=i.beta_BLH)[0]
    return o_BLHK


def attention(i: Inputs) -> Tensor:
    """Causal attention with the same queries, keys and values; it has neither decay nor beta."""
    q_BHLK, k_BHLK, v_BHLK = (t.transpose(1, 2) for t in i[:3])
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=True).transpose(1, 2)


def _forward(work: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    with torch.no_grad():
        work(inputs)


def _forward_backward(work: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    torch.autograd.grad(work(inputs), inputs[:-1], inputs.do_BLHK, allow_unused=True)


def run(config: BenchConfig) -> Result:
    """Measure forward and forward with backward at two lengths, both kinds of decay."""
    result = Result("delta")
    if not native.available():
        result.notes.append(f"ours is the chunked torch form: {native.compiled().description}")
    lengths = [16, 24] if config.tiny else [1024, 2048]
    batch, heads, size = (1, 2, 8) if config.tiny else (2, 4, 64)
    for decay in _PEERS:
        for length in lengths:
            _one_shape(config, result, decay, (batch, length, heads, size))
    return result


def _one_shape(config: BenchConfig, result: Result, decay: str, shape: tuple[int, int, int, int]) -> None:
    words = f"decay by {decay} (B,L,H,K)=({','.join(map(str, shape))})"
    inputs = Inputs.draw(decay, *shape)
    found: dict[str, Callable[[Inputs], Tensor]] = {OURS: ours}
    if native.available():
        found[CHUNKED] = partial(ours, impl="torch")
    absent = peers.absent("transformers")
    if not absent:
        module, function = _PEERS[decay]
        found[HF] = partial(hugging_face, getattr(peers.load_quietly(module), function))
    with torch.no_grad():
        expected = ours(inputs)
        for name, form in found.items():
            error = float((form(inputs) - expected).abs().max() / expected.abs().max())
            if not error < 1e-4:
                raise AssertionError(f"{name} and ours differ by {error:.1e} of the largest output at {words}")
    found[ATTENTION] = attention
    slow = decay == "channel"  # transformers' form holds a decay for each pair of steps and channel
    for kind, work in (("fwd", _forward), ("fwd+bwd", _forward_backward)):
        case = f"{words} {kind}"
        if absent:
            result.missing(case, HF, absent)
        forms = []
        for name, form in found.items():
            few = name == HF and slow
            if few and config.quick and shape[1] > 1024:
                result.missing(case, HF, "quick: at the shorter length alone")
            else:
                rounds = config.pick(3, 1, 1) if few else None
                forms.append(Form(name, partial(work, form, inputs), rounds, not few))
        result.add(case, measure(forms, config.pick(15, 5, 1), shortest=config.pick(0.02, 0.01, 0.0)))
        for name in (CHUNKED, HF):
            result.ratio(case, name, OURS)
        result.ratio(case, OURS, ATTENTION)
    what = f"gated delta rule, {case}"
    result.goal("at least", 5, case=case, of=HF, over=OURS, what=what, against="Hugging Face's chunked torch form")
    result.goal(
        "at most", 1, case=case, of=OURS, over=ATTENTION, what=what, against="causal attention on as many heads"
    )
