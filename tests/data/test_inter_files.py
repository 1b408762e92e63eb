"""Reading `.inter` files, and their caches."""

import os
import pathlib
import stat

import numpy as np
import pytest

from common.errors import UserError
from data import files, inter_files
from data.catalogue import Catalogue
from data.files import count_items, load_sequences
from data.sequences import DOMAIN_STRIDE
from tests.small_data import write_inter

ONE = Catalogue("Small", ["Small"], [100], False, "Small.feat1CLS")
TWO = Catalogue("Mix", ["A", "B"], [10, 20], True, "A.feat1CLS")
ROWS = [(5, [4, 0, 7], 9), (5, [4, 0], 7), (5, [4], 0), (3, [1], 99)]


@pytest.fixture
def path(tmp_path):
    write_inter(tmp_path / "Small.train.inter", ROWS)
    return str(tmp_path / "Small.train.inter")


def load(path, catalogue=ONE):
    return load_sequences(path, catalogue, catalogue.is_mixture)


def as_lists(sequences):
    """Everything that sequences hold, as plain lists."""
    return {name: np.asarray(value).tolist() for name, value in vars(sequences).items()}


SMALL = {
    "offsets": [0, 4, 6],
    "items": [5, 1, 8, 10, 2, 100],  # id = index + 1
    "weights": [0, 1, 1, 1, 0, 1],
    "users": [5, 3],
    "cut_length": 3,
}


def test_items_get_their_index_plus_one(path):
    sequences = load(path)
    assert as_lists(sequences) == SMALL
    assert sequences.items.dtype == np.int32 and sequences.offsets.dtype == np.int64


def test_mixtures_number_items_domain_after_domain(tmp_path):
    write_inter(tmp_path / "Mix.train.inter", [("0-7", ["0-0", "0-9"], "0-4"), ("1-7", ["1-0", "1-19"], "1-3")])
    sequences = load(str(tmp_path / "Mix.train.inter"), TWO)
    assert sequences.items.tolist() == [1, 10, 5, 11, 30, 14]
    assert sequences.users.tolist() == [7, DOMAIN_STRIDE + 7]
    assert count_items(str(tmp_path / "Mix.train.inter"), True, 2) == [10, 20]


def test_other_columns_and_line_ends_do_not_matter(tmp_path):
    lines = ["item_id:token\trating:float\tuser_id:token\titem_id_list:token_seq", "9\t3.5\t5\t4 0 7", "7\t\t5\t4 0"]
    lines += ["0\t1\t5\t4", "99\t1\t3\t1"]
    (tmp_path / "a.inter").write_bytes(("\r\n".join(lines) + "\r\n").encode())
    (tmp_path / "b.inter").write_bytes("\n".join(lines).encode())  # no line end after the last row
    assert as_lists(load(str(tmp_path / "a.inter"))) == as_lists(load(str(tmp_path / "b.inter"))) == SMALL


@pytest.mark.parametrize("size", [1, 20, 33, 57])
def test_a_file_is_read_in_parts(tmp_path, monkeypatch, size):
    rows = [(user, list(range(end)), end) for user in range(9) for end in range(9, 0, -1)]
    write_inter(tmp_path / "a.inter", rows)
    whole = as_lists(load(str(tmp_path / "a.inter")))
    assert whole["users"] == list(range(9)) and whole["items"] == 9 * list(range(1, 11))
    monkeypatch.setattr(inter_files, "_CHUNK_BYTES", size)
    monkeypatch.setattr(files, "_read_cache", lambda *_: None)
    assert as_lists(load(str(tmp_path / "a.inter"))) == whole
    write_inter(tmp_path / "b.inter", [*rows, (1, [2, 100], 3)])
    with pytest.raises(UserError, match="b.inter, line 83: item 100 has no feature .*holds 100 items"):
        load(str(tmp_path / "b.inter"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("5\t4 x\t9", "line 6: item_id_list holds 'x'; expected a whole number"),
        ("5\t4  3\t9", "line 6: item_id_list holds ''"),
        ("5\t\t9", "line 6: item_id_list holds ''"),
        ("5\t4\t", "line 6: item_id holds ''"),
        ("5\t4\t-9", "line 6: item_id holds '-9'"),
        ("5\t4\t9.0", "line 6: item_id holds '9.0'"),
        ("\t4\t9", "line 6: user_id holds ''"),
        ("5\t4\t100", "line 6: item 100 has no feature"),
        ("5\t4 100\t1", "line 6: item 100 has no feature"),
        ("5\t4\t5000000000", "holds a number above 4294967295"),
        ("5\t4\t1\t6", "line 6: found 4 tab-separated columns, expected 3 as in the header"),
    ],
)
def test_a_wrong_row_is_named(path, row, message):
    with open(path, "a", encoding="utf-8") as file:
        file.write(row + "\n")
    with pytest.raises(UserError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("token", "message"),
    [("17", "holds '17'; expected domain-index"), ("1-2-3", "holds '1-2-3'"), ("1-", "holds '1-'")],
)
def test_a_wrong_token_of_a_mixture_is_named(tmp_path, token, message):
    write_inter(tmp_path / "a.inter", [("0-7", ["0-0"], "0-4"), ("0-7", ["0-0", token], "0-4")])
    with pytest.raises(UserError, match="line 3: item_id_list " + message):
        load(str(tmp_path / "a.inter"), TWO)


def test_files_that_are_no_data_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such file; a data set needs"):
        load(str(tmp_path / "a.inter"))
    (tmp_path / "a.inter").write_text("user_id:token\titem_id:token\n1\t2\n")
    with pytest.raises(UserError, match="lacks item_id_list:token_seq"):
        load(str(tmp_path / "a.inter"))
    write_inter(tmp_path / "a.inter", [])
    with pytest.raises(UserError, match="holds no rows"):
        load(str(tmp_path / "a.inter"))


# -- caches -------------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """The parser was called."""


@pytest.fixture
def no_parser(monkeypatch):
    """From when it is called on, parsing raises `Parsed`."""

    def parse(*_):
        raise Parsed

    return lambda: monkeypatch.setattr(files, "_parse", parse)


def caches(folder):
    return sorted(str(path) for path in folder.rglob("*.pt"))


def test_the_second_load_does_not_parse(path, tmp_path, no_parser):
    first = load(path)
    assert caches(tmp_path) == [str(tmp_path / ".unisrec-cache" / "Small.train.inter.pt")]
    no_parser()
    again = load(path)
    assert as_lists(again) == as_lists(first)
    assert {n: v.dtype for n, v in vars(again).items() if n != "cut_length"} == {
        n: v.dtype for n, v in vars(first).items() if n != "cut_length"
    }


def test_a_file_that_changed_is_parsed_again(path, no_parser):
    load(path)
    status = os.stat(path)
    write_inter(path, [(5, [4, 0, 7], 8), *ROWS[1:]])  # the same size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert os.stat(path).st_size == status.st_size
    assert load(path).items.tolist() == [5, 1, 8, 9, 2, 100]
    status = os.stat(path)
    write_inter(path, ROWS[1:])  # another size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(path).items.tolist() == [5, 1, 8, 2, 100]
    no_parser()
    assert load(path).items.tolist() == [5, 1, 8, 2, 100]
    with pytest.raises(Parsed):  # other items: the ids may differ
        load(path, Catalogue("Small", ["Small"], [101], False, "Small.feat1CLS"))


@pytest.mark.parametrize("kept", [0, 1, 30, 400, -200, -1])
def test_half_a_cache_is_ignored(path, tmp_path, kept):
    load(path)
    (cache,) = caches(tmp_path)
    content = pathlib.Path(cache).read_bytes()
    with open(cache, "wb") as file:
        file.write(content[:kept])
    assert as_lists(load(path)) == SMALL
    assert pathlib.Path(cache).read_bytes() == content, "written again"


def test_a_cache_of_something_else_is_ignored(path, tmp_path):
    load(path)
    (cache,) = caches(tmp_path)
    for content in (b"something else", b"PK\x03\x04"):
        with open(cache, "wb") as file:
            file.write(content)
        assert as_lists(load(path)) == SMALL


def test_read_only_data_is_cached_in_the_users_folder(path, tmp_path, monkeypatch, no_parser):
    data = tmp_path / "data"
    data.mkdir()
    os.rename(path, data / "Small.train.inter")
    home = tmp_path / "home" / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    os.chmod(data, stat.S_IRUSR | stat.S_IXUSR)
    if os.access(data, os.W_OK):  # permissions do not bind root
        may = os.access
        monkeypatch.setattr(os, "access", lambda where, mode: str(where) != str(data) and may(where, mode))
    try:
        assert as_lists(load(str(data / "Small.train.inter"))) == SMALL
        assert caches(data) == [] and len(caches(home)) == 1
        no_parser()
        assert as_lists(load(str(data / "Small.train.inter"))) == SMALL
    finally:
        os.chmod(data, stat.S_IRWXU)


def test_without_any_place_for_a_cache_the_file_is_parsed(path, tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("")  # a file where a folder would have to be
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "occupied"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert as_lists(load(path)) == SMALL and caches(tmp_path) == []
