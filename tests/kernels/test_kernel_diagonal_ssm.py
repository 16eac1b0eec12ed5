"""The diagonal state space by FFT against its float64 recurrence: outputs, states and gradients, real and complex."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridnas.errors import KernelInputError, KernelUnavailableError
from hybridnas.kernels.diagonal_ssm import describe, diagonal_ssm


def inputs(batch, length, channels, size, *, complex_, initial, seed=0, double=True):
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    def either(*shape):
        return torch.complex(normal(*shape), normal(*shape)) if complex_ else normal(*shape)

    log = -torch.rand(channels, size, generator=make, dtype=torch.float64).mul(3).exp() / 20
    values = {"u": normal(batch, length, channels), "log_decay": log, "weight": either(channels, size)}
    if complex_:
        values["log_decay"] = torch.complex(log, 3 * normal(channels, size))
    if initial:
        values["initial_state"] = either(batch, channels, size)
    narrow = {torch.float64: torch.float32, torch.complex128: torch.complex64}
    return {n: (v if double else v.to(narrow[v.dtype])).requires_grad_() for n, v in values.items()}


def run(values, ids, impl, seed=1):
    outputs = diagonal_ssm(**values, seq_idx=ids, return_final_state=True, impl=impl)
    if not outputs[0].numel():  # the first state, where none is given, depends on nothing
        outputs = [o for o in outputs if o.requires_grad]
    make = torch.Generator().manual_seed(seed)
    wide = [torch.complex128 if o.is_complex() else torch.float64 for o in outputs]
    grads = [torch.randn(o.shape, generator=make, dtype=w).to(o.dtype) for o, w in zip(outputs, wide, strict=True)]
    gradients = torch.autograd.grad(outputs, list(values.values()), grads)
    return {**dict(zip(("y", "final"), outputs, strict=False)), **dict(zip(values, gradients, strict=True))}


def documents(batch, length, seed):
    return torch.randint(0, 5, (batch, length), generator=torch.Generator().manual_seed(seed)).sort(1).values


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(0, 3),
    length=st.sampled_from([1, 2, 3, 5, 13, 64, 65, 131]),
    channels=st.sampled_from([1, 3, 8]),
    size=st.sampled_from([1, 2, 5]),
    complex_=st.booleans(),
    initial=st.booleans(),
    packed=st.booleans(),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_outputs_and_gradients_agree_with_the_recurrence(
    batch, length, channels, size, complex_, initial, packed, double, seed
):
    options = {"complex_": complex_, "initial": initial, "seed": seed}
    ids = documents(batch, length, seed) if packed else None
    true = run(inputs(batch, length, channels, size, **options), ids, "reference")
    got = run(inputs(batch, length, channels, size, **options, double=double), ids, "torch")
    for name, expected in true.items():
        scale = expected.abs().max().item() if expected.numel() else 0.0
        error = (got[name].to(expected.dtype) - expected).abs().max().item() if expected.numel() else 0.0
        assert got[name].shape == expected.shape
        assert error <= (1e-12 if double else 3e-5) * max(scale, 1.0), f"{name} is {error} off"


def test_without_a_state_no_state_is_computed_and_the_outputs_are_the_same():
    values = {n: v.detach() for n, v in inputs(2, 40, 4, 3, complex_=True, initial=True).items()}
    assert torch.equal(diagonal_ssm(**values), diagonal_ssm(**values, return_final_state=True)[0])


def test_the_recurrence_is_that_of_scipys_linear_systems():
    scipy = pytest.importorskip("scipy.signal")
    log, weight = torch.tensor([[-0.3 + 1.2j]], dtype=torch.complex128), torch.tensor([[0.7 - 0.4j]])
    decay = log.exp().item()
    system = scipy.dlti([[decay.real, -decay.imag], [decay.imag, decay.real]], [[1], [0]], [[0.7, 0.4]], [[0]], dt=1)
    u = torch.randn(1, 50, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, _, x = scipy.dlsim(system, torch.cat([u[0], u[0, :1]]).numpy())
    expected = torch.from_numpy(x[1:]) @ torch.tensor([0.7, 0.4], dtype=torch.float64)
    torch.testing.assert_close(diagonal_ssm(u, log, weight)[0, :, 0], expected, rtol=1e-6, atol=1e-6)


def test_wrong_arguments_are_named():
    good = {"u": torch.zeros(1, 3, 2), "log_decay": torch.zeros(2, 4), "weight": torch.zeros(2, 4)}
    for changes, field in (
        ({"u": torch.zeros(3, 2)}, "u"),
        ({"weight": torch.zeros(2, 3)}, "weight"),
        ({"weight": torch.zeros(2, 4, dtype=torch.complex64)}, "weight"),
        ({"initial_state": torch.zeros(1, 2, 3)}, "initial_state"),
        ({"seq_idx": torch.zeros(1, 2, dtype=torch.long)}, "seq_idx"),
    ):
        with pytest.raises(KernelInputError) as refused:
            diagonal_ssm(**(good | changes))
        assert refused.value.field == field
    with pytest.raises(KernelUnavailableError):
        diagonal_ssm(**good, impl="triton")
    assert describe("cpu").startswith("torch: a convolution by FFT")
