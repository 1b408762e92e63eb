"""Item texts: cleaning, dropping words, reading `NAME.text` and `NAME.item2index`."""

import hashlib
import html
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from common.errors import UserError

# The text of an item whose own text is empty. The item stays in the catalogue, because its interactions are real. Its
# raw id would be the alternative, but a language model would read a meaning into its characters.
UNKNOWN_TEXT = "unknown item."

TEXT_STYLES = ("clean", "published")
TEXT_HEADER = "item_id:token\ttext:token_seq"

_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_QUOTES_AND_BREAKS = re.compile(r'["\r\n]')
_PUBLISHED_LIMIT = 2000  # characters of a field
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")  # a letter must follow "<": "fits < 3 inches and > 2" holds no tag


def item_text(fields: Sequence[str | None], style: str = "clean") -> str:
    """The text of an item: one sentence per field, in the order of the fields. '' if nothing is left.

    Args:
        fields: None if the item has no such field.
        style: `clean`: HTML entities are resolved, tags are removed, line breaks and runs of blanks become one blank,
            every sentence ends in exactly one full stop, empty fields are skipped. `published`: exactly the characters
            that the published code writes (see `published_sentence`).
    """
    if style == "published":
        return "".join(f"{published_sentence(field)} " for field in fields if field is not None)
    sentences = (clean_sentence(field) for field in fields if field)
    return " ".join(sentence for sentence in sentences if sentence)


def clean_sentence(field: str) -> str:
    """A field of an item's metadata as one sentence. '' if nothing is left."""
    text = html.unescape(field)
    if "<" in text:
        text = _TAG.sub(" ", _HIDDEN.sub(" ", text))
    text = " ".join(text.split()).rstrip(" .")
    return f"{text}." if text else ""


def published_sentence(field: str) -> str:
    """A field as in the published texts, so that published features can be reproduced.

    - HTML entities are resolved. Tags stay.
    - Double quotes and line breaks are deleted and not replaced by a blank.
    - Several full stops at the end become one, unless a blank follows them or there is nothing else.
    - A field of 2000 characters or more becomes ''.
    """
    text = _QUOTES_AND_BREAKS.sub("", html.unescape(field))
    stops = len(text) - len(text.rstrip("."))
    text = f"{text[: len(text) - min(stops, max(0, len(text) - 1))]}."
    return "" if len(text) >= _PUBLISHED_LIMIT else text


def has_words(text: str) -> bool:
    """Whether a text holds more than blanks and full stops."""
    return bool(text.strip(" ."))


_DRAWN_AT_ONCE = 1 << 20  # random numbers


def drop_words(texts: Sequence[str], ratio: float, seed: int, variant: int = 1) -> list[str]:
    """Drop random words of each text, for a further view of the items (`feat2`, `feat3`, ...).

    Each word is dropped independently with probability `ratio`. A text that would lose all words keeps a random one.

    Args:
        texts: the result depends on their order as well as on the seed.
        ratio: 0 <= ratio < 1.
        seed: from 0 on.
        variant: from 1 on. Each variant is another draw with the same seed.

    Raises:
        UserError: the ratio or the seed is out of range.
    """
    if not 0 <= ratio < 1:
        raise UserError(f"--word_drop_ratio {ratio}: expected a number from 0 (keep every word) to below 1")
    if seed < 0:
        raise UserError(f"--seed {seed}: expected a whole number from 0 on")
    lengths = np.fromiter((len(text.split()) for text in texts), np.int64, len(texts))
    ends = np.cumsum(lengths)
    generator = np.random.default_rng(seed if variant == 1 else [seed, variant])
    keep = np.empty(lengths.sum(), bool)
    for start in range(0, len(keep), _DRAWN_AT_ONCE):  # the numbers of a single draw, without its 8 bytes per word
        part = keep[start : start + _DRAWN_AT_ONCE]
        part[:] = generator.random(len(part)) >= ratio
    # drawn for every text, so that the draws of a text do not depend on whether another text lost all words
    last_word = generator.random(len(texts))
    shortened = []
    for text, end, length, draw in zip(texts, ends, lengths, last_word, strict=True):
        words = text.split()
        kept = [word for word, is_kept in zip(words, keep[end - length : end], strict=True) if is_kept]
        shortened.append(" ".join(kept or words[int(draw * length) :][:1]))
    return shortened


def read_texts(path: str) -> dict[str, str]:
    """Read a `NAME.text` file.

    Lines end only at line feeds and are split only at the first tab, so a text may hold quotes, carriage returns and
    tabs. Blanks around a text are removed. Each published text ends in one.

    Returns:
        Raw item id -> text, which may be empty. If an item occurs twice, the first line counts.

    Raises:
        UserError: the file is missing, is not UTF-8, or a line has no tab.
    """
    lines = _read_lines(path, "write it with dataset/preprocessing, or copy it from a published split")
    texts: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        item, tab, text = line.partition("\t")
        if not tab:
            raise UserError(f"{path}: line {number} has no tab; expected ITEM<TAB>TEXT")
        texts.setdefault(item, text.strip())
    return texts


def read_item_order(path: str) -> list[str]:
    """Read a `NAME.item2index` file.

    Returns:
        The raw item ids in the order of their indices.

    Raises:
        UserError: the file is missing, or its indices are not 0 to n - 1, each once.
    """
    lines = _read_lines(path, "features are stored in its order; process the data set again to get one")
    items, indices = [], []
    for number, line in enumerate(lines, start=1):
        item, _, index = line.rstrip("\r").rpartition("\t")
        if not index.isdecimal():
            raise UserError(f"{path}: line {number}: found {line[:60]!r}, expected ITEM<TAB>INDEX")
        items.append(item)
        indices.append(int(index))
    if sorted(indices) != list(range(len(indices))):
        raise UserError(
            f"{path}: the indices of its {len(indices)} items are not 0 to {len(indices) - 1}, each once; "
            "process the data set again"
        )
    return [items[row] for row in np.argsort(indices)]


def texts_sha256(texts: Iterable[str]) -> str:
    """The checksum of the texts of all items. It tells whether features were made from these texts.

    Args:
        texts: in the order of the items. Blanks around a text do not count.
    """
    checksum = hashlib.sha256()
    for number, text in enumerate(texts):
        separator = "\n" if number else ""
        checksum.update(f"{separator}{text.strip()}".encode())
    return checksum.hexdigest()


def _read_lines(path: str, remedy: str) -> list[str]:
    """The lines of a UTF-8 file, split only at line feeds. str.splitlines also splits at CR and U+2028."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; {remedy}")
    with open(path, "rb") as file:
        content = file.read()
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); convert it to UTF-8") from None
    return lines[:-1] if lines[-1] == "" else lines
