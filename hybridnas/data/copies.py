"""Copies within a corpus: documents that share most of their text, and runs of bytes that two parts have in common.

Both come from one pass of hashes of all windows of ``WINDOW`` bytes. A document's sketch holds the smallest of its
hashes (bottom-k sampling, Broder 1997: the share of a sketch that two documents have in common estimates the overlap
of their texts). MinHash libraries hash every shingle with many functions in Python; here one hash per byte in NumPy
serves both uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

WINDOW = 64  # bytes that have to agree for a copy to count
SKETCH = 64  # hashes that a document is represented by
NEAR = 0.5  # overlap of two sketches from which documents count as near copies
_COMMON = 64  # a window in more documents than this is boilerplate (a licence) and says nothing about two of them
_MOST = 1 << 23  # windows of held-out text that are looked for; of more, one in 2, 4, 8 ... is, chosen by its hash
_GAP = 4 * WINDOW  # bytes between two such windows that count as copied when both are
_SPARSE = 16  # places of the filter for each window: one in so many windows without a copy passes it

Hashes = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]


def window_hashes(text: bytes | Bytes, width: int = WINDOW) -> Hashes:
    """Return a 64-bit hash of every window of ``width`` bytes (a power of two), none for a shorter text."""
    hashes: Hashes = np.frombuffer(text, dtype=np.uint8).astype(np.uint64) + np.uint64(1)
    hashes = hashes * np.uint64(0xBF58476D1CE4E5B9)
    factor, done = 0x9E3779B97F4A7C15, 1
    while done < width and len(hashes):
        hashes = hashes[:-done] * np.uint64(factor) + hashes[done:] if len(hashes) > done else hashes[:0]
        factor, done = factor * factor % 2**64, 2 * done
    hashes ^= hashes >> np.uint64(29)  # the low bits of a polynomial depend on few bytes
    hashes *= np.uint64(0x94D049BB133111EB)
    hashes ^= hashes >> np.uint64(32)
    return hashes


def sketch(text: bytes) -> Hashes:
    """Return the ``SKETCH`` smallest different hashes of a document, fewer where it is short."""
    hashes = window_hashes(text)
    if len(hashes) > 8 * SKETCH:  # the smallest of many are found among those below a bound that leaves enough
        few = hashes[hashes < np.uint64(2**64 * 4 * SKETCH // len(hashes))]
        hashes = few if len(few) >= 2 * SKETCH else hashes
    least: Hashes = np.unique(hashes)[:SKETCH]
    return least


def near_copies(sketches: Sequence[Hashes]) -> npt.NDArray[np.int64]:
    """Return a group for each document: documents whose sketches overlap by ``NEAR`` or more have one, and so on.

    A group is named by the smallest number of its documents.
    """
    parent = np.arange(len(sketches), dtype=np.int64)

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = int(parent[number])
        return number

    for first, second, shared in _shared_windows(sketches):
        overlap = shared / min(len(sketches[first]), len(sketches[second]))
        if overlap >= NEAR and (one := root(first)) != (other := root(second)):
            parent[max(one, other)] = min(one, other)
    return np.array([root(number) for number in range(len(sketches))], dtype=np.int64)


def _shared_windows(sketches: Sequence[Hashes]) -> Iterator[tuple[int, int, int]]:
    """Yield (document, document, hashes in common) for pairs that share any that is not in very many documents."""
    sizes = [len(one) for one in sketches]
    if not sum(sizes):
        return
    hashes = np.concatenate(list(sketches))
    owners = np.repeat(np.arange(len(sketches)), sizes)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    starts = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1])))
    lengths = np.diff(np.concatenate((starts, [len(hashes)])))
    counts: dict[tuple[int, int], int] = {}
    for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        members = owners[start : start + length].tolist()
        if length > _COMMON:
            members = members[:2]  # equal documents are joined by the caller, so most pairs are found anyway
        for place, second in enumerate(members):
            for first in members[:place]:
                counts[first, second] = counts.get((first, second), 0) + 1
    for (first, second), shared in counts.items():
        yield first, second, shared


class CopyFinder:
    """Windows of the held-out documents, against which the training documents are then read.

    Of held-out text with more than ``most`` windows a part of them is kept, those whose hash ends in zeros, so that
    memory stays below about 400 MB: a copy of 256 bytes or more is still found, of shorter ones a part.
    """

    def __init__(self, held_out: Iterable[bytes], width: int = WINDOW, most: int = _MOST) -> None:
        self.width = width
        self._ending = np.uint64(0)  # bits of a hash that are zero in those looked for
        kept, count = [np.zeros(0, np.uint64)], 0
        for document in held_out:
            kept.append(self._sampled(window_hashes(document, width)))
            count += len(kept[-1])
            while count > most:
                self._ending = self._ending * np.uint64(2) + np.uint64(1)
                kept = [self._sampled(np.concatenate(kept))]
                count = len(kept[0])
        self._hashes: Hashes = np.sort(np.concatenate(kept))  # some twice
        self._seen = np.zeros(len(self._hashes), dtype=bool)
        bits = min(max(10, (_SPARSE * len(self._hashes)).bit_length()), 32)
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, dtype=bool)
        self._filter[self._hashes >> self._shift] = True

    def _sampled(self, hashes: Hashes) -> Hashes:
        return hashes[hashes & self._ending == 0] if self._ending else hashes

    def read(self, document: bytes) -> None:
        """Note which windows a training document has, too."""
        hashes = self._sampled(window_hashes(document, self.width))
        hashes = hashes[self._filter[hashes >> self._shift]]
        places = np.searchsorted(self._hashes, hashes)
        inside = places < len(self._hashes)
        hashes, places = hashes[inside], places[inside]
        self._seen[places[self._hashes[places] == hashes]] = True

    def copied(self, document: bytes) -> npt.NDArray[np.bool_]:
        """Return for each byte of a held-out document whether it lies in a window that training has, too."""
        hashes = window_hashes(document, self.width)
        places = np.flatnonzero(hashes & self._ending == 0)
        hits = self._seen[np.searchsorted(self._hashes, hashes[places])]
        edges = np.zeros(len(document) + 1, dtype=np.int64)
        np.add.at(edges, places[hits], 1)
        np.add.at(edges, places[hits] + self.width, -1)
        if self._ending:  # windows between two neighbors that are copied were not looked for
            both = hits[:-1] & hits[1:] & (np.diff(places) <= _GAP)
            np.add.at(edges, places[:-1][both], 1)
            np.add.at(edges, places[1:][both], -1)
        copied: npt.NDArray[np.bool_] = np.cumsum(edges)[:-1] > 0
        return copied


def runs(copied: npt.NDArray[np.bool_], length: int) -> npt.NDArray[np.bool_]:
    """Return which of the marked bytes lie in a run of at least ``length`` of them."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], copied, [False])).astype(np.int8)))
    long = np.zeros(len(copied), dtype=np.bool_)
    for start, stop in edges.reshape(-1, 2):
        if stop - start >= length:
            long[start:stop] = True
    return long
