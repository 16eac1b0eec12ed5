"""What there is to compile: every Triton kernel with every tile, at the sizes and dtypes that make another kernel.

Tensors lie on the meta device and launches are recorded, so that a case is what a call would launch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hybridnas.bench.triton.compiled import Compilation
from hybridnas.kernels._triton.launch import Launch, recording
from hybridnas.kernels._triton.shapes import MAX_FEATURES, MAX_STATE, MAX_TAPS, SSD_CHUNKS
from hybridnas.kernels.causal_conv1d import triton as conv
from hybridnas.kernels.cross_entropy import triton as loss
from hybridnas.kernels.diagonal_scan import triton as diagonal
from hybridnas.kernels.gated_delta import triton as gated
from hybridnas.kernels.moe_dispatch import triton as moe
from hybridnas.kernels.rmsnorm import triton as norm
from hybridnas.kernels.selective_scan import triton as scan
from hybridnas.kernels.ssd import triton as ssd

_B, _L, _D = 2, 160, 256
_SIZES = [2**i for i in range(MAX_STATE.bit_length())]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scan_launches(size: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Return what a forward and backward scan would launch; ``full``: with every optional argument, else with none."""
    wide, narrow = _empty(_B, _L, _D, dtype=dtype), _empty(_B, _L, size, dtype=dtype)
    given = (_empty(_D), wide, _empty(_D), _empty(_B, _D, size), _empty(_B, _L, dtype=torch.uint8))
    rest = given if full else (None,) * 5
    with recording() as launches:
        launcher = scan.Launcher.of(wide, wide, _empty(_D, size), narrow, narrow, *rest, softplus=full)
        y, final, states = scan.scan_forward(launcher)
        scan.scan_backward(launcher, states, y, final if full else None)
    return launches


def conv_launches(taps: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Return what a forward and backward convolution would launch; ``full`` as for the scan."""
    x = _empty(_B, _L, _D, dtype=dtype)
    given = (_empty(_D), _empty(_B, taps - 1, _D, dtype=dtype), _empty(_B, _L, dtype=torch.int32))
    tensors = (x, _empty(_D, taps), *(given if full else (None,) * 3))
    with recording() as launches:
        conv.conv_forward(*tensors, silu=full)
        conv.conv_backward(*tensors, dy=x, silu=full)
    return launches


def diagonal_launches(planes: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Return what a forward and backward diagonal scan would launch; 2 planes: complex; ``full`` as for the scan."""
    x, state = _empty(planes, _B, _L, _D, dtype=dtype), _empty(planes, _B, _D)
    initial, reset = (state, _empty(_B, _L, dtype=torch.uint8)) if full else (None, None)
    with recording() as launches:
        h = diagonal.diagonal_forward(x, x, initial, reset)
        diagonal.diagonal_backward(x, x, initial, reset, h, h)
    return launches


def ssd_launches(size: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Return what a forward and backward of state-space duality would launch: heads of ``size`` channels and states."""
    batch, length, heads, chunk, _ = _B, 3 * 256, 8, *SSD_CHUNKS
    x, narrow = _empty(batch, length, heads, size, dtype=dtype), _empty(batch, length, 2, size, dtype=dtype)
    dt, head, state = _empty(batch, length, heads, dtype=dtype), _empty(heads), _empty(batch, heads, size, size)
    given = (head, x, head, state, _empty(batch, length, dtype=torch.int32)) if full else (None,) * 5
    with recording() as launches:
        launcher = ssd.Launcher.of(
            x, dt, head, narrow, narrow, *given, softplus=full, chunk=chunk if full else 2 * chunk
        )
        y, final, kept = ssd.ssd_forward(launcher)
        ssd.ssd_backward(launcher, kept, y, final if full else None)
    return launches


def gated_launches(size: int, dtype: torch.dtype, full: bool, channel: bool) -> list[Launch]:
    """Return what a forward and backward gated linear recurrence would launch: keys and values of ``size`` channels.

    ``full``: with the delta rule, states and groups of heads; ``channel``: with decays by channel.
    """
    batch, length, heads, groups = _B, 3 * 64, 4, 2 if full else 4
    narrow, wide = (_empty(batch, length, n, size, dtype=dtype) for n in (groups, heads))
    log, state = _empty(batch, length, heads, size) if channel else _empty(batch, length, heads), None
    beta = _empty(batch, length, heads, dtype=dtype) if full else None
    if full:
        state = _empty(batch, heads, size, size)
    chunk = gated.chunk_of(64, size, half=dtype != torch.float32)
    with recording() as launches:
        launcher = gated.Launcher.of(wide, narrow, narrow, log, beta, state, scale=1.0, chunk=chunk)
        o, final, kept = gated.gated_delta_forward(launcher)
        gated.gated_delta_backward(launcher, kept, o.transpose(1, 2), final if full else None)
    return launches


def moe_launches(size: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Return what a forward and backward of routed experts of width ``size`` would launch; ``full``: with biases."""
    tokens, choices, n_experts, hidden = 512, 2, 8, 2 * size
    expert, x = torch.empty(tokens, choices, dtype=torch.int64, device="meta"), _empty(tokens, size, dtype=dtype)
    weight, bias = _empty(n_experts, size, hidden, dtype=dtype), _empty(n_experts, hidden) if full else None
    with recording() as launches:
        slot, choice, ends, _ = moe.group(expert, n_experts, None)
        rows = moe.multiply(x, weight, bias, choice, ends, choice.shape[0], transposed=False)
        moe.add_rows(rows, _empty(tokens, choices), slot)
        moe.spread_rows(rows[:tokens], rows, _empty(tokens, choices), slot)
        moe.multiply(rows, weight, None, None, ends, choice.shape[0], transposed=True)
        moe.weight_gradients(x, weight, bias, choice, ends, rows)
    return launches


def norm_launches(features: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Return what a norm of ``features`` would launch; ``full``: LayerNorm with a residual, else RMSNorm."""
    x, vector, sums = _empty(64, features, dtype=dtype), _empty(features), _empty(64)
    more, bias = (x, vector) if full else (None, None)
    with recording() as launches:
        norm._launch_forward(x, more, vector, bias, 1e-5, full, (x, x, sums, sums))
        outputs = x, _empty(4, features), _empty(4, features) if full else None
        norm._launch_backward(x, more, x, vector, sums, sums, full, outputs)
    return launches


def loss_launches(vocabulary: int, dtype: torch.dtype, full: bool) -> list[Launch]:
    """Return what the losses of rows of logits would launch; ``full``: with gradients and their scale."""
    logits, targets = _empty(64, vocabulary, dtype=dtype), torch.empty(64, dtype=torch.int64, device="meta")
    with recording() as launches:
        loss.losses(logits, targets, _empty(64) if full else None, logits, gradient=full)
    return launches


def compilations(whole: bool) -> list[Compilation]:
    """Return what is compiled: every tile at every size and dtype, or each tile of each kernel once or a few times."""
    found = _all(True)
    if whole:
        return found
    few = _all(False)
    seen = {(c.launch.kernel.__name__, c.tile) for c in few}
    for compilation in found:
        key = compilation.launch.kernel.__name__, compilation.tile
        if key not in seen:
            seen.add(key)
            few.append(compilation)
    return few


def _all(whole: bool) -> list[Compilation]:
    """Return representative launches with their first tile, or everything."""
    found: list[Compilation] = []
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    gated_by_head, gated_by_channel = (partial(gated_launches, channel=channel) for channel in (False, True))

    def add(label: str, make: Callable[..., list[Launch]], number: int, dtype: torch.dtype, full: bool) -> None:
        kind = str(dtype).removeprefix("torch.")
        for launch in make(number, dtype, full):
            tiles = launch.tiles if whole else launch.tiles[:1]
            found.extend(Compilation(f"{label}={number} {kind}{'' if full else ' bare'}", launch, t) for t in tiles)

    for size in _SIZES if whole else [16]:
        add("N", scan_launches, size, float32, True)
    for taps in range(1, MAX_TAPS + 1) if whole else [4]:
        add("K", conv_launches, taps, float32, True)
    for planes in (1, 2):
        add("planes", diagonal_launches, planes, float32, True)
    for features in (64, 1024, MAX_FEATURES) if whole else (1024, MAX_FEATURES):
        add("D", norm_launches, features, float32, True)
    for vocabulary in (256, 50257) if whole else [50257]:
        add("V", loss_launches, vocabulary, float32, True)
    for dtype, full in ((bfloat16, True), (float16, True), (float32, False)) if whole else ():
        add("N", scan_launches, 16, dtype, full)
        add("K", conv_launches, 4, dtype, full)
        if not full:
            add("planes", diagonal_launches, 1, dtype, full)
        add("D", norm_launches, 1024, dtype, full)
        add("V", loss_launches, 50257, dtype, full)
    for dtype in (float32, bfloat16):
        add("D", moe_launches, 256, dtype, True)
        add("P=N", ssd_launches, 64, dtype, True)
        add("K=V by head", gated_by_head, 64, dtype, True)
        add("K=V by channel", gated_by_channel, 64, dtype, True)
    if whole:  # sizes above a block's are the same code
        add("D", moe_launches, 16, float32, True)
        add("D", moe_launches, 256, float16, False)
        for number, dtype, full in (
            (128, bfloat16, True),
            (64, float16, False),
            (64, float32, False),
            (16, float32, True),
        ):
            add("P=N", ssd_launches, number, dtype, full)
            add("K=V by head", gated_by_head, number, dtype, full)
            add("K=V by channel", gated_by_channel, number, dtype, full)
        for number, dtype in ((256, bfloat16), (128, float32), (128, float16), (16, bfloat16)):
            add("K=V by head", gated_by_head, number, dtype, True)
            add("K=V by channel", gated_by_channel, number, dtype, True)
    return found
