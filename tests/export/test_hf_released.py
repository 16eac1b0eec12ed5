"""Presets against the configs that their makers released: read from it, a config is the preset's architecture."""

import json

import pytest
import torch
from released import RELEASED, transformers_config

from hybridnas.arch.presets import preset
from hybridnas.export.hf import read, read_arch
from tests.oracles import randomize, relative

transformers = pytest.importorskip("transformers")
COMPLETE = sorted(set(RELEASED) - {"falcon_h1_3b", "falcon_h1_7b"})  # multipliers are not at hand


def function_of(arch):
    """Return the architecture without the weight of the routing loss.

    It is a setting of training, and transformers sums over a token's choices where we average.
    """
    return arch.replace(load_balance_weight=0.0) if "E" in arch.pattern.letters else arch


@pytest.mark.parametrize("name", COMPLETE)
def test_a_released_config_is_the_preset(name):
    read, own = function_of(read_arch(transformers_config(name))), function_of(preset(name))
    for ours, theirs in zip(own.nodes, read.nodes, strict=True):  # the first difference, named
        assert theirs.config.canonical() == ours.config.canonical(), ours.where
    assert read.model.canonical() == own.model.canonical()
    assert read.fingerprint() == own.fingerprint()


def test_minimax_and_kimi_are_read_by_their_makers_names_too():
    kinds = ("full_attention", "linear_attention", "mlp")
    minimax = {
        "model_type": "minimax_text_01",
        **{"hidden_size": 6144, "intermediate_size": 9216, "num_hidden_layers": 80, "vocab_size": 200064},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "rotary_dim": 64, "rope_theta": 1e7},
        **{"num_local_experts": 32, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "postnorm": True},
        "attn_type_list": [int(i % 8 == 7) for i in range(80)],
        **{f"layernorm_{kind}_alpha": 3.5565588200778455 for kind in kinds},
        **{f"layernorm_{kind}_beta": 1.0 for kind in kinds},
    }
    full = [4, 8, 12, 16, 20, 24, 27]
    kimi = {
        "model_type": "kimi_linear",
        **{"moe_renormalize": True, "num_expert_group": 1, "num_experts": 256, "num_experts_per_token": 8},
        **{"num_shared_experts": 1, "first_k_dense_replace": 1},
        "linear_attn_config": {
            **{"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4},
            **{"full_attn_layers": full, "kda_layers": [i for i in range(1, 28) if i not in full]},
        },
    }
    for name, config in (("minimax_text_01", minimax), ("kimi_linear", kimi)):
        assert function_of(read_arch(config)).fingerprint() == function_of(preset(name)).fingerprint()


def test_of_qwen3_5_the_language_model_is_read():
    text = json.loads(transformers_config("qwen3_5_4b").to_json_string())
    whole = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 27}, "tie_word_embeddings": True}
    assert read_arch(whole).fingerprint() == preset("qwen3_5_4b").fingerprint()


# Sizes of a tiny model; all other settings of a released config stay as they are.
TINY = {
    **{"hidden_size": 32, "vocab_size": 37, "intermediate_size": 48, "block_multiple_of": 8, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 8},
    **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_dt_rank": 2, "mamba_d_state": 8},
    **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "num_heads": 4, "state_size": 8},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 12, "shared_expert_intermediate_size": 12},
    **{"shared_intermediate_size": 20, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2},
    **{"linear_num_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4, "kv_lora_rank": 8, "v_head_dim": 8},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "time_step_rank": 2},
}
# One preset of each family, with settings that a tiny model has to have.
ONE_OF_A_FAMILY = {
    "mixtral": {},
    "mamba_130m": {},
    "mamba2_130m": {"head_dim": 16},
    "jamba": {},
    "bamba": {"attn_layer_indices": [3]},
    "granite_h_350m": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "granite_h_tiny": {},
    "falcon_h1_0_5b": {},
    "nemotron_h": {"time_step_min": 1e-12},  # see the test on steps below it
    "nemotron_3_nano": {"time_step_min": 1e-12},
    "qwen3_next": {"head_dim": 16},
    "qwen3_5_4b": {"head_dim": 16},
    "qwen3_5_35b_a3b": {"head_dim": 16},
    "olmo_hybrid": {"num_key_value_heads": 4},
    "kimi_linear": {"num_key_value_heads": 4},
    "minimax_text_01": {"rotary_dim": None, "block_size": 16},  # its class turns whole heads
    "recurrent_gemma_2b": {"num_key_value_heads": 1, "attention_window_size": 9},
    "xlstm_7b": {},
    "lfm2_350m": {"full_attn_idxs": [3]},
    "lfm2_8b_a1b": {},
}


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
@torch.no_grad()
def test_a_released_config_at_a_tiny_size_gives_the_logits_of_transformers(name):
    kind, released = RELEASED[name]
    config = transformers_config(name)
    derived = {key for key in TINY if isinstance(getattr(type(config), key, None), property)}
    changed = {key: value for key, value in TINY.items() if hasattr(config, key) and key not in derived}
    for key in ("layer_types", "layers_block_type"):
        if key in released:
            of_attention = "attention" if "attention" in released[key] else "full_attention"
            changed[key] = [*released[key][:7], of_attention]
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = transformers_config(name, **{**changed, **tokens, **ONE_OF_A_FAMILY[name]})
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    randomize(theirs, std=0.1)
    ids = torch.randint(37, (2, 37), generator=torch.Generator().manual_seed(1))
    # Float32 through sixteen sub-layers: both are as far from ours in float64 as from each other.
    assert relative(read(theirs)(ids).logits, theirs(ids, use_cache=False).logits) < 1e-4
