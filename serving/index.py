"""An approximate index of item vectors. docs/serving.md says why it is of this kind.

Product quantization (FAISS): a vector is cut into parts of three numbers, and each is replaced by the nearest of 16. A
search compares these codes of all items with the user vector, by table look-ups in registers. It only has to find
candidates, whose exact scores are then computed.
"""

import faiss
import numpy as np
import torch
from torch import Tensor

TRAINED_ON = 20_000  # rows, from which the codes are learned
LEAST_ITEMS = 1000  # with fewer, codes cannot be learned
_AT_ONCE = 1 << 16  # rows that are added at once


class Index:
    """Item vectors as codes of 4 bits per three numbers, or per two or one if H is not a multiple of three.

    Args:
        units: float32 [N, H], unit vectors.
        rows: int64 [n], which of them are items. At least `LEAST_ITEMS`.
    """

    def __init__(self, units: Tensor, rows: Tensor):
        width = units.size(1)
        parts = next(width // length for length in (3, 2, 1) if width % length == 0)
        # one inverted list, which every search reads: without a list, FAISS does not filter
        self._index = faiss.index_factory(width, f"IVF1,PQ{parts}x4fs", faiss.METRIC_INNER_PRODUCT)
        sample = torch.linspace(0, len(rows) - 1, min(TRAINED_ON, len(rows))).long()
        self._index.train(units[rows[sample]].numpy())
        # Codes are never removed: FAISS 1.15 writes wrong codes if codes are added after others were removed
        self._rows = np.zeros(0, np.int64)  # the row of each code
        self._valid = np.zeros(0, bool)  # whether a code is that of an item
        self._codes = np.zeros(0, np.int64)  # by row: the code that was added last, or -1
        for part in rows.split(_AT_ONCE):
            self.set(part, units[part])

    def __len__(self) -> int:
        return int(self._valid.sum())

    def remove(self, rows: Tensor) -> None:
        """Remove items, int64 [n]. Rows that are not in the index have no effect."""
        self._valid[self._codes_of(rows)] = False

    def set(self, rows: Tensor, units: Tensor) -> None:
        """Add items, or give them other vectors: distinct rows int64 [n], unit vectors float32 [n, H]."""
        self.remove(rows)
        missing = int(rows.max()) + 1 - len(self._codes) if len(rows) else 0
        self._codes = np.pad(self._codes, (0, max(missing, 0)), constant_values=-1)
        self._codes[rows.numpy()] = np.arange(len(self._rows), len(self._rows) + len(rows))
        self._rows = np.concatenate([self._rows, rows.numpy()])
        self._valid = np.pad(self._valid, (0, len(rows)), constant_values=True)
        self._index.add(units.contiguous().numpy())

    def _codes_of(self, rows):
        """The codes of those rows that have one."""
        codes = self._codes[rows[rows < len(self._codes)].numpy()]
        return codes[codes >= 0]

    def search(self, unit: Tensor, count: int, excluded: Tensor) -> Tensor:
        """Rows of items with a high cosine with a vector.

        Args:
            unit: float32 [H].
            count: how many items.
            excluded: int64 [n], rows that are left out.

        Returns:
            int64 [count], or fewer if there are fewer items.
        """
        valid = self._valid.copy()
        valid[self._codes_of(excluded)] = False
        selector = faiss.IDSelectorBitmap(np.packbits(valid, bitorder="little"))
        parameters = faiss.SearchParametersIVF(sel=selector)
        _, codes = self._index.search(unit[None].numpy(), count, params=parameters)
        return torch.from_numpy(self._rows[codes[0][codes[0] >= 0]])
