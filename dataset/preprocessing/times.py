"""Timestamps out of strings: numbers as they are, dates in the format that fits the whole column."""

import polars as pl

from common.errors import UserError
from dataset.preprocessing.tables import Malformed, read_table

_CLOCKS = (" %H:%M:%S%.f", " %H:%M", "T%H:%M:%S%.f", "T%H:%M", "")
_ZONED = ("T%H:%M:%S%.f%:z", " %H:%M:%S%.f%:z", "T%H:%M:%S%.fZ")
_YEAR_FIRST = ("%Y-%m-%d", "%Y/%m/%d")
_YEAR_LAST = ("%m/%d/%Y", "%d/%m/%Y", "%m/%d/%y", "%d/%m/%y", "%d.%m.%Y", "%d.%m.%y", "%d-%m-%Y", "%m-%d-%Y")
FORMATS = tuple(
    day + clock for day in (*_YEAR_FIRST, *_YEAR_LAST) for clock in _CLOCKS + (_ZONED if day == "%Y-%m-%d" else ())
)


def time_column(path, column, form=None, ambiguous=None, **reading):
    """How to read the timestamps of a table.

    Args:
        path (str): the table.
        column (str): its column of timestamps.
        form (str, optional): the format of dates, with %Y, %m, ...; by default found out by looking.
        ambiguous (str, optional): the form of day that is taken where several fit, such as `%m/%d/%Y`.
        reading: further arguments of `tables.read_table`.

    Returns:
        polars.Expr: int64 or float64; dates as microseconds since 1970; null where a value is no timestamp.

    Raises:
        UserError: no way to read them fits most values, or several do.
    """
    if form:
        return _date(column, form)
    chunk = next(_strings(path, column, reading), None)
    if chunk is None or not len(chunk):
        raise UserError(f"{path}: {column}: holds no timestamp")
    for kind in (pl.Int64, pl.Float64):
        number = pl.col(column).cast(kind, strict=False)
        if _fits(chunk, number) > 0.5:
            return number if kind == pl.Int64 else pl.when(number.is_finite()).then(number)
    return _date(column, _find_format(path, column, chunk, ambiguous, reading))


def _strings(path, column, reading):
    """The column in parts, empty values left out."""
    return read_table(path, [column], [pl.col(column).fill_null("").alias(column)], Malformed(path, 1.0), **reading)


def _date(column, form):
    """Dates in a format as microseconds; null where there is none, or where its year cannot be meant."""
    zone = "%:z" in form
    date = pl.col(column).str.strip_chars().str.strptime(pl.Datetime("us", "UTC" if zone else None), form, strict=False)
    return pl.when(date.dt.year().is_between(1900, 2200)).then(date.dt.timestamp("us")).alias(column)


def _fits(chunk, parsed):
    """The share of the values that can be read in a way."""
    return len(chunk) and chunk.select(parsed.is_not_null().mean()).item()


def _find_format(path, column, chunk, ambiguous, reading):
    """The format that fits most values: of the first part, and where that leaves several, of the whole table."""
    likely = [form for form in FORMATS if _fits(chunk, _date(column, form)) > 0.5]
    if not likely:
        raise UserError(
            f"{path}: {column}: {chunk[column][0]!r} is no timestamp in a known form; expected seconds, dates such as "
            "2018-03-01 12:30:00, or another form given by --timestamp_format"
        )
    if len(likely) > 1:
        counts = dict.fromkeys(likely, 0)
        for part in _strings(path, column, reading):
            for form in likely:
                counts[form] += part.select(_date(column, form).is_not_null().sum()).item()
        likely = [form for form in likely if counts[form] == max(counts.values())]
    preferred = [form for form in likely if ambiguous and form.startswith(ambiguous)] or likely
    if len(preferred) > 1:
        raise UserError(
            f"{path}: {column}: {chunk[column][0]!r} can be read as {' or as '.join(preferred)}; choose one with "
            "--timestamp_format"
        )
    return preferred[0]
