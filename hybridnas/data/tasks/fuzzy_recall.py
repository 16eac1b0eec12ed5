"""``data=fuzzy_recall``: in-context recall whose keys and values are several tokens long (MAD, arXiv 2403.17844).

A key is 1 to ``k_motif_size`` different tokens from [0, n/2), a value 1 to ``v_motif_size`` different ones from
[n/2, n), n the vocabulary without noise and special ids; a key has one value throughout an example. In the test every
key has the full ``k_motif_size``. The last pair repeats one that came before, chosen evenly. Scored (multi_query=true):
all tokens of the value of every key that has come before; else those of the last value alone, announced by id V-1.
Examples are filled up to ``seq_len`` on the left with a padding id, the highest, or the one before with that marker.

The paper's sizes: 16 ids, 128 tokens, motifs of 3, 12,800 examples to train on; one at a time vocab_size 32, 64, 128,
seq_len 256, 512, 1024, n_train_examples 6400, 3200, 1600, 800. ``train_on`` as in ``in_context_recall``. mad-lab draws
the last key first and puts its pair at an even place; here it is drawn from the pairs that are there, and padding
leaves space for the longest last pair rather than for the one drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import I64, U64, Bools, Draws, mix, repeats
from hybridnas.data.task import Examples, Task, TaskConfig, next_tokens, register_task


@dataclass(frozen=True, kw_only=True)
class FuzzyRecallConfig(TaskConfig):
    """Settings of fuzzy in-context recall."""

    kind: str = option("fuzzy_recall", "kind of data, a name in SOURCES")
    vocab_size: int = option(16, "different ids: keys, values, noise, special ones [count]", ge=2)
    seq_len: int = option(128, "length of an example [tokens]", ge=8)
    k_motif_size: int = option(3, "most tokens of a key; in the test all have so many [count]", ge=1, le=4)
    v_motif_size: int = option(3, "most tokens of a value [count]", ge=1, le=4)
    multi_query: bool = option(True, "score every key that comes again; no: only the last one [yes/no]")
    noise_vocab_size: int = option(0, "ids of noise [count]", ge=0)
    frac_noise: float = option(0.0, "share of the pairs that are noise instead [0 to 1]", ge=0, le=1)
    train_on: str = option(
        "all", "what the training loss counts: all next tokens, as mad-lab does, or what is scored",
        choices=("all", "scored"),
    )  # fmt: skip
    n_train_examples: int | None = option(12_800, "examples of the training set; none: fresh ones", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = self.k_motif_size + self.v_motif_size
        self.require(
            self.seq_len > 2 * longest,
            f"k_motif_size={self.k_motif_size} and v_motif_size={self.v_motif_size} need seq_len >= {2 * longest + 1}, "
            f"got {self.seq_len}",
        )
        self.require(
            self.frac_noise == 0 or self.noise_vocab_size > 0,
            f"frac_noise={self.frac_noise} needs noise ids: noise_vocab_size >= 1",
        )
        keys = self.plain_ids // 2
        self.require(
            keys >= self.k_motif_size and self.plain_ids - keys >= self.v_motif_size,
            f"vocab_size={self.vocab_size} leaves {max(0, keys)} tokens for keys and {max(0, self.plain_ids - keys)} "
            f"for values, fewer than a motif of different tokens needs; raise vocab_size",
        )

    @property
    def plain_ids(self) -> int:
        """Tokens of keys and values together [count]."""
        return self.vocab_size - self.noise_vocab_size - 1 - (not self.multi_query)


@register_task("fuzzy_recall", config=FuzzyRecallConfig)
class FuzzyRecall(Task):
    """In-context recall of keys and values that are several tokens long."""

    config: FuzzyRecallConfig

    def words(self) -> str:
        return f"keys of up to {self.config.k_motif_size} tokens, values of up to {self.config.v_motif_size}, to recall"

    def make(self, draws: Draws, train: bool) -> Examples:
        config = self.config
        n_keys, n_values = config.plain_ids // 2, config.plain_ids - config.plain_ids // 2
        latest = config.seq_len - 2 * (config.k_motif_size + config.v_motif_size)  # a pair may start below this
        pairs = -(-latest // (2 if train else config.k_motif_size + 1))
        key_size_BP = np.full((len(draws), pairs), config.k_motif_size, dtype=np.int64)
        if train:
            key_size_BP = 1 + draws.below(config.k_motif_size, pairs)
        digits = [draws.below(n_keys - place, pairs) for place in range(config.k_motif_size)]
        name_BP = _names(digits, key_size_BP, n_keys)
        hash_BP = mix(draws.words(1) ^ name_BP.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        value_size_BP = 1 + _part(hash_BP, 0, config.v_motif_size)  # a key's value is a hash: no dictionary needed
        value_digits = [_part(hash_BP, place + 1, n_values - place) for place in range(config.v_motif_size)]
        size_BP = key_size_BP + value_size_BP
        ends_BP = np.cumsum(size_BP, axis=1)
        placed_BP = ends_BP - size_BP < latest
        n_placed_B1 = placed_BP.sum(axis=1, keepdims=True)
        asked_B1 = draws.below(n_placed_B1, 1)
        noise_BP = draws.chance(config.frac_noise, pairs)
        np.put_along_axis(noise_BP, asked_B1, False, axis=1)
        real_BP = placed_BP & ~noise_BP
        known_BP = repeats(np.where(real_BP, name_BP, -1 - np.arange(pairs))) & real_BP

        # the last pair, once more what was asked for, is one more column
        def with_last(array_BP: I64) -> I64:
            return np.concatenate((array_BP, np.take_along_axis(array_BP, asked_B1, axis=1)), axis=1)

        gap = 0 if config.multi_query else 1  # for the marker
        stop_B1 = np.take_along_axis(ends_BP, n_placed_B1 - 1, axis=1) + gap
        size_BQ = with_last(size_BP)
        start_BQ = np.concatenate((ends_BP - size_BP, stop_B1), axis=1)
        shift_B1 = config.seq_len + 1 - stop_B1 - size_BQ[:, -1:]
        layout = _Layout(config, start_BQ + shift_B1, with_last(key_size_BP), with_last(value_size_BP), len(draws))
        layout.there_BQ[:, :-1] = placed_BP
        layout.noise_BQ[:, :-1] = noise_BP
        layout.scored_BQ[:, :-1] = known_BP & config.multi_query
        if gap:
            np.put_along_axis(layout.whole_BN, stop_B1 - 1 + shift_B1, config.vocab_size - 1, axis=1)
        keys = _different([with_last(digit) for digit in digits])
        values = _different([with_last(digit) for digit in value_digits])
        layout.write(keys, values, n_keys, draws)
        everywhere = train and config.train_on == "all"
        return next_tokens(layout.whole_BN[:, :-1], layout.mask_BN[:, :-1], config.seq_len, everywhere=everywhere)


class _Layout:
    """Pairs of different sizes, put one after another; what is not there goes into a last column that is cut off."""

    def __init__(self, config: FuzzyRecallConfig, start_BQ: I64, key_BQ: I64, value_BQ: I64, rows: int) -> None:
        self.config = config
        self.start_BQ, self.key_BQ, self.value_BQ = start_BQ, key_BQ, value_BQ
        padding = config.vocab_size - 1 - (not config.multi_query)
        self.whole_BN = np.full((rows, config.seq_len + 2), padding, dtype=np.int64)
        self.mask_BN = np.zeros(self.whole_BN.shape, dtype=bool)
        self.rows_B1 = np.arange(rows)[:, None] * self.whole_BN.shape[1]
        self.there_BQ = np.ones(start_BQ.shape, dtype=bool)
        self.noise_BQ = np.zeros(start_BQ.shape, dtype=bool)
        self.scored_BQ = np.ones(start_BQ.shape, dtype=bool)

    def write(self, keys: list[I64], values: list[I64], n_keys: int, draws: Draws) -> None:
        """Write the tokens of all keys and values, or noise in their stead, and mark the values that are scored."""
        for place, tokens_BQ in enumerate(keys):
            self._put(place, self.there_BQ & (place < self.key_BQ), tokens_BQ, draws)
        for place, tokens_BQ in enumerate(values):
            there_BQ = self.there_BQ & (place < self.value_BQ)
            columns_BQ = self._put(place + self.key_BQ, there_BQ, n_keys + tokens_BQ, draws)
            self.mask_BN.reshape(-1)[columns_BQ] = self.scored_BQ & there_BQ

    def _put(self, place: int | I64, there_BQ: Bools, tokens_BQ: I64, draws: Draws) -> I64:
        columns_BQ = np.where(there_BQ, self.start_BQ + place, self.whole_BN.shape[1] - 1)
        columns_BQ += self.rows_B1
        if self.config.frac_noise:
            noise_BQ = self.config.plain_ids + draws.below(self.config.noise_vocab_size, tokens_BQ.shape[1])
            tokens_BQ = np.where(self.noise_BQ, noise_BQ, tokens_BQ)
        self.whole_BN.reshape(-1)[columns_BQ] = tokens_BQ
        return columns_BQ


def _names(digits: list[I64], size_BP: I64, n_keys: int) -> I64:
    """Return a number for each key that no other key has: its size and its digits up to there."""
    name_BP: I64 = size_BP
    for place, digit_BP in enumerate(digits):
        name_BP = name_BP * n_keys + np.where(place < size_BP, digit_BP, 0)
    return name_BP


def _part(hash_BP: U64, place: int, limit: int) -> I64:
    """Return the ``place``-th number below ``limit`` that a hash stands for."""
    wide_BP: U64 = mix(hash_BP + np.uint64(place)) >> np.uint64(32)
    wide_BP *= np.uint64(limit)
    wide_BP >>= np.uint64(32)
    return wide_BP.view(np.int64)


def _different(digits: list[I64]) -> list[I64]:
    """Turn digits, the t-th below n - t, into different tokens below n: each counts the tokens not yet taken."""
    tokens: list[I64] = []
    rising: list[I64] = []  # the tokens so far, sorted
    for digit_BQ in digits:
        token_BQ = digit_BQ.copy()
        for earlier_BQ in rising:
            token_BQ += token_BQ >= earlier_BQ
        tokens.append(token_BQ)
        greatest_BQ, sorted_ = token_BQ, []
        for earlier_BQ in rising:
            sorted_.append(np.minimum(earlier_BQ, greatest_BQ))
            greatest_BQ = np.maximum(earlier_BQ, greatest_BQ)
        rising = [*sorted_, greatest_BQ]
    return tokens
