"""Random numbers of examples, vectorised: each a pure function of its example's key and of its place in the example.

A key is a SplitMix64 stream (Steele, Lea and Flood, 2014), so an example is the same whichever batch it is made in.
Letters: B examples, N numbers of one example.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(value: U64) -> U64:
    """Return 64 bits that depend on all of the 64 given (the finaliser of SplitMix64); ``value`` is overwritten."""
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


def word(*parts: object) -> np.uint64:
    """Return 64 bits that stand for ``parts``, equal on every machine."""
    text = "\x00".join(map(str, parts)).encode("utf-8", "surrogatepass")  # a file's name need not be UTF-8
    return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), dtype="<u8").astype(np.uint64)[0]  # type: ignore[no-any-return]


def keys_of(numbers_B: I64, *about: object) -> U64:
    """Return the keys of the examples number ``numbers_B`` of what ``about`` names."""
    return mix(mix(numbers_B.astype(np.uint64) + word(*about)) ^ word(*about, "key"))


class Draws:
    """The random numbers of a batch of examples, drawn one kind after another."""

    def __init__(self, keys_B: U64) -> None:
        self._keys_B1 = keys_B[:, None]
        self._used = 0

    def __len__(self) -> int:
        return len(self._keys_B1)

    def words(self, count: int) -> U64:
        """Return the next (B, N) words of 64 random bits."""
        steps_N = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64) * _GOLDEN
        self._used += count
        return mix(self._keys_B1 + steps_N)

    def halves(self, count: int) -> npt.NDArray[np.uint32]:
        """Return (B, N) words of 32 random bits."""
        return self.words(-(-count // 2)).astype("<u8", copy=False).view("<u4")[:, :count]

    def below(self, limit: int | I64, count: int) -> I64:
        """Return (B, N) numbers in [0, limit), each equally likely (to 1 in 2^32 / limit)."""
        wide = self.halves(count).astype(np.uint64)
        wide *= np.asarray(limit, dtype=np.uint64)
        wide >>= np.uint64(32)
        return wide.view(np.int64)

    def uniform(self, count: int) -> Floats:
        """Return (B, N) numbers in (0, 1)."""
        numbers_BN: Floats = (self.halves(count).astype(np.float64) + 0.5) * 2.0**-32
        return numbers_BN

    def chance(self, share: float, count: int) -> Bools:
        """Return (B, N) booleans, each true with probability ``share``."""
        lucky_BN: Bools = self.halves(count) < np.uint64(round(share * 2**32))
        return lucky_BN

    def order(self, size: int, count: int | None = None) -> I64:
        """Return (B, N) different numbers in [0, size), in random order: all of them, or the first ``count``."""
        return _ranked(self.words(size))[:, :count]

    def distinct(self, limit: int, count: int) -> I64:
        """Return (B, N) different numbers in [0, limit), in random order, each ordered choice equally likely.

        Where they are few of many, numbers that came twice are drawn again: what is done looks at nothing but whether
        two numbers are equal, so no choice is favoured.
        """
        if 2 * count > limit:
            return self.order(limit, count)
        again = Draws(self.words(1)[:, 0])  # its own stream: how long others search must not move what comes next
        chosen_BN = again.below(limit, count)
        rows = np.arange(len(chosen_BN))
        while True:
            twice = repeats(chosen_BN[rows])
            hit = twice.any(axis=1)
            if not hit.any():
                return chosen_BN
            rows, twice = rows[hit], twice[hit]
            again._keys_B1 = again._keys_B1[hit]
            chosen_BN[rows] = np.where(twice, again.below(limit, count), chosen_BN[rows])

    def weighted(self, weights_N: Floats, count: int) -> I64:
        """Return (B, count) different places of ``weights_N``, drawn one after another in proportion to weight.

        By exponential races (Efraimidis and Spirakis, 2006): the first to arrive is the first drawn.
        """
        arrival_BN = -np.log(self.uniform(len(weights_N))) / weights_N
        # Positive floats are ordered as their bits are, so the last bits can hold the place, and a plain sort does it.
        return _ranked(arrival_BN.view(np.uint64))[:, :count]


def _ranked(values_BN: U64) -> I64:
    """Return the places of each row's numbers from the least to the greatest; ``values`` is overwritten."""
    size = values_BN.shape[1]
    low = np.uint64((1 << max(1, (size - 1).bit_length())) - 1)
    values_BN |= low
    values_BN ^= low
    values_BN |= np.arange(size, dtype=np.uint64)
    values_BN.sort(axis=1)
    values_BN &= low
    return values_BN.view(np.int64)


def repeats(values_BN: I64) -> Bools:
    """Return where a number has come before in its row."""
    shift = max(1, values_BN.shape[1] - 1).bit_length()
    tagged_BN = np.sort((values_BN << shift) | np.arange(values_BN.shape[1]), axis=1)
    same = tagged_BN[:, 1:] >> shift == tagged_BN[:, :-1] >> shift
    found = np.zeros(values_BN.shape, dtype=bool)
    row, place = np.nonzero(same)
    found[row, tagged_BN[row, place + 1] & ((1 << shift) - 1)] = True
    return found
