"""Timestamps out of strings: numbers as they are, dates in the format that fits the whole column."""

import numpy as np
import polars as pl

from common.errors import UserError
from dataset.preprocessing.tables import Malformed, read_table

_SAMPLE = 1000  # values by which the kind of a column is told
_EXACT = 1 << 53  # whole numbers up to here are exact as float64
_SECONDS, _MINUTES = "%H:%M:%S%.f", "%H:%M"
_CLOCKS = (f" {_SECONDS}", f" {_MINUTES}", f"T{_SECONDS}", f"T{_MINUTES}", " %I:%M:%S %p", " %I:%M %p", "")
_ZONED = (f" {_SECONDS}%#z", f" {_MINUTES}%#z", f"T{_SECONDS}%#z", f"T{_MINUTES}%#z", f" {_SECONDS} UTC")
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
    sample = next((part for part in _values(path, column, reading) if len(part)), None)
    if sample is None:
        raise UserError(f"{path}: {column}: holds no timestamp")
    sample = sample.head(_SAMPLE)
    if form:
        if not _fits(sample, _date(column, form)):
            raise UserError(
                f"--timestamp_format {form}: does not fit {sample[column][0]!r} in the column {column} of {path}; "
                "numbers and Parquet's own times need no format"
            )
        return _date(column, form)
    value = pl.col(column).str.strip_chars()
    number = value.cast(pl.Float64, strict=False)
    number = pl.when(number.is_finite()).then(number)
    if _fits(sample, number) > 0.5:
        nanoseconds = sample.select(number.abs().max() > _EXACT).item()
        return value.cast(pl.Int64, strict=False) if nanoseconds else number
    return _date(column, _find_format(path, column, sample, ambiguous, reading))


def without_fractions(timestamps):
    """Timestamps, int64 or float64 [n], as whole numbers where they all are: those sort several times as fast."""
    if timestamps.dtype.kind == "i" or np.abs(timestamps).max() > _EXACT:
        return timestamps
    whole = timestamps.astype(np.int64)
    return whole if np.array_equal(whole, timestamps) else timestamps


def _values(path, column, reading):
    """The column in parts, empty values left out."""
    value = pl.col(column).fill_null("").str.strip_chars()
    for part in read_table(path, [column], [value], Malformed(path, 1.0), **reading):
        yield part.filter(pl.col(column) != "")


def _date(column, form):
    """Dates in a format as microseconds; null where there is none, or where its year cannot be meant."""
    date = pl.col(column).str.strip_chars().str.strptime(pl.Datetime("us"), form, strict=False)
    return pl.when(date.dt.year().is_between(1900, 2200)).then(date.dt.timestamp("us")).alias(column)


def _fits(values, parsed):
    """The share of the values that can be read in a way."""
    return values.select(parsed.is_not_null().mean()).item()


def _find_format(path, column, sample, ambiguous, reading):
    """The format that fits most values: of the first ones, and where that leaves several, of the whole table."""
    shares = sample.select(_date(column, form).is_not_null().mean().alias(form) for form in FORMATS).row(0)
    likely = [form for form, share in zip(FORMATS, shares, strict=True) if share > 0.5]
    if not likely:
        raise UserError(
            f"{path}: {column}: {sample[column][0]!r} is no timestamp in a known form; expected seconds, dates such as "
            "2018-03-01 12:30:00, or another form given by --timestamp_format"
        )
    if len(likely) > 1:
        fitting = [_date(column, form).is_not_null().sum().alias(form) for form in likely]
        counts = pl.concat(part.select(fitting) for part in _values(path, column, reading)).sum().row(0)
        likely = [form for form, count in zip(likely, counts, strict=True) if count == max(counts)]
    preferred = [form for form in likely if ambiguous and form.startswith(ambiguous)] or likely
    if len(preferred) > 1:
        raise UserError(
            f"{path}: {column}: {sample[column][0]!r} can be read as {' or as '.join(preferred)}; choose one with "
            "--timestamp_format"
        )
    return preferred[0]
