"""State-space duality against its float64 recurrence, and the Mamba-2 block against transformers' Mamba2Mixer."""

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridnas.blocks.mamba2 import Mamba2
from hybridnas.errors import ConfigError, KernelInputError, KernelUnavailableError
from hybridnas.kernels.ssd import describe, ssd

ssd_torch = partial(ssd, impl="torch", return_final_state=True)
ssd_reference = partial(ssd, impl="reference", return_final_state=True)


def inputs(batch, length, groups, share, width, size, *, optional=True, initial=True, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make).to(dtype)

    heads = groups * share
    values = {"x": normal(batch, length, heads, width), "dt": normal(batch, length, heads)}
    values |= {"A": -torch.exp(normal(heads))}
    values |= {"B": normal(batch, length, groups, size), "C": normal(batch, length, groups, size)}
    if optional:
        values |= {"D": normal(heads), "z": normal(batch, length, heads, width), "dt_bias": normal(heads) - 2}
    if initial:
        values["initial_state"] = normal(batch, heads, width, size)
    return {name: v.requires_grad_() for name, v in values.items()}


def run(function, values, **others):
    outputs = function(**values, dt_softplus=True, **others)
    make = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=make).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(values.values()), grads)
    return dict(zip(("y", "final", *values), (*outputs, *gradients), strict=True))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 3, 7, 16, 17, 40]),
    groups=st.integers(1, 2),
    share=st.integers(1, 3),
    width=st.sampled_from([1, 3, 8]),
    size=st.sampled_from([1, 5, 16]),
    chunk=st.sampled_from([1, 4, 7, 16, 64]),
    options=st.fixed_dictionaries({"optional": st.booleans(), "initial": st.booleans(), "seed": st.integers(0, 999)}),
    documents=st.booleans(),
)
def test_outputs_and_gradients_agree_with_the_float64_recurrence(
    batch, length, groups, share, width, size, chunk, options, documents
):
    shape = (batch, length, groups, share, width, size)
    ids = None
    if documents:
        ids = torch.randint(0, 5, (batch, length), generator=torch.Generator().manual_seed(3)).sort(1).values
    true = run(ssd_reference, inputs(*shape, **options), seq_idx=ids)
    got = run(ssd_torch, inputs(*shape, **options, dtype=torch.float32), seq_idx=ids, chunk_size=chunk)
    for name, expected in true.items():
        error = (got[name].double() - expected).abs().max().item()
        # Float32 sums of terms near 1: where they cancel, their rounding stays.
        assert error <= 1e-5 * expected.abs().max().item() + 1e-6, f"{name} is {error} off"


def test_the_torch_form_passes_gradcheck():
    values = inputs(1, 7, 1, 2, 2, 3)
    names, ids = list(values), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])

    def chunked(*tensors):
        return ssd_torch(**dict(zip(names, tensors, strict=True)), dt_softplus=True, seq_idx=ids, chunk_size=4)

    assert torch.autograd.gradcheck(chunked, tuple(values.values()))


def test_pieces_through_the_state_are_the_whole():
    values = {n: v.detach() for n, v in inputs(2, 50, 2, 2, 4, 8).items()}
    whole, final = ssd(**values, dt_softplus=True, return_final_state=True, chunk_size=16)
    state, wide, parts = values.pop("initial_state"), ("x", "dt", "B", "C", "z"), []
    for piece in (slice(0, 20), slice(20, 21), slice(21, 50)):
        part = {n: v[:, piece] if n in wide else v for n, v in values.items()}
        y, state = ssd(**part, dt_softplus=True, initial_state=state, return_final_state=True, chunk_size=16)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_strong_decay_neither_overflows_nor_spoils_gradients():
    values = inputs(1, 64, 1, 2, 4, 4, dtype=torch.float32)
    with torch.no_grad():
        values["A"].mul_(1000.0)
    assert all(torch.isfinite(tensor).all() for tensor in run(ssd_torch, values).values())


@pytest.mark.parametrize(
    ("changes", "got", "allowed"),
    [
        ({"x": torch.zeros(1, 4, 6)}, (1, 4, 6), "(B, L, H, P)"),
        ({"dt": torch.zeros(1, 4, 3)}, (1, 4, 3), (1, 4, 2)),
        ({"A": torch.zeros(3)}, (3,), (2,)),
        ({"C": torch.zeros(1, 4, 1, 5)}, (1, 4, 1, 5), (1, 4, 1, 6)),
        ({"B": torch.zeros(1, 4, 3, 6), "C": torch.zeros(1, 4, 3, 6)}, 3, [1, 2]),
        ({"chunk_size": 0}, 0, ">= 1"),
        ({"initial_state": torch.zeros(1, 2, 6, 3)}, (1, 2, 6, 3), (1, 2, 3, 6)),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected_and_got(changes, got, allowed):
    values = {n: v.detach().float() for n, v in inputs(1, 4, 1, 2, 3, 6).items()}
    with pytest.raises(KernelInputError) as refused:
        ssd(**(values | changes))
    assert (refused.value.field, refused.value.got, refused.value.allowed) == (next(iter(changes)), got, allowed)


def test_a_requested_implementation_runs_or_raises():
    values = {n: v.detach().float() for n, v in inputs(1, 4, 1, 2, 3, 6).items()}
    with pytest.raises(KernelUnavailableError) as refused:
        ssd(**values, impl="native")
    assert (refused.value.field, refused.value.got) == ("impl", "native")
    assert "torch" in refused.value.allowed and "native" not in refused.value.allowed
    assert describe("cpu") == "torch: chunked matrix products"


@pytest.mark.parametrize(("groups", "bias"), [(1, False), (2, True)])
def test_mamba2_equals_transformers_whole_and_token_by_token(groups, bias):
    hugging = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    config = hugging.Mamba2Config(
        hidden_size=24, num_heads=6, head_dim=8, state_size=16, n_groups=groups, num_hidden_layers=1, use_bias=bias,
        chunk_size=8,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = hugging.Mamba2Mixer(config, layer_idx=0).eval()
    with torch.no_grad():
        theirs.norm.weight.normal_(1.0, 0.1)
        theirs.D.normal_()
    ours = Mamba2(Mamba2.Config(d_model=24, head_dim=8, d_state=16, n_groups=groups, bias=bias)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 19, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x)
        torch.testing.assert_close(ours(x).y_BLD, expected, rtol=1e-4, atol=1e-4)
        state, outputs = ours.init_state(2, device=x.device, dtype=x.dtype), []
        for t in range(19):
            y, state, _ = ours(x[:, t : t + 1], state)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_the_authors_130m_block_has_the_published_number_of_parameters():
    # mamba2-130m: 24 such layers and 25 norms of 768 beside 50288 * 768 embeddings make 128,989,632
    config = Mamba2.Config(d_model=768)
    assert (config.heads, config.head_width) == (24, 64)
    assert 24 * config.cost(1).params + 25 * 768 + 50288 * 768 == 128_989_632


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"head_dim": 7}, r"mamba2 head_dim=7 does not divide d_inner=64; use head_dim=4"),
        (
            {"head_dim": 16, "n_groups": 3},
            r"mamba2 n_groups=3 does not divide the 4 heads of d_inner=64; use n_groups=2",
        ),
        ({"expand": 0.001}, r"mamba2 expand=0.001 of d_model=32 leaves no inner channel"),
    ],
)
def test_a_config_that_cannot_be_split_says_what_would_do(fields, words):
    with pytest.raises(ConfigError, match=words):
        Mamba2.Config(d_model=32, **fields)
