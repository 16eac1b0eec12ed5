"""HybridLM: declared cost against real modules, one call for training, prefill and generation, seeds."""

import copy
import importlib
import io
import math
import os
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnas.arch.arch import Arch
from hybridnas.arch.decode import Decoder
from hybridnas.arch.model import HybridLM, sample
from hybridnas.errors import ConfigError, KernelUnavailableError, TrainingError
from hybridnas.hardware import Impl
from hybridnas.kernels.mamba_step import native
from hybridnas.registry import BLOCKS

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


@pytest.mark.parametrize("letter", BLOCKS)
@pytest.mark.parametrize("final", [True, False])
def test_a_tied_model_starts_at_a_blind_guess_at_any_width(letter, final):
    read = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    for d_model in (64, 512):
        arch = Arch.from_pattern(f"M{letter}", d_model=d_model, vocab_size=256, tie_embeddings=True, final_norm=final)
        with torch.no_grad():
            loss = HybridLM(arch, seed=0).eval()(read, labels=read).loss
        assert loss.item() == pytest.approx(math.log(256), abs=0.2)


WEIGHTS = {  # sums over all weights, of the version before the embedding of tied models changed
    ("MEAF", 0): -14.147880,
    ("MEAF", 7): 2.192709,
    ("Nx2", 0): -17.726704,
    ("[M,A]F@s F@s", 0): 9.653564,
    ("M{inner_moe=gate,inner_experts=3}M{selective=none}", 7): -8.940073,
    ("E{router=top_k,top_k=2,d_shared=8,bias=true}A{n_heads=4,n_kv_heads=2,bias=true}", 0): 9.073132,
}


@pytest.mark.parametrize(("pattern", "seed"), WEIGHTS)
def test_a_seed_draws_the_weights_that_it_always_drew(pattern, seed):
    fields = {"n_experts": 4} if "E" in pattern else {}
    if "@" in pattern:
        fields = {"norm": "rmsnorm", "final_norm": True}
    model = HybridLM(Arch.from_pattern(pattern, d_model=16, vocab_size=32, **fields), seed=seed)
    found = 0.0
    for number, (_, tensor) in enumerate(sorted(model.state_dict().items())):
        places = torch.arange(tensor.numel(), dtype=torch.float64)  # processors differ in the last digit of a weight
        found += float((tensor.double().flatten() * torch.cos(places + number)).sum())
    assert found == pytest.approx(WEIGHTS[pattern, seed], abs=1e-4)


def test_the_loss_is_the_shifted_cross_entropy_and_nothing_else():
    model = HybridLM(small("ME"), seed=0)
    labels = ids(seed=4)
    labels[0, 3:9] = -100
    out = model(ids(), labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert out.aux.losses["load_balance"] > 0
    out.loss.backward()
    assert model(ids()).loss is None
    assert model(ids(), labels=torch.full_like(labels, -100)).loss == 0
    assert model(ids(2, 1), labels=ids(2, 1)).loss == 0


def test_the_loss_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    loss = importlib.import_module("transformers.loss.loss_utils").ForCausalLMLoss
    assert transformers
    model, labels = HybridLM(small("MA"), seed=0), ids(seed=4)
    labels[1, :5] = -100
    out = model(ids(), labels=labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels, vocab_size=V))


@pytest.mark.parametrize(
    ("given", "field", "got"),
    [
        ([[1, 2]], "ids", "list"),
        (torch.zeros(3, dtype=torch.long), "ids", "(3,) torch.int64"),
        (torch.zeros(1, 3), "ids", "(1, 3) torch.float32"),
        (torch.zeros(1, 3, dtype=torch.bool), "ids", "(1, 3) torch.bool"),
        (torch.tensor([[3, V + 4]]), "ids", (3, V + 4)),
        (torch.tensor([[3, -1]]), "ids", (-1, 3)),
    ],
)
def test_ids_that_are_none_are_refused_in_words(given, field, got):
    with pytest.raises(ConfigError) as caught:
        HybridLM(small("M"), seed=0)(given)
    assert (caught.value.field, caught.value.got) == (field, got)
    assert "0 to 36" in str(caught.value)


def test_labels_of_another_shape_are_refused_in_words():
    with pytest.raises(ConfigError) as caught:
        HybridLM(small("M"), seed=0)(ids(2, 5), labels=ids(2, 4))
    assert (caught.value.field, caught.value.got, caught.value.allowed) == ("labels", (2, 4), (2, 5))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [*BLOCKS, "[M,E]", MIXED])
def test_a_model_exports_with_its_state_and_auxiliaries(pattern):
    model = HybridLM(Arch.from_pattern(pattern, d_model=16, vocab_size=V), seed=0).eval()
    program = torch.export.export(model, (ids(1, 16),))
    with torch.no_grad():
        got, expected = program.module()(ids(1, 16)), model(ids(1, 16))
        torch.testing.assert_close(got.logits, expected.logits)
        assert got.aux.stats.keys() == expected.aux.stats.keys()
        state = model(ids(1, 4), state=model.init_state(1)).state
        following = torch.export.export(model, (ids(1, 5),), {"state": state}).module()(ids(1, 5), state=state)
        torch.testing.assert_close(following.logits, model(ids(1, 5), state=state).logits)


@pytest.mark.slow
def test_an_exported_program_is_saved_and_loaded():
    model = HybridLM(Arch.from_pattern("".join(BLOCKS), d_model=16, vocab_size=V), seed=0).eval()
    state = model.init_state(1)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (ids(1, 6),), {"state": state}), file)
    file.seek(0)
    with torch.serialization.safe_globals(list({type(own) for own in state})):  # torch stores the example's state too
        again = torch.export.load(file).module()
    got, expected = again(ids(1, 6), state=state), model(ids(1, 6), state=state)
    torch.testing.assert_close(got.logits, expected.logits)
    assert [type(new) for new in got.state] == [type(old) for old in expected.state]


@pytest.mark.slow
@pytest.mark.parametrize("letters", ["A", "F", "E"])
def test_an_exported_program_without_a_scan_takes_other_lengths(letters):
    model = HybridLM(Arch.from_pattern(letters, d_model=16, vocab_size=V), seed=0).eval()
    lengths = {"ids": {1: torch.export.Dim("L", min=8, max=256)}}
    program = torch.export.export(model, (ids(1, 16),), dynamic_shapes=lengths).module()
    for length in (8, 77):
        torch.testing.assert_close(program(ids(1, length)).logits, model(ids(1, length)).logits)


@pytest.mark.parametrize("pattern", [*BLOCKS, "[M,E]"])
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_a_batch_without_tokens_gives_logits_without_tokens(pattern, batch, length):
    model = HybridLM(Arch.from_pattern(pattern, d_model=32, vocab_size=V), seed=0)
    out = model(ids(batch, length), labels=ids(batch, length))
    assert out.logits.shape == (batch, length, V)
    assert out.loss == 0
    (out.loss + sum(out.aux.losses.values())).backward()


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_a_named_implementation_reaches_every_block_and_norm(norm):
    model = HybridLM(small(MIXED, norm=norm, final_norm=True), impl="reference", seed=3)
    assert {module.impl for module in model.modules() if hasattr(module, "impl")} == {Impl.REFERENCE}
    assert set(model.implementations()["norm"].values()) == {"reference: step by step"}
    fast = HybridLM(model.arch, seed=3)
    for each in (model, fast):
        each.eval()
    torch.testing.assert_close(model(ids(), labels=ids()).loss, fast(ids(), labels=ids()).loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.generate(ids(), 5, temperature=0), fast.generate(ids(), 5, temperature=0))
    assert all(words for ops in fast.implementations().values() for words in ops.values())


def test_a_narrow_model_keeps_float32_parameters_and_decodes_as_it_reads():
    model = HybridLM(Arch.from_pattern("MNAF", d_model=32, vocab_size=V), seed=0).bfloat16().eval()
    kept = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {"A_log", "D", "dt_bias"} <= kept
    with torch.no_grad():
        whole = model(ids()).logits
        state, decode = model.init_state(2), None
        decode = Decoder(model, state)
        stepped = torch.stack([decode(ids()[:, t]) for t in range(13)], dim=1)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(stepped, whole, rtol=0.05, atol=0.02)


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


def test_sampling_repeats_with_its_seed_and_stops_when_asked():
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


def nucleus(probs, top_p):
    """Return the distribution of top-p sampling, by the definition: the shortest prefix of the sorted tokens."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += probs[i]
        if total >= top_p:
            break
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


@pytest.mark.parametrize("top_p", [0.05, 0.45, 0.55, 0.85, 0.999, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_top_p_draws_from_the_nucleus_as_often_as_it_should(top_p, temperature):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.9, -3.0])
    expected = torch.tensor(nucleus((logits.double() / temperature).softmax(-1).tolist(), top_p))
    n = 40_000
    drawn = sample(logits.repeat(n, 1), temperature, None, torch.Generator().manual_seed(0), top_p=top_p)
    share = drawn.bincount(minlength=6) / n
    assert set(drawn.tolist()) == set(expected.nonzero().flatten().tolist())
    assert ((share - expected).abs() <= 4.5 * (expected * (1 - expected) / n).sqrt()).all()


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([[0.0, 0.1, 0.2, 0.3]]).repeat(300, 1)
    generator = torch.Generator().manual_seed(0)
    # of the two likeliest, the likelier has 0.525: enough for 0.5, not for 0.55
    assert set(sample(logits, 1.0, 2, generator, top_p=0.5).tolist()) == {3}
    assert set(sample(logits, 1.0, 2, generator, top_p=0.55).tolist()) == {2, 3}


def test_a_row_that_ended_is_filled_up_and_decoding_stops_when_all_have():
    model = HybridLM(small("MA"), seed=4)
    free = model.generate(ids(3, 4), 30, seed=5)
    ends = [int(free[0, 6]), int(free[1, 9])]
    firsts = [next((t for t in range(4, 34) if int(row[t]) in ends), 33) for row in free]
    for pad in (None, 7):
        seen = []
        made = model.generate(ids(3, 4), 30, seed=5, eos_token_id=ends, pad_token_id=pad, on_token=seen.append)
        assert made.shape[1] == max(firsts) + 1
        for row, expected, first in zip(made, free, firsts, strict=True):
            assert torch.equal(row[: first + 1], expected[: first + 1])
            assert set(row[first + 1 :].tolist()) <= {ends[0] if pad is None else pad}
        assert torch.equal(torch.stack(seen, dim=1), made[:, 4:])
    one = model.generate(ids(3, 4)[:1], 30, seed=5, temperature=0, eos_token_id=int(free[0, 6]))
    assert one.shape[1] <= 34


def test_a_tied_model_takes_no_weights_that_are_not_tied():
    tied, untied = (HybridLM(small("M", tie_embeddings=tie), seed=0) for tie in (True, False))
    with pytest.raises(RuntimeError, match=r"embedding\.weight and head\.weight differ"):
        tied.load_state_dict(untied.state_dict())
    for copied in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied))):
        copied.load_state_dict(HybridLM(tied.arch, seed=1).state_dict())
        with pytest.raises(RuntimeError, match="differ"):
            copied.load_state_dict(untied.state_dict())


def test_every_implementation_computes_the_same_model_or_is_refused():
    arch = small(MIXED + "N", norm="rmsnorm")
    with torch.no_grad():
        expected = HybridLM(arch, seed=3).eval()(ids(), labels=ids())
        for impl in ("reference", "torch", *(["native"] if native.available() else [])):
            model = HybridLM(arch, impl=impl, seed=3).eval()
            out = model(ids(), labels=ids())
            torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(out.loss, expected.loss)
            assert torch.equal(
                model.generate(ids(), 6, temperature=0), HybridLM(arch, seed=3).generate(ids(), 6, temperature=0)
            )
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            with pytest.raises(KernelUnavailableError) as caught:
                HybridLM(arch, impl="triton", seed=3)(ids())
            assert caught.value.field == "impl"


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16])
def test_a_model_built_under_a_narrow_default_dtype_keeps_its_float32_parameters(default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        model = HybridLM(Arch.from_pattern("MENA", d_model=32, vocab_size=V), seed=0).eval()
    finally:
        torch.set_default_dtype(before)
    for block in model.blocks():
        for name, parameter in block.named_parameters():
            assert parameter.dtype == (torch.float32 if name in block.float32 else default), name
    assert torch.isfinite(model(ids()).logits).all()


def test_ids_of_another_integer_type_generate_the_same():
    model = HybridLM(small("MA"), seed=4)
    made = model.generate(ids(2, 4).int(), 5, seed=1, eos_token_id=0)
    assert made.dtype == torch.int32
    assert torch.equal(made.long(), model.generate(ids(2, 4), 5, seed=1, eos_token_id=0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_numbers_are_one_clear_error(temperature):
    model = HybridLM(small("MF"), seed=4)
    with torch.no_grad():
        model.layers[0].norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError) as caught:
        model.generate(ids(1, 3), 4, temperature=temperature)
    assert caught.value.field == "logits"
    assert model.training


def test_generation_leaves_every_module_in_its_own_mode():
    model = HybridLM(small("MF"), seed=4).train()
    model.layers[1].eval()
    model.generate(ids(1, 3), 2)
    assert model.training
    assert model.layers[0].training
    assert not any(module.training for module in model.layers[1].modules())


def test_a_seed_that_torch_does_not_take_is_refused():
    for seed in (-1, 2**63):
        with pytest.raises(ConfigError) as caught:
            HybridLM(small("M"), seed=seed)
        assert (caught.value.field, caught.value.got) == ("seed", seed)


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
