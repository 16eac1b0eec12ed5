"""python -m hybridnas.generate model=DIR prompt="def ": text on standard output, as it is produced."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from hybridnas.config import FrozenConfig, option
from hybridnas.errors import ConfigError

HELP = "stream text from an exported model"
# Control characters would move a terminal's cursor or worse, and a model may draw any of them.
_HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(FrozenConfig):
    """Settings of the command, one for one those of conf/generate.yaml."""

    model: str | None = option(None, "folder that 'python -m hybridnas.export' wrote")
    prompt: str | None = option("", "text to continue; - reads it from standard input, empty starts a new document")
    max_new_tokens: int = option(200, "most tokens to draw [count]", ge=0)
    temperature: float = option(0.8, "0 takes the likeliest token each time, 1 draws as the model says [1]", ge=0)
    top_k: int | None = option(40, "draw among this many likeliest tokens; null: among all [count]", ge=1)
    seed: int = option(0, "seed of the draws", ge=0)
    stop_at_end: bool = option(True, "stop where the model ends the document [yes/no]")
    echo: bool = option(True, "print the prompt before its continuation [yes/no]")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")

    @classmethod
    def label(cls) -> str:
        return "generate"


def run(config: dict[str, Any]) -> int:
    """Stream a continuation of the prompt; Ctrl-C ends it with what was printed."""
    settings = GenerateConfig.from_dict(config)
    if not settings.model:
        raise ConfigError("generate needs model=FOLDER, a folder that 'python -m hybridnas.export' wrote")
    from hybridnas.export.load import load, load_tokenizer
    from hybridnas.export.stream import stream_text

    model = load(settings.model, settings.device)
    tokenizer = load_tokenizer(settings.model)
    prompt = _prompt(settings.prompt or "")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows '?' and goes on
    began = time.perf_counter()
    try:
        model.init_state(1)  # a model that cannot generate says so before anything is printed
        if settings.echo:
            _write(prompt)
        drawn = stream_text(
            model,
            tokenizer,
            prompt,
            _write,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            seed=settings.seed,
            stop_at_end=settings.stop_at_end,
        )
    except KeyboardInterrupt:
        _write("\n")
        return 130
    _write("\n")
    if sys.stderr.isatty():
        seconds = time.perf_counter() - began
        print(f"{drawn} tokens in {seconds:.2f} s, {drawn / seconds:.0f} tokens/s", file=sys.stderr)
    return 0


def _prompt(text: str) -> str:
    """Return the prompt as valid text: from standard input for ``-``, stray bytes as U+FFFD."""
    if text == "-":
        return sys.stdin.buffer.read().decode("utf-8", "replace")
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _write(text: str) -> None:
    sys.stdout.write(text.translate(_HARMLESS) if sys.stdout.isatty() else text)
    sys.stdout.flush()
