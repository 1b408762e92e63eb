"""Files are written beside their target and renamed: a crash leaves the old one or the new one."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile

from common.errors import UserError

_CANNOT_WRITE = {
    errno.ENOSPC: "the disk is full; free some space and run again",
    errno.EDQUOT: "the disk quota is used up; free some space and run again",
    errno.EACCES: "no permission to write there; choose another folder",
    errno.EROFS: "the folder is read-only; choose another folder",
    errno.EEXIST: "a file stands where a folder should be; choose another folder",
    errno.ENOTDIR: "a file stands where a folder should be; choose another folder",
    errno.EISDIR: "it is a folder; choose the name of a file",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
}


@contextlib.contextmanager
def writing(path):
    """Within this, what keeps a user from writing to `path` becomes a `UserError`."""
    try:
        yield
    except OSError as failure:
        if failure.errno in _CANNOT_WRITE:
            raise UserError(f"{path}: cannot be written: {_CANNOT_WRITE[failure.errno]}") from failure
        raise


def check_can_write(path):
    """Find out before long work whether its result can be written; makes the folder.

    Raises:
        UserError: the path is a folder's, or its folder cannot be written to.
    """
    folder = os.path.dirname(os.path.abspath(path))
    with writing(path):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, path)
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, folder)


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path in the target's folder; rename it to `path` on success, remove it on failure.

    Args:
        path (str): the file to write. Its folder is made if it is not there.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    path = os.path.abspath(path)
    temporary = None
    try:
        with writing(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=f".{os.path.basename(path)}.")
            os.close(handle)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files private; a data set is for everybody
            yield temporary
            os.replace(temporary, path)
            temporary = None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def staged_folder(folder):
    """Yield a temporary folder within `folder`; on success its files are moved there, on failure they are removed.

    For files that belong together: a failure while they are written leaves all old ones as they were.

    Args:
        folder (str): is made if it is not there, with those above it; after a failure what was made and is empty goes.

    Raises:
        UserError: the disk is full, or the folder cannot be written to.
    """
    folder = os.path.abspath(folder)
    made, staging = _missing_folders(folder), None
    try:
        with writing(folder):
            os.makedirs(folder, exist_ok=True)
            staging = tempfile.mkdtemp(dir=folder, prefix=".writing-")
            yield staging
            for name in sorted(os.listdir(staging)):
                os.replace(os.path.join(staging, name), os.path.join(folder, name))
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            for each in made:  # only those that nothing has come into
                os.rmdir(each)


def _missing_folders(folder):
    """The folder and those above it that are not there, the innermost first."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing


def write_json(path, content):
    """Write `content` (plain data) to `path` as JSON."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path):
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is no JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no JSON file ({error}); remove it or write it again") from None


def file_sha256(path):
    """The SHA-256 of a file, as a hex string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
