"""Text tokenised once: memory-mapped ids, split by document, found again by content, tokenizer and split.

A folder holds ``train.bin``, ``valid.bin`` (unsigned integers of 1, 2 or 4 bytes), the tokenizer, and ``meta.json``.
"""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridnas.data.cache import explaining_disk, lock, publish_folder, read_json, remove, temporary
from hybridnas.data.config import DataConfig
from hybridnas.data.files import FileCorpus
from hybridnas.data.progress import reporting
from hybridnas.data.tokenizers import Ids, Tokenizer, find_tokenizer, load_tokenizer, train_bpe
from hybridnas.errors import DataError
from hybridnas.files import write_json

FORMAT = 1
BPE_SAMPLE_BYTES = 200_000_000  # of training text that a BPE is trained on: more changes its merges little
CHECKED_BYTES = 1 << 30  # files up to this size are read through at every opening, larger ones measured only
SPLITS = ("train", "valid")
_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 1024
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """One side of a corpus: its ids, and the UTF-8 bytes and documents they stand for."""

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    bytes: int
    documents: int


@dataclass(frozen=True)
class Shards:
    """A tokenised corpus; ``bytes`` count one for each separator, so that a byte tokenizer has 1 byte per token."""

    train: Split
    valid: Split
    tokenizer: Tokenizer
    fingerprint: str


def open_shards(corpus: FileCorpus, config: DataConfig) -> Shards:
    """Return the corpus tokenised, from the cache or built now; processes that ask at once build it once.

    Raises DataError for a corpus that is empty, has nothing to hold out, or is not text.
    """
    tokenizer = None if config.bpe_vocab else find_tokenizer(config.tokenizer, separator=config.separator)
    ids = tokenizer.fingerprint if tokenizer else f"bpe {config.bpe_vocab}"
    key = [FORMAT, corpus.survey().fingerprint, ids, config.valid_fraction, config.split_seed]
    folder = config.cache / "shards" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    shards = load_shards(folder)
    if shards is not None:
        return shards
    with explaining_disk(config.cache), lock(folder):
        shards = load_shards(folder)  # another process may have built it while we waited
        if shards is None:
            if folder.exists():
                _LOG.warning("%s is damaged and is built again", folder)
                remove(folder)
            building = temporary(folder)
            building.mkdir(parents=True)
            try:
                _build(building, corpus, config, tokenizer)
                publish_folder(building, folder)
            finally:
                remove(building)
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
    sides = {}
    for name in SPLITS:
        counts = meta["splits"][name]
        ids = np.asarray(np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r"))
        sides[name] = Split(ids, int(counts["bytes"]), int(counts["documents"]))
    return Shards(sides["train"], sides["valid"], load_tokenizer(folder), str(meta["fingerprint"]))


def _files_agree(folder: Path, meta: dict[str, Any]) -> bool:
    for name, stored in meta["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != stored["size"]:
            return False
        if stored["size"] <= CHECKED_BYTES and _sha256(file) != stored["sha256"]:
            return False
    return True


def _build(folder: Path, corpus: FileCorpus, config: DataConfig, tokenizer: Tokenizer | None) -> None:
    held_out, size = split_by_document(corpus, config)
    if tokenizer is None:
        assert config.bpe_vocab is not None
        tokenizer = train_bpe(_sample(corpus, held_out, size), config.bpe_vocab)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    splits = _write_ids(folder, corpus, held_out, size, tokenizer, dtype)
    tokenizer.save(folder)
    names = (*(f"{name}.bin" for name in SPLITS), "tokenizer.json", "tokenizer_config.json")
    files = {name: {"size": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in names}
    identity = [files["train.bin"]["sha256"], files["valid.bin"]["sha256"], dtype.str, tokenizer.fingerprint]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    meta = {"format": FORMAT, "corpus": corpus.name, "dtype": dtype.str, "fingerprint": fingerprint}
    write_json(folder / "meta.json", {**meta, "splits": splits, "files": files})


def split_by_document(corpus: FileCorpus, config: DataConfig) -> tuple[npt.NDArray[np.bool_], int]:
    """Return for each document whether it is held out, and the bytes of all.

    A document's side depends on its text and the seed alone: a copy of it lies on the same side, and more documents
    move none. Where chance holds out none, or all, the one nearest to the border changes sides.
    """
    draws, size = array("Q"), 0
    seed = config.split_seed.to_bytes(16, "little")
    with reporting("splitting", corpus.survey().size) as report:
        for document in corpus.documents():
            draws.append(int.from_bytes(hashlib.sha256(seed + document).digest()[:8], "little"))
            size += len(document)
            report(size)
    if not draws:
        raise DataError(f"{corpus.name} holds no text: {len(corpus.files)} files, all empty or left out")
    draw = np.frombuffer(draws, dtype=np.uint64)
    held_out = draw < np.uint64(int(config.valid_fraction * 2**64))
    if not held_out.any():
        held_out = draw == draw.min()
    elif held_out.all():
        held_out = draw < draw.max()
    if held_out.all() or not held_out.any():
        more = "" if corpus.cut else ", or set data.split_files=always to cut long files"
        raise DataError(
            f"{corpus.name} has only one document (or copies of it), so none can be held out for validation; "
            f"give more text{more}"
        )
    return held_out, size


def _sample(corpus: FileCorpus, held_out: npt.NDArray[np.bool_], size: int) -> Iterator[str]:
    """Yield training documents evenly, about ``BPE_SAMPLE_BYTES`` of them."""
    share, owed = min(1.0, BPE_SAMPLE_BYTES / size), 0.0
    with reporting("training the tokenizer", size) as report:
        done = 0
        for document, is_held_out in zip(corpus.documents(), held_out, strict=True):
            done += len(document)
            report(done)
            owed += share
            if owed >= 1 and not is_held_out:
                owed -= 1
                yield document.decode("utf-8", "replace")


def _write_ids(
    folder: Path,
    corpus: FileCorpus,
    held_out: npt.NDArray[np.bool_],
    size: int,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
) -> dict[str, dict[str, int]]:
    totals = {name: {"tokens": 0, "bytes": 0, "documents": 0} for name in SPLITS}
    end: Ids = np.array([tokenizer.separator], dtype=dtype)
    done, first = 0, 0
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "valid.bin").open("wb") as valid,
        reporting("tokenising", size) as report,
    ):
        for documents in _batches(corpus.documents()):
            encoded = tokenizer.encode_batch(documents)
            for index, (document, ids) in enumerate(zip(documents, encoded, strict=True), start=first):
                name, handle = ("valid", valid) if held_out[index] else ("train", train)
                handle.write(ids.astype(dtype, copy=False).tobytes() + end.tobytes())
                counts = totals[name]
                counts["tokens"] += len(ids) + 1
                counts["bytes"] += len(document) + 1
                counts["documents"] += 1
                done += len(document)
            first += len(documents)
            report(done)
    return totals


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
