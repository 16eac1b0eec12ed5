"""Every kernel on a GPU against its specification in float64: outputs, gradients, states, documents, odd shapes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.kernels.causal_conv1d import causal_conv1d
from hybridnas.kernels.cross_entropy import linear_cross_entropy
from hybridnas.kernels.gated_delta import gated_delta
from hybridnas.kernels.moe_dispatch import Experts, token_choice
from hybridnas.kernels.rmsnorm import add_norm, layer_norm, rms_norm
from hybridnas.kernels.selective_scan import selective_scan
from hybridnas.kernels.ssd import ssd
from tests.oracles import relative

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("unwritten_memory_is_nan"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]
Tensors = dict[str, Tensor]
Normal = Callable[..., Tensor]
REHEARSED = {"HYBRIDNAS_REHEARSE", "TRITON_INTERPRET"} & {name for name, value in os.environ.items() if value == "1"}
SHAPES = [(1, 20)] if REHEARSED else [(2, 70), (1, 1), (3, 257), (2, 1024)]
ALLOWED = {torch.float32: 3e-4, torch.bfloat16: 3e-2}  # largest error, as a part of the largest value
HALF = ("u", "delta", "B", "C", "z", "x", "dt", "q", "k", "v", "beta", "residual", "up", "down", "gate", "head")


class Case(NamedTuple):
    """A kernel: its inputs in float64 for a batch and a length, and its differentiable outputs."""

    draw: Callable[[Normal, int, int], Tensors]
    call: Callable[[Tensors, Tensor | None, str], Any]  # inputs, documents (B, L), implementation


def _scan(normal: Normal, rows: int, length: int) -> Tensors:
    wide, narrow, channels, size = (rows, length, 20), (rows, length, 5), 20, 5
    return {
        "u": normal(*wide), "delta": 0.5 * normal(*wide), "A": -normal(channels, size).exp(), "B": normal(*narrow),
        "C": normal(*narrow), "D": normal(channels), "z": normal(*wide), "delta_bias": normal(channels) - 2,
        "initial_state": normal(rows, channels, size),
    }  # fmt: skip


def _conv(normal: Normal, rows: int, length: int) -> Tensors:
    return {"x": normal(rows, length, 20), "weight": normal(20, 4), "bias": normal(20)}


def _ssd(normal: Normal, rows: int, length: int) -> Tensors:
    wide, narrow = (rows, length, 4, 24), (rows, length, 2, 20)
    return {
        "x": normal(*wide), "dt": 0.5 * normal(*wide[:3]), "A": -2 * normal(4).abs(), "B": normal(*narrow) / 4,
        "C": normal(*narrow) / 4, "D": normal(4), "z": normal(*wide), "dt_bias": normal(4) - 2,
        "initial_state": normal(rows, 4, 24, 20),
    }  # fmt: skip


def _delta(by: str, delta: bool) -> Callable[[Normal, int, int], Tensors]:
    def draw(normal: Normal, rows: int, length: int) -> Tensors:
        narrow, wide = (rows, length, 2, 24), (rows, length, 4, 20)
        decay = {"head": wide[:3], "channel": (*wide[:3], 24)}.get(by)
        found = {name: F.normalize(normal(*narrow), dim=-1) for name in ("q", "k")} | {"v": normal(*wide)}
        found |= {"initial_state": normal(rows, 4, 24, 20)}
        found |= {} if decay is None else {"log_decay": F.logsigmoid(normal(*decay)) / 4}
        return found | ({"beta": normal(*wide[:3]).sigmoid()} if delta else {})

    return draw


def _experts(normal: Normal, rows: int, length: int) -> Tensors:
    tokens = rows * length
    return {
        "x": normal(tokens, 24),
        "gate": normal(tokens, 2),
        "up": normal(5, 24, 40) / 5,
        "down": normal(5, 40, 24) / 6,
    }


def _chosen(tokens: int) -> Tensor:
    return torch.rand(tokens, 5, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :2]


def _by_token(v: Tensors, documents: Tensor | None, impl: str, capacity: int | None = None) -> Tensor:
    expert = _chosen(v["x"].shape[0]).to(v["x"].device)
    experts = Experts(v["up"], v["down"], activation="silu")
    return token_choice(v["x"], v["gate"], expert, experts, capacity=capacity, impl=impl)[0]


def _rows(*names: str) -> Callable[[Normal, int, int], Tensors]:
    def draw(normal: Normal, rows: int, length: int) -> Tensors:
        sizes = {
            "x": (rows, length, 88),
            "residual": (rows, length, 88),
            "weight": (88,),
            "bias": (88,),
            "head": (37, 88),
        }
        return {name: normal(*sizes[name]) for name in names}

    return draw


def _loss(v: Tensors, documents: Tensor | None, impl: str) -> Tensor:
    shape = v["x"].shape[:2]
    targets = torch.randint(37, shape, generator=torch.Generator().manual_seed(3)).to(v["x"].device)
    return linear_cross_entropy(v["x"], v["head"], targets, mask=targets > 3, reduction="sum", z_loss=1e-2, impl=impl)


STEPS: dict[str, Any] = {"return_final_state": True}
CASES = {
    "selective scan": Case(
        _scan, lambda v, ids, impl: selective_scan(**v, delta_softplus=True, seq_idx=ids, impl=impl, **STEPS)
    ),
    "convolution": Case(_conv, lambda v, ids, impl: causal_conv1d(**v, activation="silu", seq_idx=ids, impl=impl)),
    "ssd": Case(
        _ssd, lambda v, ids, impl: ssd(**v, dt_softplus=True, seq_idx=ids, impl=impl, **STEPS)
    ),
    **{
        f"recurrence, decay by {by}{', delta rule' if delta else ''}": Case(
            _delta(by, delta), lambda v, ids, impl: gated_delta(**v, seq_idx=ids, impl=impl, **STEPS)
        )
        for by in ("nothing", "head", "channel")
        for delta in (False, True)
    },
    "experts": Case(_experts, _by_token),
    "experts with a capacity": Case(_experts, lambda v, ids, impl: _by_token(v, ids, impl, capacity=7)),
    "rms norm": Case(_rows("x", "weight"), lambda v, ids, impl: rms_norm(**v, impl=impl)),
    "layer norm": Case(_rows("x", "weight", "bias"), lambda v, ids, impl: layer_norm(**v, impl=impl)),
    "norm of a sum": Case(_rows("x", "residual", "weight"), lambda v, ids, impl: add_norm(**v, impl=impl)),
    "loss": Case(_rows("x", "head"), _loss),
}  # fmt: skip


def outcome(case: Case, values: Tensors, documents: Tensor | None, impl: str) -> dict[str, Tensor]:
    """Return outputs and, for a random weighting of them, the gradients of all inputs."""
    given = {name: tensor.clone().requires_grad_() for name, tensor in values.items()}
    found = case.call(given, documents, impl)
    outputs = list(found) if isinstance(found, tuple) else [found]
    make = torch.Generator().manual_seed(5)
    upstream = [torch.randn(y.shape, generator=make, dtype=torch.float64).to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(given.values()), upstream)
    return {f"output {i}": y.detach() for i, y in enumerate(outputs)} | dict(zip(given, gradients, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_gives_what_the_specification_gives(
    name: str, dtype: torch.dtype, shape: tuple[int, int], device: torch.device, impl: str
) -> None:
    case, make = CASES[name], torch.Generator().manual_seed(0)
    drawn = case.draw(lambda *sizes: torch.randn(*sizes, generator=make, dtype=torch.float64), *shape)
    narrow = {key: tensor.to(dtype if key in HALF else torch.float32) for key, tensor in drawn.items()}
    ids = torch.randint(0, 4, shape, generator=make).sort(1).values
    for documents in (None, ids):
        exact = outcome(case, {key: tensor.double() for key, tensor in narrow.items()}, documents, "reference")
        moved = {key: tensor.to(device) for key, tensor in narrow.items()}
        got = outcome(case, moved, None if documents is None else documents.to(device), impl)
        errors = {key: relative(got[key].cpu(), exact[key]) for key in exact}
        wrong = {key: error for key, error in errors.items() if not error < ALLOWED[dtype]}
        assert not wrong, (documents is not None, wrong)
