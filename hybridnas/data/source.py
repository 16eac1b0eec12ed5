"""The contract of data: a source gives training batches by step and validation batches that never change.

Letters: B batch, L sequence length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from hybridnas.config import FrozenConfig, option
from hybridnas.errors import ConfigError, DataError
from hybridnas.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn

    from hybridnas.data.details import Details
    from hybridnas.data.tokenizers import Tokenizer

O = TypeVar("O", bound="Callable[..., Source]")  # noqa: E741


class Batch(NamedTuple):
    """What one step reads: ids, the ids to predict at each place, and which places count (None: all of them)."""

    inputs_BL: Tensor
    targets_BL: Tensor
    mask_BL: Tensor | None = None
    head: str | None = None  # the task head (a name in Source.heads) through which the model is read; None: directly
    documents_BL: Tensor | None = None  # number of each target's document in the test part; None: each row is its own
    segments_BL: Tensor | None = None  # number of each input's document in its row, none of which sees another
    values_BL: Tensor | None = None  # numbers to predict in the place of ids, float32, where mask says; None: ids


@dataclass(frozen=True, kw_only=True)
class SourceConfig(FrozenConfig):
    """Fields that every kind of data has; each kind adds its own."""

    prefix: ClassVar[str] = "data"

    kind: str = option("stdlib", "kind of data, a name in SOURCES")

    @classmethod
    def label(cls) -> str:
        return "data"

    @property
    def own_seq_len(self) -> int | None:
        """Length of one example of a task [tokens], or None where the context can be chosen freely, as with text."""
        return None


class Source(ABC):
    """Tokens for training and validation; equal for every trial and process that opens the same config."""

    config: Any = None  # the SourceConfig that it was opened with, by which another process opens the same

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of different ids [count]; every id lies in [0, vocab_size)."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of what is trained on and validated on: 64 hex digits, equal wherever the tokens are equal."""

    @property
    def seq_len(self) -> int | None:
        """The context of a task, whose examples have a length of their own [tokens]; None: any, as with text."""
        return None

    def context(self, asked: int | None, default: int) -> int:
        """Return the context to train and measure with: the task's own, else what was asked for, else ``default``.

        Raises ConfigError where the user asked for another length than the task's; a default merely gives way.
        """
        own = self.seq_len
        if own is None:
            return default if asked is None else asked
        if asked not in (None, own):
            raise ConfigError(
                f"seq_len={asked} disagrees with the task's own length: {self.describe()}; leave seq_len out, or give "
                f"the task that length with data.seq_len={asked}",
                field="seq_len",
                got=asked,
                allowed=own,
            )
        return own

    def heads(self, d_model: int) -> dict[str, nn.Module]:
        """Return fresh modules (B, L, D) -> (B, L, D) between model and output matrix, by the name in ``Batch.head``.

        The trainer trains them beside the model and keeps them in the run's checkpoint; they are no part of the
        architecture, of its parameter count or of an export. Empty for text and for most tasks.
        """
        return {}

    @property
    def token_lengths(self) -> npt.NDArray[np.int64] | None:
        """UTF-8 bytes that each id stands for (V,), 0 for a separator, or None where bytes mean nothing."""
        return None

    @property
    def unit(self) -> tuple[str, int] | None:
        """What bits are stated per beside bytes, and its tokens: ("base", 1) of DNA; None: nothing else."""
        return None

    def bits(self, per_byte: float) -> tuple[float, str]:
        """Return bits per byte in the data's own unit, and that unit: of DNA ("base")."""
        name, tokens = self.unit or ("byte", 1)
        return per_byte * tokens, name

    @property
    def train_tokens(self) -> int | None:
        """Tokens of one epoch of training [count], or None where data never ends."""
        return None

    @property
    def valid_tokens(self) -> int | None:
        """Tokens held out for validation [count], or None where data never ends."""
        return None

    @property
    def test_tokens(self) -> int | None:
        """Tokens that only final figures are measured on [count]; 0: there are none; None: data never ends."""
        return 0

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None where ids are not text."""
        return None

    def repeated(self, tokens: int) -> str:
        """Return how often so many training tokens read the data, as a warning; empty for less than two times."""
        if not self.train_tokens or tokens < 2 * self.train_tokens:
            return ""
        times = tokens / self.train_tokens
        return f"warning: {tokens:,} training tokens read the {self.train_tokens:,} of the data {times:.1f} times"

    @abstractmethod
    def describe(self) -> str:
        """Return one line for people: what is read, how it is split, how it is tokenised."""

    def details(self, samples: int, seed: int) -> Details:
        """Return what the data holds, with so many samples drawn by ``seed``: of a task, training examples as ids."""
        from hybridnas.data.details import Details, Sample

        shown = []
        if samples:
            batch = self.train_batch(0, samples, self.seq_len or 64, seed)
            rows = range(len(batch.inputs_BL))
            shown = [Sample(where=f"training example {row + 1}", text=_example(batch, row)) for row in rows]
        parts = {"train": self.train_tokens, "valid": self.valid_tokens, "test": self.test_tokens}
        known = {name: {"tokens": count} for name, count in parts.items() if count is not None}
        return Details(figures={"different ids": self.vocab_size}, parts=known, samples=shown)

    @abstractmethod
    def train_batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        """Return the batch of step ``step`` (from 0), int64 (B, L): a pure function of the four arguments."""

    @abstractmethod
    def valid_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        """Yield the same validation batches at every call, at least ``n_tokens`` in all or as many as exist."""

    def test_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        """Yield as ``valid_batches`` does what no candidate is chosen by; raises DataError where there is none."""
        raise DataError(f"{self.describe()} has no test part", field="data", got=type(self).__name__)

    def valid_parts(self, n_tokens: int, batch_size: int, seq_len: int) -> dict[str, Iterator[Batch]]:
        """Return the parts that are measured apart, by name, and their batches; one part without a name: the whole."""
        return {"": self.valid_batches(n_tokens, batch_size, seq_len)}

    def test_parts(self, n_tokens: int, batch_size: int, seq_len: int) -> dict[str, Iterator[Batch]]:
        """Return the same parts of what no candidate is chosen by."""
        return {"": self.test_batches(n_tokens, batch_size, seq_len)}

    def save_tokenizer(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``; raises DataError where ids are not text."""
        if self.tokenizer is None:
            raise DataError(f"{type(self).__name__} has no tokenizer to save: its ids are not text")
        self.tokenizer.save(folder)


def _example(batch: Batch, row: int) -> str:
    """Return one row of a batch as text: its ids, and behind an arrow those to predict, unless it is each next one."""
    inputs_L, targets_L = batch.inputs_BL[row], batch.targets_BL[row]
    ids = " ".join(map(str, inputs_L.tolist()))
    whole = batch.mask_BL is None or bool(batch.mask_BL[row].all())
    if whole and targets_L[:-1].equal(inputs_L[1:]):
        return ids
    asked = targets_L if batch.mask_BL is None else targets_L[batch.mask_BL[row]]
    return f"{ids} -> {' '.join(map(str, asked.tolist()))}"


@dataclass(frozen=True)
class SourceKind:
    """A registered kind: the config it takes, and what opens it."""

    config: type[SourceConfig]
    open: Callable[..., Source]


SOURCES: Registry[SourceKind] = Registry("data", "hybridnas.data", groups=("hybridnas.sources", "hybridnas.tasks"))


def register_source(kind: str, *, config: type[SourceConfig]) -> Callable[[O], O]:
    """Decorate what opens a source of this kind: a function of its config, or a Source class made from it."""

    def decorate(opener: O) -> O:
        SOURCES.add(kind, SourceKind(config, opener), opener.__module__)
        return opener

    return decorate


def source_config(values: Mapping[str, Any], *, parse: bool = False) -> SourceConfig:
    """Build the config of the kind that ``values`` names; ``parse`` reads strings by field type, as from a shell."""
    kind = values.get("kind", "stdlib")
    return SOURCES.get(str(kind)).config.from_dict(values, where="data", parse=parse)


def open_source(config: SourceConfig) -> Source:
    """Open the data that ``config`` describes, building what is not cached yet.

    Raises ConfigError for an unknown kind, DataError for data that is missing, empty, or not what it should be.
    """
    entry = SOURCES.get(config.kind)
    if not isinstance(config, entry.config):
        raise ConfigError(
            f"data kind={config.kind!r} takes {entry.config.__name__}, got {type(config).__name__}; "
            f"build it with hybridnas.data.source_config",
            field="data",
            got=type(config).__name__,
            allowed=entry.config.__name__,
        )
    source = entry.open(config)
    source.config = config
    return source


def check_vocab(source_vocab: int, model_vocab: int) -> None:
    """Raise DataError unless every id of the data is one that the model knows."""
    if source_vocab > model_vocab:
        raise DataError(
            f"the data has {source_vocab:,} different tokens but the model only vocab_size={model_vocab:,}; "
            f"build the model with vocab_size={source_vocab} or choose a tokenizer with a smaller vocabulary",
            field="vocab_size",
            got=model_vocab,
            allowed=f">= {source_vocab}",
        )
