"""Rows of a file as texts: json lines, json, csv, tsv, parquet, arrow; notebooks and web pages, each one document.

Of a row one field is text: ``data.text_field``, with dots into nested objects. It may hold text, a list of texts, or a
list of chat messages. A row without is refused, or left out and counted where ``data.skip_bad_rows`` says so.
"""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from typing import IO, Any

from hybridnas.data.config import DataConfig
from hybridnas.data.opening import UNSOUND, CorpusFile, NotTextError, open_bytes, open_text
from hybridnas.errors import DataError, suggest

Row = tuple[Callable[[], Any], str]  # what reads a row's fields (raises BadRowError), and where it stands
Reader = Callable[[CorpusFile, DataConfig, Sequence[str]], Iterator[Row]]  # given the fields that are needed
TABLES = (".parquet", ".arrow")  # binary
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
_LONGEST_INTEGER = 4000  # digits; Python refuses longer ones, and no field of text has them
_MEND = "mend or remove it, or set data.skip_bad_rows=true"
_SEPARATORS = (",", ";", "\t", "|")


class BadRowError(DataError):
    """A row without the text that was asked for, among others that may have it."""


class LeftOut:
    """Rows that were left out: how many, and what was wrong with the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first = ""

    def add(self, error: BadRowError) -> None:
        """Count one more."""
        self.count += 1
        self.first = self.first or str(error)


def row_text(row: Any, config: DataConfig, where: str) -> bytes:
    """Return the text of a row as UTF-8; raises BadRowError that opens with ``where`` if there is none."""
    text = _as_text(field_of(row, config.text_field, where, "text_field"), config, where)
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise BadRowError(
            f"{where} field {config.text_field!r} holds half a surrogate pair, which is not text"
        ) from None


def field_of(row: Any, name: str, where: str, setting: str) -> Any:
    """Return what a row has under a name, ``a.b`` being b within a; ``setting`` is where the name was given.

    Raises BadRowError that opens with ``where`` where there is none.
    """
    if not isinstance(row, Mapping):
        raise BadRowError(
            f"{where} is not an object of named fields but {type(row).__name__}; {_MEND}",
            field="data.path",
            got=type(row).__name__,
            allowed="an object of named fields",
        )
    value: Any = row
    for part in (name,) if name in row else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            have = value if isinstance(value, Mapping) else row
            close = suggest(part, map(str, have)).replace("allowed", "it has")
            raise BadRowError(
                f"{where} has no field {name!r}{close}; set data.{setting}",
                field=f"data.{setting}",
                got=name,
                allowed=tuple(map(str, have)),
            )
        value = value[part]
    return value


def _as_text(value: Any, config: DataConfig, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return "\n".join(value)
    if isinstance(value, (list, tuple)) and all(isinstance(one, Mapping) and "role" in one for one in value):
        return _chat([_message(one) for one in value], config.chat_template or CHAT_TEMPLATE)
    kind = type(value).__name__
    raise BadRowError(
        f"{where} field {config.text_field!r} is {kind}, not text, texts or messages with role and content; "
        f"set data.text_field",
        field="data.text_field",
        got=kind,
        allowed="text, a list of texts, or a list of messages",
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose content is one text: some formats give it in parts."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
    return {**message, "content": "" if content is None else content}


def _chat(messages: list[dict[str, Any]], template: str) -> str:
    try:
        return str(_template(template).render(messages=messages))
    except Exception as error:  # a template computes: it may raise whatever Python does
        raise DataError(
            f"data chat_template={template!r} cannot be filled in: {str(error) or type(error).__name__}; it gets "
            f"messages, each with role and content",
            field="data.chat_template",
            got=template,
            allowed="a Jinja template",
        ) from None


@functools.lru_cache(maxsize=4)
def _template(text: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template may come with the data

    return ImmutableSandboxedEnvironment().from_string(text)


def _json_lines(file: CorpusFile, config: DataConfig, fields: Sequence[str]) -> Iterator[Row]:
    with open_text(file, config.encoding) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                where = f"{file.place} line {number}"
                yield functools.partial(_parse, line, where), where


def _json(file: CorpusFile, config: DataConfig, fields: Sequence[str]) -> Iterator[Row]:
    with open_text(file, config.encoding) as handle:
        rows = _parse(handle.read(), file.place)
    if not isinstance(rows, list):
        raise DataError(
            f"{file.place} is not a list of objects but {type(rows).__name__}; lines of objects go into a .jsonl file, "
            f"and a copy that ends in .txt is read as it stands",
            field="data.path",
            got=type(rows).__name__,
            allowed="a list of objects",
        )
    for number, row in enumerate(rows, start=1):
        yield functools.partial(_given, row), f"{file.place} item {number}"


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise BadRowError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise BadRowError(f"{where} is not JSON: {error.msg} at character {error.pos + 1}; {_MEND}") from None
    except RecursionError:
        raise BadRowError(f"{where} is nested too deeply to be read; {_MEND}") from None


def _given(row: Any) -> Any:
    """Return a row that needs no reading."""
    return row


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else digits


def _separated(file: CorpusFile, config: DataConfig, fields: Sequence[str]) -> Iterator[Row]:
    """Yield cells as the text that stands there: csv knows no missing value and no number."""
    csv.field_size_limit(1 << 30)
    begin = 2
    with open_text(file, config.encoding) as handle:
        text = io.TextIOWrapper(handle, encoding="utf-8", newline="")
        try:
            header = text.readline()
            names = next(csv.reader([header]), [])
            separator = "\t" if file.suffix == ".tsv" else _separator(header, fields[0])
            names = next(csv.reader([header], delimiter=separator), [])
            reader = csv.reader(text, delimiter=separator, strict=True)
            for number, cells in enumerate(reader, start=1):
                begin = reader.line_num + 2  # of the next row; the header is line 1
                if cells:  # an empty line is no row
                    row = dict(zip(names, cells, strict=False))
                    yield functools.partial(_given, row), f"{file.place} row {number}"
        except UnicodeDecodeError as error:
            raise NotTextError(
                f"{file.place} is not UTF-8 text: {error.reason}; set data.encoding, convert it to UTF-8, or leave it "
                f"out of data.path"
            ) from None
        except csv.Error as error:
            raise DataError(
                f"{file.place} cannot be read as csv: {error}, in the row that begins on line {begin}; mend the quotes "
                f"of that row, or remove it",
                field="data.path",
                got=begin,
                allowed="quotes that are closed",
            ) from None


def _separator(header: str, field: str) -> str:
    """Return the first separator by which the header has the field of text, else the comma."""
    return next((one for one in _SEPARATORS if field in next(csv.reader([header], delimiter=one), [])), ",")


def _table(file: CorpusFile, config: DataConfig, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    with open_bytes(file) as opened:
        handle: IO[bytes] = io.BytesIO(opened.read()) if not opened.seekable() else opened
        try:
            if file.suffix == ".parquet":
                table = pq.ParquetFile(handle)
                names = table.schema_arrow.names
                batches = table.iter_batches(columns=_columns(names, fields))
            else:
                names, batches = None, _arrow(handle, pa)
            for batch in batches:
                held = batch.schema.names
                own = names or held
                wanted = _columns(own, fields)
                lacks = next((place for place, field in enumerate(fields) if not _columns(own, [field])), None)
                needed = batch.select([place for place, name in enumerate(held) if name in wanted])
                for row in _values(needed, number, file):
                    number += 1
                    where = f"{file.place} row {number}"
                    read = functools.partial(_given, row)
                    if lacks is not None:
                        setting = ("text_field", "label_field")[lacks]
                        read = functools.partial(field_of, dict.fromkeys(own), fields[lacks], where, setting)
                    yield read, where
        except (pa.ArrowException, OSError) as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{file.place} cannot be read as {file.suffix[1:]}: {words}") from None


def _columns(names: Sequence[str], fields: Sequence[str]) -> list[str]:
    """Return the columns that hold the fields; none where one of them is missing: no row is of use then."""
    found = [next((one for one in (field, field.partition(".")[0]) if one in names), None) for field in fields]
    return [] if None in found else sorted({one for one in found if one is not None})


def _values(batch: Any, before: int, file: CorpusFile) -> list[dict[str, Any]]:
    """Return the rows of a batch that follows so many; raises DataError for a value that Python does not hold."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except (OverflowError, ValueError) as error:  # a far date; what is not UTF-8 in a column of text
        columns = ", ".join(map(repr, batch.schema.names))
        raise DataError(
            f"{file.place} rows {before + 1:,} to {before + batch.num_rows:,} hold a value in {columns} that cannot be "
            f"read: {error}; mend or remove it, or read another column",
            field="data.path",
            got=str(error),
            allowed="UTF-8 text, and dates of the years 1 to 9999",
        ) from None


def _arrow(handle: IO[bytes], pa: Any) -> Iterator[Any]:
    """Yield the batches of an arrow file, or of a stream, as ``datasets`` writes them."""
    try:
        reader = pa.ipc.open_file(handle)
    except pa.ArrowInvalid:
        handle.seek(0)
        yield from pa.ipc.open_stream(handle)
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _notebook(file: CorpusFile, config: DataConfig, fields: Sequence[str]) -> Iterator[Row]:
    """Yield the sources of a Jupyter notebook's cells as one document, outputs and images left out."""
    with open_text(file, config.encoding) as handle:
        read = _parse(handle.read(), file.place)
    try:
        sources = [cell["source"] for cell in read["cells"]]
        text = "\n\n".join(one if isinstance(one, str) else "".join(one) for one in sources)
    except (KeyError, TypeError):
        raise DataError(f"{file.place} is not a Jupyter notebook of version 4; mend or remove it") from None
    yield functools.partial(_given, {config.text_field: text + "\n" if text else ""}), file.place


class _Page(HTMLParser):
    """The text of a web page: blocks on lines of their own, scripts and styles left out."""

    BLOCKS = frozenset(
        ("p", "div", "br", "li", "ul", "ol", "tr", "table", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "section")
    ) | frozenset(("article", "header", "footer", "title", "blockquote", "dt", "dd"))
    HIDDEN = frozenset(("script", "style", "template", "noscript"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = self._plain = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in self.HIDDEN
        self._plain += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in self.HIDDEN))
        self._plain = max(0, self._plain - (tag == "pre"))
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            words = " ".join(data.split())
            spaced = f"{' ' * data[:1].isspace()}{words}{' ' * (data[-1:].isspace() and bool(words))}"
            self.parts.append(data if self._plain else spaced)

    def text(self) -> str:
        """Return what was read, without blank lines."""
        lines = (line.rstrip() for line in "".join(self.parts).splitlines())
        return "\n".join(line if line.startswith(" " * 2) else line.strip() for line in lines if line.strip())


def _page(file: CorpusFile, config: DataConfig, fields: Sequence[str]) -> Iterator[Row]:
    with open_text(file, config.encoding) as handle:
        raw = handle.read()
    page = _Page()
    page.feed(raw.decode("utf-8", "replace"))
    page.close()
    text = page.text()
    yield functools.partial(_given, {config.text_field: text + "\n" if text else ""}), file.place


READERS: Mapping[str, Reader] = {
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    ".json": _json,
    **dict.fromkeys((".csv", ".tsv"), _separated),
    **dict.fromkeys(TABLES, _table),
    ".ipynb": _notebook,
    **dict.fromkeys((".html", ".htm"), _page),
}


def read_rows(file: CorpusFile, config: DataConfig, left_out: LeftOut | None = None) -> Iterator[bytes]:
    """Yield the documents of a file with rows; raises DataError for one that is unsound.

    A row without text is counted in ``left_out`` where the config says so; else BadRowError names it.
    """
    for text, _ in read_labelled(file, config, None, left_out):
        yield text


def read_labelled(
    file: CorpusFile, config: DataConfig, label_field: str | None, left_out: LeftOut | None = None
) -> Iterator[tuple[bytes, Any]]:
    """Yield the text and the label (None: none is asked for) of each row of a file, as :func:`read_rows`."""
    fields = [config.text_field] if label_field is None else [config.text_field, label_field]
    try:
        for read, where in READERS[file.suffix](file, config, fields):
            try:
                row, label = read(), None
                text = row_text(row, config, where)
                if label_field is not None:
                    label = field_of(row, label_field, where, "label_field")
            except BadRowError as error:
                if not config.skip_bad_rows:
                    raise
                if left_out is not None:
                    left_out.add(error)
                continue
            yield text, label
    except UNSOUND as error:
        raise DataError(f"{file.place} is not soundly packed ({error}); unpack or remove it") from None
