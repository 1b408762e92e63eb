"""Text features of the catalogue: memory-mapped files, read where they are needed, never copied whole."""

import os

import numpy as np
import torch

from common.errors import UserError
from common.files import read_json


class ItemFeatures:
    """The feature vectors of a catalogue of N items, which may come from several domains.

    Item id i (1..N) has the vector made from its whole text (`feat1*`); id N + i the one made from its text with some
    words dropped (`feat2*`), where such files were given. Id 0, padding, has none.

    Args:
        paths (list of str): one file a domain, raw numbers, row = item index within the domain.
        counts (list of int): items of each domain.
        width (int): numbers per vector, D.
        dtype (str): `float32` or `float16`.
        augmented_paths (list of str): the same for `feat2*`; empty if not needed.

    Attributes:
        paths (list of str): all files, `feat1*` first.
    """

    def __init__(self, paths, counts, width, dtype="float32", augmented_paths=()):
        self.width = width
        self.n_items = sum(counts)
        self.augmented = bool(augmented_paths)
        self.paths = list(paths) + list(augmented_paths)
        sizes = list(counts) * (2 if self.augmented else 1)
        self._maps = [np.memmap(path, dtype, "r", shape=(n, width)) for path, n in zip(self.paths, sizes, strict=True)]
        self._starts = np.cumsum([1] + sizes)

    def lookup(self, ids):
        """Fetch vectors.

        Args:
            ids (int64 tensor [U]): 1..N, or to 2N where augmented features were given.

        Returns:
            float32 tensor [U, D] on the device of `ids`.
        """
        wanted = ids.cpu().numpy()
        domain = np.searchsorted(self._starts, wanted, side="right") - 1
        assert wanted.min(initial=1) >= 1 and wanted.max(initial=1) < self._starts[-1], "an id outside the catalogue"
        vectors = np.empty((len(wanted), self.width), np.float32)
        for number in np.unique(domain):
            here = domain == number
            vectors[here] = self._maps[number][wanted[here] - self._starts[number]]
        return torch.from_numpy(vectors).to(ids.device)

    def table(self):
        """All N vectors of the whole texts, [N, D]: for one domain the mapped file itself, no copy."""
        maps = self._maps[: len(self._maps) // (2 if self.augmented else 1)]
        # copy-on-write: torch wants memory that could be written to; the files stay as they are
        tables = [torch.from_numpy(np.memmap(m.filename, m.dtype, "c", shape=m.shape)) for m in maps]
        return tables[0] if len(tables) == 1 else torch.cat(tables)


def feature_shape(path, plm_size):
    """How many items of what width a feature file holds.

    The description beside the file (`NAME.feat1CLS.json`) says its width; without one, `plm_size` does.

    Returns:
        (items, width, dtype)

    Raises:
        UserError: no such file, or its size fits neither the description nor `plm_size`.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"{path}: no such feature file; encode the item texts first: "
            f"python dataset/preprocessing/encode_text.py -d {os.path.basename(path).split('.')[0]} --plm_name minilm"
        )
    description = feature_description(path)
    width, dtype = description.get("width", plm_size), description.get("dtype", "float32")
    items = description.get("items")
    for key, value in (("width", width), ("items", items)):
        if type(value) is not int and (description or key == "width") or type(value) is int and value < 1:
            raise UserError(f"{path}.json: {key} {value!r}, expected a whole number from 1 on; encode the texts again")
    if dtype not in ("float32", "float16"):
        raise UserError(f"{path}.json: dtype {dtype!r}, expected float32 or float16; encode the texts again")
    size, row = os.path.getsize(path), width * np.dtype(dtype).itemsize
    says = f"{path}.json" if description else f"plm_size {plm_size}"
    if not size or size % row or (description and size != items * row):
        raise UserError(
            f"{path}: {size} bytes do not fit {says} ({row} bytes an item"
            + (f", {items} items" if description else "")
            + "); encode the texts again"
            + ("" if description else " or set --plm_size to the encoder's width")
        )
    return size // row, width, dtype


def feature_description(path):
    """What stands beside a feature file about it, dict; empty where nothing does."""
    description = read_json(f"{path}.json") if os.path.isfile(f"{path}.json") else {}
    if not isinstance(description, dict):
        raise UserError(f"{path}.json: holds {type(description).__name__}, expected width and items; encode again")
    return description


def find_suffix(folder, domains, suffix):
    """The features to use: `suffix`, or with `auto` feat1CLS where every domain has it, else feat1Mean."""
    if suffix != "auto":
        return suffix
    for candidate in ("feat1CLS", "feat1Mean"):
        if all(os.path.isfile(os.path.join(folder, f"{domain}.{candidate}")) for domain in domains):
            return candidate
    return "feat1CLS"
