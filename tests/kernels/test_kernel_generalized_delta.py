"""RWKV-7's recurrence against its float64 step-by-step form: every implementation, states, documents, gradients."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridnas.errors import KernelInputError, KernelUnavailableError
from hybridnas.kernels.generalized_delta import describe, generalized_delta, native

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

needs_c = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="no C compiler")
FAST = [pytest.param("torch"), pytest.param("native", marks=needs_c)]


def inputs(batch, length, heads, size, width, *, initial=True, strided=False, seed=0, dtype=torch.float64, slow=0.6065):
    """Return directions of length one and rates in [0, 1], as RWKV-7 has them, and decays from e^-slow to 1."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    by_channel = (batch, length, heads, size)
    direction = F.normalize(normal(*by_channel), dim=-1)
    values = {
        "q": normal(batch, length, heads, 2 * size)[..., size:] if strided else normal(*by_channel),
        "k": normal(*by_channel) * size**-0.5,
        "v": normal(batch, heads, length, width).transpose(1, 2) if strided else normal(batch, length, heads, width),
        "log_decay": -slow * normal(*by_channel).sigmoid(),
        "a": -direction,
        "b": direction * normal(*by_channel).sigmoid(),
    }
    if initial:
        values["initial_state"] = normal(batch, heads, size, width)
    return {name: v.to(dtype).detach().requires_grad_() for name, v in values.items()}


def documents(batch, length, seed):
    return torch.randint(0, 5, (batch, length), generator=torch.Generator().manual_seed(seed)).sort(1).values


def run(values, ids, impl, **options):
    outputs = generalized_delta(**values, seq_idx=ids, return_final_state=True, impl=impl, **options)
    make = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=make, dtype=torch.float64).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(values.values()), upstream)
    return dict(zip(("o", "final", *values), (*outputs, *gradients), strict=True))


def agree(got, true, most):
    for name, expected in true.items():
        assert got[name].shape == expected.shape
        if expected.numel():
            error = (got[name].double() - expected).abs().max().item()
            assert error <= most * expected.abs().max().item() + 1e-12, f"{name} is {error} off"


@pytest.mark.parametrize("path", FAST)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(0, 2),
    length=st.sampled_from([1, 2, 3, 13, 64, 65, 131]),
    heads=st.integers(1, 3),
    size=st.sampled_from([1, 3, 16, 17, 64, 70]),
    width=st.sampled_from([1, 5, 16, 33]),
    initial=st.booleans(),
    packed=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_agree_with_the_float64_form(
    path, batch, length, heads, size, width, initial, packed, strided, seed
):
    shape, options = (batch, length, heads, size, width), {"initial": initial, "strided": strided, "seed": seed}
    ids = documents(batch, length, seed) if packed else None
    true = run(inputs(*shape, **options), ids, "reference")
    agree(run(inputs(*shape, **options, dtype=torch.float32), ids, path), true, 1e-5)


@pytest.mark.parametrize("slow", [0.01, 0.6065, 40.0])
@pytest.mark.parametrize("chunk", [1, 16, 50, 64])
def test_the_chunked_form_equals_the_steps_in_double_precision(chunk, slow):
    ids = documents(2, 100, 3)
    true = run(inputs(2, 100, 2, 5, 4, slow=slow), ids, "reference")
    agree(run(inputs(2, 100, 2, 5, 4, slow=slow), ids, "torch", chunk_size=chunk), true, 1e-13)


def test_the_reference_is_the_recurrence():
    ones = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    v, a = (torch.tensor(x, dtype=torch.float64).reshape(1, 3, 1, 1) for x in ([1.0, 10.0, 100.0], [0.5, -1.0, 2.0]))
    half = torch.full_like(v, 0.5).log()
    given = {"q": ones, "k": ones, "v": v, "log_decay": half, "a": a, "b": 3 * ones}
    o, final = generalized_delta(**given, initial_state=4 * ones[:, :1], return_final_state=True, impl="reference")
    # 4 * 0.5 + 3 * 2 + 1 = 9; 9 * 0.5 - 3 * 9 + 10 = -12.5; -12.5 * 0.5 + 3 * -25 + 100 = 18.75
    torch.testing.assert_close(o.flatten(), torch.tensor([9.0, -12.5, 18.75], dtype=torch.float64))
    assert final.item() == pytest.approx(18.75)


def test_reference_and_chunked_form_pass_gradcheck():
    values = inputs(1, 5, 1, 2, 2)
    for impl in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda *tensors, impl=impl: generalized_delta(
                *tensors[:6], initial_state=tensors[6], return_final_state=True, impl=impl
            ),
            tuple(values.values()),
        )


@pytest.mark.parametrize("impl", FAST)
def test_pieces_through_the_state_are_the_whole(impl):
    values = {n: v.detach() for n, v in inputs(2, 30, 2, 8, 5, dtype=torch.float32).items()}
    state = values.pop("initial_state")
    whole, final = generalized_delta(**values, initial_state=state, return_final_state=True, impl=impl)
    for size in (1, 2, 9):
        memory, parts = state, []
        for start in range(0, 30, size):
            piece = {n: v[:, start : start + size] for n, v in values.items()}
            o, memory = generalized_delta(**piece, initial_state=memory, return_final_state=True, impl=impl)
            parts.append(o)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(memory, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", *FAST])
def test_packed_documents_are_the_documents_alone(impl):
    values = {n: v.detach() for n, v in inputs(1, 30, 2, 8, 5, initial=False, dtype=torch.float32).items()}
    ids = torch.tensor([[1] * 12 + [7] * 2 + [1] * 16])
    packed, final = generalized_delta(**values, seq_idx=ids, return_final_state=True, impl=impl)
    for piece in (slice(0, 12), slice(12, 14), slice(14, 30)):
        alone, last = generalized_delta(
            **{n: v[:, piece] for n, v in values.items()}, return_final_state=True, impl=impl
        )
        torch.testing.assert_close(packed[:, piece], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", FAST)
def test_half_precision_is_summed_in_float32(impl):
    narrow = {n: v.detach().bfloat16() for n, v in inputs(1, 100, 2, 8, 5, initial=False).items()}
    true = generalized_delta(**{n: v.float() for n, v in narrow.items()}, impl="reference")
    o, final = generalized_delta(**narrow, return_final_state=True, impl=impl)
    assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(o, true.bfloat16(), rtol=1e-2, atol=1e-2)


@needs_c
def test_the_same_bits_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(inputs(2, 100, 3, 16, 20, dtype=torch.float32), None, "native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.slow
@needs_c
def test_the_operator_is_registered_as_torch_demands():
    torch.use_deterministic_algorithms(False)
    values = inputs(2, 9, 2, 5, 4, dtype=torch.float32)
    q, k, v, log_decay, a, b, state = values.values()
    reset = torch.zeros(2, 9, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.hybridnas.generalized_delta, (q, k, log_decay, a, b, v, state, reset, True))


@pytest.mark.parametrize(
    ("changes", "got", "allowed"),
    [
        ({"q": torch.zeros(3, 2)}, (3, 2), "(B, L, H, K)"),
        ({"k": torch.zeros(1, 3, 1, 2)}, (1, 3, 1, 2), (1, 3, 2, 4)),
        ({"v": torch.zeros(1, 2, 2, 5)}, (1, 2, 2, 5), (1, 3, 2, 5)),
        ({"log_decay": torch.zeros(1, 3, 2)}, (1, 3, 2), "(B, L, H, K)"),
        ({"b": torch.zeros(1, 3, 2, 4, dtype=torch.long)}, torch.int64, "floating point"),
        ({"initial_state": torch.zeros(1, 2, 5, 4)}, (1, 2, 5, 4), (1, 2, 4, 5)),
        ({"seq_idx": torch.zeros(1, 2, dtype=torch.long)}, (1, 2), (1, 3)),
        ({"chunk_size": 0}, 0, ">= 1"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected_and_got(changes, got, allowed):
    values = {name: torch.zeros(1, 3, 2, 5 if name == "v" else 4) for name in ("q", "k", "v", "log_decay", "a", "b")}
    with pytest.raises(KernelInputError) as refused:
        generalized_delta(**(values | changes))
    assert (refused.value.field, refused.value.got, refused.value.allowed) == (next(iter(changes)), got, allowed)


@needs_c
def test_a_requested_implementation_runs_or_raises():
    double, wide = inputs(1, 3, 1, 4, 4), inputs(1, 3, 1, 300, 4, dtype=torch.float32)
    for values in (double, wide):
        with pytest.raises(KernelUnavailableError) as refused:
            generalized_delta(**values, impl="native")
        assert refused.value.field == "impl" and "torch" in refused.value.allowed
    assert describe("cpu").startswith("native: C, compiled by" if native.available() else "torch: chunked")
