"""What the user can say about text: where it lies, how it is tokenised, what is held out."""

from __future__ import annotations

import codecs
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from hybridnas.config import MAX_SEED, option
from hybridnas.data.source import SourceConfig
from hybridnas.errors import ConfigError
from hybridnas.files import cache_home

DEFAULT_BPE_VOCAB = 4096
DEFAULT_HUB_BYTES = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class DataConfig(SourceConfig):
    """Text from the standard library, from files, or from a dataset on the Hugging Face hub."""

    path: str | tuple[str, ...] | None = option(
        None, "files, folders or globs, several separated by commas or as a list", kinds=("text",)
    )
    name: str | None = option(None, "name of the dataset, e.g. allenai/c4, or a local dataset folder", kinds=("hub",))
    config: str | None = option(None, "configuration of the dataset, e.g. en", kinds=("hub",))
    split: str = option("train", "split of the dataset that is read", kinds=("hub",))
    revision: str | None = option(None, "branch, tag or commit; none: the newest at the first reading", kinds=("hub",))
    text_field: str = option(
        "text", "field of a row that holds the text, texts or chat messages; a.b: b within a", kinds=("text", "hub")
    )
    chat_template: str | None = option(
        None,
        "Jinja template from messages to text where text_field holds chat messages; none: 'ROLE: CONTENT' lines",
        kinds=("text", "hub"),
    )
    encoding: str | None = option(
        None, "of the files, such as latin-1; none: UTF-8, or what a byte order mark says", kinds=("text",)
    )
    split_files: str = option(
        "auto",
        "cut plain files at line ends into documents of 1 to 32 KiB; auto: only when fewer than 16 files are read",
        choices=("auto", "always", "never"),
        kinds=("text",),
    )
    skip_bad_files: bool = option(False, "leave out files that are not UTF-8 text, rather than stop", kinds=("text",))
    skip_bad_rows: bool | None = option(
        None,
        "leave out rows that are no JSON or have no text in text_field, counted, rather than stop; none: stop",
        kinds=("text", "hub"),
    )
    max_bytes: int | None = option(
        None, f"read no more text than this [bytes]; none: all files, {DEFAULT_HUB_BYTES:,} of a hub dataset", ge=1
    )
    tokenizer: str = option(
        "bytes", "bytes, bpe (trained on the corpus; bpe:8192 sets its size), or a Hugging Face tokenizer, name or path"
    )
    vocab_size: int | None = option(
        None, f"tokenizer=bpe: size of its vocabulary [tokens]; none: {DEFAULT_BPE_VOCAB}", ge=257
    )
    separator: str | None = option(
        None, "token put after each document, for a Hugging Face tokenizer; none: its own end-of-text token"
    )
    pack: str | None = option(
        None,
        "documents: those in one window do not see each other, and nothing is predicted across a document's end; none: "
        "a window is one stream",
        choices=("documents",),
    )
    valid_fraction: float = option(
        0.05, "share of the documents held out for validation, by which candidates are chosen [0 to 1]", gt=0, le=0.5
    )
    test_fraction: float = option(
        0.05, "share of the documents that only final figures are measured on; 0: none [0 to 1]", ge=0, le=0.4
    )
    split_seed: int = option(0, "seed of which documents are held out", ge=0, le=MAX_SEED)
    cache_dir: str | None = option(
        None, "folder of tokenised shards; none: the environment's HYBRIDNAS_CACHE, or ~/.cache/hybridnas"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_kind()
        self._check_encoding()
        self._check_tokenizer()

    def _check_kind(self) -> None:
        for field in dataclasses.fields(self):
            kinds, value = field.metadata.get("kinds"), getattr(self, field.name)
            if kinds and field.default is None and value is not None and self.kind not in kinds:
                raise ConfigError(
                    f"data {field.name}={value!r} goes with data={kinds[0]}, not with data={self.kind}",
                    field=f"data.{field.name}",
                    got=value,
                )
        if self.kind == "text" and not self.path:
            raise ConfigError("data=text needs data.path=FILE, FOLDER or GLOB", field="data.path")
        if self.kind == "hub" and not self.name:
            raise ConfigError(
                "data=hub needs data.name=DATASET, e.g. data.name=allenai/c4 data.config=en", field="data.name"
            )

    def _check_encoding(self) -> None:
        try:
            known = self.encoding is None or codecs.lookup(self.encoding)._is_text_encoding
        except LookupError:
            known = False
        if not known:
            raise ConfigError(
                f"data encoding={self.encoding!r} is no text encoding of Python; leave it out, or give a name such as "
                f"latin-1, cp1252 or utf-16",
                field="data.encoding",
                got=self.encoding,
                allowed="a text encoding of Python",
            )

    def _check_tokenizer(self) -> None:
        kind, _, size = self.tokenizer.partition(":")
        if kind == "bpe" and size:
            if not size.isdigit() or int(size) < 257:
                raise ConfigError(
                    f"data tokenizer={self.tokenizer!r} must be bpe:SIZE with a SIZE of at least 257",
                    field="data.tokenizer",
                    got=self.tokenizer,
                    allowed="bpe:SIZE with SIZE >= 257",
                )
            if self.vocab_size not in (None, int(size)):
                raise ConfigError(
                    f"data tokenizer={self.tokenizer!r} and vocab_size={self.vocab_size} disagree",
                    field="data.vocab_size",
                    got=self.vocab_size,
                    allowed=int(size),
                )
        elif kind != "bpe" and self.vocab_size is not None:
            raise ConfigError(
                f"data vocab_size={self.vocab_size} goes with tokenizer=bpe; {self.tokenizer!r} has a size of its own",
                field="data.vocab_size",
                got=self.vocab_size,
            )
        if self.separator is not None and (kind == "bpe" or self.tokenizer == "bytes"):
            raise ConfigError(
                f"data separator={self.separator!r}: tokenizer={self.tokenizer!r} has one of its own",
                field="data.separator",
                got=self.separator,
            )

    @property
    def bpe_vocab(self) -> int | None:
        """Vocabulary of the BPE to train [tokens], or None for another tokenizer."""
        kind, _, size = self.tokenizer.partition(":")
        if kind != "bpe":
            return None
        return int(size) if size else (self.vocab_size or DEFAULT_BPE_VOCAB)

    @property
    def cache(self) -> Path:
        """The folder where tokenised shards and trained tokenizers are kept."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else cache_home()
