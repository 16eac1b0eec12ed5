"""``data=dna``: genomes in FASTA and 2bit files, one id a nucleotide, windows within one contig, split by contig.

Ids: 0 the end of a contig, 1 to 5 A C G T N; with ``lower=apart`` 6 to 10 a c g t n. Each contig is read with an end on
both sides. U is read as T, and the other letters of IUPAC's code for what is uncertain (R Y S W K M B D H V) as N.

Reverse complement: the two strands of DNA say the same. ``reverse_complement=true`` reads half of all training windows
as the other strand, drawn by seed and step, and measures held-out windows on both, so that a score does not depend on
the strand that was sequenced (as in Caduceus, arXiv 2403.03234, whose model is equivariant by construction).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hybridnas.config import option
from hybridnas.data.copies import WINDOW, CopyFinder
from hybridnas.data.details import Details, Sample
from hybridnas.data.draws import Draws, keys_of
from hybridnas.data.opening import UNSOUND, CorpusFile, open_text
from hybridnas.data.pieces import I64, PARTS, UNCOUNTED, Ids, PieceError, PiecesConfig, PieceSource, Store, open_store
from hybridnas.data.source import Batch, register_source
from hybridnas.data.text import text_files
from hybridnas.data.tokenizers import END_OF_TEXT, FastTokenizer, Tokenizer
from hybridnas.units import several

SUFFIXES = (".fa", ".fasta", ".fna", ".ffn", ".fas", ".2bit")
LETTERS = "ACGTNacgtn"  # of the ids from 1 on
UNCERTAIN = "RYSWKMBDHV"
END = 0
_BLOCK = 1 << 20  # ids handed on at a time
_BAD = 255
_LEAST_SEGMENT = 1024  # bases


@dataclass(frozen=True, kw_only=True)
class DnaConfig(PiecesConfig):
    """Genomes in FASTA and 2bit files."""

    kind: str = option("dna", "kind of data, a name in SOURCES")
    lower: str = option(
        "same",
        "lower case, which marks repeats: read as upper case, as ids apart, or as context that is not predicted",
        choices=("same", "apart", "skip"),
    )
    unknown: str = option(
        "skip",
        "N: read as context that is not predicted, predicted like any base, or a contig ends there",
        choices=("skip", "predict", "cut"),
    )
    reverse_complement: bool = option(
        False, "read half of the training windows as the other strand, and measure held-out ones on both"
    )
    split_by: str = option(
        "contig",
        "what is held out: whole contigs, or segments of a 64th of all bases, for a genome of few contigs",
        choices=("contig", "segment"),
    )


def letters_table(lower: str, unknown: str) -> bytes:
    """Return the table of 256 bytes from a character of FASTA to its stored id, 255 where it is no nucleotide."""
    table = np.full(256, _BAD, dtype=np.uint8)
    for number, letter in enumerate(LETTERS, start=1):
        own = number if number <= 5 or lower == "apart" else number - 5
        skipped = (letter in "Nn" and unknown == "skip") or (letter.islower() and lower == "skip")
        table[ord(letter)] = own + (int(UNCOUNTED) if skipped else 0)
    for one, other in (*((letter, "N") for letter in UNCERTAIN), ("U", "T")):
        table[ord(one)], table[ord(one.lower())] = table[ord(other)], table[ord(other.lower())]
    return table.tobytes()


def complement_table() -> Ids:
    """Return the table of 256 stored ids to those of the opposite bases; what is not predicted stays so."""
    pairs = dict(zip("ACGTNacgtn", "TGCANtgcan", strict=True))
    table = np.arange(256, dtype=np.uint8)
    for number, letter in enumerate(LETTERS, start=1):
        other = LETTERS.index(pairs[letter]) + 1
        table[number], table[number | int(UNCOUNTED)] = other, other | int(UNCOUNTED)
    return table


def fasta_lines(file: CorpusFile) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line) of a FASTA file that is not empty, line ends left out; raises DataError."""
    with open_text(file, None) as handle:
        try:
            for number, line in enumerate(handle, start=1):
                if stripped := line.strip():
                    yield number, stripped
        except UNSOUND as error:
            raise PieceError(f"{file.place} is not soundly packed ({error}); unpack or remove it") from None


def read_fasta(file: CorpusFile, config: DnaConfig, facts: dict[str, Any]) -> Iterator[tuple[int, str, bytes]]:
    """Yield (line of the contig's header, its name, stored ids) line by line.

    Raises DataError that names the file, the line and the character for what is no FASTA of nucleotides.
    """
    table = letters_table(config.lower, config.unknown)
    lower = bytes(range(97, 123))
    name, header = "", 0
    for number, line in fasta_lines(file):
        if line.startswith(b">"):
            header, words = number, line[1:].split()
            name = words[0].decode("utf-8", "replace") if words else f"line{number}"
        elif line.startswith(b";"):  # a remark, in files of the first FASTA programs
            continue
        elif not name:
            raise PieceError(
                f"{file.place} line {number} is not FASTA: a header '>NAME' must come first, got {line[:20]!r}",
                field="data.path",
                got=line[:20].decode("latin-1"),
                allowed=">NAME",
            )
        else:
            ids = line.translate(table)
            if (place := ids.find(_BAD)) >= 0:
                wrong = chr(line[place])
                raise PieceError(
                    f"{file.place} line {number} has {wrong!r} at character {place + 1}, which is no nucleotide; "
                    f"allowed are A C G T U N and IUPAC's {' '.join(UNCERTAIN)}: protein and aligned sequences are "
                    f"not read",
                    field="data.path",
                    got=wrong,
                    allowed=tuple("ACGTUN" + UNCERTAIN),
                )
            facts["lower"] = facts.get("lower", 0) + len(line) - len(line.translate(None, lower))
            yield header, name, ids


def read_2bit(file: CorpusFile, config: DnaConfig, facts: dict[str, Any]) -> Iterator[tuple[int, str, bytes]]:
    """Yield (number of the contig, its name, stored ids) of a 2bit file, block by block; raises PieceError."""
    if file.member or file.path.suffix.lower() != ".2bit":
        raise PieceError(f"{file.place} is 2bit in a packed file; unpack it", field="data.path", got=file.name)
    try:
        from twobitreader import TwoBitFile, TwoBitFileError
    except ImportError as error:
        raise PieceError(
            f"{file.place} is 2bit, which is read with the package twobitreader ({error}); "
            f"pip install 'hybridnas[dna]', or convert it with twoBitToFa",
            field="data.path",
            got=".2bit",
        ) from None
    table = letters_table(config.lower, config.unknown)
    lower = bytes(range(97, 123))
    try:
        with TwoBitFile(str(file.path)) as genome:
            for number, (name, sequence) in enumerate(sorted(genome.items()), start=1):
                for start in range(0, len(sequence), _BLOCK):
                    letters = str(sequence[start : min(len(sequence), start + _BLOCK)]).encode()
                    facts["lower"] = facts.get("lower", 0) + len(letters) - len(letters.translate(None, lower))
                    yield number, str(name), letters.translate(table)
    except (TwoBitFileError, OSError, IndexError, ValueError, EOFError) as error:
        raise PieceError(
            f"{file.place} cannot be read as 2bit: {' '.join(str(error).split()) or type(error).__name__}; mend or "
            f"remove it",
            field="data.path",
            got=str(file.path),
        ) from None


def contigs(
    files: Sequence[CorpusFile], config: DnaConfig, facts: dict[str, Any]
) -> Iterator[tuple[str, Iterator[Ids]]]:
    """Yield name and blocks of stored ids of each contig, an end on both sides; a contig without bases is left out.

    A name that comes twice gets its file's name in front. With ``unknown=cut`` runs of N end a contig, whose parts are
    NAME:START with the first base counted from 1.
    """
    seen: set[str] = set()
    for file in files:
        own: set[str] = set()
        read = read_2bit if file.suffix == ".2bit" else read_fasta
        for header, lines in _grouped(read(file, config, facts)):
            if header in own:
                raise PieceError(
                    f"{file.place} has two contigs {header!r}; give them different names", field="data.path", got=header
                )
            own.add(header)
            title = header if header not in seen else f"{file.key}/{header}"
            seen.add(title)
            for start, blocks in _cut(lines, config):
                yield (title if start is None else f"{title}:{start}"), _framed(blocks)


def _grouped(lines: Iterator[tuple[int, str, bytes]]) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Yield each contig's name and its lines."""
    for (_, name), group in itertools.groupby(lines, key=operator.itemgetter(0, 1)):
        yield name, (ids for _, _, ids in group)


def _cut(lines: Iterator[bytes], config: DnaConfig) -> Iterator[tuple[int | None, Iterator[Ids]]]:
    """Yield (first base counted from 1, or None for a whole contig; blocks) of the parts of a contig."""
    if config.unknown != "cut":
        yield None, _blocks(lines)
        return
    unknown = [LETTERS.index(letter) + 1 for letter in "Nn"]
    whole = np.frombuffer(b"".join(lines), dtype=np.uint8)  # one contig at a time
    known = ~np.isin(whole & ~UNCOUNTED, unknown)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], known, [False])).astype(np.int8))).reshape(-1, 2)
    for start, stop in edges.tolist():
        part = whole[start:stop]
        yield (None if len(part) == len(whole) else start + 1), iter([part])


def _blocks(lines: Iterator[bytes]) -> Iterator[Ids]:
    held: list[bytes] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= _BLOCK:
            yield np.frombuffer(b"".join(held), dtype=np.uint8)
            held, size = [], 0
    if held:
        yield np.frombuffer(b"".join(held), dtype=np.uint8)


def _framed(blocks: Iterator[Ids]) -> Iterator[Ids]:
    end = np.array([END], dtype=np.uint8)
    yield end
    yield from blocks
    yield end


def segmented(store: Store, length: int) -> Store:
    """Return the same ids with each contig in parts of about ``length``, named NAME:START, counted from 1."""
    bounds, names = [0], []
    for name, start, stop in zip(store.names, store.bounds[:-1].tolist(), store.bounds[1:].tolist(), strict=True):
        count = max(1, round((stop - start) / length))
        edges = np.linspace(start, stop, count + 1).astype(np.int64).tolist()
        bounds += edges[1:]
        names += [f"{name}:{max(1, edge - start)}" for edge in edges[:-1]] if count > 1 else [name]
    return store._replace(bounds=np.array(bounds, dtype=np.int64), names=tuple(names))


@register_source("dna", config=DnaConfig)
class DnaSource(PieceSource):
    """Genomes as training and held-out windows."""

    noun = "contig"
    flagged = True
    config: DnaConfig
    _complement: ClassVar[Ids] = complement_table()

    def __init__(self, config: DnaConfig) -> None:
        assert config.path is not None
        files = text_files(config.path, SUFFIXES, cache=config.cache)
        words = config.path if isinstance(config.path, str) else ", ".join(config.path)

        settings = {"lower": config.lower, "unknown": config.unknown}
        store = open_store("dna", files, settings, config.cache, lambda facts: contigs(files, config, facts))
        blocks = (store.ids[first : first + _BLOCK] for first in range(0, len(store.ids), _BLOCK))
        if not any(((raw != END) & (raw < UNCOUNTED)).any() for raw in blocks):
            raise PieceError(
                f"{words} has no base that is predicted: every one is N, or in lower case with data.lower=skip; give "
                f"another genome, or set data.unknown=predict",
                field="data.path",
                got=0,
                allowed=">= 1 base",
            )
        if config.split_by == "segment":
            self.noun = "segment"
            store = segmented(store, max(_LEAST_SEGMENT, len(store.ids) // 64))
        super().__init__(config, store, name=words)

    @property
    def vocab_size(self) -> int:
        return 11 if self.config.lower == "apart" else 6

    @property
    def token_lengths(self) -> npt.NDArray[np.int64]:
        return np.array([0, *[1] * (self.vocab_size - 1)], dtype=np.int64)

    @property
    def unit(self) -> tuple[str, int]:
        return "base", 1

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return dna_tokenizer(self.config.lower)

    def _too_few(self, wanted: int) -> str:
        by = ", or data.split_by=segment" if self.config.split_by == "contig" else ""
        return f"{super()._too_few(wanted)}{by}"

    def describe(self) -> str:
        uses = ("to train on", "for validation", "for testing")
        parts = [f"{self._counts(part)} {use}" for part, use in zip(PARTS, uses, strict=True) if len(self._parts[part])]
        strands = "both strands" if self.config.reverse_complement else "one strand"
        return f"{self._name}: {'; '.join(parts)}; {strands}, {self.vocab_size} ids, 1 base per token"

    def _counts(self, part: str) -> str:
        numbers = self._parts[part]
        which = f" ({', '.join(self._store.names[number] for number in numbers)})" if len(numbers) <= 3 else ""
        return f"{several(len(numbers), self.noun)}{which}, {self._bases(part):,} bases"

    def _bases(self, part: str) -> int:
        """Return the ids of a part that stand for a base."""
        return sum(int((raw & ~UNCOUNTED != END).sum()) for number in self._parts[part] for raw in self._read(number))

    def _read(self, number: int) -> Iterator[Ids]:
        """Yield the stored ids of a piece in blocks."""
        start, stop = self._store.bounds[number : number + 2].tolist()
        for first in range(start, stop, _BLOCK):
            yield self._store.ids[first : min(stop, first + _BLOCK)]

    def _turned(self, samples_B: I64, seed: int) -> npt.NDArray[np.bool_] | None:
        if not self.config.reverse_complement:
            return None
        turned_B: npt.NDArray[np.bool_] = Draws(keys_of(samples_B, "strand", seed)).chance(0.5, 1)[:, 0]
        return turned_B

    def _turn(self, raw: Ids) -> Ids:
        return self._complement[raw[::-1]]

    def valid_parts(self, n_tokens: int, batch_size: int, seq_len: int) -> dict[str, Iterator[Batch]]:
        return self._strands("valid", n_tokens, batch_size, seq_len)

    def test_parts(self, n_tokens: int, batch_size: int, seq_len: int) -> dict[str, Iterator[Batch]]:
        return self._strands("test", n_tokens, batch_size, seq_len)

    def _strands(self, part: str, n_tokens: int, batch_size: int, seq_len: int) -> dict[str, Iterator[Batch]]:
        """Return a part's windows, with ``reverse_complement`` those of each strand by itself."""
        if not self.config.reverse_complement:
            return {"": (self.test_batches if part == "test" else self.valid_batches)(n_tokens, batch_size, seq_len)}
        share = -(-n_tokens // 2)
        return {
            name: self._held_out(part, share, batch_size, seq_len, turned=turned)
            for name, turned in (("forward", False), ("reverse", True))
        }

    def details(self, samples: int, seed: int) -> Details:
        store = self._store
        counts = np.zeros(256, dtype=np.int64)
        for number in range(len(store.names)):
            for raw in self._read(number):
                counts += np.bincount(raw & ~UNCOUNTED, minlength=256)
        by_letter = {letter: int(counts[number]) for number, letter in enumerate(LETTERS, start=1)}
        bases = sum(by_letter.values())
        known = max(1, sum(by_letter[letter] for letter in "ACGTacgt"))
        figures = {
            f"{self.noun}s": len(store.names),
            "bases": bases,
            f"ids of the longest {self.noun}": int(np.diff(store.bounds).max()),
            "share of G and C": sum(by_letter[letter] for letter in "GCgc") / known,
            "share of lower case": int(store.facts.get("lower", 0)) / max(1, bases),
            "different ids": self.vocab_size,
        }
        finder = CopyFinder(
            text.tobytes() for part in PARTS[1:] for number in self._parts[part] for text in self._texts(number)
        )
        for number in self._parts["train"]:
            for text in self._texts(number):
                finder.read(text.tobytes())
                finder.read(self._turn(text).tobytes())
        parts = {}
        for part in PARTS:
            own: dict[str, int | float] = {f"{self.noun}s": len(self._parts[part]), "bases": self._bases(part)}
            if part != "train":
                texts = (text.tobytes() for number in self._parts[part] for text in self._texts(number))
                masks = [finder.copied(text) for text in texts]
                copied = sum(int(mask.sum()) for mask in masks) / max(1, sum(map(len, masks)))
                own[f"copied from train, either strand, runs of {WINDOW} bases"] = copied
            parts[part] = own
        ordered = sorted(by_letter.items(), key=lambda item: -item[1])
        shares = {letter: count / max(1, bases) for letter, count in ordered if count}
        return Details(
            figures=figures, parts=parts, shares=shares, shares_of="bases", samples=self._samples(samples, seed)
        )

    def _texts(self, number: int) -> Iterator[Ids]:
        """Yield a piece as ids without marks, in blocks that overlap so far that no run of WINDOW ids is missed."""
        start, stop = self._store.bounds[number : number + 2].tolist()
        for first in range(start, stop, _BLOCK):
            yield self._store.ids[first : min(stop, first + _BLOCK + WINDOW - 1)] & ~UNCOUNTED

    def _samples(self, count: int, seed: int) -> list[Sample]:
        """Return so many places of 80 bases, each equally likely."""
        store, shown = self._store, []
        for place in np.random.default_rng(seed).integers(0, len(store.ids), count).tolist():
            number = int(np.searchsorted(store.bounds, place, side="right")) - 1
            raw = store.ids[place : min(place + 80, int(store.bounds[number + 1]))] & ~UNCOUNTED
            text = "".join(LETTERS[one - 1] for one in raw.tolist() if one != END)
            where = f"{store.names[number]} from base {max(1, place - int(store.bounds[number])):,}"
            shown.append(Sample(where=where, text=text))
        return shown


def dna_tokenizer(lower: str) -> Tokenizer:
    """Return the tokenizer of these ids, a byte-level one without merges; id 0, the end of a contig, separates."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    letters = LETTERS if lower == "apart" else LETTERS[:5]
    vocab = {END_OF_TEXT: END, **{letter: number for number, letter in enumerate(letters, start=1)}}
    fast = Fast(models.BPE(vocab=vocab, merges=[], unk_token="N"))
    if lower != "apart":
        fast.normalizer = normalizers.Sequence([normalizers.Replace(one.lower(), one) for one in LETTERS[:5]])
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([END_OF_TEXT])
    return FastTokenizer(fast, separator=END, kind="dna")
