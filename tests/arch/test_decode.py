"""Decoding token by token: the fused step is the layer, and greedy tokens are those of transformers."""

import copy
import pickle

import pytest
import torch
from torch import nn

from hybridnas.arch.arch import Arch
from hybridnas.arch.decode import Decoder
from hybridnas.arch.model import HybridLM
from hybridnas.blocks.gated_conv import GatedConv
from hybridnas.blocks.mamba import Mamba
from hybridnas.blocks.mamba2 import Mamba2
from hybridnas.hardware import Impl
from hybridnas.kernels.mamba_step import native
from hybridnas.layers.block import map_state
from hybridnas.layers.norms import NORMS
from hybridnas.layers.step import MAX_BATCH
from hybridnas.registry import BLOCKS

V = 29
needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")
EVERY = "M[M,E]A@sFA@sNE"


def block(width=20, seed=0, impl=Impl.AUTO, **fields):
    torch.manual_seed(seed)
    return Mamba(Mamba.Config(d_model=width, **fields), impl=impl).eval()


def token(batch=2, width=20, seed=1):
    return torch.randn(batch, 1, width, generator=torch.Generator().manual_seed(seed))


def state_of(made, batch=2, seed=2):
    generator = torch.Generator().manual_seed(seed)
    empty = made.init_state(batch, device=torch.device("cpu"), dtype=torch.float32)
    return type(empty)(*(torch.randn(t.shape, generator=generator) for t in empty))


def norm_of(kind="rmsnorm", width=20, seed=5):
    generator = torch.Generator().manual_seed(seed)
    made = NORMS[kind](width)
    for parameter in made.parameters():
        parameter.data = torch.randn(width, generator=generator)
    return made


@torch.no_grad()
def by_torch(made, norm, x_BD, state):
    """Return what the block's own operations give for one token."""
    output = made(norm(x_BD)[:, None], state)
    return x_BD + output.y_BLD[:, 0], output.state


@torch.no_grad()
def one_token(made, norm, state):
    """Return the block's fast step over a copy of a state, or None."""
    return made.one_token(norm, map_state(torch.clone, state))


def close(got, expected):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


def model_of(pattern, seed=3, experts=None, **fields):
    if "E" in pattern:
        fields["E"] = {"n_experts": 3, "d_expert": 8, **(experts or {})}
    return HybridLM(Arch.from_pattern(pattern, d_model=16, vocab_size=V, **fields), seed=seed)


def prompt(batch=1, length=7):
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def recomputed(model, ids, new):
    """Return the greedy continuation by reading everything again for each token."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@needs_compiler
@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("batch", [1, 2, 3, MAX_BATCH])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"d_inner": 37, "d_state": 5, "d_conv": 2, "dt_rank": 7},
        {"d_conv": 3, "conv_bias": False, "bias": True, "d_state": 64},
        {"d_conv": 1, "d_state": 1},
        {"selective": "none"},
        {"selective": "B+C"},
        {"selective": "dt"},
    ],
    ids=str,
)
def test_the_fused_step_is_the_layer(fields, batch, norm):
    made, norm = block(**fields), norm_of(norm)
    state = state_of(made, batch)
    step = one_token(made, norm, state)
    for seed in (1, 2, 3):
        x_BD = token(batch, seed=seed)[:, 0]
        expected, state = by_torch(made, norm, x_BD, state)
        close([step(x_BD.clone())], [expected])


@needs_compiler
def test_a_norm_of_another_kind_runs_before_the_fused_step():
    made, norm = block(), nn.Sequential(norm_of("layernorm"), norm_of("rmsnorm", seed=6))
    state = state_of(made)
    step = one_token(made, norm, state)
    for seed in (1, 2, 3):
        x_BD = token(seed=seed)[:, 0]
        expected, state = by_torch(made, norm, x_BD, state)
        close([step(x_BD.clone())], [expected])


@needs_compiler
def test_the_fused_step_reads_the_weights_once_and_keeps_them_alive():
    made, norm = block(), norm_of()
    state, x_BD = state_of(made), token()[:, 0]
    expected = by_torch(made, norm, x_BD, state)[0]
    step = one_token(made, norm, state)
    made.in_proj.weight = nn.Parameter(torch.zeros(80, 20))  # the old tensor has no other holder
    made.conv1d.weight.data = torch.zeros(40, 1, 4)
    close([step(x_BD.clone())], [expected])


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda m, n: m.out_proj.register_forward_hook(lambda _m, _i, y: y + 1),
        lambda m, n: m.in_proj.register_forward_pre_hook(lambda _m, x: (2 * x[0],)),
        lambda m, n: n.register_forward_hook(lambda _m, _i, y: 3 * y),
        lambda m, n: nn.utils.parametrizations.weight_norm(m.x_proj),
        lambda m, n: setattr(m, "out_proj", nn.Sequential(m.out_proj)),
        lambda m, n: setattr(m, "impl", Impl.REFERENCE),
        lambda m, n: setattr(m.out_proj.weight, "data", m.out_proj.weight.data.t().contiguous().t()),
        lambda m, n: m.to(torch.float64),
    ],
)
def test_what_the_kernel_does_not_know_has_no_fused_step(change):
    made, norm = block(), norm_of()
    assert one_token(made, norm, state_of(made)) is not None
    change(made, norm)
    assert one_token(made, norm, state_of(made)) is None


@needs_compiler
def test_gradients_autocast_large_batches_and_states_of_another_size_have_no_fused_step():
    made, norm = block(), norm_of()
    assert made.one_token(norm, state_of(made)) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert one_token(made, norm, state_of(made)) is None
    assert one_token(made, norm, state_of(made, MAX_BATCH + 1)) is None
    assert one_token(made, norm, state_of(block(d_inner=24))) is None


@pytest.mark.parametrize("letter", sorted(BLOCKS))
def test_every_letter_decodes_after_copying_and_pickling(letter):
    model, ids = model_of(letter).eval(), prompt(2, 9)
    expected = model.generate(ids, 5, temperature=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(ids, 5, temperature=0), expected)


@pytest.mark.parametrize("pattern", ["M", "Mx3", EVERY, "(ME)x2", "AF", "[MF,A]M@tM@t", "N"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_those_of_reading_everything_again(pattern, norm, batch):
    model = model_of(pattern, norm=norm, final_norm=True)
    made = model.generate(prompt(batch), 12, temperature=0, prefill_chunk=3)
    assert torch.equal(made, recomputed(model, prompt(batch), 12))


@pytest.mark.parametrize(
    "experts",
    [
        {"router": "top_k", "top_k": 2, "renormalize": True},
        {"gated": True, "bias": True, "d_shared": 8},
        {"eval_capacity_factor": 1.0},
        {
            "router": "top_k",
            "top_k": 2,
            "scores": "sigmoid",
            "expert_groups": 3,
            "top_groups": 2,
            "correction_bias": True,
        },
        {"scores": "sigmoid", "routed_scale": 2.0, "d_shared": 8, "shared_gate": True},
    ],
    ids=str,
)
def test_any_routing_decodes_as_it_reads(experts):
    model, ids = model_of("(ME)x2", experts=experts).eval(), prompt(1, 20)
    with torch.no_grad():
        state, decode = model.init_state(1), Decoder(model, model.init_state(1))
        for t in range(20):
            expected, _, state, _ = model(ids[:, t : t + 1], state=state)
            close([decode(ids[:, t])], [expected[:, 0]])


@pytest.mark.parametrize("pattern", ["Mx2", EVERY])
def test_the_decoder_gives_the_logits_of_forward(pattern):
    model, ids = model_of(pattern).eval(), prompt(2, 40)
    with torch.no_grad():
        whole = model(ids).logits
        decode = Decoder(model, model(ids[:, :4], state=model.init_state(2)).state)
        for t in range(4, 40):
            close([decode(ids[:, t])], [whole[:, t]])


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (GatedConv, {}),
        (GatedConv, {"d_conv": 1}),
        (GatedConv, {"d_conv": 7, "d_inner": 12, "bias": True, "conv_bias": True}),
        (Mamba2, {"d_state": 5, "head_dim": 5, "bias": True}),
        (Mamba2, {"d_state": 6, "head_dim": 5, "n_groups": 4, "conv_bias": False}),
        (Mamba2, {"d_state": 6, "head_dim": 10, "n_groups": 2, "gated_norm": False, "d_conv": 1}),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_in_torch_is_what_forward_gives_for_one_token(cls, fields, batch):
    torch.manual_seed(0)
    made, norm, x_BLD = cls(cls.Config(d_model=20, **fields)).eval(), norm_of(), torch.randn(batch, 9, 20)
    with torch.no_grad():
        _, state, _ = made(norm(x_BLD[:, :4]), made.init_state(batch, device=torch.device("cpu"), dtype=torch.float32))
        step = made.one_token(norm, map_state(torch.clone, state))
        got = torch.stack([step(x_BD) for x_BD in x_BLD[:, 4:].unbind(1)], dim=1)
        close([got], [(x_BLD + made(norm(x_BLD)).y_BLD)[:, 4:]])
        assert cls(made.config, impl=Impl.REFERENCE).one_token(norm, state) is None
        convolution = made.conv if cls is GatedConv else made.conv1d
        convolution.register_forward_hook(lambda *_: None)
        assert made.one_token(norm, state) is None


@pytest.mark.parametrize("selective", ["dt+B+C", "none"])
def test_norms_of_dt_b_and_c_are_read_by_forward(selective):
    made = block(selective=selective, selective_norm="scaled")
    assert (one_token(made, norm_of(), state_of(made)) is None) == (selective != "none")


@pytest.mark.parametrize("fields", [{}, {"positions": "none"}, {"n_heads": 4, "n_kv_heads": 2}], ids=str)
def test_a_cache_of_keys_grows_as_often_as_it_must(fields):
    model, ids = model_of("AF", A=fields).eval(), prompt(2, 170)
    with torch.no_grad():
        whole = model(ids).logits
        decode = Decoder(model, model(ids[:, :5], state=model.init_state(2)).state)
        close([torch.stack([decode(ids[:, t]) for t in range(5, 170)], dim=1)], [whole[:, 5:]])


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict(model_of("Mx2", seed=8).state_dict()),
        lambda m: setattr(m.layers[1].norm, "weight", nn.Parameter(torch.rand(16))),
        lambda m: m.layers[0].norm.register_forward_hook(lambda _m, _i, y: 3 * y),
        lambda m: m.layers[1].branches[0][0].out_proj.register_forward_hook(lambda _m, _i, y: 3 * y),
    ],
)
def test_a_new_decoder_decodes_a_changed_model_as_changed(change):
    model, ids = model_of("Mx2").eval(), prompt(1, 9)
    with torch.no_grad():
        model.generate(ids, 2)
        change(model)
        state = model(ids[:, :8], state=model.init_state(1)).state
        expected = model(ids[:, 8:], state=state).logits[:, -1]
        close([Decoder(model, state)(ids[:, 8])], [expected])


def test_without_the_kernel_the_tokens_are_the_same(monkeypatch):
    model = model_of("Mx2")
    expected = model.generate(prompt(), 12, temperature=0)
    monkeypatch.setattr(native, "available", lambda: False)
    assert torch.equal(model_of("Mx2").generate(prompt(), 12, temperature=0), expected)


def test_hooks_on_a_layer_or_block_run_for_every_token():
    model, seen = model_of("MF"), []
    model.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    next(iter(model.layers[1].blocks())).register_forward_hook(lambda *_: seen.append("block"))
    model.generate(prompt(), 5, temperature=0)
    assert seen == ["layer", "block"] * 5  # the prompt, then each token but the last


def test_generation_hands_out_tensors_that_training_takes_and_leaves_the_mode():
    model = model_of("MA")
    made = model.generate(prompt(), 4)
    assert model.training
    model(made).logits.sum().backward()
    with pytest.raises(RuntimeError, match="stop"):
        model.generate(prompt(), 4, on_token=lambda _: (_ for _ in ()).throw(RuntimeError("stop")))
    assert model.training


def test_logits_and_greedy_tokens_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    fields = {"vocab_size": V, "hidden_size": 24, "num_hidden_layers": 3, "state_size": 16}
    torch.manual_seed(0)
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(**fields, tie_word_embeddings=False, use_mambapy=False)
    ).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    arch = Arch.from_pattern("Mx3", d_model=24, vocab_size=V, norm="rmsnorm", final_norm=True)
    ours = HybridLM(arch)
    pairs = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            name = name.replace("layers.", "backbone.layers.").replace(".branches.0.0.", ".mixer.")
            name = name.replace("embedding", "backbone.embeddings").replace("final_norm", "backbone.norm_f")
            parameter.copy_(pairs.pop(name.replace("head.", "lm_head.")))
        assert not pairs
        ids = prompt(2, 9)
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, use_cache=True
        )
        assert torch.equal(ours.generate(ids, 24, temperature=0), expected)
        logits = theirs(expected).logits
        ours.eval()
        decode = Decoder(ours, ours.init_state(2))
        for t in range(expected.shape[1]):
            torch.testing.assert_close(decode(expected[:, t]), logits[:, t], rtol=1e-4, atol=1e-4)
