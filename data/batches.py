"""Batches of sequences: once encoded, a history serves several predictions.

A batch holds integers only: item ids, which positions are scored, their targets. It knows no features.
"""

import dataclasses
import itertools

import numpy as np
import torch

from data.augment import augment
from data.sequences import places_within

# Sequences of a batch are padded to the longest of their bucket. Only attention goes bucket by bucket: many are cheap.
_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 50)


@dataclasses.dataclass
class SequenceBatch:
    """What the model learns from in one step.

    Attributes:
        items (list of int64 [S_b, L_b]): item ids by bucket, left-aligned, padded with 0 on the right.
        scored (list of int64 [P_b]): which of a bucket's S_b * L_b positions are scored.
        targets (int64 [P]): the item that follows each scored position, buckets one after another.
        weights (float32 [P] or None): how often each prediction counts; None where all count once.
        users (int64 [P]): the user that a prediction belongs to, by number.
        augmented_items, augmented_scored: the second view of pre-training, in the same order; None in fine-tuning.
    """

    items: list
    scored: list
    targets: torch.Tensor
    weights: torch.Tensor | None
    users: torch.Tensor
    augmented_items: list | None = None
    augmented_scored: list | None = None

    def __len__(self):
        return len(self.targets)

    def to(self, device):
        """The same batch on another device."""
        moved = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                moved[field.name] = [tensor.to(device, non_blocking=True) for tensor in value]
            else:
                moved[field.name] = None if value is None else value.to(device, non_blocking=True)
        return SequenceBatch(**moved)

    def split(self, count):
        """Cut the batch, between rows, into at most so many parts of about equal work, in order. Returns a list."""
        rows = [len(items) for items in self.items]
        work = np.cumsum(np.repeat([items.size(1) for items in self.items], rows))
        cuts = np.searchsorted(work, work[-1] * np.arange(1, count) / count) + 1
        bounds = np.unique(np.minimum([0, *cuts, len(work)], len(work))).tolist()
        return [self._rows(start, stop) for start, stop in itertools.pairwise(bounds)]

    def _rows(self, start, stop):
        """The rows start..stop, counted over all buckets."""
        parts, before, done = {"items": [], "scored": [], "augmented_items": [], "augmented_scored": []}, 0, 0
        chosen = []  # predictions
        for bucket, items in enumerate(self.items):
            low, high = max(0, start - before), min(len(items), stop - before)
            edges = torch.tensor([low, high]) * items.size(1)
            first, last = torch.searchsorted(self.scored[bucket], edges).tolist()
            if low < high:
                parts["items"].append(items[low:high])
                parts["scored"].append(self.scored[bucket][first:last] - low * items.size(1))
                chosen.append(slice(done + first, done + last))
                if self.augmented_items:
                    view = self.augmented_items[bucket]
                    parts["augmented_items"].append(view[low:high])
                    parts["augmented_scored"].append(self.augmented_scored[bucket][first:last] - low * view.size(1))
            before, done = before + len(items), done + len(self.scored[bucket])
        return SequenceBatch(
            parts["items"],
            parts["scored"],
            *(
                None if column is None else torch.cat([column[part] for part in chosen])
                for column in (self.targets, self.weights, self.users)
            ),
            parts["augmented_items"] or None,
            parts["augmented_scored"] or None,
        )


class SequenceBatches:
    """Iterates over an epoch's batches in an order that seed and epoch fix.

    Args:
        sequences (Sequences): what to learn.
        batch_size (int): predictions per batch, over all processes; batches come within a sequence of it.
        window (int): items of history that a prediction may see.
        predictions_per_row (int): the most successive predictions that share one encoded history. 1 gives each
            prediction a row of its own, as the published code does. The causal encoder computes the same states either
            way, except where a history is longer than the window. There a prediction sees at least its newest
            window - predictions_per_row + 1 items.
        seed (int): of the order and the augmentation.
        augment_ratios (dict or None): `item_drop_ratio` and `item_drop_coefficient` of a second,
            augmented view of each sequence.
        n_items (int): the catalogue's size, which the ids of shortened texts are above.
        rank, world_size (int): each process takes every world_size-th sequence of the global batch.
    """

    def __init__(
        self,
        sequences,
        batch_size,
        window,
        predictions_per_row,
        seed=2020,
        augment_ratios=None,
        n_items=0,
        rank=0,
        world_size=1,
        shuffle=True,
    ):
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self.augment_ratios, self.n_items = augment_ratios, n_items
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        windows = cut_windows(sequences, window, predictions_per_row)
        predictions = _predictions(sequences, windows[2], windows[1])
        small = np.int32 if len(sequences.items) < 1 << 31 else np.int64  # each process holds these
        self.starts, self.ends, self.firsts, self.sequence_of = (column.astype(small) for column in windows)
        self.predictions = predictions.astype(small)
        self.weighted = bool((sequences.weights > 1).any())
        self.epoch = self.first = 0

    def __len__(self):
        # a stretch that is read at once is never split, so there are no more batches than those
        return min(max(1, round(int(self.predictions.sum()) / self.batch_size)), len(self.starts))

    def set_epoch(self, epoch):
        """Choose the epoch (from 0 on) that the next iteration goes through."""
        self.epoch, self.first = epoch, 0

    def skip(self, count):
        """Leave out the first batches of the next iteration, which a stopped training has behind it."""
        self.first = count

    def __iter__(self):
        generator = np.random.default_rng([self.seed, self.epoch])
        order = np.arange(len(self.starts), dtype=self.starts.dtype)
        if self.shuffle:
            generator.shuffle(order)
        done = np.cumsum(self.predictions[order], dtype=np.int64)
        numbers = np.arange(1, len(self))
        cuts = np.searchsorted(done, done[-1] * numbers / len(self))
        # no batch is empty, not even where one sequence has more predictions than a batch
        cuts = np.maximum.accumulate(np.maximum(cuts - numbers, 0)) + numbers
        cuts = np.minimum(cuts, len(order) - len(self) + numbers)
        del done
        for number, part in enumerate(np.split(order, cuts)[self.first :], start=self.first):
            # the augmentation has a generator of its own for each rank, so no two sequences share a draw
            own = np.random.default_rng([self.seed, self.epoch, number, self.rank, 1])
            mine = part[self.rank :: self.world_size]
            # a process that gets nothing of a small batch encodes a sequence without scoring it: all must take part
            yield self.make(mine, own) if len(mine) else self.make(part[:1], own, mute=True)

    def make(self, windows, generator=None, mute=False):
        """Build the batch of some windows; with `mute`, none of its positions is scored. Returns SequenceBatch."""
        lengths = self.ends[windows] - self.starts[windows]
        by_length = np.argsort(lengths, kind="stable")
        windows, lengths = windows[by_length], lengths[by_length]
        cuts = np.unique(np.searchsorted(lengths, _BUCKETS[:-1], side="right"))
        parts = [self._bucket(bucket, generator, mute) for bucket in np.split(windows, cuts) if len(bucket)]
        columns = {name: [torch.from_numpy(part[name]) for part in parts] for name in parts[0]}
        return SequenceBatch(
            columns["items"],
            columns["scored"],
            torch.cat(columns["targets"]),
            torch.cat(columns["weights"]).float() if self.weighted else None,
            torch.cat(columns["users"]),
            columns["augmented_items"] if self.augment_ratios else None,
            columns["augmented_scored"] if self.augment_ratios else None,
        )

    def _bucket(self, windows, generator, mute):
        """The arrays of some windows of similar length."""
        items, weights = self.sequences.items, self.sequences.weights
        starts, ends = self.starts[windows, None], self.ends[windows, None]
        target = starts + 1 + np.arange(int((ends - starts).max()))  # [S, L], the flat index of each position's target
        inside = target <= ends
        ids = np.where(inside, items[np.where(inside, target - 1, 0)], 0).astype(np.int64)
        wanted = inside & (target >= self.firsts[windows, None]) & (not mute)
        wanted[wanted] = weights[target[wanted]] > 0
        scored = np.flatnonzero(wanted)
        chosen = target[wanted]
        part = {
            "items": ids,
            "scored": scored,
            "targets": items[chosen].astype(np.int64),
            "weights": weights[chosen].astype(np.int64),
            "users": self.sequences.users[self.sequence_of[windows]][scored // ids.shape[1]],
        }
        if self.augment_ratios:
            part["augmented_items"], part["augmented_scored"] = augment(
                ids, scored, self.n_items, generator, **self.augment_ratios
            )
        return part


def cut_windows(sequences, window, predictions_per_row):
    """Cut sequences into what one pass of the encoder reads.

    Returns:
        starts, ends, firsts, sequence_of (int64 [W]): a window reads `items[start:end]` and predicts those of
        `items[first:end + 1]` that have a weight, each from what stands before it; its sequence.
    """
    predictions_per_row = min(predictions_per_row, window)  # a window predicts only what follows its own items
    begin, stop = sequences.offsets[:-1], sequences.offsets[1:]
    counts = -(-(stop - begin - 1) // predictions_per_row)
    sequence_of = np.repeat(np.arange(len(sequences)), counts)
    firsts = begin[sequence_of] + 1 + places_within(counts) * predictions_per_row
    ends = np.minimum(firsts + predictions_per_row, stop[sequence_of]) - 1
    starts = np.maximum(begin[sequence_of], ends - window)
    useful = _predictions(sequences, firsts, ends) > 0
    return starts[useful], ends[useful], firsts[useful], sequence_of[useful]


def _predictions(sequences, firsts, ends):
    """How many positions of `items[first:end + 1]` are to be predicted, int64 [W]."""
    running = np.concatenate([[0], np.cumsum(sequences.weights > 0)])
    return running[ends + 1] - running[firsts]
