"""Attention against transformers' Llama with the same weights, and rotary positions against their definition."""

import math

import pytest
import torch

from hybridnas.blocks.attention import Attention


@pytest.mark.parametrize(("kv_heads", "base"), [(4, 10000.0), (2, 500.0), (1, 10000.0)])
def test_attention_equals_llama_of_transformers(kv_heads, base):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    settings = llama.LlamaConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        attn_implementation="eager",
    )
    theirs = llama.LlamaAttention(settings, layer_idx=0).eval()
    ours = Attention(Attention.Config(d_model=32, n_heads=4, n_kv_heads=kv_heads, rope_base=base)).eval()
    x = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(0))
    position = torch.arange(13)[None]
    mask = torch.full((13, 13), -torch.inf).triu(1)[None, None]
    with torch.no_grad():
        for linear in (theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.o_proj):
            linear.weight.normal_(std=32**-0.5, generator=torch.Generator().manual_seed(linear.weight.numel()))
        ours.qkv_proj.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.out_proj.weight.copy_(theirs.o_proj.weight)
        rotary = llama.LlamaRotaryEmbedding(settings)
        expected, _ = theirs(x, position_embeddings=rotary(x, position), attention_mask=mask)
        torch.testing.assert_close(ours(x).y_BLD, expected, rtol=1e-5, atol=1e-5)


def test_rotation_turns_pair_i_by_position_times_its_frequency():
    block = Attention(Attention.Config(d_model=8, n_heads=1, rope_base=100.0))
    cos_LP, sin_LP = block._rotation(5, 2, torch.device("cpu"))
    for i in range(4):
        angle = 6 * 100.0 ** (-i / 4)
        assert cos_LP[1, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin_LP[1, i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_without_positions_the_order_of_earlier_tokens_does_not_matter():
    torch.manual_seed(0)
    x = torch.randn(1, 6, 16)
    shuffled = x[:, [2, 0, 1, 4, 3, 5]]
    for positions, same in (("none", True), ("rope", False)):
        block = Attention(Attention.Config(d_model=16, n_heads=2, positions=positions)).eval()
        with torch.no_grad():
            block.qkv_proj.weight.normal_()
            block.out_proj.weight.normal_()
            last, other = block(x).y_BLD[:, -1], block(shuffled).y_BLD[:, -1]
        assert torch.allclose(last, other, rtol=1e-4, atol=1e-4) is same


def test_initial_weights_have_the_papers_spread():
    torch.manual_seed(0)
    block = Attention(Attention.Config(d_model=512, bias=True))
    for weight in (block.qkv_proj.weight, block.out_proj.weight):
        assert weight.std().item() == pytest.approx(math.sqrt(0.1 / 512), rel=0.02)
    assert not block.qkv_proj.bias.any()
