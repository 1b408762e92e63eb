"""Files are written beside their target and renamed: a crash leaves the old one or the new one, and nothing else."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import atomic_path, check_can_write, file_sha256, locked, read_json, staged_folder, write_json
from tests.conftest import ROOT


def write(path, text):
    with atomic_path(path) as temporary, open(temporary, "w") as file:
        file.write(text)


def fails_with(code):
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_file_and_its_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write(path, "one")
    write(path, "two")
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["file.txt"]


def test_the_target_stands_untouched_until_all_is_written(tmp_path):
    path = tmp_path / "file.txt"
    write(path, "old")
    with atomic_path(path) as temporary:
        with open(temporary, "w") as file:
            file.write("new")
        assert path.read_text() == "old"
        assert os.path.dirname(temporary) == str(tmp_path), "a rename is atomic within one folder only"
    assert path.read_text() == "new"


def test_a_new_file_has_the_rights_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "file.txt", "one")
        assert stat.S_IMODE(os.stat(tmp_path / "file.txt").st_mode) == 0o640
        assert os.umask(0o027) == 0o027, "the umask is as it was"
    finally:
        os.umask(before)


@pytest.mark.parametrize("there_before", [True, False])
@pytest.mark.parametrize("failure", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_file_and_no_other(tmp_path, there_before, failure):
    path = tmp_path / "file.txt"
    if there_before:
        write(path, "old")
    with pytest.raises(type(failure)), atomic_path(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise failure
    assert os.listdir(tmp_path) == (["file.txt"] if there_before else [])
    assert not there_before or path.read_text() == "old"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
    ],
)
@pytest.mark.parametrize("place", ["while writing", "os.replace", "tempfile.mkstemp", "os.makedirs"])
def test_what_keeps_a_user_from_writing_is_one_line(tmp_path, monkeypatch, code, words, place):
    path = tmp_path / "file.txt"
    path.write_text("old")
    if place != "while writing":
        monkeypatch.setattr(place, fails_with(code))
    with pytest.raises(UserError, match=f"file.txt: cannot be written: .*{words}"), atomic_path(path) as temporary:
        assert os.path.exists(temporary)
        if place == "while writing":
            fails_with(code)()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["file.txt"] and path.read_text() == "old"


def test_other_failures_are_not_hidden(tmp_path):
    with pytest.raises(ConnectionResetError), atomic_path(tmp_path / "file.txt"):
        fails_with(errno.ECONNRESET)()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", [lambda path: write(path, "x"), check_can_write])
def test_a_folder_or_a_path_through_a_file_cannot_be_written(tmp_path, function):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="folder: cannot be written: it is a folder"):
        function(tmp_path / "folder")
    for path in ("file/result.json", "file/deeper/result.json"):
        with pytest.raises(UserError, match="cannot be written: a file stands where a folder should be"):
            function(tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and os.listdir(tmp_path / "folder") == []


def test_checking_a_path_writes_no_file(tmp_path):
    check_can_write(tmp_path / "new" / "result.json")
    assert os.listdir(tmp_path / "new") == []


def test_a_folder_without_rights_is_found_out_before(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission"):
        check_can_write(tmp_path / "result.json")


def test_a_link_stays_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file.txt")
    for text in ("one", "two"):  # first the link leads nowhere
        with atomic_path(tmp_path / "link") as temporary:
            assert os.path.dirname(temporary) == str(tmp_path / "far"), "a rename is atomic within one folder only"
            Path(temporary).write_text(text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file.txt").read_text() == text
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop: is "):
        write(tmp_path / "loop", "x")


@pytest.mark.parametrize("function", [lambda path: write(path, "x"), check_can_write])
def test_devices_and_pipes_are_not_replaced(tmp_path, function):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/full")
    for path in (tmp_path / "pipe", tmp_path / "link", Path("/dev/full")):
        with pytest.raises(UserError, match="(pipe|full): is a device or a pipe, expected a file; choose another"):
            function(path)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and stat.S_ISCHR(os.stat("/dev/full").st_mode)


KILLED = """
import os, signal, sys
from common.files import atomic_path, staged_folder
with atomic_path(sys.argv[1] + "/file.txt") as temporary, staged_folder(sys.argv[1]) as staging:
    open(temporary, "w").write("half")
    open(staging + "/half", "w").write("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_a_killed_process_has_left_is_removed(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    assert len(os.listdir(tmp_path)) == 2
    with atomic_path(tmp_path / "file.txt") as first, atomic_path(tmp_path / "file.txt") as second:
        assert os.path.exists(first) and os.path.exists(second), "those of a running process stay"
        for temporary, text in ((first, "one"), (second, "two")):
            Path(temporary).write_text(text)
    with staged_folder(str(tmp_path)) as staging:
        (Path(staging) / "b").write_text("b")
    assert sorted(os.listdir(tmp_path)) == ["b", "file.txt"]


def test_files_that_only_look_like_temporary_ones_stay(tmp_path):
    for name in (".file.txt.abc", ".file.txt", ".file.txt.00000000-999999999.a", ".writing-old"):
        (tmp_path / name).write_text("mine")
    write(tmp_path / "file.txt", "new")
    assert len(os.listdir(tmp_path)) == 5


def test_a_file_has_one_lock(tmp_path):
    path = str(tmp_path / "new" / "a.pth")
    with locked(path), locked(path + ".other"):
        (tmp_path / "link").symlink_to(path)
        for name in (path, str(tmp_path / "link")):
            with pytest.raises(UserError, match=rf"a.pth: another run is writing this file .process {os.getpid()}"):
                with locked(name):
                    pass
    assert os.listdir(tmp_path / "new") == []
    with pytest.raises(KeyError), locked(path):
        raise KeyError
    with locked(path):
        pass


LOCKS = """
import os, signal, sys
from common.files import locked
with locked(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path):
    subprocess.run([sys.executable, "-c", LOCKS, str(tmp_path / "a.pth")], cwd=ROOT)
    assert os.listdir(tmp_path) == [".a.pth.lock"]
    with locked(str(tmp_path / "a.pth")):
        pass
    assert os.listdir(tmp_path) == []


def test_json_comes_back_as_it_went(tmp_path):
    content = {"metrics": {"ndcg@10": 0.12345678901234567}, "name": "Bücher", "none": None, "list": [1, 2]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json") == content
    assert "Bücher" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"first": 2, "second": object()})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"half": ', b"\xff\xfe\x00"])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match="a.json: is not a JSON file"):
        read_json(tmp_path / "a.json")


def test_missing_json_is_named(tmp_path):
    with pytest.raises(UserError, match="a.json: no such file"):
        read_json(tmp_path / "a.json")


def test_sha256_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_staged_files_come_together_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "deep"
    with pytest.raises(UserError, match="the disk is full"), staged_folder(str(folder)) as staging:
        (Path(staging) / "a").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not any(tmp_path.iterdir())
    with staged_folder(str(folder)) as staging:
        (Path(staging) / "a").write_text("one")
        (Path(staging) / "b").write_text("two")
        assert not (folder / "a").exists()
    with pytest.raises(KeyError), staged_folder(str(folder)) as staging:
        (Path(staging) / "a").write_text("three")
        raise KeyError
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "one", "b": "two"}
