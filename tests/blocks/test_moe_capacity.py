"""What a capacity does in training: whom it drops, in which order, over which pass, and which FLOPs it executes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hybridnas.blocks.moe import Moe
from hybridnas.data import open_source, source_config
from hybridnas.kernels.moe_dispatch import Experts, token_choice


def moe(**fields):
    block = Moe(Moe.Config(d_model=8, **{"d_expert": 16, "n_experts": 4, **fields}))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return block.train()


def kept(block, x_BLD):
    """Return (B, L): whether a token has anything of an expert."""
    return (block(x_BLD).y_BLD != 0).any(-1)


def drawn(*shape):
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(1))


def test_drops_fall_on_the_end_of_a_batch():
    shares = kept(moe(capacity_factor=0.5), drawn(16, 32)).float().mean(1)
    assert shares[0] == 1.0
    assert shares[:4].mean() > 0.9 > 0.1 > shares[-4:].mean()


def test_which_sequences_come_last_is_drawn_at_every_step(corpus):
    source = open_source(source_config({"kind": "text", "path": str(corpus)}))
    first, second = (source.train_batch(step, 8, 32, 0).inputs_BL for step in (0, 1))
    assert not any(torch.equal(first[-1], row) for row in second)
    assert torch.equal(first, source.train_batch(0, 8, 32, 0).inputs_BL)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_both_choices_of_an_earlier_token_come_before_the_first_choice_of_a_later_one(impl):
    """GShard and ST-MoE would serve the first choices of all tokens, and drop the second choice of token 0."""
    one = Experts(torch.eye(2).repeat(2, 1, 1), torch.eye(2).repeat(2, 1, 1))
    x_ND, gate_NK = torch.ones(2, 2), torch.tensor([[0.75, 0.25], [0.75, 0.25]])
    expert_NK = torch.tensor([[0, 1], [1, 0]])  # token 1's first choice is token 0's second
    y_NO, counts_E = token_choice(x_ND, gate_NK, expert_NK, one, capacity=1, impl=impl)
    assert y_NO[:, 0].tolist() == [1.0, 0.0]
    assert counts_E.tolist() == [2, 2]


def test_smaller_passes_have_capacities_of_their_own():
    block, x_BLD = moe(capacity_factor=0.5), drawn(16, 32)
    whole = kept(block, x_BLD)
    halves = torch.cat([kept(block, half_BLD) for half_BLD in x_BLD.split(8)])
    assert not torch.equal(whole, halves)
    assert halves[8].all() and not whole[8:].any(-1).all()
    lenient = moe(capacity_factor=None)
    assert torch.equal(lenient(x_BLD).y_BLD, torch.cat([lenient(half).y_BLD for half in x_BLD.split(8)]))


def test_declared_flops_are_those_of_the_tokens_and_a_capacity_executes_padding_beside_them():
    def executed(block):
        with FlopCounterMode(display=False) as counter:
            block(drawn(16, 32))
        return counter.get_total_flops() / (16 * 32)

    one, two = moe(capacity_factor=1.0), moe(capacity_factor=2.0)
    declared = one.config.cost(32).flops_per_token
    assert two.config.cost(32).flops_per_token == declared == executed(one)
    router = 2 * 8 * 4
    assert executed(two) - router == 2 * (declared - router)
