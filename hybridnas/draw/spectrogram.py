"""A recording as a picture: power by time and frequency (short-time Fourier transform with a Hann window)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridnas.draw.figure import SETTINGS, save

_WINDOW_SECONDS = 0.032
_LEAST_WINDOW = 64  # samples
_RANGE_DB = 80.0  # below the loudest place, where the picture is dark


def draw_spectrogram(samples_T: npt.NDArray[np.float32], rate: int, out: Path) -> Path | None:
    """Draw samples (T,) at ``rate`` [Hz] as a PNG; returns the file, None for a recording shorter than one window."""
    power_FT, times, frequencies = spectrogram(samples_T, rate)
    if not len(times):
        return None
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    decibels_FT = 10 * np.log10(np.maximum(power_FT, 1e-20))
    with matplotlib.rc_context({**SETTINGS, "axes.grid": False}):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        ax = figure.subplots()
        top = float(decibels_FT.max())
        mesh = ax.pcolormesh(times, frequencies / 1000, decibels_FT, vmin=top - _RANGE_DB, vmax=top, cmap="magma")
        ax.set_xlabel("time [s]")
        ax.set_ylabel("frequency [kHz]")
        figure.colorbar(mesh, ax=ax, label="power [dB]")
        return save(figure, out, ("png",))[0]


def spectrogram(samples_T: npt.NDArray[np.float32], rate: int) -> tuple[Any, Any, Any]:
    """Return power (F, W), the windows' middles (W,) [s] and frequencies (F,) [Hz]; no window for a short recording."""
    size = max(_LEAST_WINDOW, 2 ** round(np.log2(rate * _WINDOW_SECONDS)))
    frequencies = np.fft.rfftfreq(size, 1 / rate)
    if len(samples_T) < size:
        return np.zeros((len(frequencies), 0)), np.zeros(0), frequencies
    windows_WN = np.lib.stride_tricks.sliding_window_view(samples_T.astype(np.float64), size)[:: size // 4]
    power_FW = np.abs(np.fft.rfft(windows_WN * np.hanning(size), axis=1).T) ** 2
    times = (np.arange(len(windows_WN)) * (size // 4) + size / 2) / rate
    return power_FW, times, frequencies
