"""``data=mixture``: several tasks, or text and tasks, as one; ``data=mad``: the six tasks of MAD.

- Every training batch comes from one part. A round has ``weight`` batches of each part, in an order that is a function
  of seed and round, and a part's own batches follow one another as if it were alone: all of it is computed from the
  step, nothing remembered.
- Parts have examples of different lengths, and nothing is padded: a batch has as many tokens whichever part it is of
  (to less than one example), so a part of shorter examples has more of them.
- ``ids=apart``: each part has ids of its own, one range after another, so that an id says what is being asked and no
  part disturbs another's embeddings; unlike a marker in front, this leaves every example as it is. ``ids=shared``: all
  parts use the same ids from 0 on, as for one task at several sizes.
- Validation measures every part by itself; the score is their mean, as in MAD.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hybridnas.config import option
from hybridnas.data.draws import Draws, keys_of
from hybridnas.data.source import Batch, Source, SourceConfig, open_source, register_source, source_config
from hybridnas.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import nn

MAD = ("compression", "fuzzy_recall", "in_context_recall", "mad_selective_copying", "memorisation", "noisy_recall")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(SourceConfig):
    """Parts, how often each is read, and how their ids and lengths go together."""

    kind: str = option("mixture", "kind of data, a name in SOURCES")
    parts: Mapping[str, Any] | None = field(
        default=None,
        metadata={
            "doc": "name -> settings of that data, with its kind (none: the name) and weight (none: 1) [mapping]"
        },
    )
    ids: str = option("apart", "each part has ids of its own, or all use the same", choices=("apart", "shared"))
    seq_len: int | None = option(None, "context of text; none: as long as the longest task's example [tokens]", ge=1)

    def __post_init__(self) -> None:
        if isinstance(self.parts, str):
            object.__setattr__(self, "parts", [name.strip() for name in self.parts.split(",")])
        if isinstance(self.parts, (list, tuple)):
            object.__setattr__(self, "parts", {str(name): {} for name in self.parts})
        super().__post_init__()
        if not self.parts:
            raise ConfigError(
                "data=mixture needs parts, e.g. 'data.parts=[mqar,parity]', or data.parts.mqar.n_pairs=16 to set some"
            )
        longest = max((config.own_seq_len or 0 for config, _ in self.opened().values()), default=0)
        if self.seq_len is not None and self.seq_len < longest:
            raise ConfigError(f"data seq_len={self.seq_len} is shorter than an example of {longest} tokens of a part")

    def opened(self) -> dict[str, tuple[SourceConfig, int]]:
        """Return each part's config and weight by name; raises ConfigError that names the part."""
        return {str(name): self._part(str(name), settings) for name, settings in (self.parts or {}).items()}

    def _part(self, name: str, settings: Any) -> tuple[SourceConfig, int]:
        if not isinstance(settings, Mapping) and settings is not None:
            raise ConfigError(f"data.parts.{name}={settings!r} must be a mapping of settings, {{}} for the usual ones")
        values = {"kind": name, **(settings or {})}
        weight = values.pop("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int) or weight < 1:
            raise ConfigError(f"data.parts.{name}.weight={weight!r} must be a whole number of batches, at least 1")
        try:
            config = source_config(values)
        except ConfigError as error:
            raise ConfigError(f"data.parts.{name}: {str(error).removeprefix('data: ')}") from None
        if isinstance(config, MixtureConfig):
            raise ConfigError(f"data.parts.{name} is a mixture itself; name its parts here instead")
        return config, weight

    @property
    def own_seq_len(self) -> int | None:
        return self.seq_len or max((config.own_seq_len or 0 for config, _ in self.opened().values()), default=0) or None


@dataclass(frozen=True, kw_only=True)
class MadConfig(MixtureConfig):
    """The six tasks of MAD at their baseline settings."""

    kind: str = option("mad", "kind of data, a name in SOURCES")
    parts: Mapping[str, Any] | None = field(
        default_factory=lambda: {name: {} for name in MAD},
        metadata={
            "doc": "name -> settings of that task, with its kind (none: the name) and weight (none: 1) [mapping]"
        },
    )


@register_source("mixture", config=MixtureConfig)
@register_source("mad", config=MadConfig)
class Mixture(Source):
    """Several sources as one."""

    def __init__(self, config: MixtureConfig) -> None:
        self.config = config
        opened = config.opened()
        self._parts = {name: open_source(part) for name, (part, _) in opened.items()}
        self._weights = {name: weight for name, (_, weight) in opened.items()}
        self._round = [name for name, weight in self._weights.items() for _ in range(weight)]
        sizes = [part.vocab_size for part in self._parts.values()]
        starts = np.cumsum([0, *sizes[:-1]]).tolist() if config.ids == "apart" else [0] * len(sizes)
        self._starts = dict(zip(self._parts, starts, strict=True))
        self._vocab_size = sum(sizes) if config.ids == "apart" else max(sizes)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def seq_len(self) -> int | None:
        own: int | None = self.config.own_seq_len
        return own

    def heads(self, d_model: int) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for part in self._parts.values():  # parts whose heads have one name share the first one's
            found = {**part.heads(d_model), **found}
        return found

    @property
    def fingerprint(self) -> str:
        parts = [[name, self._weights[name], part.fingerprint] for name, part in self._parts.items()]
        text = json.dumps({"ids": self.config.ids, "seq_len": self.seq_len, "parts": parts})
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> str:
        parts = [f"{name} ({self._weights[name]})" if w > 1 else name for name, w in self._weights.items()]
        own = "each part its own" if self.config.ids == "apart" else "shared"
        return f"{self.config.kind}, batches of {', '.join(parts)} in turn; {self.vocab_size:,} ids ({own})"

    def train_batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        self._require(seq_len)
        number, place = divmod(step, len(self._round))
        key = keys_of(np.array([number], dtype=np.int64), "round", seed)
        turns = [self._round[turn] for turn in Draws(key).order(len(self._round))[0]]
        name = turns[place]
        own_step = number * self._weights[name] + turns[:place].count(name)
        part, rows, length = self._shape(name, batch_size, seq_len)
        return self._moved(name, part.train_batch(own_step, rows, length, seed))

    def valid_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        for batches in self.valid_parts(n_tokens, batch_size, seq_len).values():
            yield from batches

    def test_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        for batches in self.test_parts(n_tokens, batch_size, seq_len).values():
            yield from batches

    def valid_parts(self, n_tokens: int, batch_size: int, seq_len: int) -> dict[str, Iterator[Batch]]:
        return self._held_out(False, n_tokens, batch_size, seq_len)

    def test_parts(self, n_tokens: int, batch_size: int, seq_len: int) -> dict[str, Iterator[Batch]]:
        return self._held_out(True, n_tokens, batch_size, seq_len)

    @property
    def test_tokens(self) -> int | None:
        counts = [part.test_tokens for part in self._parts.values()]
        return 0 if 0 in counts else None

    def _held_out(self, test: bool, n_tokens: int, batch_size: int, seq_len: int) -> dict[str, Iterator[Batch]]:
        self._require(seq_len)
        share = -(-n_tokens // len(self._parts))
        return {name: self._part_batches(name, test, share, batch_size, seq_len) for name in self._parts}

    def _part_batches(self, name: str, test: bool, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        part, rows, length = self._shape(name, batch_size, seq_len)
        for batch in (part.test_batches if test else part.valid_batches)(n_tokens, rows, length):
            yield self._moved(name, batch)

    def _shape(self, name: str, batch_size: int, seq_len: int) -> tuple[Source, int, int]:
        """Return a part, and how many examples of which length have as many tokens as a whole batch."""
        part = self._parts[name]
        length = part.seq_len or seq_len
        return part, batch_size * seq_len // length, length

    def _moved(self, name: str, batch: Batch) -> Batch:
        start = self._starts[name]
        if not start:
            return batch
        return batch._replace(inputs_BL=batch.inputs_BL + start, targets_BL=batch.targets_BL + start)

    def _require(self, seq_len: int) -> None:
        if self.seq_len not in (None, seq_len):
            raise DataError(
                f"data={self.config.kind} has a context of {self.seq_len} tokens, asked for seq_len={seq_len}; "
                f"set data.seq_len, or leave the other one out"
            )
