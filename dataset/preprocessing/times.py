"""Reading timestamps from strings: numbers as they are, dates in the format that fits the whole column."""

from collections.abc import Iterator

import numpy as np
import polars as pl

from common.errors import UserError
from dataset.preprocessing.tables import MalformedRows, read_table

_SAMPLE = 1000  # values that decide whether a column holds numbers or dates
_EXACT = 1 << 53  # whole numbers up to here are exact as float64
_SECONDS, _MINUTES = "%H:%M:%S%.f", "%H:%M"
_CLOCKS = (f" {_SECONDS}", f" {_MINUTES}", f"T{_SECONDS}", f"T{_MINUTES}", " %I:%M:%S %p", " %I:%M %p", "")
_ZONED = (f" {_SECONDS}%#z", f" {_MINUTES}%#z", f"T{_SECONDS}%#z", f"T{_MINUTES}%#z", f" {_SECONDS} UTC")
_YEAR_FIRST = ("%Y-%m-%d", "%Y/%m/%d")
_YEAR_LAST = ("%m/%d/%Y", "%d/%m/%Y", "%m/%d/%y", "%d/%m/%y", "%d.%m.%Y", "%d.%m.%y", "%d-%m-%Y", "%m-%d-%Y")
FORMATS = tuple(
    day + clock for day in (*_YEAR_FIRST, *_YEAR_LAST) for clock in _CLOCKS + (_ZONED if day == "%Y-%m-%d" else ())
)


def time_column(
    path: str, column: str, date_format: str | None = None, preferred_day: str | None = None, **reading
) -> pl.Expr:
    """Find out how to read the timestamps of a table.

    Args:
        path: the table.
        column: its column of timestamps.
        date_format: of dates, with %Y, %m, ... By default it is derived from the values.
        preferred_day: the format of the day to use if several formats fit, such as `%m/%d/%Y`.
        reading: further arguments of `tables.read_table`.

    Returns:
        An expression of int64 or float64, null if a value is not a timestamp. Dates become microseconds since 1970.

    Raises:
        UserError: no format fits most values, or several formats fit.
    """
    sample = next((part for part in _values(path, column, reading) if len(part)), None)
    if sample is None:
        raise UserError(f"{path}: {column}: holds no timestamp")
    sample = sample.head(_SAMPLE)
    if date_format:
        if not _readable_share(sample, _date(column, date_format)):
            raise UserError(
                f"--timestamp_format {date_format}: does not fit {sample[column][0]!r} in the column {column} of "
                f"{path}; leave the option out for numbers and for Parquet's own times"
            )
        return _date(column, date_format)
    value = pl.col(column).str.strip_chars()
    number = value.cast(pl.Float64, strict=False)
    number = pl.when(number.is_finite()).then(number)
    if _readable_share(sample, number) > 0.5:
        too_large_for_float = sample.select(number.abs().max() > _EXACT).item()
        return value.cast(pl.Int64, strict=False) if too_large_for_float else number
    return _date(column, _find_format(path, column, sample, preferred_day, reading))


def without_fractions(timestamps: np.ndarray) -> np.ndarray:
    """Convert float64 [n] to int64 if all timestamps are whole numbers. Integers are sorted several times as fast."""
    if timestamps.dtype.kind == "i" or np.abs(timestamps).max() > _EXACT:
        return timestamps
    whole = timestamps.astype(np.int64)
    return whole if np.array_equal(whole, timestamps) else timestamps


def _values(path: str, column: str, reading: dict) -> Iterator[pl.DataFrame]:
    """The column in parts, without empty values."""
    value = pl.col(column).fill_null("").str.strip_chars()
    for part in read_table(path, [column], [value], MalformedRows(path, 1.0), **reading):
        yield part.filter(pl.col(column) != "")


def _date(column: str, date_format: str) -> pl.Expr:
    """Dates as microseconds since 1970. Null if a value does not have this format, or has an implausible year."""
    date = pl.col(column).str.strip_chars().str.strptime(pl.Datetime("us"), date_format, strict=False)
    return pl.when(date.dt.year().is_between(1900, 2200)).then(date.dt.timestamp("us")).alias(column)


def _readable_share(values: pl.DataFrame, parsed: pl.Expr) -> float:
    """The share of the values for which an expression is not null."""
    return values.select(parsed.is_not_null().mean()).item()


def _find_format(path: str, column: str, sample: pl.DataFrame, preferred_day: str | None, reading: dict) -> str:
    """The format that fits most values of the sample. If several formats do, the one that fits most of the table."""
    shares = sample.select(_date(column, each).is_not_null().mean().alias(each) for each in FORMATS).row(0)
    likely = [each for each, share in zip(FORMATS, shares, strict=True) if share > 0.5]
    if not likely:
        raise UserError(
            f"{path}: {column}: {sample[column][0]!r} is not a timestamp in a known format; expected seconds, dates "
            "such as 2018-03-01 12:30:00, or another format, named with --timestamp_format"
        )
    if len(likely) > 1:
        fitting = [_date(column, each).is_not_null().sum().alias(each) for each in likely]
        counts = pl.concat(part.select(fitting) for part in _values(path, column, reading)).sum().row(0)
        likely = [each for each, count in zip(likely, counts, strict=True) if count == max(counts)]
    preferred = [each for each in likely if preferred_day and each.startswith(preferred_day)] or likely
    if len(preferred) > 1:
        raise UserError(
            f"{path}: {column}: {sample[column][0]!r} can be read as {' or as '.join(preferred)}; choose one with "
            "--timestamp_format"
        )
    return preferred[0]
