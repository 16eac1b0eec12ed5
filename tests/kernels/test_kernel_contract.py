"""What every operation keeps, by every implementation: default dtypes, empty inputs, second derivatives, file names."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import hybridnas
import hybridnas.kernels.causal_conv1d as conv
import hybridnas.kernels.cross_entropy as loss
import hybridnas.kernels.delta_step as delta
import hybridnas.kernels.diagonal_scan as diagonal
import hybridnas.kernels.diagonal_ssm as filters
import hybridnas.kernels.gated_delta as recurrence
import hybridnas.kernels.gated_rnn as gated
import hybridnas.kernels.generalized_delta as generalized
import hybridnas.kernels.mamba_step as step
import hybridnas.kernels.moe_dispatch as moe
import hybridnas.kernels.rmsnorm as norms
import hybridnas.kernels.selective_scan as scan
import hybridnas.kernels.ssd as duality
from hybridnas import kernels
from hybridnas.errors import KernelUnavailableError
from hybridnas.hardware import Impl
from hybridnas.kernels._dispatch import Operation
from hybridnas.kernels.causal_conv1d import causal_conv1d
from hybridnas.kernels.cross_entropy import cross_entropy, linear_cross_entropy, token_scores
from hybridnas.kernels.delta_step import Form, delta_step
from hybridnas.kernels.diagonal_scan import diagonal_scan
from hybridnas.kernels.diagonal_ssm import diagonal_ssm
from hybridnas.kernels.gated_delta import gated_delta
from hybridnas.kernels.gated_rnn import gated_rnn
from hybridnas.kernels.generalized_delta import generalized_delta
from hybridnas.kernels.mamba_step import Norm, Weights, mamba_step
from hybridnas.kernels.moe_dispatch import Experts, expert_choice, token_choice
from hybridnas.kernels.rmsnorm import add_norm, layer_norm, rms_norm
from hybridnas.kernels.selective_scan import selective_scan, selective_state_update
from hybridnas.kernels.ssd import ssd

needs_compiler = pytest.mark.skipif(not conv.native.available(), reason="no C compiler")
D, N, TAPS, HEADS, GROUPS, WIDTH, EXPERTS, VOCABULARY = 6, 3, 4, 4, 2, 3, 3, 11
INNER, RANK = 8, 2
Tensors = dict[str, Tensor]


class Op(NamedTuple):
    """An operation: its float32 inputs for a batch and a length, a call that returns its outputs, and their shapes."""

    operation: Operation
    shapes: Callable[[int, int], dict[str, tuple[int, ...]]]
    call: Callable[[Tensors, int, int, str], tuple[Tensor, ...]]
    outputs: Callable[[int, int], list[tuple[int, ...]]]
    differentiable: bool = True

    def impls(self) -> list[str]:
        """Return the implementations that this operation has on a CPU, Triton's in its interpreter."""
        has = {"native": self.operation.native is not None, "triton": self.operation.triton, "fla": False}
        return [impl.value for impl in Impl if has.get(impl.value, True)]


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def _scan(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    ids = integers(3, batch, length).sort(1).values
    return selective_scan(**v, delta_softplus=True, seq_idx=ids, return_final_state=True, impl=impl)


def _ssd(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    ids = integers(3, batch, length).sort(1).values
    return ssd(**v, dt_softplus=True, seq_idx=ids, chunk_size=4, return_final_state=True, impl=impl)


def _gated_delta(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    ids = integers(3, batch, length).sort(1).values
    given = {**v, "log_decay": -v["log_decay"].square()}
    return gated_delta(**given, seq_idx=ids, chunk_size=4, return_final_state=True, impl=impl)


def _generalized_delta(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    ids = integers(3, batch, length).sort(1).values
    given = {**v, "log_decay": -v["log_decay"].square()}
    return generalized_delta(**given, seq_idx=ids, chunk_size=4, return_final_state=True, impl=impl)


def _diagonal(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    ids = integers(3, batch, length).sort(1).values
    return diagonal_scan(**v, seq_idx=ids, return_final_state=True, impl=impl)


def _diagonal_ssm(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    given = {**v, "log_decay": -v["log_decay"].square()}
    return diagonal_ssm(**given, return_final_state=True, impl=impl)


def _gated_rnn(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    given = dict(v)
    state = given.pop("h"), given.pop("c")
    y, after = gated_rnn(**given, initial_state=state, kind="lstm", impl=impl)
    return y, *after


def _conv(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    ids = integers(3, batch, length).sort(1).values
    return causal_conv1d(**v, activation="silu", seq_idx=ids, return_final_state=True, impl=impl)


def _step(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    given = dict(v)
    x, conv, ssm, norm = (given.pop(name) for name in ("x", "conv_state", "ssm_state", "norm"))
    weights = Weights(**{name: given.get(name) for name in Weights._fields})
    return mamba_step(x, conv, ssm, weights, norm=Norm("rmsnorm", norm, None, 1e-5), residual=True, impl=impl)


def _delta_step(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    given = dict(v)
    x, conv, memory, norm = (given.pop(name) for name in ("x", "conv_state", "memory", "norm_before"))
    weights = delta.Weights(**{name: given.get(name) for name in delta.Weights._fields})
    mixed = 2 * GROUPS * N + HEADS * WIDTH
    columns = (mixed, HEADS * WIDTH, HEADS, HEADS)
    form = Form(GROUPS, HEADS, N, WIDTH, columns, decay="softplus", beta=1.0, feature_map="l2", gate="silu")
    return delta_step(x, conv, memory, weights, form, norm=Norm("rmsnorm", norm, None, 1e-5), impl=impl)


def _experts(v: Tensors) -> Experts:
    return Experts(v["up"], v["down"], v["up_bias"], v["down_bias"], "silu", True)


def _token_choice(v: Tensors, batch: int, length: int, impl: str, capacity: int | None) -> tuple[Tensor, ...]:
    tokens = batch * length
    make = torch.Generator().manual_seed(2)
    expert = torch.rand(tokens, EXPERTS, generator=make, dtype=torch.float32).argsort(1)[:, :2]
    return token_choice(v["x"], v["gate"], expert, _experts(v), capacity=capacity, impl=impl)


def _expert_choice(v: Tensors, batch: int, length: int, impl: str) -> tuple[Tensor, ...]:
    slots = (batch * length + 1) // 2
    token = torch.stack([torch.arange(slots) for _ in range(EXPERTS)])
    return (expert_choice(v["x"], v["gate"][:, :slots], token, _experts(v), impl=impl),)


def _weights(tokens: int) -> dict[str, tuple[int, ...]]:
    biases = {"up_bias": (EXPERTS, 10), "down_bias": (EXPERTS, D)}
    return {"x": (tokens, D), "up": (EXPERTS, D, 10), "down": (EXPERTS, 5, D), **biases}


def _scan_shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    wide, narrow = (batch, length, D), (batch, length, N)
    shapes = {"u": wide, "delta": wide, "A": (D, N), "B": narrow, "C": narrow, "D": (D,), "z": wide}
    return {**shapes, "delta_bias": (D,), "initial_state": (batch, D, N)}


def _ssd_shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    wide, narrow = (batch, length, HEADS, WIDTH), (batch, length, GROUPS, N)
    shapes = {"x": wide, "dt": wide[:3], "A": (HEADS,), "B": narrow, "C": narrow, "D": (HEADS,), "z": wide}
    return {**shapes, "dt_bias": (HEADS,), "initial_state": (batch, HEADS, WIDTH, N)}


def _gated_delta_shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    narrow, wide = (batch, length, GROUPS, N), (batch, length, HEADS, WIDTH)
    shapes = {"q": narrow, "k": narrow, "v": wide, "log_decay": (*wide[:3], N), "beta": wide[:3]}
    return {**shapes, "initial_state": (batch, HEADS, N, WIDTH)}


def _generalized_delta_shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    narrow, wide = (batch, length, HEADS, N), (batch, length, HEADS, WIDTH)
    shapes = {"q": narrow, "k": narrow, "v": wide, "log_decay": narrow, "a": narrow, "b": narrow}
    return {**shapes, "initial_state": (batch, HEADS, N, WIDTH)}


def _update_shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    given = _scan_shapes(batch, 1)
    given["state"] = given.pop("initial_state")
    return {n: (s[0], *s[2:]) if n in ("u", "delta", "B", "C", "z") else s for n, s in given.items()}


def _step_shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    return {
        "x": (batch, D), "conv_state": (batch, TAPS - 1, INNER), "ssm_state": (batch, INNER, N), "norm": (D,),
        "in_proj": (2 * INNER, D), "conv": (INNER, TAPS), "conv_bias": (INNER,), "x_proj": (RANK + 2 * N, INNER),
        "dt_proj": (INNER, RANK), "dt_bias": (INNER,), "A_log": (INNER, N), "D": (INNER,), "out_proj": (D, INNER),
    }  # fmt: skip


def _delta_step_shapes(batch: int, length: int) -> dict[str, tuple[int, ...]]:
    mixed, inner = 2 * GROUPS * N + HEADS * WIDTH, HEADS * WIDTH
    return {
        "x": (batch, D), "conv_state": (batch, TAPS - 1, mixed), "memory": (batch, HEADS, N, WIDTH),
        "norm_before": (D,), "in_proj": (mixed + inner + 2 * HEADS, D), "conv": (mixed, TAPS), "A_log": (HEADS,),
        "dt_bias": (HEADS,), "norm": (WIDTH,), "out_proj": (D, inner),
    }  # fmt: skip


OPS = {
    "selective_scan": Op(scan.OPERATION, _scan_shapes, _scan, lambda b, n: [(b, n, D), (b, D, N)]),
    "selective_state_update": Op(
        scan.OPERATION,
        _update_shapes,
        lambda v, b, n, impl: selective_state_update(**v, delta_softplus=True, impl=impl),
        lambda b, n: [(b, D), (b, D, N)],
    ),
    "diagonal_scan": Op(
        diagonal.OPERATION,
        lambda b, n: {"a": (b, n, D), "x": (b, n, D), "initial_state": (b, D)},
        _diagonal,
        lambda b, n: [(b, n, D), (b, D)],
    ),
    "diagonal_ssm": Op(
        filters.OPERATION,
        lambda b, n: {"u": (b, n, D), "log_decay": (D, N), "weight": (D, N), "initial_state": (b, D, N)},
        _diagonal_ssm,
        lambda b, n: [(b, n, D), (b, D, N)],
    ),
    "gated_rnn": Op(
        gated.OPERATION,
        lambda b, n: {
            "x": (b, n, D),
            "weight_ih": (4 * N, D),
            "weight_hh": (4 * N, N),
            "bias_ih": (4 * N,),
            "bias_hh": (4 * N,),
            "h": (b, N),
            "c": (b, N),
        },
        _gated_rnn,
        lambda b, n: [(b, n, N), (b, N), (b, N)],
    ),
    "causal_conv1d": Op(
        conv.OPERATION,
        lambda b, n: {"x": (b, n, D), "weight": (D, TAPS), "bias": (D,), "initial_state": (b, TAPS - 1, D)},
        _conv,
        lambda b, n: [(b, n, D), (b, TAPS - 1, D)],
    ),
    "mamba_step": Op(
        step.OPERATION,
        _step_shapes,
        _step,
        lambda b, n: [(b, D), (b, TAPS - 1, INNER), (b, INNER, N)],
        differentiable=False,
    ),
    "delta_step": Op(
        delta.OPERATION,
        _delta_step_shapes,
        _delta_step,
        lambda b, n: [(b, D), (b, TAPS - 1, 2 * GROUPS * N + HEADS * WIDTH), (b, HEADS, N, WIDTH)],
        differentiable=False,
    ),
    "ssd": Op(duality.OPERATION, _ssd_shapes, _ssd, lambda b, n: [(b, n, HEADS, WIDTH), (b, HEADS, WIDTH, N)]),
    "gated_delta": Op(
        recurrence.OPERATION,
        _gated_delta_shapes,
        _gated_delta,
        lambda b, n: [(b, n, HEADS, WIDTH), (b, HEADS, N, WIDTH)],
    ),
    "generalized_delta": Op(
        generalized.OPERATION,
        _generalized_delta_shapes,
        _generalized_delta,
        lambda b, n: [(b, n, HEADS, WIDTH), (b, HEADS, N, WIDTH)],
    ),
    "rms_norm": Op(
        norms.OPERATION,
        lambda b, n: {"x": (b, n, D), "weight": (D,)},
        lambda v, b, n, impl: (rms_norm(**v, impl=impl),),
        lambda b, n: [(b, n, D)],
    ),
    "layer_norm": Op(
        norms.OPERATION,
        lambda b, n: {"x": (b, n, D), "weight": (D,), "bias": (D,)},
        lambda v, b, n, impl: (layer_norm(**v, impl=impl),),
        lambda b, n: [(b, n, D)],
    ),
    "add_norm": Op(
        norms.OPERATION,
        lambda b, n: {"x": (b, n, D), "residual": (b, n, D), "weight": (D,)},
        lambda v, b, n, impl: add_norm(**v, impl=impl),
        lambda b, n: [(b, n, D)] * 2,
    ),
    "cross_entropy": Op(
        loss.OPERATION,
        lambda b, n: {"logits": (b, n, VOCABULARY)},
        lambda v, b, n, impl: (cross_entropy(v["logits"], integers(VOCABULARY, b, n), impl=impl),),
        lambda b, n: [()],
    ),
    "linear_cross_entropy": Op(
        loss.OPERATION,
        lambda b, n: {"x": (b, n, D), "weight": (VOCABULARY, D)},
        lambda v, b, n, impl: (linear_cross_entropy(**v, targets=integers(VOCABULARY, b, n), impl=impl),),
        lambda b, n: [()],
    ),
    "token_scores": Op(
        loss.OPERATION,
        lambda b, n: {"x": (b, n, D), "weight": (VOCABULARY, D)},
        lambda v, b, n, impl: tuple(token_scores(**v, targets=integers(VOCABULARY, b, n), impl=impl))[:2],
        lambda b, n: [(b, n)] * 2,
        False,
    ),
    "token_choice": Op(
        moe.OPERATION,
        lambda b, n: {**_weights(b * n), "gate": (b * n, 2)},
        lambda v, b, n, impl: _token_choice(v, b, n, impl, None),
        lambda b, n: [(b * n, D), (EXPERTS,)],
    ),
    "token_choice with a capacity": Op(
        moe.OPERATION,
        lambda b, n: {**_weights(b * n), "gate": (b * n, 2)},
        lambda v, b, n, impl: _token_choice(v, b, n, impl, 2),
        lambda b, n: [(b * n, D), (EXPERTS,)],
    ),
    "expert_choice": Op(
        moe.OPERATION,
        lambda b, n: {**_weights(b * n), "gate": (EXPERTS, b * n)},
        _expert_choice,
        lambda b, n: [(b * n, D)],
    ),
}
MARKS = {"native": [needs_compiler], "triton": [pytest.mark.interpreter]}
CASES = [
    pytest.param(name, impl, id=f"{name} {impl}", marks=MARKS.get(impl, ()))
    for name, op in OPS.items()
    for impl in op.impls()
]


def run(op: Op, batch: int, length: int, impl: str) -> tuple[list[Tensor], Tensors]:
    """Return outputs and, where there are any, the gradients by name."""
    make = torch.Generator().manual_seed(0)
    values = {}
    for name, shape in op.shapes(batch, length).items():
        values[name] = torch.randn(shape, generator=make, dtype=torch.float32)
        if name == "A":
            values[name] = -values[name].abs()
        values[name].requires_grad_(op.differentiable)
    outputs = list(op.call(values, batch, length, impl))
    if not op.differentiable:
        return outputs, {}
    used = [o for o in outputs if o.requires_grad]
    upstream = [torch.randn(o.shape, generator=make, dtype=torch.float32) for o in used]
    gradients = torch.autograd.grad(used, list(values.values()), upstream)
    return outputs, dict(zip(values, gradients, strict=True))


@pytest.fixture(autouse=True)
def _short_chunks(request, monkeypatch):
    if "interpreter" in request.keywords:  # the interpreter is slow
        monkeypatch.setattr("hybridnas.kernels.ssd.triton.SSD_CHUNKS", (16, 32))


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize(("name", "impl"), CASES)
def test_numbers_do_not_depend_on_torchs_default_dtype(name, impl, default_dtype):
    expected, wanted = run(OPS[name], 2, 9, impl)
    torch.set_default_dtype(default_dtype)
    for _ in range(1 if impl == "triton" else 3):  # a write past a buffer shows after some allocations
        outputs, gradients = run(OPS[name], 2, 9, impl)
        for got, true in zip([*outputs, *gradients.values()], [*expected, *wanted.values()], strict=True):
            assert got.dtype == true.dtype
            assert torch.equal(got, true)


@pytest.mark.parametrize("pattern", ["MNAFE", "E{router=expert_choice}M{inner_moe=conv}"])
def test_a_models_logits_losses_and_gradients_do_not_depend_on_torchs_default_dtype(pattern, default_dtype):
    fields = {"n_experts": 4, "load_balance_weight": 0.5} if "{" not in pattern else {"n_experts": 4}
    model = hybridnas.build(pattern, d_model=32, vocab_size=64, **fields)
    ids = integers(64, 2, 40)

    def numbers() -> list[Tensor]:
        out = model(ids, labels=ids)
        loss = out.loss + sum(out.aux.losses.values())
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
        return [out.logits.detach(), loss.detach(), *out.aux.stats.values(), *gradients]

    expected = numbers()
    torch.set_default_dtype(default_dtype)
    for _ in range(3):
        for got, true in zip(numbers(), expected, strict=True):
            assert got.dtype == true.dtype and torch.equal(got, true)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize(("name", "impl"), CASES)
def test_empty_inputs_give_empty_outputs_and_gradients_of_every_inputs_shape(name, impl, batch, length):
    op = OPS[name]
    outputs, gradients = run(op, batch, length, impl)
    assert [tuple(o.shape) for o in outputs] == op.outputs(batch, length)
    shapes = op.shapes(batch, length)
    assert {n: tuple(g.shape) for n, g in gradients.items()} == (shapes if op.differentiable else {})
    assert all(g.isfinite().all() for g in gradients.values())


STATEFUL = ("selective_scan", "ssd", "gated_delta", "generalized_delta", "diagonal_scan", "diagonal_ssm")


@pytest.mark.parametrize(("name", "impl"), [case for case in CASES if case.values[0] in STATEFUL])
def test_a_scan_of_no_steps_hands_its_state_and_its_gradient_through(name, impl):
    values = {n: torch.randn(s, dtype=torch.float32).requires_grad_() for n, s in OPS[name].shapes(2, 0).items()}
    _, final = OPS[name].call(values, 2, 0, impl)
    assert torch.equal(final, values["initial_state"])
    (gradient,) = torch.autograd.grad(3 * final.sum(), values["initial_state"])
    assert torch.equal(gradient, torch.full_like(final, 3.0))


ONCE = {  # what can be differentiated once
    "selective_scan": ("auto", "torch", "native"),
    "selective_state_update": ("native",),
    "causal_conv1d": ("auto", "native"),
    "diagonal_scan": ("auto", "native"),
    "gated_delta": ("auto", "native"),
    "generalized_delta": ("auto", "native"),
    "rms_norm": ("auto", "torch"),
    "add_norm": ("auto", "torch"),
    "cross_entropy": ("auto", "torch", "native"),
    "linear_cross_entropy": ("auto", "torch", "native"),
}


@pytest.mark.parametrize(
    ("name", "impl"), [case for case in CASES if OPS[case.values[0]].differentiable and case.values[1] != "triton"]
)
def test_a_second_derivative_is_right_or_refused(name, impl):
    def second(impl: str) -> list[Tensor]:
        op, make = OPS[name], torch.Generator().manual_seed(0)
        values = {n: torch.randn(s, generator=make, dtype=torch.float32) for n, s in op.shapes(2, 3).items()}
        if "A" in values:
            values["A"] = -values["A"].abs()
        leaves = [v.requires_grad_() for v in values.values()]
        loss = sum(o.square().sum() for o in op.call(values, 2, 3, impl) if o.requires_grad)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        again = sum(g.square().sum() for g in gradients if g.requires_grad)
        return list(torch.autograd.grad(again, leaves, allow_unused=True, materialize_grads=True))

    if impl in ONCE.get(name, ()):
        with pytest.raises(KernelUnavailableError) as refused:
            second(impl)
        assert (refused.value.field, refused.value.allowed) == ("impl", ["reference"])
        return
    for got, true in zip(second(impl), second("reference"), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-3, atol=1e-3 * max(1.0, true.abs().max().item()))


FOLDERS = [path for path in Path(kernels.__path__[0]).iterdir() if path.is_dir() and path.name[0] != "_"]
ALLOWED = {"__init__.py", "reference.py", "eager.py", "native.py", "triton.py", "triton_kernels.py", "fla.py"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_operations_folder_has_the_same_file_names(folder):
    files = {path.name for path in folder.iterdir() if path.is_file()}
    sources = {name for name in files if name.endswith((".c", ".h"))}
    assert files - sources <= ALLOWED
    assert {"__init__.py", "reference.py"} <= files
    operation = importlib.import_module(f"hybridnas.kernels.{folder.name}").OPERATION
    assert operation.name == folder.name
    assert ("native.py" in files) == bool(sources) == (operation.native is not None)
    assert ("fla.py" in files) == operation.fla
    assert ("triton.py" in files) == ("triton_kernels.py" in files) == operation.triton


def test_every_operation_is_in_this_contract():
    assert {folder.name for folder in FOLDERS} == {op.operation.name for op in OPS.values()}
