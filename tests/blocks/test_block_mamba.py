"""The Mamba block against transformers' MambaMixer with the same weights, and the paper's initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F

from hybridnas.blocks.mamba import Mamba


def hugging_face_mixer(d_model, **fields):
    hugging = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    config = hugging.MambaConfig(hidden_size=d_model, num_hidden_layers=1, use_mambapy=False, **fields)
    torch.manual_seed(0)
    return hugging.MambaMixer(config, layer_idx=0).eval()


@pytest.mark.parametrize("use_bias", [False, True])
def test_mamba_equals_transformers_whole_and_token_by_token(use_bias):
    theirs = hugging_face_mixer(24, state_size=16, conv_kernel=4, expand=2, use_bias=use_bias)
    ours = Mamba(Mamba.Config(d_model=24, bias=use_bias)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 19, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x).y_BLD, expected, rtol=1e-5, atol=1e-5)
        state, outputs = ours.init_state(2, device=x.device, dtype=x.dtype), []
        for t in range(19):
            y, state, _ = ours(x[:, t : t + 1], state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-5, atol=1e-5)


def test_constant_parameters_make_the_block_linear_and_time_invariant_before_the_gate():
    torch.manual_seed(0)
    block = Mamba(Mamba.Config(d_model=8, selective="none")).eval()
    assert {"B", "C", "dt_proj.bias"} <= dict(block.named_parameters()).keys()
    assert not {"x_proj.weight", "dt_proj.weight"} & dict(block.named_parameters()).keys()
    u = torch.randn(1, 12, 16)
    gate = torch.ones_like(u)
    with torch.no_grad():
        once, _ = block._scan(u, gate, None, None)
        doubled, _ = block._scan(2 * u, gate, None, None)
        late, _ = block._scan(F.pad(u, (0, 0, 3, 0)), F.pad(gate, (0, 0, 3, 0), value=1.0), None, None)
    torch.testing.assert_close(doubled, 2 * once, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(late[:, 3:], once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [19, 1, 5])
def test_the_unselective_block_is_the_papers_linear_time_invariant_recurrence(chunk):
    torch.manual_seed(0)
    block = Mamba(Mamba.Config(d_model=8, d_state=3, selective=False)).eval()
    x = torch.randn(2, 19, 8)
    w = {name: value.detach().double() for name, value in block.named_parameters()}
    u, z = (x.double() @ w["in_proj.weight"].T).chunk(2, dim=-1)
    taps = w["conv1d.weight"][:, 0]
    late = F.pad(u, (0, 0, 3, 0))
    u = F.silu(sum(late[:, k : k + 19] * taps[:, k] for k in range(4)) + w["conv1d.bias"])
    step = F.softplus(w["dt_proj.bias"])[:, None]
    decay, gain = torch.exp(-step * w["A_log"].exp()), step * w["B"]
    lags = torch.arange(19.0, dtype=torch.float64)
    kernel = (decay[None] ** lags[:, None, None] * gain * w["C"]).sum(-1)  # the convolution that an LTI system is
    y = torch.stack([(kernel[: t + 1].flip(0) * u[:, : t + 1]).sum(1) for t in range(19)], dim=1) + w["D"] * u
    expected = (y * F.silu(z)) @ w["out_proj.weight"].T
    state, parts = block.init_state(2, device=x.device, dtype=x.dtype), []
    with torch.no_grad():
        for piece in x.split(chunk, dim=1):
            out, state, _ = block(piece, state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, dim=1).double(), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(block(x).y_BLD.double(), expected, rtol=1e-4, atol=1e-6)


def test_selective_is_also_yes_or_no():
    from hybridnas.arch.arch import Arch

    fields = {"d_model": 16, "vocab_size": 8}
    written = Arch.from_pattern("M{selective=false}x2", **fields)
    assert written.fingerprint() == Arch.from_pattern("M{selective=none}x2", **fields).fingerprint()
    assert written.fingerprint() == Arch.from_pattern("Mx2", selective=False, **fields).fingerprint()
    assert Mamba.Config(d_model=16, selective=True).canonical() == Mamba.Config(d_model=16).canonical()


@pytest.mark.parametrize(
    ("selective", "saved"),
    [
        ("dt+B+C", 0),
        ("dt+B", 1024 * 16 - 16),
        ("B+C", 1024 * 32 + 32 * 1024),  # neither x_proj's part nor dt_proj's weight; its bias stays
        ("none", 1024 * (32 + 32) + 32 * 1024 - 32),
    ],
)
def test_what_is_constant_costs_no_projection(selective, saved):
    assert Mamba.Config(d_model=512, selective=selective).cost(1).params == 1_694_720 - saved


def test_flops_and_state_of_the_papers_block_worked_out_by_hand():
    cost = Mamba.Config(d_model=512).cost(1024)
    matrices = 2 * 512 * 1024 + 1024 * (32 + 16 + 16) + 32 * 1024 + 1024 * 512
    scan = 1024 * 16 * 7 + 1024 * 7  # see scan_flops
    assert cost.flops_per_token == 2 * matrices + 2 * 4 * 1024 + scan
    assert cost.state_bytes == 3 * 1024 * 4 + 1024 * 16 * 4
    assert Mamba.Config(d_model=512).cost(1024, dtype_bytes=2).state_bytes == 3 * 1024 * 2 + 1024 * 16 * 4


def test_spelling_order_of_parts_does_not_matter():
    one = Mamba.Config(d_model=16, selective="C+dt+B", inner_moe="out+conv")
    other = Mamba.Config(d_model=16, inner_moe="conv+out", expand=2.0, d_inner=32)
    assert one.canonical() == other.canonical()
    assert Mamba.Config(d_model=16, inner_experts=3).canonical() == Mamba.Config(d_model=16).canonical()


def test_ratio_ablation_widths_scale_with_expand():
    widths = [Mamba.Config(d_model=512, expand=2 * k / 3).width for k in range(1, 6)]
    assert widths == [341, 683, 1024, 1365, 1707]


def test_initial_weights_are_the_authors():
    torch.manual_seed(0)
    block = Mamba(Mamba.Config(d_model=256))
    steps = F.softplus(block.dt_proj.bias)
    assert 1e-3 * 0.999 <= steps.min() < 1.2e-3
    assert 0.09 < steps.max() <= 1e-1 * 1.001
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=0.15)  # log-uniform
    torch.testing.assert_close(block.A_log.exp()[7], torch.arange(1.0, 17.0))
    assert torch.equal(block.D, torch.ones(512))
    assert block.dt_proj.weight.abs().max().item() == pytest.approx(16**-0.5, rel=0.01)
    assert block.in_proj.weight.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)
    assert block.out_proj.weight.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)


def test_inner_experts_default_to_the_size_of_the_projection_they_replace():
    assert Mamba.Config(d_model=512, inner_moe="gate").inner_shape("gate").d_expert == round(512 * 1024 / 1536)
    config = Mamba.Config(d_model=512, inner_moe="conv+gate+out", inner_experts=16, inner_d_expert=352)
    assert config.inner_shape("out").cost().active_params == 352 * (1024 + 512) + 1024 * 16


def test_inner_experts_report_mean_losses_and_prefixed_statistics():
    torch.manual_seed(0)
    block = Mamba(Mamba.Config(d_model=16, inner_moe="conv+out", inner_experts=4)).train()
    alone = []
    for routed in block.inner.values():
        routed.register_forward_hook(lambda _, __, output: alone.append(output[1].losses["load_balance"]))
    aux = block(torch.randn(2, 8, 16)).aux
    assert len(alone) == 2
    assert alone[0] != alone[1]
    assert aux.losses["load_balance"].item() == pytest.approx(sum(alone).item() / 2)
    assert set(aux.losses) == {"load_balance"}
    assert {"conv.load_E", "conv.dropped", "out.router_entropy"} <= set(aux.stats)
