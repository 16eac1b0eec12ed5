"""What stands around the blocks: norm positions, multipliers, Canon layers, meta tokens, the head's softcap."""

import copy
import io
import json

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hybridnas.arch.arch import Arch
from hybridnas.arch.decode import Decoder, _Forward
from hybridnas.arch.long import last_logits, prefill
from hybridnas.arch.match import match
from hybridnas.arch.model import HybridLM
from hybridnas.data.source import Batch
from hybridnas.draw.table import describe_layers
from hybridnas.errors import ConfigError
from hybridnas.hardware import Impl
from hybridnas.layers.norms import RMSNorm, ZeroCenteredRMSNorm, one_row
from hybridnas.registry import BLOCKS
from hybridnas.train.objective import Objective
from hybridnas.train.optim import no_decay_names

V = 23
PATTERN = "MNAF[MF,E]A@sA@s"
OPTIONS = {
    "post": {"norm_position": "post"},
    "sandwich": {"norm_position": "sandwich", "final_norm": True},
    "stream": {"norm_position": "stream", "stream_multiplier": 1.5},
    "of letters": {"A": {"norm_position": "post"}, "F": {"in_multiplier": 0.5}, "M": {"canon": 2}},
    "of branches": {"M": {"norm_position": "sandwich"}, "E": {"norm_position": "post", "out_multiplier": 0.5}},
    "multipliers": {"in_multiplier": 0.7, "out_multiplier": 0.3, "embedding_multiplier": 4.0, "logits_multiplier": 0.2},
    "zero-centered": {"norm": "rmsnorm_zero", "norm_position": "sandwich"},
    "canon": {"canon": 4},
    "one tap": {"canon": 1},
    "meta": {"n_meta_tokens": 3},
    "softcap": {"final_softcap": 0.05},
    "norm of the embedding": {"embedding_norm": True, "norm": "rmsnorm"},
    "all": {
        "norm": "rmsnorm_zero",
        "norm_position": "sandwich",
        "canon": 3,
        "n_meta_tokens": 2,
        "final_softcap": 0.5,
        "final_norm": True,
        "embedding_norm": True,
        "tie_embeddings": True,
        "embedding_multiplier": 4.0,
        "logits_multiplier": 0.5,
        "out_multiplier": 0.5,
        "stream_multiplier": 1.2,
    },
}
every_option = pytest.mark.parametrize("name", OPTIONS)


def arch_of(pattern=PATTERN, **fields):
    if "E" in pattern:
        fields["E"] = {"n_experts": 3, "d_expert": 8, **fields.get("E", {})}
    return Arch.from_pattern(pattern, d_model=16, vocab_size=V, **fields)


def model_of(pattern=PATTERN, seed=3, **fields):
    """Return a model in evaluation whose norms, Canon layers and meta tokens hold no ones, zeros or small numbers."""
    model = HybridLM(arch_of(pattern, **fields), seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "canon" in name or "meta" in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def ids(batch=2, length=13, seed=1):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def rms(x, norm):
    scale = 1 + norm.weight if isinstance(norm, ZeroCenteredRMSNorm) else norm.weight
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * scale


def by_hand(model, x):
    """Return the stream after the layers of a model of single blocks, from the formulas, in the model's dtype."""
    for node, layer in zip(model.arch.nodes, model.layers, strict=True):
        (block,), around, own = layer.blocks(), layer.around_of(0, 0), node.config
        n = rms(x, layer.norm) if layer.norm is not None else None
        u = own.in_multiplier * (x if own.norm_position == "post" else n)
        if own.canon:
            past = torch.cat([u.new_zeros(u.shape[0], own.canon - 1, u.shape[2]), u], dim=1)
            u = u + sum(around.canon.weight[:, k] * past[:, k : k + u.shape[1]] for k in range(own.canon))
        y = block(u).y_BLD
        if own.norm_position in ("post", "sandwich"):
            y = rms(y, around.norm)
        x = own.stream_multiplier * (n if own.norm_position == "stream" else x) + own.out_multiplier * y
    return x


@pytest.mark.parametrize("norm", ["rmsnorm", "rmsnorm_zero"])
@pytest.mark.parametrize("position", ["pre", "post", "sandwich", "stream"])
def test_a_layer_is_its_formula(position, norm):
    fields = {"in_multiplier": 0.5, "out_multiplier": 0.3, "stream_multiplier": 1.5, "canon": 3}
    model = model_of("FAF", norm=norm, norm_position=position, **fields).double()
    with torch.no_grad():
        x = by_hand(model, model.embedding(ids()))
        torch.testing.assert_close(model.hidden(ids()).x_BLD, x, rtol=1e-12, atol=1e-12)


def test_each_letter_and_slot_may_have_its_own_position():
    model = model_of("AF{norm_position=sandwich}F", norm="rmsnorm", A={"norm_position": "post"}).double()
    assert [layer.norm is None for layer in model.layers] == [True, False, False]
    with torch.no_grad():
        x = by_hand(model, model.embedding(ids()))
        torch.testing.assert_close(model.hidden(ids()).x_BLD, x, rtol=1e-12, atol=1e-12)


def test_a_parallel_layer_norms_and_scales_each_branch():
    model = model_of("[A,F]", norm="rmsnorm", norm_position="sandwich", A={"out_multiplier": 0.25}, F={"canon": 2})
    model.double()
    layer = model.layers[0]
    attention, mlp = layer.blocks()
    with torch.no_grad():
        x = model.embedding(ids())
        n = rms(x, layer.norm)
        of_a = rms(attention(n).y_BLD, layer.around_of(0, 0).norm)
        shifted = torch.cat([torch.zeros_like(n[:, :1]), n[:, :-1]], dim=1)
        weight = layer.around_of(1, 0).canon.weight
        of_f = rms(mlp(n + weight[:, 0] * shifted + weight[:, 1] * n).y_BLD, layer.around_of(1, 0).norm)
        torch.testing.assert_close(model.hidden(ids()).x_BLD, x + 0.25 * of_a + of_f, rtol=1e-12, atol=1e-12)


def test_within_a_branch_a_block_reads_the_block_before_it():
    model = model_of("[FA,F]", norm="rmsnorm", A={"norm_position": "sandwich"}).double()
    layer = model.layers[0]
    with torch.no_grad():
        x = model.embedding(ids())
        n, total = rms(x, layer.norm), x
        for number, branch in enumerate(layer.branches):
            y = n
            for position, block in enumerate(branch):
                y = block(y).y_BLD
                if type(block).__name__ == "Attention":
                    y = rms(y, layer.around_of(number, position).norm)
            total = total + y
        torch.testing.assert_close(model.hidden(ids()).x_BLD, total, rtol=1e-12, atol=1e-12)


@every_option
def test_declared_parameters_are_the_real_ones(name):
    for pattern in (PATTERN, "F@sF@s[A@t,F@s]", "[MF,A]"):
        letters = set(pattern)
        fields = {key: value for key, value in OPTIONS[name].items() if key not in "MNAFE" or key in letters}
        arch = arch_of(pattern, **fields)
        model, cost = HybridLM(arch, device="meta"), arch.cost()
        assert sum(p.numel() for p in model.parameters()) == cost.params + cost.embedding_params
        norms = [m for m in model.modules() if isinstance(m, (RMSNorm, ZeroCenteredRMSNorm, nn.LayerNorm))]
        assert len([m for m in norms if m.weight.shape == (16,)]) == arch.n_norms
        table = describe_layers(arch, 64)
        assert table.total == arch.cost(64)


@every_option
def test_whole_text_chunks_single_tokens_and_the_decoder_agree(name):
    model = model_of(**OPTIONS[name])
    with torch.no_grad():
        whole = model(ids()).logits
        assert whole.shape == (2, 13, V)
        for size in (1, 4, 13):
            close(torch.cat([logits for logits, _ in prefill(model, ids().split(size, dim=1))], dim=1), whole)
            close(last_logits(model, ids(), chunk_tokens=size), whole[:, -1])
        decode = Decoder(model, model.init_state(2))
        close(torch.stack([decode(ids()[:, t]) for t in range(13)], dim=1), whole)
        decode = Decoder(model, model(ids()[:, :6], state=model.init_state(2)).state)
        close(torch.stack([decode(ids()[:, t]) for t in range(6, 13)], dim=1), whole[:, 6:])


@pytest.mark.parametrize("letter", BLOCKS)
def test_every_letter_decodes_within_all_options(letter):
    pattern = f"{letter}[{letter},F]" if letter != "F" else "F[F,F]"
    model = model_of(pattern, **OPTIONS["all"])
    with torch.no_grad():
        whole = model(ids()).logits
        close(torch.cat([logits for logits, _ in prefill(model, ids().split(5, dim=1))], dim=1), whole)
        decode = Decoder(model, model.init_state(2))
        close(torch.stack([decode(ids()[:, t]) for t in range(13)], dim=1), whole)


@every_option
def test_greedy_generation_is_the_argmax_of_everything_read_again(name):
    model = model_of(**OPTIONS[name])
    expected = ids(2, 5)
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(ids(2, 5), 4, temperature=0, prefill_chunk=2), expected)


@every_option
def test_later_tokens_do_not_touch_earlier_logits(name):
    model = model_of(**OPTIONS[name])
    changed = ids()
    changed[:, 8:] = (changed[:, 8:] + 1) % V
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits[:, :8], model(changed).logits[:, :8], rtol=1e-5, atol=1e-6)


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_declared_state_bytes_are_the_real_ones(name, dtype):
    model = model_of(**OPTIONS[name]).to(dtype)
    with torch.no_grad():
        state = model(ids()[:, 9:], state=model(ids()[:, :9], state=model.init_state(2)).state).state
    real = sum(tensor.numel() * tensor.element_size() for own in state for tensor in own)
    assert real == 2 * model.arch.cost(13, dtype_bytes=dtype.itemsize).state_bytes
    assert all(tensor.shape[0] == 2 for own in state for tensor in own)


@every_option
def test_declared_flops_are_those_of_torchs_counter(name):
    letters = {"A", "F"}
    fields = {key: value for key, value in OPTIONS[name].items() if key not in "MNAFE" or key in letters}
    model = model_of("AF[A,F]", **fields)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(ids())
    arch = model.arch
    convolved = sum(2 * node.config.canon * 16 for node in arch.nodes)  # no product of matrices
    positions = 13 + arch.model.n_meta_tokens
    assert counter.get_total_flops() == pytest.approx(2 * (13 * arch.cost(13).flops_per_token - positions * convolved))


def test_meta_tokens_are_a_text_that_stands_before_every_text():
    model = model_of("MAF", n_meta_tokens=3)
    plain = HybridLM(Arch.from_pattern("MAF", d_model=16, vocab_size=V + 3)).eval()
    weights = {key: value for key, value in model.state_dict().items() if key != "meta_tokens"}
    weights["embedding.weight"] = torch.cat([weights["embedding.weight"], model.meta_tokens])
    weights["head.weight"] = torch.cat([weights["head.weight"], torch.zeros(3, 16)])
    plain.load_state_dict(weights)
    before = torch.arange(V, V + 3).expand(2, -1)
    with torch.no_grad():
        close(model(ids()).logits, plain(torch.cat([before, ids()], dim=1)).logits[:, 3:, :V])


def test_the_cost_of_a_canon_layer_and_of_meta_tokens():
    plain, canon, meta = (arch_of("NA", **f).cost(100) for f in ({}, {"canon": 4}, {"n_meta_tokens": 25}))
    assert canon.params - plain.params == canon.active_params - plain.active_params == 2 * 4 * 16
    assert canon.flops_per_token - plain.flops_per_token == 2 * 2 * 4 * 16
    assert canon.state_bytes - plain.state_bytes == 2 * 3 * 16 * 4
    longer = arch_of("NA").cost(125)
    assert (meta.params, meta.embedding_params) == (plain.params, plain.embedding_params + 25 * 16)
    assert meta.state_bytes == longer.state_bytes
    head = 2 * 16 * V
    assert meta.flops_per_token - head == pytest.approx((longer.flops_per_token - head) * 125 / 100)


def test_matching_counts_what_stands_around_the_blocks():
    fields = {"norm_position": "sandwich", "canon": 4, "norm": "rmsnorm"}
    start = arch_of("(AF)x3F@sF@s", **fields)
    target = start.cost().active_params + 60 * 33 * 4  # four MLPs, each hidden channel of which has 33 weights
    assert match(start, active_params=target, free="d_ff", multiple=1).cost().active_params == target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "of letters", "stream", "one tap"])  # "all" holds what the others have
def test_a_model_exports_with_its_state(name):
    model = model_of("FA[A,F]", **{k: v for k, v in OPTIONS[name].items() if k not in "MNE"})
    with torch.no_grad():
        program = torch.export.export(model, (ids(1, 8),))
        close(program.module()(ids(1, 8)).logits, model(ids(1, 8)).logits)
        state = model(ids(1, 4), state=model.init_state(1)).state
        program = torch.export.export(model, (ids(1, 5),), {"state": state})
        close(program.module()(ids(1, 5), state=state).logits, model(ids(1, 5), state=state).logits)
        torch.export.save(program, io.BytesIO())


@every_option
def test_gradients_reach_every_weight(name):
    model = model_of(**OPTIONS[name]).train()
    output = model(ids(), labels=ids())
    (output.loss + sum(output.aux.losses.values())).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        if "around" in key or "meta" in key:
            assert bool(parameter.grad.abs().max() > 0), key


def test_gradients_reach_meta_tokens_through_a_state():
    model = model_of("NA", n_meta_tokens=2)
    state = model.init_state(2)
    total = 0
    for chunk in ids().split(5, dim=1):
        logits, _, state, _ = model(chunk, state=state)
        total = total + logits.logsumexp(-1).sum()
    (chunked,) = torch.autograd.grad(total, [model.meta_tokens])
    (whole,) = torch.autograd.grad(model(ids()).logits.logsumexp(-1).sum(), [model.meta_tokens])
    close(chunked, whole)


@every_option
def test_a_narrow_model_decodes_as_it_reads(name):
    model = model_of("NAF[A,F]", **{k: v for k, v in OPTIONS[name].items() if k not in "ME"}).bfloat16()
    with torch.no_grad():
        whole = model(ids()).logits
        decode = Decoder(model, model.init_state(2))
        stepped = torch.stack([decode(ids()[:, t]) for t in range(13)], dim=1)
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(stepped, whole, rtol=0.1, atol=0.05 * whole.abs().max().item())


@every_option
def test_the_reference_implementation_agrees(name):
    model = model_of(**OPTIONS[name])
    slow = HybridLM(model.arch, impl="reference").eval()
    slow.load_state_dict(model.state_dict())
    assert {module.impl for module in slow.modules() if hasattr(module, "impl")} == {Impl.REFERENCE}
    assert ("canon" in slow.implementations()) == any(node.config.canon for node in slow.arch.nodes)
    with torch.no_grad():
        close(slow(ids()).logits, model(ids()).logits)


@every_option
def test_an_option_is_part_of_the_fingerprint_and_survives_json(name):
    arch = arch_of(**OPTIONS[name])
    assert arch.fingerprint() != arch_of().fingerprint()
    again = Arch.from_dict(json.loads(json.dumps(arch.to_dict())))
    assert (again, again.fingerprint()) == (arch, arch.fingerprint())
    assert arch.replace() == arch


def test_options_at_their_defaults_are_no_part_of_a_fingerprint():
    defaults = {
        "norm_position": "pre",
        "in_multiplier": 1.0,
        "out_multiplier": 1.0,
        "stream_multiplier": 1.0,
        "canon": 0,
        "n_meta_tokens": 0,
        "embedding_norm": False,
        "embedding_multiplier": 1.0,
        "logits_multiplier": 1.0,
        "final_softcap": None,
    }
    assert arch_of(**defaults).fingerprint() == arch_of().fingerprint()
    old = {key: value for key, value in arch_of().to_dict().items() if key not in defaults}
    assert Arch.from_dict(old) == arch_of()
    assert set(HybridLM(arch_of(**defaults), device="meta").state_dict()) == set(
        HybridLM(arch_of(), device="meta").state_dict()
    )


def test_positions_that_are_one_within_a_branch_have_one_fingerprint():
    spellings = [arch_of(f"[FA{{norm_position={place}}},F]").fingerprint() for place in ("post", "sandwich")]
    assert spellings[0] == spellings[1] != arch_of("[FA,F]").fingerprint()


def test_a_seed_draws_the_same_weights_with_and_without_options():
    plain = HybridLM(arch_of(), seed=5).state_dict()
    for fields in ({"canon": 4}, {"n_meta_tokens": 3}, {"norm_position": "sandwich"}, {"final_softcap": 30.0}):
        first, again = (HybridLM(arch_of(**fields), seed=5).state_dict() for _ in range(2))
        assert all(torch.equal(first[key], plain[key]) for key in plain)
        assert all(torch.equal(first[key], again[key]) for key in first)
        added = [first[key] for key in first if key not in plain and "norm" not in key]
        assert all(0.02 < value.std() < 1 for value in added)


def test_a_shared_block_has_its_own_surroundings_at_each_place():
    model = model_of("A@sA@s", canon=2, norm_position="sandwich")
    first, second = (layer.around_of(0, 0) for layer in model.layers)
    assert next(model.layers[0].blocks()) is next(model.layers[1].blocks())
    assert first.canon is not second.canon
    assert first.norm is not second.norm
    assert len(model.init_state(1)) == 4  # of each use the convolution's and the cache


@pytest.mark.parametrize(
    ("pattern", "fields", "field", "got"),
    [
        ("[A,F]", {"A": {"stream_multiplier": 2.0}}, "stream_multiplier", (2.0, 1.0)),
        ("[A,F]", {"F": {"norm_position": "stream"}}, "norm_position", ("pre", "stream")),
        ("[AF,F]", {"A": {"norm_position": "stream"}}, "norm_position", ("stream", "pre")),
        ("A", {"norm_position": "none"}, "norm_position", "none"),
        ("A", {"canon": -1}, "canon", -1),
        ("A", {"in_multiplier": 0.0}, "in_multiplier", 0.0),
        ("A", {"n_meta_tokens": -1}, "n_meta_tokens", -1),
        ("A", {"final_softcap": 0.0}, "final_softcap", 0.0),
        ("A", {"norm": "rmsnorm_one"}, "norm", "rmsnorm_one"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(pattern, fields, field, got):
    with pytest.raises(ConfigError) as caught:
        arch_of(pattern, **fields)
    assert caught.value.field.rpartition(".")[2] == field
    assert caught.value.got == got
    assert caught.value.allowed is not None
    assert "\n" not in str(caught.value)


def test_the_message_about_two_streams_names_both_blocks():
    with pytest.raises(ConfigError) as caught:
        arch_of("M[A,F]", A={"norm_position": "stream"}, F={"norm_position": "post"})
    assert str(caught.value) == (
        "layer 1 (A attention) has norm_position=stream beside F mlp norm_position=post, but the blocks of a parallel "
        "layer add to one residual stream; give both the same norm_position"
    )


def test_logits_are_scaled_then_capped():
    plain = model_of("AF")
    model = HybridLM(plain.arch.replace(logits_multiplier=0.5, final_softcap=0.2, embedding_multiplier=3.0)).eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        x = 3.0 * plain.embedding(ids())
        for layer in plain.layers:
            x, _ = layer(x, None, [])
        close(model(ids()).logits, 0.2 * torch.tanh(0.5 * plain.head(x) / 0.2))


@pytest.mark.parametrize("fields", [{"logits_multiplier": 0.3}, {"final_softcap": 0.1}, {"n_meta_tokens": 2}], ids=str)
def test_training_and_evaluation_see_the_model_s_own_logits(fields):
    model = model_of("AF", **fields)
    batch = Batch(ids(), ids(seed=2), torch.rand(2, 13) > 0.3)
    logits = model(ids()).logits
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BL.flatten(), reduction="none")
    wanted = losses.view(2, 13) * batch.mask_BL
    objective = Objective(model)
    close(objective(batch).total, wanted.sum())
    scores = objective.scores(batch)
    close(scores.loss, wanted)
    close(scores.logsumexp * batch.mask_BL, logits.logsumexp(-1) * batch.mask_BL)
    assert torch.equal(scores.correct, (logits.argmax(-1) == batch.targets_BL) & batch.mask_BL)


def test_weight_decay_spares_meta_tokens_and_norms_but_not_canon_layers():
    model = model_of("AF", canon=2, n_meta_tokens=2, norm="rmsnorm_zero", norm_position="sandwich")
    spared = no_decay_names(model)
    added = {name for name, _ in model.named_parameters() if "norm" in name or "meta" in name}
    assert added <= spared
    assert not any("canon" in name for name in spared)


def test_a_zero_centered_norm_is_rmsnorm_of_one_plus_its_weight():
    norm, plain = ZeroCenteredRMSNorm(16, eps=1e-3), RMSNorm(16, eps=1e-3)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(norm(x), plain(x))
    with torch.no_grad():
        norm.weight.uniform_(-0.5, 0.5)
        plain.weight.copy_(1 + norm.weight)
    close(norm(x), plain(x))
    close(one_row(norm)(x), plain(x))
    small = ZeroCenteredRMSNorm(16, eps=1e-3).bfloat16()
    with torch.no_grad():
        small.weight.fill_(2**-10)  # 1 + 2 ** -10 is 1 in bfloat16
    assert small(x.bfloat16()).dtype == torch.bfloat16
    assert one_row(small)(x.bfloat16()).dtype == torch.bfloat16
    expected = (plain_rms(x.bfloat16().float()) * (1 + 2**-10)).bfloat16()
    assert torch.equal(small(x.bfloat16()), expected)


def plain_rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


@torch.no_grad()
def test_decoding_uses_a_block_s_fast_step_also_within_options():
    model = model_of("AFA", canon=3, norm_position="sandwich", out_multiplier=0.5)
    decode = Decoder(model, model.init_state(1))
    assert not any(isinstance(step, _Forward) for step in decode._steps)
    model.layers[1].around_of(0, 0).canon.register_forward_hook(lambda _m, _i, y: (2 * y[0], y[1]))
    decode = Decoder(model, model.init_state(2))
    assert [isinstance(step, _Forward) for step in decode._steps] == [False, True, False]
    close(torch.stack([decode(ids()[:, t]) for t in range(13)], dim=1), model(ids()).logits)


def test_a_copy_of_a_model_is_a_model_of_its_own():
    model = model_of(**OPTIONS["all"])
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(ids()).logits
        for parameter in model.parameters():
            parameter.zero_()
        close(other(ids()).logits, expected)


def test_a_batch_without_tokens_gives_logits_without_tokens():
    for batch, length in [(0, 5), (2, 0)]:
        model = HybridLM(arch_of(**OPTIONS["all"]), seed=0)
        out = model(ids(batch, length), labels=ids(batch, length))
        assert out.logits.shape == (batch, length, V)
        assert out.loss == 0
        (out.loss + sum(out.aux.losses.values())).backward()
