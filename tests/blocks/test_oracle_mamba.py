"""Mamba and Mamba-2 against the mixers of transformers' hybrids: outputs, and gradients of input and every weight."""

import importlib

import pytest
import torch
from oracles import relative_errors
from torch import nn

from hybridnas.blocks.mamba import Mamba
from hybridnas.blocks.mamba2 import Mamba2

pytest.importorskip("transformers")
D = 16
HEADS = {"d_inner": 32, "head_dim": 4, "d_state": 8}  # 8 heads

# family -> mixer, settings of its config, our class, our fields
FAMILIES = {
    "jamba": (
        "JambaMambaMixer",
        {"mamba_d_state": 8, "mamba_dt_rank": 5, "mamba_expand": 2, "rms_norm_eps": 1e-6},
        Mamba,
        {"d_state": 8, "dt_rank": 5, "selective_norm": "scaled"},
    ),
    "falcon_mamba": (
        "FalconMambaMixer",
        {"state_size": 8, "time_step_rank": 5, "expand": 2, "mixer_rms_eps": 1e-6},
        Mamba,
        {"d_state": 8, "dt_rank": 5, "selective_norm": "unscaled"},
    ),
    "mamba2": (
        "Mamba2Mixer",
        {"state_size": 8, "num_heads": 8, "head_dim": 4, "n_groups": 1, "expand": 2},
        Mamba2,
        HEADS,
    ),
    "nemotron_h": (
        "NemotronHMamba2Mixer",
        # its class raises steps to time_step_min in a whole sequence, and not token by token: 0 is the papers' function
        {"ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 4, "n_groups": 8, "time_step_min": 0.0},
        Mamba2,
        {**HEADS, "n_groups": 8},
    ),
    "bamba": (
        "BambaMixer",
        {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 4, "mamba_n_groups": 1},
        Mamba2,
        HEADS,
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridMambaLayer",
        {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 4, "mamba_n_groups": 1, "rms_norm_eps": 1e-3},
        Mamba2,
        {**HEADS, "norm_eps": 1e-3},
    ),
    "falcon_h1": (
        "FalconH1Mixer",
        {
            "mamba_d_state": 8,
            "mamba_n_heads": 8,
            "mamba_d_head": 4,
            "mamba_n_groups": 2,
            "mamba_d_ssm": 32,
            "mamba_rms_norm": False,
        },
        Mamba2,
        {**HEADS, "n_groups": 2, "gated_norm": False},
    ),
}


def theirs_and_ours(family, dtype):
    name, settings, cls, fields = FAMILIES[family]
    package = importlib.import_module(f"transformers.models.{family}")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    (config_name,) = [n for n in dir(package) if n.endswith("Config")]
    config = getattr(package, config_name)(hidden_size=D, chunk_size=8, mamba_chunk_size=8, **settings)
    torch.manual_seed(0)
    unset = {"initialize_mixer_weights": False} if family == "falcon_mamba" else {}  # fails before its norms exist
    theirs = getattr(module, name)(config, layer_idx=0, **unset)
    ours = cls(cls.Config(d_model=D, **fields)).to(dtype)
    own = {n: p.detach().clone() for n, p in ours.named_parameters()}
    with torch.no_grad():  # decays and steps as ours are drawn, all else of order one, norms too
        for n, p in theirs.named_parameters():
            if n in ("A_log", "D", "dt_bias", "dt_proj.bias"):
                p.copy_(own[n])
            else:
                nn.init.normal_(p, mean=1.0 if "norm" in n else 0.0, std=0.3)
    if family == "falcon_h1":
        theirs.mup_vector = torch.ones(())  # the five multipliers that its decoder layer sets
    return theirs.to(dtype), ours


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.float64, 2e-6)])
def test_outputs_and_gradients_equal_the_mixer_of(family, dtype, most):
    theirs, ours = theirs_and_ours(family, dtype)
    pairs = [(name, None, name, None) for name, _ in ours.named_parameters()]
    assert len(pairs) == len(list(theirs.parameters()))
    x = torch.randn(2, 21, D, generator=torch.Generator().manual_seed(1), dtype=dtype)
    output, gradients = relative_errors(ours, theirs, pairs, x)
    assert output <= most  # parts of their mixers compute in float32 whatever the model's dtype is
    assert gradients <= 5 * most
