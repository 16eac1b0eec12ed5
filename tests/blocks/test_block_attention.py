"""Attention: against transformers' Llama with the same weights, what its options refuse, cost and decode."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridnas.arch.arch import Arch
from hybridnas.blocks.attention import Attention
from hybridnas.errors import ConfigError
from hybridnas.layers.norms import RMSNorm
from hybridnas.layers.rotary import rotation


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
    cos_Lh, sin_Lh = rotation(5, 2, 8, 100.0, torch.device("cpu"))
    for i in range(4):
        angle = 6 * 100.0 ** (-i / 4)
        assert cos_Lh[1, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert sin_Lh[1, i].item() == pytest.approx(math.sin(angle), abs=1e-6)


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


LATENT = {"n_heads": 4, "head_dim": 6, "kv_rank": 5, "rope_dim": 4}


@pytest.mark.parametrize(
    ("fields", "field", "got", "other"),
    [
        ({"window": 0}, "window", 0, ">= 1"),
        ({"gate": "tanh"}, "gate", "tanh", "head"),
        ({"qk_norm": "layer"}, "qk_norm", "layer", "head"),
        ({"scale": 0.0}, "scale", 0.0, "> 0"),
        ({"softcap": -1.0}, "softcap", -1.0, "> 0"),
        ({"head_dim": 6, "rotary_fraction": 0.5}, "rotary_fraction", 0.5, "head_dim=6"),
        ({"head_dim": 8, "rotary_fraction": 0.1}, "rotary_fraction", 0.1, "head_dim=8"),
        ({"rotary_fraction": 1.5}, "rotary_fraction", 1.5, "<= 1"),
        ({"q_rank": 4}, "q_rank", 4, "kv_rank"),
        ({"rope_dim": 4}, "rope_dim", 4, "kv_rank"),
        ({"v_head_dim": 4}, "v_head_dim", 4, "kv_rank"),
        ({**LATENT, "window": 8}, "window", 8, "kv_rank"),
        ({**LATENT, "n_kv_heads": 2}, "n_kv_heads", 2, "kv_rank"),
        ({**LATENT, "qk_norm": "head"}, "qk_norm", "head", "kv_rank"),
        ({**LATENT, "rotary_fraction": 0.5}, "rotary_fraction", 0.5, "kv_rank"),
        ({**LATENT, "rope_dim": 3}, "rope_dim", 3, "positions"),
        ({**LATENT, "rope_dim": 0}, "rope_dim", 0, "positions"),
    ],
)
def test_options_that_cannot_be_are_refused_naming_both_fields(fields, field, got, other):
    with pytest.raises(ConfigError) as caught:
        Attention.Config(d_model=16, **fields)
    assert (caught.value.field, caught.value.got) == (field, got)
    assert other in str(caught.value)
    assert "\n" not in str(caught.value)


def fingerprint(pattern):
    return Arch.from_pattern(pattern, d_model=32, vocab_size=64).fingerprint()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("S", "A{window=128}"),
        ("S{window=7,gate=head}", "A{gate=head,window=7}"),
        ("[S,F]M", "[A{window=128},F]M"),
        ("A", "A{rotary_fraction=1,gate=none,norm_eps=0.1,qk_norm_zero_centered=true,qkv_bias=false}"),
        ("A{positions=none}", "A{positions=none,rotary_fraction=0.5}"),
        ("A{head_dim=16}", "A{head_dim=16,scale=0.25}"),
        ("A{kv_rank=8,head_dim=16,n_heads=2}", "A{kv_rank=8,head_dim=16,n_heads=2,rope_dim=8,v_head_dim=16}"),
        ("A{bias=true}", "A{qkv_bias=true,out_bias=true}"),
        ("A{bias=true,out_bias=false}", "A{qkv_bias=true}"),
        ("A{head_dim=10,rotary_fraction=0.4}", "A{head_dim=10,rotary_fraction=0.45}"),
    ],
)
def test_two_spellings_of_one_attention_have_one_fingerprint(one, other):
    assert fingerprint(one) == fingerprint(other)


def test_every_option_that_changes_the_function_changes_the_fingerprint():
    options = [
        "window=8", "gate=head", "gate=elementwise", "qk_norm=head", "qk_norm=all", "qk_norm=head,norm_eps=1e-5",
        "qk_norm=head,qk_norm_zero_centered=true", "scale=1.0", "softcap=30", "sink=true", "qkv_bias=true",
        "out_bias=true", "rotary_fraction=0.5", "kv_rank=8", "kv_rank=8,q_rank=8", "kv_rank=8,rope_dim=2",
        "kv_rank=8,v_head_dim=2", "kv_rank=8,norm_eps=1e-5",
    ]  # fmt: skip
    assert len({fingerprint("A"), *(fingerprint(f"A{{{option}}}") for option in options)}) == len(options) + 1


def test_a_window_and_a_latent_bound_the_state():
    def numbers(length, **fields):
        return Attention.Config(d_model=64, n_heads=4, **fields).cost(length, dtype_bytes=1).state_bytes

    assert [numbers(n) for n in (10, 1000)] == [1280, 128_000]
    assert [numbers(n, window=100) for n in (10, 100, 1000)] == [1280, 12_800, 12_800]
    assert numbers(1000, kv_rank=24, rope_dim=8) == 32_000


@pytest.mark.parametrize("variant", Attention.test_configs(), ids=lambda variant: str(variant.fields))
def test_one_token_after_another_is_the_sequence_through_growth_and_around_the_ring(variant):
    torch.manual_seed(0)
    fields = {**variant.fields, **({"window": 70} if "window" in variant.fields else {})}
    block, norm = Attention(Attention.Config(d_model=16, **fields)).eval(), RMSNorm(16)
    x_BLD = torch.randn(2, 170, 16)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
        whole = x_BLD + block(norm(x_BLD)).y_BLD
        for read in (0, 3, 100):
            state = block(norm(x_BLD[:, :read]), block.init_state(2, device=x_BLD.device, dtype=x_BLD.dtype)).state
            step = block.one_token(norm, state)
            got = torch.stack([step(x_BLD[:, t].clone()) for t in range(read, 170)], dim=1)
            torch.testing.assert_close(got, whole[:, read:], rtol=1e-4, atol=1e-4)


def test_a_few_queries_over_many_latents_read_them_unexpanded():
    block = Attention(Attention.Config(d_model=16, n_heads=2, head_dim=8, kv_rank=6)).eval()
    x_BLD = torch.randn(1, 60, 16)
    state = block.init_state(1, device=x_BLD.device, dtype=x_BLD.dtype)
    with torch.no_grad():
        _, state, _ = block(x_BLD[:, :50], state)
        with FlopCounterMode(display=False) as counter:
            block(x_BLD[:, 50:51], state)
    expanded = 2 * 51 * 6 * 2 * (8 + 8)
    assert counter.get_total_flops() < expanded


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"window": 4}, {"softcap": 2.0, "sink": True}, LATENT, {"gate": "head"}], ids=str)
def test_an_exported_attention_takes_other_lengths(fields):
    block = Attention(Attention.Config(d_model=16, **fields)).eval()
    lengths = {"x_BLD": {1: torch.export.Dim("L", min=8, max=256)}}
    program = torch.export.export(block, (torch.randn(1, 16, 16),), dynamic_shapes=lengths).module()
    for length in (8, 77):
        x_BLD = torch.randn(1, length, 16)
        torch.testing.assert_close(program(x_BLD).y_BLD, block(x_BLD).y_BLD)


@pytest.mark.parametrize(
    ("fields", "params"),
    [  # DeepSeek-V3 and Qwen3-Next, a layer's attention as transformers counts it
        ({"d_model": 7168, "n_heads": 128, "head_dim": 128, "kv_rank": 512, "q_rank": 1536}, 187_107_328),
        (
            {
                "d_model": 2048,
                "n_heads": 16,
                "n_kv_heads": 2,
                "head_dim": 256,
                "gate": "elementwise",
                "qk_norm": "head",
            },
            27_263_488,
        ),
    ],
)
def test_released_layers_have_their_published_sizes(fields, params):
    assert Attention.Config(**fields).cost(1024).params == params
