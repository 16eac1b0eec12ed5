"""Gated DeltaNet and Kimi delta attention against transformers' classes, and in float64 against their equations."""

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F

from hybridnas.blocks.gated_deltanet import GatedDeltaNet
from hybridnas.blocks.kimi_delta import KimiDelta
from tests.oracles import randomize, relative_errors

D, KEY_HEADS, VALUE_HEADS, K, V = 24, 2, 4, 6, 5
LENGTH = 70  # more than the chunk of 64 of either side


def x_BLD(length=LENGTH, dtype=torch.float32):
    return torch.randn(2, length, D, generator=torch.Generator().manual_seed(1), dtype=dtype)


def their_module(model, name, **fields):
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    configuration = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    kind = name.removesuffix("GatedDeltaNet").removesuffix("DeltaAttention").removesuffix("LinearAttention")
    kind = {"Qwen3_5": "Qwen3_5TextConfig"}.get(kind, f"{kind}Config")
    config = getattr(configuration, kind)(
        hidden_size=D, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], **fields
    )
    torch.manual_seed(0)
    module = getattr(modeling, name)(config, 0).eval()
    with torch.no_grad():  # some parameters are left empty until a whole model draws them
        for parameter in module.parameters():
            parameter.normal_(std=parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.5)
    return module


def rows(*widths):
    """Return slices of these widths after each other."""
    ends = torch.tensor([0, *widths]).cumsum(0).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def by_token(block, x):
    state, outputs = block.init_state(x.shape[0], device=x.device, dtype=x.dtype), []
    for piece in x.split(1, dim=1):
        y, state, _ = block(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1)


def assert_near(ours, theirs, pairs):
    """Compare outputs and all gradients, the whole sequence and token by token; both sides round in float32."""
    for name, run in {"whole": None, "by token": by_token}.items():
        output, gradient = relative_errors(ours, theirs, pairs, x_BLD(), run_ours=run)
        assert output < 1e-5, name
        assert gradient < 5e-5, name


GATED = {
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": VALUE_HEADS,
    "linear_key_head_dim": K,
    "linear_value_head_dim": V,
}

KIMI = {"linear_num_heads": VALUE_HEADS, "linear_head_dim": K}


def gated_deltanet(**fields):
    sizes = {"n_heads": KEY_HEADS, "n_value_heads": VALUE_HEADS, "head_dim": K, "value_head_dim": V}
    return GatedDeltaNet(GatedDeltaNet.Config(d_model=D, **sizes, **fields)).eval()


def same(*names):
    return [(name, None, name, None) for name in names]


def test_gated_deltanet_equals_qwen3_next():
    theirs = their_module("qwen3_next", "Qwen3NextGatedDeltaNet", **GATED)
    share = VALUE_HEADS // KEY_HEADS
    per_head = rows(K, K, share * V, share * V)

    def part(index):
        return lambda w: w.view(KEY_HEADS, -1, D)[:, per_head[index]].reshape(-1, D)

    def half(index):
        return lambda w: w.view(KEY_HEADS, 2, share, D)[:, index].reshape(-1, D)

    q, k, v, z, a, b = rows(*[KEY_HEADS * K] * 2, *[VALUE_HEADS * V] * 2, *[VALUE_HEADS] * 2)
    pairs = [("in_proj.weight", own, "in_proj_qkvz.weight", part(i)) for i, own in enumerate((q, k, v, z))]
    pairs += [("in_proj.weight", a, "in_proj_ba.weight", half(1)), ("in_proj.weight", b, "in_proj_ba.weight", half(0))]
    pairs += same("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    assert_near(gated_deltanet(norm_eps=theirs.layer_norm_epsilon), theirs, pairs)


def test_gated_deltanet_equals_qwen3_5():
    theirs = their_module("qwen3_5", "Qwen3_5GatedDeltaNet", **GATED)
    qkv, z, a, b = rows(2 * KEY_HEADS * K + VALUE_HEADS * V, VALUE_HEADS * V, *[VALUE_HEADS] * 2)
    names = {"qkv": qkv, "z": z, "a": a, "b": b}
    pairs = [("in_proj.weight", own, f"in_proj_{name}.weight", None) for name, own in names.items()]
    pairs += same("conv1d.weight", "A_log", "dt_bias", "norm.weight", "out_proj.weight")
    assert_near(gated_deltanet(norm_eps=theirs.layer_norm_epsilon), theirs, pairs)


@pytest.mark.parametrize("negative", [False, True])
def test_gated_deltanet_equals_olmo_hybrid(negative):
    theirs = their_module("olmo_hybrid", "OlmoHybridGatedDeltaNet", **GATED, linear_allow_neg_eigval=negative)
    parts = rows(*[KEY_HEADS * K] * 2, *[VALUE_HEADS * V] * 2, *[VALUE_HEADS] * 2)
    pairs = [("in_proj.weight", own, f"{name}_proj.weight", None) for name, own in zip("qkvgab", parts, strict=True)]
    pairs += [("norm.weight", None, "o_norm.weight", None), ("out_proj.weight", None, "o_proj.weight", None)]
    pairs += same("conv1d.weight", "A_log", "dt_bias")
    assert_near(gated_deltanet(negative_eigenvalues=negative, norm_eps=1e-5), theirs, pairs)


@pytest.mark.parametrize(
    ("model", "name", "fields", "options"),
    [
        ("kimi_linear", "KimiLinearDeltaAttention", KIMI, {}),
        (
            "glm5_next",
            "Glm5NextTextLinearAttention",
            {**KIMI, "linear_lower_bound": -5.0},
            {"gate_lower_bound": -5.0},
        ),
        (
            "bailing_hybrid",
            "BailingHybridDeltaAttention",
            {"num_attention_heads": VALUE_HEADS, "head_dim": K, "kda_safe_gate": False},
            {"decay_rank": 0, "gate_rank": 0},
        ),
    ],
)
def test_kimi_delta_equals_transformers(model, name, fields, options):
    theirs = their_module(model, name, **fields)
    wide = VALUE_HEADS * K
    full = options.get("decay_rank") == 0
    options = options if full else {"decay_rank": K, "gate_rank": K, **options}
    sizes = {"n_heads": VALUE_HEADS, "head_dim": K, "norm_eps": theirs.o_norm.variance_epsilon}
    ours = KimiDelta(KimiDelta.Config(d_model=D, **sizes, **options)).eval()
    gate, decay = ("g_proj", "forget_gate.f_proj") if full else ("g_a_proj", "forget_gate.f_a_proj")
    q, k, v, g, f, b = rows(wide, wide, wide, wide if full else K, wide if full else K, VALUE_HEADS)
    their_rows = {"q_proj": q, "k_proj": k, "v_proj": v, gate: g, decay: f, "b_proj": b}
    pairs = [("in_proj.weight", own, f"{name}.weight", None) for name, own in their_rows.items()]
    if not full:
        pairs += [("gate_proj.weight", None, "g_b_proj.weight", None)]
        pairs += [("decay_proj.weight", None, "forget_gate.f_b_proj.weight", None)]
    pairs += [("A_log", None, "forget_gate.A_log", torch.flatten), ("dt_bias", None, "forget_gate.dt_bias", None)]
    pairs += [("norm.weight", None, "o_norm.weight", None), ("out_proj.weight", None, "o_proj.weight", None)]
    pairs += same("conv1d.weight")
    assert_near(ours, theirs, pairs)


def convolved(u_BLC, taps_CK):
    """Return SiLU of a causal depthwise convolution."""
    late = F.pad(u_BLC, (0, 0, taps_CK.shape[1] - 1, 0))
    length = u_BLC.shape[1]
    return F.silu(sum(late[:, t : t + length] * taps_CK[:, t] for t in range(taps_CK.shape[1])))


def delta_rule(q, k, v, g, beta):
    """Return o (B, L, H, V) by the papers' equations, step by step; g broadcasts over (B, L, H, K)."""
    S, outputs = v.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        S = g[:, t].exp()[..., None] * S
        read = torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * (v[:, t] - read))
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]) / q.shape[3] ** 0.5)
    return torch.stack(outputs, 1)


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def normed(o, weight, eps=1e-5):
    return weight * o / (o.square().mean(-1, keepdim=True) + eps).sqrt()


def by_equations(block, x):
    """Return the output of a G or K block in float64, written from the papers."""
    w = dict(block.named_parameters())
    config = block.config
    gated = isinstance(block, GatedDeltaNet)
    key_heads, heads, key, value = config.heads, block.shape.value_heads, config.key_dim, config.value_dim
    sizes = [key_heads * key, key_heads * key, heads * value]
    inside = [heads * value, heads] if gated else [block.shape.gate_rank, config.rank]
    parts = (x @ w["in_proj.weight"].T).split([*sizes, *inside, heads], -1)
    qkv = convolved(torch.cat(parts[:3], -1), w["conv1d.weight"][:, 0])
    q, k, v = (
        part.unflatten(-1, (-1, width)) for part, width in zip(qkv.split(sizes, -1), (key, key, value), strict=True)
    )
    q, k = (part.repeat_interleave(heads // key_heads, 2) for part in (unit(q), unit(k)))
    beta = parts[5].sigmoid() * (2 if config.negative_eigenvalues else 1)
    if gated:
        gate = F.silu(parts[3])
        g = (-w["A_log"].exp() * F.softplus(parts[4] + w["dt_bias"]))[..., None]
    else:
        gate = (parts[3] @ w["gate_proj.weight"].T).sigmoid()
        raw = (parts[4] @ w["decay_proj.weight"].T + w["dt_bias"]).unflatten(-1, (heads, key))
        g = -w["A_log"].exp()[:, None] * F.softplus(raw)
    o = normed(delta_rule(q, k, v, g, beta), w["norm.weight"])
    return (o.flatten(-2) * gate) @ w["out_proj.weight"].T


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("kind", [GatedDeltaNet, KimiDelta])
def test_in_float64_a_block_equals_the_papers_equations(kind, negative):
    sizes = {"n_heads": 2, "head_dim": 6, "value_head_dim": 5, "negative_eigenvalues": negative}
    torch.manual_seed(0)
    ours, theirs = (kind(kind.Config(d_model=D, **sizes)).double().eval() for _ in range(2))
    randomize(theirs, std=0.1)
    pairs = same(*dict(theirs.named_parameters()))
    for run in (None, by_token):
        errors = relative_errors(ours, theirs, pairs, x_BLD(dtype=torch.float64), run_ours=run, run_theirs=by_equations)
        assert max(errors) < 1e-11
