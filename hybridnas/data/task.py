"""The base of a synthetic task: examples made on the fly, each a pure function of settings, seed, split and number.

A task is one file in ``tasks/`` and one registration. It says how examples are made; this file decides which:

- Training example ``i`` is row ``i % batch_size`` of step ``i // batch_size``: the same examples in the same order
  whatever the batch size, the process, or where a run was resumed. With ``n_train_examples`` there are that many,
  the same for every seed, read in a new order each epoch, a function of the seed; without, no example comes twice.
- An example is held out if its inputs hash into one sixteenth of all hashes, and to training otherwise:
  one that falls on the wrong side is made again. So no example is ever on both sides. What a task keeps fixed, as
  the dictionary of ``memorisation``, both sides share.

Letters: B batch, L length.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from hybridnas.config import MAX_SEED, option
from hybridnas.data.draws import I64, U64, Bools, Draws, keys_of, mix, word
from hybridnas.data.source import Batch, Source, SourceConfig, register_source
from hybridnas.data.windows import permute
from hybridnas.errors import ConfigError, DataError
from hybridnas.units import percent

if TYPE_CHECKING:
    from hybridnas.data.details import Details

K = TypeVar("K", bound="type[Task]")
VALID, TEST = "test", "final"  # names that examples are drawn under: for validation, and for testing
VERSION = 1  # part of every fingerprint: raise it whenever examples come out differently
_TABLE = 1 << 18  # of training sets up to this size an epoch's order is a table; of larger ones it is computed
_TEST_BITS = 4  # one example in 2^4 belongs to the test set
_ATTEMPTS = 1024  # an example is made again at most so often: then there are too few different ones
_CHUNK = 1 << 14  # test tokens made at once, the attempts that fail not counted
_MOST = 1 << 20  # tokens of attempts at once
_KEPT = 1 << 22  # test tokens kept in memory rather than made again


class Examples(NamedTuple):
    """Examples as arrays: ids, the ids to predict at each place, and the places that count."""

    inputs_BL: I64
    targets_BL: I64
    mask_BL: Bools


@dataclass(frozen=True, kw_only=True)
class TaskConfig(SourceConfig):
    """Settings that every task has."""

    vocab_size: int = option(16, "different ids, special ones included [count]", ge=2)
    seq_len: int = option(128, "length of an example, and so of the context [tokens]", ge=2)
    n_train_examples: int | None = option(
        None, "examples of the training set, read again and again in new orders; none: fresh ones without end", ge=1
    )
    n_test_examples: int = option(
        1280, "examples held out for validation, and as many others for testing [count]", ge=1
    )
    task_seed: int = option(
        0, "seed of the test set, of a finite training set, and of what examples share", ge=0, le=MAX_SEED
    )

    @property
    def own_seq_len(self) -> int:
        return self.seq_len

    def require(self, holds: bool, words: str) -> None:
        """Raise ConfigError that opens with the task's name unless ``holds``."""
        if not holds:
            raise ConfigError(f"{self.kind} {words}")


def register_task(name: str, *, config: type[TaskConfig]) -> Callable[[K], K]:
    """Class decorator: make a :class:`Task` the data that ``data=NAME`` opens, with the settings of ``config``.

    Raises ConfigError for a name that is taken or that is not the default of the config's ``kind``.
    """

    def decorate(cls: K) -> K:
        kind = config.__dataclass_fields__["kind"].default
        if kind != name:
            raise ConfigError(
                f"task {name!r} needs kind={name!r} as the default in {config.__name__}, got {kind!r}",
                field="kind",
                got=kind,
                allowed=name,
            )
        return register_source(name, config=config)(cls)

    return decorate


class Task(Source):
    """A synthetic task; subclasses make examples and say what they are about."""

    head: str | None = None  # the task head through which its batches are read; None: the model's output directly

    def __init__(self, config: Any) -> None:
        self.config = config
        self._made: dict[str, list[Examples]] = {VALID: [], TEST: []}  # chunks made so far
        self._weights_L = mix(np.arange(1, config.seq_len + 1, dtype=np.uint64)) | np.uint64(1)

    @abstractmethod
    def make(self, draws: Draws, train: bool) -> Examples:
        """Make one example for each of ``draws``: int64 (B, L), int64 (B, L), bool (B, L), L the task's seq_len.

        ``train`` tells tasks apart that are trained on more places, or on easier examples, than they are scored on.
        """

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def seq_len(self) -> int:
        return int(self.config.seq_len)

    @property
    def train_tokens(self) -> int | None:
        count = self.config.n_train_examples
        return None if count is None else int(count) * self.seq_len

    @property
    def valid_tokens(self) -> int:
        return int(self.config.n_test_examples) * self.seq_len

    @property
    def test_tokens(self) -> int:
        return self.valid_tokens

    @property
    def fingerprint(self) -> str:
        text = json.dumps({"version": VERSION, **self.config.to_dict()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def words(self) -> str:
        """Return what an example is, in a few words with its sizes, for ``describe``."""
        return str(self.config.kind)

    def describe(self) -> str:
        count = self.config.n_train_examples
        train = "fresh examples at every step" if count is None else f"{count:,} examples to train on"
        return (
            f"{self.config.kind}: {self.words()}; {self.vocab_size:,} ids, {self.seq_len:,} tokens per example, "
            f"{train}, {self.config.n_test_examples:,} held out; always the commonest answer is right in "
            f"{percent(self.chance())}"
        )

    def chance(self) -> float:
        """Return the accuracy of the commonest answer, whatever is asked [0 to 1], over the first held-out examples."""
        return next(iter(self.balance().values()))

    def balance(self) -> dict[int, float]:
        """Return the share of each answer among the first held-out examples [0 to 1], the commonest first."""
        some = min(int(self.config.n_test_examples), max(1, _CHUNK // self.seq_len))
        made = self._held_out(VALID, 0, some)
        ids_A, counts_A = np.unique(made.targets_BL[made.mask_BL], return_counts=True)
        order = np.argsort(-counts_A, kind="stable")
        return {int(ids_A[one]): float(counts_A[one] / counts_A.sum()) for one in order}

    def details(self, samples: int, seed: int) -> Details:
        shares = {str(answer): share for answer, share in self.balance().items()}
        return replace(super().details(samples, seed), shares=shares, shares_of="answers")

    def train_batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        self._require(seq_len)
        numbers_B = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
        count = self.config.n_train_examples
        if count is None:
            return self._batch(self.examples(numbers_B, train=True, seed=seed))
        return self._batch(self.examples(shuffled(numbers_B, count, seed), train=True))

    def valid_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        return self._held_out_batches(VALID, n_tokens, batch_size, seq_len)

    def test_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        return self._held_out_batches(TEST, n_tokens, batch_size, seq_len)

    def _held_out_batches(self, part: str, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        self._require(seq_len)
        wanted = min(self.config.n_test_examples, max(1, -(-n_tokens // seq_len)))
        for first in range(0, wanted, batch_size):
            yield self._batch(self._held_out(part, first, min(first + batch_size, wanted)))

    def examples(self, numbers_B: I64, *, train: bool, seed: int | None = None, part: str = VALID) -> Examples:
        """Return the examples of these numbers; ``seed`` is that of fresh training examples, none: the fixed ones.

        ``part``: which of the two held-out sets, where ``train`` is false.
        """
        config = self.config
        keys_B = keys_of(numbers_B, config.kind, config.task_seed, "train" if train else part, seed)
        found = self.make(Draws(keys_B), train)
        wrong = np.flatnonzero(self.is_test(found.inputs_BL) == train)
        tried = 1
        while len(wrong):
            if tried >= _ATTEMPTS:
                raise self._too_few()
            # Several attempts at once, of which the first good one counts: a test example takes sixteen on average.
            count = 1 if train else max(1, min(1 << _TEST_BITS, _MOST // (len(wrong) * self.seq_len)))
            keys_BA = keys_B[wrong, None] + np.arange(tried, tried + count, dtype=np.uint64) * word("again")
            made = self.make(Draws(mix(keys_BA.reshape(-1))), train)
            good_BA = (self.is_test(made.inputs_BL) != train).reshape(-1, count)
            rows = np.flatnonzero(good_BA.any(axis=1))
            chosen = rows * count + good_BA[rows].argmax(axis=1)
            for old, new in zip(found, made, strict=True):
                old[wrong[rows]] = new[chosen]
            wrong = np.delete(wrong, rows)
            tried += count
        return found

    def _too_few(self) -> ConfigError:
        config = self.config
        return ConfigError(
            f"data={config.kind} has too few different examples to hold some out for validation; "
            f"raise data.seq_len={self.seq_len} or data.vocab_size={self.vocab_size}"
        )

    def is_test(self, inputs_BL: I64) -> Bools:
        """Return which examples belong to the test set: their own content decides."""
        hashes_B: U64 = mix(inputs_BL.view(np.uint64) @ self._weights_L)
        inside_B: Bools = hashes_B >> np.uint64(64 - _TEST_BITS) == 0
        return inside_B

    def _held_out(self, part: str, first: int, last: int) -> Examples:
        """Return examples first to last of a held-out set, made in fixed chunks, the first of which are kept."""
        size = max(1, _CHUNK // self.seq_len)
        pieces = []
        for chunk in range(first // size, -(-last // size)):
            made = self._chunk(part, chunk, size)
            inside = slice(max(0, first - chunk * size), last - chunk * size)
            pieces.append([array[inside] for array in made])
        return Examples(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))

    def _chunk(self, part: str, chunk: int, size: int) -> Examples:
        kept = self._made[part]
        if chunk < len(kept):
            return kept[chunk]
        stop = min((chunk + 1) * size, self.config.n_test_examples)
        made = self.examples(np.arange(chunk * size, stop, dtype=np.int64), train=False, part=part)
        if chunk == len(kept) and (chunk + 1) * size * self.seq_len <= _KEPT:
            kept.append(made)
        return made

    def _batch(self, examples: Examples) -> Batch:
        import torch

        inputs, targets, mask = (torch.from_numpy(np.ascontiguousarray(array)) for array in examples)
        return Batch(inputs, targets, mask, self.head)

    def _require(self, seq_len: int) -> None:
        if seq_len != self.seq_len:
            raise DataError(
                f"data={self.config.kind} has examples of {self.seq_len} tokens, asked for seq_len={seq_len}; "
                f"set data.seq_len={seq_len}, or leave the other one out"
            )


def shuffled(numbers_B: I64, size: int, seed: int) -> I64:
    """Return which of ``size`` examples the training examples ``numbers_B`` are: each once an epoch, in new orders."""
    epochs_B = numbers_B // size
    chosen_B = np.empty_like(numbers_B)
    for epoch in np.unique(epochs_B):
        rows = epochs_B == epoch
        places_B = numbers_B[rows] % size
        if size <= _TABLE:
            chosen_B[rows] = _order(size, int(epoch), seed)[places_B]
        else:
            keys = np.array([word(seed, epoch, size, part) for part in range(6)], dtype=np.uint64)
            chosen_B[rows] = permute(places_B.astype(np.uint64), size, keys).astype(np.int64)
    return chosen_B


@lru_cache(maxsize=4)
def _order(size: int, epoch: int, seed: int) -> I64:
    order: I64 = Draws(keys_of(np.array([epoch], dtype=np.int64), "order", seed)).order(size)[0]
    return order


def next_tokens(whole_BN: I64, scored_BN: Bools, seq_len: int, *, everywhere: bool) -> Examples:
    """Return a sequence as inputs and the tokens after them; ``scored`` marks the tokens to be predicted.

    The sequence has ``seq_len`` tokens, whose last place predicts nothing, or one more. ``everywhere``: all are
    predicted, as a language model is trained.
    """
    n_rows, length = whole_BN.shape
    targets_BL = np.zeros((n_rows, seq_len), dtype=np.int64)
    mask_BL = np.zeros((n_rows, seq_len), dtype=bool)
    targets_BL[:, : length - 1] = whole_BN[:, 1 : seq_len + 1]
    mask_BL[:, : length - 1] = True if everywhere else scored_BN[:, 1 : seq_len + 1]
    return Examples(np.ascontiguousarray(whole_BN[:, :seq_len]), targets_BL, mask_BL)
