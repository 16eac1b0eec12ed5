"""Samples of sound as ids of one byte and back, and as a WAV file.

- ``mulaw8``: mu-law companding with mu 255, as WaveNet (arXiv 1609.03499, section 2.2), SaShiMi (arXiv 2202.09729) and
  Mamba (arXiv 2312.00752, section 4.4.2) quantize speech: f(x) = sign(x) ln(1 + 255 |x|) / ln 256.
- ``linear8``: 256 even steps.
- ``linear16``: the 16 bits of a sample as two ids, the high byte first; nothing of a 16-bit recording is lost.

Shapes: T samples.
"""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ENCODINGS = ("mulaw8", "linear8", "linear16")
MU = 255

Ids = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.float32]


class Coding(NamedTuple):
    """What ids of a recording mean: samples per second, and how a sample is written."""

    rate: int
    encoding: str

    @property
    def ids_per_sample(self) -> int:
        """Ids of one sample [count]."""
        return 2 if self.encoding == "linear16" else 1

    @property
    def silence(self) -> int:
        """The id that a silent sample has, or begins with."""
        return int(self.encode(np.zeros(1, dtype=np.float32))[0])

    def encode(self, samples_T: Samples) -> Ids:
        """Return the ids of samples in [-1, 1], (T,) or for linear16 (2 T,) uint8."""
        if self.encoding == "linear16":
            levels = np.clip(np.rint(samples_T.astype(np.float64) * 32768), -32768, 32767).astype(np.int64) + 32768
            return np.stack((levels >> 8, levels & 255), axis=1).astype(np.uint8).reshape(-1)
        x_T = np.clip(samples_T.astype(np.float64), -1, 1)
        if self.encoding == "mulaw8":
            x_T = np.sign(x_T) * np.log1p(MU * np.abs(x_T)) / math.log1p(MU)
        return np.floor((x_T + 1) / 2 * MU + 0.5).astype(np.uint8)

    def decode(self, ids: Sequence[int] | Ids) -> Samples:
        """Return the samples (T,) of ids, each in the middle of what the id stands for; half a sample is left out."""
        raw = np.asarray(ids, dtype=np.int64)
        if self.encoding == "linear16":
            pairs = raw[: len(raw) // 2 * 2].reshape(-1, 2)
            return ((pairs[:, 0] * 256 + pairs[:, 1] - 32768) / 32768).astype(np.float32)
        x_T = 2 * raw / MU - 1
        if self.encoding == "mulaw8":
            x_T = np.sign(x_T) * np.expm1(np.abs(x_T) * math.log1p(MU)) / MU
        return x_T.astype(np.float32)


def wav_bytes(samples_T: Samples, rate: int) -> bytes:
    """Return a WAV file of 16 bits and one channel; samples beyond [-1, 1] are clipped."""
    levels = np.clip(np.rint(samples_T.astype(np.float64) * 32768), -32768, 32767).astype("<i2")
    target = io.BytesIO()
    with wave.open(target, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(levels.tobytes())
    return target.getvalue()
