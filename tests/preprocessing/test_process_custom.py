"""Anyone's tables to a data set: the same from any kind of file, split as plain loops split, errors in one line."""

import collections
import datetime
import errno
import gzip
import io
import json
import os
import random
import subprocess
import sys

import polars as pl
import pytest

from dataset.preprocessing import splits, tables
from dataset.preprocessing.process_custom import PROJECT, main
from dataset.preprocessing.texts import read_texts

DATA = ("item2index", "text", "train.inter", "valid.inter", "test.inter", "user2index")


def draw_shop(seed, times=40, users=30, items=25, rows=600):
    """Interactions (user, item, time) with many ties in time and repeats, and item texts (item, name, notes)."""
    draw = random.Random(seed)
    clicks = [(draw.randrange(users), draw.randrange(items), draw.randrange(times)) for _ in range(rows)]
    names = {item: draw.choice(["Tea, black", '5" pipe', 'a "new"\nline', "café", "x"]) for item in range(items)}
    notes = {item: draw.choice([None, "rotten; cheap", "tab\tted"]) for item in range(items)}
    return clicks, [(item, names[item], notes[item]) for item in draw.sample(range(items), items)]


def write_shop(folder, kind, clicks, goods):
    """Write both tables in one of the kinds. Returns the options that name them."""
    moments = [datetime.datetime(2020, 1, 1) + datetime.timedelta(hours=time) for _, _, time in clicks]
    clicked = pl.DataFrame(clicks, schema=["customer", "sku", "clicked_at"], orient="row")
    items = pl.DataFrame(goods, schema=["sku", "name", "notes"], orient="row")
    if kind in ("parquet", "jsonl", "jsonl.gz"):
        clicked = clicked.with_columns(clicked_at=pl.Series(moments))
    options = ["--user_column=customer", "--item_column=sku", "--timestamp_column=clicked_at"]
    for option, table in (("interactions", clicked), ("items", items)):
        buffer = io.BytesIO()
        {
            "csv": lambda table, file: table.write_csv(file),
            "tsv": lambda table, file: table.write_csv(file, separator="\t", line_terminator="\r\n", include_bom=True),
            "parquet": lambda table, file: table.write_parquet(file),
            "jsonl": lambda table, file: table.write_ndjson(file),
        }[kind.removesuffix(".gz")](table, buffer)
        path = os.path.join(folder, f"{option}.{kind}")
        with open(path, "wb") as file:
            file.write(gzip.compress(buffer.getvalue()) if kind.endswith(".gz") else buffer.getvalue())
        options.append(f"--{option}={path}")
    return [*options, "--text_columns=name, notes"]


def run(out, argv, *options):
    """Run the command. Returns the data set's folder, str."""
    main(["--dataset=Shop", f"--output_path={out}", "--plm_name=none", "--user_k=5", "--item_k=5", *argv, *options])
    return os.path.join(str(out), "Shop")


def contents(folder):
    """The bytes of all files, but of the description what is not about the sources."""
    found = {}
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            found[name] = file.read()
    about = json.loads(found["Shop.json"])
    return found | {"Shop.json": {key: value for key, value in about.items() if key != "sources"}}


def lines(folder, end):
    with open(os.path.join(folder, f"Shop.{end}"), encoding="utf-8") as file:
        return [line.split("\t") for line in file.read().split("\n")[:-1]]


def predictions(folder, split):
    """The rows of a split with raw ids: (user, history, target)."""
    users, items = ({index: raw for raw, index in lines(folder, f"{kind}2index")} for kind in ("user", "item"))
    return [
        (users[user], tuple(items[item] for item in history.split(" ")), items[target])
        for user, history, target in lines(folder, f"{split}.inter")[1:]
    ]


def reference(rows, listed, least, split, share=0.1):
    """What the three splits should hold, by plain loops. `rows` are (user, item, time), strings and a number."""
    rows = [row for row in dict.fromkeys(rows) if row[1] in listed]
    while True:
        users, items = (collections.Counter(row[side] for row in rows) for side in (0, 1))
        kept = [row for row in rows if users[row[0]] >= least and items[row[1]] >= least]
        if len(kept) == len(rows):
            break
        rows = kept
    histories = collections.defaultdict(list)
    for row in sorted(rows, key=lambda row: row[2]):  # stable: ties stay in file order
        histories[row[0]].append(row)
    times = sorted(row[2] for row in rows)
    last = len(rows) - round(share * len(rows))
    cuts = times[last - round(share * len(rows))], times[last]
    expected = {name: [] for name in splits.SPLITS}
    for user, history in histories.items():
        for place in range(1, len(history)):
            if split == "time":
                name = splits.SPLITS[sum(history[place][2] >= cut for cut in cuts)]
            else:
                name = {len(history) - 1: "test", len(history) - 2: "valid"}.get(place, "train")
            prefix = tuple(row[1] for row in history[max(0, place - 50) : place])
            expected[name].append((user, prefix, history[place][1]))
    return {name: sorted(rows) for name, rows in expected.items()}


# --- what comes out


@pytest.mark.parametrize("kind", ["tsv", "parquet", "jsonl", "csv.gz", "jsonl.gz"])
def test_the_same_shop_in_any_kind_of_file(tmp_path, monkeypatch, kind):
    shop = draw_shop(0)
    expected = contents(run(tmp_path / "csv", write_shop(tmp_path, "csv", *shop)))
    assert len(expected) == 7
    for size in (1 << 25, 50):
        for name in ("_BLOCK", "_LINES", "_ROWS"):
            monkeypatch.setattr(tables, name, size)
        assert contents(run(tmp_path / f"{kind}{size}", write_shop(tmp_path, kind, *shop))) == expected


@pytest.mark.parametrize("split", ["time", "leave_one_out"])
@pytest.mark.parametrize("seed", range(4))
def test_splits_are_what_plain_loops_make(tmp_path, split, seed):
    users = 5 if seed == 3 else 30  # few users: histories longer than CUT_LENGTH
    clicks, goods = draw_shop(seed, times=20 if seed else 2000, users=users)
    folder = run(tmp_path, write_shop(tmp_path, "csv", clicks, goods[2:]), f"--split={split}")
    rows = [(str(user), str(item), time) for user, item, time in clicks]
    expected = reference(rows, {str(item) for item, *_ in goods[2:]}, 5, split)
    assert {name: sorted(predictions(folder, name)) for name in splits.SPLITS} == expected
    if users == 5:
        assert max(len(history) for _, history, _ in predictions(folder, "test")) == 50


@pytest.mark.slow
def test_same_bytes_whatever_the_hash_seed_and_the_number_of_threads(tmp_path):
    argv = write_shop(tmp_path, "csv", *draw_shop(5))
    expected = contents(run(tmp_path / "here", argv, "--split=time"))
    script = os.path.join(PROJECT, "dataset", "preprocessing", "process_custom.py")
    for seed, threads in (("1", "1"), ("2", "2")):
        out = tmp_path / seed
        options = ["--dataset=Shop", f"--output_path={out}", "--plm_name=none", *argv, "--split=time"]
        environment = os.environ | {"PYTHONHASHSEED": seed, "POLARS_MAX_THREADS": threads}
        subprocess.run([sys.executable, script, *options], env=environment, check=True, capture_output=True)
        assert contents(out / "Shop") == expected


def test_one_file_for_both(tmp_path):
    path = tmp_path / "both.csv"
    rows = [
        "user_id,item_id,timestamp,title",
        *(f"{u},{i},{u + i},Item {i}{u or ''}" for u in range(6) for i in range(6)),
    ]
    path.write_text("\n".join(rows))
    folder = run(tmp_path, [f"--interactions={path}", f"--items={path}"])
    assert read_texts(f"{folder}/Shop.text") == {str(i): f"Item {i}." for i in range(6)}  # the first row's


def small(tmp_path, **columns):
    """A shop of three users who buy a, b, c, d one after the other. Returns the options that name it."""
    clicks = [(user, item, time) for user in "uvw" for time, item in enumerate("abcd")]
    texts = columns or {"title": ["A", "B", "C", "D"]}
    pl.DataFrame(clicks, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(tmp_path / "clicks.csv")
    goods = pl.DataFrame({"item_id": list("abcdef")[: len(next(iter(texts.values())))], **texts})
    goods.write_csv(tmp_path / "goods.csv")
    return [
        f"--interactions={tmp_path / 'clicks.csv'}",
        f"--items={tmp_path / 'goods.csv'}",
        "--user_k=3",
        "--item_k=1",
    ]


def test_texts_of_several_columns_and_other_names_of_ids(tmp_path):
    argv = small(
        tmp_path, sku=["a", "b ", " c", "d", ""], brand=["X.", None, "", "W", "V"], name=["1", "2", "3", "4", "5"]
    )
    folder = run(tmp_path, argv, "--items_item_column=sku", "--text_columns=name,brand", "--max_malformed=0.2")
    assert read_texts(f"{folder}/Shop.text") == {"a": "1. X.", "b": "2.", "c": "3.", "d": "4. W."}


def test_blanks_around_ids_do_not_count(tmp_path):
    argv = small(tmp_path)
    text = (tmp_path / "clicks.csv").read_text()
    expected = contents(run(tmp_path / "tight", argv))
    (tmp_path / "clicks.csv").write_text(text.replace(",", " , "))
    assert contents(run(tmp_path / "loose", argv)) == expected


def test_all_items(tmp_path):
    argv = small(tmp_path, title=["A", "B", "C", "D", "E", "F"])
    folder = run(tmp_path, argv, "--all_items")
    assert [raw for raw, _ in lines(folder, "item2index")] == list("abcdef")
    assert read_texts(f"{folder}/Shop.text")["f"] == "F."
    assert [raw for raw, _ in lines(run(tmp_path, argv), "item2index")] == list("abcd")


def test_columns_to_show_are_kept(tmp_path):
    argv = small(tmp_path, title=["A", "B", "C", "D", "E"], link=["1", None, "", "x", "y"])
    folder = run(tmp_path, argv, "--show_columns=title, url = link", "--all_items")
    shown = splits.read_show_columns(folder, "Shop")
    assert shown.rows(named=True) == [
        {"id": item, "title": item.upper(), "url": url}
        for item, url in (("a", "1"), ("b", None), ("c", None), ("d", "x"), ("e", "y"))
    ]
    assert read_texts(f"{folder}/Shop.text") == {item: f"{item.upper()}." for item in "abcde"}
    run(tmp_path, argv)
    assert splits.read_show_columns(folder, "Shop") is None, "the file of the earlier data set is not read"


@pytest.mark.parametrize("empty", [None, "", " .", "<br>"])
def test_items_without_text(tmp_path, refused, empty):
    argv = [
        "--dataset=Shop",
        f"--output_path={tmp_path}",
        "--plm_name=none",
        *small(tmp_path, title=["A", empty, "C", "D"]),
    ]
    message = refused(main, *argv)
    assert "1 of 4 items have no text: b;" in message and "--missing_text" in message
    main([*argv, "--missing_text=empty"])
    assert read_texts(tmp_path / "Shop" / "Shop.text") == {"a": "A.", "b": "", "c": "C.", "d": "D."}
    assert predictions(tmp_path / "Shop", "test")[0] == ("u", ("a", "b", "c"), "d")
    main([*argv, "--missing_text=drop"])
    assert read_texts(tmp_path / "Shop" / "Shop.text") == {"a": "A.", "c": "C.", "d": "D."}
    assert predictions(tmp_path / "Shop", "test")[0] == ("u", ("a", "c"), "d")


def test_formats_of_time_and_encodings(tmp_path):
    clicks = ["user_id;item_id;timestamp"]
    clicks += [f"é;{item};{day:02}/02/2020" for item, day in (("b", 2), ("c", 11), ("a", 1))]
    (tmp_path / "c.csv").write_bytes("\n".join(clicks).encode("latin-1"))
    (tmp_path / "i.csv").write_bytes("item_id;title\na;é\nb;£\nc;C\n".encode("latin-1"))
    argv = [f"--interactions={tmp_path / 'c.csv'}", f"--items={tmp_path / 'i.csv'}", "--user_k=1", "--item_k=1"]
    folder = run(tmp_path, argv, "--encoding=latin-1", "--timestamp_format=%d/%m/%Y")
    assert predictions(folder, "test") == [("é", ("a", "b"), "c")]
    assert read_texts(f"{folder}/Shop.text") == {"a": "é.", "b": "£.", "c": "C."}


def test_malformed_rows_are_counted_in_both_files(tmp_path):
    argv = small(tmp_path)
    for name in ("clicks.csv", "goods.csv"):
        with open(tmp_path / name, "a") as file:
            file.write(",,,,\nx,,\n" if name == "clicks.csv" else ",nothing\n")
    folder = run(tmp_path, argv, "--max_malformed=0.3")
    with open(f"{folder}/Shop.json", encoding="utf-8") as file:
        sources = json.load(file)["sources"]
    assert [(each["rows"], each["malformed"], each["first"]) for each in sources] == [
        (12, 2, "line 14: ',,,,'; line 15: 'x,,'"),
        (4, 1, "line 6: ',nothing'"),
    ]


# --- what cannot be


def replaced(name, old, new):
    """A change to one of the files of `small`."""

    def change(folder):
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new))

    return change


def nothing(folder):
    pass


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (nothing, ["--user_column=user"], "clicks.csv: has no column user; found user_id, item_id, timestamp"),
        (nothing, ["--item_column=itemid"], "did you mean item_id?"),
        (nothing, ["--timestamp_column=time"], "no column time;"),
        (nothing, ["--text_columns=title,titel"], "goods.csv: has no column titel; found item_id, title; did you mean"),
        (nothing, ["--text_columns="], "has no column"),
        (nothing, ["--items_item_column=sku"], "goods.csv: has no column sku"),
        (nothing, ["--interactions=nowhere.csv"], "nowhere.csv: no such file"),
        (nothing, ["--items=nowhere.csv"], "nowhere.csv: no such file"),
        (nothing, ["--user_k=99"], "none of the 12 interactions remains"),
        (nothing, ["--user_column=item_id"], "none of the 12 interactions remains"),
        (nothing, ["--timestamp_column=user_id"], "'u' is not a timestamp"),
        (nothing, ["--timestamp_format=%Y"], "--timestamp_format %Y: does not fit '0'"),
        (nothing, ["--encoding=latin-l"], "--encoding latin-l: no such encoding"),
        (nothing, ["--max_malformed=2"], "--max_malformed 2.0"),
        (nothing, ["--dataset=a/b"], "--dataset 'a/b'"),
        (nothing, ["--split=time", "--test_share=1"], "--test_share 1.0"),
        (replaced("clicks.csv", b"\nu,", b'\n"u\tx",'), [], r"user id 'u\tx': holds a tab"),
        (replaced("goods.csv", b"b,B", b",B"), ["--max_malformed=0.1"], "1 of 4 rows are malformed, line 3: ',B'"),
        (replaced("clicks.csv", b"u,a,0", b"u,a\xe9,0"), [], "line 2: 'not UTF-8: u,a?,0'"),
        (replaced("clicks.csv", b"u,a,0", b"u,a,nan"), [], "line 2: 'u,a,nan'"),
        (replaced("clicks.csv", b"u,a,0", b"u,a,0,0"), [], "1 of 12 rows are malformed"),
        (replaced("clicks.csv", b"u,a,0", b"u,a,\0"), [], "clicks.csv: is a binary file"),
        (replaced("goods.csv", b"C", b""), [], "1 of 4 items have no text: c"),
        (lambda folder: (folder / "goods.csv").write_text("item_id,title\n"), [], "goods.csv: holds no item"),
        (lambda folder: (folder / "clicks.csv").write_text("user_id,item_id,timestamp\n"), [], "holds no timestamp"),
        (lambda folder: (folder / "clicks.csv").write_bytes(b""), [], "first line is empty"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, refused, change, options, message):
    argv = small(tmp_path)
    change(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out" / "deeper"
    assert message in refused(main, "--dataset=Shop", f"--output_path={out}", "--plm_name=none", *argv, *options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["csv.gz", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("table", ["interactions", "items"])
def test_damaged_files(tmp_path, refused, kind, table):
    argv = write_shop(tmp_path, kind, *draw_shop(0))
    path = tmp_path / f"{table}.{kind}"
    path.write_bytes(path.read_bytes()[:-30])
    before = sorted(tmp_path.rglob("*"))
    message = refused(main, "--dataset=Shop", f"--output_path={tmp_path / 'out'}", "--plm_name=none", *argv)
    assert str(path) in message and ("damaged" in message or "is not a Parquet file" in message)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_the_old_data_set(tmp_path, monkeypatch, refused):
    argv = small(tmp_path)
    before = contents(run(tmp_path, argv))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(splits, "_write_table", lambda *_: (_ for _ in ()).throw(full))
    for out, left in ((tmp_path, ["Shop"]), (tmp_path / "other", None)):
        message = refused(main, "--dataset=Shop", f"--output_path={out}", "--plm_name=none", *argv)
        assert "the disk is full" in message
        assert left is None or sorted(each.name for each in tmp_path.iterdir() if each.is_dir()) == left
    assert contents(tmp_path / "Shop") == before
