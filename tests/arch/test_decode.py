"""Decoding token by token: the fused step is the block, sees every change of its weights, gives the peers' tokens."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hybridnas.arch.arch import Arch
from hybridnas.arch.decode import Decoder
from hybridnas.arch.model import HybridLM
from hybridnas.blocks import stepping
from hybridnas.blocks.mamba import Mamba
from hybridnas.hardware import Impl
from hybridnas.kernels.mamba_step import cpu

V = 29
needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
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


def by_torch(made, x, state):
    """Return what the block's own operations give."""
    with torch.enable_grad():
        output = made(x, state)
    return output.y_BLD.detach(), *(t.detach() for t in output.state)


@torch.no_grad()
def fused(made, x, state):
    calls, original = [], cpu.Step.bound
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu.Step, "bound", lambda self, *states: calls.append(1) or original(self, *states))
        output = made(x, state)
    return bool(calls), (output.y_BLD, *output.state)


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
            ids = torch.cat([ids, model(ids).logits_BLV[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@needs_compiler
@pytest.mark.parametrize("batch", [1, 2, 3, stepping.MAX_BATCH])
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
def test_the_fused_step_is_the_block(fields, batch):
    made = block(**fields)
    x, state = token(batch), state_of(made, batch)
    kept = [t.clone() for t in state]
    ran, got = fused(made, x, state)
    assert ran
    close(got, by_torch(made, x, state))
    assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict(block(seed=9).state_dict()),
        lambda m: m.load_state_dict(block(seed=9).state_dict(), assign=True),
        lambda m: setattr(m, "out_proj", nn.Linear(40, 20)),
        lambda m: setattr(m, "A_log", nn.Parameter(torch.rand(40, 16))),
        lambda m: setattr(m.conv1d.weight, "data", torch.rand(40, 1, 4)),
        lambda m: m.D.data.fill_(-3.0),
        lambda m: m.to(torch.float64).to(torch.float32).in_proj.weight.data.mul_(2),
    ],
)
def test_weights_that_change_are_seen_by_the_next_step(change):
    made = block()
    x, state = token(), state_of(made)
    before = fused(made, x, state)[1]
    change(made)
    ran, after = fused(made, x, state)
    assert ran
    assert not torch.equal(before[0], after[0])
    close(after, by_torch(made, x, state))


@needs_compiler
def test_an_optimizer_step_is_seen_by_the_next_step():
    made = block()
    x, state = token(), state_of(made)
    fused(made, x, state)
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.05)
    made(x).y_BLD.square().sum().backward()
    optimizer.step()
    close(fused(made, x, state)[1], by_torch(made, x, state))


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.out_proj.register_forward_hook(lambda _m, _i, y: y + 1),
        lambda m: m.in_proj.register_forward_pre_hook(lambda _m, x: (2 * x[0],)),
        lambda m: nn.utils.parametrizations.weight_norm(m.x_proj),
        lambda m: setattr(m, "out_proj", nn.Sequential(m.out_proj)),
        lambda m: setattr(m, "impl", Impl.REFERENCE),
        lambda m: setattr(m.out_proj.weight, "data", m.out_proj.weight.data.t().contiguous().t()),
    ],
)
def test_what_the_kernel_does_not_know_goes_through_torch(change):
    made = block()
    x, state = token(), state_of(made)
    fused(made, x, state)
    change(made)
    ran, got = fused(made, x, state)
    assert not ran
    close(got, by_torch(made, x, state))


@needs_compiler
def test_gradients_autocast_counting_and_other_dtypes_go_through_torch():
    made = block()
    x, state = token(), state_of(made)
    assert made(x, state).y_BLD.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused(made, x, state)[0]
    with FlopCounterMode(display=False) as counter:
        assert not fused(made, x, state)[0]
    assert counter.get_total_flops() > 0
    assert not fused(made, token(stepping.MAX_BATCH + 1), state_of(made, stepping.MAX_BATCH + 1))[0]
    wide = made.to(torch.float64)
    ran, got = fused(wide, x.double(), type(state)(state[0].double(), state[1]))
    assert not ran
    assert got[0].dtype == torch.float64


@needs_compiler
def test_a_state_of_another_size_is_refused_by_torch_and_never_read():
    made, other = block(), block(width=20, d_inner=24)
    with pytest.raises(Exception, match="state"):
        fused(made, token(), state_of(other))


@needs_compiler
def test_a_copy_and_a_pickle_step_with_their_own_weights():
    made = block()
    x, state = token(), state_of(made)
    fused(made, x, state)
    twin, thawed = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    made.in_proj.weight.data.zero_()
    for other in (twin, thawed):
        ran, got = fused(other, x, state)
        assert ran
        close(got, by_torch(block(), x, state))


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
        {"router": "top_k", "top_k": 2, "renormalise": True},
        {"gated": True, "bias": True, "d_shared": 8},
        {"eval_capacity_factor": 1.0},
    ],
    ids=str,
)
def test_any_routing_decodes_as_it_reads(experts):
    model, ids = model_of("(ME)x2", experts=experts).eval(), prompt(1, 20)
    with torch.no_grad():
        state, decode = model.init_state(1), Decoder(model, model.init_state(1))
        for t in range(20):
            expected, state, _ = model(ids[:, t : t + 1], state)
            close([decode(ids[:, t])], [expected[:, 0]])


@pytest.mark.parametrize("pattern", ["Mx2", EVERY])
def test_the_decoder_gives_the_logits_of_forward(pattern):
    model, ids = model_of(pattern).eval(), prompt(2, 40)
    with torch.no_grad():
        whole = model(ids).logits_BLV
        decode = Decoder(model, model(ids[:, :4], model.init_state(2)).state)
        for t in range(4, 40):
            close([decode(ids[:, t])], [whole[:, t]])


@pytest.mark.parametrize("fields", [{}, {"positions": "none"}, {"n_heads": 4, "n_kv_heads": 2}], ids=str)
def test_a_cache_of_keys_grows_as_often_as_it_must(fields):
    model, ids = model_of("AF", A=fields).eval(), prompt(2, 170)
    with torch.no_grad():
        whole = model(ids).logits_BLV
        decode = Decoder(model, model(ids[:, :5], model.init_state(2)).state)
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
def test_a_model_changed_between_two_tokens_decodes_as_changed(change):
    model, ids = model_of("Mx2").eval(), prompt(1, 9)
    with torch.no_grad():
        state = model(ids[:, :8], model.init_state(1)).state
        decode = Decoder(model, [type(s)(*(t.clone() for t in s)) for s in state])
        decode(ids[:, 8])
        state = model(ids[:, 8:9], state).state
        change(model)
        close([decode(ids[:, 3])], [model(ids[:, 3:4], state).logits_BLV[:, -1]])


def test_without_the_kernel_the_tokens_are_the_same(monkeypatch):
    model = model_of("Mx2")
    expected = model.generate(prompt(), 12, temperature=0)
    monkeypatch.setattr(cpu, "available", lambda: False)
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
    model(made).logits_BLV.sum().backward()
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
