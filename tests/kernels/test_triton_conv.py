"""The Triton convolution against its float64 form, under Triton's interpreter: outputs, gradients, every argument."""

from functools import partial

import pytest
import torch

from hybridnas.errors import KernelUnavailableError
from hybridnas.kernels.causal_conv1d import causal_conv1d

pytestmark = [pytest.mark.usefixtures("unwritten_memory_is_nan"), pytest.mark.interpreter, pytest.mark.slow]

conv_reference = partial(causal_conv1d, impl="reference", return_final_state=True)
conv_triton = partial(causal_conv1d, impl="triton", return_final_state=True)


def compare(shape, optional=(), silu=False, documents=False, strided=False, dtype=torch.float32):
    """Return the relative error of every output and gradient by name."""
    (batch, length, channels, taps), make = shape, torch.Generator().manual_seed(0)

    def normal(*size, narrow=True):
        return torch.randn(*size, generator=make).to(dtype if narrow else torch.float32)

    values = {"x": normal(batch, length, channels), "weight": normal(channels, taps, narrow=False)}
    if strided:
        values["x"] = normal(length, batch, 2 * channels + 1).transpose(0, 1)[..., 1 : 1 + channels]
    if "bias" in optional:
        values["bias"] = normal(channels, narrow=False)
    if "initial_state" in optional:
        values["initial_state"] = normal(batch, taps - 1, channels)
    ids = torch.randint(0, 5, (batch, length), generator=make).sort(1).values if documents else None

    def run(path, tensors):
        leaves = {name: t.requires_grad_() for name, t in tensors.items()}
        outputs = path(**leaves, activation="silu" if silu else None, seq_idx=ids)
        used = [o for o in outputs if o.requires_grad]
        make = torch.Generator().manual_seed(1)
        grads = [torch.randn(o.shape, generator=make).to(dtype).to(o.dtype) for o in used]
        gradients = torch.autograd.grad(used, list(leaves.values()), grads)
        return dict(zip(("y", "final", *leaves), (*outputs, *gradients), strict=True))

    true = run(conv_reference, {name: v.double() for name, v in values.items()})
    got = run(conv_triton, {name: v.detach() for name, v in values.items()})
    return {
        name: ((got[name].double() - t).abs().max() / t.abs().max().clamp_min(1e-30)).item()
        for name, t in true.items()
        if t.numel()
    }


BOTH = ("bias", "initial_state")


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((2, 37, 5, 4), {}),
        ((2, 37, 5, 4), {"optional": BOTH, "silu": True}),
        ((2, 37, 5, 4), {"optional": BOTH, "silu": True, "documents": True, "strided": True}),
        ((1, 33, 40, 3), {"optional": ("bias",), "documents": True}),
        ((1, 31, 7, 2), {"optional": ("initial_state",), "silu": True, "documents": True}),
        ((2, 1, 3, 4), {"optional": BOTH, "silu": True}),
        ((1, 2, 3, 4), {"optional": ("initial_state",), "strided": True}),
        ((2, 9, 3, 1), {"optional": ("bias",), "silu": True}),
        ((1, 20, 3, 7), {"optional": BOTH, "silu": True, "documents": True}),
        ((1, 3, 2, 8), {"optional": BOTH}),
    ],
    ids=str,
)
def test_outputs_and_gradients_agree_with_the_float64_form(shape, more):
    for name, error in compare(shape, **more).items():
        assert error < 2e-6, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_rounded_once_at_the_end(dtype):
    errors = compare((2, 9, 3, 4), optional=BOTH, silu=True, documents=True, dtype=dtype)
    for name in ("weight", "bias"):  # kept in float32
        assert errors[name] < 2e-6, f"{name} is {errors[name]:.1e} off"
    # dx and the initial state's gradient are sums of two roundings: of the output's and of the final state's
    for name in ("y", "x", "initial_state"):
        assert errors[name] <= 2 * torch.finfo(dtype).eps, f"{name} is {errors[name]:.1e} off"


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_nothing_to_convolve_is_an_empty_result(shape):
    x = torch.zeros(shape, requires_grad=True)
    y, _ = conv_triton(x, torch.ones(3, 4))
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_the_operator_is_registered_as_torch_demands():
    x, weight = torch.randn(1, 5, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    torch.use_deterministic_algorithms(False)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = torch.ops.hybridnas.causal_conv1d_triton
    torch.library.opcheck(op, (x, weight, None, None, None, True), test_utils=checks)


def test_the_dispatcher_runs_it_alone_and_compiled():
    make = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 3, generator=make, requires_grad=True)
    weight = torch.randn(3, 2, generator=make, requires_grad=True)
    torch.use_deterministic_algorithms(False)
    y, final = causal_conv1d(x, weight, activation="silu", return_final_state=True, impl="triton")
    wanted, state = causal_conv1d(x, weight, activation="silu", return_final_state=True, impl="reference")
    assert torch.equal(final, state)
    run = torch.compile(causal_conv1d, backend="aot_eager", fullgraph=True)
    for got in (y, run(x, weight, activation="silu", impl="triton")):
        torch.testing.assert_close(got, wanted)
        for one, other in zip(
            torch.autograd.grad(got.square().sum(), (x, weight)),
            torch.autograd.grad(wanted.square().sum(), (x, weight), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_dtype_or_number_of_taps_it_cannot_take_is_named():
    with pytest.raises(KernelUnavailableError, match=r"takes float32, bfloat16, float16, got float64"):
        conv_triton(torch.zeros(1, 2, 3, dtype=torch.float64), torch.zeros(3, 4))
    with pytest.raises(KernelUnavailableError, match=r"at most 8 taps K, got 9"):
        conv_triton(torch.zeros(1, 2, 3), torch.zeros(3, 9))
