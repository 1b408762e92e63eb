"""Loading `.inter` files as `Sequences`, with a cache."""

import os
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic_path
from data.caches import cache_path, file_key
from data.inter_files import read_chunks
from data.sequences import DOMAIN_STRIDE, Sequences, fold_rows

if TYPE_CHECKING:
    from data.catalogue import Catalogue

_CACHE_VERSION = 3


def load_sequences(path: str, catalogue: "Catalogue", is_mixture: bool, show_progress: bool = False) -> Sequences:
    """Load one `.inter` file. If it has not changed since it was parsed, load its cache instead.

    Args:
        path: the file.
        catalogue: turns the item numbers of the file into item ids.
        is_mixture: whether ids are written `domain-index`.
        show_progress: show a progress bar while a large file is read.

    Raises:
        UserError: the file is missing, empty or malformed, or it holds an item that is not in the catalogue.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; a data set needs NAME.train.inter, NAME.valid.inter, NAME.test.inter")
    key = f"{_CACHE_VERSION} {file_key(path)} {catalogue.counts}"
    cache = cache_path(path, ".pt")
    cached = _read_cache(cache, key)
    if cached is not None:
        return cached
    sequences = _parse(path, catalogue, is_mixture, show_progress)
    _write_cache(cache, key, sequences)
    return _read_cache(cache, key) or sequences


def count_items(path: str, is_mixture: bool, n_domains: int) -> list[int]:
    """The largest item index of each domain in a file, plus one. Used if a data set has no other list of items."""
    counts = np.zeros(n_domains, np.int64)
    for chunk in read_chunks(path, is_mixture):
        numbers = np.concatenate([chunk.histories, chunk.targets])
        np.maximum.at(counts, numbers // DOMAIN_STRIDE, numbers % DOMAIN_STRIDE + 1)
    return counts.tolist()


def _parse(path: str, catalogue: "Catalogue", is_mixture: bool, show_progress: bool) -> Sequences:
    parts = []
    for chunk in read_chunks(path, is_mixture, show_progress):
        lines = np.arange(chunk.line, chunk.line + len(chunk.users))
        histories = catalogue.ids(chunk.histories, path, np.repeat(lines, chunk.lengths))
        parts.append((chunk.users, chunk.lengths, histories, catalogue.ids(chunk.targets, path, lines)))
    if not parts:
        raise UserError(f"{path}: holds no rows after its header; expected one row per history and target")
    users, lengths, histories, targets = (np.concatenate(column) for column in zip(*parts, strict=True))
    return fold_rows(users, lengths, histories, targets, show_progress=show_progress)


def _read_cache(cache: str, key: str) -> Sequences | None:
    """The cached sequences with this key, memory-mapped, so that processes share them. None without such a cache."""
    try:
        stored = torch.load(cache, map_location="cpu", mmap=True, weights_only=True)
        if stored["key"] != key:
            return None
        arrays = {name: tensor.numpy() for name, tensor in stored["arrays"].items()}
        return Sequences(**arrays, cut_length=stored["cut_length"])
    except Exception:
        return None  # missing or incomplete: the file is parsed again


def _write_cache(cache: str, key: str, sequences: Sequences) -> None:
    arrays = {name: torch.from_numpy(array) for name, array in vars(sequences).items() if name != "cut_length"}
    try:
        with atomic_path(cache) as temporary:
            torch.save({"key": key, "cut_length": sequences.cut_length, "arrays": arrays}, temporary)
    except (OSError, UserError, RuntimeError):
        pass  # for example a full disk: the next run parses the file again
