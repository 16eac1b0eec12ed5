"""One token through a layer around a gated linear recurrence in C: against the plain form in float64, at odd sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnas.errors import ConfigError, KernelInputError
from hybridnas.kernels._build import step
from hybridnas.kernels.delta_step import Form, Weights, delta_step, native, step_reference
from hybridnas.kernels.mamba_step import Norm

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")
DECAYS = ("none", "fixed", "softplus by head", "softplus", "bounded", "sigmoid", "forget")


def case(
    batch=2, width=9, groups=2, share=1, key=6, value=5, *, decay="softplus", beta=1.0, taps=4, feature_map="l2",
    norm="head", gate="silu", low_rank=False, rotary=False, seed=0,
):  # fmt: skip
    """Return x, states, weights, form and the norm in front, of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)

    heads = groups * share
    inner, tied, by_head = heads * value, decay == "forget", decay == "softplus by head"
    decays = 0 if decay in ("none", "fixed") else heads if by_head else heads * key
    mixed = (1 if tied else 2) * groups * key + inner
    second = low_rank and decays > heads
    gates = 0 if gate == "none" else 3 if low_rank else inner
    columns = (mixed, gates, 2 if second else decays, heads if beta else 0)
    rated = decay in ("softplus", "bounded", "softplus by head")
    weights = Weights(
        in_proj=draw(sum(columns), width),
        conv=draw(mixed, taps) if taps else None,
        conv_bias=draw(mixed) if taps > 1 else None,
        decay_proj=draw(decays, 2) if second else None,
        decay_bias=draw(decays) if second and decay == "sigmoid" else None,
        A_log=-draw(heads).abs() if decay == "fixed" else draw(heads) if rated else None,
        dt_bias=draw(decays) if rated else None,
        frequency=draw(key // 2) if rotary else None,
        gate_proj=draw(inner, 3) if low_rank and gates else None,
        norm=draw({"head": value, "whole": inner}[norm]) if norm in ("head", "whole") else None,
        out_proj=draw(width, inner),
    )
    by = {"bounded": -5.0, "sigmoid": 16.0, "forget": 0.2}.get(decay, 0.0)
    form = Form(
        groups, heads, key, value, columns, decay=decay.removesuffix(" by head"), decay_by=by, beta=beta,
        scale=key**-0.5, feature_map=feature_map, silu=groups * key, norm=norm, gate=gate,
    )  # fmt: skip
    memory = draw(batch, heads, key, value + (norm == "sum"))
    if norm == "sum":
        memory = memory.abs()  # a sum of positive weights
    states = draw(batch, max(0, taps - 1), mixed), memory
    return draw(batch, width), *states, weights, form, Norm("rmsnorm", draw(width), None, 1e-6)


def widened(values):
    return [
        v.double() if isinstance(v, torch.Tensor) else type(v)(*widened(v)) if isinstance(v, (Weights, Norm)) else v
        for v in values
    ]


def run(inputs, impl="native", residual=True):
    return delta_step(*inputs[:5], norm=inputs[5], residual=residual, impl=impl)


def assert_close(got, expected, tolerance=3e-5):
    for g, e in zip(got, expected, strict=True):
        scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), e, rtol=0, atol=tolerance * scale)


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 4), width=st.integers(1, 37), groups=st.integers(1, 3), share=st.integers(1, 3),
    key=st.integers(1, 20), value=st.integers(1, 70), decay=st.sampled_from(DECAYS), beta=st.sampled_from([0, 1, 2]),
    taps=st.integers(0, 5), feature_map=st.sampled_from(["none", "relu", "elu", "l2"]),
    norm=st.sampled_from(["head", "whole", "none"]), gate=st.sampled_from(["silu", "sigmoid", "none"]),
    low_rank=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_c_is_the_reference_at_any_size(share, decay, feature_map, residual, **sizes):
    if decay in ("softplus", "bounded", "sigmoid", "forget"):
        share = 1  # decays by channel belong to heads that have keys of their own
    inputs = case(share=share, decay=decay, feature_map="none" if decay == "forget" else feature_map, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))  # what C leaves unwritten shows
        got = run(inputs, residual=residual)
    assert_close(got, step_reference(*widened(inputs), residual), 1e-4)


@needs_compiler
@pytest.mark.parametrize("options", [{"norm": "sum", "feature_map": "elu", "beta": 0.0}, {"rotary": True}])
def test_sums_of_weights_and_turned_states(options):
    inputs = case(decay="none" if "norm" in options else "fixed", value=64, **options)
    assert_close(run(inputs), step_reference(*widened(inputs), True))


@needs_compiler
def test_writing_over_its_own_input_gives_the_same_and_the_given_states_stay():
    inputs = case(3, 24)
    x, conv, memory, weights, form, norm = inputs
    before = [t.clone() for t in inputs[:3]]
    expected = run(inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs[:3], before, strict=True))
    native.Step(weights, form, norm, True).bound((conv, conv), (memory, memory))(x, x)
    assert all(torch.equal(a, b) for a, b in zip((x, conv, memory), expected, strict=True))


@needs_compiler
@pytest.mark.parametrize("norm", ["head", "whole"])
def test_threads_and_the_rest_of_the_batch_change_no_bit(norm, monkeypatch):
    monkeypatch.setattr(step, "THREAD_ELEMENTS", 1)
    inputs = case(5, 33, 3, key=16, value=24, low_rank=True, norm=norm)
    results = []
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(step, "threads", lambda count=count: count)
        results.append(run(inputs))
    alone = [run((*(t[b : b + 1] for t in inputs[:3]), *inputs[3:])) for b in range(5)]
    results.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
@pytest.mark.parametrize("where", ["x", "conv", "memory", "A_log", "dt_bias"])
def test_nan_comes_out_where_it_goes_in(where):
    x, conv, memory, weights, form, norm = case(1)
    target = {"x": x, "conv": conv, "memory": memory, "A_log": weights.A_log, "dt_bias": weights.dt_bias}[where]
    target.view(-1)[1] = torch.nan
    assert run((x, conv, memory, weights, form, norm))[0].isnan().any()


@needs_compiler
@pytest.mark.parametrize("value", [-200.0, 30.0, 1e4])
def test_extreme_decays_neither_overflow_nor_vanish(value):
    inputs = case(1)
    inputs[3].dt_bias.fill_(value)
    assert_close(run(inputs), step_reference(*widened(inputs), True))


def test_other_dtypes_take_the_torch_form():
    x, conv, memory, weights, form, norm = widened(case())
    got = delta_step(x, conv, memory, weights, form, norm=norm, residual=True)
    assert got[0].dtype == torch.float64
    assert torch.equal(got[0], step_reference(x, conv, memory, weights, form, norm, True)[0])


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        (lambda i: (*i[:2], i[2][:, :1], *i[3:]), KernelInputError, "memory"),
        (lambda i: (*i[:3], i[3]._replace(A_log=None), *i[4:]), KernelInputError, "A_log"),
        (lambda i: (*i[:3], i[3]._replace(out_proj=i[3].out_proj[:, 1:]), *i[4:]), KernelInputError, "out_proj"),
        (lambda i: (*i[:4], i[4]._replace(columns=(1, 2, 3, 4)), i[5]), KernelInputError, "columns"),
        (lambda i: (*i[:4], i[4]._replace(gate="relu"), i[5]), ConfigError, "gate"),
    ],
)
def test_wrong_inputs_are_refused_by_name(change, error, field):
    with pytest.raises(error) as caught:
        run(change(case()), impl="auto")
    assert caught.value.field == field
