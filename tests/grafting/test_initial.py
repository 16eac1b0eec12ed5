"""Starts of new blocks: the same function to float64 where it can be, and the old block's weights where they belong."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hybridnas.errors import ConfigError
from hybridnas.grafting.config import STARTS as NAMES
from hybridnas.grafting.initial import STARTS, difference, silence, start, starts_for
from hybridnas.registry import BLOCKS

D = 16
VARIANTS = [(letter, variant.fields) for letter in BLOCKS for variant in BLOCKS.get(letter).test_configs()]


def block(letter, seed=0, **fields):
    torch.manual_seed(seed)
    cls = BLOCKS.get(letter)
    return cls(cls.Config(d_model=D, **fields)).double()


def moved(found, seed=5):
    """Weights as after training: nothing is zero or one any more."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


def test_the_settings_know_every_start():
    assert set(NAMES) == set(STARTS)


@pytest.mark.parametrize(("letter", "fields"), VARIANTS, ids=str)
@torch.no_grad()
def test_a_silent_block_adds_nothing(letter, fields):
    found = moved(block(letter, **fields))
    assert silence(found)
    x_BLD = torch.randn(2, 9, D, dtype=torch.float64)
    handed_on_BLD = x_BLD if fields.get("skip") else 0 * x_BLD  # to the next block of its branch
    assert torch.equal(found.eval()(x_BLD).y_BLD.abs(), handed_on_BLD.abs())


@pytest.mark.parametrize(("letter", "fields"), VARIANTS, ids=str)
def test_a_block_is_copied_to_the_bit(letter, fields):
    old, new = moved(block(letter, **fields)), block(letter, 1, **fields)
    assert start("copy", old, new) == ""
    assert difference(old, new) == 0


WIDER = [  # letter, settings before, settings after
    ("F", {"d_ff": 24}, {"d_ff": 40}),
    ("F", {"d_ff": 24, "gated": True, "activation": "silu", "bias": False}, {"d_ff": 40}),
    ("E", {"d_expert": 12, "n_experts": 4}, {"d_expert": 20}),
    ("E", {"d_expert": 12, "n_experts": 4, "gated": True, "bias": True}, {"d_expert": 20}),
    ("E", {"d_expert": 12, "n_experts": 4, "d_shared": 8}, {"d_shared": 16}),
    ("E", {"d_expert": 12, "n_experts": 4}, {"n_experts": 8}),
    ("E", {"d_expert": 12, "n_experts": 4}, {"n_experts": 12, "d_expert": 16}),
    ("E", {"n_experts": 4, "router": "top_k", "top_k": 2}, {"n_experts": 8, "top_k": 4}),
    ("E", {"n_experts": 4, "router": "top_k", "top_k": 2, "renormalize": True}, {"n_experts": 8, "top_k": 4}),
    ("E", {"n_experts": 4, "router": "top_k", "top_k": 2, "scores": "sigmoid"}, {"n_experts": 8, "top_k": 4}),
    ("A", {"n_heads": 2, "head_dim": 8}, {"n_heads": 4}),
    ("A", {"n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "bias": True}, {"n_heads": 8, "n_kv_heads": 4}),
    ("A", {"n_heads": 2, "head_dim": 8, "gate": "elementwise", "qk_norm": "head"}, {"n_heads": 3}),
    ("M", {"d_state": 4}, {"d_state": 16}),
    ("M", {"d_state": 4, "expand": 2.0}, {"expand": 3.0}),
    ("M", {"dt_rank": 2}, {"dt_rank": 5}),
    ("N", {"d_state": 8, "head_dim": 8}, {"d_state": 32}),
    ("N", {"d_state": 8, "head_dim": 4, "n_groups": 2}, {"d_state": 12}),
    ("G", {"n_heads": 2, "head_dim": 4}, {"n_heads": 4}),
    ("K", {"n_heads": 2, "head_dim": 8, "decay_rank": 0, "gate_rank": 0}, {"n_heads": 3}),
    ("L", {"n_heads": 2, "value_head_dim": 8}, {"n_heads": 4}),
    ("L", {"kind": "retnet", "n_heads": 2, "value_head_dim": 8}, {"n_heads": 3}),
]


@pytest.mark.parametrize(("letter", "before", "after"), WIDER, ids=str)
def test_a_wider_block_computes_what_the_old_one_does(letter, before, after):
    old, new = moved(block(letter, **before)), block(letter, 1, **{**before, **after})
    assert start("copy", old, new) == ""
    assert difference(old, new) < 1e-12
    grown = [name for name, tensor in new.state_dict().items() if tensor.shape != old.state_dict()[name].shape]
    assert grown


def test_what_a_wider_block_has_more_can_learn():
    old = moved(block("F", d_ff=24))
    new = block("F", 1, d_ff=40)
    start("copy", old, new)
    new(torch.randn(2, 5, D, dtype=torch.float64)).y_BLD.square().sum().backward()
    assert new.ff.down_proj.weight.grad[:, 24:].abs().min() > 0


def test_a_narrower_mlp_keeps_the_channels_that_weigh_most():
    old, new = moved(block("F", d_ff=40)), block("F", 1, d_ff=24)
    with torch.no_grad():
        old.ff.up_proj.weight[3:19] *= 1e-9  # channels that do nothing
        old.ff.up_proj.bias[3:19] = 0
    assert start("copy", old, new) == ""
    assert difference(old, new) < 1e-6


def test_fewer_experts_are_means_of_those_that_are_routed_alike():
    old = moved(block("E", n_experts=4, d_expert=8))
    with torch.no_grad():
        for name, tensor in old.routed.state_dict().items():
            tensor[2:] = tensor[:2]  # two pairs of one expert each
            if name == "router.weight":
                tensor[2:] *= 1.5  # which of the two is clear
    new = block("E", 1, n_experts=2, d_expert=8)
    assert start("copy", old, new) == ""
    found = {tuple(row.tolist()) for row in new.routed.experts.up_proj.flatten(1).detach()}
    assert found == {tuple(row.tolist()) for row in old.routed.experts.up_proj[:2].flatten(1).detach()}


@torch.no_grad()
def test_queries_keys_and_values_of_attention_become_those_of_linear_attention():
    old = moved(block("A", n_heads=2, n_kv_heads=1))
    new = block("L", 1, n_heads=2)
    assert start("qkv", old, new) == ""
    x_LD = torch.randn(1, 11, D, dtype=torch.float64)
    q, k, v = old.qkv_proj(x_LD)[0].split([16, 8, 8], dim=-1)
    heads = []
    for head in range(2):  # equation 8 of 2006.16236, each query over the keys before it
        phi_q, phi_k = F.elu(q[:, 8 * head : 8 * head + 8]) + 1, F.elu(k) + 1
        scores = (phi_q @ phi_k.T).tril()
        heads.append(scores @ v / (scores.sum(-1, keepdim=True) + 1e-6))
    wanted = torch.cat(heads, dim=-1) @ old.out_proj.weight.T
    torch.testing.assert_close(new.eval()(x_LD).y_BLD[0], wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
@torch.no_grad()
def test_however_many_heads_there_are_they_write_what_attention_writes(heads):
    old = moved(block("A", n_heads=4))
    new = block("L", 1, n_heads=heads, value_head_dim=16)
    start("qkv", old, new)
    shape = new.shape
    v_VD = new.in_proj.weight[2 * shape.key_heads * shape.key_dim :][: shape.inner]
    v = old.qkv_proj.weight[2 * D :]
    torch.testing.assert_close(new.out_proj.weight @ v_VD, old.out_proj.weight @ v)


@pytest.mark.parametrize(
    ("letter", "fields"),
    [
        ("M", {}),
        ("N", {"d_state": 8, "head_dim": 8, "n_groups": 2}),
        ("N", {}),
        ("G", {"n_heads": 2}),
        ("K", {}),
        ("W", {}),
        ("W", {"head_dim": 4}),
        ("L", {"kind": "gla"}),
        ("L", {"kind": "deltanet", "n_heads": 2}),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_recurrence_takes_the_queries_keys_and_values(letter, fields):
    old, new = moved(block("A", n_heads=2)), block(letter, 1, **fields)
    drawn = copy.deepcopy(new.state_dict())
    assert start("qkv", old, new) == ""
    name = "key.weight" if letter == "W" else "in_proj.weight"
    assert not torch.equal(new.state_dict()[name], drawn[name])
    v = old.qkv_proj.weight[2 * D :]
    if letter == "W":
        torch.testing.assert_close(new.output.weight @ new.value.weight, old.out_proj.weight @ v)
    elif letter != "M":  # of one-to-one heads, the rows themselves; of others, what they write
        at = new.config.width if letter == "N" else 2 * new.shape.key_heads * new.shape.key_dim
        rows = new.in_proj.weight[at : at + new.out_proj.weight.shape[1]]
        torch.testing.assert_close(new.out_proj.weight @ rows, old.out_proj.weight @ v)
    assert torch.isfinite(new.eval()(torch.randn(1, 8, D, dtype=torch.float64)).y_BLD).all()


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 4},
        {"top_k": 4, "renormalize": True},
        {"top_k": 4, "scores": "sigmoid"},
        {"top_k": 4, "gated": True, "activation": "silu"},
        {"top_k": 4, "bias": True, "routed_scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("way", "hidden"), [("upcycle", 24), ("split", 6)])
def test_experts_that_all_take_part_are_the_mlp_that_they_are_made_of(fields, way, hidden):
    dense = {"d_ff": 24, "bias": fields.get("bias", False), "gated": fields.get("gated", False)}
    dense["activation"] = fields.get("activation", "relu")
    old = moved(block("F", **dense))
    new = block("E", 1, n_experts=4, router="top_k", d_expert=hidden, **fields)
    assert start(way, old, new, noise=0.0) == ""
    assert difference(old, new) < 1e-12


def test_noise_sets_copies_of_an_mlp_apart_but_the_first():
    old = moved(block("F", d_ff=24, bias=False))
    new = block("E", 1, n_experts=3, d_expert=24)
    start("upcycle", old, new, noise=0.1)
    up = new.routed.experts.up_proj
    assert torch.equal(up[0], old.ff.up_proj.weight.T)
    for one in (1, 2):
        far = (up[one] - up[0]).std() / up[0].std()
        assert 0.05 < far < 0.2


def test_an_mlp_becomes_the_shared_expert_beside_silent_ones():
    old = moved(block("F", d_ff=24, bias=False))
    new = block("E", 1, n_experts=4, d_expert=8, d_shared=24)
    assert start("upcycle", old, new) == ""
    assert difference(old, new) < 1e-12


def test_experts_that_are_alike_merge_into_the_mlp_that_each_is():
    fields = {"n_experts": 4, "d_expert": 12, "router": "top_k", "top_k": 2, "renormalize": True}
    old = moved(block("E", **fields))
    with torch.no_grad():
        for tensor in old.routed.experts.state_dict().values():
            tensor[1:] = tensor[0]
    for hidden in (12, 48):
        new = block("F", 1, d_ff=hidden, bias=False)
        assert start("merge", old, new) == ""
        assert difference(old, new) < 1e-12, hidden


@pytest.mark.parametrize(
    ("old", "new", "way"),
    [
        (("A", {}), ("F", {}), "qkv"),
        (("F", {}), ("A", {}), "qkv"),
        (("A", {"kv_rank": 4, "n_heads": 2}), ("G", {}), "qkv"),
        (("A", {}), ("M", {"expand": 1.0}), "qkv"),
        (("A", {}), ("R", {}), "qkv"),
        (("F", {"d_ff": 24}), ("E", {"d_expert": 20}), "upcycle"),
        (("F", {"d_ff": 24}), ("E", {"d_expert": 24, "activation": "gelu"}), "upcycle"),
        (("F", {"d_ff": 24}), ("E", {"d_expert": 24}), "split"),
        (("E", {"d_expert": 12}), ("F", {"d_ff": 13}), "merge"),
        (("C", {"d_inner": 16}), ("C", {"d_inner": 20}), "copy"),
        (("M", {}), ("N", {}), "copy"),
        (("E", {"n_experts": 4, "d_expert": 8}), ("E", {"n_experts": 2, "d_expert": 4}), "copy"),
    ],
    ids=str,
)
def test_a_start_that_does_not_apply_says_why_and_changes_nothing(old, new, way):
    old, new = block(old[0], **old[1]), block(new[0], 1, **new[1])
    before = copy.deepcopy(new.state_dict())
    assert start(way, old, new) != ""
    assert way not in starts_for(old, new)
    assert all(torch.equal(tensor, before[name]) for name, tensor in new.state_dict().items())


def test_settings_refuse_an_unknown_start():
    from hybridnas.grafting.config import GraftConfig

    for init in ("zeros", "qkv+", "+fit", "auto+fit"):
        with pytest.raises(ConfigError) as error:
            GraftConfig(init=init)
        assert (error.value.field, error.value.got) == ("init", init)
        assert "qkv" in error.value.allowed
