"""The finished runs of an experiment on disk, and locks on the unfinished ones.

A run writes into the folder `runs/NAME.part`. When it has finished, the folder is renamed to `runs/NAME-CODE`. So a run
is finished if and only if its folder has such a name, also after a crash. The folder holds:

    run.json        what the run depends on (`experiments.identity`), its code, when, where and how long it ran
    result.json     the result of the command
    ranks.parquet   the rank of the target of each test user
    log.txt         the log of the command
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from typing import IO, Any

from common.errors import UserError
from common.files import read_json, write_json
from experiments.identity import belongs

_RESULT_KEYS = {"metrics", "seconds", "versions", "run"}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A finished run.

    Attributes:
        folder: where its files are.
        record: the content of run.json.
        result: the content of result.json.
    """

    folder: str
    record: dict[str, Any]
    result: dict[str, Any]

    @property
    def ranks(self) -> str:
        """The path of the ranks file."""
        return os.path.join(self.folder, "ranks.parquet")


class Store:
    """The folder `runs` of an experiment.

    Args:
        folder: created if it is missing.
    """

    def __init__(self, folder: str):
        self.folder = folder
        os.makedirs(folder, exist_ok=True)
        self._read: dict[str, Finished] = {}

    def part(self, name: str) -> str:
        """The folder that a run writes into."""
        return os.path.join(self.folder, f"{name}.part")

    def finished(self) -> list[Finished]:
        """All finished runs, the newest first. Each folder is read once, because its files do not change."""
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            if name not in self._read and os.path.isfile(os.path.join(path, "run.json")) and not name.endswith(".part"):
                record, result = (read_json(os.path.join(path, f"{file}.json")) for file in ("run", "result"))
                self._read[name] = Finished(path, record, result)
        return sorted(self._read.values(), key=lambda run: run.record["started"], reverse=True)

    def find(self, description: dict[str, Any], code: str) -> Finished | None:
        """The finished run of a description: the newest with this code, else the newest with other code."""
        found = [run for run in self.finished() if belongs(run.record["description"], description)]
        return next((run for run in found if run.record["code"] == code), found[0] if found else None)

    def begin(self, name: str, record: dict[str, Any]) -> str:
        """Make an empty folder for a run, with its run.json. Returns the folder. The caller holds the lock."""
        part = self.part(name)
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        write_json(os.path.join(part, "run.json"), record)
        return part

    def finish(self, name: str, seconds: float) -> Finished:
        """Turn the folder of a run that has ended well into that of a finished run.

        Raises:
            UserError: a file is missing or incomplete.
        """
        part = self.part(name)
        result = read_json(os.path.join(part, "result.json"))
        missing = _RESULT_KEYS - result.keys()
        if missing:
            raise UserError(f"{part}/result.json: has no {', '.join(sorted(missing))}; run again")
        if not os.path.isfile(os.path.join(part, "ranks.parquet")):
            raise UserError(f"{part}/ranks.parquet: no such file; run again")
        record = self._note(name, seconds)
        final = os.path.join(self.folder, f"{name}-{record['code']}")
        os.rename(part, final)
        return Finished(final, record, result)

    def stop(self, name: str, seconds: float) -> None:
        """Note how long a run had run when it was stopped."""
        self._note(name, seconds)

    def _note(self, name, seconds):
        path = os.path.join(self.part(name), "run.json")
        record = read_json(path) | {"seconds": seconds}
        write_json(path, record)
        return record

    def seconds_when_stopped(self, name: str) -> float | None:
        """How long an unfinished run had run when it was stopped. None if that is not known."""
        with contextlib.suppress(UserError):
            return read_json(os.path.join(self.part(name), "run.json")).get("seconds")
        return None

    def try_lock(self, name: str) -> IO | None:
        """Lock a run. Returns the open lock file, or None if another process holds the lock. Close it to unlock.

        The operating system releases the lock when the last process that holds the open file has ended, so a killed
        process leaves no lock behind.
        """
        file = open(os.path.join(self.folder, f"{name}.lock"), "w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file
