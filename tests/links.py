"""The check of relative links in Markdown: `python -m tests.links` lists broken links and exits with code 1.

A link is broken if its target is not a file or folder of the project, or if the target has no such heading.
"""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parent.parent


def markdown_files(root: Path) -> list[Path]:
    """Return the Markdown files below `root` that git does not ignore."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.md"]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.splitlines()
    return [root / name for name in names if (root / name).is_file()]


def text_blocks(file: Path) -> list[tuple[Token, Token]]:
    """Return the blocks of text of a file, each with the token that opens the block. Code blocks are left out."""
    tokens = MarkdownIt("commonmark").enable("table").parse(file.read_text(encoding="utf-8"))
    return [(opening, token) for opening, token in zip(tokens, tokens[1:], strict=False) if token.type == "inline"]


def anchors(file: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a file. Repeated headings get -1, -2, ..."""
    found: list[str] = []
    for opening, block in text_blocks(file):
        if opening.type == "heading_open":
            text = "".join(token.content for token in block.children or [] if token.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            repeats = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
            found.append(f"{slug}-{repeats}" if repeats else slug)
    return set(found)


def broken_links(root: Path = ROOT) -> list[str]:
    """Return one line per broken link below `root`: file, line of the block of text, target and what is missing."""
    broken = []
    for file in markdown_files(root):
        for opening, block in text_blocks(file):
            for token in block.children or []:
                link = str(token.attrGet("href") or token.attrGet("src") or "")
                target = urlsplit(link)
                if not link or target.scheme or target.netloc:
                    continue
                path = (file.parent / unquote(target.path)).resolve() if target.path else file
                line = f"{file.relative_to(root)}:{(opening.map or block.map or [0])[0] + 1}: {link}"
                if not path.exists() or not path.is_relative_to(root):
                    broken.append(f"{line}: no such file in the project")
                elif target.fragment and path.suffix == ".md" and target.fragment not in anchors(path):
                    broken.append(f"{line}: no such heading")
    return broken


if __name__ == "__main__":
    lines = broken_links()
    print(*lines, sep="\n", end="\n" if lines else "")
    sys.exit(bool(lines))
