"""One pass over a million tokens by ``last_logits``, chunk by chunk, in a fresh process: seconds and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hybridnas.bench import child
from hybridnas.bench.context import BenchConfig
from hybridnas.bench.method import Spread, ratios
from hybridnas.bench.result import Result, Table

_CHUNK = 4096  # tokens of one call
# Memory is what the pass needs: left alone, glibc keeps freed blocks as they happen to lie, 13 to 28 MiB in runs of one
# length. Given back at once they cost time, so time has its own runs.
_RETURNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
_CONSTANT = 1.1  # the longer pass may hold so much more and still count as constant


def work(layers: int, d_model: int, tokens: int, chunk: int) -> Callable[[], float]:
    """Build a Mamba and warm it up; returns the pass, which returns the mean of the logits after the last token."""
    import torch

    from hybridnas.arch.arch import Arch
    from hybridnas.arch.long import last_logits
    from hybridnas.arch.model import HybridLM

    model = HybridLM(Arch.from_pattern(f"(M)x{layers}", d_model=d_model, vocab_size=256)).eval()
    generator = torch.Generator().manual_seed(0)

    def text(tokens: int) -> Iterator[torch.Tensor]:
        for start in range(0, tokens, chunk):  # drawn as it is read: it is no part of the memory
            yield torch.randint(0, 256, (1, min(chunk, tokens - start)), generator=generator)

    def one_pass(tokens: int) -> float:
        return float(last_logits(model, text(tokens), chunk_tokens=chunk).mean())

    one_pass(2)  # compiles; the memory of a chunk is still to come
    return lambda: one_pass(tokens)


def run(config: BenchConfig) -> Result:
    """Measure 2^16 and 2^20 tokens; memory and time per token of the second are held against the first."""
    result = Result("long")
    layers, width, chunk = (1, 16, 32) if config.tiny else (2, 64, _CHUNK)
    lengths = (64, 256) if config.tiny else (2**16, 2**20)
    peaks: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    speeds: dict[int, list[float]] = {tokens: [] for tokens in lengths}
    rows, why = [], ""
    for _ in range(config.pick(3, 1, 1)):
        for tokens in lengths:
            arguments = {"layers": layers, "d_model": width, "tokens": tokens, "chunk": chunk}
            for variables, what in ((None, "time"), (_RETURNED, "memory")):
                one = child.measured(
                    "hybridnas.bench.suites.long:work", arguments, threads=config.threads, variables=variables
                )
                rows.append([tokens, what, one.seconds, _mib(one.extra_bytes), _mib(one.rss_bytes), one.failed])
                why = why or one.failed
                if one.seconds is not None and what == "time":
                    speeds[tokens].append(one.seconds / tokens)
                if one.extra_bytes and what == "memory":
                    peaks[tokens].append(float(one.extra_bytes))
    columns = ("tokens", "run for", "seconds", "peak beyond the loaded model [MiB]", "peak of all [MiB]", "note")
    title = f"long: one pass, {layers} Mamba layers, d {width}, {chunk} tokens a call"
    result.tables.append(Table(title, columns, rows))
    what = f"one pass over {lengths[1]:,} tokens, {layers}-layer Mamba d {width}"
    for found, unit in ((peaks, "peak memory"), (speeds, "time per token")):
        pairs = ratios(found[lengths[1]], found[lengths[0]])
        spread = Spread.of(pairs) if pairs else None
        against = f"{unit} over {lengths[0]:,} tokens"
        result.hold("at most", _CONSTANT, spread, what=f"{unit} of {what}", against=against, note=why)
    return result


def _mib(value: int | None) -> float | None:
    return None if value is None else value / 2**20
