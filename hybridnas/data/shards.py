"""Text tokenised once: memory-mapped ids, split by document, found again by content, tokenizer and split.

A folder holds ``train.bin``, ``valid.bin``, ``test.bin`` (unsigned integers of 1, 2 or 4 bytes), for the last two
``NAME.counted.bin`` (one byte a token: whether it is measured), the tokenizer, and ``meta.json``.

Documents that are near copies of one another lie in the same part. What is left of copies, runs of 64 bytes and more
that the training part has, too, is not measured: a model that remembers would look better for it.

A folder is built under another name and published by one rename. What a build that was stopped has found (the split,
the tokenizer, ids written so far) stays in ``NAME.unfinished``, and the next one goes on from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridnas.data.cache import explaining_disk, lock, publish_folder, read_json, remove, temporary
from hybridnas.data.config import DataConfig
from hybridnas.data.copies import CopyFinder, Hashes, near_copies, runs, sketch
from hybridnas.data.files import FileCorpus
from hybridnas.data.progress import reporting
from hybridnas.data.tokenizers import Ids, Tokenizer, find_tokenizer, load_tokenizer, train_bpe
from hybridnas.errors import DataError
from hybridnas.files import write_json
from hybridnas.units import several

FORMAT = 2
BPE_SAMPLE_BYTES = 200_000_000  # of training text that a BPE is trained on: more changes its merges little
CHECKED_BYTES = 1 << 30  # files up to this size are read through at every opening, larger ones measured only
TRAIN, VALID, TEST = range(3)
PARTS = ("train", "valid", "test")
LONG_COPY = 256  # bytes; its share is stated beside that of WINDOW
MOST_COPIED = 0.5  # of a held-out part: more is no leak but what this text is like, and all of it is measured
SAVE_SECONDS = 30.0  # between two notes of how far the ids are written
_SPLIT, _WRITTEN = "split.json", "written.json"  # notes of a build that is not finished
_NOTES = (_SPLIT, _WRITTEN)
_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 1024
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """One part of a corpus: its ids, and the UTF-8 bytes and documents they stand for, separators not counted."""

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    bytes: int
    documents: int
    counted: npt.NDArray[np.bool_] | None = None  # which tokens are measured; None: all
    copied: tuple[float, float] = (0.0, 0.0)  # share of bytes in runs that training has: of 64 and of 256 bytes


@dataclass(frozen=True)
class Shards:
    """A tokenised corpus in three parts: for training, validation and testing."""

    train: Split
    valid: Split
    test: Split
    tokenizer: Tokenizer
    fingerprint: str
    left_out: int = 0  # rows without text that data.skip_bad_rows left out


def open_shards(corpus: FileCorpus, config: DataConfig) -> Shards:
    """Return the corpus tokenised, from the cache or built now; processes that ask at once build it once.

    Raises DataError for a corpus that is empty, has nothing to hold out, or is not text.
    """
    tokenizer = None if config.bpe_vocab else find_tokenizer(config.tokenizer, separator=config.separator)
    ids = tokenizer.fingerprint if tokenizer else f"bpe {config.bpe_vocab}"
    key = [FORMAT, corpus.survey().fingerprint, ids, config.valid_fraction, config.test_fraction, config.split_seed]
    folder = config.cache / "shards" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    shards = load_shards(folder)
    if shards is not None:
        return shards
    with explaining_disk(config.cache), lock(folder) as held:
        shards = load_shards(folder)  # another process may have built it while we waited
        if shards is None:
            if folder.exists():
                _LOG.warning("%s is damaged and is built again", folder)
                remove(folder)
            building = folder.with_name(f"{folder.name}.unfinished") if held else temporary(folder)
            building.mkdir(parents=True, exist_ok=True)
            try:
                _build(building, corpus, config, tokenizer)
            except Exception:  # data or a disk that refuses; a build that was only stopped goes on another time
                remove(building)
                raise
            publish_folder(building, folder)
            shards = load_shards(folder)
    if shards is None:
        raise DataError(f"{folder} cannot be read back after it was written; set data.cache_dir to another disk")
    return shards


def load_shards(folder: Path) -> Shards | None:
    """Return the shards in a folder, or None where they are missing, unfinished or damaged."""
    meta = read_json(folder / "meta.json")
    if meta is None or meta.get("format") != FORMAT or not _files_agree(folder, meta):
        return None
    dtype = np.dtype(meta["dtype"])
    parts = {}
    for name in PARTS:
        stored = meta["splits"][name]
        counted = None
        if stored["masked"]:
            counted = np.asarray(np.memmap(folder / f"{name}.counted.bin", dtype=np.bool_, mode="r"))
        shares = (float(stored["copied"][0]), float(stored["copied"][1]))
        ids = _mapped(folder / f"{name}.bin", dtype)
        parts[name] = Split(ids, int(stored["bytes"]), int(stored["documents"]), counted, shares)
    return Shards(
        parts["train"],
        parts["valid"],
        parts["test"],
        load_tokenizer(folder),
        str(meta["fingerprint"]),
        int(meta.get("left_out", 0)),
    )


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Return a file's numbers without reading them; an empty file cannot be mapped."""
    return np.asarray(np.memmap(path, dtype=dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype)


def _files_agree(folder: Path, meta: dict[str, Any]) -> bool:
    for name, stored in meta["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != stored["size"]:
            return False
        if stored["size"] <= CHECKED_BYTES and _sha256(file) != stored["sha256"]:
            return False
    return True


def _build(folder: Path, corpus: FileCorpus, config: DataConfig, tokenizer: Tokenizer | None) -> None:
    part_of, size = _kept_split(folder, corpus, config)
    if tokenizer is None and (folder / "tokenizer_config.json").is_file():  # the file that is written last
        tokenizer = load_tokenizer(folder)
    elif tokenizer is None:
        assert config.bpe_vocab is not None
        tokenizer = train_bpe(_sample(corpus, part_of, size), config.bpe_vocab)
    tokenizer.save(folder)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    splits = _write_ids(folder, corpus, part_of, size, tokenizer, dtype)
    for name in _NOTES:
        (folder / name).unlink(missing_ok=True)
    names = [f"{name}.bin" for name in PARTS] + [f"{name}.counted.bin" for name in PARTS if splits[name]["masked"]]
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
        for name in (*names, "tokenizer.json", "tokenizer_config.json")
    }
    identity = [*(files[name]["sha256"] for name in names), dtype.str, tokenizer.fingerprint]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    meta = {"format": FORMAT, "corpus": corpus.name, "dtype": dtype.str, "fingerprint": fingerprint}
    if corpus.left_out.count:
        _LOG.warning("%s: left out %s; the first: %s", corpus.name, several(corpus.left_out.count, "row"),
                     corpus.left_out.first)  # fmt: skip
        meta["left_out"] = corpus.left_out.count
    write_json(folder / "meta.json", {**meta, "splits": splits, "files": files})


def _kept_split(folder: Path, corpus: FileCorpus, config: DataConfig) -> tuple[npt.NDArray[np.int8], int]:
    """Return :func:`split_by_document` of the corpus, that of a build that was stopped if there is one."""
    note = read_json(folder / _SPLIT)
    if note is not None:
        return np.frombuffer(bytes.fromhex(note["parts"]), dtype=np.int8), int(note["size"])
    part_of, size = split_by_document(corpus, config)
    write_json(folder / _SPLIT, {"size": size, "parts": part_of.tobytes().hex()})
    return part_of, size


def split_by_document(corpus: FileCorpus, config: DataConfig) -> tuple[npt.NDArray[np.int8], int]:
    """Return for each document its part (TRAIN, VALID or TEST), and the bytes of all.

    Near copies form a group, whose part depends on the text of one of them and the seed alone: more documents move no
    group that they do not join. A group that is larger than a held-out part should be is trained on. Where chance
    leaves a part empty, one of the smaller groups of the fullest part moves there.
    """
    draws, digests, sizes = array("Q"), array("Q"), array("Q")
    sketches: list[Hashes] = []
    seed, size = config.split_seed.to_bytes(16, "little"), 0
    with reporting("splitting", corpus.survey().size) as report:
        for document in corpus.documents():
            draws.append(int.from_bytes(hashlib.sha256(seed + document).digest()[:8], "little"))
            digests.append(int.from_bytes(hashlib.sha256(document).digest()[:8], "little"))
            sketches.append(sketch(document))
            sizes.append(len(document))
            size += len(document)
            report(size)
    if not draws:
        why = f"; of {corpus.left_out.count:,} rows left out the first: {corpus.left_out.first}"
        raise DataError(
            f"{corpus.name} holds no text: {len(corpus.files)} files, all empty or left out"
            f"{why if corpus.left_out.count else ''}",
            field="data.path",
            got=corpus.left_out.count,
        )
    digest, weight = np.frombuffer(digests, dtype=np.uint64), np.frombuffer(sizes, dtype=np.uint64)
    _, equal = np.unique(digest, return_inverse=True)
    needed = 2 if config.test_fraction == 0 else 3
    group = _joined(near_copies(sketches), equal)
    if len(np.unique(group)) < needed:
        group = equal  # every document resembles another: only equal ones are kept together
    if len(np.unique(group)) < needed:
        more = "" if corpus.cut else ", set data.split_files=always to cut long files"
        none = "" if needed == 2 else ", or do without a test part by data.test_fraction=0"
        raise DataError(
            f"{corpus.name} has {len(np.unique(group))} different documents, too few to hold some out for "
            f"validation{'' if needed == 2 else ' and test'}; give more text{more}{none}",
            field="data.path",
            got=len(np.unique(group)),
            allowed=f">= {needed}",
        )
    return _parts_of(group, digest, np.frombuffer(draws, dtype=np.uint64), weight, config), size


def _joined(group: npt.NDArray[np.int64], equal: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the groups with equal documents in one, which short documents without a hash need."""
    first: dict[int, int] = {}
    return np.array([first.setdefault(int(same), int(own)) for own, same in zip(group, equal, strict=True)])


def _parts_of(
    group: npt.NDArray[np.int64],
    digest: npt.NDArray[np.uint64],
    draw: npt.NDArray[np.uint64],
    weight: npt.NDArray[np.uint64],
    config: DataConfig,
) -> npt.NDArray[np.int8]:
    """Return each document's part: that of its group, by the draw of the group's document of the smallest digest."""
    order = np.lexsort((digest, group))
    _, starts, index = np.unique(group[order], return_index=True, return_inverse=True)
    group_draw = draw[order][starts]
    bytes_of = np.bincount(index, weights=weight[order])
    valid = config.valid_fraction
    bounds = [np.uint64(min(int(part * 2**64), 2**64 - 1)) for part in (valid, valid + config.test_fraction)]
    part = np.where(group_draw < bounds[0], VALID, np.where(group_draw < bounds[1], TEST, TRAIN)).astype(np.int8)
    part[bytes_of > max(valid, config.test_fraction) * bytes_of.sum()] = TRAIN
    for wanted in (VALID, TEST, TRAIN) if config.test_fraction else (VALID, TRAIN):
        if not (part == wanted).any():
            giver = np.bincount(part, minlength=len(PARTS)).argmax()  # at least as many groups as parts: it has two
            free = np.flatnonzero(part == giver)
            free = free[np.argsort(bytes_of[free], kind="stable")][: max(1, len(free) // 2)]  # no large one
            part[free[group_draw[free].argmin()]] = wanted
    of_document = np.empty(len(group), dtype=np.int8)
    of_document[order] = part[index]
    return of_document


def _sample(corpus: FileCorpus, part_of: npt.NDArray[np.int8], size: int) -> Iterator[str]:
    """Yield training documents evenly, about ``BPE_SAMPLE_BYTES`` of them."""
    share, owed = min(1.0, BPE_SAMPLE_BYTES / size), 0.0
    with reporting("training the tokenizer", size) as report:
        done = 0
        for document, part in zip(corpus.documents(), part_of, strict=True):
            done += len(document)
            report(done)
            owed += share
            if owed >= 1 and part == TRAIN:
                owed -= 1
                yield document.decode("utf-8", "replace")


def _write_ids(
    folder: Path,
    corpus: FileCorpus,
    part_of: npt.NDArray[np.int8],
    size: int,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
) -> dict[str, dict[str, Any]]:
    """Write the ids of all parts, and which tokens of the held-out ones count; returns what meta.json says of them."""
    finder = CopyFinder(document for document, part in zip(corpus.documents(), part_of, strict=True) if part != TRAIN)
    held_out = array("Q")  # tokens of each document that is held out
    nothing: list[dict[str, Any]] = [{"tokens": 0, "bytes": 0, "documents": 0, "masked": False} for _ in PARTS]
    end: Ids = np.array([tokenizer.separator], dtype=dtype)
    done, first, saved = 0, 0, time.monotonic()
    note = read_json(folder / _WRITTEN) or {"documents": 0, "totals": nothing}
    written, totals = int(note["documents"]), list(note["totals"])
    with contextlib.ExitStack() as files, reporting("tokenising", size) as report:
        handles = [files.enter_context((folder / f"{name}.bin").open("ab")) for name in PARTS]
        if any(
            handle.tell() < counts["tokens"] * dtype.itemsize for handle, counts in zip(handles, totals, strict=True)
        ):
            written, totals = 0, nothing  # a disk lost what was synced: all is written again
        for handle, counts in zip(handles, totals, strict=True):
            handle.truncate(counts["tokens"] * dtype.itemsize)  # what came after the note may be half written
        for documents in _batches(corpus.documents()):
            again = first < written  # of these only what is kept in memory is needed
            needed = [document for index, document in enumerate(documents, start=first)
                      if not again or part_of[index] != TRAIN]  # fmt: skip
            encoded = iter(tokenizer.encode_batch(needed))
            for index, document in enumerate(documents, start=first):
                part = int(part_of[index])
                if part == TRAIN:
                    finder.read(document)
                    if again:
                        continue
                ids = next(encoded)
                if part != TRAIN:
                    held_out.append(len(ids))
                if not again:
                    handles[part].write(ids.astype(dtype, copy=False).tobytes() + end.tobytes())
                    counts = totals[part]
                    counts["tokens"] += len(ids) + 1
                    counts["bytes"] += len(document)
                    counts["documents"] += 1
            first += len(documents)
            done += sum(map(len, documents))
            report(done)
            if not again and time.monotonic() - saved >= SAVE_SECONDS:
                for handle in handles:
                    handle.flush()
                    os.fsync(handle.fileno())
                write_json(folder / _WRITTEN, {"documents": first, "totals": totals})
                saved = time.monotonic()
    ids_of = {part: _mapped(folder / f"{PARTS[part]}.bin", dtype) for part in (VALID, TEST)}
    _measure_copies(folder, corpus, part_of, finder, held_out, ids_of, token_lengths(tokenizer), totals)
    return dict(zip(PARTS, totals, strict=True))


def _measure_copies(
    folder: Path,
    corpus: FileCorpus,
    part_of: npt.NDArray[np.int8],
    finder: CopyFinder,
    counts: Sequence[int],
    ids_of: Mapping[int, npt.NDArray[Any]],
    lengths: npt.NDArray[np.int64] | None,
    totals: list[dict[str, Any]],
) -> None:
    """Put the shares of copied text into ``totals``, and write which held-out tokens count where some do not.

    ``counts``: tokens of each held-out document, in the order of the corpus. One document is looked at at a time.
    """
    copied, long, start = [0] * len(PARTS), [0] * len(PARTS), [0] * len(PARTS)
    names = {part: folder / f"{PARTS[part]}.counted.bin" for part in ids_of}
    with contextlib.ExitStack() as files:
        handles = {part: files.enter_context(name.open("wb")) for part, name in names.items()}
        documents = (own for own in zip(corpus.documents(), part_of.tolist(), strict=True) if own[1] != TRAIN)
        for (document, part), count in zip(documents, counts, strict=True):
            mask = finder.copied(document)
            copied[part] += int(mask.sum())
            long[part] += int(runs(mask, LONG_COPY).sum())
            own = ids_of[part][start[part] : start[part] + count]
            handles[part].write(_counted(own, mask, lengths).tobytes() + b"\1")  # the separator counts
            start[part] += count + 1
    totals[TRAIN]["copied"] = (0.0, 0.0)
    for part, name in names.items():
        n_bytes = max(1, totals[part]["bytes"])
        totals[part]["copied"] = (copied[part] / n_bytes, long[part] / n_bytes)
        totals[part]["masked"] = 0 < copied[part] <= MOST_COPIED * n_bytes
        if not totals[part]["masked"]:
            name.unlink()


def token_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int64] | None:
    """Return the UTF-8 bytes that each id stands for, 0 for the separator; None where that depends on neighbors."""
    table = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    if any(piece is None for piece in table):
        return None
    lengths = np.array([len(piece or b"") for piece in table], dtype=np.int64)
    lengths[tokenizer.separator] = 0
    return lengths


def _counted(
    ids: npt.NDArray[Any], mask: npt.NDArray[np.bool_], lengths: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.bool_]:
    """Return for each token of a document whether it is measured: no byte of it lies in a copy.

    ``mask``: which bytes of the document are copied. Where the bytes of a token are not known, those of the document
    are shared out evenly among its tokens.
    """
    ends = np.linspace(0, len(mask), len(ids) + 1).astype(np.int64)
    if lengths is not None and lengths[ids].sum() == len(mask):
        ends[1:] = np.cumsum(lengths[ids])
    before = np.concatenate(([0], np.cumsum(mask)))
    counted: npt.NDArray[np.bool_] = before[ends[1:]] == before[ends[:-1]]
    return counted


def _batches(documents: Iterator[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
