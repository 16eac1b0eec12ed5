"""RMSNorm, LayerNorm and both with the residual's addition against float64: values, gradients, dtypes, words."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridnas.errors import ConfigError, KernelInputError, KernelUnavailableError
from hybridnas.kernels.rmsnorm import add_norm, describe, layer_norm, rms_norm

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def spelled_out(x, weight, bias, eps, kind):
    """The papers' formulas, written again."""
    if kind == "layernorm":
        x = x - x.sum(-1, keepdim=True) / x.shape[-1]
    y = x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5
    return (y if weight is None else y * weight) + (0 if bias is None else bias)


def assert_close(got, true, tolerance, what):
    assert got.shape == true.shape
    if true.numel():
        error, scale = (got.double() - true).abs().max().item(), max(true.abs().max().item(), 1.0)
        assert error <= tolerance * scale, f"{what} is off by {error:.1e} of {scale:.1e}"


def assert_agrees(impl, kind, shape, *, weighted=True, fused=False, strided=False, dtype, tolerance, seed=0):
    """Compare outputs and all gradients, of a dtype and in float64, from the same rounded numbers."""
    torch.manual_seed(seed)

    def normal(*size):
        return torch.randn(*size[:-1], 2 * size[-1])[..., :: 2 if strided else 1][..., : size[-1]].to(dtype)

    inputs = {"x": normal(*shape)}
    if fused:
        inputs["residual"] = normal(*shape)
    if weighted:
        inputs["weight"] = normal(shape[-1])
        if kind == "layernorm":
            inputs["bias"] = normal(shape[-1])
    mine = {name: t.requires_grad_() for name, t in inputs.items()}
    true = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    weight, bias = mine.get("weight"), mine.get("bias")
    if fused:
        got = add_norm(mine["x"], mine["residual"], weight, bias, 1e-3, kind=kind, impl=impl)
        total = true["x"] + true["residual"]
    elif kind == "rmsnorm":
        got, total = (rms_norm(mine["x"], weight, 1e-3, impl=impl),), true["x"]
    else:
        got, total = (layer_norm(mine["x"], weight, bias, 1e-3, impl=impl),), true["x"]
    wanted = (spelled_out(total, true.get("weight"), true.get("bias"), 1e-3, kind), total)[: len(got)]
    upstream = [torch.randn(w.shape).to(dtype) for w in wanted]
    for what, a, b in zip(("y", "sum"), got, wanted, strict=False):
        assert a.dtype == dtype
        assert_close(a, b, tolerance, what)
    gradients = torch.autograd.grad(got, list(mine.values()), upstream)
    truths = torch.autograd.grad(wanted, list(true.values()), [u.double() for u in upstream])
    for name, a, b in zip(mine, gradients, truths, strict=True):
        assert a.dtype == dtype
        assert_close(a, b, tolerance, f"gradient by {name}")


shapes = st.one_of(
    st.tuples(st.sampled_from([0, 1, 2, 13, 33]), st.sampled_from([1, 2, 7, 31, 64, 101])),
    st.tuples(st.just(2), st.integers(0, 5), st.sampled_from([1, 3, 8, 40])),
    st.tuples(st.sampled_from([1, 5, 17])),
)


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("impl", ["reference", "torch", "auto"])
@settings(max_examples=40)
@given(shape=shapes, weighted=st.booleans(), fused=st.booleans(), strided=st.booleans(), seed=st.integers(0, 1000))
def test_outputs_and_gradients_are_those_of_the_papers(impl, kind, shape, weighted, fused, strided, seed):
    for dtype, tolerance in ((torch.float32, 3e-5), (torch.float64, 1e-11)):
        assert_agrees(impl, kind, shape, weighted=weighted, fused=fused, strided=strided, dtype=dtype,
                      tolerance=tolerance, seed=seed)  # fmt: skip


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16_is_as_right_as_its_rounding(kind, fused):
    # eight bits of mantissa: half a unit is 2^-9; sums, gradients and outputs are rounded a few times each
    assert_agrees("auto", kind, (40, 24), fused=fused, dtype=torch.bfloat16, tolerance=6 * 2**-9)


def test_torch_agrees_with_the_specification():
    x, weight, bias = torch.randn(5, 9, dtype=torch.float64), torch.randn(9).double(), torch.randn(9).double()
    theirs = F.rms_norm(x, (9,), weight, 1e-5)
    assert torch.allclose(rms_norm(x, weight, impl="reference"), theirs, rtol=1e-12)
    theirs = F.layer_norm(x, (9,), weight, bias, 1e-5)
    assert torch.allclose(layer_norm(x, weight, bias, impl="reference"), theirs, rtol=1e-12)


def test_the_gradient_of_rms_norm_passes_gradcheck():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rms_norm, (x, weight))
    assert torch.autograd.gradcheck(lambda v: rms_norm(v), (x,))
    assert torch.autograd.gradcheck(lambda w: rms_norm(x.detach(), w), (weight,))


def test_a_row_of_zeros_has_a_zero_norm_and_a_finite_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    y = rms_norm(x, torch.ones(4), 1e-6)
    y.sum().backward()
    assert not y.any() and torch.allclose(x.grad, torch.full((2, 4), 1000.0))


def test_a_row_does_not_depend_on_its_batch():
    x, weight = torch.randn(33, 65), torch.randn(65)
    assert torch.equal(rms_norm(x, weight)[7], rms_norm(x[7:8], weight)[0])


@pytest.mark.slow
def test_norms_compile_in_one_graph_and_export():
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)

    class Norms(torch.nn.Module):
        def forward(self, x, weight):
            y, total = add_norm(x, rms_norm(x, weight), weight, kind="rmsnorm")
            return layer_norm(y, weight) + total

    eager = Norms()(x, weight)
    compiled = torch.compile(Norms(), fullgraph=True, backend="aot_eager")(x, weight)
    assert torch.allclose(compiled, eager, atol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(compiled.sum(), (x, weight)), torch.autograd.grad(eager.sum(), (x, weight)), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)
    exported = torch.export.export(Norms(), (x.detach(), weight.detach())).module()
    assert torch.allclose(exported(x, weight), eager, atol=1e-5)


def test_a_wrong_argument_is_named_with_what_was_expected_and_got():
    x, weight = torch.randn(4, 6), torch.randn(6)
    for call, field, got, allowed in (
        (lambda: rms_norm(x.long()), "x", "(4, 6), torch.int64", "floating-point tensor (..., D)"),
        (lambda: rms_norm([1.0]), "x", "list", "floating-point tensor (..., D)"),
        (lambda: rms_norm(x[:, :0]), "x", "(4, 0), torch.float32", "floating-point tensor (..., D)"),
        (lambda: rms_norm(x, weight[:5]), "weight", (5,), (6,)),
        (lambda: layer_norm(x, weight, x), "bias", (4, 6), "(D,)"),
        (lambda: layer_norm(x, weight.to("meta")), "weight", torch.device("meta"), torch.device("cpu")),
        (lambda: add_norm(x, x[:3]), "residual", (3, 6), (4, 6)),
        (lambda: add_norm(x, x.double()), "residual", torch.float64, torch.float32),
        (lambda: rms_norm(x, eps=-1.0), "eps", -1.0, ">= 0"),
    ):
        with pytest.raises(KernelInputError) as refused:
            call()
        assert (refused.value.field, refused.value.got, refused.value.allowed) == (field, got, allowed)
    with pytest.raises(ConfigError) as refused:
        add_norm(x, x, kind="batchnorm")
    assert refused.value.allowed == ("rmsnorm", "layernorm")
    with pytest.raises(ConfigError) as refused:
        add_norm(x, x, weight, weight)
    assert refused.value.field == "bias"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_triton_is_refused_on_a_processor():
    with pytest.raises(KernelUnavailableError, match="rms_norm impl='triton' needs a CUDA device") as refused:
        rms_norm(torch.randn(3, 4), impl="triton")
    assert refused.value.allowed == ["auto", "reference", "torch"]
    assert describe("cpu").startswith("torch: F.layer_norm; RMSNorm with an own backward")


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_triton_norms_agree_with_the_papers(kind, dtype):
    tolerance = {torch.float32: 3e-5, torch.float64: 1e-11, torch.bfloat16: 6 * 2**-9}[dtype]
    for shape, options in (
        ((1, 1), {}),
        ((19, 37), {"fused": True}),
        ((2, 9, 8), {"weighted": False, "strided": True}),
        ((3, 70), {"weighted": False, "fused": True, "strided": True}),
        ((0, 5), {"fused": True}),
    ):
        assert_agrees("triton", kind, shape, dtype=dtype, tolerance=tolerance, **options)


@pytest.mark.interpreter
def test_the_triton_norms_operator_keeps_torchs_contract():
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    residual = torch.randn(3, 5, requires_grad=True)
    rms_norm(x, weight, impl="triton")  # registers the operator
    torch.library.opcheck(torch.ops.hybridnas.norm, (x, residual, weight, None, 1e-5, False))
    with pytest.raises(KernelUnavailableError, match="impl='triton' takes at most 4096 features D, got 9000"):
        rms_norm(torch.randn(1, 9000), impl="triton")
