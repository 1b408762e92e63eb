"""Reading raw tables part by part: CSV and TSV, JSON lines (all plain or gzipped), Parquet.

Every value becomes a string, or null if it is empty. Malformed rows are counted and left out.
"""

import ast
import codecs
import collections
import contextlib
import csv
import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
import polars as pl

from common.errors import UserError, did_you_mean

MAX_MALFORMED = 0.01  # the largest share of malformed rows in a file that is accepted by default
_EXAMPLES = 3  # malformed rows that a message shows
_BLOCK = 1 << 25  # bytes of text parsed at once
_LINES = 1 << 14  # JSON lines parsed at once
_ROWS = 1 << 18  # Parquet rows read at once
_LONGEST_LINE = 1 << 26  # bytes
_LONGEST_ROW = 1 << 16  # most lines of a quoted row. If its quote is not closed within them, the quote is stray
_SEPARATORS = (",", "\t", ";", "|")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANKS = b" \t" + codecs.BOM_UTF8  # may precede a JSON object
_SURROGATE = re.compile(rb"\\u[dD]|\xed")  # in lines of JSON that may hold half of a surrogate pair, which is not text


class MalformedRows:
    """Counts the malformed rows of a file and keeps the first ones for messages.

    Args:
        path: the file.
        limit: the largest share of its rows that may be malformed.

    Attributes:
        count: the number of malformed rows.
        rows: the number of rows that were read.
        examples: descriptions of the first malformed rows.
    """

    def __init__(self, path: str, limit: float = MAX_MALFORMED):
        if not 0 <= limit <= 1:
            raise UserError(f"--max_malformed {limit}: expected a share from 0 to 1")
        self.path, self.limit = path, limit
        self.count, self.rows = 0, 0
        self.examples: list[str] = []

    def add(self, line: int, content: str) -> None:
        """Count a malformed row, given its line (in Parquet: row) number and its content."""
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            content = content if len(content) <= 80 else f"{content[:80]}..."
            self.examples.append(f"line {line}: {content!r}")

    def check(self, expected: str) -> None:
        """Raise an error if there are too many malformed rows.

        Args:
            expected: what a row should hold, for the error message.

        Raises:
            UserError: more than `limit` of the rows are malformed.
        """
        total = self.rows + self.count
        if self.count > self.limit * total:
            advice = "correct them"
            if self.rows:
                advice += f", or leave them out with --max_malformed {self.count / total + 0.005:.2f}"
            raise UserError(
                f"{self.path}: {self.count:,} of {total:,} rows are malformed, {'; '.join(self.examples)}; expected "
                f"{expected}; {advice}"
            )


@dataclasses.dataclass
class _Chunk:
    """Some rows of a table.

    Attributes:
        frame: the values, as strings.
        lines: the line number of each row. Empty if `reread` is given.
        contents: each row as it is in the file, for messages. Empty: its values are shown.
        malformed: (line, content) of the rows that are not in `frame`.
        reread: reads the same rows again, as a chunk with line numbers.
    """

    frame: pl.DataFrame
    lines: Sequence[int] = ()
    contents: Sequence[str] = ()
    malformed: Sequence[tuple[int, str]] = ()
    reread: "Callable[[], _Chunk] | None" = None

    @classmethod
    def from_rows(cls, columns: Iterable[str], rows: list, lines: list[int], **attributes) -> "_Chunk":
        return cls(pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row"), lines, **attributes)


def read_table(
    path: str,
    columns: Sequence[str],
    parse: Sequence[pl.Expr],
    malformed: MalformedRows,
    *,
    header: Sequence[str] | None = None,
    separator: str | None = None,
    quoted: bool = True,
    encoding: str = "utf-8",
    literals: bool = False,
) -> Iterator[pl.DataFrame]:
    """Read a table in parts. A row in which a parsed column is null is malformed.

    The kind of the file follows from its name: `.jsonl`, `.json` or `.ndjson`, `.parquet`, anything else is CSV.

    Args:
        path: the file. gzip is recognized by its content.
        columns: the columns to read. If the file lacks one, this is an error in CSV and Parquet, and in JSON lines its
            values are null.
        parse: expressions of the columns, which are strings.
        malformed: counts the rows that are left out.
        header: CSV: the names of all columns, for a file whose first line is already data.
        separator: CSV: by default the one that occurs most often in the first line.
        quoted: CSV: fields may be enclosed in double quotes.
        encoding: of the text.
        literals: JSON lines: also accept Python literals, as in Amazon's files of 2014. They are never executed.

    Yields:
        The results of `parse`, in file order.

    Raises:
        UserError: the file is missing, damaged or binary, or lacks a column.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; expected a table of {', '.join(columns)}")
    kind = table_kind(path)
    if kind == "parquet":
        chunks = _parquet_chunks(path, columns)
    elif kind == "json":
        chunks = _json_chunks(path, columns, encoding, literals)
    else:
        chunks = _csv_chunks(path, columns, header, separator, quoted, encoding)
    for chunk in chunks:
        parsed = chunk.frame.select(parse)
        if sum(parsed.null_count().row(0)) and chunk.reread:
            chunk = chunk.reread()
            parsed = chunk.frame.select(parse)
        left_out = list(chunk.malformed)
        if sum(parsed.null_count().row(0)):
            is_complete = parsed.select(pl.all_horizontal(pl.all().is_not_null())).to_series()
            for row in (~is_complete).arg_true():
                content = chunk.contents[row] if chunk.contents else str(chunk.frame.row(row))
                left_out.append((chunk.lines[row], content))
            parsed = parsed.filter(is_complete)
        for line, content in sorted(left_out):
            malformed.add(line, content)
        malformed.rows += len(parsed)
        yield parsed


def table_kind(path: str) -> str:
    """`json`, `parquet` or `csv`, from the name of a file."""
    ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    return {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}.get(ending, "csv")


def check_columns(
    path: str, columns: Sequence[str], separator: str | None = None, encoding: str = "utf-8"
) -> list[str]:
    """Check before a long computation that a table has the given columns.

    Returns:
        All its columns. In JSON lines those of the first objects.

    Raises:
        UserError: the file is missing, empty or binary, or lacks a column.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; expected a table of {', '.join(columns)}")
    kind = table_kind(path)
    if kind == "parquet":
        names = _parquet_schema(path).names()
    else:
        names = _text_columns(path, kind, separator, encoding)
    for column in columns:
        _column_index(column, names, path)
    return names


def _text_columns(path: str, kind: str, separator: str | None, encoding: str) -> list[str]:
    with _gzip_errors(path), _open_text(path, encoding) as file:
        if kind == "csv":
            return _split_header(file, path, separator)[0]
        names: dict[str, None] = {}
        for line in itertools.islice(_lines(file), 1000):
            _check_is_text(line, path)
            names |= dict.fromkeys(_parse_object(line, True) or ())
    if not names:
        raise UserError(f"{path}: holds no JSON object in its first lines; expected one object per line")
    return list(names)


def guess_encoding(path: str) -> str:
    """The encoding of a text file: `utf-16` by its first bytes, else `utf-8` if all of it is valid, else `latin-1`."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _gzip_errors(path), _open_bytes(path) as file:
        block = file.read(_BLOCK)
        if block.startswith(_UTF_16):
            return "utf-16"
        try:
            while block:
                decoder.decode(block)
                block = file.read(_BLOCK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8"


def as_text(value: Any) -> str | None:
    """A value of a JSON object as one string. The elements of lists are joined by blanks. None stays None."""
    if value is None or isinstance(value, str):
        return value
    if value != value:
        return None  # NaN: some tools write it for empty fields
    if isinstance(value, list | tuple):
        return " ".join(part for part in map(as_text, value) if part is not None)
    if isinstance(value, dict):
        return " ".join(f"{key} {as_text(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


# -- opening ----------------------------------------------------------------------------------------------------------


def _open_bytes(path: str) -> BinaryIO:
    try:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
    except OSError as failure:
        raise UserError(f"{path}: cannot be read ({failure.strerror})") from None
    if path.lower().endswith(".gz") and not gzipped:
        raise UserError(f"{path}: has the name of a gzip file but is not one; download it again, or rename it")
    return gzip.open(path, "rb") if gzipped else open(path, "rb")  # type: ignore[return-value]  # typed as GzipFile


def _open_text(path: str, encoding: str) -> "BinaryIO | _Utf8Reader":
    """Open a file whose bytes read as UTF-8. Invalid bytes of UTF-8 files stay as they are."""
    try:
        "".encode(encoding)  # also refuses codecs that are not text encodings
        is_utf8 = codecs.lookup(encoding).name in ("utf-8", "ascii")
    except (LookupError, UnicodeError):
        raise UserError(f"--encoding {encoding}: no such encoding; expected utf-8, latin-1, utf-16, ...") from None
    file = _open_bytes(path)
    return file if is_utf8 else _Utf8Reader(file, encoding)


class _Utf8Reader:
    """Reads a text file of another encoding as the bytes of a UTF-8 file."""

    def __init__(self, file: BinaryIO, encoding: str):
        self._text = io.TextIOWrapper(file, encoding=encoding, errors="replace", newline="\n")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._text.close()

    def read(self, size: int) -> bytes:
        return self._text.read(size).encode("utf-8", "replace")

    def readline(self, size: int = -1) -> bytes:
        return self._text.readline(size).encode("utf-8", "replace")


def _lines(file) -> Iterator[bytes]:
    return iter(functools.partial(file.readline, _LONGEST_LINE), b"")


def _check_is_text(block: bytes, path: str) -> None:
    if b"\0" in block:
        if block.startswith(_UTF_16):
            raise UserError(f"{path}: is text in UTF-16, expected UTF-8; set --encoding utf-16")
        raise UserError(f"{path}: is a binary file; expected text: CSV, TSV or JSON lines, plain or gzipped")


@contextlib.contextmanager
def _gzip_errors(path: str) -> Iterator[None]:
    """Turn the errors of reading a damaged gzip file into a `UserError`."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as failure:
        raise UserError(f"{path}: the gzip file is damaged ({failure}); download it again") from None


# -- CSV --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Layout:
    """The layout of the rows of a CSV file.

    Attributes:
        fields: the number of fields of a row.
        columns: name -> index of the columns to read.
        separator: between the fields.
        quoted: whether fields may be enclosed in double quotes.
    """

    fields: int
    columns: dict[str, int]
    separator: str
    quoted: bool

    @property
    def first_row(self) -> bytes:
        """An empty row with one field more than the others.

        Polars takes the number of fields from the first row. With this one, it also reads rows that are too long.
        """
        return f"{self.separator * self.fields}\n".encode()


def _csv_chunks(
    path: str,
    columns: Sequence[str],
    header: Sequence[str] | None,
    separator: str | None,
    quoted: bool,
    encoding: str,
) -> Iterator[_Chunk]:
    with _gzip_errors(path), _open_text(path, encoding) as file:
        if header is None:
            names, separator = _split_header(file, path, separator)
            line, unread = 2, b""
        else:
            names, separator = list(header), separator or ","
            line, unread = 1, file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
        layout = _Layout(len(names), {name: _column_index(name, names, path) for name in columns}, separator, quoted)
        while len(block := _read_whole_rows(file, unread, layout)) > len(layout.first_row):
            _check_is_text(block, path)
            frame = _parse_with_polars(block, layout)
            if frame is None:
                reader = _RowReader(_lines(file), block, line, layout)
                yield reader.chunk()
                line, unread = reader.line, reader.unread()
            else:
                yield _Chunk(frame, reread=_RowReader(iter(()), block, line, layout).chunk)
                line, unread = line + block.count(b"\n") - 1, b""


def _split_header(file, path: str, separator: str | None) -> tuple[list[str], str]:
    """The column names in the first line, and the separator, guessed if it is not given."""
    first = file.readline(_LONGEST_LINE)
    _check_is_text(first, path)
    text = first.decode("utf-8", "replace").lstrip("\ufeff").rstrip("\r\n")
    if not text:
        raise UserError(f"{path}: its first line is empty; expected a line of column names")
    separator = separator or max(_SEPARATORS, key=text.count)
    try:
        names = next(csv.reader([text], delimiter=separator))
    except csv.Error:
        raise UserError(f"{path}: cannot be split into lines; expected each row to end in a line feed") from None
    return [name.strip() for name in names], separator


def _column_index(column: str, names: Sequence[str], path: str) -> int:
    if column in names:
        return names.index(column)
    advice = did_you_mean(column, names) or "; check the file and the name of the column"
    raise UserError(f"{path}: has no column {column}; found {', '.join(names)[:200]}{advice}")


def _read_whole_rows(file, unread: bytes, layout: _Layout) -> bytes:
    """Read the next block, up to a line end at which every quote is closed. It starts with `layout.first_row`.

    Args:
        unread: the lines of the previous block that belong to this one.
    """
    parts = [layout.first_row, unread, file.read(max(_BLOCK - len(unread), 1)), file.readline(_LONGEST_LINE)]
    if layout.quoted and sum(part.count(b'"') for part in parts) % 2:
        for line in itertools.islice(_lines(file), _LONGEST_ROW):
            parts.append(line)
            if line.count(b'"') % 2:
                break
    last = next(part for part in reversed(parts) if part)
    return b"".join(parts if last.endswith(b"\n") else [*parts, b"\n"])


def _parse_with_polars(block: bytes, layout: _Layout) -> pl.DataFrame | None:
    """Parse a block. None if a row is malformed or a quote is stray, where Polars and `_RowReader` differ."""
    bare_returns = b"\r" in block and block.count(b"\r") != block.count(b"\r\n")
    if bare_returns or layout.quoted and not _quotes_in_order(block, layout.separator):
        return None
    try:
        frame = pl.read_csv(
            block,
            has_header=False,
            schema={str(index): pl.String for index in range(layout.fields + 1)},
            columns=sorted({*layout.columns.values(), layout.fields}),
            separator=layout.separator,
            quote_char='"' if layout.quoted else None,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return None
    if (frame[str(layout.fields)].fill_null("") != "").any():
        return None  # rows that are too long
    values = (pl.col(str(index)).alias(name) for name, index in layout.columns.items())
    return frame.slice(1).select(pl.when(value != "").then(value) for value in values)


def _quotes_in_order(block: bytes, separator: str) -> bool:
    """Whether all quotes enclose whole fields, or are doubled within such quotes."""
    if b'"' not in block:
        return True
    letters = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(letters == ord('"'))
    before, after = letters[quotes[::2] - 1], letters[quotes[1::2] + 1]  # of the opening, of the closing quotes
    beside = np.frombuffer(f'\r\n"{separator}'.encode(), np.uint8)
    return len(quotes) % 2 == 0 and bool(np.isin(before, beside).all() and np.isin(after, beside).all())


class _RowReader:
    """Reads a block of CSV row by row with the csv module, and knows the line numbers.

    If the quotes of a row are unbalanced, its first line becomes a row of its own, in which quotes are ordinary
    characters, and reading continues with the second line. So a stray quote affects no other row, and the result does
    not depend on where the blocks begin and end.

    Args:
        lines: the lines after the block.
        block: `layout.first_row`, then the lines to read.
        line: the number of the first line to read.
        layout: of the rows.

    Attributes:
        line: the number of the next line to read.
    """

    def __init__(self, lines: Iterator[bytes], block: bytes, line: int, layout: _Layout):
        self._lines, self._block, self.line, self._layout = lines, block, line, layout
        self._pushed_back: collections.deque[bytes] = collections.deque()  # lines to read again
        self._row: list[bytes] = []  # the lines of the current row so far

    def chunk(self) -> _Chunk:
        """The rows as a `_Chunk`. Rows with too many fields or with invalid UTF-8 are malformed."""
        rows, lines, contents, malformed = [], [], [], []
        for line, row in self._numbered_rows():
            content = self._layout.separator.join(row)
            if not _is_valid_text(content):
                malformed.append((line, f"not UTF-8: {content.encode('utf-8', 'replace').decode()}"))
            elif any(row[self._layout.fields : self._layout.fields + 1]):
                malformed.append((line, content))
            elif row:  # not a blank line
                indices = self._layout.columns.values()
                rows.append([row[index] or None if index < len(row) else None for index in indices])
                lines.append(line)
                contents.append(content)
        return _Chunk.from_rows(self._layout.columns, rows, lines, contents=contents, malformed=malformed)

    def unread(self) -> bytes:
        """The lines behind the block that were read but belong to no row of it."""
        return b"".join(self._pushed_back)

    def _numbered_rows(self) -> Iterator[tuple[int, list[str]]]:
        """The rows that begin in the block: line number and fields."""
        block = io.BytesIO(self._block)
        size = len(self._block) - block.seek(len(self._layout.first_row))
        self._lines = itertools.chain(block, self._lines)
        csv.field_size_limit(_LONGEST_LINE)  # Polars has no limit, and both must read the same
        reader = csv.reader(
            self,
            delimiter=self._layout.separator,
            quoting=csv.QUOTE_MINIMAL if self._layout.quoted else csv.QUOTE_NONE,
            strict=True,
        )
        while size > 0:
            self._row = []
            try:
                row = next(reader)
            except csv.Error:
                self._pushed_back.extendleft(reversed(self._row[1:]))
                del self._row[1:]
                row = _decode(self._row[0]).rstrip("\r\n").split(self._layout.separator)
            yield self.line, row
            self.line += len(self._row)
            size -= sum(map(len, self._row))

    def __iter__(self) -> "_RowReader":
        return self

    def __next__(self) -> str:
        """The next line, for the csv module."""
        if len(self._row) == _LONGEST_ROW:
            raise csv.Error
        self._row.append(self._pushed_back.popleft() if self._pushed_back else next(self._lines))
        return _decode(self._row[-1])


def _decode(line: bytes) -> str:
    return line.decode("utf-8", "surrogateescape")


def _is_valid_text(text: str) -> bool:
    """Whether a string can be encoded, which one with half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# -- JSON lines -------------------------------------------------------------------------------------------------------


def _json_chunks(path: str, columns: Sequence[str], encoding: str, literals: bool) -> Iterator[_Chunk]:
    with _gzip_errors(path), _open_text(path, encoding) as file:
        numbered = enumerate(_lines(file), start=1)
        while block := list(itertools.islice(numbered, _LINES)):
            rows, lines, malformed = [], [], []
            for number, line in block:
                if line.isspace():
                    continue
                _check_is_text(line, path)
                values = _parse_values(line, columns, literals)
                if values is None:
                    malformed.append((number, line[:200].decode("utf-8", "replace").strip()))
                else:
                    rows.append(values)
                    lines.append(number)
            yield _Chunk.from_rows(columns, rows, lines, malformed=malformed)


def _parse_values(line: bytes, columns: Sequence[str], literals: bool) -> list[str | None] | None:
    """The values of a line's object as strings. None if there is no object, or a value is not valid text."""
    found = _parse_object(line, literals)
    if found is None:
        return None
    values = [as_text(found.get(column)) for column in columns]
    if _SURROGATE.search(line) and not all(_is_valid_text(value or "") for value in values):
        return None
    return values


def _parse_object(line: bytes, literals: bool) -> dict | None:
    """The object in a line. None if the line holds no object."""
    if not line.lstrip(_BLANKS).startswith(b"{"):
        return None  # for example a whole table as one list: a line of gigabytes must not be parsed
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        if not literals:
            return None
        try:
            found = ast.literal_eval(line.decode("utf-8").strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return found if isinstance(found, dict) else None


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _scan(path: str) -> pl.LazyFrame:
    return pl.scan_parquet(path, glob=False, hive_partitioning=False)  # no character of the path has a special meaning


def _parquet_schema(path: str) -> pl.Schema:
    try:
        return _scan(path).collect_schema()
    except (pl.exceptions.PolarsError, OSError) as failure:
        raise UserError(f"{path}: is not a Parquet file ({str(failure).splitlines()[0]}); download it again") from None


def _parquet_chunks(path: str, columns: Sequence[str]) -> Iterator[_Chunk]:
    schema = _parquet_schema(path)
    for column in columns:
        _column_index(column, schema.names(), path)
    table = _scan(path).select(_as_string(column, schema[column]) for column in columns)
    try:
        for start in itertools.count(0, _ROWS):
            frame = table.slice(start, _ROWS).collect()
            if frame.is_empty():
                return
            yield _Chunk(frame, list(range(start + 1, start + 1 + len(frame))))
    except (pl.exceptions.PolarsError, OSError) as failure:
        raise UserError(f"{path}: the Parquet file cannot be read ({str(failure).splitlines()[0]})") from None


def _as_string(column: str, kind: pl.DataType) -> pl.Expr:
    """A column as strings: dates as seconds since 1970, whole floats without decimals, lists joined by blanks."""
    values = pl.col(column)
    if kind == pl.Date or kind == pl.Datetime:
        return values.cast(pl.Datetime("us")).dt.timestamp("us").cast(pl.Float64).truediv(1e6).cast(pl.String)
    if kind.is_nested():
        return values.map_batches(_join_lists, return_dtype=pl.String)
    if kind.is_float():
        whole = values.cast(pl.Int64, strict=False)
        return (
            pl.when(whole == values).then(whole.cast(pl.String)).when(values.is_not_nan()).then(values.cast(pl.String))
        )
    return values.cast(pl.String, strict=False)


def _join_lists(values: pl.Series) -> pl.Series:
    return pl.Series(values.name, [as_text(value) for value in values.to_list()], dtype=pl.String)
