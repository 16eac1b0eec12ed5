"""Routed experts against the mixtures of experts of transformers: outputs, and gradients of input and every weight."""

import importlib

import pytest
import torch
from oracles import relative_errors
from torch import nn

from hybridnas.blocks.moe import Moe

pytest.importorskip("transformers")
D, E, F, K = 16, 8, 12, 3  # width, experts, their hidden width, choices of a token
SILU = {"activation": "silu", "gated": True}
TOP_K = {"n_experts": E, "d_expert": F, "top_k": K, "router": "top_k"}
SIGMOID = {**TOP_K, "scores": "sigmoid", "renormalize": True}
DEEPSEEK = {"hidden_size": D, "moe_intermediate_size": F, "num_experts_per_tok": K, "routed_scaling_factor": 2.5}


def flipped(t):
    return t.transpose(1, 2)


def routed(router, *, up="gate_up_proj", experts="experts"):
    return [
        ("routed.router.weight", None, router, None),
        (f"routed.experts.{up}", None, f"{experts}.{up}", flipped),
        ("routed.experts.down_proj", None, f"{experts}.down_proj", flipped),
    ]


def shared(name, width):
    return [
        ("shared.up_proj.weight", slice(0, width), f"{name}.gate_proj.weight", None),
        ("shared.up_proj.weight", slice(width, 2 * width), f"{name}.up_proj.weight", None),
        ("shared.down_proj.weight", None, f"{name}.down_proj.weight", None),
    ]


def plain_shared(name):
    return [(f"shared.{part}_proj.weight", None, f"{name}.{part}_proj.weight", None) for part in ("up", "down")]


# family -> class of the mixture, settings of its config, our fields, pairs of weights, name of the correction bias
FAMILIES = {
    "mixtral": (
        "MixtralSparseMoeBlock",
        {"hidden_size": D, "intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": K},
        {**TOP_K, **SILU, "renormalize": True},
        routed("gate.weight"),
        None,
    ),
    "jamba": (
        "JambaSparseMoeBlock",
        {"hidden_size": D, "intermediate_size": F, "num_experts": E, "num_experts_per_tok": K},
        {**TOP_K, **SILU},
        routed("router.weight"),
        None,
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridMoE",
        {
            "hidden_size": D,
            "intermediate_size": F,
            "num_local_experts": E,
            "num_experts_per_tok": K,
            "mamba_n_heads": 8,
        },
        {**TOP_K, **SILU, "renormalize": True},
        routed("router.weight"),
        None,
    ),
    "qwen3_next": (
        "Qwen3NextSparseMoeBlock",
        {
            "hidden_size": D,
            "moe_intermediate_size": F,
            "shared_expert_intermediate_size": 20,
            "num_experts": E,
            "num_experts_per_tok": K,
            "norm_topk_prob": True,
        },
        {**TOP_K, **SILU, "renormalize": True, "d_shared": 20, "shared_gate": True},
        [
            *routed("gate.weight"),
            *shared("shared_expert", 20),
            ("shared_gate.weight", None, "shared_expert_gate.weight", None),
        ],
        None,
    ),
    "nemotron_h": (
        "NemotronHMoE",
        {
            **DEEPSEEK,
            "n_routed_experts": E,
            "moe_shared_expert_intermediate_size": 24,
            "n_group": 1,
            "topk_group": 1,
            "mlp_hidden_act": "relu2",
        },
        {**SIGMOID, "activation": "relu2", "d_shared": 24, "routed_scale": 2.5, "correction_bias": True},
        [*routed("gate.weight", up="up_proj"), *plain_shared("shared_experts")],
        "gate.e_score_correction_bias",
    ),
    "deepseek_v3": (
        "DeepseekV3MoE",
        {**DEEPSEEK, "n_routed_experts": E, "n_shared_experts": 2, "n_group": 4, "topk_group": 2},
        {
            **SIGMOID,
            **SILU,
            "d_shared": 2 * F,
            "routed_scale": 2.5,
            "correction_bias": True,
            "expert_groups": 4,
            "top_groups": 2,
        },
        [*routed("gate.weight"), *shared("shared_experts", 2 * F)],
        "gate.e_score_correction_bias",
    ),
    "kimi_linear": (
        "KimiLinearMoE",
        {**DEEPSEEK, "num_experts": E, "n_routed_experts": E, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
        {**SIGMOID, **SILU, "d_shared": F, "routed_scale": 2.5, "correction_bias": True},
        [*routed("gate.weight"), *shared("shared_experts", F)],
        "gate.e_score_correction_bias",
    ),
    "lfm2_moe": (
        "Lfm2MoeSparseMoeBlock",
        {
            "hidden_size": D,
            "moe_intermediate_size": F,
            "num_experts": E,
            "num_experts_per_tok": K,
            "use_expert_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
        },
        {**SIGMOID, **SILU, "routed_scale": 1.5, "correction_bias": True},
        routed("gate.weight"),
        "expert_bias",
    ),
}


def theirs_and_ours(family, dtype):
    name, settings, fields, pairs, bias = FAMILIES[family]
    package = importlib.import_module(f"transformers.models.{family}")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    (config_name,) = [n for n in dir(package) if n.endswith("Config") and "Text" not in n]
    config = getattr(package, config_name)(**settings)
    config._experts_implementation = "eager"
    theirs = getattr(module, name)(config).to(dtype)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    ours = Moe(Moe.Config(d_model=D, capacity_factor=None, **fields)).to(dtype)
    if bias is not None:
        nn.init.normal_(theirs.get_buffer(bias), std=0.3)
        ours.routed.correction_bias.copy_(theirs.get_buffer(bias))
    return theirs, ours, pairs


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 2e-6)])
def test_outputs_and_gradients_equal_the_mixture_of(family, dtype, most):
    theirs, ours, pairs = theirs_and_ours(family, dtype)
    x = torch.randn(3, 21, D, generator=torch.Generator().manual_seed(1), dtype=dtype)
    output, gradients = relative_errors(ours, theirs, pairs, x)
    # Their routers compute in float32 whatever the model's dtype is, LFM2's adds 1e-6 to the sum of gates.
    assert output <= most
    assert gradients <= 5 * most
