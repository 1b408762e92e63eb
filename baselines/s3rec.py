"""S3-Rec (Zhou et al., CIKM 2020): four self-supervised tasks, then SASRec from the weights that they gave.

The paper's attributes are categories, of which an item has a few. Here the attribute of an item is its text vector,
which no other item needs to share. So "which attributes does this item have" becomes "which of all texts is that of
this item": a softmax over the texts of the catalogue instead of a yes or no for each category. Both estimate the mutual
information of item and attribute, the softmax as in equation 2 of the paper.

    AAP  associated attribute prediction: from the state at an item that is not masked, find the text of this item
    MIP  masked item prediction: from the state at a masked item, tell the item from one outside the sequence
    MAP  masked attribute prediction: from the state at a masked item, find the text of this item
    SP   segment prediction: from a sequence without a segment, tell this segment from a segment of another sequence

B sequences, L positions, N items, H hidden size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.sasrec import SASRec
from baselines.texts import TextProjection
from layers.losses import keep_local

TASKS = ("aap", "mip", "map", "sp")
_DRAWS = 100  # of an item outside a sequence


class Corruption(NamedTuple):
    """What the tasks hide in a batch of sequences, and what they show instead.

    Attributes:
        masked: bool [B, L], the masked items.
        negatives: int64 [B, L], an item outside the sequence for each position.
        segment: bool [B, L], the segment of each sequence. A sequence of one item has none.
        other: int64 [B, L], at the positions of the segment, a segment of the same size from anywhere in the batch.
    """

    masked: Tensor
    negatives: Tensor
    segment: Tensor
    other: Tensor


class S3Rec(SASRec):
    """S3-Rec in one of two stages.

    - `pretrain`: the four tasks. The transformer reads the sequence in both directions.
    - `finetune`: SASRec, whose weights come from the first stage (`pre_model_path`). The texts are not read.

    The tasks are those of RecBole's S3Rec with two differences: the softmax over texts, and MIP compares the scores
    themselves, while RecBole's compares their sigmoids, whose difference cannot exceed 1.
    """

    uses_item_text = True
    only_pretrained = (
        "texts.",
        "mask",
        "aap_norm.",
        "mip_norm.",
        "map_norm.",
        "sp_norm.",
    )  # tensors of this stage only
    gather = staticmethod(keep_local)  # engine.building sets another for several processes

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.train_stage = config["train_stage"]
        if self.train_stage == "finetune":
            return
        self.mask_ratio = config["mask_ratio"]
        self.task_weights = {task: config[f"{task}_weight"] for task in TASKS}
        self.texts = TextProjection(config, dataset.features, self.hidden_size)
        self.mask = nn.Parameter(torch.empty(self.hidden_size).normal_(0.0, self.initializer_range))
        for task in TASKS:
            self.add_module(f"{task}_norm", nn.Linear(self.hidden_size, self.hidden_size))
        for part in (self.texts, *(self.get_submodule(f"{task}_norm") for task in TASKS)):
            part.apply(self._init_weights)

    def calculate_loss(self, batch) -> Tensor:
        """The weighted sum of the tasks per sequence, or the cross entropy of `SASRec`; float []."""
        if self.train_stage == "finetune":
            return super().calculate_loss(batch)
        texts = self.texts(torch.arange(1, self.n_items, device=self.mask.device))
        # a process without a share of the batch has a sequence without scored positions, which must not count
        pairs = zip(batch.items, batch.scored, strict=True)
        sequences = [items[torch.unique(scored // items.size(1))] for items, scored in pairs]
        loss = 0.0 * sum(parameter.sum() for parameter in self.parameters())  # every process has all gradients
        for items in filter(len, sequences):
            for task, losses in self.tasks(items, self.corrupt(items), texts):
                loss = loss + self.task_weights[task] * losses.sum()
        count = torch.tensor([float(sum(map(len, sequences)))], device=loss.device)
        (all_counts,), _, processes = self.gather(count)
        return loss * processes / all_counts.sum().clamp(min=1)

    @torch.no_grad()
    def corrupt(self, items: Tensor) -> Corruption:
        """Draw what the tasks hide in sequences, int64 [B, L], padded with 0 on the right."""
        present, device = items > 0, items.device
        lengths = present.sum(1)  # [B]
        sizes = _below(lengths // 2) + 1  # of the segments, at most half of the sequence
        sizes[lengths < 2] = 0
        starts = _below(lengths - sizes + 1)
        places = torch.arange(items.size(1), device=device)
        within = places - starts[:, None]  # [B, L], place in the segment
        everything = items[present]
        other_starts = _below(len(everything) - sizes + 1)
        return Corruption(
            masked=present & (torch.rand(items.shape, device=device) < self.mask_ratio),
            negatives=self._outside(items),
            segment=(within >= 0) & (within < sizes[:, None]),
            other=everything[(other_starts[:, None] + within).clamp(0, len(everything) - 1)],
        )

    def _outside(self, items):
        """A random item for each position that is not in its sequence, int64 [B, L]. A sequence that holds almost the
        whole catalogue may keep one of its own items."""
        drawn = torch.randint_like(items, 1, self.n_items)
        for _ in range(_DRAWS):
            inside = (drawn[:, :, None] == items[:, None]).any(2) & (items > 0)
            if not inside.any():
                break
            drawn[inside] = torch.randint_like(drawn[inside], 1, self.n_items)
        return drawn

    def tasks(self, items: Tensor, hidden: Corruption, texts: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The losses of the four tasks.

        Args:
            items: int64 [B, L], padded with 0 on the right.
            hidden: from `corrupt`.
            texts: float [N, H], the projected texts of all items.

        Yields:
            The name of a task and its losses, one for each of its predictions, float [n].
        """
        states = self._encode(items, hidden.masked)  # [B, L, H]
        shown, masked = (items > 0) & ~hidden.masked, hidden.masked
        for task, where in (("aap", shown), ("map", masked)):
            logits = self.get_submodule(f"{task}_norm")(states[where]) @ texts.T
            yield task, F.cross_entropy(logits, items[where] - 1, reduction="none")
        targets, negatives = self.item_embedding(items[masked]), self.item_embedding(hidden.negatives[masked])
        yield "mip", _compare(self.mip_norm(states[masked]), targets, negatives)
        has_segment = hidden.segment.any(1)
        rows, others, segment = items[has_segment], hidden.other[has_segment], hidden.segment[has_segment]
        last = (rows > 0).sum(1) - 1
        context, own, other = (
            self._encode(*shown)[torch.arange(len(rows), device=rows.device), last]
            for shown in ((rows, segment), (rows, ~segment), (torch.where(segment, others, rows), ~segment))
        )
        yield "sp", _compare(self.sp_norm(context), own, other)

    def _encode(self, items, masked):
        """The states of sequences in which some items are masked, reading both directions: float [B, L, H]."""
        vectors = torch.where(masked[..., None], self.mask, self.item_embedding(items))
        positions = torch.arange(items.size(1), device=items.device)
        hidden = self.dropout(self.LayerNorm(vectors + self.position_embedding(positions)))
        visible = self.get_attention_mask(items, bidirectional=True)
        return self.trm_encoder(hidden, visible, output_all_encoded_layers=False)[-1]


def _below(bounds):
    """A random whole number from 0 to below each bound; 0 where the bound is 0."""
    return (torch.rand(bounds.shape, device=bounds.device) * bounds).long()


def _compare(states, own, other):
    """-log sigmoid of how much better a state fits its own vector than another, float [n, H] each -> float [n]."""
    return -F.logsigmoid((states * (own - other)).sum(-1))
