"""Bytes that each Triton kernel moves and operations it does, counted by hand from its loads, stores and arithmetic.

Every tensor counts once per kernel that touches it, as if caches were perfect within a kernel and cold between two;
what a program writes for itself and reads again (the backward's states of a few steps) is not counted. An exponential
counts as one operation, as do a multiplication and an addition. Needs no triton and no GPU.
"""

from __future__ import annotations

from typing import NamedTuple

from hybridnas.kernels._triton.shapes import CHUNK, conv_rows, scan_parts


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
