"""What every block promises, over all letters of the registry and the variants that each declares for its tests."""

import dataclasses
import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hybridnas import testing
from hybridnas.cost import Cost
from hybridnas.errors import ConfigError
from hybridnas.layers import Block, BlockConfig, BlockOutput
from hybridnas.registry import BLOCKS
from hybridnas.testing import CHECKS, WIDTH, assert_same, build, check_block, config_of, run_in_chunks, tokens

CASES = [(letter, variant) for letter in BLOCKS for variant in BLOCKS.get(letter).test_configs()]
CAUSAL = [case for case in CASES if config_of(BLOCKS.get(case[0]), case[1]).causal]


def words(case):
    fields = case[1].fields.items()
    name = BLOCKS.get(case[0]).name
    return f"{case[0]} {name}({', '.join(f'{k}={v:.3g}' if isinstance(v, float) else f'{k}={v}' for k, v in fields)})"


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=words)


def named(names):
    return pytest.mark.parametrize("promise", [name for name in CHECKS if name in names])


@each(CASES)
@named(CHECKS.keys() - testing.CAUSAL - testing.SLOW)
def test_every_block_keeps_its_promises(case, promise):
    CHECKS[promise](BLOCKS.get(case[0]), case[1])


@each(CAUSAL)
@named(testing.CAUSAL)
def test_every_causal_block_keeps_its_promises(case, promise):
    CHECKS[promise](BLOCKS.get(case[0]), case[1])


@pytest.mark.slow
@each(CASES)
@named(testing.SLOW)
def test_every_block_keeps_promises_that_take_long_to_check(case, promise):
    CHECKS[promise](BLOCKS.get(case[0]), case[1])


class Counter(Block):
    """A block that adds up its inputs; subclasses break one promise each."""

    letter, name = "Q", "counter"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config(BlockConfig):
        def cost(self, seq_len, dtype_bytes=4):
            return Cost(
                params=self.d_model**2, active_params=self.d_model**2, flops_per_token=2.0 * self.d_model**2,
                state_bytes=self.d_model * dtype_bytes,
            )  # fmt: skip

    def __init__(self, config, *, impl="auto"):
        super().__init__(config, impl=impl)
        self.weight = nn.Parameter(torch.empty(config.d_model, config.d_model))
        self.reset_parameters()

    def reset_parameters(self, init_scale=0.1):
        nn.init.normal_(self.weight)

    def init_state(self, batch_size, *, device, dtype):
        return (torch.zeros(batch_size, self.config.d_model, device=device, dtype=dtype),)

    def forward(self, x_BLD, state=None):
        (sum_BD,) = state or self.init_state(x_BLD.shape[0], device=x_BLD.device, dtype=x_BLD.dtype)
        sums_BLD = torch.cat([sum_BD[:, None], x_BLD @ self.weight], dim=1).cumsum(dim=1)
        return BlockOutput(sums_BLD[:, 1:], None if state is None else (sums_BLD[:, -1],))


class WrongCost(Counter):
    class Config(Counter.Config):
        def cost(self, seq_len, dtype_bytes=4):
            return dataclasses.replace(super().cost(seq_len, dtype_bytes), params=3, active_params=3)


class DictState(Counter):
    def init_state(self, batch_size, *, device, dtype):
        return {"sum": torch.zeros(batch_size, self.config.d_model, device=device, dtype=dtype)}

    def forward(self, x_BLD, state=None):
        y_BLD, after, _ = super().forward(x_BLD, None if state is None else tuple(state.values()))
        return BlockOutput(y_BLD, None if after is None else {"sum": after[0]})


class LooksAhead(Counter):
    def forward(self, x_BLD, state=None):
        return super().forward(x_BLD.flip(1), state)


class Forgets(Counter):
    def forward(self, x_BLD, state=None):
        y_BLD, _, aux = super().forward(x_BLD)
        return BlockOutput(y_BLD, state, aux)


class Leaks(Counter):
    def forward(self, x_BLD, state=None, segments_BL=None):
        return super().forward(x_BLD, state)


NO_EXPORT = ["it exports", "bfloat16 computes the same within rounding"]  # sums in bfloat16 drift


def test_a_block_that_keeps_its_promises_passes():
    check_block(Counter, skip=NO_EXPORT)


@pytest.mark.parametrize(
    ("cls", "promise"),
    [
        (WrongCost, "declared parameters are the real ones"),
        (DictState, "a tuple of tensors"),
        (LooksAhead, "token by token"),
        (Forgets, "token by token"),
        (Leaks, "what each gives alone"),
    ],
)
def test_a_block_that_breaks_a_promise_is_told_which(cls, promise):
    with pytest.raises(AssertionError, match=promise) as caught:
        check_block(cls, skip=NO_EXPORT)
    assert "block Q counter" in str(caught.value)


def test_a_check_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError) as caught:
        check_block(Counter, skip=["it flies"])
    assert (caught.value.field, caught.value.got) == ("skip", "it flies")


@pytest.mark.parametrize(
    ("letter", "fields", "params", "active"),
    [
        ("M", {"d_model": 512}, 1_694_720, 1_694_720),
        ("M", {"d_model": 768}, 3_770_880, 3_770_880),
        ("A", {"d_model": 512, "n_heads": 8}, 4 * 512**2, 4 * 512**2),
        ("R", {"d_model": 2560, "gate_blocks": 10}, 3 * 2560**2 + 512 * 2560 + 11 * 2560, 3 * 2560**2 + 523 * 2560),
        ("C", {"d_model": 1024}, 4 * 1024**2 + 3 * 1024, 4 * 1024**2 + 3 * 1024),  # LFM2-350M's
        ("F", {"d_model": 512}, 2 * 512 * 2048 + 2048 + 512, 2 * 512 * 2048 + 2048 + 512),
        (
            "E",
            {"d_model": 512, "n_experts": 42, "d_expert": 1536},
            42 * 2 * 512 * 1536 + 512 * 42,
            2 * 512 * 1536 + 512 * 42,
        ),
        (  # two of three projections routed among 24 two-layer experts of hidden 352
            "M",
            {"d_model": 512, "inner_moe": "conv+gate", "inner_experts": 24, "inner_d_expert": 352},
            1_694_720 - 2 * 524_288 + 2 * (24 * 540_672 + 512 * 24),
            1_694_720 - 2 * 524_288 + 2 * (540_672 + 512 * 24),
        ),
    ],
)
def test_the_papers_integers(letter, fields, params, active):
    cost = BLOCKS.get(letter).Config(**fields).cost(1024)
    assert (cost.params, cost.active_params) == (params, active)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CAUSAL), lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), batch=st.integers(1, 3)
)
def test_any_chunks_from_any_state_agree(case, lengths, batch):
    block, x_BLD = _cached_block(CAUSAL.index(case)), tokens(batch, sum(lengths))
    with torch.no_grad():
        assert_same(run_in_chunks(block, x_BLD, lengths)[0], block(x_BLD).y_BLD)


@functools.cache
def _cached_block(index):
    return build(BLOCKS.get(CAUSAL[index][0]), CAUSAL[index][1])


@pytest.mark.parametrize(
    ("letter", "fields", "field", "got"),
    [
        ("A", {"d_model": 512, "n_heads": 7}, "n_heads", 7),
        ("A", {"d_model": 64, "n_heads": 4, "n_kv_heads": 3}, "n_kv_heads", 3),
        ("A", {"d_model": 15}, "head_dim", 15),
        ("A", {"d_model": 16, "n_heads": 0}, "n_heads", 0),
        ("A", {"d_model": 16, "positions": "learned"}, "positions", "learned"),
        ("A", {"d_model": 16, "rope_base": 0.0}, "rope_base", 0.0),
        ("F", {"d_model": 0}, "d_model", 0),
        ("F", {"d_model": 16, "d_ff": -4}, "d_ff", -4),
        ("F", {"d_model": 16, "activation": "swish"}, "activation", "swish"),
        ("F", {"d_model": 16.5}, "d_model", 16.5),
        ("E", {"d_model": 16, "n_experts": 0}, "n_experts", 0),
        ("E", {"d_model": 16, "n_experts": 2, "top_k": 4, "router": "top_k"}, "top_k", 4),
        ("E", {"d_model": 16, "top_k": 2}, "top_k", 2),
        ("E", {"d_model": 16, "renormalize": True}, "renormalize", True),
        ("E", {"d_model": 16, "router": "sinkhorn"}, "router", "sinkhorn"),
        ("E", {"d_model": 16, "capacity_factor": 0.0}, "capacity_factor", 0.0),
        ("E", {"d_model": 16, "d_expert": 0}, "d_expert", 0),
        ("E", {"d_model": 16, "router": "expert_choice", "capacity_factor": None}, "capacity_factor", None),
        ("M", {"d_model": 16, "d_state": 0}, "d_state", 0),
        ("M", {"d_model": 1, "expand": 0.2}, "expand", 0.2),
        ("M", {"d_model": 16, "selective": "A"}, "selective", "A"),
        ("M", {"d_model": 16, "inner_moe": "gates"}, "inner_moe", "gates"),
        ("M", {"d_model": 16, "inner_moe": "out+out"}, "inner_moe", "out+out"),
        ("M", {"d_model": 16, "inner_experts": 0}, "inner_experts", 0),
        ("N", {"d_model": 1, "expand": 0.2}, "expand", 0.2),
        ("N", {"d_model": 16, "head_dim": 5}, "head_dim", 5),
        ("N", {"d_model": 16, "head_dim": 8, "n_groups": 3}, "n_groups", 3),
        ("G", {"d_model": 16, "n_heads": 2, "n_value_heads": 3}, "n_value_heads", 3),
        ("G", {"d_model": 16, "d_conv": 0, "conv_bias": True}, "conv_bias", True),
        ("G", {"d_model": 16, "gate": "relu"}, "gate", "relu"),
        ("K", {"d_model": 16, "n_heads": 3}, "n_heads", 3),
        ("K", {"d_model": 16, "gate_lower_bound": 0.5}, "gate_lower_bound", 0.5),
        ("K", {"d_model": 16, "gate": "none", "gate_rank": 4}, "gate_rank", 4),
        ("L", {"d_model": 16, "n_heads": 3}, "n_heads", 3),
        ("L", {"d_model": 16, "kind": "mamba"}, "kind", "mamba"),
        ("L", {"d_model": 16, "negative_eigenvalues": True}, "negative_eigenvalues", True),
        ("L", {"d_model": 16, "kind": "gla", "decay_factor": 0.5}, "decay_factor", 0.5),
        ("L", {"d_model": 16, "kind": "retnet", "head_dim": 5}, "head_dim", 5),
        ("L", {"d_model": 16, "kind": "hgrn2", "lower_bound": 1.0}, "lower_bound", 1.0),
        ("L", {"d_model": 16, "kind": "hgrn2", "feature_map": "elu"}, "feature_map", "elu"),
        ("L", {"d_model": 16, "kind": "deltanet", "norm": "sum"}, "norm", "sum"),
        ("L", {"d_model": 16, "feature_map": "l2"}, "feature_map", "l2"),
        ("L", {"d_model": 16, "conv_bias": True}, "conv_bias", True),
        ("R", {"d_model": 16, "gate_blocks": 3}, "gate_blocks", 3),
        ("D", {"d_model": 16, "d_state": 5}, "d_state", 5),
        ("D", {"d_model": 16, "init": "hippo"}, "init", "hippo"),
        ("U", {"d_model": 16, "kind": "rnn"}, "kind", "rnn"),
        ("X", {"d_model": 16, "n_heads": 3}, "n_heads", 3),
        ("Y", {"d_model": 16, "d_state": 0}, "d_state", 0),
        ("H", {"d_model": 16, "head_dim": 3}, "head_dim", 3),
        ("W", {"d_model": 16, "head_dim": 3}, "head_dim", 3),
        ("H", {"d_model": 16, "d_state": 3}, "d_state", 3),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(letter, fields, field, got):
    with pytest.raises(ConfigError) as caught:
        BLOCKS.get(letter).Config(**fields)
    assert caught.value.field.rpartition(".")[2] == field
    assert caught.value.got == got
    assert caught.value.allowed is not None
    assert "\n" not in str(caught.value)


def test_a_message_says_what_was_got_and_what_to_use():
    with pytest.raises(ConfigError) as caught:
        BLOCKS.get("A").Config(d_model=512, n_heads=7)
    assert str(caught.value) == "attention n_heads=7 does not divide d_model=512; use n_heads=4 or 8, or give head_dim"


def test_configs_are_frozen_and_keep_their_checks_when_replaced():
    config = BLOCKS.get("A").Config(d_model=32, n_heads=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_heads = 3
    with pytest.raises(ConfigError, match="does not divide"):
        config.replace(n_heads=5)


def test_default_heads_fit_every_even_width():
    for d_model in range(2, 1100, 2):
        config = BLOCKS.get("A").Config(d_model=d_model)
        assert config.heads * config.head_width == d_model
    assert [BLOCKS.get("A").Config(d_model=d).heads for d in (32, 128, 512, 768)] == [1, 2, 8, 12]


def test_no_block_warns_when_built_on_the_meta_device():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for letter, variant in CASES:
            cls = BLOCKS.get(letter)
            with torch.device("meta"):
                assert all(p.is_meta for p in cls(cls.Config(d_model=WIDTH, **variant.fields)).parameters())
