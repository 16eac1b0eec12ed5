"""What stands around the blocks against whole models of transformers: logits, gradients, prefill and decoding.

Multipliers that only scale rows of a matrix (Falcon-H1's of the parts of in_proj, of the keys and of the MLP's gate)
are folded into the matrix: the function is the same.
"""

import pytest
import torch

from hybridnas.arch.arch import Arch
from hybridnas.arch.decode import Decoder
from hybridnas.arch.model import HybridLM
from tests.oracles import Scaled, randomize, relative, relative_errors

transformers = pytest.importorskip("transformers")

V, D = 37, 32
RMS = {"norm": "rmsnorm", "final_norm": True, "d_model": D, "vocab_size": V}
SWIGLU = {"d_ff": 48, "activation": "silu", "gated": True, "bias": False}
HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 8}
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def attention(ours, theirs, key_factor=1.0):
    """Pairs of an attention block: one fused matrix here, three there."""
    rows = (slice(0, 32), slice(32, 48), slice(48, 64))
    pairs = [
        (f"{ours}.qkv_proj.weight", part, f"{theirs}.{name}_proj.weight", Scaled(factor))
        for part, name, factor in zip(rows, "qkv", (1.0, key_factor, 1.0), strict=True)
    ]
    return [*pairs, (f"{ours}.out_proj.weight", None, f"{theirs}.o_proj.weight", None)]


def mamba2(ours, theirs, in_rows=None, *, normed=True):
    names = ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "out_proj.weight")
    names += ("norm.weight",) if normed else ()
    return [
        (f"{ours}.in_proj.weight", None, f"{theirs}.in_proj.weight", in_rows),
        *((f"{ours}.{name}", None, f"{theirs}.{name}", None) for name in names),
    ]


def gated_mlp(ours, theirs, gate_factor=1.0):
    """Pairs of an MLP whose gate and value are two matrices there."""
    return [
        (f"{ours}.ff.up_proj.weight", slice(0, 48), f"{theirs}.gate_proj.weight", Scaled(gate_factor)),
        (f"{ours}.ff.up_proj.weight", slice(48, 96), f"{theirs}.up_proj.weight", None),
        (f"{ours}.ff.down_proj.weight", None, f"{theirs}.down_proj.weight", None),
    ]


def granite():
    """Granite-4.0-H: Mamba-2 and attention without positions, each followed by an MLP; four multipliers."""
    config = transformers.GraniteMoeHybridConfig(
        **SIZES,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        shared_intermediate_size=48,
        num_local_experts=0,
        num_experts_per_tok=0,
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_chunk_size=8,
        mamba_expand=2,
        position_embedding_type="nope",
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.2,
        logits_scaling=6.0,
    )
    arch = Arch.from_pattern(
        "NFAFNF",
        **RMS,
        tie_embeddings=True,
        embedding_multiplier=12.0,
        logits_multiplier=1 / 6.0,
        out_multiplier=0.22,
        N={"d_state": 8, "head_dim": 16},
        A={**HEADS, "positions": "none", "scale": 0.2},
        F=SWIGLU,
    )
    pairs = [("embedding.weight", None, "model.embed_tokens.weight", None)]
    for layer, kind in enumerate(config.layer_types):
        at, there = f"layers.{2 * layer}", f"model.layers.{layer}"
        pairs += [
            (f"{at}.norm.weight", None, f"{there}.input_layernorm.weight", None),
            (f"layers.{2 * layer + 1}.norm.weight", None, f"{there}.post_attention_layernorm.weight", None),
        ]
        if kind == "linear_attention":
            pairs += mamba2(f"{at}.branches.0.0", f"{there}.mamba")
        else:
            pairs += attention(f"{at}.branches.0.0", f"{there}.self_attn")
        mlp = f"layers.{2 * layer + 1}.branches.0.0.ff"
        pairs += [
            (f"{mlp}.up_proj.weight", None, f"{there}.shared_mlp.input_linear.weight", None),
            (f"{mlp}.down_proj.weight", None, f"{there}.shared_mlp.output_linear.weight", None),
        ]
    pairs.append(("final_norm.weight", None, "model.norm.weight", None))
    return transformers.GraniteMoeHybridForCausalLM(config), arch, pairs


def falcon_h1(normed=False):
    """Falcon-H1: Mamba-2 and attention side by side, then an MLP; muP multipliers everywhere."""
    parts = (0.35, 0.5, 0.7, 1.4, 1.1)  # of z, x, B, C and dt
    config = transformers.FalconH1Config(
        **SIZES,
        num_hidden_layers=2,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_n_groups=2,
        mamba_chunk_size=8,
        mamba_rms_norm=normed,
        mamba_norm_before_gate=False,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        embedding_multiplier=5.6,
        lm_head_multiplier=0.04,
        key_multiplier=0.4,
        attention_in_multiplier=0.9,
        attention_out_multiplier=0.6,
        ssm_in_multiplier=1.25,
        ssm_out_multiplier=0.24,
        ssm_multipliers=list(parts),
        mlp_multipliers=[0.8, 0.3],
    )
    arch = Arch.from_pattern(
        "([N,A]F)x2",
        **RMS,
        embedding_multiplier=5.6,
        logits_multiplier=0.04,
        N={
            "d_state": 8,
            "head_dim": 16,
            "n_groups": 2,
            "gated_norm": normed,
            "in_multiplier": 1.25,
            "out_multiplier": 0.24,
        },
        A={**HEADS, "in_multiplier": 0.9, "out_multiplier": 0.6},
        F={**SWIGLU, "out_multiplier": 0.3},
    )
    of_row = torch.cat([torch.full((n,), m) for n, m in zip((64, 64, 16, 16, 4), parts, strict=True)])[:, None]
    pairs = [
        ("embedding.weight", None, "model.embed_tokens.weight", None),
        ("head.weight", None, "lm_head.weight", None),
        ("final_norm.weight", None, "model.final_layernorm.weight", None),
    ]
    for layer in range(2):
        at, there = f"layers.{2 * layer}", f"model.layers.{layer}"
        a, n = (0, 1) if str(arch.pattern.layers[0].branches[0][0]) == "A" else (1, 0)
        pairs += [
            (f"{at}.norm.weight", None, f"{there}.input_layernorm.weight", None),
            (f"layers.{2 * layer + 1}.norm.weight", None, f"{there}.pre_ff_layernorm.weight", None),
            *attention(f"{at}.branches.{a}.0", f"{there}.self_attn", key_factor=0.4),
            *mamba2(f"{at}.branches.{n}.0", f"{there}.mamba", in_rows=Scaled(of_row), normed=normed),
            *gated_mlp(f"layers.{2 * layer + 1}.branches.0.0", f"{there}.feed_forward", gate_factor=0.8),
        ]
    return transformers.FalconH1ForCausalLM(config), arch, pairs


def minimax():
    """MiniMax-Text-01: the residual stream goes on normed, and both sides are scaled, by kind of layer."""
    factors = {"full_attn_alpha_factor": 3.5, "full_attn_beta_factor": 0.8, "linear_attn_alpha_factor": 1.7}
    config = transformers.MiniMaxConfig(
        **SIZES,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        head_dim=8,
        block_size=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        mlp_alpha_factor=2.5,
        mlp_beta_factor=1.2,
        **factors,
    )
    arch = Arch.from_pattern(
        "LEAE",
        **RMS,
        norm_position="stream",
        L={
            "kind": "lightning",
            "n_heads": 4,
            "head_dim": 8,
            "value_head_dim": 8,
            "decay_factor": 1 + 1e-5,
            "norm_eps": 1e-6,
            "stream_multiplier": 1.7,
        },
        A={**HEADS, "stream_multiplier": 3.5, "out_multiplier": 0.8},
        E={
            "n_experts": 4,
            "top_k": 2,
            "router": "top_k",
            "renormalize": True,
            "d_expert": 48,
            "activation": "silu",
            "gated": True,
            "stream_multiplier": 2.5,
            "out_multiplier": 1.2,
        },
    )
    pairs = [
        ("embedding.weight", None, "model.embed_tokens.weight", None),
        ("head.weight", None, "lm_head.weight", None),
        ("final_norm.weight", None, "model.norm.weight", None),
    ]
    for layer in range(2):
        at, moe, there = f"layers.{2 * layer}", f"layers.{2 * layer + 1}", f"model.layers.{layer}"
        routed = f"{moe}.branches.0.0.routed"
        pairs += [
            (f"{at}.norm.weight", None, f"{there}.input_layernorm.weight", None),
            (f"{moe}.norm.weight", None, f"{there}.post_attention_layernorm.weight", None),
            *(lightning if layer == 0 else attention)(f"{at}.branches.0.0", f"{there}.self_attn"),
            (f"{routed}.router.weight", None, f"{there}.mlp.gate.weight", None),
            (f"{routed}.experts.gate_up_proj", None, f"{there}.mlp.experts.gate_up_proj", transposed),
            (f"{routed}.experts.down_proj", None, f"{there}.mlp.experts.down_proj", transposed),
        ]
    return transformers.MiniMaxForCausalLM(config), arch, pairs


def lightning(ours, theirs):
    """Pairs of a lightning attention block, whose queries, keys and values lie head by head there."""

    def part(index):
        return lambda weight: weight.view(4, 3, 8, D)[:, index].reshape(-1, D)

    return [
        *(
            (f"{ours}.in_proj.weight", slice(32 * i, 32 * i + 32), f"{theirs}.qkv_proj.weight", part(i))
            for i in range(3)
        ),
        (f"{ours}.in_proj.weight", slice(96, None), f"{theirs}.output_gate.weight", None),
        (f"{ours}.norm.weight", None, f"{theirs}.norm.weight", None),
        (f"{ours}.out_proj.weight", None, f"{theirs}.out_proj.weight", None),
    ]


def transposed(weight):
    return weight.transpose(-1, -2)


def gemma2():
    """Gemma 2: zero-centered norms on both sides, the embedding times sqrt(d), capped logits and scores, a window."""
    config = transformers.Gemma2Config(
        **SIZES,
        num_hidden_layers=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        attn_implementation="eager",
    )
    arch = Arch.from_pattern(
        "A{window=5}FAF",
        **{**RMS, "norm": "rmsnorm_zero", "norm_eps": 1e-6},
        norm_position="sandwich",
        tie_embeddings=True,
        embedding_multiplier=D**0.5,
        final_softcap=3.0,
        A={**HEADS, "softcap": 2.0},
        F={**SWIGLU, "activation": "gelu_tanh"},
    )
    pairs = [
        ("embedding.weight", None, "model.embed_tokens.weight", None),
        ("final_norm.weight", None, "model.norm.weight", None),
    ]
    for layer in range(2):
        at, mlp, there = f"layers.{2 * layer}", f"layers.{2 * layer + 1}", f"model.layers.{layer}"
        pairs += [
            (f"{at}.norm.weight", None, f"{there}.input_layernorm.weight", None),
            (f"{at}.around.0_0.norm.weight", None, f"{there}.post_attention_layernorm.weight", None),
            (f"{mlp}.norm.weight", None, f"{there}.pre_feedforward_layernorm.weight", None),
            (f"{mlp}.around.0_0.norm.weight", None, f"{there}.post_feedforward_layernorm.weight", None),
            *attention(f"{at}.branches.0.0", f"{there}.self_attn"),
            *gated_mlp(f"{mlp}.branches.0.0", f"{there}.mlp"),
        ]
    return transformers.Gemma2ForCausalLM(config), arch, pairs


def lfm3():
    """LFM3: short convolutions and gated, windowed attention, with norms on both sides."""
    config = transformers.Lfm3Config(
        **SIZES, num_hidden_layers=2, layer_types=["conv", "sliding_attention"], head_dim=8, sliding_window=5
    )
    arch = Arch.from_pattern(
        "CFAF",
        **RMS,
        tie_embeddings=True,
        norm_position="sandwich",
        C={"d_conv": 7},
        A={**HEADS, "window": 5, "gate": "head", "qk_norm": "head", "norm_eps": 1e-5},
        F=SWIGLU,
    )
    pairs = [
        ("embedding.weight", None, "model.embed_tokens.weight", None),
        ("final_norm.weight", None, "model.embedding_norm.weight", None),
    ]
    for layer in range(2):
        at, mlp, there = f"layers.{2 * layer}", f"layers.{2 * layer + 1}", f"model.layers.{layer}"
        pairs += [
            (f"{at}.norm.weight", None, f"{there}.operator_norm.weight", None),
            (f"{at}.around.0_0.norm.weight", None, f"{there}.post_operator_norm.weight", None),
            (f"{mlp}.norm.weight", None, f"{there}.ffn_norm.weight", None),
            (f"{mlp}.around.0_0.norm.weight", None, f"{there}.post_ffn_norm.weight", None),
            *(lfm3_convolution if layer == 0 else lfm3_attention)(f"{at}.branches.0.0", there),
            (f"{mlp}.branches.0.0.ff.up_proj.weight", slice(0, 48), f"{there}.feed_forward.w1.weight", None),
            (f"{mlp}.branches.0.0.ff.up_proj.weight", slice(48, 96), f"{there}.feed_forward.w3.weight", None),
            (f"{mlp}.branches.0.0.ff.down_proj.weight", None, f"{there}.feed_forward.w2.weight", None),
        ]
    return transformers.Lfm3ForCausalLM(config), arch, pairs


def lfm3_convolution(ours, theirs):
    return [(f"{ours}.{n}.weight", None, f"{theirs}.conv.{n}.weight", None) for n in ("in_proj", "conv", "out_proj")]


def lfm3_attention(ours, theirs):
    names = {"q_norm": "q_norm", "k_norm": "k_norm", "gate_proj": "g_proj"}
    pairs = attention(ours, f"{theirs}.self_attn")
    return pairs + [(f"{ours}.{a}.weight", None, f"{theirs}.self_attn.{b}.weight", None) for a, b in names.items()]


def olmo_hybrid():
    """OLMo-Hybrid: the norm before Gated DeltaNet and its MLP, after attention and its MLP."""
    config = transformers.OlmoHybridConfig(
        **SIZES,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=12,
        linear_value_head_dim=24,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    deltanet = {"n_heads": 2, "n_value_heads": 2, "head_dim": 12, "value_head_dim": 24, "negative_eigenvalues": True}
    arch = Arch.from_pattern(
        "GFAF{norm_position=post}",
        **{**RMS, "norm_eps": 1e-6},
        G={**deltanet, "norm_eps": 1e-5},
        A={**HEADS, "qk_norm": "all", "norm_eps": 1e-6, "rope_base": 5e5, "norm_position": "post"},
        F=SWIGLU,
    )
    widths = torch.tensor([0, 24, 24, 48, 48, 2, 2]).cumsum(0).tolist()
    deltanets, attentions = "layers.0.branches.0.0", "layers.2.branches.0.0"
    first, second = "model.layers.0", "model.layers.1"
    pairs = [
        ("embedding.weight", None, "model.embed_tokens.weight", None),
        ("head.weight", None, "lm_head.weight", None),
        ("final_norm.weight", None, "model.norm.weight", None),
        ("layers.0.norm.weight", None, f"{first}.input_layernorm.weight", None),
        ("layers.1.norm.weight", None, f"{first}.post_attention_layernorm.weight", None),
        ("layers.2.around.0_0.norm.weight", None, f"{second}.post_attention_layernorm.weight", None),
        ("layers.3.around.0_0.norm.weight", None, f"{second}.post_feedforward_layernorm.weight", None),
        *(
            (f"{deltanets}.in_proj.weight", slice(start, end), f"{first}.linear_attn.{name}_proj.weight", None)
            for name, start, end in zip("qkvgab", widths, widths[1:], strict=False)
        ),
        (f"{deltanets}.norm.weight", None, f"{first}.linear_attn.o_norm.weight", None),
        (f"{deltanets}.out_proj.weight", None, f"{first}.linear_attn.o_proj.weight", None),
        *((f"{deltanets}.{n}", None, f"{first}.linear_attn.{n}", None) for n in ("conv1d.weight", "A_log", "dt_bias")),
        *attention(attentions, f"{second}.self_attn"),
        *((f"{attentions}.{n}.weight", None, f"{second}.self_attn.{n}.weight", None) for n in ("q_norm", "k_norm")),
        *gated_mlp("layers.1.branches.0.0", f"{first}.mlp"),
        *gated_mlp("layers.3.branches.0.0", f"{second}.mlp"),
    ]
    return transformers.OlmoHybridForCausalLM(config), arch, pairs


FAMILIES = {
    "granite": granite,
    "falcon_h1": falcon_h1,
    "falcon_h1 with a gated norm": lambda: falcon_h1(normed=True),
    "minimax": minimax,
    "gemma2": gemma2,
    "lfm3": lfm3,
    "olmo_hybrid": olmo_hybrid,
}


def ids():
    return torch.randint(V, (2, 19), generator=torch.Generator().manual_seed(2))


def ours_of(model, x_BL):
    return model(x_BL).logits


def theirs_of(model, x_BL):
    return model(x_BL, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_gradients_and_decoding_are_those_of_transformers(family):
    torch.manual_seed(0)
    theirs, arch, pairs = FAMILIES[family]()
    randomize(theirs, std=0.1)
    theirs, ours = theirs.eval(), HybridLM(arch).eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    output, gradient = relative_errors(ours, theirs, pairs, ids(), run_ours=ours_of, run_theirs=theirs_of)
    assert output < 1e-5
    assert gradient < 5e-5
    with torch.no_grad():
        expected = theirs_of(theirs, ids())
        decode = Decoder(ours, ours(ids()[:, :11], state=ours.init_state(2)).state)
        stepped = torch.stack([decode(ids()[:, t]) for t in range(11, 19)], dim=1)
    assert relative(stepped, expected[:, 11:]) < 1e-5
