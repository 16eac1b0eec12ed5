"""Bytes that each Triton kernel moves and operations it does, counted by hand from its loads, stores and arithmetic.

Every tensor counts once per kernel that touches it, as if caches were perfect within a kernel and cold between two;
what a program writes for itself and reads again (the backward's states of a few steps) is not counted. An exponential
counts as one operation, as do a multiplication and an addition. Needs no triton and no GPU.
"""

from __future__ import annotations

from typing import NamedTuple

from hybridnas.kernels._triton.shapes import (
    CHUNK,
    MOE_CHOICES,
    NORM_ROWS,
    SSD_CHUNKS,
    SSD_ROWS,
    blocks_of,
    conv_rows,
    scan_parts,
)


class Traffic(NamedTuple):
    """Bytes to and from memory, and floating-point operations."""

    bytes: int
    flops: int

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Return the time that the slower of memory and arithmetic allows: calculated, not measured."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def scan_traffic(
    batch: int, length: int, channels: int, size: int, dtype_bytes: int = 4, gated: bool = True
) -> dict[str, Traffic]:
    """Return the traffic of each kernel of the selective scan, by its name; the forward's first, then the backward's.

    batch B, length L, channels D, size N; ``dtype_bytes`` of u, delta, B, C, z, y and their gradients; A, states and
    sums are float32. ``gated``: with z. The host's sums of partial buffers are under ``sums``.
    """
    tokens = batch * length
    chunks = -(-length // CHUNK)
    wide, narrow = tokens * channels * dtype_bytes, tokens * size * dtype_bytes
    states, sums, weights = batch * chunks * channels * size * 4, batch * chunks * channels * 4, channels * size * 4
    z = int(gated)
    parts = scan_parts(channels)[0]
    partials = 2 * parts * tokens * size * 4
    elements = tokens * channels * size
    inner = max(length - CHUNK, 0) / max(length, 1)  # the share of steps in all chunks but one
    chained = states if chunks > 1 else 0
    return {
        "chunk_states": Traffic(int(inner * (2 * wide + narrow + weights)) + chained, int(inner * 6 * elements)),
        "pass_states": Traffic(2 * states + sums + weights, 4 * states // 4),
        "chunk_outputs": Traffic(
            (3 + z) * wide + 2 * narrow + states + 2 * weights, 8 * elements + (2 + 6 * z) * tokens * channels
        ),
        "chunk_gradients": Traffic(
            int(inner * ((2 + z) * wide + narrow + weights)) + chained, int(inner * 6 * elements)
        ),
        "pass_gradients": Traffic(2 * states + sums + weights, 4 * states // 4),
        "chunk_inputs_gradients": Traffic(
            (5 + 2 * z) * wide + 2 * narrow + 3 * states + 2 * sums + partials + weights,
            (28 + 2 * z) * elements + (12 + 12 * z) * tokens * channels,
        ),
        "sums": Traffic(partials + states + 2 * sums + 2 * narrow + weights, (partials + states + 2 * sums) // 4),
    }


def conv_traffic(
    batch: int, length: int, channels: int, taps: int, dtype_bytes: int = 4, silu: bool = True
) -> dict[str, Traffic]:
    """Return the traffic of each kernel of the causal convolution; batch B, length L, channels D, taps K."""
    elements = batch * length * channels
    wide, weights = elements * dtype_bytes, channels * (taps + 1) * 4
    tiles = -(-(length + taps - 1) // conv_rows(taps))
    partials = batch * tiles * weights
    s = int(silu)
    return {
        "conv_forward": Traffic(2 * wide + weights, (2 * taps + 5 * s) * elements),
        "conv_backward": Traffic(3 * wide + weights + partials, (4 * taps + 1 + s * taps * (2 * taps + 9)) * elements),
        "sums": Traffic(partials + weights, partials // 4),
    }


def ssd_traffic(
    batch: int, length: int, heads: int, width: int, groups: int, size: int, dtype_bytes: int = 4, gated: bool = True
) -> dict[str, Traffic]:
    """Return the traffic of each kernel of state-space duality, in chunks of 128 steps.

    batch B, length L, heads H, head width P, groups G, state size N; ``dtype_bytes`` of x, dt, B, C, z, y and their
    gradients; states, scores and sums are float32, the sums of two gradients float64.
    """
    chunk, tokens, z = SSD_CHUNKS[0], batch * length, int(gated)
    chunks = batch * blocks_of(chunk, length)
    rows = chunk // (SSD_ROWS if dtype_bytes == 2 else SSD_ROWS // 2)
    wide, narrow = tokens * heads * width * dtype_bytes, tokens * groups * size * dtype_bytes
    lines, states = chunks * chunk * heads * 4, chunks * heads * width * size * 4
    scores, below = chunks * groups * chunk * chunk * 4, (rows + 1) / (2 * rows)  # the share of tiles that are done
    weights, mixed = 3 * lines, below * chunks * heads * chunk * chunk  # numbers of W in all
    of_states, across = 2 * tokens * heads * width * size, blocks_of(64, size)
    return {
        "ssd_steps": Traffic(tokens * heads * dtype_bytes + weights, 20 * tokens * heads),
        "ssd_scores": Traffic(int(2 * narrow + below * scores), int(2 * below * chunks * groups * chunk**2 * size)),
        "ssd_states": Traffic(wide + narrow + weights + states, of_states + tokens * heads * width),
        "ssd_pass_states": Traffic(2 * states, 2 * states // 4),
        "ssd_outputs": Traffic(
            int((2 + 2 * z) * wide + narrow + weights + below * scores + states),
            int(of_states + mixed * (2 * width + 8) + (2 + 6 * z) * tokens * heads * width),
        ),
        "ssd_gate_gradients": Traffic(5 * z * wide, 9 * z * tokens * heads * width),
        "ssd_states, from the start": Traffic(wide + narrow + weights + states, of_states + tokens * heads * width),
        "ssd_pass_gradients": Traffic(3 * states, 4 * states // 4),
        "ssd_inputs_gradients": Traffic(
            int(3 * wide + narrow + weights + 2 * lines + below * scores + states),
            int(of_states + mixed * (2 * width + 8) + 8 * tokens * heads * width),
        ),
        "ssd_scores_gradients": Traffic(
            int(2 * wide + weights + 2 * below * scores + 4 * rows * below * lines), int(mixed * (2 * width + 11))
        ),
        "ssd_maps_gradients, dC": Traffic(
            int(wide + 3 * narrow + weights + states + below * scores + across * lines),
            int(of_states + 2 * below * chunks * groups * chunk**2 * size + 3 * tokens * heads * size),
        ),
        "ssd_maps_gradients, dB": Traffic(
            int(wide + 2 * narrow + weights + states + below * scores),
            int(of_states + 2 * below * chunks * groups * chunk**2 * size + 2 * tokens * heads * size),
        ),
        "ssd_steps_gradients": Traffic(
            int(2 * tokens * heads * dtype_bytes + (3 + across + 4 * rows * below) * lines), 30 * tokens * heads
        ),
    }


def moe_traffic(
    tokens: int, choices: int, n_experts: int, width: int, hidden: int, dtype_bytes: int = 4
) -> dict[str, Traffic]:
    """Return the traffic of routed experts, forward and backward, without a capacity and with balanced experts.

    Tokens N, choices K, experts E, width D = O, hidden F, without biases. Activation and its backward are torch's and
    not counted. Every matrix is read once, as if its rows' tiles met it in a cache.
    """
    rows = tokens * choices
    blocks = blocks_of(MOE_CHOICES, rows)
    x, wide, high = (n * dtype_bytes for n in (tokens * width, rows * width, rows * hidden))
    matrices, product, index = n_experts * width * hidden * dtype_bytes, 2 * rows * width * hidden, rows * 4
    return {
        "count_choices": Traffic(2 * index + blocks * n_experts * 4, rows * n_experts),
        "place_choices": Traffic(4 * index + blocks * n_experts * 4, rows * MOE_CHOICES),
        "grouped_rows, up": Traffic(x + index + matrices + high, product),
        "grouped_rows, down": Traffic(high + matrices + wide, product),
        "combine": Traffic(wide + 2 * index + x, 2 * rows * width),
        "spread": Traffic(x + 2 * wide + 3 * index, 3 * rows * width),
        "grouped_rows, of down": Traffic(wide + matrices + high, product),
        "grouped_weights, of down": Traffic(high + wide + matrices, product),
        "grouped_rows, of up": Traffic(high + matrices + wide, product),
        "combine, of tokens": Traffic(wide + index + x, rows * width),
        "grouped_weights, of up": Traffic(x + index + high + matrices, product),
    }


def norm_traffic(
    rows: int, features: int, dtype_bytes: int = 4, centered: bool = False, fused: bool = False
) -> dict[str, Traffic]:
    """Return the traffic of RMSNorm, or LayerNorm where ``centered``; ``fused``: with the residual's addition."""
    wide, c, f = rows * features * dtype_bytes, int(centered), int(fused)
    vectors, partials = (1 + c) * features * 4, (1 + c) * blocks_of(NORM_ROWS, rows) * features * 4
    sums, elements = (1 + c) * rows * 4, rows * features
    return {
        "norm_forward": Traffic((2 + 2 * f) * wide + vectors + sums, (4 + 3 * c + f) * elements),
        "norm_backward": Traffic((3 + f) * wide + features * 4 + sums + partials, (9 + 5 * c + f) * elements),
        "sums": Traffic(partials + vectors, partials // 4),
    }


def loss_traffic(rows: int, vocabulary: int, dtype_bytes: int = 4) -> dict[str, Traffic]:
    """Return the traffic of the loss of rows of logits with its gradient: two passes over the logits."""
    return {
        "cross_entropy_rows": Traffic(3 * rows * vocabulary * dtype_bytes + 16 * rows, 9 * rows * vocabulary),
    }
