"""The representations of a large catalogue, in blocks. n items, H hidden size."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_ITEMS_AT_ONCE = 1 << 12  # items of a block without a backward pass
_ITEMS_KEPT = 1 << 16  # most items whose activations are kept. A larger catalogue is computed again, in such blocks


def item_table(module: Any, ids: Tensor | None = None) -> Tensor:
    """UniSRec.item_table, float [n, H]."""
    ids = module.all_ids() if ids is None else ids
    if not torch.is_grad_enabled():
        table = torch.empty(len(ids), module.hidden_size, device=ids.device)
        for block, rows in zip(ids.split(_ITEMS_AT_ONCE), table.split(_ITEMS_AT_ONCE), strict=True):
            rows.copy_(module.represent_items(block))
        return table
    if len(ids) <= _ITEMS_KEPT:
        return module.represent_items(ids)
    return torch.cat([checkpoint(module.represent_items, part, use_reentrant=False) for part in ids.split(_ITEMS_KEPT)])
