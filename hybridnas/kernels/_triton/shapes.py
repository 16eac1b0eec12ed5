"""Sizes that kernels, their host code and their counted traffic must agree on; plain Python."""

from __future__ import annotations

CHUNK = 64  # steps of the scan between kept states: they take N / CHUNK of the inputs' size
MAX_CHUNK = 256  # steps of a chunk of any kernel
SSD_CHUNKS = (128, 256)  # steps of SSD's: fewer would write more of states than is read of inputs
SSD_ROWS = 64  # steps of one of its tiles, half as many in float32
GATED_DELTA_CHUNK = 64  # steps of a chunk of gated linear recurrences, half as many in float32
MOE_CHOICES = 128  # choices of one program of the experts' grouping
GROUP = 8  # steps whose states the backward holds at once; CHUNK / GROUP groups make a chunk
BACKWARD_PARTS = 16  # at most so many partial sums over channels for dB and dC
NORM_ROWS = 16  # rows of one program of the norms' backward: its partial sums take 1 / 16 of the input's size
MAX_STATE = 256
MAX_FEATURES = 4096  # of a norm: 8 numbers of a row a thread; its backward spills with 16
MAX_TAPS = 8  # more spill registers, and take minutes to compile


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def blocks_of(width: int, number: int) -> int:
    """Return how many blocks of ``width`` hold ``number``."""
    return -(-number // width)


def scan_parts(channels: int) -> tuple[int, int]:
    """Return how many parts the channels are cut into for dB and dC, and the width of one, a multiple of 64.

    A function of the channels alone, so that a row's gradients do not depend on its batch.
    """
    parts = min(BACKWARD_PARTS, blocks_of(64, channels))
    width = blocks_of(64, blocks_of(parts, channels)) * 64
    return blocks_of(width, channels), width


def conv_rows(taps: int) -> int:
    """Return the time steps of one tile of the convolution's backward; more taps keep more rows in registers."""
    return 32 if taps <= 4 else 16
