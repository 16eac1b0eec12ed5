"""The Triton form of state-space duality against the float64 recurrence, under Triton's interpreter.

It says nothing on races, barriers or speed: no kernel here has run on a GPU.
"""

from functools import partial

import pytest
import torch

from hybridnas.errors import KernelUnavailableError
from hybridnas.kernels.ssd import ssd
from hybridnas.kernels.ssd import triton as host
from hybridnas.kernels.ssd.reference import Inputs

pytestmark = [pytest.mark.usefixtures("unwritten_memory_is_nan"), pytest.mark.interpreter, pytest.mark.slow]

NAMES = Inputs._fields[:9]
ssd_reference = partial(ssd, impl="reference", return_final_state=True)
ssd_triton = partial(ssd, impl="triton", return_final_state=True)


HALF = ("x", "dt", "B", "C", "z")
ALL = ("D", "z", "dt_bias", "initial_state")


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch):
    monkeypatch.setattr(host, "SSD_CHUNKS", (16, 32))  # the interpreter is slow


def values_of(shape, optional=ALL, scale=0.5, dtype=torch.float32):
    """Return the named inputs in float64; those that may be narrow are exact in ``dtype``."""
    (batch, length, heads, width, groups, size), make = shape, torch.Generator().manual_seed(0)

    def normal(*sides, narrow=True):
        return torch.randn(*sides, generator=make).to(dtype if narrow else torch.float32).double()

    wide = (batch, length, heads, width)
    values = {"x": normal(*wide), "dt": (scale * normal(batch, length, heads)).to(dtype).double()}
    values["A"] = -2 * normal(heads, narrow=False).abs()
    values |= {"B": normal(batch, length, groups, size), "C": normal(batch, length, groups, size)}
    more = {"D": normal(heads, narrow=False), "z": normal(*wide), "dt_bias": normal(heads, narrow=False)}
    more["initial_state"] = normal(batch, heads, width, size, narrow=False)
    return values | {name: more[name] for name in optional}


def compare(shape, *, optional=ALL, softplus=True, documents=False, strided=False, chunk=32, rows=16, final=True,
            scale=0.5, dtype=torch.float32):  # fmt: skip
    """Return the relative error of every output and gradient by name."""
    values = values_of(shape, optional, scale, dtype)
    make = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 5, shape[:2], generator=make).sort(1).values if documents else None
    exact = {name: v.clone().requires_grad_() for name, v in values.items()}
    true = ssd_reference(**exact, dt_softplus=softplus, seq_idx=ids)
    grads = [torch.randn(true[0].shape, generator=make).to(dtype), torch.randn(true[1].shape, generator=make)]
    if not final:
        grads[1].zero_()
    wanted = torch.autograd.grad(true, list(exact.values()), [g.double() for g in grads])
    given = {name: v.to(dtype if name in HALF else torch.float32) for name, v in values.items()}
    if strided:  # slices of one tensor, as the block's convolution makes them
        joined = torch.cat([given[name].flatten(2) for name in ("x", "B", "C")], 2)
        sizes = [given[name].flatten(2).shape[2] for name in ("x", "B", "C")]
        for name, part in zip(("x", "B", "C"), joined.split(sizes, 2), strict=True):
            given[name] = part.unflatten(2, given[name].shape[2:])
    document = None if ids is None else host.documents(ids, chunk)
    tensors = [given.get(name) for name in NAMES]
    launcher = host.Launcher.of(*tensors, document, softplus=softplus, chunk=chunk, rows=rows)
    y, state, kept = host.ssd_forward(launcher)
    found = host.ssd_backward(launcher, kept, grads[0].flatten(2), grads[1] if final else None)
    got = {"y": y, "final": state} | {n: g for n, g in zip(NAMES, found, strict=True) if n in given}
    right = {"y": true[0], "final": true[1]} | dict(zip(values, wanted, strict=True))
    return {
        name: ((got[name].double().view(t.shape) - t).abs().max() / t.abs().max().clamp_min(1e-30)).item()
        for name, t in right.items()
    }


@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((2, 19, 2, 5, 1, 3), {"documents": True, "chunk": 16}),
        ((1, 35, 2, 3, 2, 20), {"strided": True, "documents": True, "optional": ("initial_state", "D")}),
        ((1, 20, 3, 17, 1, 33), {"optional": ("z",), "softplus": False, "chunk": 16}),
        ((1, 33, 1, 2, 1, 1), {"optional": (), "softplus": False, "final": False}),
        ((1, 5, 1, 1, 1, 2), {"optional": ("dt_bias",), "chunk": 16}),
        ((1, 37, 1, 3, 1, 3), {"scale": 30.0}),
        ((1, 9, 1, 3, 1, 3), {"scale": 0.0, "softplus": False, "chunk": 16}),
    ],
    ids=str,
)
def test_outputs_and_gradients_agree_with_the_float64_recurrence(shape, more):
    for name, error in compare(shape, **more).items():
        assert error < 3e-6, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_and_no_worse(dtype):
    # the interpreter's bfloat16 arithmetic is silently wrong, by factors: loads that are not widened show
    errors = compare((1, 19, 1, 3, 1, 5), documents=True, dtype=dtype)
    for name, error in errors.items():
        assert error <= 3 * torch.finfo(dtype).eps, f"{name} is {error:.1e} off"


def test_a_row_does_not_depend_on_the_batch_it_stands_in():
    values = {name: v.float() for name, v in values_of((2, 5, 1, 3, 1, 2)).items()}
    both = ssd_triton(**values, dt_softplus=True)
    own = ("x", "dt", "z", "B", "C", "initial_state")
    alone = ssd_triton(**{n: v[1:2] if n in own else v for n, v in values.items()}, dt_softplus=True)
    assert torch.equal(both[0][1:2], alone[0]) and torch.equal(both[1][1:2], alone[1])


def test_the_dispatcher_runs_it_alone_and_compiled():
    values = {name: v.float().requires_grad_() for name, v in values_of((1, 7, 2, 3, 1, 2)).items()}
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    torch.use_deterministic_algorithms(False)

    def run(impl):
        y, final = ssd(**values, dt_softplus=True, seq_idx=ids, return_final_state=True, impl=impl)
        return y, y.square().sum() + final.sum()

    wanted, wanted_loss = run("reference")
    right = torch.autograd.grad(wanted_loss, list(values.values()))
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        y, loss = function("triton")
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        for one, other in zip(torch.autograd.grad(loss, list(values.values())), right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_the_operator_keeps_torchs_contract():
    torch.use_deterministic_algorithms(False)
    values = {name: v.float().requires_grad_() for name, v in values_of((1, 3, 1, 2, 1, 2)).items()}
    arguments = [values[name] for name in NAMES]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hybridnas.ssd_triton, (*arguments, None, True, 16), test_utils=checks)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_nothing_to_scan_keeps_the_state(batch, length):
    values = {n: v.float().requires_grad_() for n, v in values_of((batch, length, 2, 3, 1, 2)).items()}
    y, final = ssd_triton(**values, dt_softplus=True)
    assert y.shape == (batch, length, 2, 3) and torch.equal(final, values["initial_state"])
    (gradient,) = torch.autograd.grad(y.sum() + 3 * final.sum(), values["initial_state"])
    assert torch.equal(gradient, torch.full_like(final, 3.0))


def test_double_precision_is_refused_and_chunks_are_powers_of_two():
    with pytest.raises(KernelUnavailableError, match=r"^ssd impl='triton' takes float32, .*, got float64; use"):
        ssd(**values_of((1, 3, 1, 2, 1, 2)), impl="triton")
    assert [host.chunk_of(n) for n in (1, 16, 17, 1000)] == [16, 16, 32, 32]
