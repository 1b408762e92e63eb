"""Atomic files: written beside their target, then renamed. After a crash, either the old or the new file exists."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from common.errors import UserError

_CANNOT_WRITE = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EACCES: "no permission to write there; choose another folder",
    errno.EROFS: "the folder is read-only; choose another folder",
    errno.EEXIST: "a file stands where a folder should be; choose another folder",
    errno.ENOTDIR: "a file stands where a folder should be; choose another folder",
    errno.EISDIR: "it is a folder; choose a file name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn operating system errors that the user can correct, such as a full disk, into a `UserError` about `path`."""
    try:
        yield
    except OSError as failure:
        if failure.errno in _CANNOT_WRITE:
            raise UserError(f"{path}: cannot be written: {_CANNOT_WRITE[failure.errno]}") from failure
        raise


def check_can_write(path: str) -> None:
    """Check before a long computation that its result can be written to `path`. Creates the folder.

    Raises:
        UserError: the path is a folder or a device, or the folder of the file is not writable.
    """
    path = os.path.realpath(path)
    folder = os.path.dirname(path)
    with writing(path):
        _check_is_file(path)
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, folder)


@contextlib.contextmanager
def atomic_path(path: str) -> Iterator[str]:
    """Yield a temporary path. Rename it to `path` on success, remove it on failure.

    The temporary file stands in the folder of `path`. If `path` is a symbolic link, the link stays, and the file that
    it leads to is written. Temporary files of processes that were killed are removed.

    Args:
        path: the file to write. Its folder is created if it is missing.

    Raises:
        UserError: the disk is full, the folder is not writable, or `path` is neither a file nor missing.
    """
    path = os.path.realpath(path)
    temporary: str | None = None
    try:
        with writing(path):
            _check_is_file(path)
            folder, name = os.path.split(path)
            os.makedirs(folder, exist_ok=True)
            _remove_left_over(folder, f".{name}.")
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.{_own_mark()}.")
            os.close(handle)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp creates private files. Set the usual permissions
            yield temporary
            os.replace(temporary, path)
            temporary = None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Lock a file that this process is going to write, for the duration of the block. `path` need not exist.

    The lock is a file `.NAME.lock` in the same folder. It is removed at the end. The operating system releases the lock
    of a process that was killed. A file system without locks is used without a lock.

    Raises:
        UserError: another process has locked the file, or the folder is not writable.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    lock = os.path.join(folder, f".{name}.lock")
    with writing(path):
        os.makedirs(folder, exist_ok=True)
        file = _lock(lock, path)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)
        file.close()


def _lock(lock, path):
    """Open and lock the file `lock`. Returns it."""
    while True:
        file = open(lock, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read(20).strip()
            file.close()
            raise UserError(
                f"{path}: another run is writing this file (process {owner or 'unknown'}); wait until it ends, or give "
                "this run another --checkpoint_dir or file name"
            ) from None
        except OSError:  # this file system has no locks
            return file
        if os.path.exists(lock) and os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
            file.truncate(0)
            print(os.getpid(), file=file, flush=True)
            return file
        file.close()  # its owner has removed it in the meantime


def _check_is_file(path: str) -> None:
    """Check that a path is a plain file or missing, because a rename would replace a device or a pipe."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, path)
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: is a device or a pipe, expected a file; choose another file name")


def _own_mark() -> str:
    """Names this machine and process, in the names of its temporary files."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}-{os.getpid()}"


def _remove_left_over(folder: str, prefix: str) -> None:
    """Remove the temporary files and folders with this prefix whose process on this machine no longer runs."""
    machine = _own_mark().partition("-")[0]
    pattern = re.compile(rf"{re.escape(prefix)}{machine}-(\d{{1,9}})\.[^.]*")
    for name in os.listdir(folder):
        match = pattern.fullmatch(name)
        if match and not _runs(int(match[1])):
            left = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                shutil.rmtree(left) if os.path.isdir(left) else os.unlink(left)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it runs, and belongs to another user
        pass
    return True


@contextlib.contextmanager
def staged_folder(folder: str) -> Iterator[str]:
    """Yield a temporary folder inside `folder`. On success its files are moved to `folder`, on failure removed.

    Use it for files that belong together. If writing fails, all old files stay unchanged.

    Args:
        folder: created if it is missing, with its parents. After a failure, new folders that are empty are removed.

    Raises:
        UserError: the disk is full, or the folder is not writable.
    """
    folder = os.path.abspath(folder)
    created, staging = _missing_folders(folder), None
    try:
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
            _remove_left_over(folder, ".writing-")
            staging = tempfile.mkdtemp(dir=folder, prefix=f".writing-{_own_mark()}.")
            yield staging
            for name in sorted(os.listdir(staging)):
                os.replace(os.path.join(staging, name), os.path.join(folder, name))
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            for each in created:
                os.rmdir(each)  # fails, and ends the loop, if the folder is not empty


def _missing_folders(folder: str) -> list[str]:
    """Those of the folder and its parents that do not exist, the innermost first."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def write_json(path: str, content: Any) -> None:
    """Write `content`, plain data, to `path` as JSON."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not a JSON file ({error}); remove it or write it again") from None


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, as a hex string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_zip(path: str) -> None:
    """Verify the checksums in a zip file, such as a file of `torch.save`, which torch itself does not verify.

    Only the bytes that a reader ignores, such as padding, have no checksum. A file that is no zip file passes.

    Raises:
        ValueError: a checksum is wrong, or a part is compressed, which torch.save does not do.
        zipfile.BadZipFile: the directory of the file is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
            raise ValueError("a part of it is compressed")
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"the checksum of its part {damaged} is wrong")
