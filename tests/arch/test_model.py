"""HybridLM: declared cost against real modules, one call for training, prefill and generation, seeds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnas.arch.arch import Arch
from hybridnas.arch.model import HybridLM, sample
from hybridnas.errors import ConfigError

V = 37
MIXED = "M[M,E]A@sFA@s"


def small(pattern, **fields):
    return Arch.from_pattern(
        pattern,
        **{"d_model": 16, "vocab_size": V, "d_state": 4, **fields}
        if "M" in pattern
        else {"d_model": 16, "vocab_size": V, **fields},
    )


def ids(batch=2, length=13, seed=1):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def numel(model):
    return sum(p.numel() for p in model.parameters())


LAYERS = [
    "M",
    "A",
    "F",
    "E",
    "[M,E]",
    "[A,MF]",
    "A@s",
    "F@t",
    "[A@s,E]",
    "E{n_experts=3}",
    "E{d_shared=8}",
    "E{gated=true,bias=true}",
    "F{gated=true,bias=false}",
    "A{n_heads=4,n_kv_heads=2}",
    "M{expand=1.5,bias=true}",
    "M{d_conv=2,conv_bias=false}",
]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(LAYERS), min_size=1, max_size=6).map("".join),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["layernorm", "rmsnorm"]),
    st.sampled_from([8, 24, 32]),
)
def test_declared_parameters_equal_the_built_module_for_any_architecture(pattern, tied, final, norm, d_model):
    arch = Arch.from_pattern(pattern, d_model=d_model, vocab_size=V, tie_embeddings=tied, final_norm=final, norm=norm)
    model = HybridLM(arch, device="meta")
    cost = arch.cost()
    assert numel(model) == cost.params + cost.embedding_params
    assert all(p.device.type == "meta" for p in model.parameters())


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4).map("".join))
def test_any_architecture_runs_and_learns_in_every_weight(pattern):
    model = HybridLM(Arch.from_pattern(pattern, d_model=16, vocab_size=V), seed=0)
    output = model(ids())
    assert output.logits.shape == (2, 13, V)
    assert output.state is None
    (output.logits.float().logsumexp(-1).mean() + sum(output.aux.losses.values())).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("pattern", [MIXED, "(ME)x2", "A{n_heads=4,n_kv_heads=2}F", "[MF,A]M@tM@t"])
def test_forward_is_chunked_prefill_is_token_by_token(pattern):
    model = HybridLM(small(pattern), seed=3).eval()
    x_BL = ids()
    whole = model(x_BL).logits
    for cuts in ([5, 1, 7], [1] * 13):
        state, pieces = model.init_state(2), []
        for piece in x_BL.split(cuts, dim=1):
            output = model(piece, state=state)
            state = output.state
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


def test_logits_do_not_depend_on_what_follows():
    model = HybridLM(small(MIXED), seed=3).eval()
    x_BL = ids()
    changed = x_BL.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % V
    torch.testing.assert_close(model(x_BL).logits[:, :8], model(changed).logits[:, :8], rtol=1e-5, atol=1e-6)


def test_each_layer_adds_its_block_of_the_normed_stream():
    model = HybridLM(small("MF"), seed=0).eval()
    x_BLD = model.embedding(ids())
    for layer, block in zip(model.layers, model.blocks(), strict=True):
        x_BLD = x_BLD + block(layer.norm(x_BLD)).y_BLD
    torch.testing.assert_close(model(ids()).logits, model.head(x_BLD))


def test_a_parallel_layer_sums_branches_of_one_norm():
    model = HybridLM(small("[MF,A]"), seed=0).eval()
    x_BLD = model.embedding(ids())
    normed = model.layers[0].norm(x_BLD)
    attention, mamba, mlp = model.blocks()
    summed = x_BLD + attention(normed).y_BLD + mlp(mamba(normed).y_BLD).y_BLD
    torch.testing.assert_close(model(ids()).logits, model.head(summed))


def test_a_shared_block_is_one_module_with_a_state_for_each_use():
    model = HybridLM(small("A@sMA@s"), seed=0)
    first, _, last = model.blocks()
    assert first is last
    assert len(model.init_state(1)) == 3


def test_tied_embeddings_are_one_tensor():
    model = HybridLM(small("M", tie_embeddings=True), seed=0)
    assert model.head.weight is model.embedding.weight


def test_the_seed_alone_decides_the_weights():
    arch = small(MIXED)
    torch.manual_seed(1)
    left = HybridLM(arch, seed=5).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    right, other = HybridLM(arch, seed=5).state_dict(), HybridLM(arch, seed=6).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(left[k], right[k]) for k in left)
    assert any(not torch.equal(left[k], other[k]) for k in left)


def test_auxiliary_losses_are_the_mean_over_the_layers_that_report_them():
    model = HybridLM(small("(ME)x3"), seed=0)
    auxes = []
    for block in model.blocks():
        block.register_forward_hook(lambda _m, _i, output: auxes.append(output.aux))
    output = model(ids())
    losses = [aux.losses["load_balance"] for aux in auxes if "load_balance" in aux.losses]
    assert len(losses) == 3
    torch.testing.assert_close(output.aux.losses["load_balance"], torch.stack(losses).mean())
    assert {name.split(".")[0] for name in output.aux.stats} == {"layer01", "layer03", "layer05"}
    assert "layer01.E.dropped" in output.aux.stats


def test_statistics_of_parallel_branches_do_not_overwrite_each_other():
    stats = HybridLM(small("[E,E,M]"), seed=0)(ids()).aux.stats
    assert len([name for name in stats if name.endswith(".dropped")]) == 2


@pytest.mark.parametrize("pattern", [MIXED, "(ME)x2"])
def test_greedy_generation_equals_recomputing_the_argmax(pattern):
    model = HybridLM(small(pattern), seed=4)
    made = model.generate(ids(2, 5), 6, temperature=0, prefill_chunk=2)
    assert model.training
    model.eval()
    expected = ids(2, 5)
    for _ in range(6):
        expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(made, expected)


def test_sampling_repeats_with_its_seed_and_stops_when_told():
    model = HybridLM(small("ME"), seed=4)
    assert torch.equal(model.generate(ids(2, 3), 8, seed=1), model.generate(ids(2, 3), 8, seed=1))
    assert not torch.equal(model.generate(ids(2, 3), 8, seed=1), model.generate(ids(2, 3), 8, seed=2))
    seen = []
    made = model.generate(ids(1, 3), 8, on_token=lambda t: seen.append(int(t)) or len(seen) == 3)
    assert made.shape == (1, 6)
    assert made[0, 3:].tolist() == seen
    assert torch.equal(model.generate(ids(2, 3), 0), ids(2, 3))


def test_top_k_draws_from_the_likeliest_alone():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).repeat(200, 1)
    drawn = sample(logits, 1.0, 2, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {1, 2}
    assert set(sample(logits, 0.0, None, torch.Generator()).tolist()) == {1}


def test_a_model_that_is_not_causal_refuses_to_generate():
    model = HybridLM(small("ME", router="expert_choice"), seed=0)
    assert model(ids()).logits.shape == (2, 13, V)
    with pytest.raises(ConfigError, match=r"layer 1 \(E moe\) is not causal, .* cannot generate"):
        model.generate(ids(1, 3), 2)
    with pytest.raises(ConfigError, match="is not causal"):
        model.init_state(1)


@pytest.mark.parametrize(
    ("arguments", "field", "got"),
    [
        ({"ids": torch.zeros(1, 0, dtype=torch.long)}, "ids", (1, 0)),
        ({"ids": torch.zeros(3, dtype=torch.long)}, "ids", "(3,) torch.int64"),
        ({"ids": torch.zeros(1, 3)}, "ids", "(1, 3) torch.float32"),
        ({"ids": torch.tensor([[0, V]])}, "ids", (0, V)),
        ({"max_new_tokens": -1}, "max_new_tokens", -1),
        ({"temperature": -0.5}, "temperature", -0.5),
        ({"top_k": 0}, "top_k", 0),
        ({"top_p": 0.0}, "top_p", 0.0),
        ({"top_p": 1.5}, "top_p", 1.5),
        ({"eos_token_id": V}, "eos_token_id", V),
        ({"eos_token_id": [1, -1]}, "eos_token_id", -1),
        ({"pad_token_id": V}, "pad_token_id", V),
        ({"seed": 2**63}, "seed", 2**63),
        ({"seed": -1}, "seed", -1),
    ],
)
def test_generation_refuses_settings_that_make_no_sense(arguments, field, got):
    with pytest.raises(ConfigError) as caught:
        HybridLM(small("M"), seed=0).generate(**{"ids": ids(1, 2), "max_new_tokens": 1, **arguments})
    assert (caught.value.field, caught.value.got) == (field, got)
    assert caught.value.allowed
