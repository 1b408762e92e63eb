"""Where the results of reading large files are cached, and how a changed file is noticed."""

import hashlib
import os


def cache_path(path: str, suffix: str) -> str:
    """The path of a cache: beside the data if that folder is writable, else in the user's own cache folder.

    Args:
        path: the file whose content is cached.
        suffix: what is appended to its name.
    """
    folder = os.path.dirname(os.path.abspath(path))
    if os.access(folder, os.W_OK):
        return os.path.join(folder, ".unisrec-cache", os.path.basename(path) + suffix)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    return os.path.join(home, "unisrec", f"{name}-{os.path.basename(path)}{suffix}")


def file_key(path: str) -> str:
    """A word that changes when the file is written again: its path, size, inode, and times in nanoseconds.

    The time of the last change of the inode also changes when a program sets the time of the last modification back.
    """
    status = os.stat(path)
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{os.path.abspath(path)} {status.st_size} {status.st_ino} {times}"
