"""``data=retrieval``: do two passages stand in one document? The Long Range Arena's retrieval task, made of any text.

The Arena (arXiv 2011.04006, section 2.3) asks byte by byte whether one paper cites another (the AAN corpus, which has
to be fetched). Here two passages that do not overlap are cut out of documents at hand, half of the pairs from one
document and half from two, so the answer is known and 50 % are right by chance. Pairs are drawn on the fly, a pure
function of seed and number; documents, not pairs, are held out.

Ids: the 256 bytes (0 the filler), 256 between the passages, 257 the question, 258 and 259 the answers no and yes.
Shapes: B batch, L length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hybridnas.config import MAX_SEED, option
from hybridnas.data.config import DataConfig
from hybridnas.data.draws import Draws, keys_of
from hybridnas.data.files import FileCorpus
from hybridnas.data.source import Batch, Source, SourceConfig, register_source
from hybridnas.data.stdlib import stdlib_files
from hybridnas.data.text import text_files
from hybridnas.errors import DataError
from hybridnas.units import several

if TYPE_CHECKING:
    from torch import nn

BETWEEN, QUESTION, NO = 256, 257, 258
PARTS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(SourceConfig):
    """Pairs of passages out of documents of text."""

    kind: str = option("retrieval", "kind of data, a name in SOURCES")
    path: str | tuple[str, ...] | None = option(
        None, "files, folders or globs, several separated by commas or as a list; none: Python's standard library"
    )
    text_field: str = option("text", "field of a row that holds the text; a.b: b within a")
    encoding: str | None = option(None, "of the files, such as latin-1; none: UTF-8, or what a byte order mark says")
    max_bytes: int = option(64_000_000, "read no more text than this, which is held in memory [bytes]", ge=1)
    seq_len: int = option(256, "length of an example: two passages and two ids [tokens]", ge=6)
    pool: str = option(
        "last", "what the answer is read from: the last position, or the mean of all", choices=("last", "mean")
    )
    n_test_examples: int = option(1280, "pairs for validation, and as many others for testing [count]", ge=1)
    valid_fraction: float = option(0.1, "share of the documents held out for validation [0 to 1]", gt=0, le=0.4)
    test_fraction: float = option(0.1, "share of the documents held out for testing [0 to 1]", gt=0, le=0.4)
    split_seed: int = option(0, "seed of which documents are held out", ge=0, le=MAX_SEED)

    @property
    def own_seq_len(self) -> int:
        return self.seq_len


@register_source("retrieval", config=RetrievalConfig)
class Retrieval(Source):
    """Pairs of passages as training and held-out examples."""

    config: RetrievalConfig

    def __init__(self, config: RetrievalConfig) -> None:
        self.config = config
        self._passage = (config.seq_len - 2) // 2
        asked = DataConfig(
            kind="text" if config.path else "stdlib",
            path=config.path,
            text_field=config.text_field,
            encoding=config.encoding if config.path else None,
            split_files="never",
            max_bytes=config.max_bytes,
        )
        files = text_files(config.path) if config.path else stdlib_files()
        named = "Python's standard library" if config.path is None else config.path
        self._name = named if isinstance(named, str) else ", ".join(named)
        found = dict.fromkeys(FileCorpus(files, asked, name=self._name).documents())  # equal ones once
        self._documents = [np.frombuffer(one, dtype=np.uint8) for one in found if len(one) >= 2 * self._passage]
        digests = [
            hashlib.sha256(config.split_seed.to_bytes(16, "little") + one.tobytes()).digest() for one in self._documents
        ]
        draws = np.array([int.from_bytes(digest[:8], "little") / 2**64 for digest in digests])
        edges = np.cumsum([config.valid_fraction, config.test_fraction])
        part_of = np.searchsorted(edges, draws, side="right")  # 0 valid, 1 test, 2 train
        self._parts = {name: np.flatnonzero(part_of == part) for name, part in zip(PARTS, (2, 0, 1), strict=True)}
        self._digest = hashlib.sha256(b"".join(digests)).hexdigest()
        for name, own in self._parts.items():
            if len(own) < 2:
                raise DataError(
                    f"{self._name} has {several(len(self._documents), 'document')} of at least {2 * self._passage:,} "
                    f"bytes, of which {len(own)} fall into the {name} part, where pairs take two; give more or longer "
                    f"ones, or a shorter data.seq_len",
                    field="data.path",
                    got=len(self._documents),
                    allowed="two documents in each part",
                )

    @property
    def vocab_size(self) -> int:
        return NO + 2

    @property
    def seq_len(self) -> int:
        return self.config.seq_len

    @property
    def fingerprint(self) -> str:
        options = {name: value for name, value in self.config.to_dict().items() if name != "path"}
        return hashlib.sha256(json.dumps([1, options, self._digest], sort_keys=True).encode()).hexdigest()

    @property
    def valid_tokens(self) -> int:
        return self.config.n_test_examples * self.seq_len

    @property
    def test_tokens(self) -> int:
        return self.valid_tokens

    def heads(self, d_model: int) -> dict[str, nn.Module]:
        if self.config.pool == "last":
            return {}
        from hybridnas.data.heads.pool import MeanPool

        return {"mean": MeanPool()}

    def describe(self) -> str:
        uses = ("to train on", "for validation", "for testing")
        counts = ", ".join(f"{len(self._parts[part]):,} {use}" for part, use in zip(PARTS, uses, strict=True))
        return (
            f"{self._name}: pairs of passages of {self._passage:,} bytes, of one document or of two; documents: "
            f"{counts}; always the same answer is right in about 50 %"
        )

    def train_batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        self._require(seq_len)
        return self._batch("train", np.arange(step * batch_size, (step + 1) * batch_size), seed)

    def valid_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        return self._held_out("valid", n_tokens, batch_size, seq_len)

    def test_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        return self._held_out("test", n_tokens, batch_size, seq_len)

    def _held_out(self, part: str, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        self._require(seq_len)
        wanted = min(self.config.n_test_examples, max(1, -(-n_tokens // seq_len)))
        for first in range(0, wanted, batch_size):
            yield self._batch(part, np.arange(first, min(first + batch_size, wanted)), self.config.split_seed)

    def _batch(self, part: str, numbers_B: npt.NDArray[np.int64], seed: int) -> Batch:
        import torch

        own, passage = self._parts[part], self._passage
        draws = Draws(keys_of(numbers_B.astype(np.int64), "retrieval", part, seed))
        places_B2 = draws.distinct(len(own), 2)
        same_B, turned_B = draws.chance(0.5, 1)[:, 0], draws.chance(0.5, 1)[:, 0]
        starts_B2 = draws.uniform(2)
        inputs_BL = np.zeros((len(numbers_B), self.seq_len), dtype=np.int64)
        inputs_BL[:, -1], inputs_BL[:, -2 - passage] = QUESTION, BETWEEN
        for row in range(len(numbers_B)):
            one, other = (self._documents[own[place]] for place in places_B2[row])
            if same_B[row]:  # the second passage is cut from what follows the first
                first = int(starts_B2[row, 0] * (len(one) - 2 * passage + 1))
                rest = one[first + passage :]
            else:
                first, rest = int(starts_B2[row, 0] * (len(one) - passage + 1)), other
            second = int(starts_B2[row, 1] * (len(rest) - passage + 1))
            both = [one[first : first + passage], rest[second : second + passage]]
            left, right = reversed(both) if turned_B[row] else both
            inputs_BL[row, -2 - 2 * passage : -2 - passage] = left
            inputs_BL[row, -1 - passage : -1] = right
        targets_BL = np.zeros_like(inputs_BL)
        targets_BL[:, -1] = NO + same_B
        mask_BL = np.zeros(inputs_BL.shape, dtype=np.bool_)
        mask_BL[:, -1] = True
        head = None if self.config.pool == "last" else "mean"
        return Batch(torch.from_numpy(inputs_BL), torch.from_numpy(targets_BL), torch.from_numpy(mask_BL), head)

    def _require(self, seq_len: int) -> None:
        if seq_len != self.seq_len:
            raise DataError(
                f"data=retrieval has examples of {self.seq_len} tokens, asked for seq_len={seq_len}; "
                f"set data.seq_len={seq_len}, or leave the other one out",
                field="seq_len",
                got=seq_len,
                allowed=self.seq_len,
            )
