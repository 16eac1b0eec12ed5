"""Sequences that are never joined (contigs of a genome, recordings): stored once, cut into windows, held out whole.

A store is a folder of the cache with ``ids.bin`` (one byte an id, memory-mapped) and ``meta.json``: names and lengths
of the pieces, and what reading them found. Windows lie within a piece. In each epoch the windows of a piece tile it
from a random start, in an order over all pieces that is a function of seed and epoch
(:mod:`hybridnas.data.windows`); a piece that is shorter than a window is one window, whose rest is padding that does
not count.

Shapes: B batch, L sequence length.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hybridnas.config import MAX_SEED, option
from hybridnas.data.cache import explaining_disk, lock, publish_folder, read_json, remove, temporary
from hybridnas.data.draws import mix, word
from hybridnas.data.opening import CorpusFile
from hybridnas.data.progress import reporting
from hybridnas.data.source import Batch, Source, SourceConfig
from hybridnas.data.windows import epoch_keys, permute
from hybridnas.errors import ConfigError, DataError
from hybridnas.files import cache_home, write_json
from hybridnas.units import several

FORMAT = 1
UNCOUNTED = np.uint8(128)  # added to an id that is read as context and not predicted, where ids stay below it
PARTS = ("train", "valid", "test")

Ids = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PiecesConfig(SourceConfig):
    """Files of sequences, and which of them are held out."""

    path: str | tuple[str, ...] | None = option(
        None, "files, folders or globs, several separated by commas or as a list"
    )
    valid_names: tuple[str, ...] = option(
        (), "pieces held out for validation, by name, e.g. [chr8]; none: drawn until valid_fraction is reached"
    )
    test_names: tuple[str, ...] = option(
        (), "pieces that only final figures are measured on; none: drawn until test_fraction is reached"
    )
    valid_fraction: float = option(0.05, "share of the ids that is held out for validation [0 to 1]", gt=0, le=0.5)
    test_fraction: float = option(
        0.05, "share of the ids that only final figures are measured on; 0: none [0 to 1]", ge=0, le=0.4
    )
    split_seed: int = option(0, "seed of which pieces are held out", ge=0, le=MAX_SEED)
    cache_dir: str | None = option(
        None, "folder of the stored ids; none: the environment's HYBRIDNAS_CACHE, or ~/.cache/hybridnas"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ConfigError(f"data={self.kind} needs data.path=FILE, FOLDER or GLOB", field="data.path")

    @property
    def cache(self) -> Path:
        """The folder where stored ids are kept."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else cache_home()


class Store(NamedTuple):
    """Ids of all pieces one after another; piece ``p`` is ``ids[bounds[p]:bounds[p + 1]]``."""

    ids: Ids
    bounds: I64
    names: tuple[str, ...]
    facts: Mapping[str, Any]  # what reading the files found
    digest: str  # of the ids


class PieceError(DataError):
    """A file of sequences that cannot be read."""


def open_store(
    kind: str,
    files: Sequence[CorpusFile],
    settings: Mapping[str, Any],
    cache: Path,
    read: Callable[[dict[str, Any]], Iterable[tuple[str, Iterable[Ids]]]],
) -> Store:
    """Return the pieces of files from the cache, or stored now; processes that ask at once store them once.

    ``read`` yields (name, blocks of ids) of each piece and adds what it finds to the facts it is given. ``settings``:
    what else the ids depend on. Raises DataError where there is nothing in the files.
    """
    stamps = [
        [str(file.path.absolute()), file.member, file.path.stat().st_size, file.path.stat().st_mtime_ns]
        for file in files
    ]
    key = json.dumps([FORMAT, kind, dict(settings), stamps], sort_keys=True)
    folder = cache / kind / hashlib.sha256(key.encode()).hexdigest()[:32]
    with explaining_disk(cache), lock(folder):
        found = _load(folder)
        if found is None:
            remove(folder)
            building = temporary(folder)
            building.mkdir(parents=True)
            try:
                _write(building, read)
                publish_folder(building, folder)
            finally:
                remove(building)
            found = _load(folder)
    if found is None:
        names = ", ".join(file.place for file in files[:3])
        raise PieceError(f"data={kind} found nothing to read in {names}", field="data.path", got=names)
    return found


def _write(folder: Path, read: Callable[[dict[str, Any]], Iterable[tuple[str, Iterable[Ids]]]]) -> None:
    digest = hashlib.sha256()
    facts: dict[str, Any] = {}
    names: list[str] = []
    lengths: list[int] = []
    done = 0
    with (folder / "ids.bin").open("wb") as handle, reporting("reading", None) as report:
        for name, blocks in read(facts):
            length = 0
            for block in blocks:
                raw = block.tobytes()
                digest.update(raw)
                handle.write(raw)
                length += len(raw)
                report(done + length)
            done += length
            if length:
                names.append(name)
                lengths.append(length)
    meta = {"format": FORMAT, "names": names, "lengths": lengths, "facts": facts, "digest": digest.hexdigest()}
    write_json(folder / "meta.json", meta)


def _load(folder: Path) -> Store | None:
    meta = read_json(folder / "meta.json")
    file = folder / "ids.bin"
    if meta is None or meta.get("format") != FORMAT or not file.is_file():
        return None
    bounds = np.cumsum([0, *meta["lengths"]], dtype=np.int64)
    if bounds[-1] == 0 or file.stat().st_size != bounds[-1]:
        return None
    ids: Ids = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
    return Store(ids, bounds, tuple(meta["names"]), meta["facts"], str(meta["digest"]))


class PieceSource(Source):
    """Stored pieces as training and held-out batches; subclasses say what the ids stand for."""

    noun = "piece"  # of one sequence, for people
    flagged = False  # whether ids carry the bit UNCOUNTED

    def __init__(self, config: PiecesConfig, store: Store, *, name: str) -> None:
        self.config = config
        self._store = store
        self._name = name
        self._parts = dict(zip(PARTS, self._split(), strict=True))

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    def _split(self) -> tuple[I64, I64, I64]:
        """Return the pieces of each part, as numbers in the store.

        Pieces are drawn in an order that depends on seed and name alone; one that is larger than twice what its part
        should have is left to training, and where none is small enough the smallest is taken.
        """
        config, store = self.config, self._store
        sizes = np.diff(store.bounds)
        numbers = {name: number for number, name in enumerate(store.names)}
        given = {"valid": config.valid_names, "test": config.test_names}
        taken: dict[str, list[int]] = {}
        for part, names in given.items():
            for name in names:
                if name not in numbers:
                    raise DataError(
                        f"data.{part}_names has {name!r}, which is no {self.noun} of {self._name}; it has: "
                        f"{', '.join(store.names[:20])}{' ...' if len(store.names) > 20 else ''}",
                        field=f"data.{part}_names",
                        got=name,
                        allowed=store.names,
                    )
            taken[part] = [numbers[name] for name in names]
        if both := set(taken["valid"]) & set(taken["test"]):
            name = store.names[min(both)]
            raise DataError(
                f"data.valid_names and data.test_names both have {name!r}", field="data.test_names", got=name
            )
        order = sorted(range(len(store.names)), key=lambda number: int(word(config.split_seed, store.names[number])))
        needed = {"valid": config.valid_fraction, "test": config.test_fraction}
        wanted = 1 + sum(fraction > 0 or bool(given[part]) for part, fraction in needed.items())
        if len(store.names) < wanted:
            raise DataError(self._too_few(wanted), field="data.path", got=len(store.names), allowed=f">= {wanted}")
        for part, fraction in needed.items():
            share = fraction * float(sizes.sum())
            free = [number for number in order if number not in taken["valid"] and number not in taken["test"]]
            if given[part] or fraction == 0:
                continue
            for number in free:
                if sizes[taken[part]].sum() < share and sizes[number] <= 2 * share and len(free) > 1:
                    taken[part].append(number)
            taken[part] = taken[part] or [min(free, key=lambda number: int(sizes[number]))]
        held_out = {*taken["valid"], *taken["test"]}
        train = [number for number in range(len(store.names)) if number not in held_out]
        if not train:
            raise DataError(
                f"{self._name}: every {self.noun} is held out; name fewer in data.valid_names and data.test_names",
                field="data.valid_names",
                got=len(store.names),
            )
        parts = (train, sorted(taken["valid"]), sorted(taken["test"]))
        return tuple(np.array(part, dtype=np.int64) for part in parts)  # type: ignore[return-value]

    def _too_few(self, wanted: int) -> str:
        """Return the sentence for fewer pieces than parts."""
        return (
            f"{self._name} has {several(len(self._store.names), self.noun)}, too few to hold some out for validation "
            f"and test, which takes {wanted}; give more files{', or data.test_fraction=0' if wanted > 2 else ''}"
        )

    def _targets(self, part: str) -> I64:
        """Return how many ids of each piece of a part can be predicted: all but the first."""
        return np.diff(self._store.bounds)[self._parts[part]] - 1

    @property
    def fingerprint(self) -> str:
        options = {name: value for name, value in self.config.to_dict().items() if name not in ("path", "cache_dir")}
        split = [part.tolist() for part in self._parts.values()]
        text = json.dumps([FORMAT, options, self._store.digest, np.diff(self._store.bounds).tolist(), split])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def train_tokens(self) -> int:
        return int(self._targets("train").sum())

    @property
    def valid_tokens(self) -> int:
        return int(self._targets("valid").sum())

    @property
    def test_tokens(self) -> int:
        return int(self._targets("test").sum())

    def train_batch(self, step: int, batch_size: int, seq_len: int, seed: int) -> Batch:
        self._require(seq_len)
        samples_B = np.arange(batch_size, dtype=np.int64) + step * batch_size
        pieces_B, starts_B = self._training_windows(samples_B, seq_len, seed)
        return self._gather(pieces_B, starts_B, seq_len, self._turned(samples_B, seed))

    def _turned(self, samples_B: I64, seed: int) -> npt.NDArray[np.bool_] | None:
        """Return which training windows are read as their :meth:`_turn`; None: none of them."""
        return None

    def _turn(self, raw: Ids) -> Ids:
        """Return stored ids as the sequence that is as true as they are, such as the other strand."""
        return raw

    def _training_windows(self, samples_B: I64, seq_len: int, seed: int) -> tuple[I64, I64]:
        """Return piece and start of the windows number ``samples_B``, counted from 0 over epochs."""
        targets_P = self._targets("train")
        counts_P = np.maximum(1, targets_P // seq_len)
        slack_P = np.maximum(0, targets_P - counts_P * seq_len)
        before_P = np.concatenate(([0], np.cumsum(counts_P)))
        per_epoch = int(before_P[-1])
        pieces_B, starts_B = np.empty_like(samples_B), np.empty_like(samples_B)
        for epoch in np.unique(samples_B // per_epoch):
            rows = samples_B // per_epoch == epoch
            keys, offset = epoch_keys(seed, int(epoch), seq_len)
            window = permute((samples_B[rows] % per_epoch).astype(np.uint64), per_epoch, keys).astype(np.int64)
            piece = np.searchsorted(before_P, window, side="right") - 1
            shift = mix(piece.astype(np.uint64) ^ np.uint64(offset)) % (slack_P[piece].astype(np.uint64) + np.uint64(1))
            pieces_B[rows] = self._parts["train"][piece]
            starts_B[rows] = (window - before_P[piece]) * seq_len + shift.astype(np.int64)
        return pieces_B, starts_B

    def valid_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        return self._held_out("valid", n_tokens, batch_size, seq_len)

    def test_batches(self, n_tokens: int, batch_size: int, seq_len: int) -> Iterator[Batch]:
        if not self.test_tokens:
            raise DataError(
                f"{self._name} has no test part, since data.test_fraction=0; set it above 0",
                field="data.test_fraction",
                got=self.config.test_fraction,
            )
        return self._held_out("test", n_tokens, batch_size, seq_len)

    def _held_out(
        self, part: str, n_tokens: int, batch_size: int, seq_len: int, *, turned: bool = False
    ) -> Iterator[Batch]:
        """Yield the same windows of a part at every call, evenly spread over its pieces, none twice."""
        self._require(seq_len)
        counts_P = -(-self._targets(part) // seq_len)
        before_P = np.concatenate(([0], np.cumsum(counts_P)))
        existing = int(before_P[-1])
        wanted = min(existing, max(1, -(-n_tokens // seq_len)))
        windows = (2 * np.arange(wanted) + 1) * existing // (2 * wanted)
        for first in range(0, wanted, batch_size):
            window_B = windows[first : first + batch_size]
            piece_B = np.searchsorted(before_P, window_B, side="right") - 1
            starts_B = (window_B - before_P[piece_B]) * seq_len
            turns_B = np.full(len(window_B), turned)
            batch = self._gather(self._parts[part][piece_B], starts_B, seq_len, turns_B)
            if part == "test":
                batch = batch._replace(documents_BL=_rows(piece_B, seq_len))
            yield batch

    def _gather(self, pieces_B: I64, starts_B: I64, seq_len: int, turned_B: npt.NDArray[np.bool_] | None) -> Batch:
        import torch

        store = self._store
        raw_BN = np.zeros((len(pieces_B), seq_len + 1), dtype=np.uint8)
        counted_BN = np.ones(raw_BN.shape, dtype=np.bool_)
        for row, (piece, start) in enumerate(zip(pieces_B.tolist(), starts_B.tolist(), strict=True)):
            first, end = int(store.bounds[piece]) + start, int(store.bounds[piece + 1])
            raw = store.ids[first : min(end, first + seq_len + 1)]
            raw_BN[row, : len(raw)] = self._turn(raw) if turned_B is not None and turned_B[row] else raw
            counted_BN[row, len(raw) :] = False
        if self.flagged:
            counted_BN &= raw_BN < UNCOUNTED
            raw_BN &= ~UNCOUNTED
        ids_BN = torch.from_numpy(raw_BN.astype(np.int64))
        mask_BL = None if counted_BN[:, 1:].all() else torch.from_numpy(np.ascontiguousarray(counted_BN[:, 1:]))
        return Batch(ids_BN[:, :-1].contiguous(), ids_BN[:, 1:].contiguous(), mask_BL)

    def _require(self, seq_len: int) -> None:
        longest = int(self._targets("train").max())
        if longest < seq_len:
            raise DataError(
                f"{self._name}: the longest {self.noun} to train on has {longest:,} ids to predict, fewer than one "
                f"window of seq_len={seq_len}; give longer ones or a shorter seq_len (at most {longest:,})",
                field="seq_len",
                got=seq_len,
                allowed=f"<= {longest}",
            )


def _rows(piece_B: I64, seq_len: int) -> Any:
    """Return each row's piece as the document of all its places, int64 (B, L)."""
    import torch

    return torch.from_numpy(np.repeat(piece_B.astype(np.int64)[:, None], seq_len, axis=1))
