"""Changes to the items of a bundle, in a file beside it, so that they survive a restart.

Each line is a change as JSON: `{"add": {id: text}, "columns": {id: {name: value}}}` or `{"remove": [id]}`. A line is on
the disk before the change is acknowledged. A line that a crash has cut short was never acknowledged, and is dropped.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from common.errors import UserError
from common.files import writing
from serving.catalogue import Columns
from serving.recommender import Recommender

NAME = "changes.jsonl"


class Journal:
    """The changes to the items of a bundle.

    Args:
        folder: the bundle.

    Raises:
        UserError: a line other than the last one is damaged.
    """

    def __init__(self, folder: str):
        self.path = os.path.join(folder, NAME)
        self._changes = self._read()  # those at the start

    def _read(self) -> list[dict[str, Any]]:
        if not os.path.isfile(self.path):
            return []
        with open(self.path, "rb") as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        changes = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                changes.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{self.path}, line {number}: is not JSON ({error}); remove the line") from None
        return changes

    def replay(self, recommender: Recommender) -> None:
        """Apply all changes to a recommender of the bundle. The texts are encoded together.

        An item that the bundle holds with the same text keeps its representation: the model has been trained on it
        since.
        """
        state: dict[str, str | None] = {}  # the last change of each item. None: removed
        columns: dict[str, Mapping[str, str]] = {}
        for change in self._changes:
            added = change.get("add", {})
            state |= added | dict.fromkeys(change.get("remove", []))
            columns |= {item: change.get("columns", {}).get(item, {}) for item in added}
        recommender.remove_items([item for item, text in state.items() if text is None and item in recommender.texts])
        present = {item: text for item, text in state.items() if text is not None}
        known = recommender.texts
        recommender.add_items({item: text for item, text in present.items() if known.get(item) != text})
        recommender.show({item: columns[item] for item in present})

    def add(self, items: Mapping[str, str], columns: Columns) -> None:
        """Note that items were added, with columns to show."""
        shown = {item: values for item, values in columns.items() if values}
        self._write({"add": items} | ({"columns": shown} if shown else {}))

    def remove(self, ids: Sequence[str]) -> None:
        """Note that items were removed."""
        self._write({"remove": list(ids)})

    def _write(self, change):
        line = json.dumps(change, ensure_ascii=False).encode() + b"\n"
        with writing(self.path), open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path, size)  # the next change starts a line of its own
                raise
