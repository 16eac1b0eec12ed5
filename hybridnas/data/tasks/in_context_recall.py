"""``data=in_context_recall``: say a key's value again, having seen both before (MAD, arXiv 2403.17844).

Pairs k v k v ...: keys are drawn anew at each place from [0, n/2), n = ``vocab_size`` without noise and special ids,
and a key has one value, from [n/2, n), throughout an example. The last key is drawn from those that came before.
Scored (multi_query=true): the value of every key that has come before; else the last value alone, after id V-1.

The paper's sizes: 16 ids, 128 tokens, 12,800 examples to train on, 1,280 to test on; one at a time vocab_size 32, 64,
128, seq_len 256, 512, 1024, n_train_examples 6400, 3200, 1600, 800. Where mad-lab's code leaves a choice, there is a
setting: ``train_on=all`` (as there) takes every next token into the training loss, also those that cannot be known;
``train_on=scored`` trains on what is scored. An example here has ``seq_len`` inputs, one more than there, whose last
predicts nothing. With noise its code can make an example without any pair, here one is always there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import I64, Bools, Draws
from hybridnas.data.task import Examples, Task, TaskConfig, next_tokens, register_task


@dataclass(frozen=True, kw_only=True)
class RecallConfig(TaskConfig):
    """Settings of in-context recall and of its noisy form."""

    kind: str = option("in_context_recall", "kind of data, a name in SOURCES")
    vocab_size: int = option(16, "different ids: keys, values, noise, special ones [count]", ge=2)
    seq_len: int = option(128, "length of an example [tokens]", ge=4)
    multi_query: bool = option(True, "score every key that comes again; no: only the last one [yes/no]")
    noise_vocab_size: int = option(0, "ids of noise, the highest of the vocabulary [count]", ge=0)
    frac_noise: float = option(0.0, "share of the pairs that are two noise ids instead [0 to 1]", ge=0, le=1)
    train_on: str = option(
        "all", "what the training loss counts: all next tokens, as mad-lab does, or what is scored",
        choices=("all", "scored"),
    )  # fmt: skip
    n_train_examples: int | None = option(12_800, "examples of the training set; none: fresh ones", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        length = self.seq_len
        self.require(length % 2 == 0, f"seq_len={length} must be even: keys and values come in twos")
        self.require(
            self.frac_noise == 0 or self.noise_vocab_size > 0,
            f"frac_noise={self.frac_noise} needs noise ids: noise_vocab_size >= 1",
        )
        special = self.noise_vocab_size + (not self.multi_query)
        self.require(
            self.plain_ids >= 4,
            f"vocab_size={self.vocab_size} must be at least {special + 4}: two keys, two values, and {special} for "
            f"noise and special ids",
        )

    @property
    def plain_ids(self) -> int:
        """Ids of keys and values together [count]."""
        return self.vocab_size - self.noise_vocab_size - (not self.multi_query)


@register_task("in_context_recall", config=RecallConfig)
class InContextRecall(Task):
    """In-context recall, with noise between the pairs where the settings say so."""

    config: RecallConfig

    def words(self) -> str:
        noise = f", {self.config.frac_noise:.0%} of them noise" if self.config.frac_noise else ""
        return f"{self.config.seq_len // 2} key-value pairs{noise}, the values of repeated keys to recall"

    def make(self, draws: Draws, train: bool) -> Examples:
        config = self.config
        pairs, keys = config.seq_len // 2, config.plain_ids // 2
        keys_BP = draws.below(keys, pairs)
        values_BK = keys + draws.below(config.plain_ids - keys, keys)
        shown_BP = self._shown(draws, pairs)
        keys_BP[:, -1:] = _one_of(keys_BP, shown_BP, keys, draws)
        values_BP = np.take_along_axis(values_BK, keys_BP, axis=1)
        known_BP = _seen_before(keys_BP, shown_BP, keys) & shown_BP
        whole_BN = np.empty((len(draws), config.seq_len), dtype=np.int64)
        whole_BN[:, 0::2], whole_BN[:, 1::2] = keys_BP, values_BP
        if config.frac_noise:
            noise_BN = config.plain_ids + draws.below(config.noise_vocab_size, config.seq_len)
            whole_BN = np.where(np.repeat(shown_BP, 2, axis=1), whole_BN, noise_BN)
        scored_BN = np.zeros(whole_BN.shape, dtype=bool)
        scored_BN[:, 1::2] = known_BP
        if not config.multi_query:
            marker_B1 = np.full((len(draws), 1), config.vocab_size - 1, dtype=np.int64)
            whole_BN = np.concatenate((whole_BN[:, :-2], marker_B1, whole_BN[:, -2:]), axis=1)
            scored_BN = np.zeros(whole_BN.shape, dtype=bool)
            scored_BN[:, -1] = True
        return next_tokens(whole_BN, scored_BN, config.seq_len, everywhere=train and config.train_on == "all")

    def _shown(self, draws: Draws, pairs: int) -> Bools:
        """Return which places hold a pair rather than noise: the last always, and one before it at least."""
        if not self.config.frac_noise:
            return np.ones((len(draws), pairs), dtype=bool)
        shown_BP = ~draws.chance(self.config.frac_noise, pairs)
        np.put_along_axis(shown_BP, draws.below(pairs - 1, 1), True, axis=1)
        shown_BP[:, -1] = True
        return shown_BP


def _one_of(keys_BP: I64, shown_BP: Bools, n_keys: int, draws: Draws) -> I64:
    """Return (B, 1) one key of those shown before the last place, each of the different ones equally likely."""
    rank_BK = draws.halves(n_keys).astype(np.int64)
    there_BK = np.zeros(rank_BK.shape, dtype=bool)
    rows, places = np.nonzero(shown_BP[:, :-1])
    there_BK[rows, keys_BP[rows, places]] = True
    chosen_B1: I64 = np.where(there_BK, rank_BK, -1).argmax(axis=1, keepdims=True)
    return chosen_B1


def _seen_before(keys_BP: I64, shown_BP: Bools, n_keys: int) -> Bools:
    """Return where a key has been shown earlier in its row."""
    n_rows, pairs = keys_BP.shape
    first_BK = np.full((n_rows, n_keys), pairs, dtype=np.int64)
    places_BP = np.where(shown_BP, np.arange(pairs), pairs)
    flat_BP = keys_BP + np.arange(n_rows)[:, None] * n_keys
    np.minimum.at(first_BK.reshape(-1), flat_BP.reshape(-1), places_BP.reshape(-1))
    seen: Bools = np.arange(pairs) > np.take_along_axis(first_BK, keys_BP, axis=1)
    return seen
