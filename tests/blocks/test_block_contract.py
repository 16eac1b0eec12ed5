"""What every block promises, over all letters of the registry and the variants that each declares for its tests."""

import copy
import dataclasses
import functools
import importlib
import io
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.layers.block import map_state
from hybridnas.registry import BLOCKS

WIDTH = 16
CASES = [(letter, variant) for letter in BLOCKS for variant in BLOCKS.get(letter).test_configs()]
CAUSAL = [case for case in CASES if BLOCKS.get(case[0]).Config(d_model=WIDTH, **case[1].fields).causal]


def words(case):
    fields = case[1].fields.items()
    name = BLOCKS.get(case[0]).name
    return f"{case[0]} {name}({', '.join(f'{k}={v:.3g}' if isinstance(v, float) else f'{k}={v}' for k, v in fields)})"


every_block = pytest.mark.parametrize("case", CASES, ids=words)
every_causal_block = pytest.mark.parametrize("case", CAUSAL, ids=words)


def build(case, d_model=WIDTH, seed=0, fields=None):
    letter, variant = case
    torch.manual_seed(seed)
    cls = BLOCKS.get(letter)
    block = cls(cls.Config(d_model=d_model, **(variant.fields if fields is None else fields)))
    with torch.no_grad():  # weights of order one, so that an error shows at the tolerances below
        for name, parameter in block.named_parameters():
            if name in block.float32 and "router" not in name:
                continue  # step sizes and decays keep the range of their initialisation
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter.shape[-2] ** -0.5)
            elif parameter.dim() == 1 and name.endswith("bias"):
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
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * max(scale, 1.0))


@every_block
def test_declared_parameters_are_the_real_ones(case):
    letter, variant = case
    cls = BLOCKS.get(letter)
    for d_model in (16, 48):
        config = cls.Config(d_model=d_model, **variant.fields)
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


@every_causal_block
def test_whole_sequence_token_by_token_and_halves_agree(case):
    block = build(case)
    for length in (1, 2, 7, 19):
        x_BLD = tokens(2, length)
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
def test_declared_state_bytes_are_the_real_ones(case):
    length, batch = 21, 3
    for dtype in (torch.float32, torch.bfloat16):
        block = build(case).to(dtype)
        with torch.no_grad():
            _, state = run_in_chunks(block, tokens(batch, length).to(dtype), [13, 1, 7])
        real = sum(tensor.numel() * tensor.element_size() for tensor in state)
        assert real == batch * block.config.cost(length, dtype_bytes=dtype.itemsize).state_bytes, dtype
        assert all(tensor.shape[0] == batch for tensor in state)


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "bfloat16": lambda module: module.bfloat16(),
    "half": lambda module: module.half(),
    "type": lambda module: module.type(torch.bfloat16),
    "within a module": lambda module: nn.Sequential(nn.Identity(), nn.ModuleList([module])).bfloat16()[1][0],
    "twice": lambda module: module.double().half().bfloat16(),
    "with a gradient": lambda module: _with_gradients(module).bfloat16(),
}


def _with_gradients(module):
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    return module


@every_block
def test_parameters_declared_float32_keep_their_bits_when_the_block_is_narrowed(case):
    wide = build(case)
    before = dict(wide.named_parameters())
    for way, cast in CASTS.items():
        block = copy.deepcopy(wide)
        assert cast(block) is block
        for name, parameter in block.named_parameters():
            kept = name in block.float32
            assert (parameter.dtype == torch.float32) == kept, (way, name)
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype
            if kept:
                assert torch.equal(parameter, before[name]), (way, name)


@every_block
def test_parameters_declared_float32_move_between_devices_and_widen(case):
    block = build(case)
    assert {p.dtype for p in copy.deepcopy(block).double().parameters()} == {torch.float64}
    assert all(parameter.is_meta for parameter in copy.deepcopy(block).to("meta", torch.bfloat16).parameters())
    narrow = copy.deepcopy(block).bfloat16()
    stored = io.BytesIO()
    torch.save(narrow.state_dict(), stored)
    stored.seek(0)
    again = build(case, seed=1).bfloat16()
    again.load_state_dict(torch.load(stored, weights_only=True))
    for other in (again, copy.deepcopy(narrow)):
        for name, parameter in other.named_parameters():
            assert parameter.dtype == (torch.float32 if name in block.float32 else torch.bfloat16), name
            assert torch.equal(parameter, narrow.get_parameter(name)), name


@every_block
def test_bfloat16_computes_the_same_within_rounding(case):
    block, x_BLD = build(case), tokens(2, 24)
    narrow = copy.deepcopy(block).bfloat16()
    with torch.no_grad():
        # The router sees rounded inputs, and choosing another expert is no rounding error: most tokens must agree.
        exact, rounded = block(x_BLD).y_BLD, narrow(x_BLD.bfloat16()).y_BLD
        assert rounded.dtype == torch.bfloat16
        near = (rounded.float() - exact).norm(dim=-1) < 0.05 * exact.norm(dim=-1) + 0.02
        assert near.float().mean() > 0.9
        if block.config.causal:
            stepped, _ = run_in_chunks(narrow, x_BLD.bfloat16(), [1] * 24)
            near = (stepped - rounded).float().norm(dim=-1) < 0.05 * exact.norm(dim=-1) + 0.02
            assert near.float().mean() > 0.9


@every_block
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_tokens_gives_an_output_without_tokens(case, training):
    for batch, length in ((0, 5), (2, 0), (0, 1)):
        _has_no_tokens(build(case).train(training), batch, length)


def _has_no_tokens(block, batch, length):
    x_BLD = tokens(batch, length).requires_grad_()
    y_BLD, _, aux = block(x_BLD)
    assert y_BLD.shape == x_BLD.shape
    total = y_BLD.sum() + sum(aux.losses.values())
    assert total == 0
    total.backward()
    assert all(p.grad is None or not p.grad.any() for p in block.parameters())
    assert all(torch.isfinite(value).all() for value in aux.stats.values())
    if block.config.causal:
        before = block.init_state(batch, device=x_BLD.device, dtype=x_BLD.dtype)
        with torch.no_grad():
            _, after, _ = block(x_BLD, before)
        assert [tensor.shape[0] for tensor in after] == [batch] * len(before)
        if length == 0:
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@every_causal_block
def test_a_step_without_tokens_leaves_the_state_as_it_is(case):
    block = build(case)
    with torch.no_grad():
        _, state = run_in_chunks(block, tokens(2, 6), [6])
        kept = map_state(torch.clone, state)
        _, state, _ = block(tokens(2, 0), state)
    for got, expected in zip(state, kept, strict=True):
        torch.testing.assert_close(got, expected)


LAYOUTS = {
    "one row for all": lambda t: t[:1].expand_as(t),
    "turned": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1) if t.dim() > 2 else t,
    "no rows": lambda t: t[:0],
}


@every_causal_block
def test_the_fast_step_takes_a_state_however_it_lies(case):
    block = build(case)
    with torch.no_grad():
        _, state = run_in_chunks(block, tokens(3, 12)[:, :9], [9])
        for name, lay in LAYOUTS.items():
            _steps_as_it_reads(block, map_state(lay, state), tokens(3, 12)[: 0 if name == "no rows" else 3, 9:])


def _steps_as_it_reads(block, state, x_BLD):
    with torch.no_grad():
        expected = [
            x_BD + y_BD for x_BD, y_BD in zip(x_BLD.unbind(1), block(x_BLD, state).y_BLD.unbind(1), strict=True)
        ]
        step = block.one_token(nn.Identity(), state)
        for x_BD, y_BD in zip(x_BLD.unbind(1), expected, strict=True):
            assert_same(step(x_BD.clone()) if step is not None else y_BD, y_BD)


@every_causal_block
def test_hooks_on_the_parts_of_a_block_run_at_every_fast_step(case):
    block, x_BLD, calls = build(case), tokens(2, 6), []
    with torch.no_grad():
        _, state = run_in_chunks(block, x_BLD[:, :5], [5])
        for name, part in block.named_modules():
            if part is block:
                continue  # whoever decodes looks at these
            handle = part.register_forward_hook(lambda *_: calls.append(1))
            block(x_BLD[:, 5:], state)
            in_forward = bool(calls)
            calls.clear()
            step = block.one_token(nn.Identity(), map_state(torch.clone, state))
            if step is not None:
                step(x_BLD[:, 5].clone())
                assert bool(calls) == in_forward, name
            calls.clear()
            handle.remove()


@every_causal_block
def test_the_default_dtype_does_not_touch_the_numbers(case):
    block, x_BLD = build(case), tokens(2, 19)
    with torch.no_grad():
        expected, state = run_in_chunks(block, x_BLD, [11, 1, 7])
    before = torch.get_default_dtype()
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            with torch.no_grad():
                got, other = run_in_chunks(block, x_BLD, [11, 1, 7])
        finally:
            torch.set_default_dtype(before)
        assert torch.equal(got, expected), default
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(state, other, strict=True))


@pytest.mark.slow
@every_block
def test_a_block_exports(case):
    block = build(case)
    program = torch.export.export(block, (tokens(2, 12),))
    with torch.no_grad():
        got, expected = program.module()(tokens(2, 12)), block(tokens(2, 12))
    torch.testing.assert_close(got.y_BLD, expected.y_BLD)
    assert got.aux.stats.keys() == expected.aux.stats.keys()


@every_block
@pytest.mark.parametrize("training", [True, False])
def test_gradients_reach_every_parameter_and_the_input(case, training):
    block, x_BLD = build(case).train(training), tokens(2, 24).requires_grad_()
    y, _, aux = block(x_BLD)
    (y.square().sum() + sum(aux.losses.values())).backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad.abs().max() > 0) == (name not in case[1].without_gradient), name
    assert (x_BLD.grad.abs().sum(dim=-1) > 0).float().mean() > 0.5


@every_block
def test_declared_flops_match_torchs_counter(case, monkeypatch):
    d_model, length, batch = 64, 96, 2
    variant = case[1]
    block = build(case, d_model=d_model, fields={**variant.fields, **variant.flop_fields}).train()
    by_formula = block.config.kernel_flops()
    inside = 0

    def outside_the_count(kernel):
        def run(*args, **kwargs):
            nonlocal inside
            before = counter.get_total_flops()
            found = kernel(*args, **kwargs)
            inside += counter.get_total_flops() - before
            return found

        return run

    for name in by_formula:
        package = importlib.import_module(f"hybridnas.kernels.{name}")
        monkeypatch.setattr(package, name, outside_the_count(getattr(package, name)))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        block(tokens(batch, length, d_model))
    declared = block.config.cost(length).flops_per_token
    assert all(0 < flops < declared for flops in by_formula.values())
    counted = (counter.get_total_flops() - inside) / (batch * length)
    assert counted == pytest.approx(declared - sum(by_formula.values()), rel=0.01)


@every_block
def test_autocast_stays_finite_and_keeps_state_and_routing_in_float32(case):
    block, x_BLD = build(case).train(), tokens(2, 16)
    exact = block(x_BLD).y_BLD
    with torch.autocast("cpu", torch.bfloat16):
        y, _, aux = block(x_BLD)
        y.float().square().mean().backward()
    assert torch.isfinite(y).all()
    near = (y.float() - exact).norm(dim=-1) < 0.1 * exact.norm(dim=-1) + 0.02
    assert near.float().mean() > 0.9
    assert all(loss.dtype is torch.float32 for loss in aux.losses.values())
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())
    if block.config.causal:
        block.eval()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            out, state = run_in_chunks(block, x_BLD, [9, 1, 6])
        assert torch.isfinite(out).all()
        declared = block.init_state(2, device=x_BLD.device, dtype=torch.bfloat16)
        assert all(a.dtype is torch.float32 for a, b in zip(state, declared, strict=True) if b.dtype is torch.float32)


@pytest.mark.parametrize("letter", BLOCKS)
def test_names_kept_in_float32_and_without_decay_exist(letter):
    cls = BLOCKS.get(letter)
    blocks = [build(case) for case in CASES if case[0] == letter]
    parameters = {name for block in blocks for name, _ in block.named_parameters()}
    buffers = {name for block in blocks for name, _ in block.named_buffers()}
    assert set(cls.float32) <= parameters | buffers
    assert set(cls.no_decay) <= parameters


@pytest.mark.parametrize("letter", BLOCKS)
def test_any_small_width_works_or_is_refused_in_words(letter):
    cls, worked, refused = BLOCKS.get(letter), [], []
    for d_model in (1, 2, 3, 4):
        try:
            block = cls(cls.Config(d_model=d_model))
        except ConfigError as error:
            refused.append(error.field)
            continue
        worked.append(d_model)
        assert torch.isfinite(block(tokens(1, 3, d_model)).y_BLD).all()
        assert block.config.cost(3).params == sum(p.numel() for p in block.parameters())
    assert 2 in worked
    assert all(refused)


@every_block
def test_two_spellings_have_one_canonical_form(case):
    letter, variant = case
    config = BLOCKS.get(letter).Config(d_model=WIDTH, **variant.fields)
    canonical = config.canonical()
    names = set(config.field_names())
    spelled_out = config.replace(**{k: v for k, v in canonical.items() if k in names})
    assert spelled_out.canonical() == canonical
    assert spelled_out.cost(32) == config.cost(32)


def test_reset_draws_the_same_weights_from_the_same_seed_and_new_ones_from_another():
    for letter, variant in CASES:
        cls = BLOCKS.get(letter)
        block = cls(cls.Config(d_model=WIDTH, **variant.fields))
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
