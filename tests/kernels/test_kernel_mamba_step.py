"""One token through a Mamba layer in C: against the plain form in float64, at odd sizes, by any number of threads."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnas.errors import ConfigError, KernelInputError, KernelUnavailableError
from hybridnas.kernels._build import step
from hybridnas.kernels.mamba_step import Norm, Weights, describe, mamba_step, native, step_reference

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C compiler")
EMPTY = torch.empty


def case(batch, width, inner, states, taps, rank, *, selected="dt+B+C", norm="rmsnorm", bias=True, seed=0):
    """Return x, states, weights and norm of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)

    rank = rank if "dt" in selected else 0
    parts = rank + states * (("B" in selected) + ("C" in selected))
    weights = Weights(
        draw(2 * inner, width), draw(2 * inner) if bias else None, draw(inner, taps), draw(inner) if bias else None,
        draw(parts, inner) if parts else None, draw(inner, rank) if rank else None, draw(inner),
        torch.rand(inner, states, generator=generator).add(0.5).log(), draw(inner),
        None if "B" in selected else draw(states), None if "C" in selected else draw(states), draw(width, inner),
        draw(width) if bias else None,
    )  # fmt: skip
    norms = {"none": None, "bare": Norm("layernorm", None, None, 1e-5)}
    norms["rmsnorm"] = Norm("rmsnorm", draw(width), None, 1e-6)
    norms["layernorm"] = Norm("layernorm", draw(width), draw(width), 1e-5)
    return draw(batch, width), draw(batch, taps - 1, inner), draw(batch, inner, states), weights, norms[norm]


def widened(values):
    return [
        t.double() if isinstance(t, torch.Tensor) else type(t)(*widened(t)) if isinstance(t, tuple) else t
        for t in values
    ]


def poisoned(monkeypatch):
    """Fill what torch.empty_like hands out with NaN: what C leaves unwritten shows."""
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))


def assert_close(got, expected, tolerance=1e-5):
    for g, e in zip(got, expected, strict=True):
        scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), e, rtol=0, atol=tolerance * scale)


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(0, 5), width=st.integers(1, 37), inner=st.integers(1, 45), states=st.integers(1, 64),
    taps=st.integers(1, 5), rank=st.integers(1, 9), selected=st.sampled_from(["dt+B+C", "B+C", "dt", "C", "none"]),
    norm=st.sampled_from(["rmsnorm", "layernorm", "bare", "none"]), bias=st.booleans(), residual=st.booleans(),
)  # fmt: skip
def test_c_is_the_reference_at_any_size(batch, width, inner, states, taps, rank, selected, norm, bias, residual):
    inputs = case(batch, width, inner, states, taps, rank, selected=selected, norm=norm, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch)
        got = mamba_step(*inputs[:4], norm=inputs[4], residual=residual, impl="native")
    assert_close(got, step_reference(*widened(inputs), residual), 3e-5 if norm != "none" else 1e-5)


@needs_compiler
@pytest.mark.parametrize("states", [1, 7, 8, 16, 17, 32, 64])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_c_is_the_reference_at_the_sizes_of_models(states, batch, monkeypatch):
    poisoned(monkeypatch)
    inputs = case(batch, 96, 200, states, 4, 6)
    got = mamba_step(*inputs[:4], norm=inputs[4], residual=True)
    assert_close(got, step_reference(*widened(inputs), True))


@needs_compiler
def test_the_given_states_and_token_stay_as_they_are():
    inputs = case(2, 24, 40, 16, 4, 3)
    before = [t.clone() for t in inputs[:3]]
    mamba_step(*inputs[:4], norm=inputs[4], residual=True)
    assert all(torch.equal(a, b) for a, b in zip(inputs[:3], before, strict=True))


@needs_compiler
def test_writing_over_its_own_input_gives_the_same():
    x, conv, ssm, weights, norm = case(3, 24, 40, 16, 4, 3)
    expected = mamba_step(x, conv, ssm, weights, norm=norm, residual=True)
    native.Step(weights, norm, True).bound((conv, conv), (ssm, ssm))(x, x)
    assert all(torch.equal(a, b) for a, b in zip((x, conv, ssm), expected, strict=True))


@needs_compiler
def test_threads_and_the_rest_of_the_batch_change_no_bit(monkeypatch):
    monkeypatch.setattr(step, "THREAD_ELEMENTS", 1)
    inputs = case(5, 33, 75, 16, 4, 3)
    results = []
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(step, "threads", lambda count=count: count)
        results.append(mamba_step(*inputs[:4], norm=inputs[4], residual=True))
    alone = [
        mamba_step(*(t[b : b + 1] for t in inputs[:3]), inputs[3], norm=inputs[4], residual=True) for b in range(5)
    ]
    results.append(tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_inputs_that_lie_otherwise_are_read_right():
    x, conv, ssm, weights, norm = case(2, 24, 40, 16, 4, 3)
    expected = mamba_step(x, conv, ssm, weights, norm=norm)
    turned = weights._replace(in_proj=weights.in_proj.t().contiguous().t(), out_proj=weights.out_proj.t().clone().t())
    wide = torch.zeros(2, 48)
    wide[:, ::2] = x
    got = mamba_step(wide[:, ::2], conv.transpose(0, 1).clone().transpose(0, 1), ssm, turned, norm=norm)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_compiler
@pytest.mark.parametrize("where", ["x", "conv", "ssm", "A_log", "dt_bias"])
def test_nan_comes_out_where_it_goes_in(where):
    x, conv, ssm, weights, norm = case(1, 24, 40, 16, 4, 3)
    target = {"x": x, "conv": conv, "ssm": ssm, "A_log": weights.A_log, "dt_bias": weights.dt_bias}[where]
    target.view(-1)[3] = torch.nan
    assert mamba_step(x, conv, ssm, weights, norm=norm)[0].isnan().any()


@needs_compiler
@pytest.mark.parametrize("value", [-200.0, -30.0, 30.0, 1e4])
def test_extreme_steps_neither_overflow_nor_vanish(value):
    inputs = case(1, 8, 16, 16, 4, 3)
    inputs[3].dt_bias.fill_(value)
    assert_close(mamba_step(*inputs[:4]), step_reference(*widened(inputs[:4]), None, False))


def test_other_dtypes_take_the_torch_form():
    inputs = case(2, 12, 20, 4, 3, 2)
    x, conv, ssm, weights, norm = widened(inputs)
    got = mamba_step(x, conv, ssm, weights, norm=norm, residual=True)
    assert got[0].dtype == torch.float64
    assert torch.equal(got[0], step_reference(x, conv, ssm, weights, norm, True)[0])


@pytest.mark.slow
def test_without_a_compiler_the_torch_form_gives_the_same(tmp_path):
    code = (
        "import torch\n"
        "from hybridnas.kernels.mamba_step import describe, mamba_step, native\n"
        "from tests.kernels.test_kernel_mamba_step import case, assert_close, step_reference, widened\n"
        "assert not native.available()\n"
        "assert describe('cpu') == 'torch: operation by operation (native is not compiled: no C compiler found (tried "
        "cc, gcc, clang); install gcc or clang to run faster)'\n"
        "inputs = case(2, 24, 40, 16, 4, 3)\n"
        "got = mamba_step(*inputs[:4], norm=inputs[4], residual=True)\n"
        "assert_close(got, step_reference(*widened(inputs), True))\n"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {"PATH": str(tmp_path), "HYBRIDNAS_CACHE": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr


def test_describe_says_what_runs():
    assert describe("cpu").startswith(("native: C, compiled by", "torch: operation by operation (native is not"))
    assert describe("cuda") == "torch: operation by operation"
    assert describe("cpu", torch.bfloat16) == "torch: operation by operation (native takes float32, got bfloat16)"


@pytest.mark.parametrize(
    ("change", "error", "field", "got"),
    [
        ({"x": EMPTY(3)}, KernelInputError, "x", (3,)),
        ({"conv_state": EMPTY(2, 2, 20)}, KernelInputError, "conv_state", (2, 2, 20)),
        ({"ssm_state": EMPTY(1, 20, 4)}, KernelInputError, "ssm_state", (1, 20, 4)),
        ({"in_proj": EMPTY(39, 12)}, KernelInputError, "in_proj", (39, 12)),
        ({"A_log": EMPTY(20)}, KernelInputError, "A_log", (20,)),
        ({"x_proj": None}, KernelInputError, "x_proj", None),
        ({"norm": Norm("batchnorm", None, None, 0.0)}, ConfigError, "norm", "batchnorm"),
        ({"norm": Norm("rmsnorm", EMPTY(3), None, 0.0)}, KernelInputError, "norm weight", (3,)),
        ({"x": EMPTY(2, 12, dtype=torch.int64)}, KernelInputError, "x", torch.int64),
        ({"impl": "triton"}, KernelUnavailableError, "impl", "triton"),
        ({"impl": "native", "A_log": EMPTY(20, 4).double()}, KernelUnavailableError, "impl", "native"),
    ],
)
def test_wrong_inputs_are_refused_by_name(change, error, field, got):
    x, conv, ssm, weights, _ = case(2, 12, 20, 4, 4, 2)
    given = {"x": x, "conv_state": conv, "ssm_state": ssm, **change}
    inner = {name: given.pop(name) for name in Weights._fields if name in given}
    with pytest.raises(error) as refused:
        mamba_step(**given, weights=weights._replace(**inner))
    assert (refused.value.field, refused.value.got) == (field, got)
