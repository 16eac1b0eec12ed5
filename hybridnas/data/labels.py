"""``data=labels``: the label or the number of a text, from rows of one's own files, read byte by byte.

Ids: the 256 bytes (0 the filler), 256 the question, and one for each label, in the order of their names. An example is
the filler, the first bytes of a text and the question, whose target is the label; so the output matrix is the
classifier, and what it reads is the last position, or with ``pool=mean`` the mean of all. Equal texts lie in one part.

``target=number`` is regression: a linear head predicts the number at the question, less the mean and over the standard
deviation of the training part. The loss is half the squared error in these units.

It is how the Long Range Arena reads IMDB (arXiv 2011.04006, byte-level text classification), and how DNA in a column of
a table is given a class. Shapes: B batch, L length.
"""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hybridnas.config import MAX_SEED, option
from hybridnas.data.config import DataConfig
from hybridnas.data.opening import CorpusFile
from hybridnas.data.rows import READERS, LeftOut, read_labelled
from hybridnas.data.source import Batch, Source, SourceConfig, register_source
from hybridnas.data.task import shuffled
from hybridnas.data.text import text_files
from hybridnas.errors import ConfigError, DataError
from hybridnas.units import percent, several

if TYPE_CHECKING:
    from torch import nn

    from hybridnas.data.details import Details

QUESTION = 256
FIRST_LABEL = 257
MOST_LABELS = 1000
PARTS = ("train", "valid", "test")


@dataclass(frozen=True, kw_only=True)
class LabelsConfig(SourceConfig):
    """Texts with labels, in rows of jsonl, json, csv, tsv, parquet or arrow."""

    kind: str = option("labels", "kind of data, a name in SOURCES")
    path: str | tuple[str, ...] | None = option(
        None, "files, folders or globs, several separated by commas or as a list"
    )
    text_field: str = option("text", "field of a row that holds the text; a.b: b within a")
    label_field: str = option("label", "field of a row that holds the label, a word or a whole number; a.b: b within a")
    encoding: str | None = option(None, "of the files, such as latin-1; none: UTF-8, or what a byte order mark says")
    skip_bad_rows: bool = option(False, "leave out rows without text or label, counted, rather than stop")
    target: str | None = option(
        None, "number: the field holds figures, which are predicted as such; none: labels", choices=("number",)
    )
    seq_len: int = option(256, "length of an example: of a longer text the beginning is read [tokens]", ge=2)
    pool: str = option(
        "last", "what the label is read from: the last position, or the mean of all", choices=("last", "mean")
    )
    valid_fraction: float = option(0.1, "share of the texts by which candidates are chosen [0 to 1]", gt=0, le=0.4)
    test_fraction: float = option(
        0.1, "share of the texts that only final figures are measured on [0 to 1]", gt=0, le=0.4
    )
    split_seed: int = option(0, "seed of which texts are held out", ge=0, le=MAX_SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ConfigError(f"data={self.kind} needs data.path=FILE, FOLDER or GLOB", field="data.path")

    @property
    def own_seq_len(self) -> int:
        return self.seq_len


@register_source("labels", config=LabelsConfig)
class Labels(Source):
    """Labelled texts as training and held-out examples, all in memory."""

    config: LabelsConfig

    def __init__(self, config: LabelsConfig) -> None:
        self.config = config
        assert config.path is not None
        self._name = config.path if isinstance(config.path, str) else ", ".join(config.path)
        self._left_out = LeftOut()
        rows = [row for file in text_files(config.path) for row in self._read(file)]
        if not rows:
            why = f"; the first row left out: {self._left_out.first}" if self._left_out.count else ""
            raise DataError(f"{self._name} holds no labelled text{why}", field="data.path", got=0)
        self._texts = [text for text, _ in rows]
        if config.target == "number":
            self.labels: list[Any] = []
            self._number_of = np.array([label for _, label in rows], dtype=np.float64)
            self._label_of = np.zeros(len(rows), dtype=np.int64)
        else:
            self.labels = self._find_labels(rows)
            number = {label: place for place, label in enumerate(self.labels)}
            words = isinstance(self.labels[0], str)
            self._label_of = np.array([number[str(label) if words else label] for _, label in rows], dtype=np.int64)
        self._parts = dict(zip(PARTS, self._split(), strict=True))
        if config.target == "number":
            own = self._number_of[self._parts["train"]]
            with np.errstate(over="ignore", invalid="ignore"):
                self._mean, self._deviation = float(own.mean()), float(own.std())
            if not math.isfinite(self._deviation):
                raise DataError(
                    f"{self._name} has numbers in field {config.label_field!r} whose standard deviation is not finite, "
                    f"up to {np.abs(own).max():g}; scale them down, or set data.label_field",
                    field="data.label_field",
                    got=float(np.abs(own).max()),
                    allowed="numbers of a finite standard deviation",
                )
            if not self._deviation:
                raise DataError(
                    f"{self._name} has the same number {self._mean:g} in every row to train on, in field "
                    f"{config.label_field!r}; set data.label_field",
                    field="data.label_field",
                    got=self._mean,
                )

    def _find_labels(self, rows: list[tuple[bytes, Any]]) -> list[Any]:
        """Return the different labels, whole numbers by size, else words; raises DataError for too few or many."""
        config = self.config
        numbers = all(isinstance(label, int) for _, label in rows)
        labels = sorted({label if numbers else str(label) for _, label in rows})
        if not 2 <= len(labels) <= MOST_LABELS:
            raise DataError(
                f"{self._name} has {several(len(labels), 'label')} in field {config.label_field!r}, "
                f"2 to {MOST_LABELS:,} can be told apart; set data.label_field, or data.target=number for figures",
                field="data.label_field",
                got=len(labels),
                allowed=f"2 to {MOST_LABELS}",
            )
        return labels

    def _read(self, file: CorpusFile) -> Iterator[tuple[bytes, str | int | float]]:
        """Yield the beginning of each text that is not empty, and its label or number."""
        config = self.config
        if file.suffix not in READERS:
            raise DataError(
                f"{file.place} has no rows; labelled texts are read from {', '.join(READERS)}",
                field="data.path",
                got=file.suffix,
                allowed=tuple(READERS),
            )
        asked = DataConfig(
            kind="text",
            path=config.path,
            text_field=config.text_field,
            encoding=config.encoding,
            skip_bad_rows=config.skip_bad_rows,
        )
        for text, label in read_labelled(file, asked, config.label_field, self._left_out):
            if config.target == "number":
                label = self._as_number(label, file)
            elif isinstance(label, float) or not isinstance(label, (str, int)):
                raise DataError(
                    f"{file.place} field {config.label_field!r} holds {label!r}, which is no word and no whole number; "
                    f"set data.label_field, or data.target=number for figures",
                    field="data.label_field",
                    got=label,
                    allowed="text or integer",
                )
            if text:
                yield text[: config.seq_len - 1], label

    def _as_number(self, label: Any, file: CorpusFile) -> float:
        """Return a cell as a finite number; raises DataError."""
        try:
            number = float(label)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(label, bool) or not math.isfinite(number):
            raise DataError(
                f"{file.place} field {self.config.label_field!r} holds {reprlib.repr(label)}, no finite number, "
                f"as data.target=number asks for; mend the row, or set data.label_field",
                field="data.label_field",
                got=label,
                allowed="a finite number",
            )
        return number

    def _split(self) -> list[npt.NDArray[np.int64]]:
        """Return the examples of each part, by the hash of their text."""
        config = self.config
        seed = config.split_seed.to_bytes(16, "little")
        draws = [int.from_bytes(hashlib.sha256(seed + text).digest()[:8], "little") / 2**64 for text in self._texts]
        edges = np.cumsum([config.valid_fraction, config.test_fraction])
        part_of = np.searchsorted(edges, np.array(draws), side="right")  # 0 valid, 1 test, 2 train
        parts = [np.flatnonzero(part_of == part) for part in (2, 0, 1)]
        for name, own in zip(PARTS, parts, strict=True):
            if not len(own):
                raise DataError(
                    f"{self._name} has {several(len(self._texts), 'text')}, of which none falls into the {name} part; "
                    f"give more, or raise data.valid_fraction and data.test_fraction",
                    field="data.path",
                    got=len(self._texts),
                )
        return parts

    @property
    def vocab_size(self) -> int:
        return FIRST_LABEL + len(self.labels)

    @property
    def seq_len(self) -> int:
        return self.config.seq_len

    @property
    def fingerprint(self) -> str:
        options = {name: value for name, value in self.config.to_dict().items() if name != "path"}
        options = {name: value for name, value in options.items() if (name, value) != ("target", None)}
        digest = hashlib.sha256(json.dumps([1, options, self.labels], sort_keys=True).encode())
        answers = self._number_of if self.config.target == "number" else self._label_of
        for text, label in zip(self._texts, answers.tolist(), strict=True):
            digest.update(f"{len(text)} {label} ".encode() + text)
        return digest.hexdigest()

    def heads(self, d_model: int) -> dict[str, nn.Module]:
        if self.config.target == "number":
            from hybridnas.data.heads.number import Number

            return {"number": Number(d_model, self.config.pool)}
        if self.config.pool == "last":
            return {}
        from hybridnas.data.heads.pool import MeanPool

        return {"mean": MeanPool()}

    @property
    def train_tokens(self) -> int:
        return len(self._parts["train"]) * self.seq_len

    @property
    def valid_tokens(self) -> int:
        return len(self._parts["valid"]) * self.seq_len

    @property
    def test_tokens(self) -> int:
        return len(self._parts["test"]) * self.seq_len

    def balance(self, part: str) -> dict[str, float]:
        """Return the share of each label in a part [0 to 1], the commonest first; nothing where numbers are asked."""
        if not self.labels:
            return {}
        counts = Counter(self._label_of[self._parts[part]].tolist())
        return {str(self.labels[label]): count / counts.total() for label, count in counts.most_common()}

    def describe(self) -> str:
        counts = ", ".join(f"{len(self._parts[part]):,} {use}" for part, use in
                           zip(PARTS, ("texts to train on", "for validation", "for testing"), strict=True))  # fmt: skip
        without = f" (without {several(self._left_out.count, 'row')})" if self._left_out.count else ""
        read = f"read from {'the last position' if self.config.pool == 'last' else 'the mean of all positions'}"
        after = f"after at most {self.seq_len - 1:,} bytes, {read}"
        if self.config.target == "number":
            about = f"numbers {self._mean:.4g} ± {self._deviation:.4g} (mean, standard deviation) {after}"
            return f"{self._name}{without}: {counts}; {about}; always the mean has loss 0.5 and explains nothing"
        label, share = next(iter(self.balance("valid").items()))
        return (
            f"{self._name}{without}: {counts}; {several(len(self.labels), 'label')} {after}; "
            f"always {label!r} is right in {percent(share)}"
        )

    def details(self, samples: int, seed: int) -> Details:
        from hybridnas.data.details import Details, Sample

        draws = np.random.default_rng(seed).choice(len(self._texts), min(samples, len(self._texts)), replace=False)
        shown = [
            Sample(
                where=f"text {number + 1:,}, {self._answer(number)}",
                text=self._texts[number].decode("utf-8", "replace"),
            )
            for number in sorted(draws.tolist())
        ]
        figures = {
            "texts": len(self._texts),
            "different texts": len(set(self._texts)),
            "bytes of the median text, cut": int(np.median([len(text) for text in self._texts])),
            "labels": len(self.labels),
            "rows left out": self._left_out.count,
        }
        parts: dict[str, dict[str, int | float]]
        if self.config.target == "number":
            del figures["labels"]
            parts = {
                part: {
                    "texts": len(own),
                    "mean": float(self._number_of[own].mean()),
                    "standard deviation": float(self._number_of[own].std()),
                }
                for part, own in self._parts.items()
            }
            return Details(figures=figures, parts=parts, samples=shown)
        parts = {part: {"texts": len(own), "share of the commonest label": next(iter(self.balance(part).values()))}
                 for part, own in self._parts.items()}  # fmt: skip
        return Details(
            figures=figures, parts=parts, shares=self.balance("train"), shares_of="labels to train on", samples=shown
        )

    def _answer(self, number: int) -> str:
        """Return what a text is given, for people."""
        if self.config.target == "number":
            return f"number {self._number_of[number]:g}"
        return f"label {self.labels[self._label_of[number]]}"

    def examples(self, part: str) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """Return the texts of a part, cut, and the numbers of their labels: what a probe reads."""
        own = self._parts[part]
        return [self._texts[number] for number in own.tolist()], self._label_of[own]

    def train_batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        self._require(seq_len)
        own = self._parts["train"]
        return self._batch(own[shuffled(np.arange(step * batch_size, (step + 1) * batch_size), len(own), seed)])

    def valid_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        return self._held_out("valid", n_tokens, batch_size, seq_len)

    def test_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        return self._held_out("test", n_tokens, batch_size, seq_len)

    def _held_out(self, part: str, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        self._require(seq_len)
        own = self._parts[part]
        wanted = min(len(own), max(1, -(-n_tokens // seq_len)))
        chosen = own[(2 * np.arange(wanted) + 1) * len(own) // (2 * wanted)]
        for first in range(0, wanted, batch_size):
            yield self._batch(chosen[first : first + batch_size])

    def _batch(self, numbers_B: npt.NDArray[np.int64]) -> Batch:
        import torch

        inputs_BL = np.zeros((len(numbers_B), self.seq_len), dtype=np.int64)
        inputs_BL[:, -1] = QUESTION
        for row, number in enumerate(numbers_B.tolist()):
            text = np.frombuffer(self._texts[number], dtype=np.uint8)
            inputs_BL[row, self.seq_len - 1 - len(text) : -1] = text
        targets_BL = np.zeros_like(inputs_BL)
        numeric = self.config.target == "number"
        targets_BL[:, -1] = QUESTION if numeric else FIRST_LABEL + self._label_of[numbers_B]
        mask_BL = np.zeros(inputs_BL.shape, dtype=np.bool_)
        mask_BL[:, -1] = True
        inputs, targets, mask = (torch.from_numpy(array) for array in (inputs_BL, targets_BL, mask_BL))
        if numeric:
            values_BL = np.zeros(inputs_BL.shape, dtype=np.float32)
            values_BL[:, -1] = (self._number_of[numbers_B] - self._mean) / self._deviation
            return Batch(inputs, targets, mask, "number", values_BL=torch.from_numpy(values_BL))
        return Batch(inputs, targets, mask, None if self.config.pool == "last" else "mean")

    def _require(self, seq_len: int) -> None:
        if seq_len != self.seq_len:
            raise DataError(
                f"data=labels has examples of {self.seq_len} tokens, asked for seq_len={seq_len}; "
                f"set data.seq_len={seq_len}, or leave the other one out",
                field="seq_len",
                got=seq_len,
                allowed=self.seq_len,
            )
