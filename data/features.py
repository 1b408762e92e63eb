"""Text features of the catalogue: memory-mapped files, of which only the needed rows are read."""

import contextlib
import os
import re
from collections.abc import Sequence

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic_path, read_json
from data.caches import cache_path, file_key

_BYTES_AT_ONCE = 1 << 26  # of a feature file, while it is checked


class ItemFeatures:
    """The feature vectors of a catalogue of N items, which may come from several domains.

    Item id i (1..N) has the vector of its whole text (`feat1*`). Id N + i is the same item with the vector of its
    shortened text (`feat2*`), if such files are given. Id 0, padding, has no vector.

    Args:
        paths: one file per domain, raw numbers, one row per item, ordered by item index.
        counts: the number of items of each domain.
        width: D, numbers per vector.
        dtype: `float32` or `float16`.
        augmented_paths: the same for `feat2*`. Empty if not needed.

    Attributes:
        description: how the vectors were made, as far as it is known: `encoder`, `pooling`, `normalised`, `width`.
        paths: all files, `feat1*` first.
    """

    def __init__(
        self,
        paths: Sequence[str],
        counts: Sequence[int],
        width: int,
        dtype: str = "float32",
        augmented_paths: Sequence[str] = (),
    ):
        self.width = width
        self.n_items = sum(counts)
        self.augmented = bool(augmented_paths)
        self.paths = [*paths, *augmented_paths]
        sizes = list(counts) * (2 if self.augmented else 1)
        self.description = made_by(paths[0]) | {"width": width}
        self._maps = [
            np.memmap(path, dtype, "r", shape=(size, width)) for path, size in zip(self.paths, sizes, strict=True)
        ]
        self._starts = np.cumsum([1, *sizes])  # the first id of each file

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Read vectors.

        Args:
            ids: int64 [U], from 1 to N, or to 2N if there are augmented features.

        Returns:
            float32 [U, D] on the device of `ids`.
        """
        wanted = ids.cpu().numpy()
        assert wanted.min(initial=1) >= 1 and wanted.max(initial=1) < self._starts[-1], "an id outside the catalogue"
        file = np.searchsorted(self._starts, wanted, side="right") - 1
        vectors = np.empty((len(wanted), self.width), np.float32)
        for number in np.unique(file):
            here = file == number
            vectors[here] = self._maps[number][wanted[here] - self._starts[number]]
        return torch.from_numpy(vectors).to(ids.device)

    def domain_tables(self) -> list[torch.Tensor]:
        """The vectors of the whole texts of each domain, [N_d, D]: the mapped files themselves, without a copy."""
        n_files = len(self.paths) // (2 if self.augmented else 1)  # without those of the shortened texts
        # Mode "c" (copy-on-write): torch requires writable memory, but the files must not change.
        return [
            torch.from_numpy(np.memmap(path, mapped.dtype, "c", shape=mapped.shape))
            for path, mapped in zip(self.paths[:n_files], self._maps[:n_files], strict=True)
        ]

    def first_not_finite(self) -> tuple[str, int] | None:
        """The first file and row with NaN or an infinite number, the row counted from 0. None if there is no such row.

        A large file that holds only finite numbers is read once. A cache tells later runs that it was checked.
        """
        for path, mapped in zip(self.paths, self._maps, strict=True):
            cache, key = cache_path(path, ".finite"), file_key(path)
            if _is_noted(cache, key):
                continue
            rows = max(1, _BYTES_AT_ONCE // (mapped.shape[1] * mapped.itemsize))
            for start in range(0, len(mapped), rows):
                finite = np.isfinite(mapped[start : start + rows])
                if not finite.all():
                    return path, start + int(finite.all(1).argmin())
            if len(mapped) > rows:
                _note(cache, key)
        return None

    def table(self) -> torch.Tensor:
        """The vectors of all N whole texts, [N, D]. With one domain this is the mapped file itself, without a copy."""
        tables = self.domain_tables()
        return tables[0] if len(tables) == 1 else torch.cat(tables)


def _is_noted(cache: str, key: str) -> bool:
    try:
        with open(cache, encoding="utf-8") as file:
            return file.read() == key
    except (OSError, UnicodeDecodeError):
        return False


def _note(cache: str, key: str) -> None:
    with contextlib.suppress(OSError, UserError):  # for example a full disk: the next run reads the file again
        with atomic_path(cache) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(key)


def feature_shape(path: str, plm_size: int) -> tuple[int, int, str]:
    """The number of items, the width and the dtype of a feature file.

    They come from the description beside the file (`NAME.feat1CLS.json`). Without a description the width is
    `plm_size`.

    Raises:
        UserError: the file is missing, or its size fits neither the description nor `plm_size`.
    """
    if not os.path.isfile(path):
        raise UserError(
            f"{path}: no such feature file; encode the item texts first: "
            f"python dataset/preprocessing/encode_text.py -d {os.path.basename(path).split('.')[0]} --plm_name minilm"
        )
    description = feature_description(path)
    if description:
        width, items, dtype = _described_shape(path, {"width": plm_size} | description)
    else:
        width, items, dtype = plm_size, 0, "float32"
    size, row_size = os.path.getsize(path), width * np.dtype(dtype).itemsize
    if not size or size % row_size or (description and size != items * row_size):
        if description:
            expected, remedy = f"{path}.json ({items} items, {row_size} bytes per item)", "encode the texts again"
        else:
            expected = f"plm_size {plm_size} ({row_size} bytes per item)"
            remedy = "set --plm_size to the encoder's width, or encode the texts again"
        raise UserError(f"{path}: {size} bytes do not fit {expected}; {remedy}")
    return size // row_size, width, dtype


def _described_shape(path: str, description: dict) -> tuple[int, int, str]:
    """The width, number of items and dtype in the description of a feature file."""
    for key in ("width", "items"):
        value = description.get(key)
        if type(value) is not int or value < 1:
            raise UserError(f"{path}.json: {key} {value!r}, expected a whole number from 1 on; encode the texts again")
    dtype = description.get("dtype", "float32")
    if dtype not in ("float32", "float16"):
        raise UserError(f"{path}.json: dtype {dtype!r}, expected float32 or float16; encode the texts again")
    return description["width"], description["items"], dtype


def feature_description(path: str) -> dict:
    """The description beside a feature file. Without a description, an empty dict."""
    description = read_json(f"{path}.json") if os.path.isfile(f"{path}.json") else {}
    if not isinstance(description, dict):
        raise UserError(
            f"{path}.json: holds {type(description).__name__}, expected width and items; encode the texts again"
        )
    return description


def made_by(path: str) -> dict:
    """How the vectors of a feature file were made, from its description and its name.

    Returns:
        dict with those of the keys `encoder`, `pooling` and `normalised` that are known.
    """
    description = feature_description(path)
    described = {key: description[key] for key in ("encoder", "pooling", "normalised") if key in description}
    return made_by_suffix(path.rpartition(".")[2]) | described


def made_by_suffix(suffix: str) -> dict:
    """The `pooling` that follows from a suffix such as feat1CLS, as a dict. Empty for other suffixes."""
    match = re.fullmatch(r"feat\d(CLS|Mean)", str(suffix))
    return {"pooling": match[1]} if match else {}


def find_suffix(folder: str, domains: Sequence[str], suffix: str) -> str:
    """The suffix of the feature files. `auto` becomes feat1CLS if every domain has such a file, else feat1Mean."""
    if suffix != "auto":
        return suffix
    for candidate in ("feat1CLS", "feat1Mean"):
        if all(os.path.isfile(os.path.join(folder, f"{domain}.{candidate}")) for domain in domains):
            return candidate
    return "feat1CLS"
