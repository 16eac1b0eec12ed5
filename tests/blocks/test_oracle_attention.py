"""Attention and its options against the attention of transformers' model families: outputs, gradients, decoding."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from oracles import randomize, relative, relative_errors
from torch import nn

from hybridnas.blocks.attention import Attention

transformers = pytest.importorskip("transformers")
D, HEADS, KV, P = 32, 4, 2, 16
LENGTH = 45  # more than two blocks of every window below


class Family(NamedTuple):
    """An attention class of transformers at a tiny size, and ours that is to be the same function."""

    module: str  # below transformers.models
    attention: str
    config: str
    settings: dict[str, Any]  # of their config
    ours: dict[str, Any]  # fields of our config
    more: Sequence[tuple] = ()  # pairs of parameters beside the projections
    rotary: str = ""  # their class of rotary positions; none: no positions
    window: int | None = None
    projections: Callable[[], list[tuple]] | None = None
    layer: int = 0
    layer_type: str = ""  # where their rotary positions differ by it

    def build(self, dtype: torch.dtype) -> tuple[Attention, nn.Module, Callable]:
        """Return ours, theirs with weights of order one, and how theirs runs on x from a position on."""
        module = importlib.import_module(f"transformers.models.{self.module}")
        modeling = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        sizes = {"hidden_size": D, "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": P}
        config = getattr(module, self.config)(**{**sizes, **self.settings}, attn_implementation="eager")
        torch.manual_seed(0)
        theirs = getattr(modeling, self.attention)(config, layer_idx=self.layer).to(dtype).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                nn.init.zeros_(parameter) if parameter.dim() == 1 else nn.init.normal_(parameter, std=0.2)
        randomize(theirs, std=0.1)
        ours = Attention(Attention.Config(d_model=D, **self.ours)).to(dtype).eval()
        rotary = getattr(modeling, self.rotary)(config) if self.rotary else None

        def run(their: nn.Module, x_BLD: torch.Tensor, start: int = 0, cache: Any = None) -> torch.Tensor:
            length = x_BLD.shape[1]
            at_L, at_T = torch.arange(start, start + length), torch.arange(start + length)
            ago_LT = at_L[:, None] - at_T
            hidden_LT = (ago_LT < 0) | (ago_LT >= (self.window or start + length))
            mask = torch.zeros(length, start + length, dtype=dtype).masked_fill(hidden_LT, -torch.inf)[None, None]
            which = {"layer_type": self.layer_type} if self.layer_type else {}
            given = {"position_embeddings": rotary(x_BLD, at_L[None], **which)} if rotary else {}
            if "position_embeddings" in type(their).forward.__annotations__ and not rotary:
                given = {"position_embeddings": None}
            if "position_ids" in type(their).forward.__annotations__:  # turns by its own class
                given = {"position_ids": at_L[None]}
            return their(x_BLD, attention_mask=mask, past_key_values=cache, **given)[0]

        return ours, theirs, run

    def pairs(self) -> list[tuple]:
        """Return which parameter of ours holds which of theirs."""
        return [*(self.projections or plain)(), *self.more]


def plain(output: str = "o_proj", bias: str = "") -> list[tuple]:
    """Return the pairs of queries, keys, values and output, kept in one matrix of ours."""
    q, k, v = slice(0, HEADS * P), slice(HEADS * P, (HEADS + KV) * P), slice((HEADS + KV) * P, (HEADS + 2 * KV) * P)
    rows = {"q_proj": q, "k_proj": k, "v_proj": v}
    pairs = [("qkv_proj.weight", part, f"{name}.weight", None) for name, part in rows.items()]
    if "qkv" in bias:
        pairs += [("qkv_proj.bias", part, f"{name}.bias", None) for name, part in rows.items()]
    if "out" in bias:
        pairs.append(("out_proj.bias", None, f"{output}.bias", None))
    return [*pairs, ("out_proj.weight", None, f"{output}.weight", None)]


def gated() -> list[tuple]:
    """Qwen3-Next's q_proj has a head's queries and then its gates; here they are two matrices."""

    def part(which: int) -> Callable:
        return lambda w: w.view(HEADS, 2, P, D)[:, which].reshape(HEADS * P, D)

    q, *others = plain()
    return [(*q[:3], part(0)), ("gate_proj.weight", None, "q_proj.weight", part(1)), *others]


NOPE, ROPE, VALUE, RANK, Q_RANK = 12, 8, 10, 20, 24


def latent(q_rank: bool, *, interleaved: bool, bias: bool = False) -> list[tuple]:
    """Pairs of latent attention; DeepSeek's checkpoints turn neighbouring channels, ours those half a head apart."""
    even_then_odd = torch.cat([torch.arange(0, ROPE, 2), torch.arange(1, ROPE, 2)]) if interleaved else slice(None)

    def queries(w: torch.Tensor) -> torch.Tensor:
        heads = w.view(HEADS, NOPE + ROPE, -1)
        return torch.cat([heads[:, :NOPE], heads[:, NOPE:][:, even_then_odd]], 1).reshape(HEADS * (NOPE + ROPE), -1)

    def keys(w: torch.Tensor) -> torch.Tensor:
        return torch.cat([w[:RANK], w[RANK:][even_then_odd]])

    first = Q_RANK if q_rank else HEADS * (NOPE + ROPE)
    q = ("q_a_proj.weight", None) if q_rank else ("q_proj.weight", queries)
    pairs = [
        ("latent.down_proj.weight", slice(0, first), *q),
        ("latent.down_proj.weight", slice(first, None), "kv_a_proj_with_mqa.weight", keys),
        ("latent.kv_norm.weight", None, "kv_a_layernorm.weight", None),
        ("latent.kv_up_proj.weight", None, "kv_b_proj.weight", None),
        ("out_proj.weight", None, "o_proj.weight", None),
    ]
    if q_rank:
        pairs += [
            ("latent.q_norm.weight", None, "q_a_layernorm.weight", None),
            ("latent.q_up_proj.weight", None, "q_b_proj.weight", queries),
        ]
    if bias:
        pairs += [
            ("latent.down_proj.bias", slice(0, first), "q_a_proj.bias", None),
            ("latent.down_proj.bias", slice(first, None), "kv_a_proj_with_mqa.bias", keys),
            ("out_proj.bias", None, "o_proj.bias", None),
        ]
    return pairs


def proportional(fraction: float) -> list[tuple]:
    """Pairs of "proportional" rotary positions, which turn pairs (i, i + P / 2) for the first i.

    Here the turned channels come first, with the base to the power of the fraction: one function.
    """
    half, turned = torch.arange(P).view(2, P // 2), int(P // 2 * fraction)
    order = torch.cat([half[:, :turned].flatten(), half[:, turned:].flatten()])
    q, k, *others = plain()

    def rows(w: torch.Tensor) -> torch.Tensor:
        return w.view(-1, P, D)[:, order].reshape(-1, D)

    return [
        *((*pair[:3], rows) for pair in (q, k)),
        *others,
        *((*pair[:3], lambda w: w[order]) for pair in norms("q_norm", "k_norm")),
    ]


def norms(q: str, k: str) -> list[tuple]:
    return [("q_norm.weight", None, f"{q}.weight", None), ("k_norm.weight", None, f"{k}.weight", None)]


def rope(base: float = 10000.0, fraction: float = 1.0) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": fraction}}


MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}  # their configs check what their attention does not have
HEAD_FIELDS = {"n_heads": HEADS, "n_kv_heads": KV, "head_dim": P}
LATENT_SETTINGS = {
    "num_key_value_heads": HEADS, "kv_lora_rank": RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE, "head_dim": ROPE,
}  # fmt: skip
LATENT_FIELDS = {"n_heads": HEADS, "head_dim": NOPE, "kv_rank": RANK, "rope_dim": ROPE, "v_head_dim": VALUE}
FAMILIES = {
    "mistral, window 7": Family(
        "mistral", "MistralAttention", "MistralConfig", {"sliding_window": 7, **rope()},
        {**HEAD_FIELDS, "window": 7}, rotary="MistralRotaryEmbedding", window=7,
    ),
    "mixtral": Family(
        "mixtral", "MixtralAttention", "MixtralConfig", rope(1e6), {**HEAD_FIELDS, "rope_base": 1e6},
        rotary="MixtralRotaryEmbedding",
    ),
    "qwen2, biases of q, k, v": Family(
        "qwen2", "Qwen2Attention", "Qwen2Config", rope(), {**HEAD_FIELDS, "qkv_bias": True},
        rotary="Qwen2RotaryEmbedding", projections=lambda: plain(bias="qkv"),
    ),
    "qwen3_next": Family(
        "qwen3_next", "Qwen3NextAttention", "Qwen3NextConfig", {"rms_norm_eps": 1e-5, **rope(fraction=0.25)},
        {**HEAD_FIELDS, "gate": "elementwise", "qk_norm": "head", "qk_norm_zero_centered": True, "norm_eps": 1e-5,
         "rotary_fraction": 0.25},
        norms("q_norm", "k_norm"), "Qwen3NextRotaryEmbedding", projections=gated,
    ),
    "lfm2": Family(
        "lfm2", "Lfm2Attention", "Lfm2Config", {"norm_eps": 1e-5, **rope(1e6)},
        {**HEAD_FIELDS, "qk_norm": "head", "norm_eps": 1e-5, "rope_base": 1e6},
        norms("q_layernorm", "k_layernorm"), "Lfm2RotaryEmbedding", projections=lambda: plain("out_proj"),
    ),
    "lfm3, window 9": Family(
        "lfm3", "Lfm3Attention", "Lfm3Config",
        {"rms_norm_eps": 1e-5, "use_attention_gate": True, "sliding_window": 9, "layer_types": ["sliding_attention"],
         "num_hidden_layers": 1},
        {**HEAD_FIELDS, "gate": "head", "qk_norm": "head", "norm_eps": 1e-5, "window": 9},
        [*norms("q_norm", "k_norm"), ("gate_proj.weight", None, "g_proj.weight", None)], "Lfm3RotaryEmbedding", 9,
        layer_type="sliding_attention",
    ),
    "lfm3, proportional rope": Family(
        "lfm3", "Lfm3Attention", "Lfm3Config",
        {"rms_norm_eps": 1e-5, "use_attention_gate": True, "layer_types": ["full_attention"], "num_hidden_layers": 1},
        {**HEAD_FIELDS, "gate": "head", "qk_norm": "head", "norm_eps": 1e-5, "rotary_fraction": 0.5, "rope_base": 1e3},
        [("gate_proj.weight", None, "g_proj.weight", None)], "Lfm3RotaryEmbedding",
        projections=lambda: proportional(0.5), layer_type="full_attention",
    ),
    "olmo_hybrid": Family(
        "olmo_hybrid", "OlmoHybridAttention", "OlmoHybridConfig", {"rms_norm_eps": 1e-6, **rope()},
        {**HEAD_FIELDS, "qk_norm": "all"}, norms("q_norm", "k_norm"), "OlmoHybridRotaryEmbedding",
    ),
    "olmo_hybrid, no positions": Family(
        "olmo_hybrid", "OlmoHybridAttention", "OlmoHybridConfig", {"rms_norm_eps": 1e-6},
        {**HEAD_FIELDS, "qk_norm": "all", "positions": "none"}, norms("q_norm", "k_norm"),
    ),
    "bamba, rope on half": Family(
        "bamba", "BambaAttention", "BambaConfig", {**MAMBA, **rope(fraction=0.5)},
        {**HEAD_FIELDS, "rotary_fraction": 0.5}, rotary="BambaRotaryEmbedding",
    ),
    "granitemoehybrid, scale": Family(
        "granitemoehybrid", "GraniteMoeHybridAttention", "GraniteMoeHybridConfig",
        {**MAMBA, "attention_multiplier": 0.4}, {**HEAD_FIELDS, "scale": 0.4, "positions": "none"},
    ),
    "falcon_h1, keys multiplied": Family(
        "falcon_h1", "FalconH1Attention", "FalconH1Config",
        {"key_multiplier": 0.6, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, **rope(1e11)},
        {**HEAD_FIELDS, "scale": 0.6 * P**-0.5, "rope_base": 1e11}, rotary="FalconH1RotaryEmbedding",
    ),
    "recurrent_gemma, rope on half, output bias, window 11": Family(
        "recurrent_gemma", "RecurrentGemmaAttention", "RecurrentGemmaConfig",
        {**rope(fraction=0.5)},
        {**HEAD_FIELDS, "rotary_fraction": 0.5, "out_bias": True, "window": 11}, window=11,
        projections=lambda: plain(bias="out"),
    ),
    "gemma2, cap and window 8": Family(
        "gemma2", "Gemma2Attention", "Gemma2Config",
        {"attn_logit_softcapping": 0.8, "query_pre_attn_scalar": 9, "sliding_window": 8,
         "layer_types": ["sliding_attention"], "num_hidden_layers": 1, **rope()},
        {**HEAD_FIELDS, "softcap": 0.8, "scale": 1 / 3, "window": 8}, rotary="Gemma2RotaryEmbedding", window=8,
    ),
    "gemma2, cap": Family(
        "gemma2", "Gemma2Attention", "Gemma2Config",
        {"attn_logit_softcapping": 0.8, "query_pre_attn_scalar": P, "layer_types": ["full_attention"],
         "num_hidden_layers": 1, **rope()},
        {**HEAD_FIELDS, "softcap": 0.8}, rotary="Gemma2RotaryEmbedding",
    ),
    "gpt_oss, sinks": Family(
        "gpt_oss", "GptOssAttention", "GptOssConfig",
        {"attention_bias": True, "layer_types": ["full_attention"], "num_hidden_layers": 1, **rope()},
        {**HEAD_FIELDS, "sink": True, "bias": True}, [("sinks", None, "sinks", None)], "GptOssRotaryEmbedding",
        projections=lambda: plain(bias="qkv, out"),
    ),
    "gpt_oss, sinks and window 6": Family(
        "gpt_oss", "GptOssAttention", "GptOssConfig",
        {"attention_bias": True, "layer_types": ["sliding_attention"], "sliding_window": 6, "num_hidden_layers": 1,
         **rope()},
        {**HEAD_FIELDS, "sink": True, "bias": True, "window": 6}, [("sinks", None, "sinks", None)],
        "GptOssRotaryEmbedding", 6, lambda: plain(bias="qkv, out"),
    ),
    "deepseek_v3": Family(
        "deepseek_v3", "DeepseekV3Attention", "DeepseekV3Config",
        {**LATENT_SETTINGS, "q_lora_rank": Q_RANK, "attention_bias": True, "rope_interleave": True, **rope()},
        {**LATENT_FIELDS, "q_rank": Q_RANK, "bias": True}, rotary="DeepseekV3RotaryEmbedding",
        projections=lambda: latent(True, interleaved=True, bias=True),
    ),
    "deepseek_v3, no query latent": Family(
        "deepseek_v3", "DeepseekV3Attention", "DeepseekV3Config",
        {**LATENT_SETTINGS, "q_lora_rank": None, "rope_interleave": False, **rope()}, LATENT_FIELDS,
        rotary="DeepseekV3RotaryEmbedding", projections=lambda: latent(False, interleaved=False),
    ),
    "kimi_linear": Family(
        "kimi_linear", "KimiLinearAttention", "KimiLinearConfig", {**LATENT_SETTINGS, "q_lora_rank": None},
        {**LATENT_FIELDS, "positions": "none"}, projections=lambda: latent(False, interleaved=False), layer=3,
    ),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def tokens(length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(1)).to(dtype)


@every_family
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-6)])
def test_outputs_and_gradients_are_those_of_transformers(family, dtype, tolerance):
    ours, theirs, run = family.build(dtype)
    output, gradient = relative_errors(ours, theirs, family.pairs(), tokens(LENGTH, dtype), run_theirs=run)
    assert (output < tolerance, gradient < 2 * tolerance) == (True, True), (output, gradient)


@every_family
def test_token_by_token_from_a_cache_the_outputs_are_those_of_transformers(family):
    ours, theirs, run = family.build(torch.float32)
    x_BLD, read = tokens(LENGTH), 12
    relative_errors(ours, theirs, family.pairs(), x_BLD, run_theirs=run)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        state = ours(x_BLD[:, :read], ours.init_state(2, device=x_BLD.device, dtype=x_BLD.dtype)).state
        step = ours.one_token(nn.Identity(), state)
        run(theirs, x_BLD[:, :read], 0, cache)
        for t in range(read, LENGTH):
            expected = run(theirs, x_BLD[:, t : t + 1], t, cache)[:, 0]
            assert relative(step(x_BLD[:, t].clone()) - x_BLD[:, t], expected) < 1e-5
