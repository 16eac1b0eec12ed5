"""What every block promises, over all letters of the registry and the settings that change their code path."""

import dataclasses
import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridnas.blocks import mamba
from hybridnas.blocks.base import options_of
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.registry import BLOCKS

WIDTH = 16

VARIANTS = {
    "A": [
        {},
        {"n_heads": 4},
        {"n_heads": 4, "n_kv_heads": 2, "bias": True},
        {"n_heads": 4, "n_kv_heads": 1, "positions": "none"},
        {"n_heads": 3, "head_dim": 6, "rope_base": 500.0},
    ],
    "F": [{}, {"d_ff": 24, "activation": "gelu"}, {"d_ff": 24, "gated": True, "activation": "silu", "bias": False}],
    "E": [
        {"n_experts": 4},
        {"n_experts": 1, "d_expert": 12},
        {"n_experts": 4, "d_expert": 12, "router": "top_k", "top_k": 2, "renormalise": True, "router_z_weight": 1e-3},
        {"n_experts": 4, "d_expert": 7, "capacity_factor": None, "gated": True, "activation": "silu", "bias": True},
        {"n_experts": 6, "d_expert": 8, "d_shared": 20, "capacity_factor": 1.25, "bias": True},
        {"n_experts": 4, "d_expert": 12, "router": "expert_choice", "capacity_factor": 2.0},
    ],
    "M": [
        {},
        {"expand": 4 / 3, "d_state": 4, "bias": True},
        {"d_inner": 20, "dt_rank": 3, "d_conv": 1, "conv_bias": False},
        {"selective": "none"},
        {"selective": "B+C"},
        {"selective": "dt"},
        {"inner_moe": "gate", "inner_experts": 3},
        {"inner_moe": "conv+gate+out", "inner_experts": 2, "inner_d_expert": 12, "bias": True},
    ],
}
CASES = [(letter, fields) for letter in sorted(BLOCKS) for fields in VARIANTS.get(letter, [{}])]
CAUSAL = [(letter, fields) for letter, fields in CASES if BLOCKS.get(letter).Config(d_model=WIDTH, **fields).causal]


def words(case):
    letter, fields = case
    return f"{letter}({', '.join(f'{k}={v:.3g}' if isinstance(v, float) else f'{k}={v}' for k, v in fields.items())})"


every_block = pytest.mark.parametrize("case", CASES, ids=words)
every_causal_block = pytest.mark.parametrize("case", CAUSAL, ids=words)


def build(case, d_model=WIDTH, seed=0):
    letter, fields = case
    torch.manual_seed(seed)
    cls = BLOCKS.get(letter)
    block = cls(cls.Config(d_model=d_model, **fields))
    with torch.no_grad():  # weights of order one, so that an error shows at the tolerances below
        for name, parameter in block.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name:
                parameter.normal_(std=parameter.shape[-2] ** -0.5)
            elif parameter.dim() == 1 and name.endswith("bias") and "dt_proj" not in name:
                parameter.normal_(std=0.1)
    return block.eval()


def tokens(batch, length, d_model=WIDTH, seed=1):
    return torch.randn(batch, length, d_model, generator=torch.Generator().manual_seed(seed))


def run_in_chunks(block, x_BLD, lengths):
    state = block.init_state(x_BLD.shape[0], device=x_BLD.device, dtype=x_BLD.dtype)
    outputs = []
    for part in x_BLD.split(lengths, dim=1):
        y, state, _ = block(part, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


def assert_same(got, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(scale, 1.0))


@every_block
def test_declared_parameters_are_the_real_ones(case):
    letter, fields = case
    cls = BLOCKS.get(letter)
    for d_model in (16, 48):
        config = cls.Config(d_model=d_model, **fields)
        with torch.device("meta"):
            block = cls(config)
        cost = config.cost(64)
        assert cost.params == sum(p.numel() for p in block.parameters())
        assert 0 < cost.active_params <= cost.params
        assert cost.embedding_params == 0


@pytest.mark.parametrize(
    ("letter", "fields", "params", "active"),
    [
        ("M", {"d_model": 512}, 1_694_720, 1_694_720),
        ("M", {"d_model": 768}, 3_770_880, 3_770_880),
        ("A", {"d_model": 512, "n_heads": 8}, 4 * 512**2, 4 * 512**2),
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


@every_causal_block
@pytest.mark.parametrize("length", [1, 2, 7, 33])
def test_whole_sequence_token_by_token_and_halves_agree(case, length):
    block, x_BLD = build(case), tokens(2, length)
    with torch.no_grad():
        whole, none, _ = block(x_BLD)
        assert none is None
        assert whole.shape == x_BLD.shape
        assert_same(run_in_chunks(block, x_BLD, [1] * length)[0], whole)
        assert_same(run_in_chunks(block, x_BLD, [length])[0], whole)
        if length > 1:
            assert_same(run_in_chunks(block, x_BLD, [length // 2, length - length // 2])[0], whole)


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
    return build(CAUSAL[index])


@every_causal_block
def test_later_inputs_do_not_touch_earlier_outputs(case):
    block, x_BLD = build(case), tokens(2, 19)
    with torch.no_grad():
        before = block(x_BLD).y_BLD
        for t in (1, 11, 18):
            changed = x_BLD.clone()
            changed[:, t:] = 10 * tokens(2, 19, seed=5)[:, t:]
            after = block(changed).y_BLD
            torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
            assert not torch.allclose(after[:, t], before[:, t])


@every_causal_block
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_declared_state_bytes_are_the_real_ones(case, dtype):
    block = build(case)
    wide = {name: p.detach().clone() for name, p in block.named_parameters() if name in block.float32}
    block.to(dtype)
    for name, values in wide.items():
        block.get_parameter(name).data = values
    length, batch = 21, 3
    with torch.no_grad():
        _, state = run_in_chunks(block, tokens(batch, length).to(dtype), [13, 1, 7])
    real = sum(tensor.numel() * tensor.element_size() for tensor in state)
    assert real == batch * block.config.cost(length, dtype_bytes=dtype.itemsize).state_bytes
    assert all(tensor.shape[0] == batch for tensor in state)


@every_block
@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_every_parameter_and_the_input(case, training):
    block, x_BLD = build(case).train(training), tokens(2, 24).requires_grad_()
    y, _, aux = block(x_BLD)
    (y.square().sum() + sum(aux.losses.values())).backward()
    lonely = case[1].get("n_experts") == 1  # one expert's gate is 1 whatever its router says
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0 or (lonely and "router" in name), name
    assert (x_BLD.grad.abs().sum(dim=-1) > 0).float().mean() > 0.5


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in "AFEM"], ids=words)
def test_declared_flops_match_torchs_counter(case, monkeypatch):
    letter, fields = case
    if letter == "E":  # with slots for exactly all choices; torch does not count what runs without a capacity
        fields = {**fields, "capacity_factor": 2.0 if fields.get("router") == "expert_choice" else 1.0}
    d_model, length, batch = 64, 96, 2
    block = build((letter, fields), d_model=d_model).train()
    declared = block.config.cost(length).flops_per_token
    if letter == "M":  # torch sees the projections whole; the scan and the convolution are declared by formula
        config = block.config
        declared -= mamba.scan_flops(config.width, config.d_state) + mamba.conv_flops(config.width, config.d_conv)
        monkeypatch.setattr(mamba.scan_room, "selective_scan", lambda u, *_, **__: u)
        monkeypatch.setattr(mamba.conv_room, "causal_conv1d", lambda x, *_, **__: x)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        block(tokens(batch, length, d_model))
    assert counter.get_total_flops() == pytest.approx(declared * batch * length, rel=0.01)


@pytest.mark.parametrize("letter", sorted(BLOCKS))
def test_every_field_says_what_it_means(letter):
    for field, doc in options_of(BLOCKS.get(letter).Config).items():
        assert len(doc) >= 8, field
        assert "\n" not in doc, field


@every_block
def test_autocast_stays_finite_and_keeps_state_and_routing_in_float32(case):
    block, x_BLD = build(case).train(), tokens(2, 16)
    exact = block(x_BLD).y_BLD
    with torch.autocast("cpu", torch.bfloat16):
        y, _, aux = block(x_BLD)
        y.float().square().mean().backward()
    assert torch.isfinite(y).all()
    assert (y - exact).abs().mean() < 0.1 * exact.abs().mean() + 0.05
    assert all(loss.dtype is torch.float32 for loss in aux.losses.values())
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
    if block.config.causal:
        block.eval()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out, state = run_in_chunks(block, x_BLD, [9, 1, 6])
        assert torch.isfinite(out).all()
        ssm = getattr(state, "ssm_BIN", None)
        assert ssm is None or ssm.dtype is torch.float32


@every_block
def test_names_kept_in_float32_and_without_decay_exist(case):
    cls = BLOCKS.get(case[0])
    seen = {
        name for letter, fields in CASES if letter == case[0] for name, _ in build((letter, fields)).named_parameters()
    }
    assert set(cls.float32) <= seen
    assert set(cls.no_decay) <= seen


@pytest.mark.parametrize("letter", sorted(BLOCKS))
def test_smallest_widths_work(letter):
    smallest = 2 if letter == "A" else 1
    if letter not in "AFEM":
        smallest = 16
    for d_model in (smallest, smallest + 2):
        block = build((letter, {}), d_model=d_model)
        assert torch.isfinite(block(tokens(1, 3, d_model)).y_BLD).all()
        assert block.config.cost(3).params == sum(p.numel() for p in block.parameters())


@every_block
def test_two_spellings_have_one_canonical_form(case):
    letter, fields = case
    config = BLOCKS.get(letter).Config(d_model=WIDTH, **fields)
    canonical = config.canonical()
    names = set(config.field_names())
    spelled_out = config.replace(**{k: v for k, v in canonical.items() if k in names})
    assert spelled_out.canonical() == canonical
    assert spelled_out.cost(32) == config.cost(32)


def test_reset_draws_the_same_weights_from_the_same_seed_and_new_ones_from_another():
    for letter, fields in CASES:
        cls = BLOCKS.get(letter)
        block = cls(cls.Config(d_model=WIDTH, **fields))
        drawn = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            block.reset_parameters(0.1)
            drawn.append(torch.cat([p.detach().flatten() for p in block.parameters()]))
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert torch.isfinite(drawn[0]).all()


@every_causal_block
def test_a_block_says_what_computes_it_and_the_reference_agrees(case):
    fast = build(case)
    cls = BLOCKS.get(case[0])
    slow = cls(fast.config, impl=Impl.REFERENCE).eval()
    slow.load_state_dict(fast.state_dict())
    for block in (fast, slow):
        assert all(block.implementations(torch.device("cpu")).values())
    with torch.no_grad():
        assert_same(fast(tokens(2, 11)).y_BLD, slow(tokens(2, 11)).y_BLD)


@pytest.mark.parametrize(
    ("letter", "fields", "message"),
    [
        ("A", {"d_model": 512, "n_heads": 7}, r"attention n_heads=7 does not divide d_model=512; use n_heads=4 or 8"),
        ("A", {"d_model": 64, "n_heads": 4, "n_kv_heads": 3}, r"attention n_kv_heads=3 does not divide n_heads=4"),
        ("A", {"d_model": 15}, r"attention positions='rope' .*even head_dim, got 15"),
        ("A", {"d_model": 16, "n_heads": 0}, r"attention n_heads=0 must be >= 1"),
        ("A", {"d_model": 16, "positions": "learned"}, r"positions='learned' must be one of rope, none"),
        ("A", {"d_model": 16, "rope_base": 0.0}, r"rope_base=0.0 must be > 0"),
        ("F", {"d_model": 0}, r"mlp d_model=0 must be >= 1"),
        ("F", {"d_model": 16, "d_ff": -4}, r"mlp d_ff=-4 must be >= 1"),
        ("F", {"d_model": 16, "activation": "swish"}, r"activation='swish' must be one of relu, gelu, silu"),
        ("F", {"d_model": 16.5}, r"mlp d_model=16.5 must be an integer, got float"),
        ("E", {"d_model": 16, "n_experts": 0}, r"moe n_experts=0 must be >= 1"),
        (
            "E",
            {"d_model": 16, "n_experts": 2, "top_k": 4, "router": "top_k"},
            r"moe top_k=4 is more than n_experts=2; use top_k <= 2",
        ),
        ("E", {"d_model": 16, "top_k": 2}, r"router='switch' .*got top_k=2; use router='top_k'"),
        ("E", {"d_model": 16, "renormalise": True}, r"router='switch' .*got renormalise=True"),
        ("E", {"d_model": 16, "router": "sinkhorn"}, r"router='sinkhorn' must be one of switch, top_k, expert_choice"),
        ("E", {"d_model": 16, "capacity_factor": 0.0}, r"moe capacity_factor=0.0 must be > 0"),
        ("E", {"d_model": 16, "d_expert": 0}, r"moe d_expert=0 must be >= 1"),
        (
            "E",
            {"d_model": 16, "router": "expert_choice", "capacity_factor": None},
            r"expert_choice' needs a capacity_factor",
        ),
        ("M", {"d_model": 16, "d_state": 0}, r"mamba d_state=0 must be >= 1"),
        ("M", {"d_model": 1, "expand": 0.2}, r"mamba expand=0.2 of d_model=1 leaves no inner channel"),
        ("M", {"d_model": 16, "selective": "A"}, r"mamba selective='A' has unknown part 'A'; allowed: B, C, dt"),
        (
            "M",
            {"d_model": 16, "inner_moe": "gates"},
            r"inner_moe='gates' has unknown part 'gates'; did you mean 'gate'",
        ),
        ("M", {"d_model": 16, "inner_moe": "out+out"}, r"inner_moe='out\+out' names 'out' twice"),
        ("M", {"d_model": 16, "inner_experts": 0}, r"mamba inner_experts=0 must be >= 1"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(letter, fields, message):
    with pytest.raises(ConfigError, match=message) as caught:
        BLOCKS.get(letter).Config(**fields)
    assert "\n" not in str(caught.value)


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
        for letter, fields in CASES:
            cls = BLOCKS.get(letter)
            with torch.device("meta"):
                assert all(p.is_meta for p in cls(cls.Config(d_model=WIDTH, **fields)).parameters())
