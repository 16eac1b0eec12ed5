"""python -m hybridnas.generate model=DIR prompt="def ": text on standard output, as it is produced.

A model of ``data=audio`` writes a recording instead: ``out=sample.wav``, with its spectrogram beside it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridnas.cli import show
from hybridnas.cli.command import DEVICE, Command, Done
from hybridnas.cli.wanted import model_folder
from hybridnas.config import option
from hybridnas.errors import ConfigError

if TYPE_CHECKING:
    from hybridnas.arch.model import HybridLM
    from hybridnas.data.tokenizers import AudioTokenizer

# Control characters would move a terminal's cursor or worse, and a model may draw any of them.
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}


@dataclass(frozen=True, kw_only=True)
class Settings(Command):
    """Settings of the command."""

    model: Path | None = option(None, "folder of an exported model, of a training run, or of a study")
    study: str | None = option(None, "study whose best model is used: its name, or its folder")
    runs: Path = option(Path("runs"), "folder in which studies lie")
    prompt: str = option("", "text to continue; - reads it from standard input, empty starts a new document")
    max_new_tokens: int = option(200, "most tokens to draw [count]", ge=0)
    temperature: float = option(0.8, "0 takes the likeliest token each time, 1 draws as the model says [1]", ge=0)
    top_k: int | None = option(40, "draw among this many likeliest tokens; null: among all [count]", ge=1)
    top_p: float | None = option(
        None, "draw among the fewest likeliest tokens of this total probability; null: among all [0 to 1]", gt=0, le=1
    )
    eos_token_id: tuple[int, ...] = option((), "token numbers that end the text, several as [0,5]", ge=0)
    seed: int = option(0, "seed of the draws", ge=0, le=2**63 - 1)
    stop_at_end: bool = option(True, "stop where the model ends the document [yes/no]")
    echo: bool = option(True, "print the prompt before its continuation [yes/no]")
    out: Path | None = option(None, "of a model of sound: WAV file that is written; its spectrogram is FILE.png")
    device: str = option("auto", DEVICE)

    @classmethod
    def label(cls) -> str:
        return "generate"


def run(settings: Settings) -> Done:
    """Stream a continuation of the prompt; Ctrl-C ends it with what was printed."""
    if (settings.model is None) == (settings.study is None):
        raise ConfigError(
            "generate needs model=FOLDER, a folder that 'python -m hybridnas.export' wrote, or study=NAME",
            field="model",
            got=settings.model,
        )
    from hybridnas.data.tokenizers import AudioTokenizer
    from hybridnas.export.load import load, load_tokenizer
    from hybridnas.export.stream import stream_text

    folder = model_folder(settings.model, settings.study, settings.runs)
    model = load(folder, settings.device)
    tokenizer = load_tokenizer(folder)
    if isinstance(tokenizer, AudioTokenizer):
        return _sound(settings, folder, model, tokenizer)
    if settings.out is not None:
        raise ConfigError(
            f"generate out={settings.out} is a recording, and this model's ids are text; leave it out",
            field="out",
            got=str(settings.out),
        )
    prompt = _prompt(settings.prompt)
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        _write(text)

    began = time.perf_counter()
    drawn, code = 0, 0
    try:
        model.init_state(1)  # a model that cannot generate says so before anything is printed
        if settings.echo:
            _write(prompt)
        drawn = stream_text(
            model,
            tokenizer,
            prompt,
            write,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            eos_token_id=settings.eos_token_id,
            seed=settings.seed,
            stop_at_end=settings.stop_at_end,
        )
    except KeyboardInterrupt:
        code = 130
    _write("\n")
    seconds = time.perf_counter() - began
    if sys.stderr.isatty() and code == 0:
        print(f"{drawn} tokens in {seconds:.2f} s, {drawn / seconds:.0f} tokens/s", file=sys.stderr)
    found = {"model": str(folder), "prompt": prompt, "text": "".join(pieces), "tokens": drawn, "seconds": seconds}
    return Done(found, code)


def _sound(settings: Settings, folder: Path, model: HybridLM, tokenizer: AudioTokenizer) -> Done:
    """Write ``max_new_tokens`` ids after silence as a recording, and its spectrogram."""
    import numpy as np
    import torch

    from hybridnas.data.sound import wav_bytes
    from hybridnas.draw.spectrogram import draw_spectrogram
    from hybridnas.files import write_atomic

    coding, out = tokenizer.coding, settings.out
    if out is None or out.suffix.lower() != ".wav":
        raise ConfigError(
            "generate needs out=FILE.wav for a model of sound, whose ids are no text",
            field="out",
            got=None if out is None else str(out),
            allowed="*.wav",
        )
    if settings.prompt:
        raise ConfigError(
            "generate prompt= is text, and this model's ids are sound: it begins after silence; leave it out",
            field="prompt",
            got=settings.prompt,
        )
    out = out.expanduser()
    start = coding.encode(np.zeros(1, dtype=np.float32)).tolist()
    ids = model.generate(
        torch.tensor([start], device=model.embedding.weight.device),
        settings.max_new_tokens,
        eos_token_id=settings.eos_token_id or None,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=settings.seed,
    )[0, len(start) :]
    samples = coding.decode(ids.clamp(max=tokenizer.vocab_size - 1).tolist())
    write_atomic(out, wav_bytes(samples, coding.rate))
    picture = draw_spectrogram(samples, coding.rate, out.with_suffix(".png"))
    seconds = len(samples) / coding.rate
    show.line(f"wrote {out}: {seconds:.2f} s at {coding.rate:,} Hz" + (f", and {picture}" if picture else ""))
    found = {"model": str(folder), "out": str(out), "picture": picture and str(picture)}
    return Done({**found, "tokens": len(ids), "sound_seconds": seconds, "rate": coding.rate})


def _prompt(text: str) -> str:
    """Return the prompt as valid text: from standard input for ``-``, stray bytes as U+FFFD."""
    if text == "-":
        return sys.stdin.buffer.read().decode("utf-8", "replace")
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _write(text: str) -> None:
    sys.stdout.write(text.translate(_HARMLESS) if sys.stdout.isatty() else text)
    sys.stdout.flush()
