"""What a search on recordings leaves to listen to: ``sound/generated.wav``, ``held_out.wav`` and spectrograms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hybridnas.files import write_atomic
from hybridnas.study.callbacks import StudyCallback, StudyEnded, StudyStarted
from hybridnas.study.records import SOUNDS

SECONDS = 1.0
MOST_TOKENS = 32_000  # of what is generated: it takes seconds at the size of a search's models


class SoundFiles(StudyCallback):
    """Writes ``sound/`` when a search on recordings ends and has exported its winner."""

    def __init__(self) -> None:
        self._data: Mapping[str, Any] = {}

    def on_study_start(self, event: StudyStarted) -> None:
        """Keep what the search reads."""
        self._data = event.identity.get("data", {})

    def on_study_end(self, event: StudyEnded) -> None:
        """Write the files, of several workers the last one to end."""
        if event.last and self._data.get("kind") == "audio" and (event.folder / "best" / "config.json").is_file():
            write_sound(event.folder, self._data)


def write_sound(folder: Path, data: Mapping[str, Any]) -> None:
    """Write one second that the model in ``best/`` generates, one of a held-out recording, and their spectrograms."""
    from hybridnas.data import open_source, source_config
    from hybridnas.data.audio import AudioSource
    from hybridnas.data.sound import wav_bytes
    from hybridnas.draw.spectrogram import draw_spectrogram
    from hybridnas.export.load import load

    source = open_source(source_config(data))
    assert isinstance(source, AudioSource)
    count = min(MOST_TOKENS // source.coding.ids_per_sample, round(SECONDS * source.coding.rate))
    sounds = {
        "held_out": source.excerpt("valid", count),
        "generated": generated(load(folder / "best", device="cpu"), source, count),
    }
    target = folder / SOUNDS
    target.mkdir(exist_ok=True)
    for name, samples_T in sounds.items():
        write_atomic(target / f"{name}.wav", wav_bytes(samples_T, source.coding.rate))
        draw_spectrogram(samples_T, source.coding.rate, target / f"{name}.png")


def generated(model: Any, source: Any, count: int) -> Any:
    """Return ``count`` samples that a model draws at temperature 1 after a silent one, float32 (T,)."""
    import torch

    coding = source.coding
    start = torch.tensor([coding.encode(source.silent(1)).tolist()])
    ids_BL = model.generate(start, count * coding.ids_per_sample, temperature=1.0, top_k=None, seed=0)
    return coding.decode(ids_BL[0, start.shape[1] :].clamp(max=source.vocab_size - 1).tolist())
