"""Windows of text: which tokens step ``step`` reads is computed, never remembered, so a position is just a number.

In each epoch windows of ``seq_len`` tokens tile the training ids, taken as a ring from a random start, in a random
order: every token is read at most once an epoch, and all but fewer than ``seq_len`` of them are.

With ``pack='documents'`` the same windows say which document each token is of. A document ends with its separator, so
the separators in a window are all that is needed. What follows one, another document's first token, is not a target.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hybridnas.data.config import DataConfig
from hybridnas.data.copies import WINDOW
from hybridnas.data.files import FileCorpus
from hybridnas.data.shards import LONG_COPY, PARTS, Shards, Split, open_shards, token_lengths
from hybridnas.data.source import Batch, Source
from hybridnas.data.tokenizers import Tokenizer
from hybridnas.errors import DataError
from hybridnas.units import several

if TYPE_CHECKING:
    from torch import Tensor

    from hybridnas.data.details import Details

FEW = 5  # documents of the test part; with fewer, what they say of a difference is said to be little
_ROUNDS = 6
_SORTED = 1024  # so few windows are shuffled by sorting: Feistel rounds on few bits walk long

U64 = npt.NDArray[np.uint64]


class TextSource(Source):
    """A tokenised corpus as training and validation batches."""

    def __init__(self, shards: Shards, *, name: str, corpus: FileCorpus, pack: str | None = None) -> None:
        self._shards = shards
        self._name = name
        self._corpus = corpus
        self._pack = pack
        self._lengths = token_lengths(shards.tokenizer)

    @property
    def vocab_size(self) -> int:
        return self._shards.tokenizer.vocab_size

    @property
    def fingerprint(self) -> str:
        if self._pack is None:
            return self._shards.fingerprint
        return hashlib.sha256(f"{self._shards.fingerprint} {self._pack}".encode()).hexdigest()

    @property
    def token_lengths(self) -> npt.NDArray[np.int64] | None:
        return self._lengths

    @property
    def train_tokens(self) -> int:
        return len(self._shards.train.tokens)

    @property
    def valid_tokens(self) -> int:
        return len(self._shards.valid.tokens)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._shards.tokenizer

    @property
    def test_tokens(self) -> int:
        return len(self._shards.test.tokens)

    def describe(self) -> str:
        train, valid, test = self._shards.train, self._shards.valid, self._shards.test
        n_tokens = sum(len(part.tokens) - part.documents for part in (train, valid, test))
        per_token = sum(part.bytes for part in (train, valid, test)) / max(1, n_tokens)
        reported = f"{_counts(test)} for testing{_copies(test)}" if test.documents else "none for testing"
        few = "; so few documents for testing say little of differences" if 0 < test.documents < FEW else ""
        apart = "" if self._pack is None else "; documents in a window do not see each other"
        return (
            f"{self._name}: {_counts(train)} to train on ({len(train.tokens):,} tokens); "
            f"{_counts(valid)} for validation{_copies(valid)}; {reported}; tokenizer {self.tokenizer.kind}, "
            f"{self.vocab_size:,} tokens, {per_token:.2f} bytes per token{apart}{few}"
        )

    def details(self, samples: int, seed: int) -> Details:
        from hybridnas.data.details import text_details

        found = text_details(self._corpus, samples, seed)
        parts = dict(zip(PARTS, (self._shards.train, self._shards.valid, self._shards.test), strict=True))
        tokens = {"tokens": sum(len(part.tokens) for part in parts.values()), "tokenizer": self.tokenizer.kind}
        return dataclasses.replace(
            found,
            figures={**found.figures, **tokens, "different ids": self.vocab_size},
            parts={name: _part_figures(part) for name, part in parts.items() if part.documents},
        )

    def train_batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        self._require(seq_len)
        starts = window_starts(np.arange(batch_size) + step * batch_size, self.train_tokens, seq_len, seed)
        return self._packed(_gather(self._shards.train.tokens, starts, seq_len))

    def valid_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        self._require(seq_len)
        return map(self._packed, _spread(self._shards.valid, n_tokens, batch_size, seq_len))

    def test_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        self._require(seq_len)
        if not self.test_tokens:
            raise DataError(f"{self._name} has no test part, since data.test_fraction=0; set it above 0")
        return map(self._packed, _spread(self._shards.test, n_tokens, batch_size, seq_len, ends=self._test_ends))

    def _packed(self, batch: Batch) -> Batch:
        """Return the batch with the document of each input, its targets within documents alone, where that is asked."""
        if self._pack is None:
            return batch
        last_BL = batch.inputs_BL == self.tokenizer.separator
        mask_BL = ~last_BL if batch.mask_BL is None else batch.mask_BL & ~last_BL
        return batch._replace(segments_BL=last_BL.cumsum(dim=1) - last_BL.long(), mask_BL=mask_BL)

    @cached_property
    def _test_ends(self) -> npt.NDArray[np.int64]:
        """Places of the separators in the test part: where each document ends."""
        return np.flatnonzero(self._shards.test.tokens == self.tokenizer.separator)

    def _require(self, seq_len: int) -> None:
        parts = {"train on": self.train_tokens, "validate on": self.valid_tokens, "test on": self.test_tokens}
        if not self.test_tokens:
            del parts["test on"]
        for use, tokens in parts.items():
            if tokens <= seq_len:
                larger = {"validate on": "valid", "test on": "test"}
                help_ = f", a larger data.{larger[use]}_fraction" if use in larger else ""
                raise DataError(
                    f"{self._name} has {tokens:,} tokens to {use}, fewer than one window of seq_len={seq_len} and "
                    f"the token after it; give more text{help_} or a shorter seq_len (at most {tokens - 1:,})"
                )


def _part_figures(part: Split) -> dict[str, Any]:
    short, long = part.copied
    return {
        "documents": part.documents,
        "bytes": part.bytes,
        "tokens": len(part.tokens),
        f"copied from train, runs of {WINDOW} bytes": short,
        f"copied from train, runs of {LONG_COPY} bytes": long,
    }


def _counts(part: Split) -> str:
    return f"{several(part.documents, 'document')}, {part.bytes:,} bytes"


def _copies(part: Split) -> str:
    """Return words on the copies of training text in a part, for ``describe``."""
    short, long = part.copied
    if not short:
        return ""
    kept = (
        "left out of losses" if part.counted is not None else "measured all the same, since most of the text is alike"
    )
    found = (
        f"{100 * short:.1f} % of it copied from training in runs of {WINDOW} bytes, {100 * long:.1f} % of {LONG_COPY}"
    )
    return f" ({found}; {kept})"


def _spread(
    part: Split, n_tokens: int, batch_size: int, seq_len: int, *, ends: npt.NDArray[np.int64] | None = None
) -> Iterator[Batch]:
    """Yield the same windows of a part at every call, evenly spread over it, none twice.

    ``ends``: where each document ends; the batches then say which document each target is of.
    """
    existing = (len(part.tokens) - 1) // seq_len
    wanted = min(existing, max(1, -(-n_tokens // seq_len)))
    starts = (2 * np.arange(wanted) + 1) * existing // (2 * wanted) * seq_len
    pieces = (starts[first : first + batch_size] for first in range(0, wanted, batch_size))
    for piece in pieces:
        batch = _gather(part.tokens, piece, seq_len, part.counted)
        yield batch if ends is None else batch._replace(documents_BL=_documents(ends, piece, seq_len))


def _documents(ends: npt.NDArray[np.int64], starts_B: npt.NDArray[np.int64], seq_len: int) -> Tensor:
    """Return the document of each target, int64 (B, L); a separator is of the document that it ends."""
    import torch

    places_BL = starts_B[:, None] + 1 + np.arange(seq_len)
    return torch.from_numpy(np.searchsorted(ends, places_BL).astype(np.int64))


def open_text(corpus: FileCorpus, config: DataConfig) -> TextSource:
    """Return a corpus as a source, tokenised once for all."""
    shards = open_shards(corpus, config)
    without = f" (without {several(shards.left_out, 'row')} that could not be read)" if shards.left_out else ""
    return TextSource(shards, name=corpus.describe() + without, corpus=corpus, pack=config.pack)


def window_starts(sample_B: npt.NDArray[np.int64], n_tokens: int, seq_len: int, seed: int) -> npt.NDArray[np.int64]:
    """Return where in a ring of ``n_tokens`` the windows number ``sample_B`` (counted from 0, over epochs) start."""
    per_epoch = n_tokens // seq_len
    epoch_B = sample_B // per_epoch
    starts_B = np.empty_like(sample_B)
    for epoch in np.unique(epoch_B):
        keys, offset = epoch_keys(seed, int(epoch), seq_len)
        rows = epoch_B == epoch
        place = permute((sample_B[rows] % per_epoch).astype(np.uint64), per_epoch, keys)
        starts_B[rows] = (place.astype(np.int64) * seq_len + offset % n_tokens) % n_tokens
    return starts_B


def permute(index: U64, size: int, keys: U64) -> U64:
    """Return the places of ``index`` under the permutation of range(size) that ``keys`` stand for.

    A Feistel network on the next even number of bits, walked until it falls inside (Black and Rogaway, 2002): no
    table, whatever the size, and no dependence on a library's shuffling. Small ranges are sorted by keyed hashes.
    """
    if size <= _SORTED:
        order = np.argsort(_mix(_mix(np.arange(size, dtype=np.uint64) + keys[0]) ^ keys[1]))
        return order[index].astype(np.uint64)
    half = ((size - 1).bit_length() + 1) // 2
    place = _feistel(index, half, keys)
    while (outside := place >= np.uint64(size)).any():
        place[outside] = _feistel(place[outside], half, keys)
    return place


def _feistel(value: U64, half: int, keys: U64) -> U64:
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low)
    joined: U64 = (left << shift) | right
    return joined


def _mix(value: U64) -> U64:
    """Return 64 bits that depend on all of the 64 given (the finaliser of SplitMix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: U64 = value ^ (value >> np.uint64(31))
    return mixed


def epoch_keys(seed: int, epoch: int, seq_len: int) -> tuple[U64, int]:
    """Return the keys of an epoch's order for :func:`permute`, and 64 bits for where its windows start."""
    digest = hashlib.blake2b(f"{seed} {epoch} {seq_len}".encode(), digest_size=8 * (_ROUNDS + 1)).digest()
    words = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    return words[:_ROUNDS], int(words[_ROUNDS])


def _gather(
    tokens: npt.NDArray[Any],
    starts_B: npt.NDArray[np.int64],
    seq_len: int,
    counted: npt.NDArray[np.bool_] | None = None,
) -> Batch:
    import torch

    inputs_BL = np.empty((len(starts_B), seq_len), dtype=np.int64)
    targets_BL = np.empty_like(inputs_BL)
    mask_BL = None if counted is None else np.empty(inputs_BL.shape, dtype=np.bool_)
    for row, start in enumerate(starts_B.tolist()):
        piece = tokens[start : start + seq_len + 1]
        if len(piece) <= seq_len:  # over the ring's end
            piece = np.concatenate((piece, tokens[: seq_len + 1 - len(piece)]))
        inputs_BL[row], targets_BL[row] = piece[:-1], piece[1:]
        if counted is not None and mask_BL is not None:
            mask_BL[row] = counted[start + 1 : start + seq_len + 1]
    mask = None if mask_BL is None else torch.from_numpy(mask_BL)
    return Batch(torch.from_numpy(inputs_BL), torch.from_numpy(targets_BL), mask)
