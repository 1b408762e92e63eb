"""Timestamps: numbers and dates, the format found out from the whole column, the order that of the real time."""

import datetime
import random

import numpy as np
import polars as pl
import pytest

from common.errors import UserError
from dataset.preprocessing import times
from dataset.preprocessing.times import FORMATS, time_column, without_fractions


def table(tmp_path, values, name="times.csv"):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pl.DataFrame({"when": values}).write_parquet(path)
    else:
        path.write_text("who\twhen\n" + "".join(f"u\t{value}\n" for value in values))
    return str(path)


def read(tmp_path, values, *arguments, **named):
    """The timestamps made of a column."""
    path = table(tmp_path, values)
    values = pl.DataFrame({"when": values}, schema={"when": pl.String})
    return values.select(time_column(path, "when", *arguments, **named)).to_series().to_list()


def error(tmp_path, values, *arguments):
    with pytest.raises(UserError) as error:
        read(tmp_path, values, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def microseconds(moment):
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return (moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["1500000000", "-5", " 7 "], [1500000000, -5, 7]),
        (["1500000000000", "0"], [1500000000000, 0]),
        (["1500000000.25", "1500000000", "1e9"], [1500000000.25, 1500000000, 1e9]),
        (["1500000000"] * 5 + ["1500000000.5"], [1500000000] * 5 + [1500000000.5]),
        (["5", "6", "nan", "inf", "x", "7", "8", "9", ""], [5, 6, None, None, None, 7, 8, 9, None]),
        (["1500000000123456789", "1500000000123456788", "inf"], [1500000000123456789, 1500000000123456788, None]),
        (["20180301", "20180228"], [20180301, 20180228]),
    ],
)
def test_numbers(tmp_path, values, expected):
    assert read(tmp_path, values) == expected


def test_dates_of_every_format_are_what_python_reads(tmp_path):
    draw = random.Random(0)
    start, span = datetime.datetime(1980, 1, 1), datetime.timedelta(days=80 * 365)
    for form in FORMATS:
        moments = [start + draw.random() * span for _ in range(8)]
        python = form.replace("%S%.f", "%S.%f").replace("%#z", "%z")
        if "%z" in python:
            zones = [datetime.timezone(datetime.timedelta(minutes=draw.randrange(-720, 720, 15))) for _ in moments]
            moments = [moment.replace(tzinfo=zone) for moment, zone in zip(moments, zones, strict=True)]
        written = [moment.strftime(python) for moment in moments]
        expected = [microseconds(datetime.datetime.strptime(each, python)) for each in written]
        assert read(tmp_path, written) == expected, form
        assert read(tmp_path, written, form) == expected, form


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["2018-03-01T12:30:00Z", "2018-03-01T12:30:00.5+02:00", "2018-03-01T12:30:00-0500"], [1, 0, 2]),
        (["2018-03-01 12:30:00+00", "2018-03-01 12:29:00+00:00", "2018-03-01 12:30:00 +00:30"], [2, 1, 0]),
        (["2019-10-01 00:00:01 UTC", "2019-10-01 00:00:00 UTC"], [1, 0]),
        (["1/3/2010 8:26", "1/13/2010 8:25", "1/3/2010 18:26"], [0, 2, 1]),
        (["1/2/10 8:26", "13/1/10 8:26"], [1, 0]),
        (["3/25/2018 1:00:00 PM", "3/25/2018 12:30:00 AM", "3/25/2018 11:59:59 AM"], [2, 0, 1]),
        (["31.12.99", "01.01.00"], [0, 1]),
        (["2018-03-01", "2017-12-31"], [1, 0]),
    ],
)
def test_the_order_is_that_of_the_real_time(tmp_path, values, expected):
    assert np.argsort(np.argsort(read(tmp_path, values))).tolist() == expected


@pytest.mark.parametrize("late", [0, 1500])
def test_the_whole_column_tells_days_from_months(tmp_path, late):
    unclear = ["01/02/2018 10:00"] * 1200
    for telling, expected in (("25/02/2018 10:00", (2, 1)), ("02/25/2018 10:00", (1, 2))):
        values = [*unclear, telling] if late else [telling, *unclear]
        found = read(tmp_path, values)[1 if not late else 0]
        assert found == microseconds(datetime.datetime(2018, *expected, 10))
    # a mistyped row does not outvote the others
    assert None in read(tmp_path, [*unclear, *["25/02/2018 10:00"] * 3, "02/25/2018 10:00"])


def test_days_that_may_be_months(tmp_path):
    values = ["01/02/2018", "03/04/2018"]
    message = error(tmp_path, values)
    assert "'01/02/2018'" in message and "%m/%d/%Y or as %d/%m/%Y" in message and "--timestamp_format" in message
    assert read(tmp_path, values, preferred_day="%m/%d/%Y")[0] == microseconds(datetime.datetime(2018, 1, 2))
    assert read(tmp_path, values, "%d/%m/%Y")[0] == microseconds(datetime.datetime(2018, 2, 1))


def test_a_format_of_ones_own(tmp_path):
    assert read(tmp_path, ["1 Mar 2018", "x", ""], "%d %b %Y") == [
        microseconds(datetime.datetime(2018, 3, 1)),
        None,
        None,
    ]
    assert read(tmp_path, ["1500000000"], "%s") == [1500000000 * 10**6]
    for form in ("%d.%m.%Y", "foo", "%Q", "%", "%H:%M"):
        message = error(tmp_path, ["", "2018-03-01"], form)
        assert f"--timestamp_format {form}: does not fit '2018-03-01' in the column when" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["monday", "tuesday"], "'monday' is not a timestamp in a known form"),
        (["nan", "inf"], "'nan' is not a timestamp"),
        (["2018-13-01", "2018-02-30"], "is not a timestamp"),
        (["01/01/0018"], "is not a timestamp"),
        (["", " "], "holds no timestamp"),
        ([], "holds no timestamp"),
    ],
)
def test_unusable_columns(tmp_path, values, message):
    assert message in error(tmp_path, values)


def test_empty_values_have_no_vote(tmp_path, monkeypatch):
    assert read(tmp_path, ["", "", "", "5"]) == [None, None, None, 5]
    monkeypatch.setattr("dataset.preprocessing.tables._BLOCK", 4)
    assert read(tmp_path, ["", "", "", "2018-03-01"])[3] == microseconds(datetime.datetime(2018, 3, 1))


def test_times_of_parquet(tmp_path):
    moments = [datetime.datetime(2020, 1, 1, 0, 0, 0, 1), datetime.datetime(2020, 1, 1), datetime.datetime(1960, 5, 5)]
    for kind in (pl.Datetime("us"), pl.Datetime("ns", "Asia/Tokyo"), pl.Date, pl.Int64, pl.Float32):
        path = table(tmp_path, pl.Series(moments, dtype=pl.Datetime("us")).cast(kind), "times.parquet")
        columns = times._values(path, "when", {})
        found = pl.concat(columns).select(time_column(path, "when")).to_series().to_list()
        assert found[2] < found[1] and found[1] <= found[0]
        assert found[1] < found[0] or kind in (pl.Date, pl.Float32)


def test_whole_numbers_lose_their_point():
    for values, kind in (([1.0, -2.0], "i"), ([1.5, 2.0], "f"), ([1e300, 1.0], "f")):
        found = without_fractions(np.array(values))
        assert found.dtype.kind == kind and found.tolist() == values
    assert without_fractions(np.array([2**60 + 1])).tolist() == [2**60 + 1]
