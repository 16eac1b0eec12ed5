"""``data=audio``: recordings (WAV, FLAC and what else libsndfile reads) as ids, windows within one recording.

Samples are brought to one rate, 16 kHz unless asked otherwise, and then become ids of one byte
(:mod:`hybridnas.data.sound`).

Shapes: T samples of a recording.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridnas.config import option
from hybridnas.data.details import Details, Sample
from hybridnas.data.opening import UNSOUND, CorpusFile, open_bytes
from hybridnas.data.pieces import I64, PARTS, Ids, PieceError, PiecesConfig, PieceSource, open_store
from hybridnas.data.sound import ENCODINGS, Coding, Samples
from hybridnas.data.source import register_source
from hybridnas.data.text import text_files
from hybridnas.data.tokenizers import AudioTokenizer, Tokenizer
from hybridnas.errors import ConfigError
from hybridnas.units import duration, several

SUFFIXES = (".wav", ".flac", ".ogg", ".aiff", ".aif", ".au")
_BLOCK = 1 << 18  # samples read at a time


@dataclass(frozen=True, kw_only=True)
class AudioConfig(PiecesConfig):
    """Recordings in files of sound."""

    kind: str = option("audio", "kind of data, a name in SOURCES")
    rate: int = option(16_000, "samples per second that recordings are brought to [Hz]", ge=100, le=384_000)
    encoding: str = option(
        "mulaw8", "how a sample becomes ids: mulaw8 and linear8 one, linear16 two bytes", choices=ENCODINGS
    )
    channel: int | None = option(
        None, "which channel is read, counted from 1; none: the only one, or the mean of two [count]", ge=1
    )


def ids_of(file: CorpusFile, config: AudioConfig, facts: dict[str, Any]) -> Iterator[Ids]:
    """Yield a recording's ids in blocks; raises PieceError for what is no sound, or not in one or two channels.

    Adds to ``facts`` seconds, samples beyond full scale (which are clipped), and seconds by rate.
    """
    soundfile = _soundfile()
    coding = Coding(config.rate, config.encoding)
    packed = file.member or file.path.suffix.lower() != file.suffix
    try:
        # An open file rather than its path: a name need not be UTF-8.
        with open_bytes(file) as handle, soundfile.SoundFile(io.BytesIO(handle.read()) if packed else handle) as sound:
            rate = int(sound.samplerate)
            _check_channels(file, int(sound.channels), config.channel)
            blocks = _samples(sound, file, config.channel, facts)
            yield from (coding.encode(block_T) for block_T in resampled(blocks, rate, config.rate))
            seconds = sound.tell() / rate
    except UNSOUND as error:
        raise PieceError(
            f"{file.place} is not soundly packed ({error}); unpack or remove it",
            field="data.path",
            got=str(file.path),
        ) from None
    except (soundfile.LibsndfileError, OSError) as error:
        words = getattr(error, "error_string", str(error))  # of libsndfile's own without the object it was given
        raise PieceError(
            f"{file.place} cannot be read as sound: {' '.join(words.split())}; mend or remove it",
            field="data.path",
            got=str(file.path),
            allowed=SUFFIXES,
        ) from None
    facts["seconds"] = facts.get("seconds", 0.0) + seconds
    rates = facts.setdefault("rates", {})
    rates[str(rate)] = rates.get(str(rate), 0.0) + seconds


def _samples(sound: Any, file: CorpusFile, channel: int | None, facts: dict[str, Any]) -> Iterator[Samples]:
    """Yield an open recording's samples (T,) float32 in blocks, of one channel, at its own rate."""
    read = 0
    for block_TC in sound.blocks(blocksize=_BLOCK, dtype="float32", always_2d=True):
        block_T = block_TC[:, channel - 1] if channel else block_TC.mean(axis=1)
        wrong = np.flatnonzero(~np.isfinite(block_T))
        if len(wrong):
            raise PieceError(
                f"{file.place} sample {read + int(wrong[0]) + 1:,} is not a finite number; mend or remove the file",
                field="data.path",
                got=str(file.path),
            )
        read += len(block_T)
        facts["clipped"] = facts.get("clipped", 0) + int((np.abs(block_T) > 1).sum())
        yield block_T


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without its library
        raise ConfigError(
            f"data=audio reads files with the package soundfile, which is not usable here ({error}); "
            f"pip install 'hybridnas[audio]'",
            field="data",
            got="audio",
        ) from None
    return soundfile


def _check_channels(file: CorpusFile, channels: int, wanted: int | None) -> None:
    if wanted is not None and wanted <= channels:
        return
    if wanted is not None:
        raise PieceError(
            f"{file.place} has {several(channels, 'channel')}, data.channel={wanted} asks for another one",
            field="data.channel",
            got=wanted,
            allowed=f"1 to {channels}",
        )
    if channels > 2:
        raise PieceError(
            f"{file.place} has {channels} channels; one, or the mean of two, is read: choose one with "
            f"data.channel=1 to {channels}",
            field="data.channel",
            got=channels,
            allowed="1 or 2 channels, or data.channel",
        )


def resampled(blocks: Iterator[Samples], given: int, wanted: int) -> Iterator[Samples]:
    """Yield samples at ``wanted`` per second, as ``scipy.signal.resample_poly`` makes them of the whole recording.

    A block is filtered with as much before and after it as the filter reaches, so memory does not grow with length.
    """
    if given == wanted:
        yield from blocks
        return
    from scipy.signal import resample_poly

    shared = math.gcd(given, wanted)
    up, down = wanted // shared, given // shared
    reach = -(-10 * max(up, down) // up)  # samples on each side that SciPy's default filter reads
    margin = -(-reach // down) * down
    size = max(_BLOCK // down, margin // down) * down
    held, before = np.zeros(0, dtype=np.float32), 0
    for block in blocks:
        held = np.concatenate((held, block))
        while len(held) >= before + size + margin:
            made = resample_poly(held[: before + size + margin], up, down)
            yield made[before // down * up : (before + size) // down * up].astype(np.float32)
            held, before = held[before + size - margin :], margin
    if len(held) > before:
        yield resample_poly(held, up, down)[before // down * up :].astype(np.float32)


def recordings(
    files: Sequence[CorpusFile], config: AudioConfig, facts: dict[str, Any]
) -> Iterator[tuple[str, Iterator[Ids]]]:
    """Yield (name, blocks of ids) of each file, whose name is its path in the folder that was asked for."""
    seen: set[str] = set()
    for file in files:
        name = file.key if file.key not in seen else file.place
        seen.add(name)
        yield name, ids_of(file, config, facts)


@register_source("audio", config=AudioConfig)
class AudioSource(PieceSource):
    """Recordings as training and held-out windows."""

    noun = "recording"
    config: AudioConfig

    def __init__(self, config: AudioConfig) -> None:
        assert config.path is not None
        files = text_files(config.path, SUFFIXES, cache=config.cache)
        words = config.path if isinstance(config.path, str) else ", ".join(config.path)
        settings = {"rate": config.rate, "encoding": config.encoding, "channel": config.channel}
        store = open_store("audio", files, settings, config.cache, lambda facts: recordings(files, config, facts))
        super().__init__(config, store, name=words)
        self.coding = Coding(config.rate, config.encoding)

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def token_lengths(self) -> npt.NDArray[np.int64]:
        return np.ones(256, dtype=np.int64)

    @property
    def unit(self) -> tuple[str, int]:
        return "sample", self.coding.ids_per_sample

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return AudioTokenizer(self.coding)

    def describe(self) -> str:
        uses = ("to train on", "for validation", "for testing")
        parts = [f"{self._counts(part)} {use}" for part, use in zip(PARTS, uses, strict=True) if len(self._parts[part])]
        per = several(self.coding.ids_per_sample, "token")
        return f"{self._name}: {'; '.join(parts)}; {self.config.encoding} at {self.config.rate:,} Hz, {per} per sample"

    def _counts(self, part: str) -> str:
        seconds = self._seconds(self._parts[part])
        words = duration(seconds) if seconds >= 10 else f"{seconds:.2f} s"
        return f"{several(len(self._parts[part]), self.noun)}, {words}"

    def _seconds(self, numbers: I64) -> float:
        ids = np.diff(self._store.bounds)[numbers].sum()
        return float(ids / self.coding.ids_per_sample / self.config.rate)

    def details(self, samples: int, seed: int) -> Details:
        store, facts = self._store, self._store.facts
        every = np.arange(len(store.names))
        lengths = np.diff(store.bounds) / self.coding.ids_per_sample / self.config.rate
        figures = {
            "recordings": len(store.names),
            "seconds": self._seconds(every),
            "seconds of the median recording": float(np.median(lengths)),
            "seconds of the longest recording": float(lengths.max()),
            "samples beyond full scale": int(facts.get("clipped", 0)),
            "tokens": len(store.ids),
            "different ids": self.vocab_size,
        }
        parts = {
            part: {
                "recordings": len(self._parts[part]),
                "seconds": self._seconds(self._parts[part]),
                "tokens": int(np.diff(store.bounds)[self._parts[part]].sum()),
            }
            for part in PARTS
            if len(self._parts[part])
        }
        total = sum(facts["rates"].values()) or 1.0
        ordered = sorted(facts["rates"].items(), key=lambda item: -item[1])
        shares = {f"{int(rate):,} Hz": seconds / total for rate, seconds in ordered}
        draws = np.random.default_rng(seed).choice(len(store.names), min(samples, len(store.names)), replace=False)
        shown = [self._sample(int(number)) for number in sorted(draws)]
        return Details(figures=figures, parts=parts, shares=shares, shares_of="rates of the files", samples=shown)

    def excerpt(self, part: str, count: int) -> Samples:
        """Return the loudest ``count`` samples, or fewer, of a part's longest recording, float32 (T,)."""
        own = self._parts[part]
        lengths_P = np.diff(self._store.bounds)[own]
        number = int(own[lengths_P.argmax()])
        samples_T = self.coding.decode(self._store.ids[self._store.bounds[number] : self._store.bounds[number + 1]])
        if len(samples_T) <= count:
            return samples_T
        power_T = np.concatenate(([0.0], np.cumsum(samples_T.astype(np.float64) ** 2)))
        start = int((power_T[count:] - power_T[:-count]).argmax())
        return samples_T[start : start + count]

    def silent(self, count: int) -> Samples:
        """Return so many silent samples, float32 (T,)."""
        return np.zeros(count, dtype=np.float32)

    def _sample(self, number: int) -> Sample:
        """Return a recording's length, peak and loudness in words."""
        samples_T = self.coding.decode(self._store.ids[self._store.bounds[number] : self._store.bounds[number + 1]])
        peak, loudness = float(np.abs(samples_T).max()), float(np.sqrt(np.mean(samples_T.astype(np.float64) ** 2)))
        text = (
            f"{len(samples_T) / self.config.rate:.2f} s, peak {peak:.3f} of full scale, root mean square {loudness:.3f}"
        )
        return Sample(where=self._store.names[number], text=text)
