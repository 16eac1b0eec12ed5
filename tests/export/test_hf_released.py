"""Presets against the configs that their makers released: read from it, a config is the preset's architecture.

The configs are those of the checkpoints as far as they are settings of the function: from the defaults of transformers'
classes (OLMo-Hybrid, Qwen), NVIDIA-NeMo/Megatron-Bridge (Nemotron, Falcon-H1-0.5B), and copies of config.json in public
repositories. Mamba-2's are as transformers converts them. Falcon-H1 3B and 7B are not here: their multipliers are not
at hand. Weights of routing losses are left aside: they are settings of training, and transformers sums over a token's
choices where we average.
"""

import pytest
import torch

from hybridnas.arch.presets import PRESETS, preset
from hybridnas.export.hf import read, read_arch
from tests.oracles import randomize, relative


def words(count, attention, word="linear_attention", of_attention="full_attention"):
    return [of_attention if i in attention else word for i in range(count)]


def mamba(width, layers):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50280, "state_size": 16}
    return {"model_type": "mamba", **sizes, "time_step_rank": width // 16, "expand": 2, "conv_kernel": 4}


def mamba2(width, layers):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50288, "num_heads": width // 32}
    return {"model_type": "mamba2", **sizes, "n_groups": 1, "state_size": 128, "tie_word_embeddings": True}


def nemotron(width, letters, d_ff, mamba, heads, **own):
    return {
        "model_type": "nemotron_h",
        "hidden_size": width,
        "hybrid_override_pattern": letters,
        "intermediate_size": d_ff,
        "mamba_num_heads": mamba[0],
        "mamba_head_dim": mamba[1],
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": 131072,
        "layer_norm_epsilon": 1e-5,
        "time_step_min": 0.001,
        **own,
    }


def granite(width, attention, mamba, heads, d_ff, scale, logits, layers=40, residual=0.22, experts=(0, 0, 0)):
    count, chosen, d_expert = experts
    return {
        "model_type": "granitemoehybrid",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "layer_types": words(layers, attention, "mamba", "attention"),
        "mamba_n_heads": mamba[0],
        "mamba_d_head": mamba[1],
        "mamba_d_state": 128,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "shared_intermediate_size": d_ff,
        "num_local_experts": count,
        "num_experts_per_tok": chosen,
        "intermediate_size": d_expert,
        "attention_multiplier": scale,
        "embedding_multiplier": 12,
        "residual_multiplier": residual,
        "logits_scaling": logits,
        "position_embedding_type": "nope",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000,
        "tie_word_embeddings": True,
        "vocab_size": 100352,
    }


def lfm2(width, heads, d_ff, layers=16, attention=(2, 5, 8, 10, 12, 14)):
    return {
        "model_type": "lfm2",
        "hidden_size": width,
        "num_attention_heads": heads,
        "block_ff_dim": d_ff,
        "num_hidden_layers": layers,
        "layer_types": words(layers, attention, "conv"),
        "norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "vocab_size": 65536,
    }


EVERY_FOURTH = range(3, 80, 4)
QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}}
VISION_ROPE = {"rope_parameters": {**QWEN_ROPE["rope_parameters"], "mrope_section": [11, 11, 10]}}
_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
RELEASED = {
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "mamba_130m": mamba(768, 24),
    "mamba_370m": mamba(1024, 48),
    "mamba_790m": mamba(1536, 48),
    "mamba_1_4b": mamba(2048, 48),
    "mamba_2_8b": mamba(2560, 64),
    "mamba2_130m": mamba2(768, 24),
    "mamba2_370m": mamba2(1024, 48),
    "mamba2_780m": mamba2(1536, 48),
    "mamba2_1_3b": mamba2(2048, 48),
    "mamba2_2_7b": mamba2(2560, 64),
    "jamba": {
        "model_type": "jamba",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "mamba_d_state": 16,
        "mamba_dt_rank": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": 65536,
    },
    "bamba": {
        "model_type": "bamba",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "attn_layer_indices": [9, 18, 27],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "mamba_n_heads": 128,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
    },
    "granite_h_350m": granite(768, (10, 13, 17, 27), (48, 32), (12, 4), 2048, 1 / 64, 3, layers=32, residual=0.246),
    "granite_h_1b": granite(1536, (5, 15, 25, 35), (48, 64), (12, 4), 4096, 1 / 128, 6),
    "granite_h_micro": granite(2048, (5, 15, 25, 35), (64, 64), (32, 8), 8192, 1 / 64, 8),
    "granite_h_tiny": granite(1536, (5, 15, 25, 35), (48, 64), (12, 4), 1024, 1 / 128, 6, experts=(64, 6, 512)),
    "granite_h_small": granite(4096, (5, 15, 25, 35), (128, 64), (32, 8), 1536, 1 / 128, 16, experts=(72, 10, 768)),
    "falcon_h1_0_5b": {
        "model_type": "falcon_h1",
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mamba_d_ssm": 1536,
        "mamba_n_heads": 24,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_norm_before_gate": False,
        "rope_theta": 100000000000.0,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32784,
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 0.9375,
        "embedding_multiplier": 5.656854249492381,
        "key_multiplier": 0.39062499999999994,
        "lm_head_multiplier": 0.0390625,
        "mlp_multipliers": [0.8838834764831844, 0.5859375],
        "ssm_in_multiplier": 1.25,
        "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
        "ssm_out_multiplier": 0.23570226039551587,
    },
    "nemotron_h": nemotron(4096, _8B, 21504, (128, 64), (32, 8)),
    "nemotron_h_4b": nemotron(3072, _8B, 12288, (112, 64), (32, 8)),
    "nemotron_nano_9b_v2": nemotron(
        4480, "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 15680, (128, 80), (40, 8)
    ),
    "nemotron_nano_12b_v2": nemotron(5120, 6 * "M-M-M-M*-" + "M-M-M-M-", 20480, (128, 80), (40, 8)),
    "nemotron_3_nano_4b": nemotron(3136, "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-", 12544, (96, 80), (40, 8)),
    "nemotron_3_nano": nemotron(
        2688,
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        1856,
        (64, 64),
        (32, 2),
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5,
    ),
    "qwen3_next": {"model_type": "qwen3_next", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    "qwen3_5_4b": {
        "model_type": "qwen3_5",
        "tie_word_embeddings": True,
        "text_config": {"hidden_size": 2560, "intermediate_size": 9216, "full_attention_interval": 4, **VISION_ROPE},
    },
    "qwen3_5_9b": {"model_type": "qwen3_5", "text_config": {"layer_types": words(32, EVERY_FOURTH), **VISION_ROPE}},
    "qwen3_5_35b_a3b": {
        "model_type": "qwen3_5_moe",
        "text_config": {"layer_types": words(40, EVERY_FOURTH), "num_experts": 256, **VISION_ROPE},
    },
    "olmo_hybrid": {"model_type": "olmo_hybrid", "rope_parameters": {"rope_theta": None, "rope_type": "default"}},
    "kimi_linear": {
        "model_type": "kimi_linear",
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
            "kda_layers": [i for i in range(1, 28) if i not in (4, 8, 12, 16, 20, 24, 27)],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
        "moe_renormalize": True,
        "num_expert_group": 1,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
    },
    "minimax_text_01": {
        "model_type": "minimax_text_01",
        "hidden_size": 6144,
        "intermediate_size": 9216,
        "num_hidden_layers": 80,
        "attn_type_list": [int(i % 8 == 7) for i in range(80)],
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rotary_dim": 64,
        "rope_theta": 10000000,
        "num_local_experts": 32,
        "num_experts_per_tok": 2,
        "postnorm": True,
        "rms_norm_eps": 1e-5,
        "vocab_size": 200064,
        **{f"layernorm_{kind}_alpha": 3.5565588200778455 for kind in ("full_attention", "linear_attention", "mlp")},
        **{f"layernorm_{kind}_beta": 1.0 for kind in ("full_attention", "linear_attention", "mlp")},
    },
    "lfm2_350m": lfm2(1024, 16, 6656),
    "lfm2_700m": lfm2(1536, 24, 10240),
    "lfm2_1_2b": lfm2(2048, 32, 12288),
    "lfm2_2_6b": {
        **lfm2(2048, 32, 10752, layers=30, attention=(2, 5, 9, 13, 17, 21, 24, 27)),
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_8b_a1b": {
        "model_type": "lfm2_moe",
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_hidden_layers": 24,
        "layer_types": words(24, (2, 6, 10, 14, 18, 21), "conv"),
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "rope_theta": 1000000.0,
        "vocab_size": 65536,
    },
}


def function_of(arch):
    """Return the architecture without the weight of the routing loss."""
    return arch.replace(load_balance_weight=0.0) if "E" in arch.pattern.letters else arch


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_is_the_preset(name):
    read, own = function_of(read_arch(RELEASED[name])), function_of(preset(name))
    for ours, theirs in zip(own.nodes, read.nodes, strict=True):  # the first difference, named
        assert {**theirs.config.canonical()} == {**ours.config.canonical()}, ours.where
    assert read.model.canonical() == own.model.canonical()
    assert read.fingerprint() == own.fingerprint()


def test_every_released_preset_of_a_class_of_transformers_has_its_config_here():
    without = {"falcon_h1_3b", "falcon_h1_7b"}
    counted = {
        name for name in PRESETS if (entry := PRESETS.get(name)).release and "transformers" in entry.release.counted
    }
    assert counted - without == set(RELEASED)


# Sizes of a tiny model; all other settings of a released config stay as they are.
TINY = {
    **{"hidden_size": 32, "vocab_size": 37, "intermediate_size": 48, "block_ff_dim": 48, "block_multiple_of": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 8},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_dt_rank": 2, "mamba_d_state": 8},
    **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "num_heads": 4, "state_size": 8},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 12, "shared_expert_intermediate_size": 12},
    **{"shared_intermediate_size": 20, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4, "kv_lora_rank": 8, "v_head_dim": 8},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "time_step_rank": 2},
}
# preset -> its class in transformers, and settings that a tiny model has to have
ONE_OF_A_FAMILY = {
    "mixtral": ("Mixtral", {}),
    "mamba_130m": ("Mamba", {}),
    "mamba2_130m": ("Mamba2", {"head_dim": 16}),
    "jamba": ("Jamba", {}),
    "bamba": ("Bamba", {"attn_layer_indices": [3]}),
    "granite_h_350m": ("GraniteMoeHybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "granite_h_tiny": ("GraniteMoeHybrid", {}),
    "falcon_h1_0_5b": ("FalconH1", {}),
    "nemotron_h": ("NemotronH", {"time_step_min": 1e-12}),
    "nemotron_3_nano": ("NemotronH", {"time_step_min": 1e-12}),
    "qwen3_next": ("Qwen3Next", {"head_dim": 16}),
    "qwen3_5_4b": ("Qwen3_5", {"head_dim": 16}),
    "qwen3_5_35b_a3b": ("Qwen3_5Moe", {"head_dim": 16}),
    "olmo_hybrid": ("OlmoHybrid", {}),
    "kimi_linear": ("KimiLinear", {"num_key_value_heads": 4, "num_experts_per_token": 2, "linear_attn_config": None}),
    "lfm2_350m": ("Lfm2", {}),
    "lfm2_8b_a1b": ("Lfm2Moe", {}),
}


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
@torch.no_grad()
def test_a_released_config_at_a_tiny_size_gives_the_logits_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    kind, needed = ONE_OF_A_FAMILY[name]
    given = RELEASED[name]
    given = {"tie_word_embeddings": given.get("tie_word_embeddings", False), **given.get("text_config", given)}
    text = "Text" if kind.startswith("Qwen3_5") else ""
    config_class = getattr(transformers, f"{kind}{text}Config")
    config = {key: value for key, value in given.items() if key not in ("model_type", "linear_attn_config")}
    config |= {key: value for key, value in TINY.items() if key in config or hasattr(config_class, key)}
    config |= {key: value for key, value in needed.items() if value is not None}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = [*config["layer_types"][:7], "full_attention"]
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config_class(**config, **tokens)).eval()
    randomize(theirs, std=0.1)
    ids = torch.randint(37, (2, 37), generator=torch.Generator().manual_seed(1))
    # Float32 through sixteen sub-layers: both are as far from ours in float64 as from each other.
    assert relative(read(theirs)(ids).logits, theirs(ids, use_cache=False).logits) < 1e-4
