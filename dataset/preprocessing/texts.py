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

TEXT_HEADER = "item_id:token\ttext:token_seq"

_HIDDEN = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")  # a letter must follow: "fits < 3 inches and > 2" is no tag


def clean_sentence(raw):
    """One field of an item's metadata as one sentence.

    HTML entities are resolved, tags removed, line breaks and runs of blanks become one blank, and the sentence ends in
    exactly one full stop.

    Args:
        raw (str, list or None): lists, nested or not, are joined by blanks; None is empty.

    Returns:
        str: '' where nothing is left.
    """
    text = html.unescape(" ".join(_flatten(raw)))
    text = _TAG.sub(" ", _HIDDEN.sub(" ", text))
    text = " ".join(text.split()).rstrip(" .")
    return f"{text}." if text else ""


def clean_text(fields):
    """The text of an item: its fields, each a cleaned sentence, joined by blanks; empty fields are skipped."""
    sentences = (clean_sentence(field) for field in fields)
    return " ".join(sentence for sentence in sentences if sentence)


def _flatten(raw):
    """Every string inside `raw`, in order, however deep the lists."""
    if raw is None:
        return
    if isinstance(raw, list | tuple):
        for part in raw:
            yield from _flatten(part)
    else:
        yield str(raw)


def drop_words(texts, ratio, seed):
    """Texts with words left out at random: the second view of an item (`feat2`).

    Each word goes with probability `ratio`, independently. A text that would lose every word keeps one, drawn evenly.

    Args:
        texts (list of str): the result depends on their order as well as on the seed.
        ratio (float): 0 <= ratio < 1.
        seed (int).

    Returns:
        list of str, as long as `texts`.

    Raises:
        UserError: the ratio or the seed is out of range.
    """
    if not 0 <= ratio < 1:
        raise UserError(f"word_drop: found {ratio}, expected a number from 0 (keep every word) to below 1")
    if seed < 0:
        raise UserError(f"seed: found {seed}, expected a whole number from 0")
    words = [text.split() for text in texts]
    ends = np.cumsum([len(each) for each in words], dtype=np.int64)
    generator = np.random.default_rng(seed)
    keep = generator.random(int(ends[-1]) if len(ends) else 0) >= ratio
    rescue = generator.random(len(words))  # drawn for every text, so that one text's fate does not move the others'
    dropped = []
    for each, end, luck in zip(words, ends, rescue, strict=True):
        kept = [word for word, stays in zip(each, keep[end - len(each) : end], strict=True) if stays]
        dropped.append(" ".join(kept or each[int(luck * len(each)) :][:1]))
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
    """One checksum for a list of texts, so that features can be matched with the texts that they were made from."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _read_lines(path, remedy):
    """The lines of a UTF-8 file, split at line feeds only (str.splitlines also splits at CR and at U+2028)."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; {remedy}")
    with open(path, "rb") as file:
        content = file.read()
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as mistake:
        raise UserError(f"{path}: is not UTF-8 ({mistake}); convert it") from None
    return lines[:-1] if lines[-1] == "" else lines
