"""Changes to the items of a bundle, in a file beside it, so that they survive a restart.

Each line is a change as JSON: `{"add": {id: text}}` or `{"remove": [id]}`. A line is on the disk before the change is
acknowledged. A line that a crash has cut short was never acknowledged, and is dropped.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from common.errors import UserError
from common.files import writing
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
        self._changes = self._read()

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
        """Apply all changes to a recommender of the bundle. The texts are encoded together."""
        state: dict[str, str | None] = {}  # the last change of each item. None: removed
        for change in self._changes:
            state |= change.get("add", {}) | dict.fromkeys(change.get("remove", []))
        recommender.remove_items([item for item, text in state.items() if text is None and item in recommender.texts])
        recommender.add_items({item: text for item, text in state.items() if text is not None})

    def add(self, items: dict[str, str]) -> None:
        """Note that items were added."""
        self._write({"add": items})

    def remove(self, ids: Sequence[str]) -> None:
        """Note that items were removed."""
        self._write({"remove": list(ids)})

    def _write(self, change):
        line = json.dumps(change, ensure_ascii=False).encode() + b"\n"
        with writing(self.path), open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._changes.append(change)
