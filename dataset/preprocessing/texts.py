"""Item texts: cleaning, dropping words, and reading `NAME.text` and `NAME.item2index`."""

import hashlib
import html
import os
import re

import numpy as np

from common.errors import UserError

# An item whose text is empty keeps its place in the catalogue (its interactions are real) and says just this. Its raw
# id would be the alternative, but a language model reads meaning into the letters of an id where there is none.
UNKNOWN_TEXT = "unknown item."

TEXT_STYLES = ("clean", "published")
TEXT_HEADER = "item_id:token\ttext:token_seq"

_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_QUOTES_AND_BREAKS = re.compile(r'["\r\n]')
_PUBLISHED_LIMIT = 2000  # letters of a field
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")  # a letter must follow: "fits < 3 inches and > 2" is no tag


def item_text(fields, style="clean"):
    """The text of an item: its fields, each a sentence, in their order.

    Args:
        fields (list of str or None): None where the item has no such field.
        style (str): `clean`: HTML entities are resolved, tags removed, line breaks and runs of blanks become one blank,
            every sentence ends in exactly one full stop, empty ones are skipped. `published`: letter by letter what the
            published code writes, oddities included (see `published_sentence`).

    Returns:
        str: '' where nothing is left.
    """
    if style == "published":
        return "".join(f"{published_sentence(field)} " for field in fields if field is not None)
    sentences = (clean_sentence(field) for field in fields if field)
    return " ".join(sentence for sentence in sentences if sentence)


def clean_sentence(field):
    """One field of an item's metadata (str) as one sentence; '' where nothing is left."""
    text = html.unescape(field)
    if "<" in text:
        text = _TAG.sub(" ", _HIDDEN.sub(" ", text))
    text = " ".join(text.split()).rstrip(" .")
    return f"{text}." if text else ""


def published_sentence(field):
    """One field as in the published texts, so that published features can be made again.

    Entities are resolved; double quotes and line breaks vanish without a blank in their place; full stops at the end
    become one, unless a blank follows them or there is nothing else; 2000 letters or more become none. Tags stay.
    """
    text = _QUOTES_AND_BREAKS.sub("", html.unescape(field))
    stops = len(text) - len(text.rstrip("."))
    text = f"{text[: len(text) - min(stops, max(0, len(text) - 1))]}."
    return "" if len(text) >= _PUBLISHED_LIMIT else text


def has_words(text):
    """Whether there is more to a text than blanks and full stops."""
    return bool(text.strip(" ."))


_DRAWN_AT_ONCE = 1 << 20


def drop_words(texts, ratio, seed, variant=1):
    """Texts with words left out at random: further views of an item (`feat2`, `feat3`, ...).

    Each word goes with probability `ratio`, independently. A text that would lose every word keeps one, drawn evenly.

    Args:
        texts (list of str): the result depends on their order as well as on the seed.
        ratio (float): 0 <= ratio < 1.
        seed (int): from 0 on.
        variant (int): from 1 on; another one is another draw, of the same seed.

    Returns:
        list of str, as long as `texts`.

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
    for start in range(0, len(keep), _DRAWN_AT_ONCE):  # the same numbers as of one draw, without 8 bytes for each word
        part = keep[start : start + _DRAWN_AT_ONCE]
        part[:] = generator.random(len(part)) >= ratio
    rescue = generator.random(len(texts))  # drawn for every text, so that one text's fate does not move the others'
    dropped = []
    for text, end, length, luck in zip(texts, ends, lengths, rescue, strict=True):
        words = text.split()
        kept = [word for word, stays in zip(words, keep[end - length : end], strict=True) if stays]
        dropped.append(" ".join(kept or words[int(luck * length) :][:1]))
    return dropped


def read_texts(path):
    """Read a `NAME.text` file.

    Lines end at line feeds only and split at the first tab only, so quotes, carriage returns and tabs may stand inside
    a text. Blanks around a text are dropped (each published text ends in one).

    Returns:
        dict: raw item id (str) -> text (str, may be empty). Of an item that occurs twice the first line counts.

    Raises:
        UserError: the file is missing, is not UTF-8, or a line has no tab.
    """
    lines = _read_lines(path, "write it with dataset/preprocessing, or copy it from a published split")
    texts = {}
    for number, line in enumerate(lines[1:], start=2):
        item, tab, text = line.partition("\t")
        if not tab:
            raise UserError(f"{path}: line {number} has no tab; expected ITEM<TAB>TEXT")
        texts.setdefault(item, text.strip())
    return texts


def read_item_order(path):
    """Read a `NAME.item2index` file.

    Returns:
        list of str: the raw item ids in the order of their indices 0, 1, 2, ...

    Raises:
        UserError: the file is missing, or its indices are not 0 ... n-1, each once.
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
        raise UserError(f"{path}: the indices of its {len(indices)} items are not 0 to {len(indices) - 1}, each once")
    return [items[row] for row in np.argsort(indices)]


def texts_sha256(texts):
    """One checksum for the texts of all items, so that features can be matched with the texts that they were made from.

    Args:
        texts (iterable of str): in the order of the items; blanks around them do not count.
    """
    checksum = hashlib.sha256()
    for number, text in enumerate(texts):
        checksum.update(f"{chr(10) if number else ''}{text.strip()}".encode())
    return checksum.hexdigest()


def _read_lines(path, remedy):
    """The lines of a UTF-8 file, split at line feeds only (str.splitlines also splits at CR and at U+2028)."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; {remedy}")
    with open(path, "rb") as file:
        content = file.read()
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 ({error}); convert it") from None
    return lines[:-1] if lines[-1] == "" else lines
