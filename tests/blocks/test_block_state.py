"""A state is any tuple of tensors: blocks of a user's own, and every registered letter, read in pieces of any size."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.long import last_logits, prefill
from hybridnas.arch.model import HybridLM
from hybridnas.cost import Cost
from hybridnas.layers import Block, BlockConfig, BlockOutput, map_state
from hybridnas.registry import BLOCKS, register_block

V = 23


class _Recurrent(Block):
    """y_t = h_t = tanh(w x_t + a h_{t-1}), the last two inputs beside it; subclasses say how the state is packed."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        """No fields of its own."""

        def cost(self, seq_len, dtype_bytes=4):
            params = 2 * self.d_model
            return Cost(params=params, active_params=params, state_bytes=3 * self.d_model * dtype_bytes)

    def __init__(self, config, *, impl):
        super().__init__(config, impl=impl)
        self.a, self.w = (nn.Parameter(torch.empty(config.d_model)) for _ in range(2))
        self.reset_parameters()

    def forward(self, x_BLD, state=None):
        given = self.init_state(x_BLD.shape[0], device=x_BLD.device, dtype=x_BLD.dtype) if state is None else state
        h_BD, last_BD, before_BD = self.unpack(given)
        ys = []
        for x_BD in x_BLD.unbind(1):
            h_BD = torch.tanh(self.w * x_BD + self.a * h_BD + 0.5 * before_BD)
            last_BD, before_BD = x_BD, last_BD
            ys.append(h_BD)
        y_BLD = torch.stack(ys, dim=1)
        return BlockOutput(y_BLD, None if state is None else self.pack(h_BD, last_BD, before_BD))

    def init_state(self, batch_size, *, device, dtype):
        zero = torch.zeros(1, self.config.d_model, device=device, dtype=dtype).expand(batch_size, -1)
        return self.pack(zero, zero, zero)

    def reset_parameters(self, init_scale=0.1):
        for parameter in self.parameters():
            nn.init.normal_(parameter)


class Plain(_Recurrent):
    """Two tensors in a plain tuple; the second holds the inputs in the order of the last two."""

    def pack(self, h_BD, last_BD, before_BD):
        return h_BD, torch.stack([last_BD, before_BD], dim=1)

    def unpack(self, state):
        return state[0], *state[1].unbind(1)


class One(_Recurrent):
    """One tensor in a plain tuple."""

    def pack(self, *tensors):
        return (torch.stack(tensors, dim=1),)

    def unpack(self, state):
        return state[0].unbind(1)


class Shifted(_Recurrent):
    """Three tensors, of which one moves to another place at every step without being copied."""

    def pack(self, h_BD, last_BD, before_BD):
        return h_BD, last_BD, before_BD

    def unpack(self, state):
        return state


@pytest.fixture(params=[Plain, One, Shifted])
def own(request):
    register_block("Q", name="own")(request.param)
    yield "Q"
    BLOCKS.remove("Q")


def check(pattern):
    model = HybridLM(Arch.from_pattern(pattern, d_model=16, vocab_size=V), seed=1).eval()
    ids = torch.randint(V, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids).logits
        for size in (1, 2, 5, 17):
            close(last_logits(model, ids, chunk_tokens=size), whole[:, -1])
            pieces = [logits for logits, _ in prefill(model, ids.split(size, dim=1))]
            close(torch.cat(pieces, dim=1), whole)
        greedy = ids[:, :6]
        for _ in range(5):
            greedy = torch.cat([greedy, model(greedy).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(model.generate(ids[:, :6], 5, temperature=0, prefill_chunk=4), greedy)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_block_of_a_user_s_own_keeps_any_tuple_of_tensors(own):
    check(f"{own}{own}")
    check(f"M{own}[A,{own}]")


@pytest.mark.parametrize("letter", BLOCKS)
def test_every_letter_is_read_in_pieces_of_any_size(letter):
    check(letter)
    check(f"{letter}[{letter},F]")


def test_map_state_keeps_the_class_of_a_state():
    pair = (torch.ones(1), torch.ones(2))
    assert map_state(lambda t: 2 * t, (torch.ones(1),)) == (torch.tensor([2.0]),)
    assert map_state(lambda t: t, ()) == ()
    assert [t.tolist() for t in map_state(torch.add, pair, pair)] == [[2.0], [2.0, 2.0]]
    for letter in BLOCKS:
        block = BLOCKS.get(letter)(BLOCKS.get(letter).Config(d_model=16))
        state = block.init_state(2, device=torch.device("cpu"), dtype=torch.float32)
        assert type(map_state(torch.clone, state)) is type(state)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        map_state(torch.add, pair, pair[:1])
