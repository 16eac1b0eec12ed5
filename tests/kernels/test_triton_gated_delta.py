"""The Triton form of gated linear recurrences against the float64 recurrence, under Triton's interpreter.

It says nothing on races, barriers or speed: no kernel here has run on a GPU.
"""

from functools import partial

import pytest
import torch

from hybridnas.errors import KernelUnavailableError
from hybridnas.kernels.gated_delta import gated_delta
from hybridnas.kernels.gated_delta import triton as host

pytestmark = [pytest.mark.usefixtures("unwritten_memory_is_nan"), pytest.mark.interpreter, pytest.mark.slow]

by_reference = partial(gated_delta, impl="reference", return_final_state=True)
by_triton = partial(gated_delta, impl="triton", return_final_state=True)
HALF = ("q", "k", "v", "beta")
SHAPE = (1, 19, 1, 2, 3, 5)  # B, L, G, H, K, V


def values_of(shape, decay="head", delta=True, initial=True, scale=1.0, dtype=torch.float32):
    """Return the named inputs in float64; those that may be narrow are exact in ``dtype``."""
    (batch, length, groups, heads, size, width), make = shape, torch.Generator().manual_seed(0)

    def narrow(tensor):
        return tensor.to(dtype).double()

    def normal(*sides):
        return torch.randn(*sides, generator=make)

    keys = torch.nn.functional.normalize(normal(batch, length, groups, size), dim=-1)
    values = {"q": narrow(normal(batch, length, groups, size)), "k": narrow(keys)}
    values["v"] = narrow(normal(batch, length, heads, width))
    shapes = {"fixed": (heads,), "head": (batch, length, heads), "channel": (batch, length, heads, size)}
    if decay != "none":
        values["log_decay"] = -scale * torch.rand(shapes[decay], generator=make).double()
    if delta:
        values["beta"] = narrow(2 * torch.rand(batch, length, heads, generator=make))
        values["beta"][:, 1] = 0.0
    if initial:
        values["initial_state"] = normal(batch, heads, size, width).double()
    return values


def compare(shape=SHAPE, *, documents=False, strided=False, final=True, chunk=32, dtype=torch.float32, **more):
    """Return the relative error of every output and gradient by name."""
    values, make = values_of(shape, dtype=dtype, **more), torch.Generator().manual_seed(2)
    ids = torch.randint(0, 5, shape[:2], generator=make).sort(1).values if documents else None
    exact = {name: v.clone().requires_grad_() for name, v in values.items()}
    true = by_reference(**exact, seq_idx=ids)
    upstream = [torch.randn(true[0].shape, generator=make).to(dtype), torch.randn(true[1].shape, generator=make)]
    if not final:
        upstream[1].zero_()
    wanted = torch.autograd.grad(true, list(exact.values()), [g.double() for g in upstream])
    given = {name: v.to(dtype if name in HALF else torch.float32) for name, v in values.items()}
    if strided:  # slices of one tensor, as a block's projection makes them
        joined = torch.cat([given[name].flatten(2) for name in ("q", "k", "v")], 2)
        sizes = [given[name].flatten(2).shape[2] for name in ("q", "k", "v")]
        for name, part in zip(("q", "k", "v"), joined.split(sizes, 2), strict=True):
            given[name] = part.unflatten(2, given[name].shape[2:])
    leaves = {name: v.requires_grad_() for name, v in given.items()}
    got = by_triton(**leaves, seq_idx=ids, chunk_size=chunk)
    used = got if final else got[:1]
    found = torch.autograd.grad(used, list(leaves.values()), upstream[: len(used)])
    pairs = zip(["o", "final", *values], [*got, *found], [*true, *wanted], strict=True)
    return {n: ((g.double() - t).abs().max() / t.abs().max().clamp_min(1e-30)).item() for n, g, t in pairs}


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", ["none", "fixed", "head", "channel"])
def test_outputs_and_gradients_agree_with_the_float64_recurrence(decay, delta):
    for name, error in compare(decay=decay, delta=delta, documents=True, chunk=16).items():
        assert error < 3e-6, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize(
    "more",
    [
        {"shape": (2, 21, 2, 2, 17, 3), "strided": True},
        {"shape": (1, 33, 1, 1, 2, 20), "initial": False, "final": False},
        {"shape": (1, 33, 1, 1, 2, 1), "scale": 30.0, "documents": True},
        {"shape": (1, 17, 1, 1, 3, 2), "scale": 1e-4},
    ],
    ids=str,
)
def test_other_shapes_and_decays_agree_too(decay, more):
    for name, error in compare(decay=decay, **more).items():
        assert error < 3e-6, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_and_no_worse(dtype, decay):
    # the interpreter's bfloat16 arithmetic is silently wrong, by factors: loads that are not widened show
    for name, error in compare((1, 17, 1, 1, 3, 2), decay=decay, dtype=dtype).items():
        assert error <= 4 * torch.finfo(dtype).eps, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_decay_of_minus_infinity_forgets_and_has_no_gradient(decay):
    values = values_of(SHAPE, decay)
    values["log_decay"][:, 7] = float("-inf")
    exact, near = values["log_decay"].clone().requires_grad_(), values["log_decay"].float().requires_grad_()
    true, _ = by_reference(**{**values, "log_decay": exact})
    got, _ = by_triton(**{**{n: v.float() for n, v in values.items()}, "log_decay": near})
    torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(got.sum(), near), torch.autograd.grad(true.sum(), exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_batch_it_stands_in():
    values = {name: v.float() for name, v in values_of((2, 5, 1, 1, 3, 2)).items()}
    both, alone = by_triton(**values), by_triton(**{name: v[1:2] for name, v in values.items()})
    assert torch.equal(both[0][1:2], alone[0]) and torch.equal(both[1][1:2], alone[1])


def test_the_dispatcher_runs_it_alone_and_compiled():
    values = {name: v.float().requires_grad_() for name, v in values_of((1, 7, 1, 2, 3, 2)).items()}
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    torch.use_deterministic_algorithms(False)

    def run(impl):
        o, final = gated_delta(**values, seq_idx=ids, return_final_state=True, impl=impl)
        return o, o.square().sum() + final.sum()

    wanted, wanted_loss = run("reference")
    right = torch.autograd.grad(wanted_loss, list(values.values()))
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        o, loss = function("triton")
        torch.testing.assert_close(o, wanted, rtol=1e-5, atol=1e-5)
        for one, other in zip(torch.autograd.grad(loss, list(values.values())), right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


def test_the_operator_keeps_torchs_contract():
    torch.use_deterministic_algorithms(False)
    values = {name: v.float().requires_grad_() for name, v in values_of((1, 3, 1, 1, 2, 2)).items()}
    arguments = [values[name] for name in ("v", "q", "k", "log_decay", "beta", "initial_state")]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hybridnas.gated_delta_triton, (*arguments, 1.0, 16), test_utils=checks)


def test_sizes_and_dtypes_that_it_does_not_take_are_refused():
    with pytest.raises(KernelUnavailableError, match=r"^gated_delta impl='triton' takes float32, .*, got float64; use"):
        gated_delta(**values_of((1, 3, 1, 1, 2, 2)), impl="triton")
    wide = {name: v.float() for name, v in values_of((1, 3, 1, 1, 129, 2)).items()}
    with pytest.raises(KernelUnavailableError) as refused:
        gated_delta(**wide, impl="triton")
    assert refused.value.field == "impl" and "triton" not in refused.value.allowed


def test_chunks_are_powers_of_two_and_shorter_for_what_takes_more_memory():
    assert [host.chunk_of(n, 64, half=True) for n in (1, 16, 17, 1000)] == [16, 16, 32, 64]
    assert [host.chunk_of(64, size, half=half) for size, half in ((128, False), (129, True))] == [32, 32]


def test_every_size_has_a_tile():
    for half, most in ((True, 256), (False, 128)):
        assert all(host.tiles("gd_pass_states", size, 7, half=half) for size in range(1, most + 1))
