"""Raw tables, read as they stream by: CSV and its kin, JSON lines, Parquet; the first two plain or gzipped.

Every value comes as a string, null where there is none. Rows that cannot be read are counted, not guessed at.
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

import numpy as np
import polars as pl

from common.errors import UserError, did_you_mean

MAX_MALFORMED = 0.01  # of the rows of a file; more stop the run
_SHOWN = 3  # malformed rows that a message shows
_BLOCK = 1 << 25  # bytes of text parsed at a time
_LINES = 1 << 14  # JSON lines parsed at a time
_ROWS = 1 << 18  # Parquet rows read at a time
_LONGEST_LINE = 1 << 26
_LONGEST_ROW = 1 << 16  # lines that one row may span; beyond that a quote is taken for a stray one
_SEPARATORS = (",", "\t", ";", "|")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLANKS = b" \t" + codecs.BOM_UTF8  # that may stand before an object
_SURROGATE = re.compile(rb"\\u[dD]|\xed")  # where a line of JSON may hold half a letter, which is no text


class Malformed:
    """The rows of one file that cannot be read: how many, and what the first ones look like.

    Args:
        path (str): the file.
        limit (float): the largest share of its rows that may be malformed.
    """

    def __init__(self, path, limit=MAX_MALFORMED):
        if not 0 <= limit <= 1:
            raise UserError(f"--max_malformed {limit}: expected a share from 0 to 1")
        self.path, self.limit, self.count, self.rows, self.first = path, limit, 0, 0, []

    def add(self, line, found):
        """Count one malformed row: its line (or row) number, and what was found there."""
        self.count += 1
        if len(self.first) < _SHOWN:
            found = found if len(found) <= 80 else f"{found[:80]}..."
            self.first.append(f"line {line}: {found!r}")

    def check(self, expected):
        """Stop if there were too many.

        Args:
            expected (str): what a row should hold, for the message.

        Raises:
            UserError: more than `limit` of the rows are malformed.
        """
        total = self.rows + self.count
        if self.count > self.limit * total:
            advice = "mend them"
            if self.rows:
                advice += f", or leave them out with --max_malformed {self.count / total + 0.005:.2f}"
            raise UserError(
                f"{self.path}: {self.count:,} of {total:,} rows are malformed, {'; '.join(self.first)}; expected "
                f"{expected}; {advice}"
            )


@dataclasses.dataclass
class _Chunk:
    """Some rows: their values as strings, and their line numbers where those are known."""

    frame: pl.DataFrame
    lines: list | None = None
    found: list | None = None  # what each row looks like in the file, for messages; by default its values
    broken: list | tuple = ()  # (line, what was found there) of rows that are not in the frame
    exactly: object = None  # () -> the same rows as a chunk with line numbers

    @classmethod
    def of(cls, columns, rows, lines, **named):
        """A chunk of rows of values and their line numbers."""
        return cls(pl.DataFrame(rows, schema=dict.fromkeys(columns, pl.String), orient="row"), lines, **named)


def read_table(path, columns, parse, malformed, *, header=None, separator=None, quoted=True, encoding="utf-8",
               literals=False):  # fmt: skip
    """Read a table in parts. A row is malformed where one of the parsed columns is null.

    The kind of the file follows from its name: `.jsonl` `.json` `.ndjson`, `.parquet`, anything else is CSV.

    Args:
        path (str): the file; gzip is recognised by its content.
        columns (list of str): the columns to read. Ones that the file lacks are an error in CSV and Parquet, and null
            in JSON lines.
        parse (list of polars.Expr): what to make of the columns, which are strings.
        malformed (Malformed): counts the rows that are left out.
        header (list of str, optional): CSV: the names of all columns of a file whose first line is data already.
        separator (str, optional): CSV; by default the one that occurs most often in the first line.
        quoted (bool): CSV: fields may stand in double quotes.
        encoding (str): of the text.
        literals (bool): JSON lines: also take Python literals, as in Amazon's files of 2014. None of it is run.

    Yields:
        polars.DataFrame: the results of `parse`, in file order.

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
        if sum(parsed.null_count().row(0)) and chunk.exactly:
            chunk = chunk.exactly()
            parsed = chunk.frame.select(parse)
        broken = list(chunk.broken)
        if sum(parsed.null_count().row(0)):
            whole = parsed.select(pl.all_horizontal(pl.all().is_not_null())).to_series()
            for row in (~whole).arg_true():
                found = chunk.found[row] if chunk.found else str(chunk.frame.row(row))
                broken.append((chunk.lines[row], found))
            parsed = parsed.filter(whole)
        for line, found in sorted(broken):
            malformed.add(line, found)
        malformed.rows += len(parsed)
        yield parsed


def table_kind(path):
    """`json`, `parquet` or `csv`, by the name of a file."""
    ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    return {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}.get(ending, "csv")


def check_columns(path, columns, separator=None, encoding="utf-8"):
    """Find out before the work whether a table has the columns asked for.

    Returns:
        list of str: all its columns (JSON lines: of its first objects).

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
        _place(column, names, path)
    return names


def _text_columns(path, kind, separator, encoding):
    with _undamaged(path), _open_text(path, encoding) as file:
        if kind == "csv":
            return _split_header(file, path, separator)[0]
        names = {}
        for line in itertools.islice(_lines(file), 1000):
            _check_is_text(line, path)
            names |= dict.fromkeys(_object(line, True) or ())
    if not names:
        raise UserError(f"{path}: holds no JSON object in its first lines; expected one a line")
    return list(names)


def guess_encoding(path):
    """The encoding of a text file: by its first bytes, else UTF-8 if all of it is that, else latin-1."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _undamaged(path), _open_bytes(path) as file:
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


def as_text(value):
    """Any value of a JSON object as one string: lists, nested or not, joined by blanks; None stays None."""
    if value is None or isinstance(value, str):
        return value
    if value != value:
        return None  # not a number: how some tools write an empty field
    if isinstance(value, list | tuple):
        return " ".join(part for part in map(as_text, value) if part is not None)
    if isinstance(value, dict):
        return " ".join(f"{key} {as_text(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


# --- opening


def _open_bytes(path):
    try:
        with open(path, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
    except OSError as failure:
        raise UserError(f"{path}: cannot be read ({failure.strerror})") from None
    if path.lower().endswith(".gz") and not gzipped:
        raise UserError(f"{path}: is no gzip file, in spite of its name; download it again")
    return gzip.open(path, "rb") if gzipped else open(path, "rb")


def _open_text(path, encoding):
    """The bytes of a file in UTF-8 (invalid ones stay as they are), to be read in blocks and by lines."""
    try:
        "".encode(encoding)  # refuses what is no encoding of text, too
        same = codecs.lookup(encoding).name in ("utf-8", "ascii")
    except (LookupError, UnicodeError):
        raise UserError(f"--encoding {encoding}: no such encoding; expected utf-8, latin-1, utf-16, ...") from None
    file = _open_bytes(path)
    return file if same else _Recoded(file, encoding)


class _Recoded:
    """A text file in another encoding that reads like a binary one in UTF-8."""

    def __init__(self, file, encoding):
        self._text = io.TextIOWrapper(file, encoding=encoding, errors="replace", newline="\n")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._text.close()

    def read(self, size):
        return self._text.read(size).encode("utf-8", "replace")

    def readline(self, size=-1):
        return self._text.readline(size).encode("utf-8", "replace")


def _lines(file):
    return iter(functools.partial(file.readline, _LONGEST_LINE), b"")


def _check_is_text(block, path):
    if b"\0" in block:
        kind = "text in UTF-16, without --encoding utf-16" if block.startswith(_UTF_16) else "a binary file"
        raise UserError(f"{path}: is {kind}; expected text: CSV, TSV or JSON lines, plain or gzipped")


@contextlib.contextmanager
def _undamaged(path):
    """Within this, a compressed file that breaks off is a `UserError`."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as failure:
        raise UserError(f"{path}: the gzip file is damaged ({failure}); download it again") from None


# --- CSV


@dataclasses.dataclass
class _Layout:
    """How the rows of a CSV file are built: how many fields, the places of the columns wanted, separator, quotes."""

    fields: int
    columns: dict  # name: place
    separator: str
    quoted: bool

    @property
    def first(self):
        """An empty row with one field more than the others: Polars counts the fields of the first row it is given."""
        return f"{self.separator * self.fields}\n".encode()


def _csv_chunks(path, columns, header, separator, quoted, encoding):
    with _undamaged(path), _open_text(path, encoding) as file:
        names, line = header, 1
        if header is None:
            names, separator = _split_header(file, path, separator)
            line = 2
        layout = _Layout(len(names), {name: _place(name, names, path) for name in columns}, separator or ",", quoted)
        left = b"" if header is None else file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)
        while len(block := _whole_rows(file, left, layout)) > len(layout.first):
            _check_is_text(block, path)
            frame = _by_polars(block, layout)
            if frame is None:
                rows = _Rows(_lines(file), block, line, layout)
                yield rows.chunk()
                line, left = rows.line, rows.left()
            else:
                yield _Chunk(frame, exactly=_Rows(iter(()), block, line, layout).chunk)
                line, left = line + block.count(b"\n") - 1, b""


def _split_header(file, path, separator):
    """The names in the first line, and the separator, guessed where it was not given."""
    first = file.readline(_LONGEST_LINE)
    _check_is_text(first, path)
    text = first.decode("utf-8", "replace").lstrip("\ufeff").rstrip("\r\n")
    if not text:
        raise UserError(f"{path}: its first line is empty; expected a line of column names")
    separator = separator or max(_SEPARATORS, key=text.count)
    try:
        names = next(csv.reader([text], delimiter=separator))
    except csv.Error:
        raise UserError(f"{path}: is no table of lines; expected each row on a line that ends in a line feed") from None
    return [name.strip() for name in names], separator


def _place(column, names, path):
    if column in names:
        return names.index(column)
    near = did_you_mean(column, names)
    raise UserError(f"{path}: has no column {column}; found {', '.join(names)[:200]}{near}; name the right one")


def _whole_rows(file, left, layout):
    """`layout.first`, what is left of an earlier block, and more, to a line end where every quote is closed."""
    parts = [layout.first, left, file.read(max(_BLOCK - len(left), 1)), file.readline(_LONGEST_LINE)]
    if layout.quoted and sum(part.count(b'"') for part in parts) % 2:
        for line in itertools.islice(_lines(file), _LONGEST_ROW):
            parts.append(line)
            if line.count(b'"') % 2:
                break
    last = next(part for part in reversed(parts) if part)
    return b"".join(parts if last.endswith(b"\n") else [*parts, b"\n"])


def _by_polars(block, layout):
    """A block as a frame; None where Polars would not read what `_Rows` reads: a row is broken, or a quote stray."""
    bare_returns = b"\r" in block and block.count(b"\r") != block.count(b"\r\n")
    if bare_returns or layout.quoted and not _quotes_in_order(block, layout.separator):
        return None
    try:
        frame = pl.read_csv(
            block,
            has_header=False,
            schema={str(place): pl.String for place in range(layout.fields + 1)},
            columns=sorted({*layout.columns.values(), layout.fields}),
            separator=layout.separator,
            quote_char='"' if layout.quoted else None,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return None
    if (frame[str(layout.fields)].fill_null("") != "").any():
        return None  # rows that are too long
    values = (pl.col(str(place)).alias(name) for name, place in layout.columns.items())
    return frame.slice(1).select(pl.when(value != "").then(value) for value in values)


def _quotes_in_order(block, separator):
    """Whether all quotes stand around whole fields, or in pairs within such quotes."""
    if b'"' not in block:
        return True
    letters = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(letters == ord('"'))
    before, after = letters[quotes[::2] - 1], letters[quotes[1::2] + 1]  # opening ones, closing ones
    beside = np.frombuffer(f'\r\n"{separator}'.encode(), np.uint8)
    return len(quotes) % 2 == 0 and np.isin(before, beside).all() and np.isin(after, beside).all()


class _Rows:
    """The rows of a block of CSV one by one, with line numbers, as the csv module reads them.

    Where the quotes of a row are broken, its first line is read by itself, the quotes in it as letters, and all goes on
    with the second line: a stray quote spoils no other row, and it is all one where the blocks begin and end.

    Args:
        lines (iterator of bytes): what follows the block.
        block (bytes): `layout.first`, and the lines to read.
        line (int): the number of the first line to read.
        layout (_Layout)
    """

    def __init__(self, lines, block, line, layout):
        self._lines, self._block, self.line, self._layout = lines, block, line, layout
        self._again, self._row = collections.deque(), []  # lines to read again, lines of the row so far

    def chunk(self):
        """The rows as a `_Chunk`. Those with too many fields, or bytes that are no text, are broken."""
        places, rows, lines, texts, broken = self._layout.columns.values(), [], [], [], []
        for line, row in self._numbered():
            found = self._layout.separator.join(row)
            if _is_no_text(found):
                broken.append((line, f"not UTF-8: {found.encode('utf-8', 'replace').decode()}"))
            elif any(row[self._layout.fields : self._layout.fields + 1]):
                broken.append((line, found))
            elif row:  # no blank line
                rows.append([row[place] or None if place < len(row) else None for place in places])
                lines.append(line)
                texts.append(found)
        return _Chunk.of(self._layout.columns, rows, lines, found=texts, broken=broken)

    def left(self):
        """The lines after the block that were looked at and belong to no row of it, as bytes."""
        return b"".join(self._again)

    def _numbered(self):
        """The rows that begin in the block: (line number, fields)."""
        block = io.BytesIO(self._block)
        size = len(self._block) - block.seek(len(self._layout.first))
        self._lines = itertools.chain(block, self._lines)
        quoting = csv.QUOTE_MINIMAL if self._layout.quoted else csv.QUOTE_NONE
        csv.field_size_limit(_LONGEST_LINE)  # Polars has no limit, and both are to read the same
        reader = csv.reader(self, delimiter=self._layout.separator, quoting=quoting, strict=True)
        while size > 0:
            self._row = []
            try:
                row = next(reader)
            except csv.Error:
                self._again.extendleft(reversed(self._row[1:]))
                del self._row[1:]
                row = _decoded(self._row[0]).rstrip("\r\n").split(self._layout.separator)
            yield self.line, row
            self.line += len(self._row)
            size -= sum(map(len, self._row))

    def __iter__(self):
        return self

    def __next__(self):
        """The next line, for the csv module."""
        if len(self._row) == _LONGEST_ROW:
            raise csv.Error
        self._row.append(self._again.popleft() if self._again else next(self._lines))
        return _decoded(self._row[-1])


def _decoded(line):
    return line.decode("utf-8", "surrogateescape")


def _is_no_text(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# --- JSON lines


def _json_chunks(path, columns, encoding, literals):
    with _undamaged(path), _open_text(path, encoding) as file:
        numbered = enumerate(_lines(file), start=1)
        while block := list(itertools.islice(numbered, _LINES)):
            rows, lines, broken = [], [], []
            for number, line in block:
                if line.isspace():
                    continue
                _check_is_text(line, path)
                values = _values(line, columns, literals)
                if values is None:
                    broken.append((number, line[:200].decode("utf-8", "replace").strip()))
                else:
                    rows.append(values)
                    lines.append(number)
            yield _Chunk.of(columns, rows, lines, broken=broken)


def _values(line, columns, literals):
    """Some values of the object of one line as strings; None where there is no object, or what it holds is no text."""
    found = _object(line, literals)
    if found is None:
        return None
    values = [as_text(found.get(column)) for column in columns]
    if _SURROGATE.search(line) and any(_is_no_text(value or "") for value in values):
        return None
    return values


def _object(line, literals):
    """The object of one line; None where there is none."""
    if not line.lstrip(_BLANKS).startswith(b"{"):
        return None  # such as a table in one list, a line of gigabytes that is better not parsed
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


# --- Parquet


def _scan(path):
    return pl.scan_parquet(path, glob=False, hive_partitioning=False)  # a path is a name, whatever letters it holds


def _parquet_schema(path):
    try:
        return _scan(path).collect_schema()
    except (pl.exceptions.PolarsError, OSError) as failure:
        raise UserError(f"{path}: is no Parquet file ({str(failure).splitlines()[0]}); download it again") from None


def _parquet_chunks(path, columns):
    schema = _parquet_schema(path)
    for column in columns:
        _place(column, schema.names(), path)
    table = _scan(path).select(_as_string(column, schema[column]) for column in columns)
    try:
        for start in itertools.count(0, _ROWS):
            frame = table.slice(start, _ROWS).collect()
            if frame.is_empty():
                return
            yield _Chunk(frame, list(range(start + 1, start + 1 + len(frame))))
    except (pl.exceptions.PolarsError, OSError) as failure:
        raise UserError(f"{path}: the Parquet file cannot be read ({str(failure).splitlines()[0]})") from None


def _as_string(column, kind):
    """A column as strings: times as seconds since 1970, whole floats without their point, lists joined by blanks."""
    values = pl.col(column)
    if kind == pl.Date or kind == pl.Datetime:
        return values.cast(pl.Datetime("us")).dt.timestamp("us").cast(pl.Float64).truediv(1e6).cast(pl.String)
    if kind.is_nested():
        return values.map_batches(_joined_series, return_dtype=pl.String)
    if kind.is_float():
        whole = values.cast(pl.Int64, strict=False)
        return (
            pl.when(whole == values).then(whole.cast(pl.String)).when(values.is_not_nan()).then(values.cast(pl.String))
        )
    return values.cast(pl.String, strict=False)


def _joined_series(values):
    return pl.Series(values.name, [as_text(value) for value in values.to_list()], dtype=pl.String)
