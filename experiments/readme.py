"""Put the tables of experiments/results/ into README.md: python experiments/readme.py

A table stands between two lines, and is replaced:

    <!-- table: experiments/results/scientific.json -->
    <!-- end of table -->

The path, relative to the project's folder, is that of a table.json.
"""

import os
import re
import sys

PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, PROJECT)  # so that the script finds the project's modules from any working folder

from common.errors import UserError, run_command  # noqa: E402
from common.files import atomic_path, read_json  # noqa: E402
from experiments.report import format_table  # noqa: E402

_START, _END = re.compile(r"<!-- table: (?P<path>.+?) -->"), "<!-- end of table -->"


def main(argv: list[str]) -> None:
    """Run the command. It is described at the top of the file."""
    if argv:
        raise UserError(f"unexpected word {argv[0]!r}; readme.py has no options")
    path = os.path.join(PROJECT, "README.md")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    filled = fill(text, PROJECT, path)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(filled)
    print(f"{path}: {'no table has changed' if filled == text else 'tables have changed'}")


def fill(text: str, folder: str, name: str = "README.md") -> str:
    """Replace the tables in a text by those of the JSON files that the markers name.

    Args:
        text: Markdown.
        folder: the paths in the markers are relative to it.
        name: the file of the text, for messages.

    Raises:
        UserError: a table has no end, or its file is missing.
    """
    lines, parts = [], text.split("\n")
    while parts:
        line = parts.pop(0)
        lines.append(line)
        start = _START.fullmatch(line.strip())
        if not start:
            continue
        if _END not in parts or any(map(_START.fullmatch, parts[: parts.index(_END)])):
            raise UserError(f"{name}: table {start['path']} has no end; write {_END} on a line below it")
        table = read_json(os.path.join(folder, start["path"]))
        lines += ["", *format_table(table), ""]
        parts = parts[parts.index(_END) :]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
