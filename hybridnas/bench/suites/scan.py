"""The selective scan with D, z, bias and softplus, float32, against its peers and against its arithmetic.

Shapes: B batch, L length, D channels, N state size. Peers get their own layout and their own code: mambapy's
``MambaBlock.selective_scan``, and transformers' ``mamba_selective_scan`` on the sequential path that a processor takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hybridnas.bench import floor, peers, plain
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Form, measure
from hybridnas.bench.result import Result
from hybridnas.kernels.selective_scan import native, selective_scan

OURS, CHUNKED, MAMBAPY, HF, FLOOR = "ours", "ours, torch chunked", "mambapy pscan", "Hugging Face", "arithmetic floor"
_HF_LENGTH = 256  # beyond it the backward of Hugging Face's loop, quadratic in L, takes minutes
Scan = Callable[..., Tensor]


class Inputs(NamedTuple):
    """Arguments of a scan in our layout, all of them leaves that ask for gradients, and the gradient of y."""

    u_BLD: Tensor
    delta_BLD: Tensor
    A_DN: Tensor
    B_BLN: Tensor
    C_BLN: Tensor
    D_D: Tensor
    z_BLD: Tensor
    bias_D: Tensor
    dy_BLD: Tensor

    @classmethod
    def draw(cls, batch: int, length: int, channels: int, size: int, seed: int = 0) -> Inputs:
        """Draw what an initialised Mamba layer sees: steps of 1e-3 to 1e-1, A = -1 .. -N."""
        generator = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=generator)
        wide, narrow = (batch, length, channels), (batch, length, size)
        step_D = torch.rand(channels, generator=generator) * 0.099 + 0.001
        given = [
            normal(wide), 0.1 * normal(wide), -torch.arange(1.0, size + 1).repeat(channels, 1), normal(narrow),
            normal(narrow), torch.ones(channels), normal(wide), step_D + torch.log(-torch.expm1(-step_D)),
        ]  # fmt: skip
        return cls._make([*(t.requires_grad_() for t in given), normal(wide)])


def ours(i: Inputs, impl: str = "auto") -> Tensor:
    y_BLD = selective_scan(
        i.u_BLD, i.delta_BLD, i.A_DN, i.B_BLN, i.C_BLN, i.D_D, i.z_BLD, delta_bias=i.bias_D, delta_softplus=True,
        impl=impl,
    )  # fmt: skip
    assert isinstance(y_BLD, Tensor)
    return y_BLD


def mambapy(block: Any, i: Inputs) -> Tensor:
    """The scan of mambapy, (B, L, D) like ours; it leaves bias, softplus and gate to the layer."""
    delta_BLD = F.softplus(i.delta_BLD + i.bias_D)
    y_BLD: Tensor = block.selective_scan(None, i.u_BLD, delta_BLD, i.A_DN, i.B_BLN, i.C_BLN, i.D_D)
    return y_BLD * F.silu(i.z_BLD)


def hugging_face(scan: Any, i: Inputs) -> Tensor:
    """Transformers' scan: (B, D, L) and (B, N, L) arrive as the views that its mixer passes."""
    y_BDL: Tensor = scan(
        i.u_BLD.transpose(1, 2), i.delta_BLD.transpose(1, 2), i.A_DN, i.B_BLN.transpose(1, 2),
        i.C_BLN.transpose(1, 2), D=i.D_D, z=i.z_BLD.transpose(1, 2), delta_bias=i.bias_D, delta_softplus=True,
    )  # fmt: skip
    return y_BDL.transpose(1, 2)


def forward(scan: Scan, inputs: Inputs) -> None:
    """One call as in evaluation."""
    with torch.no_grad():
        scan(inputs)


def forward_backward(scan: Scan, inputs: Inputs) -> None:
    """One call and the gradients of all eight inputs."""
    y_BLD = scan(inputs)
    torch.autograd.grad(y_BLD, inputs[:-1], inputs.dy_BLD)


def run(config: BenchConfig) -> Result:
    """Measure forward and forward with backward at the goals' two shapes."""
    result = Result("scan")
    shapes = [(1, 16, 16, 4), (2, 8, 8, 4)] if config.tiny else [(1, 1024, 1024, 16), (8, 256, 256, 16)]
    for shape, goal in zip(shapes, (50, 25), strict=True):
        batch, channels, length, size = shape
        _one_shape(config, result, (batch, length, channels, size), goal)
    return result


def _one_shape(config: BenchConfig, result: Result, shape: tuple[int, int, int, int], goal: float) -> None:
    batch, length, channels, size = shape
    words = f"(B,D,L,N)=({batch},{channels},{length},{size})"
    inputs = Inputs.draw(*shape)
    found = _scans(result, words)
    _agree(result, words, found, inputs)
    for kind, work, instructions in (
        ("fwd", forward, floor.FORWARD),
        ("fwd+bwd", forward_backward, floor.FORWARD_BACKWARD),
    ):
        case = f"{words} {kind}"
        short = kind == "fwd+bwd" and config.quick and length > _HF_LENGTH
        forms = [
            Form(name, partial(work, scan, inputs), *_effort(config, name, kind, length))
            for name, scan in found.items()
            if not (short and name == HF)
        ]
        entries = batch * length * channels * size
        if not floor.unavailable():
            forms.append(Form(FLOOR, partial(floor.multiply_adds, entries, instructions)))
            if kind == "fwd":
                forms.append(Form("its exponentials alone", partial(floor.powers, entries)))
        result.add(case, measure(forms, config.pick(15, 5, 1), shortest=config.pick(0.02, 0.005, 0.0)))
        for name in (CHUNKED, MAMBAPY, HF):
            result.ratio(case, name, OURS)
        result.ratio(case, OURS, FLOOR)
    at = case
    if short and HF in found:
        at = _shorter(config, result, found, shape)
    what = f"scan {case}"
    result.goal("at least", goal, case=case, of=MAMBAPY, over=OURS, what=what, against="mambapy's pscan")
    result.goal("at least", 300, case=at, of=HF, over=OURS, what=f"scan {at}", against="Hugging Face's reference path")
    result.goal("at most", 2.5, case=case, of=OURS, over=FLOOR, what=what, against="arithmetic floor")
    if MAMBAPY in found:
        given = {"batch": batch, "length": length, "channels": channels, "size": size, "rounds": config.pick(7, 3, 1)}
        plain.again(config, result, case, "hybridnas.bench.suites.scan:default_malloc", given, [(MAMBAPY, OURS)])


def default_malloc(
    batch: int, length: int, channels: int, size: int, rounds: int
) -> Callable[[], dict[str, list[float]]]:
    """Build inputs; returns the interleaved run of ours and mambapy, forward and backward, for a process of its own."""
    inputs = Inputs.draw(batch, length, channels, size)
    found = _scans(Result("scan"), "")
    forms = [Form(name, partial(forward_backward, found[name], inputs)) for name in (OURS, MAMBAPY)]
    return partial(measure, forms, rounds)


def _scans(result: Result, words: str) -> dict[str, Scan]:
    """Return every scan that is here, and say which are not."""
    scans: dict[str, Scan] = {OURS: ours}
    if native.available():
        scans[CHUNKED] = partial(ours, impl="torch")
    else:
        result.notes.append(f"ours is the chunked torch form: {native.compiled().description}")
    if floor.unavailable():
        for kind in ("fwd", "fwd+bwd"):
            result.missing(f"{words} {kind}", FLOOR, floor.unavailable())
    why = {MAMBAPY: peers.absent("mambapy"), HF: peers.absent("transformers")}
    for name, reason in why.items():
        for kind in ("fwd", "fwd+bwd") if reason else ():
            result.missing(f"{words} {kind}", name, reason)
    if not why[MAMBAPY]:
        scans[MAMBAPY] = partial(mambapy, peers.load("mambapy.mamba").MambaBlock)
    if not why[HF]:
        module = peers.load_quietly("transformers.models.mamba.modeling_mamba")
        scans[HF] = partial(hugging_face, module.mamba_selective_scan)
    return scans


def _agree(result: Result, words: str, scans: dict[str, Scan], inputs: Inputs) -> None:
    """Compare outputs before anything is timed; a form that computes something else would be no peer."""
    with torch.no_grad():
        expected = ours(inputs)
        for name, scan in scans.items():
            error = float((scan(inputs) - expected).abs().max() / expected.abs().max())
            if not error < 1e-4:
                raise AssertionError(f"{name} and ours differ by {error:.1e} of the largest output at {words}")


def _effort(config: BenchConfig, name: str, kind: str, length: int) -> tuple[int | None, bool]:
    """Return in how many rounds a form takes part (none: all) and whether it is warmed up: slow ones less."""
    if name != HF or kind == "fwd":
        return (config.pick(7, 3, 1) if name in (MAMBAPY, HF) else None), name != HF
    return (1 if length > _HF_LENGTH else config.pick(3, 2, 1)), False


def _shorter(config: BenchConfig, result: Result, scans: dict[str, Scan], shape: tuple[int, int, int, int]) -> str:
    """Measure Hugging Face's backward where it takes seconds, not minutes; returns the case."""
    batch, _, channels, size = shape
    case = f"(B,D,L,N)=({batch},{channels},{_HF_LENGTH},{size}) fwd+bwd"
    inputs = Inputs.draw(batch, _HF_LENGTH, channels, size)
    forms = [Form(OURS, partial(forward_backward, ours, inputs))]
    forms.append(Form(HF, partial(forward_backward, scans[HF], inputs), 1, False))
    result.add(case, measure(forms, 3, shortest=0.005))
    result.notes.append(
        f"quick: Hugging Face's backward is quadratic in L and was measured at L={_HF_LENGTH} instead of {shape[1]}, "
        "where it loses less"
    )
    return case
