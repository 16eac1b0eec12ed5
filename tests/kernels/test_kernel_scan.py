"""The selective scan against its float64 recurrence: every implementation, outputs and gradients, odd shapes."""

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybridnas.errors import ConfigError, KernelInputError
from hybridnas.kernels.selective_scan import describe, native, selective_scan, selective_state_update

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

PATHS = {impl: partial(selective_scan, impl=impl, return_final_state=True) for impl in ("reference", "torch", "native")}
scan_reference = PATHS["reference"]
needs_c = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="no C compiler")
FAST = [pytest.param("torch"), pytest.param("native", marks=needs_c)]


@dataclasses.dataclass
class Case:
    batch: int = 2
    length: int = 37
    channels: int = 7
    size: int = 5
    delta: str = "usual"  # usual, zero, huge
    optional: bool = True  # D, z, delta_bias, softplus
    initial: bool = True
    documents: bool = False
    strided: bool = False
    seed: int = 0

    def tensors(self, dtype=torch.float64):
        """Return keyword arguments in ``dtype``, the same numbers for every dtype up to float32."""
        make = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            if self.strided and len(shape) == 3:  # a slice of a wider tensor, as chunk() and split() give
                wide = torch.randn(*shape[:2], 2 * shape[2] + 3, generator=make).to(dtype)
                return wide[..., 1 : 1 + shape[2]]
            return torch.randn(*shape, generator=make).to(dtype)

        B, L, D, N = self.batch, self.length, self.channels, self.size
        scale = {"usual": 0.5, "zero": 0.0, "huge": 300.0}[self.delta]
        delta = normal(B, L, D) * scale if not self.strided else normal(B, L, D).mul_(scale)
        values = {"u": normal(B, L, D), "delta": delta if self.optional else delta.abs_()}
        values["A"] = -torch.arange(1, N + 1, dtype=dtype) * torch.exp(0.1 * normal(D, N))
        values |= {"B": normal(B, L, N), "C": normal(B, L, N)}
        if self.optional:
            values |= {"D": normal(D), "z": normal(B, L, D), "delta_bias": normal(D) - 2}
        if self.initial:
            values["initial_state"] = normal(B, D, N).contiguous()
        return {name: value.requires_grad_() for name, value in values.items()}

    def others(self):
        make = torch.Generator().manual_seed(self.seed + 1)
        ids = torch.randint(0, 6, (self.batch, self.length), generator=make).sort(1).values
        return {"delta_softplus": self.optional, "seq_idx": ids if self.documents else None}


def outputs_and_gradients(path, case, dtype):
    values = case.tensors(dtype)
    outputs = PATHS[path](**values, **case.others())
    make = torch.Generator().manual_seed(case.seed + 2)
    grads = [torch.randn(o.shape, generator=make).to(dtype) for o in outputs]
    gradients = torch.autograd.grad(outputs, list(values.values()), grads)
    return dict(zip(("y", "final", *values), (*outputs, *gradients), strict=True))


def assert_agrees(path, case, tolerance=1e-5):
    got = outputs_and_gradients(path, case, torch.float32)
    for name, true in outputs_and_gradients("reference", case, torch.float64).items():
        assert got[name].dtype == torch.float32
        error = (got[name].double() - true).abs().max().item() if true.numel() else 0.0
        scale = true.abs().max().item() if true.numel() else 1.0
        assert error <= tolerance * scale + 1e-30, f"{name} of {path} is {error / max(scale, 1e-30):.1e} off in {case}"


cases = st.builds(
    Case,
    batch=st.integers(0, 3),
    length=st.sampled_from([1, 2, 3, 13, 31, 32, 33, 61, 97]),
    channels=st.sampled_from([1, 2, 7, 16, 17, 31, 40]),
    size=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 31, 64]),
    delta=st.sampled_from(["usual", "usual", "zero", "huge"]),
    optional=st.booleans(),
    initial=st.booleans(),
    documents=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 10_000),
)


@pytest.mark.parametrize("path", FAST)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases)
def test_outputs_and_gradients_agree_with_the_float64_recurrence(path, case):
    assert_agrees(path, case)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("size", [1, 16, 64])
def test_many_channels_and_several_chunks_agree(path, size):
    assert_agrees(path, Case(batch=2, length=150, channels=200, size=size, documents=True))


def test_the_reference_is_the_recurrence_written_out():
    u, delta, A, B, C = (
        torch.tensor(v, dtype=torch.float64) for v in ([2.0, 3.0], [0.5, 0.25], [-1.0], [4.0, 5.0], [6.0, 7.0])
    )
    y, h = scan_reference(u[None, :, None], delta[None, :, None], A[:, None], B[None, :, None], C[None, :, None])
    first = 0.5 * 4.0 * 2.0
    second = torch.exp(torch.tensor(-0.25, dtype=torch.float64)) * first + 0.25 * 5.0 * 3.0
    assert y.flatten().tolist() == pytest.approx([6.0 * first, 7.0 * second.item()], rel=1e-15)
    assert h.item() == pytest.approx(second.item(), rel=1e-15)


@pytest.mark.parametrize("documents", [False, True])
def test_the_torch_form_passes_gradcheck(documents):
    case = Case(batch=1, length=35, channels=2, size=2, documents=documents)
    values = case.tensors()
    names, others = list(values), case.others()

    def run(*tensors):
        return PATHS["torch"](**dict(zip(names, tensors, strict=True)), **others)

    assert torch.autograd.gradcheck(run, tuple(values.values()))


@pytest.mark.parametrize("path", FAST)
def test_two_halves_through_the_state_are_the_whole(path):
    case = Case(length=70, channels=20)
    values = {name: v.detach() for name, v in case.tensors(torch.float32).items()}
    whole, final = PATHS[path](**values, delta_softplus=True)
    wide, state, parts = ("u", "delta", "z", "B", "C"), values.pop("initial_state"), []
    for piece in (slice(0, 29), slice(29, 30), slice(30, 70)):
        part = {name: v[:, piece] if name in wide else v for name, v in values.items()}
        y, state = PATHS[path](**part, delta_softplus=True, initial_state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_one_token_at_a_time_is_the_whole():
    values = {name: v.detach() for name, v in Case().tensors().items()}
    whole, final = scan_reference(**values, delta_softplus=True)
    state, wide, parts = values.pop("initial_state"), ("u", "delta", "z", "B", "C"), []
    for t in range(37):
        step = {name: v[:, t] if name in wide else v for name, v in values.items()}
        y, state = selective_state_update(state, **step, delta_softplus=True)
        parts.append(y)
    torch.testing.assert_close(torch.stack(parts, 1), whole)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("path", ["reference", *FAST])
def test_packed_documents_are_the_documents_alone(path):
    values = {name: v.detach() for name, v in Case(batch=1, length=60, initial=False).tensors(torch.float32).items()}
    ids = torch.tensor([[5] * 11 + [5] * 20 + [2] * 1 + [5] * 28])
    packed, final = PATHS[path](**values, delta_softplus=True, seq_idx=ids)
    wide = ("u", "delta", "z", "B", "C")
    for piece in (slice(0, 31), slice(31, 32), slice(32, 60)):
        alone, last = PATHS[path](
            **{name: v[:, piece] if name in wide else v for name, v in values.items()}, delta_softplus=True
        )
        torch.testing.assert_close(packed[:, piece], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", FAST)
def test_a_row_does_not_depend_on_the_batch_it_stands_in(path):
    values = {name: v.detach() for name, v in Case(batch=3, length=50, channels=40).tensors(torch.float32).items()}
    both, _ = PATHS[path](**values, delta_softplus=True)
    rows = ("u", "delta", "z", "B", "C", "initial_state")
    alone, _ = PATHS[path](**{n: v[1:2] if n in rows else v for n, v in values.items()}, delta_softplus=True)
    torch.testing.assert_close(
        both[1:2], alone, rtol=0 if path == "native" else 1e-6, atol=0 if path == "native" else 1e-6
    )


@needs_c
def test_the_same_bits_for_any_number_of_threads_and_in_every_run():
    case, before = Case(batch=3, length=100, channels=300, size=16), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = outputs_and_gradients("native", case, torch.float32)
        for count in (2, 3):
            torch.set_num_threads(count)
            more = outputs_and_gradients("native", case, torch.float32)
            assert all(torch.equal(one[name], more[name]) for name in one)
    finally:
        torch.set_num_threads(before)


@needs_c
def test_several_python_threads_get_the_same_bits():
    case = Case(batch=2, length=64, channels=64, size=16)
    alone, results = outputs_and_gradients("native", case, torch.float32), []
    workers = [
        threading.Thread(target=lambda: results.append(outputs_and_gradients("native", case, torch.float32)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert all(torch.equal(alone[name], result[name]) for result in results for name in alone)


_FORK = """
import os, torch
from hybridnas.kernels._build import threads
from hybridnas.kernels.selective_scan import selective_scan
u, B = torch.randn(2, 64, 64), torch.randn(2, 64, 16)
args = [u, u.abs(), -torch.rand(64, 16), B, B]
torch.set_num_threads(2)
before = selective_scan(*args)
child = os.fork()
if child == 0:
    os._exit(0 if threads() == 1 and torch.equal(selective_scan(*args), before) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_uses_one_thread_and_computes_the_same():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _FORK], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("path", FAST)
def test_half_precision_inputs_keep_a_float32_state(path, dtype):
    values = {name: v.detach().to(dtype) for name, v in Case().tensors(torch.float32).items()}
    values["A"] = values["A"].float()
    y, final = PATHS[path](**values, delta_softplus=True)
    true, last = scan_reference(**{n: v.double() for n, v in values.items()}, delta_softplus=True)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(final.double(), last, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), true, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("path", FAST)
def test_not_a_number_is_not_swallowed(path):
    values = {name: v.detach() for name, v in Case(channels=3).tensors(torch.float32).items()}
    values["delta"][0, 5, 1] = float("nan")
    y, _ = PATHS[path](**values, delta_softplus=True)
    assert torch.isnan(y[0, 5:, 1]).all()
    assert torch.isfinite(y[1]).all()
    assert torch.isfinite(y[0, :, [0, 2]]).all()


@pytest.mark.slow
@needs_c
@pytest.mark.parametrize("full", [False, True])
def test_the_operator_is_registered_as_torch_demands(full):
    case = Case(batch=2, length=40, channels=20, size=4, optional=full, initial=full, documents=full)
    values, ids = case.tensors(torch.float32), case.others()["seq_idx"]
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
    reset = None if ids is None else torch.zeros(ids.shape, dtype=torch.uint8)
    tensors = tuple(values.get(name) for name in names)
    with torch.random.fork_rng():
        torch.use_deterministic_algorithms(False)
        torch.library.opcheck(torch.ops.hybridnas.selective_scan, (*tensors, reset, full, True))


@pytest.mark.slow
@needs_c
def test_export_keeps_the_operator():
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan(u, delta, A, B, C, delta_softplus=True)

    values = Case(optional=False, initial=False).tensors(torch.float32)
    args = tuple(values[n].detach() for n in ("u", "delta", "A", "B", "C"))
    program = torch.export.export(Scan(), args)
    assert "hybridnas.selective_scan" in str(program.graph)
    torch.testing.assert_close(program.module()(*args), Scan()(*args))


@pytest.mark.slow
@needs_c
def test_compile_goes_through_in_one_graph_with_gradients():
    values = Case(documents=True).tensors(torch.float32)
    others = Case(documents=True).others()
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(selective_scan(**values, **others).sum(), list(values.values()))
    got = torch.autograd.grad(compiled(**values, **others).sum(), list(values.values()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def arguments(**changes):
    values = {
        name: v.detach() for name, v in Case(batch=2, length=4, channels=3, size=5).tensors(torch.float32).items()
    }
    return values | changes


@pytest.mark.parametrize(
    ("changes", "got", "allowed"),
    [
        ({"u": torch.zeros(4, 3)}, (4, 3), "(B, L, D)"),
        ({"delta": torch.zeros(2, 4, 2)}, (2, 4, 2), (2, 4, 3)),
        ({"A": torch.zeros(4, 5)}, (4, 5), (3, 5)),
        ({"B": torch.zeros(2, 4, 6)}, (2, 4, 6), (2, 4, 5)),
        ({"C": torch.zeros(2, 4, 5, dtype=torch.long)}, torch.int64, "floating point"),
        ({"D": torch.zeros(1)}, (1,), (3,)),
        ({"z": torch.zeros(2, 4, 3, device="meta")}, torch.device("meta"), torch.device("cpu")),
        ({"delta_bias": [0.0]}, "list", "tensor"),
        ({"initial_state": torch.zeros(2, 5, 3)}, (2, 5, 3), (2, 3, 5)),
        ({"seq_idx": torch.zeros(2, 4)}, torch.float32, "integers"),
        ({"seq_idx": torch.zeros(2, 5, dtype=torch.long)}, (2, 5), (2, 4)),
        ({"A": torch.full((3, 5), float("nan"))}, "NaN or infinity", "finite"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_expected_and_got(changes, got, allowed):
    with pytest.raises(KernelInputError) as refused:
        selective_scan(**arguments(**changes))
    assert (refused.value.field, refused.value.got, refused.value.allowed) == (next(iter(changes)), got, allowed)


def test_the_sentence_of_a_wrong_argument_says_where_what_was_got_and_what_is_allowed():
    words = r"^selective_scan delta must have shape \(B, L, D\) = \(2, 4, 3\), got \(2, 4, 2\)$"
    with pytest.raises(KernelInputError, match=words):
        selective_scan(**arguments(delta=torch.zeros(2, 4, 2)))


def test_a_requested_implementation_runs_or_raises():
    with pytest.raises(ConfigError) as refused:
        selective_scan(**arguments(), impl="gpu")
    assert (refused.value.field, refused.value.got) == ("impl", "gpu")
    assert refused.value.allowed == ["auto", "reference", "torch", "native", "triton", "fla"]
    y, state = selective_scan(**arguments(), delta_softplus=True, impl="reference", return_final_state=True)
    torch.testing.assert_close(y, selective_scan(**arguments(), delta_softplus=True), rtol=1e-5, atol=1e-5)
    assert state.shape == (2, 3, 5)


def test_describe_says_what_auto_chooses_for_a_device_and_a_dtype():
    assert describe("cpu").startswith("native: C, compiled by" if native.available() else "torch: chunk by chunk")
    assert describe("cpu", torch.float64).startswith("torch: chunk by chunk (native takes float32")
    assert describe("cpu", impl="torch") == "torch: chunk by chunk"
    assert describe("cpu", impl="reference") == "reference: step by step"


@pytest.mark.parametrize("impl", ["reference", "torch", pytest.param("native", marks=needs_c)])
def test_a_step_by_any_implementation_is_the_step(impl):
    values = {name: v.detach() for name, v in Case(length=1).tensors(torch.float32).items()}
    step = {name: v[:, 0] if name in ("u", "delta", "z", "B", "C") else v for name, v in values.items()}
    state = step.pop("initial_state")
    expected = selective_state_update(state, **step, delta_softplus=True)
    got = selective_state_update(state, **step, delta_softplus=True, impl=impl)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_step_names_a_wrong_argument():
    state = torch.zeros(2, 3, 5)
    good = {"u": torch.zeros(2, 3), "delta": torch.zeros(2, 3), "A": torch.zeros(3, 5)}
    with pytest.raises(KernelInputError) as refused:
        selective_state_update(state, **good, B=torch.zeros(2, 4), C=torch.zeros(2, 5))
    assert (refused.value.field, refused.value.got, refused.value.allowed) == ("B", (2, 4), (2, 5))
