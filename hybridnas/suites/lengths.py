"""Accuracy of a trained model at lengths beyond its training, in constant memory: chunk by chunk over the state.

Shapes: B batch, L length, l tokens of one chunk, V vocabulary.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridnas.errors import ConfigError, DataError
from hybridnas.suites.results import LengthRow
from hybridnas.units import human_bytes

if TYPE_CHECKING:
    import torch

    from hybridnas.arch.model import HybridLM
    from hybridnas.data.source import Batch

TOKENS_PER_LENGTH = 1 << 22  # read at one length, unless that is fewer than LEAST or more than MOST examples
LEAST, MOST = 8, 512  # examples
CHUNK_TOKENS = 1 << 15  # of all sequences of a batch together: what is held at a time
PATIENCE = 300.0  # seconds that one length may take; what would take longer is reported, not run
_IDS = 1 << 20  # ids that exist at a time: beside the state, the text itself is all that grows with the length
_MASK = 1 << 26  # places of attention's mask, a chunk's queries times all keys, that exist at a time
_CACHE_COPIES = 3  # keys and values as they were, as they become, and one layer's mask and scores


def at_lengths(
    model: HybridLM,
    data: dict[str, Any] | Any,
    lengths: Sequence[int],
    *,
    device: str = "auto",
    name: str = "",
    seed: int = 0,
    examples: int | None = None,
    memory: int | None = None,
    patience: float = PATIENCE,
) -> Iterator[LengthRow]:
    """Yield accuracy on the data's test examples at each length, shortest first, as each is measured.

    ``data``: fields of a SourceConfig; its seq_len is set to the length where it has one. ``examples``: how many;
    none: as many as make 2^22 tokens, 8 to 512. ``memory``: bytes that the state may take; none: what the machine
    has free. A length that does not fit, or would take longer than ``patience`` seconds by the speed at the one before,
    has no accuracy and words that say so. Raises ConfigError for lengths below 1.
    """
    from hybridnas.hardware import pick_device

    if not lengths or min(lengths) < 1:
        raise ConfigError(f"lengths={list(lengths)} must be whole numbers of at least 1, such as lengths=[64,1024]")
    where = pick_device(device)
    model = model.to(where)
    kept: LengthRow | None = None
    for length in sorted(lengths):
        count = examples or min(MOST, max(LEAST, TOKENS_PER_LENGTH // length))
        state = model.arch.cost(length).state_bytes
        about: dict[str, Any] = {"model": name, "task": "", "seed": seed, "length": length, "state_bytes": state}
        words = _no_room(state, memory if memory is not None else free_memory(where))
        words = words or _too_long(model, kept, length, count, patience)
        if words:
            yield LengthRow(**about, accuracy=None, words=words)
            continue
        began = time.perf_counter()
        right, places, read = _accuracy(model, data, length, count, where, state, memory)
        kept = LengthRow(
            **about,
            accuracy=right / places,
            examples=read,
            peak_bytes=peak_memory(where),
            seconds=time.perf_counter() - began,
        )
        yield kept


def _accuracy(
    model: HybridLM, data: Any, length: int, count: int, device: torch.device, state: int, memory: int | None
) -> tuple[int, int, int]:
    """Return places predicted rightly, places scored, and examples read."""
    from hybridnas.data import check_vocab, open_source, source_config

    config = source_config(data)
    names = config.field_names()
    own = {"seq_len": length, "n_test_examples": count}
    source = open_source(config.replace(**{key: value for key, value in own.items() if key in names}))
    check_vocab(source.vocab_size, model.arch.vocab_size)
    free = memory if memory is not None else free_memory(device)
    fits = max(1, free // max(1, _CACHE_COPIES * state)) if grows(model) else count
    batch_size = max(1, min(count, fits, _IDS // length, CHUNK_TOKENS // 256))
    right = places = read = 0
    for batch in source.valid_batches(count * length, batch_size, length):
        found, scored = _score(model, batch, device)
        right, places, read = right + found, places + scored, read + len(batch.inputs_BL)
        if read >= count:
            break
    if places == 0:
        raise DataError(f"{source.describe()}: no place to score at length {length}")
    return right, places, read


def _score(model: HybridLM, batch: Batch, device: torch.device) -> tuple[int, int]:
    import torch

    from hybridnas.arch.long import prefill

    ids_BL, targets_BL, mask_BL = batch.inputs_BL, batch.targets_BL, batch.mask_BL
    if batch.head is not None:
        raise DataError("lengths= reads predictions from every place; this task takes them from the last one alone")
    size = CHUNK_TOKENS // ids_BL.shape[0]
    size = max(1, min(size, _MASK // ids_BL.shape[1]) if grows(model) else size)
    right = start = 0
    pieces = (piece.to(device) for piece in torch.split(ids_BL, size, dim=1))
    for logits_BlV, _ in prefill(model, pieces):
        stop = start + logits_BlV.shape[1]
        hits_Bl = logits_BlV.argmax(dim=-1).cpu() == targets_BL[:, start:stop]
        right += int((hits_Bl if mask_BL is None else hits_Bl & mask_BL[:, start:stop]).sum())
        start = stop
    return right, int(targets_BL.numel() if mask_BL is None else mask_BL.sum())


def grows(model: HybridLM) -> bool:
    """Whether the state grows with what is read: a model with attention."""
    return bool(model.arch.cost(2).state_bytes != model.arch.cost(1).state_bytes)


def _no_room(state: int, free: int) -> str:
    need = _CACHE_COPIES * state
    if need <= free:
        return ""
    return f"out of memory: a state of {human_bytes(state)} needs {human_bytes(need)}, {human_bytes(free)} are free"


def _too_long(model: HybridLM, before: LengthRow | None, length: int, count: int, patience: float) -> str:
    """Say when a length would take too long: by example, time grows with length, with attention as its square."""
    if before is None or not before.examples:
        return ""
    power = 2.0 if grows(model) and length > 4096 else 1.0
    seconds = before.seconds / before.examples * count * (length / before.length) ** power
    if seconds <= patience:
        return ""
    return f"not run: about {math.ceil(seconds / 60)} min by the speed at {before.length:,}, allowed {patience / 60:g}"


def free_memory(device: torch.device) -> int:
    """Return bytes that can be had now: of the GPU, or of the machine and the container that this runs in."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(1024 * int(line.split()[1]))
    except OSError:  # no Linux: half of what is built in
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        found += [int(limit) - used] if limit != "max" else []
    except (OSError, ValueError):
        pass
    return min(found)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far, on the device that computes."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(held if sys.platform == "darwin" else 1024 * held)
