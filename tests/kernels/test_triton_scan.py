"""The Triton scan against the float64 recurrence, under Triton's interpreter: outputs, gradients, every argument.

It says nothing on races, barriers or speed: no kernel here has run on a GPU.
"""

import dataclasses
from functools import partial

import pytest
import torch

from hybridnas.errors import KernelUnavailableError
from hybridnas.kernels._inputs import boundaries
from hybridnas.kernels._triton.launch import Tile
from hybridnas.kernels.selective_scan import selective_scan
from hybridnas.kernels.selective_scan import triton as scan

pytestmark = [pytest.mark.usefixtures("unwritten_memory_is_nan"), pytest.mark.interpreter, pytest.mark.slow]

scan_reference = partial(selective_scan, impl="reference", return_final_state=True)
scan_triton = partial(selective_scan, impl="triton", return_final_state=True)


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


@dataclasses.dataclass
class Case:
    batch: int = 2
    length: int = 9
    channels: int = 3
    size: int = 3
    optional: tuple = ("D", "z", "delta_bias", "initial_state")
    softplus: bool = True
    documents: bool = False
    strided: bool = False
    scale: float = 0.5
    chunk: int = 4
    tile: Tile | None = None
    dfinal: bool = True

    def tensors(self, dtype=torch.float32):
        """Return the named inputs in float64, their values exact in ``dtype``; A is never narrowed."""
        make = torch.Generator().manual_seed(0)

        def normal(*shape, narrow=True):
            values = torch.randn(*shape, generator=make).to(dtype if narrow else torch.float32).double()
            if self.strided and len(shape) == 3:
                wide = torch.full((shape[1], shape[0], 2 * shape[2] + 1), torch.nan, dtype=torch.float64)
                wide.transpose(0, 1)[..., 1 : 1 + shape[2]] = values
                values = wide.transpose(0, 1)[..., 1 : 1 + shape[2]]
            return values

        B, L, D, N = self.batch, self.length, self.channels, self.size
        delta = normal(B, L, D)
        delta.mul_(self.scale)
        if not self.softplus:
            delta.abs_()
        all_ = {"u": normal(B, L, D), "delta": delta}
        all_["A"] = -torch.exp(0.3 * normal(D, N, narrow=False)).float().double()
        all_ |= {"B": normal(B, L, N), "C": normal(B, L, N), "D": normal(D, narrow=False), "z": normal(B, L, D)}
        all_ |= {"delta_bias": normal(D, narrow=False) - 1, "initial_state": normal(B, D, N, narrow=False)}
        return {name: v for name, v in all_.items() if name in NAMES[:5] or name in self.optional}

    def ids(self):
        make = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 4, (self.batch, self.length), generator=make).sort(1).values
        return ids if self.documents else None


def compare(case, dtype=torch.float32):
    """Return the relative error of every output and gradient by name."""
    values = case.tensors(dtype)
    exact = {name: v.clone().requires_grad_() for name, v in values.items()}
    true = scan_reference(**exact, delta_softplus=case.softplus, seq_idx=case.ids())
    make = torch.Generator().manual_seed(2)
    dy, dfinal = torch.randn(true[0].shape, generator=make).to(dtype), torch.randn(true[1].shape, generator=make)
    if not case.dfinal:
        dfinal.zero_()
    wanted = torch.autograd.grad(true, list(exact.values()), [dy.double(), dfinal.double()])
    given = {}
    for name, v in values.items():
        wanted_dtype = dtype if name in ("u", "delta", "B", "C", "z") else torch.float32
        given[name] = torch.empty_strided(v.shape, v.stride(), dtype=wanted_dtype).copy_(v)
    reset = None if case.ids() is None else boundaries(case.ids()).to(torch.uint8)
    launcher = scan.Launcher.of(
        *(given.get(name) for name in NAMES), reset, softplus=case.softplus, chunk=case.chunk, only=case.tile
    )
    y, final, states = scan.scan_forward(launcher)
    gradients = scan.scan_backward(launcher, states, dy, dfinal if case.dfinal else None)
    got = [y, final, *(g for name, g in zip(NAMES, gradients, strict=True) if name in given)]
    errors = {}
    for name, one, other in zip(("y", "final", *given), got, (*true, *wanted), strict=True):
        assert one.dtype == (given[name].dtype if name in given else dtype if name == "y" else torch.float32)
        errors[name] = ((one.double() - other).abs().max() / other.abs().max().clamp_min(1e-30)).item()
    return errors


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's: exp of a large number is infinity on purpose
@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(documents=True, strided=True),
        Case(optional=(), softplus=False, batch=1),
        Case(optional=(), softplus=False, documents=True, dfinal=False, batch=1),
        Case(optional=("D",), batch=1, length=5),
        Case(optional=("z",), softplus=False, batch=1, length=5, documents=True),
        Case(optional=("delta_bias",), batch=1, length=5, dfinal=False),
        Case(optional=("initial_state",), batch=1, length=5, documents=True),
        Case(batch=1, length=1, channels=1, size=1),
        Case(batch=1, length=7, channels=2, size=1, chunk=16),
        Case(batch=1, length=8, channels=3, size=2),
        Case(batch=1, length=5, channels=3, size=17),
        Case(batch=1, length=17, channels=2, size=4, chunk=16, documents=True),
        Case(batch=1, length=5, channels=70, size=4),
        Case(batch=1, length=5, channels=20, size=5, tile=Tile.of(1, D1=8)),
        Case(batch=1, length=5, channels=9, size=16, tile=Tile.of(1, D1=32)),
        Case(batch=1, length=5, scale=0.0),
        Case(batch=1, length=5, scale=300.0),
    ],
    ids=repr,
)
def test_outputs_and_gradients_agree_with_the_float64_recurrence(case):
    for name, error in compare(case).items():
        assert error < 2e-6, f"{name} is {error:.1e} off"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_rounded_once_at_the_end(dtype):
    # the interpreter's bfloat16 arithmetic is silently wrong: a load that is not widened shows in the state
    errors = compare(Case(batch=1, documents=True), dtype)
    for name in ("final", "A", "D", "delta_bias", "initial_state"):  # kept in float32
        assert errors[name] < 2e-6, f"{name} is {errors[name]:.1e} off"
    for name in ("y", "u", "delta", "B", "C", "z"):
        assert errors[name] <= torch.finfo(dtype).eps, f"{name} is {errors[name]:.1e} off"


def test_unwidened_bfloat16_would_be_noticed():
    import triton
    import triton.language as tl

    @triton.jit
    def twice(x, y):
        i = tl.arange(0, 4)
        tl.store(y + i, tl.load(x + i) * 2)

    x, y = torch.ones(4, dtype=torch.bfloat16), torch.zeros(4)
    twice[(1,)](x, y)
    assert not torch.equal(y, 2 * torch.ones(4)), "the interpreter computes bfloat16 now: the widening test is weak"


def test_a_row_does_not_depend_on_the_batch_it_stands_in():
    values = {name: v.float() for name, v in Case(batch=2, length=5).tensors().items()}
    both = scan_triton(**values, delta_softplus=True)
    rows = {n: v[1:2] if n in ("u", "delta", "z", "B", "C", "initial_state") else v for n, v in values.items()}
    alone = scan_triton(**rows, delta_softplus=True)
    assert torch.equal(both[0][1:2], alone[0]) and torch.equal(both[1][1:2], alone[1])


def test_the_operator_differentiates_and_traces():
    values = {name: v.float().requires_grad_() for name, v in Case(batch=1, length=3, size=2).tensors().items()}
    y, final = scan_triton(**values, delta_softplus=True)
    exact = {name: v.detach().double().requires_grad_() for name, v in values.items()}
    true = scan_reference(**exact, delta_softplus=True)
    got = torch.autograd.grad(y.sum() + final.sum(), list(values.values()))
    wanted = torch.autograd.grad(true[0].sum() + true[1].sum(), list(exact.values()))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    with torch.random.fork_rng():
        torch.use_deterministic_algorithms(False)
        tensors = [values[name] for name in NAMES]
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        op = torch.ops.hybridnas.selective_scan_triton
        torch.library.opcheck(op, (*tensors, None, True), test_utils=checks)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_nothing_to_scan_keeps_the_state(batch, length):
    case = Case(batch=batch, length=length)
    values = {name: v.float().requires_grad_() for name, v in case.tensors().items()}
    y, final = scan_triton(**values, delta_softplus=True)
    assert y.shape == (batch, length, 3)
    assert torch.equal(final, values["initial_state"])
    gradient = torch.autograd.grad(y.sum() + 3 * final.sum(), values["initial_state"])[0]
    assert torch.equal(gradient, torch.full_like(final, 3.0))


def test_the_dispatcher_runs_it_alone_and_compiled():
    values = {name: v.float().requires_grad_() for name, v in Case(batch=1, length=3).tensors().items()}
    ids = torch.tensor([[0, 0, 1]])

    def scan_(impl):
        y, final = selective_scan(**values, delta_softplus=True, seq_idx=ids, return_final_state=True, impl=impl)
        return y.sum() + final.sum(), y

    with torch.random.fork_rng():
        torch.use_deterministic_algorithms(False)
        loss, y = scan_("triton")
        compiled_loss, compiled_y = torch.compile(scan_, backend="aot_eager", fullgraph=True)("triton")
        wanted_loss, wanted = scan_("reference")
        torch.testing.assert_close(y, wanted, rtol=2e-6, atol=2e-6)
        assert torch.equal(y, compiled_y)
        assert "TritonBackward" in str(y.grad_fn.name()) or "triton" in str(y.grad_fn.name())
        for got in (loss, compiled_loss):
            for one, other in zip(
                torch.autograd.grad(got, list(values.values())),
                torch.autograd.grad(wanted_loss, list(values.values()), retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_dtype_or_state_size_it_cannot_take_is_named():
    values = Case().tensors()
    with pytest.raises(KernelUnavailableError, match=r"takes float32, bfloat16, float16, got float64"):
        scan_triton(**values)
    large = Case(batch=1, length=1, channels=1, size=300, optional=()).tensors()
    with pytest.raises(KernelUnavailableError, match=r"a state size N of at most 256, got 300"):
        scan_triton(**{name: v.float() for name, v in large.items()})
