"""The diagonal scan against its float64 step-by-step form: every implementation, real and complex, and gradients."""

import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridnas.errors import KernelInputError, KernelUnavailableError
from hybridnas.kernels.diagonal_scan import describe, diagonal_scan, native

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

needs_c = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="no C compiler")
FAST = [pytest.param("torch"), pytest.param("native", marks=needs_c)]


def inputs(batch, length, channels, *, complex_=False, initial=True, strided=False, seed=0, double=True):
    make = torch.Generator().manual_seed(seed)
    real, dtype = (torch.float64, torch.complex128) if double else (torch.float32, torch.complex64)

    def normal(*shape):
        drawn = torch.randn(*shape, generator=make, dtype=torch.float64)
        if complex_:
            return torch.complex(drawn, torch.randn(*shape, generator=make, dtype=torch.float64)).to(dtype)
        return drawn.to(real)

    wide = (batch, length, channels)
    x = normal(batch, length, 2 * channels + 1)[..., 1 : 1 + channels] if strided else normal(*wide)
    a = normal(*wide)
    values = {"a": a / a.abs().clamp_min(1e-3) * torch.rand(*wide, generator=make).to(real), "x": x}
    if initial:
        values["initial_state"] = normal(batch, channels)
    return {name: v.detach().requires_grad_() for name, v in values.items()}


def documents(batch, length, seed):
    return torch.randint(0, 5, (batch, length), generator=torch.Generator().manual_seed(seed)).sort(1).values


def run(values, ids, impl, seed=1):
    outputs = diagonal_scan(**values, seq_idx=ids, return_final_state=True, impl=impl)
    make = torch.Generator().manual_seed(seed)
    grads = []
    for o in outputs:
        wide = torch.complex128 if o.is_complex() else torch.float64
        grads.append(torch.randn(o.shape, generator=make, dtype=wide).to(o.dtype))
    gradients = torch.autograd.grad(outputs, list(values.values()), grads)
    return dict(zip(("h", "final", *values), (*outputs, *gradients), strict=True))


def agree(got, true, most):
    for name, expected in true.items():
        scale = expected.abs().max().item() if expected.numel() else 0.0
        error = (got[name].to(expected.dtype) - expected).abs().max().item() if expected.numel() else 0.0
        assert got[name].shape == expected.shape
        assert error <= most * scale + 1e-12, f"{name} is {error} off"


@pytest.mark.parametrize("path", FAST)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(0, 3),
    length=st.sampled_from([1, 2, 3, 5, 13, 64, 65, 131]),
    channels=st.sampled_from([1, 7, 8, 16, 64, 65, 150]),
    complex_=st.booleans(),
    initial=st.booleans(),
    packed=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_agree_with_the_float64_form(
    path, batch, length, channels, complex_, initial, packed, strided, seed
):
    options = {"complex_": complex_, "initial": initial, "strided": strided, "seed": seed}
    ids = documents(batch, length, seed) if packed else None
    true = run(inputs(batch, length, channels, **options), ids, "reference")
    agree(run(inputs(batch, length, channels, **options, double=False), ids, path), true, 1e-5)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize(
    ("shape", "initial", "packed", "strided"),
    [
        ((2, 71, 37), True, True, True),
        ((1, 32, 32), True, False, False),
        ((2, 33, 5), False, True, False),
        ((1, 1, 40), True, False, True),
        ((2, 130, 3), False, False, False),
    ],
)
def test_the_triton_form_agrees_with_the_float64_form(shape, complex_, initial, packed, strided):
    options = {"complex_": complex_, "initial": initial, "strided": strided}
    ids = documents(*shape[:2], 0) if packed else None
    true = run(inputs(*shape, **options), ids, "reference")
    agree(run(inputs(*shape, **options, double=False), ids, "triton"), true, 1e-5)


@pytest.mark.parametrize("complex_", [False, True])
def test_the_associative_form_equals_the_steps_in_double_precision(complex_):
    for length in (1, 2, 3, 31, 64, 100):
        ids = documents(2, length, 3)
        true = run(inputs(2, length, 5, complex_=complex_), ids, "reference")
        agree(run(inputs(2, length, 5, complex_=complex_), ids, "torch"), true, 1e-13)


def test_the_reference_is_the_recurrence():
    a, x = torch.tensor([0.5, 2.0, 3.0]).reshape(1, 3, 1), torch.tensor([1.0, 10.0, 100.0]).reshape(1, 3, 1)
    h, final = diagonal_scan(a, x, torch.tensor([[4.0]]), return_final_state=True, impl="reference")
    assert h.flatten().tolist() == [3.0, 16.0, 148.0]
    assert final.flatten().tolist() == [148.0]
    alone = diagonal_scan(a, x, torch.tensor([[4.0]]), seq_idx=torch.tensor([[0, 0, 1]]), impl="reference")
    assert alone.flatten().tolist() == [3.0, 16.0, 100.0]


@pytest.mark.parametrize("complex_", [False, True])
def test_reference_and_associative_form_pass_gradcheck(complex_):
    values = inputs(2, 5, 2, complex_=complex_)
    for impl in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda a, x, s, impl=impl: diagonal_scan(a, x, s, return_final_state=True, impl=impl),
            tuple(values.values()),
        )


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("complex_", [False, True])
def test_pieces_through_the_state_are_the_whole(impl, complex_):
    values = {n: v.detach() for n, v in inputs(2, 30, 20, complex_=complex_, double=False).items()}
    whole, final = diagonal_scan(**values, return_final_state=True, impl=impl)
    for size in (1, 2, 9):
        state, parts = values["initial_state"], []
        for a, x in zip(values["a"].split(size, 1), values["x"].split(size, 1), strict=True):
            h, state = diagonal_scan(a, x, state, return_final_state=True, impl=impl)
            parts.append(h)
        torch.testing.assert_close(torch.cat(parts, 1), whole)
        torch.testing.assert_close(state, final)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_packed_documents_are_the_documents_alone(impl):
    values = {n: v.detach() for n, v in inputs(1, 30, 5, initial=False, double=False).items()}
    ids = torch.tensor([[1] * 12 + [7] * 2 + [1] * 16])
    packed, final = diagonal_scan(**values, seq_idx=ids, return_final_state=True, impl=impl)
    for piece in (slice(0, 12), slice(12, 14), slice(14, 30)):
        a, x = values["a"][:, piece], values["x"][:, piece]
        alone, last = diagonal_scan(a, x, return_final_state=True, impl=impl)
        torch.testing.assert_close(packed[:, piece], alone)
    torch.testing.assert_close(final, last)


@pytest.mark.parametrize("impl", FAST)
def test_half_precision_is_summed_in_float32(impl):
    values = {n: v.detach() for n, v in inputs(2, 100, 9, double=False).items()}
    narrow = {n: v.bfloat16() for n, v in values.items()}
    true = diagonal_scan(**{n: v.float() for n, v in narrow.items()}, impl="reference")
    h, final = diagonal_scan(**narrow, return_final_state=True, impl=impl)
    assert (h.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(h, true.bfloat16())


@needs_c
def test_a_constant_decay_is_read_without_a_copy_and_has_the_summed_gradient():
    values = inputs(2, 9, 70, double=False)
    a = values["a"][0, 0].detach().requires_grad_()
    found = [torch.autograd.grad(diagonal_scan(a.expand(2, 9, -1), values["x"], impl=i).sum(), a)[0] for i in
             ("native", "reference")]  # fmt: skip
    torch.testing.assert_close(*found)


@needs_c
def test_the_same_bits_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(inputs(3, 100, 300, double=False), None, "native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.slow
@needs_c
def test_the_operator_is_registered_as_torch_demands():
    torch.use_deterministic_algorithms(False)
    for planes in (1, 2):
        x = torch.randn(planes, 2, 9, 20, requires_grad=True)
        a, state = torch.rand(planes, 2, 9, 20, requires_grad=True), torch.randn(planes, 2, 20, requires_grad=True)
        torch.library.opcheck(torch.ops.hybridnas.diagonal_scan, (x, a, state, None))


@pytest.mark.parametrize(
    ("changes", "got", "allowed"),
    [
        ({"x": torch.zeros(3, 2)}, (3, 2), "(B, L, D)"),
        ({"a": torch.zeros(1, 3, 1)}, (1, 3, 1), (1, 3, 2)),
        ({"a": torch.zeros(1, 3, 2, dtype=torch.complex64)}, torch.complex64, "floating point, and complex where x is"),
        ({"initial_state": torch.zeros(1, 3)}, (1, 3), (1, 2)),
        ({"seq_idx": torch.zeros(1, 2, dtype=torch.long)}, (1, 2), (1, 3)),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected_and_got(changes, got, allowed):
    with pytest.raises(KernelInputError) as refused:
        diagonal_scan(**({"a": torch.zeros(1, 3, 2), "x": torch.zeros(1, 3, 2)} | changes))
    if allowed == "floating point, and complex where x is":
        assert (refused.value.field, refused.value.got) == ("a", got)
        return
    assert (refused.value.field, refused.value.got, refused.value.allowed) == (next(iter(changes)), got, allowed)


@needs_c
def test_a_requested_implementation_runs_or_raises():
    with pytest.raises(KernelUnavailableError) as refused:
        diagonal_scan(*[torch.zeros(1, 3, 2, dtype=torch.float64)] * 2, impl="native")
    assert refused.value.field == "impl" and "torch" in refused.value.allowed
    assert describe("cpu").startswith("native: C, compiled by" if native.available() else "torch: an associative scan")
