"""Raw tables, read as they stream by: CSV and its kin, JSON lines, Parquet; the first two plain or gzipped.

Every value comes as a string, null where there is none. Rows that cannot be read are counted, not guessed at.
"""

import ast
import codecs
import csv
import dataclasses
import gzip
import io
import itertools
import json
import os
import zlib

import polars as pl

from common.errors import UserError, did_you_mean

MAX_MALFORMED = 0.01  # of the rows of a file; more stop the run
_SHOWN = 3  # malformed rows that a message shows
_BLOCK = 1 << 25  # bytes of text parsed at a time
_LINES = 1 << 14  # JSON lines parsed at a time
_ROWS = 1 << 18  # Parquet rows read at a time
_LONGEST_LINE = 1 << 26
_LONGEST_FIELD = 1 << 16  # lines that one quoted field may span; beyond that the quote is taken for a stray one
_SEPARATORS = (",", "\t", ";", "|")


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
    lines: list = None
    found: list = None  # what each row looks like in the file, for messages; by default its values
    exactly: object = None  # () -> the same rows as a chunk with line numbers


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
        chunks = _json_chunks(path, columns, malformed, encoding, literals)
    else:
        chunks = _csv_chunks(path, columns, malformed, header, separator, quoted, encoding)
    for chunk in chunks:
        parsed = chunk.frame.select(parse)
        if sum(parsed.null_count().row(0)) and chunk.exactly:
            chunk = chunk.exactly()
            parsed = chunk.frame.select(parse)
        if sum(parsed.null_count().row(0)):
            whole = parsed.select(pl.all_horizontal(pl.all().is_not_null())).to_series()
            for row in (~whole).arg_true():
                malformed.add(chunk.lines[row], chunk.found[row] if chunk.found else str(chunk.frame.row(row)))
            parsed = parsed.filter(whole)
        malformed.rows += len(parsed)
        yield parsed


def table_kind(path):
    """`json`, `parquet` or `csv`, by the name of a file."""
    ending = os.path.splitext(path.lower().removesuffix(".gz"))[1]
    return {".jsonl": "json", ".json": "json", ".ndjson": "json", ".parquet": "parquet"}.get(ending, "csv")


def check_columns(path, columns, separator=None, encoding="utf-8"):
    """Find out before the work whether a table has the columns asked for.

    Raises:
        UserError: the file is missing, empty or binary, or lacks a column (JSON lines: in all of its first objects).
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; expected a table of {', '.join(columns)}")
    kind = table_kind(path)
    if kind == "parquet":
        names = _parquet_schema(path).names()
    else:
        names = next(_unbroken(_text_columns(path, kind, separator, encoding), path))
    for column in columns:
        _place(column, names, path)


def _text_columns(path, kind, separator, encoding):
    with _open_text(path, encoding) as file:
        if kind == "csv":
            yield _split_header(file, path, separator)[0]
            return
        lines = list(itertools.islice(file, 1000))
        for line in lines:
            _check_is_text(line, path)
        objects = [_object(line, True) or {} for line in lines]
        if not any(objects):
            raise UserError(f"{path}: holds no JSON object in its first lines; expected one a line")
        yield list(dict.fromkeys(key for each in objects for key in each))


def guess_encoding(path):
    """The encoding of a text file: by its first bytes, else UTF-8 if all of it is that, else latin-1."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        for block in itertools.chain([file.read(4)], iter(lambda: file.read(_BLOCK), b"")):
            if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and file.tell() <= 4:
                return "utf-16"
            try:
                decoder.decode(block)
            except UnicodeDecodeError:
                return "latin-1"
    return "utf-8"


def joined(value):
    """Any value of a JSON object as one string: lists, nested or not, joined by blanks; None stays None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return " ".join(part for part in map(joined, value) if part is not None)
    if isinstance(value, dict):
        return " ".join(f"{key} {joined(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


# --- opening


def _open_bytes(path):
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    if path.endswith(".gz") and not gzipped:
        raise UserError(f"{path}: is no gzip file, in spite of its name; download it again")
    return gzip.open(path, "rb") if gzipped else open(path, "rb")


def _open_text(path, encoding):
    """The bytes of a file in UTF-8 (invalid ones stay as they are), to be read in blocks and by lines."""
    try:
        same = codecs.lookup(encoding).name in ("utf-8", "ascii")
    except LookupError:
        raise UserError(f"--encoding {encoding}: no such encoding; expected utf-8, latin-1, utf-16, ...") from None
    file = _open_bytes(path)
    return file if same else _Recoded(file, encoding)


class _Recoded:
    """A text file in another encoding that reads like a binary one in UTF-8."""

    def __init__(self, file, encoding):
        self._text = io.TextIOWrapper(file, encoding=encoding, errors="replace", newline="")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._text.close()

    def __iter__(self):
        return iter(self.readline, b"")

    def read(self, size):
        return self._text.read(size).encode("utf-8", "replace")

    def readline(self, size=-1):
        return self._text.readline(size).encode("utf-8", "replace")


def _check_is_text(block, path):
    if b"\0" in block:
        raise UserError(f"{path}: is a binary file; expected text: CSV, TSV or JSON lines, plain or gzipped")


def _unbroken(generator, path):
    """The items of a generator over a file; where the compressed file breaks off, a `UserError`."""
    try:
        yield from generator
    except (gzip.BadGzipFile, EOFError, zlib.error) as failure:
        raise UserError(f"{path}: the gzip file is damaged ({failure}); download it again") from None


# --- CSV


def _csv_chunks(path, columns, malformed, header, separator, quoted, encoding):
    return _unbroken(_csv_chunks_unsafe(path, columns, malformed, header, separator, quoted, encoding), path)


def _csv_chunks_unsafe(path, columns, malformed, header, separator, quoted, encoding):
    with _open_text(path, encoding) as file:
        names, line = header, 1
        if header is None:
            names, separator, line = *_split_header(file, path, separator), 2
        layout = _Layout(names, [_place(column, names, path) for column in columns], separator or ",", quoted)
        while block := _whole_rows(file, quoted):
            _check_is_text(block, path)
            yield _csv_chunk(block, line, columns, layout, malformed)
            line += block.count(b"\n")


@dataclasses.dataclass
class _Layout:
    """How the rows of a CSV file are built: all columns' names, the places of those wanted, separator, quotes."""

    names: list
    places: list
    separator: str
    quoted: bool


def _split_header(file, path, separator):
    """The names in the first line, and the separator, guessed where it was not given."""
    first = file.readline(_LONGEST_LINE)
    _check_is_text(first, path)
    text = first.decode("utf-8", "replace").lstrip("\ufeff").rstrip("\r\n")
    if not text:
        raise UserError(f"{path}: is empty; expected a line of column names first")
    separator = separator or max(_SEPARATORS, key=text.count)
    return [name.strip() for name in next(csv.reader([text], delimiter=separator))], separator


def _place(column, names, path):
    if column in names:
        return names.index(column)
    near = did_you_mean(column, names)
    raise UserError(f"{path}: has no column {column}; found {', '.join(names)[:200]}{near}; name the right one")


def _whole_rows(file, quoted):
    """Some bytes that end where a row ends: at a line end, with every quote closed."""
    block = file.read(_BLOCK)
    block += file.readline(_LONGEST_LINE)
    open_quote = quoted and block.count(b'"') % 2
    for _ in range(_LONGEST_FIELD if open_quote else 0):
        line = file.readline(_LONGEST_LINE)
        block += line
        if not line or line.count(b'"') % 2:
            break
    return block


def _csv_chunk(block, line, columns, layout, malformed):
    """Polars parses what is in order; a block with a broken row is taken apart row by row, with line numbers."""

    def exactly():
        return _csv_rows(block, line, columns, layout, malformed)

    every = {str(number): pl.String for number in range(len(layout.names))}
    try:
        frame = pl.read_csv(
            io.BytesIO(block),
            has_header=False,
            schema=every,
            columns=sorted(set(layout.places)),
            separator=layout.separator,
            quote_char='"' if layout.quoted else None,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError):
        return exactly()
    frame = frame.select(pl.col(str(place)).alias(name) for name, place in zip(columns, layout.places, strict=True))
    return _Chunk(frame, exactly=exactly)


def _csv_rows(block, line, columns, layout, malformed):
    """The rows of a block, one by one; those with too many fields, or bytes that are no text, are malformed."""
    text = io.StringIO(block.decode("utf-8", "surrogateescape"), newline="")
    quoting = csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE
    rows = csv.reader(text, delimiter=layout.separator, quoting=quoting)
    values, lines, found, start = [], [], [], line
    for row in _rows_or_errors(rows):
        here, start = start, line + rows.line_num
        if not row:
            continue  # a blank line
        whole = layout.separator.join(row)
        if len(row) > len(layout.names) or not whole.isprintable() and _has_surrogates(whole):
            malformed.add(here, whole.encode("utf-8", "replace").decode())
            continue
        values.append([row[place] or None if place < len(row) else None for place in layout.places])
        lines.append(here)
        found.append(whole)
    schema = {name: pl.String for name in columns}
    return _Chunk(pl.DataFrame(values, schema=schema, orient="row"), lines, found)


def _rows_or_errors(rows):
    """The rows of a csv reader; a field too long for it counts as a row of one absurd field."""
    while True:
        try:
            yield next(rows)
        except StopIteration:
            return
        except csv.Error as failure:
            yield [str(failure)]


def _has_surrogates(text):
    return any("\ud800" <= letter <= "\udfff" for letter in text)


# --- JSON lines


def _json_chunks(path, columns, malformed, encoding, literals):
    return _unbroken(_json_chunks_unsafe(path, columns, malformed, encoding, literals), path)


def _json_chunks_unsafe(path, columns, malformed, encoding, literals):
    with _open_text(path, encoding) as file:
        numbered = enumerate(file, start=1)
        while block := list(itertools.islice(numbered, _LINES)):
            values, lines = [], []
            for number, line in block:
                if line.isspace():
                    continue
                _check_is_text(line, path)
                found = _object(line, literals)
                if found is None:
                    malformed.add(number, line[:200].decode("utf-8", "replace").strip())
                else:
                    values.append([joined(found.get(column)) for column in columns])
                    lines.append(number)
            yield _Chunk(pl.DataFrame(values, schema={name: pl.String for name in columns}, orient="row"), lines)


def _object(line, literals):
    """The object of one line; None where there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        if not literals:
            return None
        try:
            found = ast.literal_eval(line.decode("utf-8").strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    if not isinstance(found, dict) or b"\\ud" in line.lower() and _has_surrogates(str(found)):
        return None
    return found


# --- Parquet


def _parquet_schema(path):
    try:
        return pl.scan_parquet(path).collect_schema()
    except (pl.exceptions.PolarsError, OSError) as failure:
        raise UserError(f"{path}: is no Parquet file ({str(failure).splitlines()[0]}); download it again") from None


def _parquet_chunks(path, columns):
    schema = _parquet_schema(path)
    for column in columns:
        _place(column, schema.names(), path)
    table = pl.scan_parquet(path).select(_as_string(column, schema[column]) for column in columns)
    try:
        for start in itertools.count(0, _ROWS):
            frame = table.slice(start, _ROWS).collect()
            if frame.is_empty():
                return
            yield _Chunk(frame, list(range(start + 1, start + 1 + len(frame))))
    except (pl.exceptions.PolarsError, OSError) as failure:
        raise UserError(f"{path}: the Parquet file is damaged ({str(failure).splitlines()[0]})") from None


def _as_string(column, kind):
    """A column as strings: times as seconds since 1970, whole floats without their point, lists joined by blanks."""
    values = pl.col(column)
    if kind.is_temporal():
        return values.cast(pl.Datetime("us")).dt.timestamp("us").cast(pl.Float64).truediv(1e6).cast(pl.String)
    if kind.is_nested():
        return values.map_elements(lambda value: joined(_plain(value)), return_dtype=pl.String)
    if kind.is_float():
        whole = values.cast(pl.Int64, strict=False)
        return pl.when(whole == values).then(whole.cast(pl.String)).otherwise(values.cast(pl.String))
    return values.cast(pl.String)


def _plain(value):
    return value.to_list() if isinstance(value, pl.Series) else value
