"""The causal convolution against its float64 tap-by-tap form: every implementation, outputs and gradients."""

import os
import shutil
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridnas.errors import KernelInputError, KernelUnavailableError
from hybridnas.kernels.causal_conv1d import causal_conv1d, describe, native

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

PATHS = {impl: partial(causal_conv1d, impl=impl, return_final_state=True) for impl in ("reference", "torch", "native")}
conv_reference = PATHS["reference"]
needs_c = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="no C compiler")
FAST = [pytest.param("torch"), pytest.param("native", marks=needs_c)]


def inputs(batch, length, channels, taps, *, initial=True, strided=False, seed=0, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make).to(dtype)

    x = normal(batch, length, 2 * channels + 1)[..., 1 : 1 + channels] if strided else normal(batch, length, channels)
    values = {"x": x, "weight": normal(channels, taps), "bias": normal(channels)}
    if initial:
        values["initial_state"] = normal(batch, taps - 1, channels)
    return {name: v.requires_grad_() for name, v in values.items()}


def run(function, values, activation, ids, seed=1):
    outputs = function(**values, activation=activation, seq_idx=ids)
    make = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=make).to(o.dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(values.values()), grads)
    return dict(zip(("y", "final", *values), (*outputs, *gradients), strict=True))


@pytest.mark.parametrize("path", FAST)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(0, 3),
    length=st.sampled_from([1, 2, 3, 5, 13, 64, 65, 131]),
    channels=st.sampled_from([1, 7, 8, 16, 40, 129, 150]),
    taps=st.sampled_from([1, 2, 3, 3, 4, 4, 7]),
    activation=st.sampled_from([None, "silu"]),
    initial=st.booleans(),
    documents=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_agree_with_the_float64_form(
    path, batch, length, channels, taps, activation, initial, documents, strided, seed
):
    shape, options = (batch, length, channels, taps), {"initial": initial, "strided": strided, "seed": seed}
    ids = None
    if documents:
        ids = torch.randint(0, 5, (batch, length), generator=torch.Generator().manual_seed(seed)).sort(1).values
    true = run(conv_reference, inputs(*shape, **options), activation, ids)
    got = run(PATHS[path], inputs(*shape, **options, dtype=torch.float32), activation, ids)
    for name, expected in true.items():
        scale = expected.abs().max().item() if expected.numel() else 0.0
        error = (got[name].double() - expected).abs().max().item() if expected.numel() else 0.0
        # A sum over batch and length may cancel to nothing: its float32 rounding is that of its terms, of size one.
        rounding = 2.0**-24 * batch * length if name in ("weight", "bias") else 0.0
        assert error <= 1e-5 * scale + rounding + 1e-12, f"{name} is {error} off"


def test_the_reference_is_causal_and_puts_the_last_tap_on_the_present():
    x = torch.tensor([1.0, 10.0, 100.0]).reshape(1, 3, 1)
    y, final = conv_reference(x, torch.tensor([[3.0, 2.0]]), torch.tensor([0.5]))
    assert y.flatten().tolist() == [2.5, 23.5, 230.5]
    assert final.flatten().tolist() == [100.0]


def test_the_reference_passes_gradcheck():
    values = inputs(2, 5, 2, 3)
    names = list(values)
    assert torch.autograd.gradcheck(
        lambda *tensors: conv_reference(**dict(zip(names, tensors, strict=True)), activation="silu"),
        tuple(values.values()),
    )


@pytest.mark.parametrize("length", [1, 2, 9])
def test_pieces_through_the_state_are_the_whole(length):
    values = {n: v.detach() for n, v in inputs(2, 30, 20, 4, dtype=torch.float32).items()}
    whole, final = causal_conv1d(**values, activation="silu", return_final_state=True)
    state, parts = values.pop("initial_state"), []
    for x in values.pop("x").split(length, 1):
        y, state = causal_conv1d(x, **values, activation="silu", initial_state=state, return_final_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(state, final)


@pytest.mark.parametrize("impl", ["reference", "torch", pytest.param("native", marks=needs_c)])
def test_packed_documents_are_the_documents_alone(impl):
    values = {n: v.detach() for n, v in inputs(1, 30, 5, 4, initial=False, dtype=torch.float32).items()}
    ids = torch.tensor([[1] * 12 + [7] * 2 + [1] * 16])
    packed, final = causal_conv1d(**values, activation="silu", seq_idx=ids, return_final_state=True, impl=impl)
    x = values.pop("x")
    for piece in (slice(0, 12), slice(12, 14), slice(14, 30)):
        alone, last = causal_conv1d(x[:, piece], **values, activation="silu", return_final_state=True, impl=impl)
        torch.testing.assert_close(packed[:, piece], alone)
    torch.testing.assert_close(final, last)


def test_a_state_after_a_short_last_document_holds_nothing_of_the_one_before():
    x = torch.ones(1, 6, 2)
    _, final = causal_conv1d(x, torch.ones(2, 4), seq_idx=torch.tensor([[0, 0, 0, 0, 0, 1]]), return_final_state=True)
    assert final[0, :, 0].tolist() == [0.0, 0.0, 1.0]


@needs_c
def test_the_same_bits_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(PATHS["native"], inputs(3, 100, 300, 4, dtype=torch.float32), "silu", None))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.slow
@needs_c
def test_the_operator_is_registered_as_torch_demands():
    values = inputs(2, 9, 20, 4, dtype=torch.float32)
    torch.use_deterministic_algorithms(False)
    args = (values["x"], values["weight"], values["bias"], values["initial_state"], None, True)
    torch.library.opcheck(torch.ops.hybridnas.causal_conv1d, args)


@pytest.mark.parametrize(
    ("changes", "got", "allowed"),
    [
        ({"x": torch.zeros(3, 2)}, (3, 2), "(B, L, D)"),
        ({"weight": torch.zeros(3, 4)}, (3, 4), (2, 4)),
        ({"weight": torch.zeros(2, 0)}, (2, 0), "K >= 1"),
        ({"bias": torch.zeros(4)}, (4,), (2,)),
        ({"activation": "gelu"}, "gelu", [None, "silu"]),
        ({"initial_state": torch.zeros(1, 4, 2)}, (1, 4, 2), (1, 3, 2)),
        ({"seq_idx": torch.zeros(1, 2, dtype=torch.long)}, (1, 2), (1, 3)),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected_and_got(changes, got, allowed):
    with pytest.raises(KernelInputError) as refused:
        causal_conv1d(**({"x": torch.zeros(1, 3, 2), "weight": torch.zeros(2, 4)} | changes))
    assert (refused.value.field, refused.value.got, refused.value.allowed) == (next(iter(changes)), got, allowed)


@needs_c
def test_a_requested_implementation_runs_or_raises():
    with pytest.raises(KernelUnavailableError) as refused:
        causal_conv1d(torch.zeros(1, 3, 2), torch.zeros(2, 17), impl="native")
    assert refused.value.field == "impl" and "at most 16 taps K, got 17" in str(refused.value)
    assert describe("cpu").startswith("native: C, compiled by" if native.available() else "torch: F.conv1d")
