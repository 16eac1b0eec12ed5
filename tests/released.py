"""Configurations of released models, as transformers' classes take them: what the presets are held against.

Written from the models' own config.json files, papers and recipes, not from ``hybridnas/arch/presets``: all settings of
the function that are not the class's defaults. Of Falcon-H1 3B and 7B the sizes alone are at hand, no multipliers.
MiniMax's class does not read ``rotary_dim``, its makers' code does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


def _mamba(d_model: int, layers: int) -> dict[str, Any]:
    return {"hidden_size": d_model, "num_hidden_layers": layers, "vocab_size": 50280, "state_size": 16, "expand": 2}


def _mamba2(d_model: int, layers: int) -> dict[str, Any]:
    shape = {"hidden_size": d_model, "num_hidden_layers": layers, "num_heads": 2 * d_model // 64, "head_dim": 64}
    return {**shape, "vocab_size": 50288, "state_size": 128, "n_groups": 1, "tie_word_embeddings": True}


def _hybrid(layers: int, places: tuple[int, ...]) -> list[str]:
    return ["hybrid" if i in places else "mamba" for i in range(layers)]


def _nemotron(d_model: int, pattern: str, mamba: tuple[int, int], heads: int, d_ff: int = 1, **more: Any) -> Any:
    return {
        "hidden_size": d_model,
        "hybrid_override_pattern": pattern,
        "mamba_num_heads": mamba[0],
        "mamba_head_dim": mamba[1],
        "n_groups": 8,
        "ssm_state_size": 128,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": d_ff,
        "vocab_size": 131072,
        **more,
    }


def _granite(
    d_model: int, mamba: tuple[int, int], heads: tuple[int, int], shared: int, scale: float, logits: int, **more: Any
) -> dict[str, Any]:
    attention, depth = more.pop("attention", (5, 15, 25, 35)), more.pop("depth", 40)
    experts = {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 1, **more}
    return {
        "hidden_size": d_model,
        "num_hidden_layers": depth,
        "layers_block_type": [_kind(i in attention) for i in range(depth)],
        "mamba_n_heads": mamba[0],
        "mamba_d_head": mamba[1],
        "mamba_d_state": 128,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "shared_intermediate_size": shared,
        "vocab_size": 100352,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "position_embedding_type": "nope",
        "attention_multiplier": scale,
        "embedding_multiplier": 12,
        "residual_multiplier": 0.22,
        "logits_scaling": logits,
        **experts,
    }


def _kind(full: bool, other: str = "linear_attention") -> str:
    return "full_attention" if full else other


def _falcon(
    d_model: int,
    layers: int,
    ff: int,
    heads: tuple[int, int, int],
    mamba: tuple[int, int, int],
    vocab: int,
    **more: Any,
) -> Any:
    return {
        "hidden_size": d_model,
        "num_hidden_layers": layers,
        "intermediate_size": ff,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "mamba_n_heads": mamba[0],
        "mamba_d_head": mamba[1],
        "mamba_d_ssm": mamba[0] * mamba[1],
        "mamba_d_state": mamba[2],
        "mamba_n_groups": 1,
        "mamba_norm_before_gate": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e11},
        "vocab_size": vocab,
        **more,
    }


def _lfm2(d_model: int, ff: int, heads: int, attention: tuple[int, ...], layers: int = 16) -> dict[str, Any]:
    return {
        "hidden_size": d_model,
        "num_hidden_layers": layers,
        "intermediate_size": ff,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "full_attn_idxs": list(attention),
        "vocab_size": 65536,
    }


_NEMOTRON_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
_LFM2 = (2, 5, 8, 10, 12, 14)
RELEASED: dict[str, tuple[str, dict[str, Any]]] = {  # preset -> class of the model, arguments of its configuration
    "mixtral": ("Mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mamba_130m": ("Mamba", _mamba(768, 24)),
    "mamba_370m": ("Mamba", _mamba(1024, 48)),
    "mamba_790m": ("Mamba", _mamba(1536, 48)),
    "mamba_1_4b": ("Mamba", _mamba(2048, 48)),
    "mamba_2_8b": ("Mamba", _mamba(2560, 64)),
    "mamba2_130m": ("Mamba2", _mamba2(768, 24)),
    "mamba2_370m": ("Mamba2", _mamba2(1024, 48)),
    "mamba2_780m": ("Mamba2", _mamba2(1536, 48)),
    "mamba2_1_3b": ("Mamba2", _mamba2(2048, 48)),
    "mamba2_2_7b": ("Mamba2", _mamba2(2560, 64)),
    "nemotron_h": ("NemotronH", _nemotron(4096, _NEMOTRON_8B, (128, 64), 32, 21504)),
    "nemotron_h_4b": ("NemotronH", _nemotron(3072, _NEMOTRON_8B, (112, 64), 32, 12288)),
    "nemotron_nano_9b_v2": (
        "NemotronH",
        _nemotron(4480, "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", (128, 80), 40, 15680),
    ),
    "nemotron_nano_12b_v2": (
        "NemotronH",
        _nemotron(5120, "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", (128, 80), 40, 20480),
    ),
    "nemotron_3_nano_4b": (
        "NemotronH",
        _nemotron(3136, "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-", (96, 80), 40, 12544),
    ),
    "nemotron_3_nano": (
        "NemotronH",
        _nemotron(
            2688,
            "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
            (64, 64),
            32,
            num_key_value_heads=2,
            n_routed_experts=128,
            num_experts_per_tok=6,
            moe_intermediate_size=1856,
            n_shared_experts=1,
            moe_shared_expert_intermediate_size=3712,
            routed_scaling_factor=2.5,
        ),
    ),
    "bamba": ("Bamba", {"attn_layer_indices": [9, 18, 27], "mamba_d_state": 128, "vocab_size": 128256}),
    "granite_h_350m": (
        "GraniteMoeHybrid",
        _granite(
            768, (48, 32), (12, 4), 2048, 1 / 64, 3, depth=32, attention=(10, 13, 17, 27), residual_multiplier=0.246
        ),
    ),
    "granite_h_1b": ("GraniteMoeHybrid", _granite(1536, (48, 64), (12, 4), 4096, 1 / 128, 6)),
    "granite_h_micro": ("GraniteMoeHybrid", _granite(2048, (64, 64), (32, 8), 8192, 1 / 64, 8)),
    "granite_h_tiny": (
        "GraniteMoeHybrid",
        _granite(
            1536,
            (48, 64),
            (12, 4),
            1024,
            1 / 128,
            6,
            num_local_experts=64,
            num_experts_per_tok=6,
            intermediate_size=512,
        ),
    ),
    "granite_h_small": (
        "GraniteMoeHybrid",
        _granite(
            4096,
            (128, 64),
            (32, 8),
            1536,
            1 / 128,
            16,
            num_local_experts=72,
            num_experts_per_tok=10,
            intermediate_size=768,
        ),
    ),
    "jamba": ("Jamba", {}),
    "falcon_h1_0_5b": (
        "FalconH1",
        _falcon(
            1024,
            36,
            2048,
            (8, 2, 64),
            (24, 64, 128),
            32784,
            attention_out_multiplier=0.9375,
            embedding_multiplier=5.656854249492381,
            key_multiplier=0.39062499999999994,
            lm_head_multiplier=0.0390625,
            mlp_multipliers=[0.8838834764831844, 0.5859375],
            ssm_in_multiplier=1.25,
            ssm_multipliers=[0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
            ssm_out_multiplier=0.23570226039551587,
        ),
    ),
    "falcon_h1_3b": ("FalconH1", _falcon(2560, 32, 6144, (10, 2, 128), (32, 128, 256), 65536)),
    "falcon_h1_7b": ("FalconH1", _falcon(3072, 44, 12288, (12, 2, 128), (24, 128, 256), 130048)),
    "qwen3_next": ("Qwen3Next", {"rope_parameters": _ROPE}),
    "qwen3_5_4b": (
        "Qwen3_5",
        {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True, "rope_parameters": _ROPE},
    ),
    "qwen3_5_9b": ("Qwen3_5", {"rope_parameters": _ROPE}),
    "qwen3_5_35b_a3b": ("Qwen3_5Moe", {"rope_parameters": _ROPE}),
    "olmo_hybrid": ("OlmoHybrid", {"rope_parameters": {"rope_type": "default", "rope_theta": None}}),
    "kimi_linear": (
        "KimiLinear",
        {"layer_types": [_kind(i + 1 in (4, 8, 12, 16, 20, 24, 27)) for i in range(27)]},
    ),
    "minimax_text_01": (
        "MiniMax",
        {
            "hidden_size": 6144,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 9216,
            "num_local_experts": 32,
            "vocab_size": 200064,
            "layer_types": [_kind(i % 8 == 7) for i in range(80)],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
            "rotary_dim": 64,
            **{f"{part}_alpha_factor": 3.5565588200778455 for part in ("full_attn", "linear_attn", "mlp")},
        },
    ),
    "recurrent_gemma_2b": ("RecurrentGemma", {"num_key_value_heads": 1, "intermediate_size": 15360}),
    "recurrent_gemma_9b": (
        "RecurrentGemma",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 38,
            "num_attention_heads": 16,
            "num_key_value_heads": 1,
            "intermediate_size": 24576,
        },
    ),
    "xlstm_7b": ("xLSTM", {}),
    "zamba2_1_2b": (
        "Zamba2",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 38,
            "layers_block_type": _hybrid(38, (5, 11, 17, 23, 29, 35)),
            "n_mamba_heads": 64,
            "mamba_d_state": 128,
            "num_mem_blocks": 1,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
        },
    ),
    "zamba2_2_7b": (
        "Zamba2",
        {
            "layers_block_type": _hybrid(54, (6, 12, 18, 24, 30, 36, 42, 47, 51)),
            "n_mamba_heads": 80,
            "num_mem_blocks": 2,
        },
    ),
    "lfm2_350m": ("Lfm2", _lfm2(1024, 6656, 16, _LFM2)),
    "lfm2_700m": ("Lfm2", _lfm2(1536, 10240, 24, _LFM2)),
    "lfm2_1_2b": ("Lfm2", _lfm2(2048, 12288, 32, _LFM2)),
    "lfm2_2_6b": (
        "Lfm2",
        {
            **_lfm2(2048, 10752, 32, (2, 5, 9, 13, 17, 21, 24, 27), 30),
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "lfm2_8b_a1b": (
        "Lfm2Moe",
        {"num_hidden_layers": 24, "layer_types": [_kind(i in (2, 6, 10, 14, 18, 21), "conv") for i in range(24)]},
    ),
}


def transformers_config(name: str, **changed: Any) -> Any:
    """Return transformers' configuration of a release, some arguments changed."""
    transformers = pytest.importorskip("transformers")
    kind, arguments = RELEASED[name]
    text = "Text" if kind.startswith("Qwen3_5") else ""
    return getattr(transformers, f"{kind}{text}Config")(**{**arguments, **changed})


def transformers_model(name: str, **changed: Any) -> Any:
    """Return transformers' causal language model of a release on the meta device, some arguments changed."""
    transformers = pytest.importorskip("transformers")
    config = transformers_config(name, **changed)
    with torch.device("meta"):
        return getattr(transformers, f"{RELEASED[name][0]}ForCausalLM")(config)
