"""Routed experts against a plain loop, against formulas worked out by hand, and against transformers' Mixtral."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hybridnas.blocks.moe import Moe
from hybridnas.errors import ConfigError, KernelInputError, KernelUnavailableError
from hybridnas.kernels.moe_dispatch import Experts, describe, expert_choice, token_choice


def random_experts(n, d_in, hidden, d_out, *, activation="relu", gated=False, bias=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    first = 2 * hidden if gated else hidden
    biases = (draw(n, first), draw(n, d_out)) if bias else (None, None)
    return Experts(draw(n, d_in, first), draw(n, hidden, d_out), *biases, activation, gated)


def random_choice(n_tokens, n_experts, top_k, dtype=torch.float64, seed=0):
    probs = torch.randn(n_tokens, n_experts, generator=torch.Generator().manual_seed(seed), dtype=dtype).softmax(-1)
    gate, expert = probs.topk(top_k, dim=-1)
    return gate.detach().requires_grad_(), expert


def gradients(y, leaves):
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weight).sum(), leaves)


def routed(config, **changes):
    block = Moe(Moe.Config(d_model=config.pop("d_model", 8), **config, **changes))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return block


@settings(max_examples=40, deadline=None)
@given(
    n_tokens=st.integers(1, 23),
    n_experts=st.integers(1, 7),
    top_k=st.integers(1, 3),
    capacity=st.one_of(st.none(), st.integers(1, 9)),
    form=st.sampled_from(
        [("relu", False, False), ("silu", True, True), ("gelu_tanh", False, True), ("relu2", True, False)]
    ),
    seed=st.integers(0, 99),
)
def test_token_choice_and_its_gradients_equal_the_loop(n_tokens, n_experts, top_k, capacity, form, seed):
    activation, gated, bias = form
    x = torch.randn(n_tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    experts = random_experts(n_experts, 4, 3, 5, activation=activation, gated=gated, bias=bias, seed=seed)
    gate, expert = random_choice(n_tokens, n_experts, min(top_k, n_experts), seed=seed)
    leaves = [x, gate, *(t for t in experts if isinstance(t, torch.Tensor))]
    fast, fast_counts = token_choice(x, gate, expert, experts, capacity=capacity)
    slow, slow_counts = token_choice(x, gate, expert, experts, capacity=capacity, impl="reference")
    torch.testing.assert_close(fast, slow)
    assert fast_counts.tolist() == slow_counts.tolist()
    for got, expected in zip(gradients(fast, leaves), gradients(slow, leaves), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("hidden", "d_out"), [(8, 12), (7, 5)])  # rows that grouped_mm takes, and rows it refuses
@pytest.mark.parametrize("bias", [False, True])
def test_dropless_experts_in_float32_equal_the_loop(hidden, d_out, bias):
    x = torch.randn(37, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    experts = random_experts(5, 8, hidden, d_out, gated=True, activation="silu", bias=bias, dtype=torch.float32)
    gate, expert = random_choice(37, 5, 2, torch.float32)
    expert[expert == 3] = 0  # an expert that nobody chose
    leaves = [x, gate, *(t for t in experts if isinstance(t, torch.Tensor))]
    fast, slow = (token_choice(x, gate, expert, experts, impl=impl)[0] for impl in ("auto", "reference"))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    for got, expected in zip(gradients(fast, leaves), gradients(slow, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    fast, _ = token_choice(x, gate, expert, experts)
    fast.sum().backward()  # an expanded gradient, which grouped_mm itself refuses
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("hidden", [8, 7])  # rows that grouped_mm takes, and rows it refuses
def test_experts_that_no_token_chose_are_not_multiplied(capacity, hidden):
    x = torch.randn(37, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    experts = random_experts(6, 8, hidden, 8, gated=True, activation="silu", bias=True, dtype=torch.float32)
    gate, expert = random_choice(37, 6, 2, torch.float32)
    expert[expert == 3], expert[expert == 5] = 0, 1
    with torch.no_grad():  # what touches them, be it with a weight of zero, is not a number
        for weights in experts[:4]:
            weights[3], weights[5] = math.nan, math.nan
    y, counts = token_choice(x, gate, expert, experts, capacity=capacity)
    assert counts[[3, 5]].tolist() == [0, 0]
    assert torch.isfinite(y).all()
    for gradient in gradients(y, [x, gate, *experts[:4]]):
        assert torch.isfinite(gradient).all()


def test_flops_are_those_of_the_choices_where_experts_stay_idle():
    x, (gate, expert) = torch.randn(40, 6), random_choice(40, 2, 2, torch.float32)
    experts = random_experts(64, 6, 5, 7, dtype=torch.float32)
    for capacity, rows in ((None, 80), (9, 18)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            token_choice(x, gate, expert, experts, capacity=capacity)
        assert counter.get_total_flops() == 2 * rows * (6 * 5 + 5 * 7)


@settings(max_examples=15, deadline=None)
@given(n_tokens=st.integers(1, 17), n_experts=st.integers(1, 5), capacity=st.integers(1, 6), seed=st.integers(0, 99))
def test_expert_choice_and_its_gradients_equal_the_loop(n_tokens, n_experts, capacity, seed):
    x = torch.randn(n_tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    experts = random_experts(n_experts, 4, 3, 5, bias=True, seed=seed)
    gate, token = random_choice(n_experts, n_tokens, min(capacity, n_tokens), seed=seed)
    leaves = [x, gate, *(t for t in experts if isinstance(t, torch.Tensor))]
    fast, slow = (expert_choice(x, gate, token, experts, impl=impl) for impl in ("auto", "reference"))
    torch.testing.assert_close(fast, slow)
    for got, expected in zip(gradients(fast, leaves), gradients(slow, leaves), strict=True):
        torch.testing.assert_close(got, expected)


def test_kernels_refuse_what_does_not_fit():
    x, experts = torch.randn(6, 4), random_experts(2, 4, 3, 4, dtype=torch.float32)
    gate, expert = random_choice(6, 2, 1, torch.float32)
    with pytest.raises(KernelInputError, match=r"needs x \(N, D\), up \(E, D, F\) and down \(E, F, O\)"):
        token_choice(torch.randn(6, 5), gate, expert, experts)
    with pytest.raises(KernelInputError, match=r"shape \(N, K\) with N=6"):
        token_choice(x, gate[:5], expert[:5], experts)
    with pytest.raises(KernelInputError, match=r"shape \(E, C\) with E=2"):
        expert_choice(x, gate, expert, experts)
    with pytest.raises(KernelInputError, match="capacity=0 must be >= 1"):
        token_choice(x, gate, expert, experts, capacity=0)
    with pytest.raises(KernelInputError, match="activation='tanh' must be one of relu"):
        token_choice(x, gate, expert, experts._replace(activation="tanh"))
    with pytest.raises(ConfigError, match="impl='numba' must be one of"):
        token_choice(x, gate, expert, experts, impl="numba")
    with pytest.raises(KernelUnavailableError, match="moe_dispatch impl='triton' needs a CUDA device"):
        token_choice(x, gate, expert, experts, impl="triton")
    assert "grouped_mm" in describe("cpu")


def test_the_first_tokens_in_batch_and_time_order_keep_their_place():
    block = routed({"n_experts": 2, "d_expert": 4, "d_model": 2}, capacity_factor=0.5).train()
    with torch.no_grad():
        block.routed.router.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 5.0]]))
    to_0, to_1 = torch.tensor([1.0, 0.1]), torch.tensor([0.1, 1.0])
    x = torch.stack([torch.stack([to_0, to_0, to_1, to_0]), torch.stack([to_1, to_1, to_0, to_1])])
    y, _, aux = block(x)  # 8 tokens, 2 experts, factor 0.5: two slots each
    kept = (y != 0).any(-1)
    assert kept.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert aux.stats["dropped"].item() == 0.5
    assert aux.stats["load_E"].tolist() == [0.5, 0.5]  # counted before dropping
    block.eval()
    y, _, aux = block(x)
    assert (y != 0).any(-1).all()
    assert aux.stats["dropped"].item() == 0.0


def test_evaluation_drops_only_when_asked():
    x = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(0))
    lenient, strict = (routed({"n_experts": 4}, eval_capacity_factor=factor).eval() for factor in (None, 0.5))
    assert lenient(x).aux.stats["dropped"].item() == 0.0
    assert strict(x).aux.stats["dropped"].item() >= 0.5
    dropless = routed({"n_experts": 4}, capacity_factor=None).train()
    assert dropless(x).aux.stats["dropped"].item() == 0.0
    torch.testing.assert_close(dropless(x).y_BLD, lenient(x).y_BLD)


def test_a_dropped_token_still_meets_the_shared_expert():
    block = routed({"n_experts": 4, "d_shared": 6}, capacity_factor=0.01).train()
    x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(0))
    y, _, aux = block(x)
    shared = block.shared(x)
    untouched = (y == shared).all(-1).sum().item()
    assert untouched == round(aux.stats["dropped"].item() * 40)
    assert untouched >= 36  # one slot for each of four experts


@pytest.mark.parametrize(
    ("tokens", "factor", "top_k", "n_experts", "slots"),
    [
        (64 * 1024, 1.0, 1, 32, 2048),
        (64 * 1024, 1.0, 1, 42, 1560),
        (100, 1.25, 2, 8, 31),
        (3, 1.0, 1, 8, 1),
        (4, 9, 1, 2, 4),
    ],
)
def test_capacity_is_the_papers_floor(tokens, factor, top_k, n_experts, slots):
    shape = Moe.Config(d_model=8, n_experts=n_experts, top_k=top_k, router="top_k").shape
    assert shape.capacity(tokens, factor) == slots


def test_balanced_routing_costs_exactly_the_weight():
    block = routed({"n_experts": 4, "d_model": 4}, load_balance_weight=0.01).train()
    with torch.no_grad():
        block.routed.router.weight.copy_(torch.eye(4))
    x = torch.eye(4).repeat(6, 1)[None]  # six tokens for each expert, the softmax symmetric
    _, _, aux = block(x)
    assert aux.losses["load_balance"].item() == pytest.approx(0.01, rel=1e-6)
    assert aux.stats["load_E"].tolist() == [0.25] * 4


def test_losses_and_statistics_worked_out_by_hand():
    block = routed({"n_experts": 2, "d_model": 2}, load_balance_weight=0.5, router_z_weight=0.1).train()
    with torch.no_grad():
        block.routed.router.weight.copy_(torch.eye(2))
    log = math.log
    x = torch.tensor([[[log(3.0), 0.0], [log(4.0), 0.0], [0.0, log(9.0)]]])
    _, _, aux = block(x)  # softmax (3/4, 1/4), (4/5, 1/5), (1/10, 9/10); capacity floor(3/2) = 1
    mean_0 = (3 / 4 + 4 / 5 + 1 / 10) / 3
    balance = 2 * (2 / 3 * mean_0 + 1 / 3 * (1 - mean_0))
    assert aux.losses["load_balance"].item() == pytest.approx(0.5 * balance, rel=1e-6)
    z = (log(4) ** 2 + log(5) ** 2 + log(10) ** 2) / 3
    assert aux.losses["router_z"].item() == pytest.approx(0.1 * z, rel=1e-6)
    entropy = -sum(p * log(p) for p in (3 / 4, 1 / 4, 4 / 5, 1 / 5, 1 / 10, 9 / 10)) / 3
    assert aux.stats["router_entropy"].item() == pytest.approx(entropy, rel=1e-5)
    assert aux.stats["load_E"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert aux.stats["dropped"].item() == pytest.approx(1 / 3)
    assert not any(value.requires_grad for value in aux.stats.values())
    assert aux.losses["load_balance"].requires_grad


def test_losses_that_weigh_nothing_are_not_reported():
    block = routed({"n_experts": 4}, load_balance_weight=0.0)
    assert dict(block(torch.randn(1, 5, 8)).aux.losses) == {}


def test_switch_is_the_chosen_expert_times_its_probability():
    block = routed({"n_experts": 5, "d_expert": 6}).eval()
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(2))
    p = (x @ block.routed.router.weight.T).softmax(-1)
    up, down = block.routed.experts.up_proj, block.routed.experts.down_proj
    every = torch.einsum("ebld,edf->eblf", (x[None] @ up[:, None]).relu(), down).permute(1, 2, 0, 3)
    value, chosen = p.max(-1)
    expected = every.gather(2, chosen[..., None, None].expand(-1, -1, 1, 8)).squeeze(2) * value[..., None]
    torch.testing.assert_close(block(x).y_BLD, expected, rtol=1e-5, atol=1e-5)


def test_switch_is_top_k_of_one():
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(2))
    switch, top_1 = routed({"n_experts": 5}), routed({"n_experts": 5, "router": "top_k", "top_k": 1})
    assert torch.equal(switch(x).y_BLD, top_1(x).y_BLD)
    assert switch.config.canonical() == top_1.config.canonical()


def test_top_k_renormalized_equals_mixtral_of_transformers():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    settings = mixtral.MixtralConfig(
        hidden_size=16, intermediate_size=20, num_local_experts=6, num_experts_per_tok=2, hidden_act="silu"
    )
    settings._experts_implementation = "eager"
    theirs = mixtral.MixtralSparseMoeBlock(settings).eval()
    ours = routed(
        {"d_model": 16, "d_expert": 20, "n_experts": 6, "top_k": 2, "router": "top_k", "renormalize": True},
        gated=True,
        activation="silu",
    ).eval()
    experts = ours.routed.experts
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.routed.router.weight)
        theirs.experts.gate_up_proj.copy_(experts.gate_up_proj.transpose(1, 2))
        theirs.experts.down_proj.copy_(experts.down_proj.transpose(1, 2))
        x = torch.randn(3, 11, 16, generator=torch.Generator().manual_seed(0))
        expected = theirs(x.clone())
        torch.testing.assert_close(ours(x).y_BLD, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_expert_choice_is_balanced_and_cannot_generate():
    block = routed({"n_experts": 4, "router": "expert_choice"}, capacity_factor=2.0).train()
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(3))
    _, state, aux = block(x)
    assert state is None
    assert aux.stats["load_E"].tolist() == [0.25] * 4
    assert 0.0 <= aux.stats["dropped"].item() < 1.0
    assert "load_balance" not in aux.losses
    assert not block.config.causal
    assert Moe.Config(d_model=8).causal
    words = "not causal .* cannot generate; use router='switch'"
    with pytest.raises(ConfigError, match=words):
        block.init_state(1, device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(ConfigError, match=words):
        block(x, ())


def test_expert_choice_gives_each_expert_its_most_certain_tokens():
    block = routed({"n_experts": 2, "d_model": 2, "router": "expert_choice"}, capacity_factor=1.0).eval()
    with torch.no_grad():
        block.routed.router.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    x = torch.tensor([[[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]]])
    y, _, aux = block(x)  # expert 0 takes tokens 0 and 1, expert 1 the tokens least certain of expert 0
    assert aux.stats["dropped"].item() == 0.0
    p = x.softmax(-1)[0]
    up, down = block.routed.experts.up_proj, block.routed.experts.down_proj
    expected = [(x[0, n] @ up[e]).relu() @ down[e] * p[n, e] for n, e in ((0, 0), (1, 0), (2, 1), (3, 1))]
    torch.testing.assert_close(y[0], torch.stack(expected))


def test_router_computes_in_float32_under_autocast():
    block = routed({"n_experts": 4}).eval()
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(3))
    plain = block(x).aux
    with torch.autocast("cpu", torch.bfloat16):
        reduced = block(x).aux
    assert torch.equal(plain.losses["load_balance"], reduced.losses["load_balance"])
    assert torch.equal(plain.stats["router_entropy"], reduced.stats["router_entropy"])


def test_one_token_and_fewer_tokens_than_experts():
    for training in (True, False):
        block = routed({"n_experts": 16, "router": "top_k", "top_k": 3}).train(training)
        for batch in (1, 2):
            y, _, aux = block(torch.randn(batch, 1, 8, generator=torch.Generator().manual_seed(batch)))
            assert torch.isfinite(y).all()
            assert aux.stats["load_E"].sum().item() == pytest.approx(1.0)


def test_initial_weights_have_the_papers_spread():
    torch.manual_seed(0)
    block = Moe(Moe.Config(d_model=512, n_experts=32, d_expert=64))
    assert block.routed.router.weight.std().item() == pytest.approx(math.sqrt(0.1 / 512), rel=0.02)
    assert block.routed.experts.up_proj.std().item() == pytest.approx(math.sqrt(0.1 / 512), rel=0.02)
    assert block.routed.experts.down_proj.std().item() == pytest.approx(math.sqrt(0.1 / (32 * 64)), rel=0.02)
    alone = Moe(Moe.Config(d_model=512, n_experts=2, d_expert=64, init_over_experts=False))
    assert alone.routed.experts.down_proj.std().item() == pytest.approx(math.sqrt(0.1 / 64), rel=0.02)


SIGMOID = {"router": "top_k", "scores": "sigmoid", "correction_bias": True, "capacity_factor": None}


def with_identity(**fields):
    """A block whose router's logits are the token itself."""
    block = routed({"d_model": fields["n_experts"], "d_expert": 3, **SIGMOID, **fields})
    with torch.no_grad():
        block.routed.router.weight.copy_(torch.eye(fields["n_experts"]))
    return block


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_tokens_choose_by_score_plus_bias_and_weigh_by_score():
    block = with_identity(n_experts=4, top_k=2)
    block.routed.correction_bias.copy_(torch.tensor([-1.0, 0.0, 0.0, 0.5]))
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).sigmoid()
    gate, expert = block.routed._choice(scores)  # plus the bias: -0.12, 0.73, 0.5, 0.77
    assert expert.tolist() == [[3, 1]]
    assert gate.tolist()[0] == pytest.approx([sigmoid(-1), sigmoid(1)])
    block = with_identity(n_experts=4, top_k=2, renormalize=True, routed_scale=2.5)
    gate, expert = block.routed._choice(scores)
    total = sigmoid(2) + sigmoid(1)
    assert expert.tolist() == [[0, 1]]
    assert gate.tolist()[0] == pytest.approx([2.5 * sigmoid(2) / total, 2.5 * sigmoid(1) / total])


def test_tokens_choose_within_the_groups_whose_two_best_experts_are_best():
    block = with_identity(n_experts=6, top_k=2, expert_groups=3, top_groups=1)
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.8, 0.2]])  # groups: 1.0, 1.1, 1.0
    assert block.routed._choice(scores)[1].tolist() == [[2, 3]]
    block.routed.correction_bias.copy_(torch.tensor([0.0, 0.2, 0.0, 0.0, 0.0, 0.0]))  # groups: 1.2, 1.1, 1.0
    assert block.routed._choice(scores)[1].tolist() == [[0, 1]]
    free = with_identity(n_experts=6, top_k=2, expert_groups=3, top_groups=3)
    assert free.routed._choice(scores)[1].tolist() == [[0, 4]]


def test_the_bias_rises_for_experts_chosen_less_than_the_mean_and_falls_for_the_others():
    block = with_identity(n_experts=4, top_k=2, bias_update_rate=0.25)
    block.after_step({"chosen_E": torch.tensor([7, 1, 4, 4])})
    assert block.routed.correction_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    block.after_step({"chosen_E": torch.tensor([5, 5, 1, 2])})  # the mean is 3.25
    assert block.routed.correction_bias.tolist() == [-0.5, 0.0, 0.25, 0.25]
    block.after_step({})
    assert block.routed.correction_bias.tolist() == [-0.5, 0.0, 0.25, 0.25]


def test_step_after_step_the_bias_evens_the_load():
    block = with_identity(n_experts=4, top_k=1, bias_update_rate=0.02)
    x = torch.randn(1, 400, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([2.0, 0.0, 0.0, -1.0])
    before = block(x).aux.stats["load_E"]
    for _ in range(50):
        block.after_step(block(x).aux.stats)
    after = block(x).aux.stats["load_E"]
    assert before.max() > 0.7
    assert after.max() < 0.3
    assert block.routed.correction_bias.argmin() == 0
    assert block.routed.correction_bias.argmax() == 3


@pytest.mark.parametrize("training", [True, False])
def test_a_pass_counts_choices_and_leaves_the_bias_alone(training):
    block = with_identity(n_experts=4, top_k=2).train(training)
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    chosen = block(x).aux.stats["chosen_E"]
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == x.flatten(0, 1).topk(2).indices.flatten().bincount(minlength=4).tolist()
    assert block.routed.correction_bias.tolist() == [0.0] * 4
    assert "chosen_E" not in routed({"n_experts": 4})(torch.randn(1, 5, 8)).aux.stats


def test_the_bias_is_no_parameter_but_saved_and_float32():
    block = with_identity(n_experts=4, top_k=2).bfloat16()
    block.after_step({"chosen_E": torch.tensor([7, 1, 4, 4])})
    assert "routed.correction_bias" not in dict(block.named_parameters())
    assert block.state_dict()["routed.correction_bias"].dtype == torch.float32
    other = with_identity(n_experts=4, top_k=2).bfloat16()
    other.load_state_dict(block.state_dict())
    assert torch.equal(other.routed.correction_bias, torch.tensor([-1e-3, 1e-3, 0.0, 0.0]))
    assert "routed.correction_bias" not in routed({"n_experts": 4}).state_dict()


def test_sigmoid_scores_balance_and_entropy_are_of_their_shares():
    block = with_identity(n_experts=2, top_k=1, load_balance_weight=0.5).train()
    log = math.log
    x = torch.tensor([[[log(3.0), log(1 / 3)], [0.0, 0.0]]])  # scores (3/4, 1/4), (1/2, 1/2)
    aux = block(x).aux
    balance = 2 * (aux.stats["load_E"] @ torch.tensor([5 / 8, 3 / 8])).item()
    assert aux.losses["load_balance"].item() == pytest.approx(0.5 * balance)
    entropy = (log(4) - 3 / 4 * log(3) + log(2)) / 2
    assert aux.stats["router_entropy"].item() == pytest.approx(entropy, rel=1e-5)


def test_the_shared_expert_is_gated_by_a_sigmoid_of_the_token():
    block = routed({"n_experts": 4, "d_shared": 6}, shared_gate=True).eval()
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    gate = (x @ block.shared_gate.weight[0]).sigmoid()[..., None]
    torch.testing.assert_close(block(x).y_BLD, block.routed(x)[0] + gate * block.shared(x))


def test_options_without_effect_are_no_part_of_what_a_block_is():
    plain = Moe.Config(d_model=8).canonical()
    for idle in ({"shared_gate": True}, {"bias_update_rate": 0.5}, {"expert_groups": 4, "top_groups": 4}):
        assert Moe.Config(d_model=8, **idle).canonical() == plain
    assert Moe.Config(d_model=8, d_shared=4, shared_gate=True).canonical()["shared_gate"] is True


@pytest.mark.parametrize(
    ("fields", "field", "got", "words"),
    [
        ({"expert_groups": 3}, "expert_groups", 3, "n_experts=8"),
        ({"expert_groups": 4, "top_groups": 5}, "top_groups", 5, "expert_groups=4"),
        ({"expert_groups": 4, "top_k": 3, "router": "top_k"}, "top_k", 3, "top_groups=1"),
        ({"router": "expert_choice", "scores": "sigmoid"}, "scores", "sigmoid", "router='expert_choice'"),
        ({"router": "expert_choice", "correction_bias": True}, "correction_bias", True, "router='expert_choice'"),
        ({"router": "expert_choice", "expert_groups": 2}, "expert_groups", 2, "router='expert_choice'"),
        ({"scores": "tanh"}, "scores", "tanh", "softmax"),
    ],
)
def test_routers_that_cannot_be_are_refused_naming_both_fields(fields, field, got, words):
    with pytest.raises(ConfigError) as refused:
        Moe.Config(d_model=8, **fields)
    assert (refused.value.field.rpartition(".")[2], refused.value.got) == (field, got)
    assert refused.value.allowed is not None
    assert words in str(refused.value)
